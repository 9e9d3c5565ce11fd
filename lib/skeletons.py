"""Models that are built before their weights are read, as ``from_pretrained`` would have them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lib import UserError, first_line
from lib.lazy import torch, transformers

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the causal language model of ``config``, its parameters in ``dtype`` on the meta device.

    Its buffers, which checkpoints do not contain, are computed in float32 as ``from_pretrained`` computes them: in
    16 bits GPT-J's table of angles would be of other angles.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def generation_config(folder: Path) -> GenerationConfig | None:
    """Return the settings of generation in a model's folder, None if it has none.

    Raises:
        UserError: they are damaged.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    try:
        return transformers.GenerationConfig.from_pretrained(folder)
    except Exception as error:  # whatever a file that is not JSON, or not such settings, leads to
        what = f"cannot be used ({first_line(error)}); correct it, or delete it for the defaults"
        raise UserError(None, f"{path}: {what}") from error


def untie(model: PreTrainedModel) -> None:
    """Make the config of a model say so if its head is not its embedding: a later ``tie_weights`` would replace it.

    ``from_pretrained`` keeps both weights of a checkpoint that has them and whose config ties them.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is embedding.weight or not model.config.get_text_config().tie_word_embeddings:
        return
    one, other = head.weight, embedding.weight
    if one.is_meta or other.is_meta or one.shape != other.shape:
        return
    if one.device != other.device or not torch.equal(one, other):
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
