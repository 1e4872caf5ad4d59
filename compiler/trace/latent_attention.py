"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) in its absorbed form.

The model expands the latent vector of a token to keys and values of every head. Here it is not expanded: the
queries are multiplied with the heads' key matrices instead, and what attention returns with their value
matrices. So a token has one key of `kv_lora_rank + qk_rope_head_dim` numbers for all heads, and its first
`kv_lora_rank` numbers are its value.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from llmc.compiler.trace import ops as ops  # registers torch.ops.llmc
from llmc.compiler.trace.probes import causal_mask, close, draw, halves, pairs
from llmc.runtime.errors import UnsupportedError

#: The layers of a module that llmc knows. One with another layer computes something else, if only sometimes.
_LAYERS = {
    "q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj",
    "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj",
}  # fmt: skip
_PARAMETERS = {"self", "hidden_states", "attention_mask", "past_key_values", "position_embeddings", "kwargs"}
_SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "qk_head_dim": 10,
    "head_dim": 4,
    "v_head_dim": 7,
}


def is_latent(module: nn.Module) -> bool:
    """Return whether `module` is multi-head latent attention, whether or not llmc supports it."""
    return hasattr(module, "kv_b_proj")


def absorbed(
    module: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, layer: int
) -> torch.Tensor:
    """Return the output [1, T, hidden size] of the attention `module`.

    hidden: [1, T, hidden size]
    cos, sin: [1, T, qk_rope_head_dim / 2]
    interleaved: as of `ops.rope`
    layer: the index of the layer
    """
    heads, rank, rotated = module.num_heads, module.kv_lora_rank, module.qk_rope_head_dim
    plain, rope, per_head = module.qk_nope_head_dim, torch.ops.llmc.rope, torch.ops.llmc.head_linear
    if module.q_lora_rank is None:
        query = module.q_proj(hidden)
    else:
        query = module.q_b_proj(module.q_a_layernorm(module.q_a_proj(hidden)))
    query = query.view(*hidden.shape[:2], heads, plain + rotated)
    of_content, of_position = query.split([plain, rotated], dim=-1)
    latent, key = module.kv_a_proj_with_mqa(hidden).split([rank, rotated], dim=-1)
    latent = module.kv_a_layernorm(latent).view(*hidden.shape[:2], 1, rank).transpose(1, 2)
    key = key.view(*hidden.shape[:2], 1, rotated).transpose(1, 2)
    matrices = module.kv_b_proj.weight
    of_content = per_head(of_content, matrices, heads, 0, plain, True).transpose(1, 2)
    of_position = rope(of_position.transpose(1, 2), cos, sin, interleaved)
    attended = torch.ops.llmc.latent_attention(
        torch.cat((of_content, of_position), dim=-1),
        torch.cat((latent, rope(key, cos, sin, interleaved)), dim=-1),
        float(module.scaling),
        rank,
        layer,
    )
    values = per_head(attended, matrices, heads, plain, module.v_head_dim, False)
    output: torch.Tensor = module.o_proj(values.flatten(2))
    return output


def replacement(name: str, module: Any) -> Callable[..., tuple[torch.Tensor, None]]:
    """Return the `forward` that computes `module` in the absorbed form.

    name: the module's name, for errors

    Raises UnsupportedError if the module computes something else.
    """
    interleaved = _interleaved(name, module)

    def forward(
        hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        if kwargs.get("attention_mask") is not None:
            raise UnsupportedError(
                f"module {name} uses a custom attention mask", "llmc does not support this attention yet"
            )
        layer = int(module.layer_idx)
        return absorbed(module, hidden_states, *position_embeddings, interleaved, layer), None

    return forward


def _interleaved(name: str, module: Any) -> bool:
    """Return with which `interleaved` the absorbed form equals `module`, whose sizes do not matter."""
    known = {child for child, layer in module.named_children() if layer is not None} <= _LAYERS
    parameters = set(inspect.signature(type(module).forward).parameters)
    kinds = set(getattr(module.config, "layer_types", None) or ()) - {"full_attention"}
    windows = kinds or getattr(module, "sliding_window", None)  # masks that the comparison does not have
    plain = not windows and getattr(module.kv_b_proj, "bias", None) is None
    if known and plain and parameters <= _PARAMETERS:
        with contextlib.suppress(RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            small = _small(module)
            hidden, angle = draw(1, 9, _SIZES["hidden_size"]), draw(1, 9, 2)
            cos, sin = angle.cos() * 1.1, angle.sin() * 1.1  # some families scale them
            angles: list[Any] = [(repeat(cos), repeat(sin)) for repeat in (halves, pairs)]
            for given, interleaved in itertools.product([torch.complex(cos, sin), *angles], (True, False)):
                if close(absorbed(small, hidden, cos, sin, interleaved, 0), _expanded(small, hidden, given)):
                    return interleaved
    raise UnsupportedError(
        f"module {name} ({type(module).__name__}) is multi-head latent attention that computes "
        "something else than llmc's",
        "llmc supports the attention of DeepSeek-V2 and DeepSeek-V3; `llmc zoo list` shows the families that "
        "are known to work",
    )


def _small(module: Any) -> Any:
    """Return a small module of the same class and configuration, with random weights."""
    config = copy.deepcopy(module.config)
    for key, value in _SIZES.items():
        if getattr(config, key, None) is not None:
            setattr(config, key, value)
    config._attn_implementation = "eager"  # the model's own code
    with torch.random.fork_rng(devices=[]):
        small = type(module)(config, module.layer_idx).float().eval()
    for parameter in small.parameters():
        parameter.requires_grad_(False)
        parameter.copy_(draw(*parameter.shape) * parameter.shape[-1] ** (-0.5 if parameter.dim() > 1 else 0))
    return small


def _expanded(small: Any, hidden: torch.Tensor, angles: Any) -> torch.Tensor:
    """Return what the model's own code computes; an empty tensor if it takes other angles."""
    mask = causal_mask(hidden.shape[1], 0)
    try:
        with torch.no_grad():
            output, _ = small(hidden, attention_mask=mask, position_embeddings=angles)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return torch.empty(0)
    return output if isinstance(output, torch.Tensor) else torch.empty(0)
