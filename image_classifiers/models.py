"""Image classifiers: located, loaded and saved; their blocks and layers by structure, and what prunes them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from lib.calibration.hidden import BlockInputs, PassEnded
from lib.core.errors import UserError, did_you_mean, first_line
from lib.core.files import new_folder
from lib.core.lazy import timm, torch
from lib.models.layers import Layer
from lib.models.weights import Weights
from lib.pruning.pruners import PRUNERS, Pruner, magnitude

log = logging.getLogger(__name__)

CLASSIFIERS = "timm's ViT, DeiT and ConvNeXt models (deit_small_patch16_224, vit_base_patch16_224, convnext_base ...)"
MOST_OUTSIDE = 4  # Matrices before and after the blocks are few: patch embedding or stem, and head.


class ClassifierSource(NamedTuple):
    """Where a model comes from: as ``given``, the ``name`` by which timm builds it, and its ``folder`` if any."""

    given: str
    name: str
    folder: Path | None


class Parts(NamedTuple):
    """Weights of a classifier over its blocks and the downsampling between them.

    ``pruned`` lends the blocks' linear layers and 1x1 convolutions, ``measured`` their depthwise convolutions as well.
    """

    pruned: Weights
    measured: Weights


def locate_classifier(model: str) -> ClassifierSource:
    """Return where ``model`` comes from; a UserError if timm has no such name, and ``--save_model`` no such folder."""
    path = Path(model)
    if path.is_file():
        raise UserError("model", model, "is a file", "give the model's name, and the file as --resume")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError("model", model, "the folder holds no config.json", "give one that --save_model wrote")
        return ClassifierSource(model, f"local-dir:{path}", path)
    if not timm.is_model(model):
        hint = did_you_mean(model, timm.list_models())
        raise UserError("model", model, f"unknown to timm.{hint} Supported: {CLASSIFIERS}")
    return ClassifierSource(model, model, None)


def skeleton(
    source: ClassifierSource, resume: str | None, size: int | None, classes: int | None
) -> tuple[torch.nn.Module, int, dict]:
    """Return the model on the meta device, the side of its images in pixels, and the options it is created with.

    Raises:
        UserError: it is not supported, does not accept images of ``size``, or has no weights for ``classes``.
    """
    usual = _create(source, {}, "meta")
    config, trained = usual.pretrained_cfg, usual.num_classes
    side = config["input_size"][-1]
    if not resume and classes not in (None, trained):  # timm would leave a random classifier there
        problem = f"the weights of {source.given} are for {trained} classes"
        raise UserError("nb_classes", classes, problem, "give fine-tuned weights with --resume")
    resized = size not in (None, side) and config.get("fixed_input_size")
    options = {"num_classes": classes, "img_size": size if resized else None}  # timm leaves out what is None
    model = _create(source, options, "meta")
    _check_chain(model, find_parts(model, source.given).pruned.modules, size or side, source.given)
    return model, size or side, options


def load_classifier(source: ClassifierSource, resume: str | None, options: dict) -> torch.nn.Module:
    """Return the model in evaluation mode on the CPU, with the weights of ``resume``, its folder, or timm's own."""
    if resume or source.folder:
        model = _create(source, options, "cpu")
        fill_weights(model, Path(resume) if resume else source.folder / "model.safetensors")
        return model
    log.info("looking up timm's weights of %s in its cache and on the Hugging Face hub", source.given)
    return _create(source, options, "cpu", pretrained=True)


def _create(source: ClassifierSource, options: dict, device: str, pretrained: bool = False) -> torch.nn.Module:
    try:
        with torch.device(device):
            return timm.create_model(source.name, pretrained=pretrained, **options).eval()
    except Exception as error:  # whatever a wrong tag, size or folder, or a hub out of reach leads to
        problem, fix = f"timm cannot create it ({first_line(error)})", None
        if pretrained:
            problem = f"timm's weights cannot be loaded ({first_line(error)})"
            fix = "give a file: --resume FILE (image_classifiers/download_weights.sh fetches the published ones)"
        raise UserError("model", source.given, problem, fix) from error


def find_parts(model: torch.nn.Module, given: str | None = None) -> Parts:
    """Return the weights of ``model``, its blocks found by their structure.

    They are one list of transformer blocks, or stages of ConvNeXt blocks with the modules between them.

    Raises:
        UserError: the model has another structure; ``given`` names it in the message.
    """
    kinds = {
        f"{name}.{child}": _kind(module)
        for name, modules in model.named_modules()
        if isinstance(modules, torch.nn.Sequential | torch.nn.ModuleList)
        for child, module in modules.named_children()
    }
    blocks = {name: kind for name, kind in kinds.items() if kind}
    trunk = ".".join(os.path.commonprefix([name.split(".") for name in blocks]))  # what holds all blocks
    if not trunk or len(set(blocks.values())) > 1:
        reason = "its blocks are not all of one kind, in one chain" if blocks else "it has no blocks of a known kind"
        raise _refusal(model, given, reason)

    chain = _chain(trunk, model.get_submodule(trunk), blocks)
    modules = [model.get_submodule(name) for name in chain]
    measured = [
        Layer(f"{name}.{inner}", index, tuple(matrix.weight.shape))
        for index, name in enumerate(chain)
        if name in blocks
        for inner, matrix in _matrices(modules[index]).items()
    ]
    outside = sorted(_matrices(model).keys() - {layer.name for layer in measured})
    if len(outside) > MOST_OUTSIDE + len(chain) - len(blocks):  # downsampling, between the blocks, has one each
        raise _refusal(model, given, f"{len(outside)} matrices outside its blocks would stay dense ({outside[0]} ...)")
    pruned = [layer for layer in measured if _pointwise(model.get_submodule(layer.name))]
    return Parts(Weights(model, modules, pruned), Weights(model, modules, measured))


def _chain(name: str, module: torch.nn.Module, blocks: Iterable[str]) -> list[str]:
    """Return the names of the modules in ``module`` that hidden states pass through: blocks, and what is between."""
    if name in blocks or not any(block.startswith(f"{name}.") for block in blocks):
        return [name] if any(True for _ in module.parameters()) else []
    return [link for child, inner in module.named_children() for link in _chain(f"{name}.{child}", inner, blocks)]


def _kind(block: torch.nn.Module) -> str | None:
    matrices = list(_matrices(block).values())
    if any(p.ndim > 1 and all(p is not m.weight for m in matrices) for p in block.parameters()):
        return None  # for example position biases: they would stay dense
    if len(matrices) >= 4 and all(isinstance(m, torch.nn.Linear) for m in matrices):
        return "transformer"  # attention: two or more, MLP: two or more
    linear = [m for m in matrices if _pointwise(m)]
    convolutions = [m for m in matrices if isinstance(m, torch.nn.Conv2d) and not _pointwise(m)]
    if len(matrices) == 3 and len(linear) == 2 and len(convolutions) == 1:
        (hidden, width), back = (tuple(m.weight.shape[:2]) for m in linear)
        depthwise = convolutions[0].groups == convolutions[0].in_channels == convolutions[0].out_channels == width > 1
        return "convnext" if depthwise and back == (width, hidden) else None
    return None


def _matrices(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return {name: inner for name, inner in module.named_modules() if isinstance(inner, kinds)}


def _pointwise(module: torch.nn.Module) -> bool:
    if isinstance(module, torch.nn.Conv2d):
        plain = module.kernel_size == (1, 1) and module.stride == (1, 1) and module.groups == 1
        return plain and module.padding in (0, (0, 0), "same", "valid")
    return isinstance(module, torch.nn.Linear)


def _check_chain(model: torch.nn.Module, blocks: Sequence[torch.nn.Module], size: int, given: str) -> None:
    """Refuse a ``model``, on the meta device, whose forward pass does not hand one tensor from block to block."""
    calls: list[tuple] = []
    for block in blocks:
        block.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True)
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, size, size, device="meta"))
    except Exception as error:  # for example too small for the downsampling
        raise UserError("input_size", size, f"{given} cannot take images of this size ({first_line(error)})") from error
    plain = [module for module, *_ in calls] == list(blocks)
    plain = plain and all(len(args) == 1 and not kwargs for _, args, kwargs, _ in calls)
    if not plain or any(entering[0] is not left for (*_, left), (_, entering, *_) in pairwise(calls)):
        raise _refusal(model, given, "its blocks are given more than what left the block before")


def _refusal(model: torch.nn.Module, given: str | None, reason: str) -> UserError:
    kind = type(model).__name__
    return UserError("model", given or kind, f"{kind} is not supported, {reason}", f"supported: {CLASSIFIERS}")


def wanda_of_matrix(weight: torch.Tensor, mean_squares: torch.Tensor, ratio: float, nm: None = None) -> torch.Tensor:
    """Zero everything <= the int(n * ratio)-th (from 0) of the sorted |W| * sqrt(s), one threshold for the matrix.

    Args:
        weight: [out, in].
        mean_squares: s [in] float32, the mean over tokens of x^2.
    """
    kept = magnitude(weight.abs() * mean_squares.sqrt(), None, ratio, None) != 0
    return weight.masked_fill(~kept, 0)


# As in the language models, but for Wanda, which compares within the matrix and not within each row (published).
IMAGE_PRUNERS: dict[str, Pruner] = PRUNERS | {"wanda": Pruner(wanda_of_matrix, "squared_norms")}


def block_inputs(weights: Weights, batches: Iterable[tuple], kept_on: str | None) -> BlockInputs:
    """Return the inputs of the first block for ``batches`` of images and labels, as ``data.batches`` yields them.

    Statistics will be means over tokens. The hidden states are ``kept_on`` that device, None for the model's.
    """
    hidden: list[torch.Tensor] = []

    def catch(_, args: tuple) -> None:
        hidden.append(args[0].to(kept_on or args[0].device))
        raise PassEnded

    device = next(weights.model.parameters()).device
    with weights.modules[0].register_forward_pre_hook(catch):
        for images, _ in batches:
            with torch.no_grad(), suppress(PassEnded):
                weights.model(images.to(device))
    return BlockInputs(hidden, [((), {})] * len(weights.modules), None, set())


def fill_weights(model: torch.nn.Module, path: Path) -> None:
    """Fill ``model`` with the weights in ``path``, in the layout of Meta's ConvNeXt, DeiT, jx_vit, or timm.

    Raises:
        UserError: the file cannot be read, or its keys or shapes do not fit.
    """
    state, needed = read_weight_file(path), model.state_dict()
    for key in ("pos_embed", "patch_embed.proj.weight"):
        if key not in state or key not in needed or state[key].shape[1:] == needed[key].shape[1:]:
            continue
        shapes = f"{key} is {list(state[key].shape)} and the model's {list(needed[key].shape)}"
        if key != "pos_embed" or state[key].shape[-1] != needed[key].shape[-1]:  # timm would resample it silently
            raise UserError(None, path, f"its weights do not fit; {shapes}")
        log.warning("%s: %s; it is resampled, since the weights are for images of another size", path.name, shapes)

    remap = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)  # timm's, of original layouts
    try:
        model.load_state_dict(remap(state, model) if remap else state)
    except (KeyError, RuntimeError, ValueError, AttributeError) as error:  # of timm where keys are another model's
        keys = " ".join(str(error).split())
        fix = "set the model's number of classes with --nb_classes" if "mismatch for head" in keys else None
        raise UserError(None, path, f"its weights do not fit ({keys[:400]})", fix) from error


def read_weight_file(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors by name in a ``.safetensors`` file or a PyTorch checkpoint; code in it is not run."""
    from argparse import Namespace  # noqa: TID251

    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError("resume", path, "file not found")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([Namespace]):  # training scripts keep their flags beside
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the readers raise on a damaged file, or on one that tries to run code
        raise UserError("resume", path, f"cannot be read as weights ({first_line(error)})") from error
    state = next((state[key] for key in ("model", "module", "state_dict") if key in state), state)
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError("resume", path, "holds no weights by name", "give a state_dict, or one under `model`")
    return {key.removeprefix("module."): value for key, value in state.items()}


def save_classifier(model: torch.nn.Module, size: int, target: Path) -> None:
    """Write a folder from which timm builds the model for images of ``size`` x ``size``: ``local-dir:FOLDER``."""
    with new_folder(target) as folder:
        timm.models.save_for_hf(model, folder, safe_serialization=True, data_config={"input_size": (3, size, size)})
