"""Recovery against autograd through the whole model: gradients, zeros of every family, falling loss, the same bits."""

import copy

import pytest
import torch
from conftest import fast, tiny_llama
from mixtures import tiny_mixture
from pretend_cuda import pretend_cuda
from test_load_models import KINDS, build
from test_memory import peak_bytes
from transformers import LlamaConfig, LlamaForCausalLM

from lib.calibration.hidden import enter_blocks
from lib.core.errors import UserError
from lib.models import memory
from lib.models.experts import is_experts, matrices
from lib.models.weights import weights_of
from lib.recovery import distill
from lib.recovery.adam import STATES, TRAINED, Trained
from lib.recovery.block_walk import BlockWalk, DenseStates, head_loss
from lib.recovery.distill import BY, Distillation, RecoveryOptions, rate_at

LENGTH = 16
WINDOWS = torch.randint(3, 300, (48, LENGTH), generator=torch.Generator().manual_seed(1))
HELD = torch.randint(3, 300, (3, LENGTH), generator=torch.Generator().manual_seed(2))


def prune(model, ratio: float = 0.5):
    """Set the smallest weights of each matrix to zero and return the model."""
    for block in weights_of(model).visit(write=True):
        for linear in block.linears.values():
            weight = linear.weight.data
            weight[weight.abs() <= weight.abs().flatten().float().kthvalue(int(weight.numel() * ratio)).values] = 0
    return model


def zeros(model) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in weights_of(model).map(lambda _, w: w == 0).items()}


def distillation(model, dense, tokens: int = 8 * 2 * LENGTH, **options) -> Distillation:
    options = RecoveryOptions(tokens, **options)
    windows = WINDOWS[: tokens // options.least_tokens(LENGTH) * options.batch], HELD
    return Distillation(weights_of(model), weights_of(dense) if dense else None, options, windows)


def finish(work: Distillation, state=None, keep=lambda *_: None, finished=None):
    return work.run(state, keep, finished or {})


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def whole_loss(model, dense, windows: torch.Tensor) -> torch.Tensor:
    """Return the mean loss by the models' own forward passes: KL to the dense model, or of the next token."""
    logits = model(windows, use_cache=False).logits.float()
    if dense is None:
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="sum"
        )
        return loss / windows.numel()
    with torch.no_grad():
        goal = dense(windows, use_cache=False).logits.float().log_softmax(-1)
    divergence = torch.nn.functional.kl_div(logits.log_softmax(-1), goal, reduction="sum", log_target=True)
    return divergence / windows.numel()


@pytest.mark.parametrize("kind", fast([*KINDS], 3))
@pytest.mark.parametrize("teacher", [True, False], ids=["dense", "text"])
def test_gradients_are_autograds(kind, teacher, monkeypatch):
    dense, model = build(kind), prune(build(kind))
    dense = dense if teacher else None
    plain, taken = copy.deepcopy(model), {}
    with torch.no_grad():  # a dense model whose last norm is another one
        for name, tensor in model.named_parameters():
            if dense and "norm" in name and "layers" not in name and tensor.ndim == 1:
                dense.get_parameter(name).mul_(1.1)

    def note(trained, gradient, scale, *_):
        (name,) = (name for name, x in work.trained.items() if x is trained)
        taken[name] = gradient.float() / scale

    monkeypatch.setattr(Trained, "step", note)
    work = distillation(model, dense, 2 * LENGTH)
    report = finish(work)
    loss = whole_loss(plain, dense, WINDOWS[:2])
    loss.backward()
    assert report["losses"] == [pytest.approx(loss.item(), rel=1e-5)]
    expected = {}
    for block in weights_of(plain).visit():
        expected |= {f"{name}.weight": linear.weight.grad for name, linear in block.linears.items()}
        vectors = {name: x for name, x in block.module.named_parameters() if x.ndim == 1}
        expected |= {f"{block.index}.{name}": tensor.grad for name, tensor in vectors.items()}
    behind = taken.keys() - expected.keys()
    assert all("norm" in name or "ln_f" in name for name in behind) and behind, "the last norm"
    expected |= {name: plain.get_parameter(name).grad for name in behind}
    assert taken.keys() == expected.keys()
    expected = {name: torch.zeros_like(taken[name]) if x is None else x for name, x in expected.items()}
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        # Sums in float32 in another order; the bias of keys changes nothing, and its gradient is such a rounding.
        assert (taken[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7 * largest, name


def test_gradients_of_experts_are_autograds(monkeypatch):
    dense, taken = tiny_mixture("mixtral"), {}
    model = prune(copy.deepcopy(dense))
    plain = copy.deepcopy(model)
    monkeypatch.setattr(Trained, "step", lambda trained, slope, scale, *_: taken.update({trained.place: slope / scale}))
    finish(distillation(model, dense, 2 * LENGTH))
    whole_loss(plain, dense, WINDOWS[:2]).backward()
    experts = {name: module for name, module in plain.named_modules() if is_experts(module)}
    for name, module in experts.items():
        for key, linear in matrices(model.get_submodule(name)).items():
            expected = linear.place.view(module, getattr(module, linear.place.name).grad)
            # Sums of float32 in another order.
            torch.testing.assert_close(taken[linear, "weight"], expected, rtol=1e-4, atol=1e-7, msg=f"{name}.{key}")
    assert len(experts) == 2


@pytest.mark.parametrize("kind", fast([*KINDS], 2))
@pytest.mark.parametrize("by", BY)
def test_zeros_keep_their_places_and_all_else_is_trained(kind, by):
    dense, model = build(kind), prune(build(kind), 0.6).bfloat16()
    dense.bfloat16()
    before, start = zeros(model), parameters(model)
    finish(distillation(model, dense, by=by, learning_rate=0.02))
    for name, mask in zeros(model).items():
        assert torch.equal(mask, before[name]), name
        weight = model.get_submodule(name).weight
        assert (weight != start[f"{name}.weight"])[~mask].float().mean() > 0.5 and torch.isfinite(weight).all(), name
    untouched = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert all(any(torch.equal(x, y) for y in start.values() if y.shape == x.shape) for x in untouched)


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("train", TRAINED)
@pytest.mark.parametrize("by", BY)
def test_loss_falls(train, by, states):
    work = distillation(prune(tiny_llama()), tiny_llama(), 24 * 2 * LENGTH, train=train, by=by, states=states, rank=8)
    report = finish(work)
    first, last = report["losses"][:6], report["losses"][18:24]  # the same windows, where there are several epochs
    assert sum(last) < 0.97 * sum(first) if by == "block" else report["held_after"] < 0.97 * report["held_before"]
    steps = 24 if by == "model" else 3 * 6 * distill.EPOCHS
    assert len(report["losses"]) == steps and report["tokens"] == 24 * 2 * LENGTH


@pytest.mark.parametrize(("rate", "worse"), [(1.0, True), (0.003, False)])
def test_training_that_does_harm_is_warned_of(rate, worse, caplog):
    report = finish(distillation(prune(tiny_llama()), tiny_llama(), 8 * 2 * LENGTH, learning_rate=rate))
    assert (report["held_after"] > report["held_before"]) == worse == ("lower --learning_rate" in caplog.text)


def test_gradient_of_the_last_states_is_that_of_kl_div(tiny_weights):
    inputs = enter_blocks(tiny_weights, WINDOWS[:1])
    draw = torch.Generator().manual_seed(0)
    states, goal = (torch.randn(1, LENGTH, 32, generator=draw) for _ in range(2))
    walk = BlockWalk(tiny_weights, inputs._replace(hidden=[]), None, True)
    loss = head_loss(walk, DenseStates(WINDOWS[:1], None, goal), [states], [0], differentiate=True)
    model, leaf = tiny_weights.model, states.clone().requires_grad_()
    logits = [model.lm_head(model.model.norm(x)).log_softmax(-1) for x in (leaf, goal)]
    plain = torch.nn.functional.kl_div(logits[0], logits[1], reduction="sum", log_target=True) / LENGTH
    plain.backward()
    assert (loss.total / loss.count).item() == pytest.approx(plain.item(), rel=1e-6)
    torch.testing.assert_close(loss.gradients[0] / loss.scale, leaf.grad, rtol=1e-5, atol=1e-8)


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    ("train", "states"), [("surviving", "float32"), ("surviving", "8bit"), ("low_rank", "float32")]
)
def test_resumed_training_gives_the_same_bits(train, states, tmp_path, monkeypatch):
    def work():
        return distillation(prune(tiny_llama()), tiny_llama(), train=train, states=states, rank=4)

    unbroken = work()
    losses = finish(unbroken)["losses"]
    monkeypatch.setattr(distill, "STORE_EVERY", -1)  # after each step
    stopped, step = work(), Distillation._step
    monkeypatch.setattr(Distillation, "_step", lambda *args: step(*args) if args[4] < 5 else exec("raise Stopped"))
    with pytest.raises(Stopped):
        finish(stopped, tmp_path / "state")
    monkeypatch.setattr(Distillation, "_step", step)
    resumed = work()
    assert finish(resumed, tmp_path / "state")["losses"] == losses
    for name, tensor in parameters(unbroken.weights.model).items():
        assert torch.equal(tensor, resumed.weights.model.get_parameter(name)), name


def test_weights_and_rate_by_pencil():
    rates = [rate_at(step, 20) for step in range(20)]  # two steps up, then half a cosine
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[11] == pytest.approx(0.5) and 0 < rates[-1] < 0.01
    model = prune(tiny_llama())
    for block in weights_of(model).visit(write=True):
        for linear in block.linears.values():
            linear.weight.data[linear.weight != 0] = 0.5
    assert distillation(model, None).rate == pytest.approx(0.0033 * 0.5)


def test_a_loss_that_is_not_finite_ends_with_its_step(monkeypatch):
    work = distillation(prune(tiny_llama()), tiny_llama())
    real, calls = distill.head_loss, []

    def broken(*args, **kwargs):
        calls.append(1)
        loss = real(*args, **kwargs)
        return loss._replace(total=loss.total * float("nan")) if len(calls) == 4 else loss  # the first is held out

    monkeypatch.setattr(distill, "head_loss", broken)
    with pytest.raises(UserError, match="the loss is nan at step 3 of 8; lower"):
        finish(work)


def test_what_is_all_zero_is_refused():
    model = tiny_llama()
    for block in weights_of(model).visit(write=True):
        for linear in block.linears.values():
            linear.weight.data.zero_()
    with pytest.raises(UserError, match="has no weight that is not zero"):
        distillation(model, None)


@pytest.mark.parametrize(
    ("by", "said"), [("model", r"in the CPU's memory beside the weights and .* are free"), ("block", "its dense one")]
)
def test_what_does_not_fit_is_refused(by, said, monkeypatch):
    monkeypatch.setattr("lib.models.memory.free_memory", lambda _: {"cpu": 10_000})
    with pytest.raises(UserError, match=f"are needed .*{said}"):
        distillation(prune(tiny_llama()), tiny_llama(), by=by)


def test_live_bytes_are_fourteen_a_survivor_and_a_block(monkeypatch):
    config = LlamaConfig(
        vocab_size=300, hidden_size=128, intermediate_size=384, num_hidden_layers=8, num_attention_heads=4
    )
    work = distillation(prune(LlamaForCausalLM(config), 0.7), None, 2 * 2 * LENGTH)
    work._keeps, weights, left = False, work.weights, sum(work.left.values())
    activations = memory.price_working_set(weights.model, weights.layers, torch.float32, LENGTH, 2, 2)
    assert 12 * left < peak_bytes(lambda: finish(work)) < 14 * left + activations


def test_no_gradient_or_state_is_kept_for_what_is_zero():
    work = distillation(prune(tiny_llama(), 0.75), tiny_llama())
    finish(work)
    for layer in work.weights.layers:
        kept = work.trained[f"{layer.name}.weight"].tensors
        assert [len(tensor) for tensor in kept] == [work.left[layer.name]] * 3 and len(kept[0]) < 0.26 * layer.size
    assert all(parameter.grad is None for parameter in work.weights.model.parameters())


def test_states_of_the_dense_model_leave_the_device_to_the_training():
    with pretend_cuda():
        model = tiny_llama().half().to("cuda")
        for place, on_device in (("auto", False), ("gpu", True)):
            windows, options = (WINDOWS[:2], HELD), RecoveryOptions(2 * LENGTH)
            work = Distillation(weights_of(prune(model)), weights_of(model), options, windows, place)
            assert work._dense_states(HELD).leaving.is_cuda == on_device
