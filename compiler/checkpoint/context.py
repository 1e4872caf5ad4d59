"""Choose the context length of a bundle, and rotary embeddings that are valid for all of it.

The KV cache holds rotated keys, so the rotary angles of a position must not depend on the sequence's length.
YaRN supports factor x original_max_position_embeddings tokens (Peng et al. 2023, arXiv:2309.00071), even if
max_position_embeddings is smaller. LongRoPE (Ding et al. 2024, arXiv:2402.13753) and dynamic NTK change their
angles beyond the original context. A bundle with a longer context uses the angles of its context length for
every sequence.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmc.compiler.checkpoint.checkpoint import CONFIG
from llmc.runtime.errors import BuildError, CheckpointError, UnsupportedError
from llmc.runtime.memory import available_memory

_MAX_POSITIONS = 2**31 - 1  # positions are int32 in the graph
_TABLE_COPIES = 6  # of fp32 [positions, head_dim] while the tables of cosines and sines are made


@dataclass(frozen=True)
class Context:
    """The context length of a bundle, and the configuration of its model at that length."""

    #: The context length: tokens of prompt and answer together.
    max_seq_len: int
    #: The model's configuration. Its rotary angles do not depend on the length of a sequence.
    config: PreTrainedConfig
    #: Notes for the user.
    notes: tuple[str, ...] = ()


def choose_context(config: PreTrainedConfig, wanted: int | None) -> Context:
    """Return the context of `wanted` tokens; if it is None, of the model's context length.

    Raises BuildError if the rotary embedding supports fewer tokens or this machine lacks the memory,
    CheckpointError for a rope type that transformers does not know, UnsupportedError for 2^31 tokens or more.
    """
    limit = _position(getattr(config, "max_position_embeddings", None))
    # Up to `fixed` tokens the angles do not depend on the length. `reach` is the longest possible context.
    fixed, reach = limit, limit
    for rope in _ropes(config):
        rope_type = rope.get("rope_type", "default")
        if not isinstance(rope_type, str) or rope_type not in {"default", *ROPE_INIT_FUNCTIONS}:
            raise CheckpointError(
                f"{CONFIG} has the unknown rope type {rope_type!r}",
                f"known: {', '.join(sorted({'default', *ROPE_INIT_FUNCTIONS}))}",
            )
        original = _position(rope.get("original_max_position_embeddings")) or limit
        factor = rope.get("factor") or 1.0
        if original is None or not _is_number(factor):
            continue
        if rope_type == "yarn":
            fixed = reach = max(limit or 0, int(factor * original))
        elif rope_type == "longrope":
            fixed = original
        elif rope_type == "dynamic" and limit is not None:
            reach = max(limit, int(factor * limit))
    return _choose(config, wanted, fixed, reach)


def _choose(config: PreTrainedConfig, wanted: int | None, fixed: int | None, reach: int | None) -> Context:
    if wanted is None and fixed is None:
        raise BuildError(f"{CONFIG} has no max_position_embeddings", "give --max-seq-len", "max_seq_len")
    length = wanted if wanted is not None else int(fixed or 0)
    if reach is not None and length > reach:
        raise BuildError(
            f"--max-seq-len {length} is more than the model's context of {reach} tokens",
            f"give at most {reach}",
            "max_seq_len",
        )
    _check_memory(config, length)
    notes = []
    if wanted is None and fixed != reach:
        notes.append(
            f"beyond {fixed} tokens the rotary angles depend on the length of the sequence: the context is "
            f"{fixed} tokens; --max-seq-len N, up to {reach}, uses the angles of N tokens for every sequence"
        )
    if fixed is not None and length > fixed:
        try:
            config = _at_length(config, length)
        except (ArithmeticError, LookupError, TypeError) as error:
            raise CheckpointError(
                f"the rope parameters of {CONFIG} give no angles at {length} tokens: {error!r}",
                "compare them with the config.json of the original model",
            ) from error
        notes.append(
            f"every sequence gets the rotary angles of {length} tokens; transformers' depend on the length"
        )
    return Context(length, config, tuple(notes))


def _at_length(config: PreTrainedConfig, length: int) -> PreTrainedConfig:
    """Return a copy of `config` that uses the rotary angles of `length` tokens for every sequence."""
    config = copy.deepcopy(config)
    for rope in _ropes(config):
        rope_type = rope.get("rope_type")
        if rope_type == "longrope":
            rope["short_factor"] = rope["long_factor"]
        elif rope_type == "dynamic":
            dim = int(_head_dim(config) * rope.get("partial_rotary_factor", 1.0))
            limit, factor = config.max_position_embeddings, rope["factor"]
            stretch = factor * length / limit - (factor - 1)
            rope["rope_theta"] *= stretch ** (dim / (dim - 2))
            rope["rope_type"] = "default"
    return config


def _ropes(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """Yield the parameters of each rotary embedding: one, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return
    if "rope_type" in parameters or "rope_theta" in parameters:
        yield parameters
    else:
        yield from (rope for rope in parameters.values() if isinstance(rope, dict))


def _position(value: Any) -> int | None:
    """Return `value` as a number of positions; None if it is not one. Some families write -1 for none."""
    return int(value) if _is_number(value) and value >= 1 else None


def _is_number(value: Any) -> bool:
    """Return whether `value` is a number of a size that later multiplications can handle."""
    return type(value) in (int, float) and abs(value) < 2**63


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _check_memory(config: PreTrainedConfig, length: int) -> None:
    if length > _MAX_POSITIONS:
        raise UnsupportedError(
            f"a context of {length} tokens is more than positions of 32 bits can count", "give --max-seq-len"
        )
    tables = sum(1 for _ in _ropes(config))
    needed = tables * length * _head_dim(config) * 4 * _TABLE_COPIES if tables else 0
    available = available_memory()
    if available is not None and needed > available:
        raise BuildError(
            f"the rotary tables of a context of {length} tokens need about {needed >> 30} GiB of memory, "
            f"{available >> 30} GiB are available",
            "give a smaller --max-seq-len",
        )
