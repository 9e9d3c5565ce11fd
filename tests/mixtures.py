"""Tiny random mixtures of experts, one of each family: width 32, two blocks, four experts of which two are active."""

import copy

import torch
import transformers as tf

_COMMON = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_COMMON |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2}
_COMMON |= {"pad_token_id": 0}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48}
_COUNT = {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64, "moe_intermediate_size": 48}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64, "moe_intermediate_size": 48}
_ROUTED |= {"n_shared_experts": 1, "n_group": 1, "topk_group": 1}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_LATENT |= {"num_key_value_heads": 4}
_NARROW, _DENSE_FIRST = {"head_dim": 8}, {"first_k_dense_replace": 1}
_SHARED = {"shared_expert_intermediate_size": 40}
_LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_LINEAR |= {"layer_types": ["linear_attention", "full_attention"], **_SHARED, **_NARROW}
_CONV = {"layer_types": ["conv", "full_attention"]}
_JAMBA = {"attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1, "expert_layer_offset": 0}
_MAMBA = {"mamba_n_groups": 1, "mamba_n_heads": 4, "mamba_expand": 2, "mamba_d_head": 16, "mamba_d_state": 16}
_NEMOTRON = {"n_groups": 1, "use_mamba_kernels": False, "layers_block_type": ["mamba", "moe"]}
_NEMOTRON |= {"moe_shared_expert_intermediate_size": 40}
_NEMOTRON |= {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16}

# family -> class of its config, and what its config says beside _COMMON
_CONFIGS = {
    "mixtral": (tf.MixtralConfig, _LOCAL),
    "qwen2-moe": (tf.Qwen2MoeConfig, _COUNT | _SHARED),
    "qwen3-moe": (tf.Qwen3MoeConfig, _COUNT | _NARROW),
    "qwen3-next": (tf.Qwen3NextConfig, _COUNT | _LINEAR),
    "qwen3.5-moe": (tf.Qwen3_5MoeTextConfig, _COUNT | _LINEAR),
    "olmoe": (tf.OlmoeConfig, _COUNT),
    "flex-olmo": (tf.FlexOlmoConfig, _COUNT),
    "deepseek-v2": (tf.DeepseekV2Config, _ROUTED | _LATENT | _DENSE_FIRST),
    "deepseek-v3": (tf.DeepseekV3Config, _ROUTED | _LATENT | _DENSE_FIRST),
    "gpt-oss": (tf.GptOssConfig, _LOCAL | _NARROW),
    "granite-moe": (tf.GraniteMoeConfig, _LOCAL),
    "granite-moe shared": (tf.GraniteMoeSharedConfig, _LOCAL | {"shared_intermediate_size": 40}),
    "granite-moe hybrid": (
        tf.GraniteMoeHybridConfig,
        _LOCAL | _MAMBA | {"shared_intermediate_size": 40, "layer_types": ["mamba", "attention"]},
    ),
    "phi-moe": (tf.PhimoeConfig, _LOCAL),
    "glm4-moe": (tf.Glm4MoeConfig, _ROUTED | _NARROW | _DENSE_FIRST),
    "glm4-moe lite": (tf.Glm4MoeLiteConfig, _ROUTED | _LATENT | {"mlp_layer_types": ["dense", "sparse"]}),
    "ernie4.5-moe": (
        tf.Ernie4_5_MoeConfig,
        {"intermediate_size": 64, "moe_intermediate_size": 48, "moe_num_experts": 4, "moe_k": 2},
    ),
    "minimax": (tf.MiniMaxConfig, _LOCAL | _NARROW | {"layer_types": ["full_attention", "linear_attention"]}),
    "minimax-m2": (tf.MiniMaxM2Config, _LOCAL | _NARROW),
    "dots1": (tf.Dots1Config, _ROUTED | _NARROW | _DENSE_FIRST),
    "hunyuan": (tf.HunYuanMoEV1Config, {"num_experts": 4, "moe_topk": 2, "intermediate_size": 48} | _NARROW),
    "jamba": (tf.JambaConfig, _COUNT | _JAMBA | {"use_mamba_kernels": False}),
    "lfm2-moe": (tf.Lfm2MoeConfig, _COUNT | _CONV | {"num_dense_layers": 1}),
    "nemotron-h": (tf.NemotronHConfig, _ROUTED | _NARROW | _NEMOTRON),
    "afmoe": (tf.AfmoeConfig, _COUNT | _NARROW | {"num_dense_layers": 1, "num_shared_experts": 1}),
    "solar": (tf.SolarOpenConfig, _ROUTED | _NARROW),
    "exaone-moe": (tf.ExaoneMoeConfig, _COUNT | _NARROW | _DENSE_FIRST | {"n_group": 1, "topk_group": 1}),
    "cohere2-moe": (tf.Cohere2MoeConfig, _COUNT | _NARROW),
    "hunyuan-v3": (tf.HYV3Config, _COUNT | _NARROW),
    "mimo-v2": (tf.MiMoV2FlashConfig, _ROUTED | _NARROW),
    "gemma4": (
        tf.Gemma4TextConfig,
        _COUNT | _NARROW | {"enable_moe_block": True, "top_k_experts": 2, "hidden_size_per_layer_input": 0},
    ),
    "granite-moe swa": (tf.GraniteMoeSWAConfig, _LOCAL),
}
# First those that differ most: names of their own, a correction bias, transposed and interleaved, fused in the files.
_FIRST = ("mixtral", "deepseek-v3", "gpt-oss", "granite-moe")
FAMILIES = (*_FIRST, *(name for name in _CONFIGS if name not in _FIRST))
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def tiny_mixture(family: str, experts: int = 4) -> torch.nn.Module:
    """Return a random model of the ``family`` whose weights are large enough to matter, always the same."""
    kind, options = _CONFIGS[family]
    options = _COMMON | copy.deepcopy(options)
    options |= {name: experts for name in COUNTS if name in options}
    torch.manual_seed(3)
    model = tf.AutoModelForCausalLM.from_config(kind(**options)).eval()
    for name, tensor in model.state_dict().items():  # several definitions leave theirs as the memory was
        if tensor.ndim > 1 and "decay" not in name and "slope" not in name:
            tensor.normal_(std=0.2)
        elif "bias" in name:
            tensor.normal_(std=0.05)
        elif not torch.isfinite(tensor).all():
            tensor.zero_()
    return model
