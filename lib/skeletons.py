"""Models that are built before their weights are read, as ``from_pretrained`` would have them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib.lazy import torch, transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


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
