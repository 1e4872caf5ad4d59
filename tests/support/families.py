"""Families without a recipe that are known to work, as tiny random models."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

# fmt: off
OTHERS = (
    "arcee", "ernie4_5", "exaone4", "gemma", "glm", "glm4", "gpt2", "granite",
    "helium", "ministral", "nemotron", "olmo", "seed_oss", "smollm3", "starcoder2",
)
# fmt: on


def write_random(family: str, directory: Path) -> Path:
    """Write a tiny random checkpoint of `family` in fp32 below `directory` and return its path."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = AutoConfig.for_model(family, **sizes, **heads, vocab_size=384, pad_token_id=0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)  # logits that depend on the input
        else:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory / family)
    return directory / family
