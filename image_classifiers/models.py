"""Image classifiers: located, loaded and saved; their blocks and layers by structure, and what prunes them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lib.calibration.hidden import BlockInputs, PassEnded
from lib.core.errors import UserError, first_line
from lib.core.files import new_folder
from lib.core.lazy import torch
from lib.core.names import did_you_mean
from lib.models.layers import Layer
from lib.models.weights import Weights
from lib.pruning.pruners import PRUNERS, Pruner, magnitude

log = logging.getLogger(__name__)

# Which models are supported, for --help and errors.
CLASSIFIERS = "timm's ViT, DeiT and ConvNeXt models (deit_small_patch16_224, vit_base_patch16_224, convnext_base ...)"
# Matrices outside the blocks are few: patch embedding or stem, and head.
MOST_OUTSIDE = 4
# An error lists this many keys of a weight file.
_LISTED = 6


class ClassifierSource(NamedTuple):
    """Where a model comes from: ``given`` by the user, the ``name`` by which timm builds it, its ``folder`` if any."""

    given: str
    name: str
    folder: Path | None

    @property
    def label(self) -> str:
        """Return the name under which its metrics are cached."""
        return self.folder.resolve().name if self.folder else self.given


class Parts(NamedTuple):
    """Weights of a classifier over one chain of modules: its blocks, and the downsampling between them.

    ``pruned`` lends the linear layers and 1x1 convolutions inside the blocks; ``measured`` those and the depthwise
    convolutions, in the model's order.
    """

    pruned: Weights
    measured: Weights


# ---------------------------------------------------------------------------------------------------- finding


def locate_classifier(model: str) -> ClassifierSource:
    """Return where ``model`` comes from: a name known to timm, or a folder written by ``--save_model``.

    Raises:
        UserError: it is neither.
    """
    import timm

    path = Path(model).expanduser()
    if path.is_dir():
        for name in ("config.json", "model.safetensors"):
            if not (path / name).is_file():
                raise UserError("model", model, f"the folder holds no {name}", "give one that --save_model wrote")
        return ClassifierSource(model, f"local-dir:{path}", path)
    if path.is_file():
        raise UserError("model", model, "is a file", "give the model's name, and the file as --resume")
    if not timm.is_model(model):
        hint = did_you_mean(model, timm.list_models())
        raise UserError("model", model, f"unknown to timm.{hint} Supported: {CLASSIFIERS}")
    return ClassifierSource(model, model, None)


def skeleton(source: ClassifierSource, size: int | None, classes: int | None) -> tuple[torch.nn.Module, int]:
    """Return the model without weights (on the meta device), and the side of its input images in pixels.

    Raises:
        UserError: it is not supported, does not accept images of ``size``, or does not have ``classes`` outputs.
    """
    model = _create(source, {"num_classes": classes}, "meta")
    usual = model.pretrained_cfg["input_size"][-1]
    if size not in (None, usual) and source.folder:
        raise UserError("input_size", size, f"the model in {source.given} takes {usual}")
    if not model.num_classes:
        raise UserError("model", source.given, "has no classifier", "add --nb_classes and --resume, or choose another")
    if source.folder and classes not in (None, _create(source, {}, "meta").num_classes):
        problem = f"the model in {source.given} has another number of classes"
        raise UserError("nb_classes", classes, problem, "leave the flag out")
    model = _create(source, _options(model, size, classes), "meta")
    _check_chain(model, find_parts(model, source.given).pruned.modules, size or usual, source.given)
    return model, size or usual


def load_classifier(source: ClassifierSource, resume: str | None, size: int, classes: int | None) -> torch.nn.Module:
    """Return the model in evaluation mode on the CPU, with the weights of ``resume``, its folder, or timm's own.

    Raises:
        UserError: the weights cannot be obtained, or do not fit the model.
    """
    empty = _create(source, {}, "meta")
    options = _options(empty, size, classes)
    if resume or source.folder:
        model = _create(source, options, "cpu")
        fill_weights(model, Path(resume).expanduser() if resume else source.folder / "model.safetensors")
        return model
    trained = empty.pretrained_cfg["num_classes"]
    if classes not in (None, trained):  # timm would leave a random classifier there
        problem = f"timm's weights of {source.given} are for {trained} classes"
        raise UserError("nb_classes", classes, problem, "give fine-tuned weights with --resume")
    log.info("looking up timm's weights of %s in its cache and on the Hugging Face hub", source.given)
    return _create(source, options, "cpu", pretrained=True)


def _create(source: ClassifierSource, options: dict, device: str, pretrained: bool = False) -> torch.nn.Module:
    import timm

    try:
        with torch.device(device):
            return timm.create_model(source.name, pretrained=pretrained, **options).eval()
    except Exception as error:  # whatever a wrong tag, size or folder, or a hub out of reach leads to
        problem, fix = f"timm cannot create it ({first_line(error)})", None
        if pretrained:
            problem = f"timm's weights cannot be loaded ({first_line(error)})"
            fix = "give a file: --resume FILE (image_classifiers/download_weights.sh fetches the published ones)"
        raise UserError("model", source.given, problem, fix) from error


def _options(model: torch.nn.Module, size: int | None, classes: int | None) -> dict:
    config = model.pretrained_cfg
    resized = size not in (None, config["input_size"][-1]) and config.get("fixed_input_size")
    return {"num_classes": classes, "img_size": size if resized else None}  # timm leaves out what is None


# --------------------------------------------------------------------------------------- blocks and their layers


def find_parts(model: torch.nn.Module, given: str | None = None) -> Parts:
    """Return the weights of ``model``, its blocks found by their structure.

    They are one list of transformer blocks, or stages of ConvNeXt blocks with the modules between them.

    Raises:
        UserError: the model has another structure; ``given`` names it in the message.
    """
    chain = _chain(model, given)
    measured = _weights(model, chain, lambda module: True)
    inside = {layer.name for layer in measured.layers}
    for name in chain:  # what lies between blocks may hold one: the downsampling convolution
        between = [] if _kind(model.get_submodule(name)) else list(_matrices(model.get_submodule(name)))
        inside |= {f"{name}.{inner}" for inner in between if len(between) == 1}
    outside = [name for name in _matrices(model) if name not in inside]
    if len(outside) > MOST_OUTSIDE:
        raise _refusal(model, given, f"{len(outside)} matrices outside its blocks would stay dense ({outside[0]} ...)")
    return Parts(_weights(model, chain, _pointwise), measured)


def _chain(model: torch.nn.Module, given: str | None) -> list[str]:
    """Return the names of the modules that hidden states pass through, in order."""
    lists = {
        name: kinds.pop()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Sequential | torch.nn.ModuleList)
        and len(kinds := set(map(_kind, module))) == 1
        and None not in kinds
    }
    kinds, roots = set(lists.values()), {name.split(".")[0] for name in lists}
    if kinds == {"transformer"} and len(lists) == 1:
        (name,) = lists
        return [f"{name}.{child}" for child, _ in model.get_submodule(name).named_children()]
    if kinds == {"convnext"} and len(roots) == 1:
        return _stages(model, roots.pop(), lists)
    reason = "its blocks are not all of one kind, in one chain" if lists else "it has no blocks of a known kind"
    raise _refusal(model, given, reason)


def _stages(model: torch.nn.Module, root: str, lists: dict[str, str]) -> list[str]:
    """Return the names of the blocks in the stages under ``root``, and of the modules between them, in order."""
    chain = []
    for stage, module in model.get_submodule(root).named_children():
        for child, inner in module.named_children():
            name = f"{root}.{stage}.{child}"
            if name in lists:
                chain += [f"{name}.{block}" for block, _ in inner.named_children()]
            elif any(True for _ in inner.parameters()):
                chain.append(name)
    return chain


def _weights(model: torch.nn.Module, chain: list[str], wanted: Callable[[torch.nn.Module], bool]) -> Weights:
    """Return the weights over the modules of ``chain`` whose layers are the ``wanted`` matrices of its blocks."""
    modules = [model.get_submodule(name) for name in chain]
    layers = [
        Layer(f"{name}.{inner}", index, tuple(matrix.weight.shape))
        for index, (name, module) in enumerate(zip(chain, modules, strict=True))
        for inner, matrix in (_matrices(module).items() if _kind(module) else ())
        if wanted(matrix)
    ]
    return Weights(model, modules, layers)


def _kind(block: torch.nn.Module) -> str | None:
    matrices = _matrices(block).values()
    if any(p.ndim > 1 and all(p is not m.weight for m in matrices) for p in block.parameters()):
        return None  # for example position biases: they would stay dense
    linear = [m for m in matrices if _pointwise(m)]
    convolutions = [m for m in matrices if not _pointwise(m)]
    if not convolutions and len(linear) >= 4 and all(isinstance(m, torch.nn.Linear) for m in linear):
        return "transformer"  # attention: two or more, MLP: two or more
    if len(convolutions) == 1 and len(linear) == 2 and _depthwise(convolutions[0]):
        width = convolutions[0].out_channels
        shapes = [tuple(m.weight.shape[:2]) for m in linear]
        return "convnext" if shapes == [(shapes[0][0], width), (width, shapes[0][0])] else None
    return None


def _matrices(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return {name: inner for name, inner in module.named_modules() if isinstance(inner, kinds)}


def _pointwise(module: torch.nn.Module) -> bool:
    if isinstance(module, torch.nn.Conv2d):
        plain = module.kernel_size == (1, 1) and module.stride == (1, 1) and module.groups == 1
        return plain and module.padding in (0, (0, 0), "same", "valid")
    return isinstance(module, torch.nn.Linear)


def _depthwise(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels


def _check_chain(model: torch.nn.Module, blocks: Sequence[torch.nn.Module], size: int, given: str) -> None:
    """Refuse a model whose forward pass does not hand one tensor from block to block."""
    calls: list[tuple] = []
    hooks = [block.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True) for block in blocks]
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
    except Exception as error:  # for example too small for the downsampling
        raise UserError("input_size", size, f"{given} cannot take images of this size ({first_line(error)})") from error
    finally:
        for hook in hooks:
            hook.remove()
    leaving = None
    plain = [module for module, *_ in calls] == list(blocks)
    for _, args, kwargs, output in calls:
        plain = plain and len(args) == 1 and not kwargs and (leaving is None or args[0] is leaving)
        leaving = output
    if not plain:
        raise _refusal(model, given, "its blocks are given more than what left the block before")


def _refusal(model: torch.nn.Module, given: str | None, reason: str) -> UserError:
    kind = type(model).__name__
    return UserError(
        "model", given or kind, f"{kind} is not supported, {reason}", f"supported: {CLASSIFIERS}"
    )


# ----------------------------------------------------------------------------------------------------- pruning


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


def block_inputs(
    weights: Weights, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], kept_on: str | None
) -> BlockInputs:
    """Return the inputs of the first block for each of ``batches``; statistics will be means over tokens.

    Args:
        batches: of images [batch, 3, height, width] and labels, which are not read.
        kept_on: the device that holds the hidden states; None for the model's.
    """
    hidden: list[torch.Tensor] = []

    def catch(_, args: tuple) -> None:
        hidden.append(args[0].to(kept_on or args[0].device))
        raise PassEnded

    device = next(weights.model.parameters()).device
    handle = weights.modules[0].register_forward_pre_hook(catch)
    try:
        for images, _ in batches:
            with torch.no_grad(), suppress(PassEnded):
                weights.model(images.to(device))
    finally:
        handle.remove()
    return BlockInputs(hidden, [((), {})] * len(weights.modules), None, set())


# ----------------------------------------------------------------------------------------------------- weights


def fill_weights(model: torch.nn.Module, path: Path) -> None:
    """Fill ``model`` with the weights in ``path``, in the layout of Meta's ConvNeXt, DeiT, jx_vit, or timm.

    Raises:
        UserError: the file cannot be read, or its keys or shapes do not fit.
    """
    state, needed = read_checkpoint(path), model.state_dict()
    _check_resampling(state, needed, path)
    remap = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)  # timm's, of original layouts
    try:
        state = remap(dict(state), model) if remap else state
    except (KeyError, RuntimeError, ValueError, AttributeError):
        pass  # keys of another model: they are listed below
    shapes = {key: (list(state[key].shape), list(needed[key].shape)) for key in needed if key in state}
    wrong = {
        "missing": sorted(needed.keys() - state.keys()),
        "unexpected": sorted(state.keys() - needed.keys()),
        "of another shape": [f"{key} {has} for {needs}" for key, (has, needs) in shapes.items() if has != needs],
    }
    if not any(wrong.values()):
        model.load_state_dict(state)
        return
    problem = f"its weights do not fit {type(model).__name__}"
    for reason, keys in wrong.items():
        if keys:
            more = f" ... (and {len(keys) - _LISTED} more)" if len(keys) > _LISTED else ""
            problem += f"; {len(keys)} {reason}: {', '.join(keys[:_LISTED])}{more}"
    head = any("head" in key for key in wrong["of another shape"])
    raise UserError(None, path, problem, "set the model's number of classes with --nb_classes" if head else None)


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors by name in a ``.safetensors`` file or a PyTorch checkpoint; code in it is not run."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError("resume", path, "file not found")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        from argparse import Namespace  # noqa: TID251

        with torch.serialization.safe_globals([Namespace]):  # training scripts keep their flags beside
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the readers raise on a damaged file, or on one that tries to run code
        raise UserError("resume", path, f"cannot be read as weights ({first_line(error)})") from error
    for key in ("model", "module", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            averaged = [k for k in state if "ema" in k and k != key]
            log.info("%s: using its entry %r%s", path.name, key, f", not {averaged[0]!r}" if averaged else "")
            state = state[key]
            break
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError("resume", path, "holds no weights by name", "give a state_dict, or one under `model`")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _check_resampling(state: dict[str, torch.Tensor], needed: dict[str, torch.Tensor], path: Path) -> None:
    """Warn about positions, and refuse patches, that timm would silently resample."""
    for key in ("pos_embed", "patch_embed.proj.weight"):
        has, needs = (list(tensors[key].shape) if key in tensors else [] for tensors in (state, needed))
        if len(has) != len(needs) or has[1:] == needs[1:]:
            continue
        shapes = f"{key} is {has} and the model's {needs}"
        if key != "pos_embed" or has[2] != needs[2]:
            raise UserError(None, path, f"its weights do not fit; {shapes}")
        log.warning("%s: %s; it is resampled, since the weights are for images of another size", path.name, shapes)


def save_classifier(model: torch.nn.Module, size: int, target: Path) -> None:
    """Write a folder (config.json, model.safetensors) from which timm builds the model: ``local-dir:FOLDER``.

    Args:
        size: the side of its input images in pixels.
    """
    import timm.models

    with new_folder(target) as folder:
        timm.models.save_for_hf(model, folder, safe_serialization=True, data_config={"input_size": (3, size, size)})
