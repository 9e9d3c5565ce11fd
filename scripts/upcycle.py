"""Mixture of experts cut from a dense LLaMA: each MLP split into a shared expert and routed ones, then distilled."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib.calibration import texts
from lib.calibration.hidden import advance, enter_blocks, pass_samples
from lib.cli.command import command, make_parser
from lib.cli.flags import Flags, flag
from lib.core import files
from lib.core.errors import UserError
from lib.core.lazy import torch, transformers
from lib.models.load import load_llm, load_skeleton, load_tokenizer, save_llm
from lib.models.locate import locate
from lib.models.weights import weights_of
from lib.recovery.block_walk import fast_dtype
from lib.recovery.distill import Distillation, RecoveryOptions

FIT_WINDOWS = 8  # on which neurons are grouped, and routers and projections fitted
HELD_WINDOWS = 4  # on which the loss is measured before and after
ROUNDS = 4  # of k-means
DAMPING = 0.01  # of least squares, as a fraction of the mean of the diagonal
SHARED = 0.25  # of the neurons, those of the shared expert, at least
SPREAD = 0.5  # standard deviation of the routers' logits, about


@dataclass(kw_only=True)
class Upcycling(Flags):
    _title: ClassVar[str] = "mixture"

    model: str = flag("smollm2-135m", "a dense LLaMA: folder, hub id or smollm2-135m", metavar="NAME")
    save_model: str = flag("out/smollm2-moe", "where the mixture is written", metavar="DIR")
    experts: int = flag(8, "routed experts of a block, a count", least=2, metavar="N")
    active: int = flag(3, "experts that a token passes, a count", least=1, metavar="N")
    tokens: int = flag(200_000, "tokens to distil on, a count, 0 for none", least=0, metavar="N")
    batch: int = flag(2, "windows a step, a count", least=1, metavar="N")
    learning_rate: float = flag(0.0004, "the highest", above=0)
    seqlen: int = flag(512, "length of a window, tokens", least=2, metavar="N")
    calib_data: str = flag("wiki_leads", "text, as for main.py", metavar="TEXT")
    seed: int = flag(0, "of windows and clusters")
    cache_dir: str | None = flag(None, "where models are kept (default: the repository's llm_weights)", metavar="DIR")

    def check(self) -> None:
        if self.active > self.experts:
            raise UserError("active", self.active, f"is more than the {self.experts} experts")


PARSER = make_parser(Upcycling, "upcycle.py", __doc__)


def empty_mixture(dense: transformers.LlamaForCausalLM, settings: Upcycling) -> transformers.Qwen2MoeForCausalLM:
    """Return a mixture with the ``dense`` model's weights and shapes, except for the MLPs, which are random."""
    usual = transformers.Qwen2MoeConfig().to_dict()
    config = {name: value for name, value in dense.config.to_dict().items() if name in {*usual, "head_dim"}}
    width = int(dense.config.intermediate_size * (1 - SHARED)) // settings.experts // 8 * 8  # as grouped products take
    config |= {
        "model_type": usual["model_type"], "num_experts": settings.experts, "num_experts_per_tok": settings.active,
        "moe_intermediate_size": width, "norm_topk_prob": True, "qkv_bias": False,
        "shared_expert_intermediate_size": dense.config.intermediate_size - settings.experts * width,
    }  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen2MoeConfig(**config), dtype=dense.dtype)
    model.load_state_dict(dense.state_dict(), strict=False)
    model.generation_config = dense.generation_config
    return model.eval()


def clusters(features: torch.Tensor, count: int, draw: torch.Generator) -> torch.Tensor:
    """Return the neurons [count, n / count] of each cluster of ``features`` [n, dimensions]: k-means of equal sizes."""
    from scipy.optimize import linear_sum_assignment

    features = torch.nn.functional.normalize(features, dim=1)
    centres = features[torch.randperm(len(features), generator=draw)[:count]]
    for _ in range(ROUNDS):
        likeness = (features @ centres.T).repeat(1, len(features) // count)  # a column for each place in a cluster
        _, columns = linear_sum_assignment(likeness, maximize=True)
        cluster = torch.from_numpy(columns) % count
        centres = torch.stack([features[cluster == i].mean(0) for i in range(count)])
        centres = torch.nn.functional.normalize(centres, dim=1)
    return cluster.argsort(stable=True).view(count, -1)


def least_squares(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the matrix [in, out] with which x [tokens, in] is closest to y [tokens, out], damped."""
    gram = x.T @ x
    return torch.linalg.solve(gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram)), x.T @ y)


def split(mlp: torch.nn.Module, mixture: torch.nn.Module, x: torch.Tensor, draw: torch.Generator) -> None:
    """Split a dense ``mlp`` into the experts of ``mixture``, by what its neurons do for the inputs x [tokens, width].

    The neurons that contribute most are shared, the others are grouped by the tokens for which they contribute. The
    router is fitted to the log of the norm of each expert's output. The projections back are then moved by least
    squares towards the dense output, since a token sees a part of the neurons only.
    """
    router, (count, _, size) = mixture.gate, mixture.experts.down_proj.shape
    gate, up, down = (getattr(mlp, name).weight for name in ("gate_proj", "up_proj", "down_proj"))
    inner = mlp.act_fn(x @ gate.T) * (x @ up.T)  # [tokens, neurons]
    contribution = inner.abs() * down.norm(dim=0)
    order = contribution.mean(0).argsort(descending=True)
    shared, routed = order[: -count * size], order[-count * size :]
    neurons = routed[clusters(contribution[:, routed].T, count, draw)]  # [experts, size]

    norms = torch.stack([(inner[:, mine] @ down[:, mine].T).norm(dim=1) for mine in neurons], 1).clamp(min=1e-6).log()
    norms -= norms.mean(1, keepdim=True)  # [tokens, experts]
    router.weight.copy_(least_squares(x, SPREAD * norms / norms.std()).T)
    _, shares, chosen = router(x)
    shares = torch.zeros_like(norms).scatter_(1, chosen, router.top_k * shares)

    order = torch.cat([shared, neurons.flatten()])
    seen = inner[:, order] * torch.cat([torch.ones(len(x), len(shared)), shares.repeat_interleave(size, 1)], 1)
    back = down[:, order]
    back = back + least_squares(seen, inner @ down.T - seen @ back.T).T

    mixture.shared_expert_gate.weight.zero_()  # a half, whatever the token
    mixture.shared_expert.gate_proj.weight.copy_(gate[shared])
    mixture.shared_expert.up_proj.weight.copy_(up[shared])
    mixture.shared_expert.down_proj.weight.copy_(2 * back[:, : len(shared)])
    mixture.experts.gate_up_proj.copy_(torch.cat([gate[neurons], up[neurons]], 1))
    mixture.experts.down_proj.copy_(router.top_k * back[:, len(shared) :].unflatten(1, (count, size)).transpose(0, 1))


def cut(
    dense: transformers.LlamaForCausalLM, windows: torch.Tensor, settings: Upcycling
) -> transformers.Qwen2MoeForCausalLM:
    """Return a mixture cut from the ``dense`` model, block by block on its own hidden states of ``windows``."""
    draw = torch.Generator().manual_seed(settings.seed)
    weights = weights_of(empty_mixture(dense, settings))
    inputs = enter_blocks(weights, windows)
    for block, layer in zip(weights.visit(write=True), dense.model.layers, strict=True):
        entering: list[torch.Tensor] = []
        hook = block.module.mlp.register_forward_pre_hook(lambda _, args, to=entering: to.append(args[0].flatten(0, 1)))
        pass_samples(block, inputs, keep=False)
        hook.remove()
        with torch.no_grad():
            split(layer.mlp, block.module.mlp, torch.cat(entering), draw)
        advance(block, inputs)
    return weights.model


def run(settings: Upcycling) -> None:
    """Cut the model, distil the dense one into the mixture, and save it."""
    target = Path(settings.save_model)
    options = RecoveryOptions(settings.tokens, learning_rate=settings.learning_rate, batch=settings.batch)
    if target.exists():
        raise UserError("save_model", target, "already exists", "give another folder, or remove it")
    files.check_writable("save_model", target.parent)
    source = locate(settings.model, settings.cache_dir)
    config, tokenizer = load_skeleton(source).config, load_tokenizer(source)
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        raise UserError("model", settings.model, "is no LLaMA without biases, which alone can be cut")
    if settings.experts * 8 > config.intermediate_size * (1 - SHARED):
        raise UserError("experts", settings.experts, f"are too many for {config.intermediate_size} neurons")
    text = (settings.calib_data, tokenizer)
    fitted = texts.calibration_windows(*text, FIT_WINDOWS, settings.seqlen, settings.seed)
    counts = (settings.tokens // options.least_tokens(settings.seqlen) * settings.batch, HELD_WINDOWS)
    windows = texts.recovery_windows(*text, counts, settings.seqlen, settings.seed)

    dense = load_llm(source, torch.float32, "cpu")
    model = cut(dense, fitted, settings)
    if counts[0]:
        pair, dtype = (weights_of(model), weights_of(dense)), fast_dtype(torch.device("cpu"), torch.float32)
        report = Distillation(*pair, options, windows, dtype=dtype).run(None, lambda *_: None, {})
        print("held-out loss: {held_before:.3f} -> {held_after:.3f}, {tokens} tokens".format(**report))
    save_llm(model, tokenizer, target, config.dtype)
    print(f"written: {target}")


def main(argv: Sequence[str] | None = None) -> int:
    return command(Upcycling, run, argv, PARSER)


if __name__ == "__main__":
    sys.exit(main())
