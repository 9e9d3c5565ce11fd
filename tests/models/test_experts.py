"""Mixtures of experts: each family against experts written separately, cases worked out by hand, invariances."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload
from conftest import fast, saved_tensors
from mixtures import FAMILIES, tiny_mixture
from torch import nn

from lib.allocation.formulas import uniform
from lib.calibration.hidden import enter_blocks, pass_samples
from lib.calibration.statistics import input_statistics
from lib.core.errors import UserError
from lib.evaluation.perplexity import perplexity_by_blocks
from lib.models import load, memory
from lib.models.experts import is_experts, matrices
from lib.models.layers import check_support, find_blocks, prunable_layers
from lib.models.load import Dtypes
from lib.models.safetensors_io import write_shard
from lib.models.streamed import Streamed
from lib.models.weights import weights_of
from lib.pruning.plan import SparsityPlan
from lib.pruning.pruners import PRUNERS
from lib.pruning.walk import check_saved, walk


@pytest.fixture(params=fast(FAMILIES, 4))
def family(request):
    return request.param


def families_and(values) -> list:
    """Return pairs for parametrize: in the fast tests four families with the first value, and one with every value."""
    values = list(values)
    pairs = [(family, value) for family in FAMILIES for value in values]
    first = [pair for pair in pairs if pair[0] == FAMILIES[0] or pair[0] in FAMILIES[:4] and pair[1] == values[0]]
    return fast([*first, *(pair for pair in pairs if pair not in first)], len(first))


def experts_of(model) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if is_experts(module)}


class SeparateExperts(nn.Module):
    """The experts of a fused module as linear layers of their own; each sees *all* tokens and is masked afterwards.

    ``seen`` holds the inputs of each matrix that count, and the router's weights of their rows, by ``NUMBER.ROLE``.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.act, self.seen = [fused._apply_gate if fused.has_gate else fused.act_fn], {}
        self.interleaved, self.linears = not fused.is_concatenated, nn.ModuleDict()
        for e in range(len(fused.down_proj)):
            for name in ("gate_up_proj", "up_proj", "down_proj"):
                weight = getattr(fused, name, None)
                if weight is None:
                    continue
                weight = weight[e].T if fused.is_transposed else weight[e]
                bias = getattr(fused, f"{name}_bias")[e] if fused.has_bias else None
                rows = {name: slice(None)}
                if name == "gate_up_proj":
                    half = len(weight) // 2
                    rows = {"gate_proj": slice(0, half), "up_proj": slice(half, None)}
                    if self.interleaved:
                        rows = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
                for role, its in rows.items():
                    linear = nn.Linear(weight.shape[1], len(weight[its]), bias=fused.has_bias)
                    linear.weight = nn.Parameter(weight[its].detach().clone())
                    if fused.has_bias:
                        linear.bias = nn.Parameter(bias[its].detach().clone())
                    self.linears[f"{e}-{role}"] = linear

    def forward(self, hidden, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden)
        for e in range(1 + max(int(key.partition("-")[0]) for key in self.linears)):
            chosen = top_k_index == e
            share, mask = (top_k_weights * chosen).sum(-1), chosen.any(-1)
            inner = self.linears[f"{e}-up_proj"](hidden)
            if f"{e}-gate_proj" in self.linears:
                gate = self.linears[f"{e}-gate_proj"](hidden)
                pair = torch.cat([gate, inner], -1)
                if self.interleaved:
                    pair[..., 0::2], pair[..., 1::2] = gate, inner
                inner = self.act[0](pair)
            else:
                inner = self.act[0](inner)
            out += self.linears[f"{e}-down_proj"](inner) * (share * mask)[:, None]
            for role, x in (("gate_proj", hidden), ("up_proj", hidden), ("down_proj", inner)):
                if f"{e}-{role}" in self.linears:
                    self.seen.setdefault(f"{e}.{role}", []).append((x[mask].double(), share[mask].double()))
        self.seen.setdefault("all", []).append((hidden.double(), top_k_weights.double().square().mean(-1).sqrt()))
        return out


def statistic_by_hand(seen: dict, key: str, kind: str, by_router: bool, samples: int) -> torch.Tensor:
    """Return a statistic of a matrix of an expert from all of its inputs at once, with pseudo-tokens, in float64."""

    def gathered(key: str) -> torch.Tensor:
        return torch.cat([x * share[:, None] if by_router else x for x, share in seen[key]])

    x, every = gathered(key), gathered("all")
    width = x.shape[1]
    if "down" not in key:
        pseudo = width / len(every) * every.T @ every
    else:
        pseudo = torch.eye(width).double() * (x.square().sum() / len(x) if len(x) else 1)
    square = (x.T @ x + pseudo) / samples
    if kind == "hessian":
        # Twice the squares, and so are pseudo-tokens, but for the 1 where there are no tokens.
        return square * (2 if len(x) or "down" not in key else 1)
    return square.diagonal()


@torch.no_grad()
def with_separate_experts(model, windows) -> tuple[dict[str, SeparateExperts], list[torch.Tensor]]:
    """Return separate experts that have run on the windows, and the logits they led to."""
    other = copy.deepcopy(model)
    separate = {}
    for name, fused in experts_of(other).items():
        separate[name] = SeparateExperts(fused)
        fused.forward = separate[name].forward
    return separate, [other(window[None], use_cache=False).logits for window in windows]


# ------------------------------------------------------------------------------------------------------ every family


def test_matrices_are_views_of_what_the_model_computes_with(family, tiny_windows):
    model = tiny_mixture(family)
    check_support(family, model)
    layers = prunable_layers(model)
    weights, separate = weights_of(model), with_separate_experts(model, [])[0]
    names = [layer.name for layer in layers]
    # Nothing is missed: what is left are routers, gates of one row, and what is no matrix.
    shapes = {layer.name: layer.shape for layer in layers}
    for name, one in separate.items():
        for key, linear in one.linears.items():
            assert shapes.pop(f"{name}.{key.replace('-', '.')}") == tuple(linear.weight.shape)
    in_tree = {n for n, m in find_blocks(model)[1].named_modules() if isinstance(m, nn.Linear)}
    left = {n for n in in_tree if f"{find_blocks(model)[0]}.{n}" not in shapes}
    assert all("router" in n or "gate" in n for n in left) and len(left) <= 2, left

    for block in weights.visit(write=True):
        for name, linear in block.linears.items():
            owner, *key = name.rsplit(".", 2)
            if owner in separate:
                assert torch.equal(linear.weight, separate[owner].linears["-".join(key)].weight), name
                linear.weight.data.zero_()
    assert [name for block in weights.visit() for name in block.linears] == names
    for experts in experts_of(model).values():
        assert all(not p.any() for n, p in experts.named_parameters() if "bias" not in n)
        assert all(linear.weight.is_meta for linear in matrices(experts).values())  # or memory would not be freed
    listed = [id(p) for p in model.parameters()]
    assert len(listed) == len(set(listed)) and not any(".0.gate_proj" in n for n in model.state_dict())


@torch.no_grad()
def test_walk_gives_the_models_own_hidden_states(family, tiny_windows):
    model = tiny_mixture(family)
    wanted = [model(window[None], use_cache=False, output_hidden_states=False).logits for window in tiny_windows[:2]]
    own: list[list] = []
    for block in find_blocks(model)[1]:
        own.append(kept := [])
        block.register_forward_hook(lambda _, args, out, kept=kept: kept.append(out[0] if type(out) is tuple else out))
    for window in tiny_windows[:2]:
        model(window[None], use_cache=False)
    weights = weights_of(model)
    inputs = enter_blocks(weights, tiny_windows[:2])
    for block, outputs in zip(weights.visit(), own, strict=True):
        pass_samples(block, inputs, keep=True)
        # The same sums in the same order, but for gpt-oss, whose library's product adds the bias within.
        torch.testing.assert_close(inputs.hidden, torch.cat(outputs[:2]), rtol=1e-5, atol=1e-5)
    for window, logits in zip(tiny_windows, wanted, strict=False):  # and the model is as it was
        assert torch.equal(model(window[None], use_cache=False).logits, logits)


@pytest.mark.parametrize(("family", "kind"), families_and(["squared_norms", "hessian"]))
@torch.no_grad()
def test_statistics_are_those_of_separate_experts(family, kind, tiny_windows):
    model = tiny_mixture(family)
    separate, logits = with_separate_experts(model, tiny_windows)
    for window, wanted in zip(tiny_windows, logits, strict=True):
        torch.testing.assert_close(model(window[None], use_cache=False).logits, wanted, rtol=1e-4, atol=1e-5)

    for weighting in ("auto", "router", "none"):
        weights = weights_of(model)
        inputs = enter_blocks(weights, tiny_windows)._replace(expert_weighting=weighting)
        by_router = weighting == "router" or (weighting, kind) == ("auto", "squared_norms")
        compared = 0
        for block in weights.visit():
            for group in input_statistics(block, inputs, kind, keep=True):
                for name in group.layers:
                    owner, *key = name.rsplit(".", 2)
                    if owner not in separate:
                        assert group.tokens is None
                        continue
                    seen, key = separate[owner].seen, ".".join(key)
                    assert group.tokens == sum(len(x) for x, _ in seen[key])
                    wanted = statistic_by_hand(seen, key, kind, by_router, len(tiny_windows))
                    # Sums of float32 products of a window in another order.
                    torch.testing.assert_close(group.value.double(), wanted, rtol=1e-4, atol=1e-4)
                    compared += 1
        assert compared == sum(len(one.linears) for one in separate.values())


@pytest.mark.parametrize(("family", "pruner"), families_and(sorted(PRUNERS, key=lambda name: name != "sparsegpt")))
def test_walk_prunes_what_separate_experts_would_be_pruned_to(family, pruner, tiny_windows):
    model = tiny_mixture(family)
    separate, _ = with_separate_experts(model, tiny_windows)
    weights = weights_of(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = next(block for block in weights.visit() if block.experts)
    statistics = {}
    if PRUNERS[pruner].statistic:
        inputs = enter_blocks(weights, tiny_windows)
        for block in weights.visit():
            if block.index == first.index:
                for group in input_statistics(block, inputs, PRUNERS[pruner].statistic, keep=False):
                    statistics |= dict.fromkeys(group.layers, group.value)
                break
            pass_samples(block, inputs, keep=True)
    # Only the first block with experts is pruned: what enters it is then the dense model's.
    ratios = {layer.name: 0.5 * (layer.block == first.index) for layer in weights.layers}
    inputs = enter_blocks(weights, tiny_windows) if PRUNERS[pruner].statistic else None
    rows = walk(weights, SparsityPlan(0.25, ratios), PRUNERS[pruner], inputs)

    pruned = weights.snapshot()
    for name, weight in pruned.items():
        owner, *key = name.rsplit(".", 2)
        if owner in separate and ratios[name]:
            dense = {name: separate[owner].linears["-".join(key)].weight.data}
            pair = [other for other in statistics if statistics[other] is statistics[name]] or [name]
            dense = {other: separate[owner].linears["-".join(other.rsplit(".", 2)[1:])].weight.data for other in pair}
            prepared = PRUNERS[pruner].prepare(statistics[name].clone() if statistics else None)
            wanted = dict(PRUNERS[pruner].prune_all(dense, prepared, dict.fromkeys(dense, 0.5), dict.fromkeys(dense)))
            assert torch.equal(weight, wanted[name]), name
            assert 0.4 < float((weight == 0).float().mean()) < 0.6
    assert all((row.tokens is None) == (inputs is None or ".experts." not in row.name) for row in rows)
    layers = {f"{layer.name}.weight" for layer in weights.layers}
    for name, tensor in model.state_dict().items():  # routers, biases, buffers, norms
        if name not in layers and not any(name.startswith(owner) for owner in separate) or "bias" in name:
            assert torch.equal(tensor, before[name]), name


def test_offloaded_experts_are_pruned_to_the_same_weights(family, tiny_windows):
    here, away = tiny_mixture(family), tiny_mixture(family)
    cpu_offload(away, execution_device=torch.device("cpu"))
    done = []
    for model in (here, away):
        weights = weights_of(model)
        plan = SparsityPlan(0.5, uniform(weights.layers, 0.5))
        walk(weights, plan, PRUNERS["sparsegpt"], enter_blocks(weights, tiny_windows[:4]))
        done.append(weights.map(lambda _, weight: weight.clone()))
    assert all(module.down_proj.is_meta for module in experts_of(away).values())  # given back
    assert all(torch.equal(weight, done[1][name]) for name, weight in done[0].items())


def test_marks_of_older_versions_of_transformers_are_refused():
    model = tiny_mixture("mixtral")
    for experts in experts_of(model).values():
        del experts.is_concatenated
    with pytest.raises(UserError, match=r"needs transformers 5\.8"):
        check_support("mixtral", model)


# ------------------------------------------------------------------------------------------------- worked out by hand


def by_hand(hidden: torch.Tensor, index: list, weights: list, experts: nn.Module):
    """Run an experts module alone, as a block whose linear layers are its matrices; return statistics by name."""
    from lib.calibration.hidden import BlockInputs
    from lib.models.layers import Layer
    from lib.models.weights import Weights

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = experts

        def forward(self, x):
            return self.experts(x[0], torch.tensor(index), torch.tensor(weights))[None]

    model = nn.ModuleDict({"block": Block()})
    shapes = {f"block.experts.{key}": tuple(linear.weight.shape) for key, linear in matrices(experts).items()}
    home = Weights(model, [model["block"]], [Layer(name, 0, shape) for name, shape in shapes.items()])
    inputs = BlockInputs(hidden[None], [((), {})], 1, set(), expert_weighting="none")
    (block,) = home.visit()
    found = []
    for block in home.visit():
        found = input_statistics(block, inputs, "squared_norms", keep=True)
    return {name.removeprefix("block.experts."): group for group in found for name in group.layers}, inputs.hidden[0]


def one_hot_experts() -> nn.Module:
    """Return three experts of width 4 and one neuron: expert e reads column e, and writes twice that to column e."""
    config = tf.MixtralConfig(hidden_size=4, intermediate_size=1, num_local_experts=3, num_experts_per_tok=1)
    config.hidden_act = "relu"
    config._experts_implementation = "eager"
    experts = tf.models.mixtral.modeling_mixtral.MixtralExperts(config)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.zero_()
        for e in range(3):
            experts.gate_up_proj[e, 0, e], experts.gate_up_proj[e, 1, 3] = 2, 1
            experts.down_proj[e, e, 0] = 1
    return experts


def test_one_hot_experts_by_hand():
    hidden = torch.tensor([[1.0, 2, 3, 1], [4, 5, 6, 1], [7, 8, 9, 1]])
    # Expert 0 sees the first and the last row, expert 1 none, expert 2 one row.
    found, out = by_hand(hidden, [[0], [2], [0]], [[1.0], [0.5], [2.0]], one_hot_experts())
    assert out.tolist() == [[2, 0, 0, 0], [0, 0, 6, 0], [28, 0, 0, 0]]  # relu(2 x_e) * 1, times the router's weight
    assert [found[f"{e}.gate_proj"].tokens for e in range(3)] == [2, 0, 1]
    assert found["0.gate_proj"] is found["0.up_proj"]
    mean = torch.tensor([1 + 16 + 49, 4 + 25 + 64, 9 + 36 + 81, 3.0]) / 3 * 4  # four pseudo-tokens, the layer's mean
    assert torch.allclose(found["0.up_proj"].value, torch.tensor([1 + 49, 4 + 64, 9 + 81, 2.0]) + mean)
    assert torch.allclose(found["1.up_proj"].value, mean)
    assert torch.allclose(found["2.up_proj"].value, torch.tensor([16, 25, 36, 1.0]) + mean)
    # One neuron: 2 and 14 in expert 0, 12 in expert 2; one pseudo-token is the mean square, and 1 without a token.
    assert [found[f"{e}.down_proj"].value.item() for e in range(3)] == [4 + 196 + 100, 1, 144 + 144]


@pytest.mark.parametrize("pruner", [name for name in PRUNERS if PRUNERS[name].statistic])
@pytest.mark.parametrize("tokens", [0, 1])
def test_an_expert_with_no_or_one_token_is_pruned_to_its_ratio_and_not_destroyed(tokens, pruner, tiny_windows, caplog):
    model = tiny_mixture("qwen3-moe")
    windows = tiny_windows[:1, :1] if tokens else tiny_windows
    for router in (block.mlp.gate for block in model.model.layers if not tokens):
        router.register_forward_hook(lambda _, args, out: (*out[:2], torch.where(out[2] == 2, 1, out[2])))
    weights = weights_of(model)
    dense = weights.snapshot()
    plan = SparsityPlan(0.5, uniform(weights.layers, 0.5))
    rows = walk(weights, plan, PRUNERS[pruner], enter_blocks(weights, windows))
    counts = {row.name.rpartition(".")[0]: row.tokens for row in rows if row.tokens is not None}
    assert tokens in counts.values()
    few = "4 of 4 experts see fewer tokens than they have columns" if tokens else "1 of 4 experts"
    assert few in caplog.text and (", 1 none" in caplog.text or tokens)
    for name, weight in weights.snapshot().items():
        owner, _, role = name.rpartition(".")
        kept = (weight != 0).float().mean()
        assert abs(kept - 0.5) < 0.02, (name, float(kept))
        if owner in counts:  # kept weights are moved no further than they are large, whatever few tokens say
            assert (weight - dense[name])[weight != 0].abs().max() < 0.8, name
        if counts.get(owner) == 0 and role == "down_proj" and pruner == "wanda":
            least = dense[name].abs().sort(dim=1).values[:, weight.shape[1] // 2 - 1 : weight.shape[1] // 2 + 1]
            assert torch.equal(weight != 0, dense[name].abs() > least[:, :1])  # magnitude decides, row by row


# --------------------------------------------------------------------------------------------------------- invariances


def pair_with_one_expert() -> tuple[nn.Module, nn.Module]:
    """Return a dense Qwen3 and a Qwen3 mixture of one expert that computes the same."""
    common = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    common |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128}
    torch.manual_seed(3)
    dense = tf.AutoModelForCausalLM.from_config(tf.Qwen3Config(**common, initializer_range=0.2)).eval()
    options = common | {"moe_intermediate_size": 48, "num_experts": 1, "num_experts_per_tok": 1, "norm_topk_prob": True}
    mixture = tf.AutoModelForCausalLM.from_config(tf.Qwen3MoeConfig(**options)).eval()
    state = dense.state_dict()
    for name, tensor in mixture.state_dict().items():
        if name in state:
            tensor.copy_(state[name])
    for i, block in enumerate(mixture.model.layers):
        mlp = dense.model.layers[i].mlp
        block.mlp.experts.gate_up_proj.data[0] = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach()
        block.mlp.experts.down_proj.data[0] = mlp.down_proj.weight.detach()
    return dense, mixture


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_mixture_of_one_expert_is_the_dense_model(pruner, monkeypatch, tiny_windows):
    monkeypatch.setattr("lib.calibration.statistics.with_pseudo_tokens", lambda total, tokens, shared: total)
    pruned = []
    for model in pair_with_one_expert():
        weights = weights_of(model)
        inputs = enter_blocks(weights, tiny_windows) if PRUNERS[pruner].statistic else None
        walk(weights, SparsityPlan(0.5, uniform(weights.layers, 0.5)), PRUNERS[pruner], inputs)
        pruned.append({name.replace("experts.0.", ""): weight for name, weight in weights.snapshot().items()})
    dense, mixture = pruned
    assert list(dense) == list(mixture)
    for name in dense:
        assert torch.equal(dense[name] == 0, mixture[name] == 0), name
        # The additions of an expert's product come in another order; SparseGPT and ALPS solve with them.
        close = {"magnitude": 0, "wanda": 0, "sparsegpt": 1e-5, "alps": 1e-3}[pruner]
        torch.testing.assert_close(dense[name], mixture[name], rtol=close, atol=close)


def test_the_order_of_an_experts_neurons_does_not_matter(tiny_windows):
    # So what few tokens are filled up with may not come from the neurons of other experts.
    pruned = []
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    for permuted in (False, True):
        model = tiny_mixture("qwen3-moe")
        experts = model.model.layers[0].mlp.experts
        if permuted:
            gate, up = experts.gate_up_proj.data[1].chunk(2)
            experts.gate_up_proj.data[1] = torch.cat([gate[order], up[order]])
            experts.down_proj.data[1] = experts.down_proj.data[1][:, order]
        weights = weights_of(model)
        walk(weights, SparsityPlan(0.5, uniform(weights.layers, 0.5)), PRUNERS["wanda"],
             enter_blocks(weights, tiny_windows))  # fmt: skip
        pruned.append(weights.snapshot())
    name = "model.layers.0.mlp.experts.1.down_proj"
    assert torch.equal(pruned[0][name][:, order] == 0, pruned[1][name] == 0)


@pytest.mark.parametrize("propagate", fast(["pruned", "dense"], 1))
@pytest.mark.parametrize(
    ("family", "pruner"), fast([("qwen2-moe", "sparsegpt"), ("gemma4", "alps"), ("qwen2-moe", "alps")], 2)
)
def test_experts_in_groups_are_the_same_as_all_at_once(family, pruner, propagate, monkeypatch, tiny_windows):
    pruned, passes = [], []
    for free in (2**40, 0):
        monkeypatch.setattr(memory, "free_ram", lambda free=free: free)
        weights = weights_of(tiny_mixture(family))
        ratios = {layer.name: 0.3 + 0.4 * layer.block for layer in weights.layers}
        inputs = enter_blocks(weights, tiny_windows)
        asked = []

        def counted(*how, asked=asked):
            asked.append(how[-1])
            return input_statistics(*how)

        monkeypatch.setattr("lib.pruning.walk.input_statistics", counted)
        walk(weights, SparsityPlan(0.5, ratios), PRUNERS[pruner], inputs, propagate=propagate)
        pruned.append((weights.snapshot(), inputs.hidden))
        passes.append(len(asked))
    assert passes == [2, 8]  # two blocks of four experts
    for name, weight in pruned[0][0].items():
        assert torch.equal(weight, pruned[1][0][name]), name
    assert torch.equal(pruned[0][1], pruned[1][1])


# ------------------------------------------------------------------------------------------------ on disk, every family


class Shards:
    """A journal of a walk without a run: it stores each block in a file."""

    failure = None

    def __init__(self, folder: Path) -> None:
        self.folder, self.finished = folder, {}

    def path(self, index: int) -> Path:
        return self.folder / f"model-{index}.safetensors"

    def add(self, index, weights, rows) -> None:
        write_shard(self.path(index), weights.tensors(index), weights.save_dtypes(index))
        weights.set_block_file(index, self.path(index))
        self.finished[index] = rows


def saved_model(family: str, folder: Path, dtype: torch.dtype) -> Path:
    """Return a folder with a tiny model whose weights are of ``dtype``, as transformers saves them."""
    tiny_mixture(family).to(dtype).save_pretrained(folder / "dense")
    return folder / "dense"


def homes(folder: Path, compute: torch.dtype, save: torch.dtype) -> dict[str, Callable]:
    """Return functions that open a model in memory and streamed."""

    def in_memory():
        model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=compute).eval()
        return weights_of(model, None if compute == save else save)

    return {"memory": in_memory, "streamed": lambda: Streamed(folder, Dtypes(compute, save), torch.device("cpu"))}


BF16, FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize(("family", "dtypes"), families_and([(FULL, BF16), (FULL, FULL), (BF16, BF16)]), ids=str)
def test_streamed_is_in_memory_is_what_transformers_saves(family, dtypes, tmp_path, tiny_tokenizer, tiny_windows):
    compute, save = dtypes
    dense = saved_model(family, tmp_path, save)
    written = {}
    for name, opened in homes(dense, compute, save).items():
        journal = Shards(tmp_path / name)
        journal.folder.mkdir()
        for _ in range(2):  # a walk that is stopped after the first block, and one that resumes
            weights = opened()
            plan = SparsityPlan(0.5, {layer.name: 0.3 + 0.4 * layer.block for layer in weights.layers})
            journal.finished = {0: rows} if (rows := journal.finished.get(0)) else {}
            walk(weights, plan, PRUNERS["wanda"], enter_blocks(weights, tiny_windows), journal=journal)
        assert journal.finished[0] is rows
        load.complete_folder(journal.folder, weights, tiny_tokenizer)
        check_saved(journal.folder, weights, weights.sparsity())
        written[name] = saved_tensors(journal.folder)
        if name == "memory":
            model = weights.model
    for name, tensor in written["memory"].items():
        assert torch.equal(tensor, written["streamed"][name]), name
        assert tensor.dtype == written["streamed"][name].dtype, name
    assert written["memory"].keys() == written["streamed"].keys()

    # What is no prunable matrix is as it was, bit for bit, and the names are the published ones.
    before, pruned = saved_tensors(dense), weights.pruned_tensors()
    assert before.keys() == written["memory"].keys()
    for name in before.keys() - pruned:
        assert torch.equal(before[name].float(), written["memory"][name].float()), name
    assert all((written["memory"][name] == 0).any() for name in pruned)

    # Plain transformers reads the folder, and saves the same.
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "streamed", dtype=compute).eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(*(m(tiny_windows[:1], use_cache=False).logits for m in (model, again)))


def test_streamed_experts_that_are_stored_fused(tmp_path, tiny_windows):
    model = tiny_mixture("mixtral")
    model.save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in saved_tensors(tmp_path)
    weights = Streamed(tmp_path, Dtypes(FULL, FULL), torch.device("cpu"))
    assert weights.fingerprints() == weights_of(model).fingerprints()
    for block in weights.visit(write=True):  # changed blocks are written under the published names, and read again
        for linear in block.linears.values():
            linear.weight.data.zero_()
    assert weights.sparsity() == 1


def test_streamed_perplexity_is_that_in_memory(family, tmp_path, tiny_windows):
    # In half precision, where another order of additions shows.
    opened = homes(saved_model(family, tmp_path, BF16), BF16, BF16).values()
    one, two = (perplexity_by_blocks(home(), tiny_windows) for home in opened)
    assert one == two


@pytest.mark.parametrize("family", ["deepseek-v3", "minimax-m2", "lfm2-moe"])
def test_a_routers_correction_bias_is_read_from_disk(family, tmp_path, tiny_windows):
    perplexities = []
    for change in (0.0, 1.0):
        model = tiny_mixture(family)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name or "expert_bias" in name:
                buffer[0] += change
        model.save_pretrained(tmp_path / str(change))
        weights = Streamed(tmp_path / str(change), Dtypes(FULL, FULL), torch.device("cpu"))
        perplexities.append(perplexity_by_blocks(weights, tiny_windows))
        assert perplexities[-1] == perplexity_by_blocks(weights_of(model), tiny_windows)
        assert all(p.is_meta for p in weights.model.parameters())
    assert perplexities[0] != perplexities[1]
