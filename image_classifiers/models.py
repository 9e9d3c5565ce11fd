"""A timm name, a folder or a weight file becomes an image classifier, and its blocks and layers are found."""

import argparse
import logging
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lib import UserError
from lib.models import PrunableLayer
from lib.registry import did_you_mean
from lib.results import new_folder

log = logging.getLogger(__name__)

SUPPORTED = "timm's ViT, DeiT and ConvNeXt models (deit_small_patch16_224, vit_base_patch16_224, convnext_base ...)"
MOST_OUTSIDE = 4  # matrices outside the blocks: patch embedding or stem, and head
_LISTED = 6  # keys in an error


class Source(NamedTuple):
    """Where a model comes from: ``given`` by the user, the ``name`` that timm makes it by, its ``folder`` if any."""

    given: str
    name: str
    folder: Path | None

    @property
    def label(self) -> str:
        """Return the name under which its metrics are kept."""
        return self.folder.resolve().name if self.folder else self.given


class Parts(NamedTuple):
    """What of a classifier is pruned and measured.

    ``blocks``: the chain that hidden states pass through, downsampling included; ``pruned``: linear layers and 1x1
    convolutions inside the blocks; ``measured``: those and the depthwise convolutions, in the model's order.
    """

    blocks: nn.ModuleList
    pruned: list[PrunableLayer]
    measured: list[PrunableLayer]


# ---------------------------------------------------------------------------------------------------- finding


def locate(model: str) -> Source:
    """Return where ``model`` comes from: a name that timm knows, or a folder that ``--save_model`` wrote.

    Raises:
        UserError: neither is there.
    """
    import timm

    path = Path(model).expanduser()
    if path.is_dir():
        absent = [name for name in ("config.json", "model.safetensors") if not (path / name).is_file()]
        if absent:
            raise UserError(f"--model {model}: the folder holds no {absent[0]}; give one that --save_model wrote")
        return Source(model, f"local-dir:{path}", path)
    if not timm.is_model(model):
        what = (
            "is a file; give the model's name, and the file as --resume" if path.is_file() else "timm has no such model"
        )
        hint = did_you_mean(model, timm.list_models())
        raise UserError(f"--model {model}: {what}.{hint} Supported: {SUPPORTED}")
    return Source(model, model, None)


def skeleton(source: Source, size: int | None, classes: int | None) -> tuple[nn.Module, int]:
    """Return the model without weights (on the meta device), and the side in pixels of the images that it takes.

    Raises:
        UserError: it is not supported, cannot take images of ``size``, or has other than ``classes`` outputs.
    """
    model = _create(source, {"num_classes": classes}, "meta")
    own = model.pretrained_cfg["input_size"][-1]
    if size and size != own and source.folder:
        raise UserError(f"--input_size {size}: the model in {source.given} takes {own}")
    if not model.num_classes:
        raise UserError(f"--model {source.given}: has no classifier; add --nb_classes and --resume, or choose another")
    if source.folder and classes not in (None, _create(source, {}, "meta").num_classes):
        raise UserError(f"--nb_classes {classes}: the model in {source.given} has another number; leave the flag out")
    model = _create(source, _options(model, size, classes), "meta")
    parts = find_parts(model, source.given)
    _check_chain(model, parts.blocks, size or own, source.given)
    return model, size or own


def load(source: Source, resume: str | None, size: int, classes: int | None) -> nn.Module:
    """Return the model in evaluation mode on the CPU, with the weights of ``resume``, its folder, or timm's own.

    Raises:
        UserError: the weights cannot be had, or do not fit the model.
    """
    options = _options(_create(source, {}, "meta"), size, classes)
    if resume or source.folder:
        model = _create(source, options, "cpu")
        load_weights(model, Path(resume).expanduser() if resume else source.folder / "model.safetensors")
        return model.eval()
    about = _create(source, {}, "meta").pretrained_cfg
    if classes not in (None, about["num_classes"]):  # timm would leave a random classifier there
        raise UserError(
            f"--nb_classes {classes}: timm's weights of {source.given} know {about['num_classes']} classes; "
            "give fine-tuned weights with --resume"
        )
    log.info("looking up timm's weights of %s in its cache and on the Hugging Face hub", source.given)
    try:
        return _create(source, options, "cpu", pretrained=True).eval()
    except UserError as error:
        other = "give a weight file: --resume FILE (image_classifiers/download_weights.sh fetches the published ones)"
        raise UserError(f"{error}; {other}") from error


def _create(source: Source, options: dict, device: str, pretrained: bool = False) -> nn.Module:
    import timm

    try:
        with torch.device(device):
            return timm.create_model(source.name, pretrained=pretrained, **options).eval()
    except Exception as error:  # whatever a wrong tag, size or folder, or a hub out of reach leads to
        what = "timm's weights cannot be loaded" if pretrained else "timm cannot make it"
        raise UserError(f"--model {source.given}: {what} ({_first_line(error)})") from error


def _options(model: nn.Module, size: int | None, classes: int | None) -> dict:
    about = model.pretrained_cfg
    other = size not in (None, about["input_size"][-1]) and about.get("fixed_input_size")
    return {"num_classes": classes, "img_size": size if other else None}  # timm leaves out what is None


# --------------------------------------------------------------------------------------- blocks and their layers


def find_parts(model: nn.Module, given: str | None = None) -> Parts:
    """Return the blocks and layers of ``model``, found by their structure.

    Either one list of transformer blocks, or stages of ConvNeXt blocks with what lies between them.

    Raises:
        UserError: the model is of another structure; it is named by ``given``.
    """
    lists = {
        name: kinds.pop()
        for name, module in model.named_modules()
        if isinstance(module, nn.Sequential | nn.ModuleList)
        and len(kinds := set(map(_kind, module))) == 1
        and None not in kinds
    }
    kinds = set(lists.values())
    if kinds == {"transformer"} and len(lists) == 1:
        (name,) = lists
        chain = [f"{name}.{child}" for child, _ in model.get_submodule(name).named_children()]
    elif kinds == {"convnext"} and len({name.split(".")[0] for name in lists}) == 1:
        chain = _stages(model, next(iter(lists)).split(".")[0], lists)
    else:
        what = (
            "its blocks are not all of one kind, in one chain" if lists else "it has no blocks of a kind that is known"
        )
        raise _refusal(model, given, what)
    measured = [
        PrunableLayer(f"{name}.{inner}", index, module)
        for index, name in enumerate(chain)
        if _kind(model.get_submodule(name))
        for inner, module in _matrices(model.get_submodule(name)).items()
    ]
    inside = {layer.name for layer in measured}
    for name in chain:  # what lies between blocks may hold one: the downsampling convolution
        between = [] if _kind(model.get_submodule(name)) else list(_matrices(model.get_submodule(name)))
        inside |= {f"{name}.{inner}" for inner in between if len(between) == 1}
    outside = [name for name in _matrices(model) if name not in inside]
    if len(outside) > MOST_OUTSIDE:
        raise _refusal(model, given, f"{len(outside)} matrices outside its blocks would stay dense ({outside[0]} ...)")
    blocks = nn.ModuleList(model.get_submodule(name) for name in chain)
    return Parts(blocks, [layer for layer in measured if _pointwise(layer.module)], measured)


def _stages(model: nn.Module, root: str, lists: dict[str, str]) -> list[str]:
    """Return the names of the blocks in the stages under ``root``, and of what lies between them, in order."""
    chain = []
    for stage, module in model.get_submodule(root).named_children():
        for child, part in module.named_children():
            name = f"{root}.{stage}.{child}"
            if name in lists:
                chain += [f"{name}.{block}" for block, _ in part.named_children()]
            elif any(True for _ in part.parameters()):
                chain.append(name)
    return chain


def _kind(block: nn.Module) -> str | None:
    matrices = _matrices(block)
    known = {id(module.weight) for module in matrices.values()}
    if any(p.ndim > 1 and id(p) not in known for p in block.parameters()):
        return None  # position biases, say: they would stay dense
    linear = [m for m in matrices.values() if _pointwise(m)]
    other = [m for m in matrices.values() if not _pointwise(m)]
    if not other and len(linear) >= 4 and all(isinstance(m, nn.Linear) for m in linear):
        return "transformer"  # attention: two or more, MLP: two or more
    if len(other) == 1 and len(linear) == 2 and _depthwise(other[0]):
        width = other[0].out_channels
        shapes = [tuple(m.weight.shape[:2]) for m in linear]
        return "convnext" if shapes == [(shapes[0][0], width), (width, shapes[0][0])] else None
    return None


def _matrices(module: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)}


def _pointwise(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        plain = module.kernel_size == (1, 1) and module.stride == (1, 1) and module.groups == 1
        return plain and module.padding in (0, (0, 0), "same", "valid")
    return isinstance(module, nn.Linear)


def _depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels


@torch.no_grad()
def _check_chain(model: nn.Module, blocks: nn.ModuleList, size: int, given: str) -> None:
    """Refuse a model whose forward pass does not hand one tensor from block to block."""
    calls: list[tuple] = []

    def note(module: nn.Module, args: tuple, kwargs: dict, out: object) -> None:
        calls.append((module, args, kwargs, out))

    hooks = [block.register_forward_hook(note, with_kwargs=True) for block in blocks]
    try:
        device = next(model.parameters()).device
        model(torch.zeros(1, 3, size, size, device=device))
    except Exception as error:  # too small for the downsampling, say
        raise UserError(f"--input_size {size}: {given} cannot take such images ({_first_line(error)})") from error
    finally:
        for hook in hooks:
            hook.remove()
    before = None
    plain = [module for module, *_ in calls] == list(blocks)
    for _, args, kwargs, out in calls:
        plain = plain and len(args) == 1 and not kwargs and (before is None or args[0] is before)
        before = out
    if not plain:
        raise _refusal(model, given, "its blocks are given more than what left the block before")


def _refusal(model: nn.Module, given: str | None, reason: str) -> UserError:
    kind = type(model).__name__
    return UserError(f"--model {given or kind}: {kind} is not supported, {reason}; supported: {SUPPORTED}")


# ----------------------------------------------------------------------------------------------------- weights


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill ``model`` with the weights in ``path``: of Meta's ConvNeXt, DeiT, jx_vit, or timm's own layout.

    Raises:
        UserError: the file cannot be read, or its keys or shapes do not fit.
    """
    state = read_checkpoint(path)
    own = model.state_dict()
    _check_resampling(state, own, path)
    remap = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)  # timm's, of original layouts
    try:
        state = remap(dict(state), model) if remap else state
    except (KeyError, RuntimeError, ValueError, AttributeError):
        pass  # keys of something else: they are listed below
    wrong = {
        "lacks": sorted(own.keys() - state.keys()),
        "has, and the model has not": sorted(state.keys() - own.keys()),
        "has of another shape": [
            f"{key} {list(state[key].shape)} for {list(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
    }
    if any(wrong.values()):
        parts = [f"it {what} {len(keys)}: {_some(keys)}" for what, keys in wrong.items() if keys]
        hint = (
            "; --nb_classes says how many classes the model has"
            if any("head" in s for s in wrong["has of another shape"])
            else ""
        )
        raise UserError(f"{path}: its weights do not fit {type(model).__name__}; {'; '.join(parts)}{hint}")
    model.load_state_dict(state)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Return the tensors by name in a ``.safetensors`` file or a PyTorch checkpoint; code in it is not run."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"--resume {path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # training scripts keep their flags beside
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the readers raise on a damaged file, or on one that wants to run code
        raise UserError(f"--resume {path}: cannot be read as weights ({_first_line(error)})") from error
    for key in ("model", "module", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            ema = [k for k in state if "ema" in k and k != key]
            log.info("%s: using its entry %r%s", path.name, key, f", not {ema[0]!r}" if ema else "")
            state = state[key]
            break
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"--resume {path}: holds no weights by name; give a state_dict, or one under `model`")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _check_resampling(state: dict[str, Tensor], own: dict[str, Tensor], path: Path) -> None:
    """Warn of positions, and refuse patches, that timm would resample without a word."""
    for key in ("pos_embed", "patch_embed.proj.weight"):
        if (
            key not in state
            or key not in own
            or state[key].shape[1:] == own[key].shape[1:]
            or state[key].ndim != own[key].ndim
        ):
            continue
        shapes = f"{key} is {list(state[key].shape)} and the model's {list(own[key].shape)}"
        if key != "pos_embed" or state[key].shape[2] != own[key].shape[2]:
            raise UserError(f"{path}: its weights do not fit; {shapes}")
        log.warning("%s: %s; it is resampled, since the weights are for images of another size", path.name, shapes)


def save(model: nn.Module, size: int, target: Path) -> None:
    """Write a folder (config.json, model.safetensors) from which timm makes the model: ``local-dir:FOLDER``.

    Args:
        size: the side in pixels of the images that it takes.
    """
    import timm.models

    with new_folder(target) as folder:
        timm.models.save_for_hf(model, folder, safe_serialization=True, data_config={"input_size": (3, size, size)})


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:_LISTED]) + (f" ... (and {len(keys) - _LISTED} more)" if len(keys) > _LISTED else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
