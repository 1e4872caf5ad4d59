"""Families without a zoo model that are known to work, as tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmc.compiler.zoo import list_zoo

# fmt: off
OTHERS = (
    "arcee", "biogpt", "codegen", "cohere", "cohere2", "ctrl", "cwm", "ernie4_5", "exaone4", "falcon",
    "gemma", "glm", "glm4", "glm4_moe_lite", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox",
    "gpt_neox_japanese", "gptj", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "minicpm3",
    "ministral", "ministral3", "nemotron", "olmo", "olmo3", "olmoe", "opt", "persimmon", "phi", "seed_oss",
    "smollm3", "stablelm", "starcoder2", "youtu",
)
# fmt: on
_SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_COMMON = _SIZES | {"intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 2}
_LATENT = _SIZES | {
    "intermediate_size": 128,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
}
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 1, "eos_token_id": 2}
#: The settings of families with other names for their sizes, or with something to switch on.
_SETTINGS: dict[str, dict[str, Any]] = {
    "codegen": _GPT | {"rotary_dim": 8},
    "cohere": _COMMON | {"use_qk_norm": True, "logit_scale": 1.0},
    "cohere2": _COMMON | {"logit_scale": 1.0, "sliding_window": 24, "sliding_window_pattern": 2},
    "ctrl": _GPT | {"dff": 128},
    "exaone4": _COMMON | {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
    "falcon": _SIZES | {"num_kv_heads": 2, "new_decoder_architecture": True},
    "glm4_moe_lite": _LATENT
    | {
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": {
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 24,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gptj": _GPT | {"rotary_dim": 8},
    "granite": _COMMON
    | {
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.5,
        "logits_scaling": 3.0,
    },
    "granitemoe": _COMMON | {"num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 32},
    "minicpm3": _LATENT,
    "ministral3": _COMMON
    | {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 32,  # queries are scaled beyond it
            "llama_4_scaling_beta": 0.1,
        }
    },
    "olmo3": _COMMON | {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
    "olmoe": _COMMON | {"num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 32},
    "opt": _SIZES | {"ffn_dim": 128, "word_embed_proj_dim": 32},
    "persimmon": _SIZES | {"intermediate_size": 128},
    "phi": _COMMON | {"qk_layernorm": True},
    "smollm3": _COMMON | {"no_rope_layers": [1, 0]},
    "stablelm": _COMMON | {"qk_layernorm": True, "use_parallel_residual": True},
    "youtu": _LATENT,
}
#: Families with experts or latent attention, of OTHERS and of the zoo. OpenVINO, TensorRT and --tp lack them.
WITH_EXPERTS = ("glm4_moe_lite", "granitemoe", "minicpm3", "olmoe", "youtu")
MIXTURES = (
    "deepseek-v2-tiny",
    "deepseek-v3-tiny",
    "gpt-oss-tiny",
    "llama4-text-tiny",
    "mixtral-tiny",
    "qwen2-moe-tiny",
    "qwen3-moe-tiny",
)
#: Families of the zoo whose graphs have nothing that no other one has; their own tests are slow.
LIKE_OTHERS = (
    "deepseek-v2-tiny",  # deepseek-v3-tiny
    "llama-tiny-plain",  # llama-tiny, without scaled rope
    "mistral-tiny",  # the windows of gemma3-tiny
    "mixtral-tiny",  # the experts of qwen2-moe-tiny
    "olmo2-tiny",  # the norms of gemma2-tiny and of qwen3-tiny
    "qwen3-moe-tiny",
)
#: The zoo's small models without either.
_TINY = [entry.name for entry in list_zoo() if entry.name.endswith(("-tiny", "-tiny-plain"))]
DENSE = [name for name in _TINY if name not in MIXTURES]
#: One family for each way to a graph: rope of a part by token and attention without the interface, attention
#: of torch and repeated heads, queries scaled by their position, positions with an offset.
FAST = ("falcon", "gptj", "ministral3", "opt")


def write_random(family: str, directory: Path, **settings: Any) -> Path:
    """Write a tiny random checkpoint of `family` in fp32 below `directory` and return its path."""
    given = _SETTINGS.get(family, _COMMON) | {"vocab_size": 384, "pad_token_id": 0} | settings
    if "n_positions" not in given:
        given["max_position_embeddings"] = 256
    config = AutoConfig.for_model(family, **given)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)  # logits that depend on the input
        else:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory / family)
    return directory / family
