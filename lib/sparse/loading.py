"""Loading of a packed folder as an ordinary transformers model whose pruned layers stay packed and memory-mapped."""

import logging
import math
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from lib.core.errors import UserError
from lib.models.load import Dtypes, Source, empty_llm, untie
from lib.sparse.fusing import LEAST_ZEROS, fuse
from lib.sparse.kernel import Unavailable, load_kernel
from lib.sparse.layers import DenseLinear, SparseEmbedding, SparseLinear
from lib.sparse.packed import PADDING, PackedTensor, is_packed, packed_files, read_file, run_dtype, unpack

log = logging.getLogger(__name__)


def load_packed(folder: Path | str, least: float = LEAST_ZEROS) -> PreTrainedModel:
    """Return the model packed in ``folder``, for inference on the CPU.

    It is in float16 if its weights were saved so, else in bfloat16 (float32 is rounded, with a line in the log).
    Linear layers of int8 or with at least ``least`` zeros are SparseLinear, the others DenseLinear, and an embedding of
    int8 is a SparseEmbedding. Without the kernel everything is unpacked, and a one-line warning gives the reason.

    Raises:
        UserError: not a packed folder, a damaged file, another version of the format, or another model's config.
    """
    folder = Path(folder)
    tensors = {}
    for path in packed_files(folder):
        for name, content, shape in read_file(path):
            if name in tensors:
                raise UserError(None, path, f"{name} is in another file of the folder, too", "remove one of them")
            tensors[name] = content, shape
    dtype = run_dtype(folder)
    if any(content.dtype == torch.float32 for content, _ in tensors.values()):
        log.info("%s: its float32 weights are rounded to %s", folder, str(dtype).removeprefix("torch."))
    try:
        kernel = load_kernel()
    except Unavailable as error:
        kernel, least = None, 2.0  # no matrix has that many zeros
        log.warning("no sparse kernel, %s; the model is unpacked and runs dense", error)
    model = empty_llm(folder, dtype)
    packed = _fill(model, tensors, dtype, least)
    untie(model)
    model.tie_weights()
    empty = (name for name, parameter in model.named_parameters() if parameter.is_meta)
    missing = [name for name in empty if name.removesuffix(".weight") not in packed]
    if missing:
        raise UserError(None, folder, f"lacks {len(missing)} weights of its config.json's model, first {missing[0]}")
    for name, module in list(model.named_modules()):
        if name in packed:
            kind = SparseEmbedding if isinstance(module, nn.Embedding) else SparseLinear
            model.set_submodule(name, kind(*packed.pop(name), getattr(module, "bias", None), kernel))
        elif type(module) is nn.Linear and kernel is not None:
            model.set_submodule(name, DenseLinear(module, kernel))
    model.requires_grad_(False).eval()  # before ``fuse`` tries what blocks compute
    if kernel is not None:
        fuse(model, kernel)
    return model


def _fill(
    model: PreTrainedModel, tensors: dict[str, tuple], dtype: torch.dtype, least: float
) -> dict[str, tuple[PackedTensor, int]]:
    """Fill ``model`` with the ``tensors``, and return {module: (weight, columns)} of those that stay packed."""
    packed = {}
    tied = model.get_output_embeddings() if model.config.get_text_config().tie_word_embeddings else None
    head = next((name for name, module in model.named_modules() if module is tied), None)
    # Some names of a checkpoint are not the model's own (GPT-NeoX's embed_out is lm_head).
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    model_names = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    for name in list(tensors):
        content, shape = tensors.pop(name)  # a file's pages are freed with the last of its tensors
        for renaming in renamings if name not in model_names else ():
            name = renaming.rename_source_key(name)[0]
        parent, _, attribute = name.rpartition(".")
        try:
            module = model.get_submodule(parent)
            expected = list(getattr(module, attribute).shape)
        except AttributeError:
            raise UserError(None, name, "is packed there, and the model of its config.json has none") from None
        if expected != shape:
            raise UserError(None, name, f"is packed with shape {shape}, the model of its config.json has {expected}")
        weight = isinstance(content, PackedTensor) and attribute == "weight"
        if weight and content.scales is not None:
            content = content._replace(scales=content.scales.to(dtype))
            embedding = module is model.get_input_embeddings()
            if embedding and tied is not None and least <= 1:
                packed.setdefault(head, (content, shape[1]))
            if least <= 1 and (type(module) is nn.Linear or embedding and type(module) is nn.Embedding):
                packed[parent] = content, shape[1]
                continue
        elif weight and type(module) is nn.Linear and module is not tied and _zeros(content, shape) >= least:
            values = content.values.to(dtype)
            # If they were rounded, a mask that stays mapped would keep all the file's pages.
            mask = content.mask if values is content.values else content.mask.clone()
            packed[parent] = PackedTensor(mask, values), shape[1]
            continue
        value = unpack(content, shape)
        value = value.to(dtype) if value.is_floating_point() else value
        setattr(module, attribute, value if attribute in module._buffers else nn.Parameter(value, requires_grad=False))
    return packed


def _zeros(content: PackedTensor, shape: list[int]) -> float:
    return 1 - (len(content.values) - PADDING) / math.prod(shape)


def refuse_packed(source: Source) -> None:
    """Refuse a model whose folder is packed."""
    if is_packed(source.path):
        unpack = f"unpack it first: python scripts/speedup/pack.py {source.given} --unpack --save DIR"
        raise UserError("model", source.given, "is packed, which is for running it", unpack)


def packed_dtypes(source: Source, dtype: str) -> Dtypes:
    """Return the dtypes of a packed model; ``dtype``, a name of DTYPES, must not differ."""
    packed_dtype = run_dtype(Path(source.path))
    name = str(packed_dtype).removeprefix("torch.")
    if dtype not in ("auto", name):
        fix = "leave --dtype out, or unpack it for another"
        raise UserError("dtype", dtype, f"{source.given} is packed and runs in {name}", fix)
    return Dtypes(packed_dtype, packed_dtype)
