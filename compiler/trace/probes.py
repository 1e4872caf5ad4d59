"""Numeric probes: compare modules with the operators that replace them.

Each probe runs the model's code and the operator of `ops.py` in fp32 on the same random numbers.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import nn

from llmc.compiler.trace import ops
from llmc.runtime.errors import UnsupportedError

TOLERANCE = 1e-5  # fp32, values of order 1


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether the shapes are equal, and the numbers within TOLERANCE."""
    return a.shape == b.shape and a.numel() > 0 and bool((a.float() - b.float()).abs().max() <= TOLERANCE)


def draw(*shape: int) -> torch.Tensor:
    """Return normally distributed numbers, fp32, the same for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def linear(module: nn.Linear) -> bool:
    """Return whether a module of a subclass of nn.Linear computes the same as nn.Linear."""
    probe = copy.copy(module)
    probe.in_features, probe.out_features = 8, 6
    probe._parameters = {
        "weight": nn.Parameter(draw(6, 8), requires_grad=False),
        "bias": None if module.bias is None else nn.Parameter(draw(6), requires_grad=False),
    }
    x = draw(3, 8)
    with torch.no_grad():
        computed = type(module).forward(probe, x)
    return isinstance(computed, torch.Tensor) and close(
        torch.ops.llmc.linear(x, probe.weight, probe.bias), computed
    )


def rms_norm(name: str, module: nn.Module) -> tuple[float, float, bool]:
    """Return the (epsilon, offset, rounds_once) with which `ops.rms_norm` equals `module`.

    name: the module's name, for errors

    Raises UnsupportedError if the module computes something else.
    """
    width = module.weight.shape[0]  # type: ignore[index]
    probe = copy.copy(module)
    probe._parameters = {"weight": nn.Parameter(draw(int(width)), requires_grad=False)}
    x = draw(3, int(width))
    with torch.no_grad():
        expected = type(module).forward(probe, x)
        for attribute in ("variance_epsilon", "eps", "epsilon"):
            epsilon = getattr(module, attribute, None)
            if not isinstance(epsilon, float):
                continue
            for offset in (0.0, 1.0):
                if close(torch.ops.llmc.rms_norm(x, probe.weight, epsilon, offset, True), expected):
                    return epsilon, offset, _rounds_once(probe, epsilon, offset)
    raise UnsupportedError(
        f"module {name} ({type(module).__name__}) is named like an RMSNorm but computes something else",
        "llmc supports x/rms(x)*w and x/rms(x)*(1+w), but not this architecture yet",
    )


def plain_norm(module: nn.Module) -> float | None:
    """Return the epsilon with which `ops.rms_norm` with weights of 1 equals `module`; None if it never does.

    The module has no parameters, buffers or modules.
    """
    if module._parameters or module._buffers or module._modules:
        return None
    x = draw(3, 16)
    with torch.no_grad(), contextlib.suppress(RuntimeError, TypeError, ValueError, IndexError):
        expected = type(module).forward(module, x)
        for attribute in ("variance_epsilon", "eps", "epsilon"):
            epsilon = getattr(module, attribute, None)
            if not isinstance(epsilon, float):
                continue
            if close(torch.ops.llmc.rms_norm(x, torch.ones(16), epsilon, 0.0, True), expected):
                return epsilon
    return None


def _rounds_once(module: nn.Module, epsilon: float, offset: float) -> bool:
    """Return whether an RMSNorm in bf16 is closer to `ops.rms_norm` with `rounds_once` than without.

    Replaces the module's weight.
    """
    width = int(module.weight.shape[0])  # type: ignore[index]
    x, weight = draw(3, width).bfloat16(), draw(width).bfloat16()
    module._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    expected = type(module).forward(module, x)
    once, twice = (
        float((torch.ops.llmc.rms_norm(x, weight, epsilon, offset, flag) - expected).float().abs().sum())
        for flag in (True, False)
    )
    return once < twice


def layer_norm(module: nn.Module) -> float | None:
    """Return the epsilon with which LayerNorm over the last axis equals `module`; None if it never does.

    The module has a weight [features] or [heads, features], and may have a bias of the same shape.
    """
    shape = tuple(module.weight.shape)  # type: ignore[arg-type]
    probe = copy.copy(module)
    random = {name: draw(*shape) + index for index, name in enumerate(("weight", "bias"))}
    probe._parameters = {
        name: nn.Parameter(random[name], requires_grad=False) if parameter is not None else None
        for name, parameter in module._parameters.items()
        if name in random
    }
    x = draw(3, *shape)
    with torch.no_grad():
        expected = type(module).forward(probe, x)
        for attribute in ("variance_epsilon", "eps", "epsilon"):
            epsilon = getattr(module, attribute, None)
            if isinstance(epsilon, float):
                weight, bias = probe._parameters["weight"], probe._parameters.get("bias")
                assert weight is not None
                normal = nn.functional.layer_norm(x, shape[-1:], None, None, epsilon) * weight
                if close(normal if bias is None else normal + bias, expected):
                    return epsilon
    return None


def rotary_tables(name: str, module: nn.Module, max_seq_len: int) -> dict[str, RotaryTable]:
    """Return the tables of a rotary embedding: "_" + layer type -> table; "" if there is only one table.

    name: the module's name, for errors
    max_seq_len: the number of positions

    Raises UnsupportedError if the angles of a position depend on the length of the sequence (dynamic NTK;
    LongRoPE beyond its original context length).
    """
    takes_type = "layer_type" in inspect.signature(type(module).forward).parameters
    kinds: list[str | None] = list(module.layer_types) if takes_type else [None]  # type: ignore[arg-type]
    tables = {}
    for kind in kinds:
        extra = {"layer_type": kind} if kind else {}
        x = torch.zeros(1, 1, 1)
        with torch.no_grad():
            short, (cos, sin) = (
                _angles(type(module).forward(module, x, torch.arange(length)[None], **extra))
                for length in (min(8, max_seq_len), max_seq_len)
            )
        if not (
            close(cos[:, : short[0].shape[1]], short[0]) and close(sin[:, : short[1].shape[1]], short[1])
        ):
            rope = getattr(module, "rope_type", "this")
            config = getattr(module, "config", None)
            original = (getattr(config, "rope_parameters", None) or {}).get(
                "original_max_position_embeddings"
            )
            raise UnsupportedError(
                f"module {name}: with {rope} rope the angles depend on the length of the sequence, "
                f"which a KV cache does not allow at {max_seq_len} positions",
                f"build with --max-seq-len {original or 'the original context length'} or less",
            )
        for repeat in (halves, pairs, _once):  # `apply_rotary` tells whether the last one is right
            once = [
                angle
                if repeat is _once
                else angle[..., ::2]
                if repeat is pairs
                else angle[..., : angle.shape[-1] // 2]
                for angle in (cos, sin)
            ]
            if all(close(repeat(half), angle) for half, angle in zip(once, (cos, sin), strict=True)):
                break
        tables[f"_{kind}" if kind else ""] = RotaryTable(
            once[0][0].contiguous(), once[1][0].contiguous(), repeat
        )
    return tables


def _angles(made: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosines and sines that a rotary embedding made, some (DeepSeek-V2) as complex numbers."""
    return (made.real, made.imag) if isinstance(made, torch.Tensor) else made


def halves(angle: torch.Tensor) -> torch.Tensor:
    """Repeat the sequence of angles: a b -> a b a b."""
    return torch.cat((angle, angle), -1)


def pairs(angle: torch.Tensor) -> torch.Tensor:
    """Repeat each angle: a b -> a a b b."""
    return angle.repeat_interleave(2, -1)


def _once(angle: torch.Tensor) -> torch.Tensor:
    """Return the angles, as gpt-oss passes them to its layers."""
    return angle


@dataclass(frozen=True)
class RotaryTable:
    """The cosines and sines of a rotary embedding."""

    #: [positions, R], fp32.
    cos: torch.Tensor
    #: [positions, R], fp32.
    sin: torch.Tensor
    #: Makes of R angles those that the model passes to its layers, usually 2*R.
    repeat: Callable[[torch.Tensor], torch.Tensor]


def apply_rotary(owner: ModuleType, repeat: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Return whether `owner.apply_rotary_pos_emb` rotates interleaved pairs (2i, 2i+1) rather than (i, i+R).

    owner: the Python module that has the function
    repeat: as in RotaryTable

    Raises UnsupportedError if it does neither.
    """
    tokens, half = 5, 4
    angle = draw(1, tokens, half)
    q, k = draw(1, 3, tokens, 2 * half), draw(1, 2, tokens, 2 * half)
    try:
        rotated = owner.apply_rotary_pos_emb(q, k, repeat(angle.cos()), repeat(angle.sin()))
    except Exception as error:  # a function of another signature raises whatever its code does
        raise UnsupportedError(
            f"{owner.__name__}.apply_rotary_pos_emb does not rotate queries and keys together",
            "llmc does not support the rotary embedding of this architecture",
        ) from error
    for interleaved in (False, True):
        ours = (torch.ops.llmc.rope(x, angle.cos(), angle.sin(), interleaved) for x in (q, k))
        if all(close(x, y) for x, y in zip(ours, rotated, strict=True)):
            return interleaved
    raise UnsupportedError(
        f"{owner.__name__}.apply_rotary_pos_emb is neither of the two known rotations",
        "llmc does not support the rotary embedding of this architecture",
    )


def apply_rotary_by_token(owner: ModuleType) -> bool:
    """Return whether `owner.apply_rotary_pos_emb(x, sin, cos)` rotates interleaved pairs, as in GPT-J.

    x is [1, T, H, D]. sin and cos have each angle once.

    Raises UnsupportedError if it does neither.
    """
    tokens, half = 5, 4
    angle, x = draw(1, tokens, half), draw(1, tokens, 3, 2 * half)
    rotated = owner.apply_rotary_pos_emb(x, angle.sin(), angle.cos())
    for interleaved in (False, True):
        ours = torch.ops.llmc.rope(x.transpose(1, 2), angle.cos(), angle.sin(), interleaved)
        if close(ours.transpose(1, 2), rotated):
            return interleaved
    raise UnsupportedError(
        f"{owner.__name__}.apply_rotary_pos_emb is neither of the two known rotations",
        "llmc does not support the rotary embedding of this architecture",
    )


def complex_rotary(owner: ModuleType) -> bool:
    """Return whether `owner.apply_rotary_emb(xq, xk, freqs_cis)` rotates interleaved pairs, as in Llama 4.

    xq and xk are [1, T, H, D], freqs_cis is complex, [1, T, D/2].

    Raises UnsupportedError if it does not rotate each of the two known pairs.
    """
    tokens, half = 5, 4
    angle, xq, xk = draw(1, tokens, half), draw(1, tokens, 3, 2 * half), draw(1, tokens, 2, 2 * half)
    rotated = owner.apply_rotary_emb(xq, xk, torch.polar(torch.ones_like(angle), angle))
    for interleaved in (False, True):
        ours = (
            torch.ops.llmc.rope(x.transpose(1, 2), angle.cos(), angle.sin(), interleaved) for x in (xq, xk)
        )
        if all(close(x.transpose(1, 2), y) for x, y in zip(ours, rotated, strict=True)):
            return interleaved
    raise UnsupportedError(
        f"{owner.__name__}.apply_rotary_emb is neither of the two known rotations",
        "llmc does not support the rotary embedding of this architecture",
    )


def inline_attention(name: str, module: nn.Module) -> tuple[float, int]:
    """Return the (scale, window) with which `ops.attention` equals `module._attn`.

    `_attn(query, key, value, attention_mask)` is the attention of code that is older than transformers'
    attention interface (GPT-J, GPT-Neo, CodeGen).

    Raises UnsupportedError if it computes something else.
    """
    width = int(getattr(module, "head_dim", 0) or getattr(module, "head_size", 0) or 8)
    longest = max((buffer.shape[-1] for buffer in module._buffers.values() if buffer is not None), default=16)
    with torch.no_grad(), contextlib.suppress(RuntimeError, TypeError, ValueError, IndexError):
        same = torch.zeros(1, 1, longest, 1)
        _, weights = module._attn(same, same, same, causal_mask(longest, 0))  # type: ignore[operator]
        visible = int((weights[0, 0, -1] > 0).sum())
        window = visible if visible < longest else 0
        length = min(longest, max(9, window + 4))
        q, k, v = (draw(1, 2, length, width + index)[..., :width] for index in range(3))
        attended, _ = module._attn(q, k, v, causal_mask(length, 0))  # type: ignore[operator]
        for scale in (1.0, width**-0.5):
            ours = torch.ops.llmc.attention(q, k, v, None, scale, 0.0, window, 0, 0)
            if close(ours.transpose(1, 2), attended):
                return scale, window
    raise UnsupportedError(
        f"module {name}: the attention of {type(module).__name__} computes something else than llmc's",
        "llmc does not support the attention of this architecture",
    )


def causal_mask(length: int, window: int, chunk: int = 0) -> torch.Tensor:
    """Return an additive mask [1, 1, length, length].

    window: if positive, the number of tokens that a token attends to
    chunk: if positive, the number of positions of a chunk, in which the tokens attend to each other
    """
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    hidden = (distance < 0) | (distance >= window) if window else distance < 0
    if chunk:
        chunks = torch.arange(length) // chunk
        hidden |= chunks[:, None] != chunks[None, :]
    return torch.zeros(1, 1, length, length).masked_fill(hidden, torch.finfo(torch.float32).min)


_BIASES = ("gate_up_proj_bias", "down_proj_bias")


@dataclass(frozen=True)
class ExpertsForm:
    """How `ops.experts` computes a module. See there."""

    activation: str
    transposed: bool
    limit: float = 0.0
    alpha: float = 0.0

    def compute(
        self, module: nn.Module, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the output [T, D] of the operator with the parameters of `module`."""
        biases = (module._parameters.get(name) for name in _BIASES)
        matrices = (module.gate_up_proj, module.down_proj)
        output: torch.Tensor = torch.ops.llmc.experts(
            x, ids, weights, *matrices, *biases, self.activation, self.transposed, self.limit, self.alpha
        )
        return output


def experts(name: str, module: nn.Module) -> ExpertsForm:
    """Return the form in which `ops.experts` equals `module`, a mixture of experts.

    name: the module's name, for errors

    Raises UnsupportedError if the module computes something else.
    """
    tokens, count, width, inner = 5, 3, 8, 6
    limit, alpha = (float(getattr(module, key, None) or 0.0) for key in ("limit", "alpha"))
    for transposed in (False, True):
        matrices = {"gate_up_proj": (2 * inner, width), "down_proj": (width, inner)}
        shapes: dict[str, tuple[int, ...]] = {
            key: (count, columns, rows) if transposed else (count, rows, columns)
            for key, (rows, columns) in matrices.items()
        }
        if set(_BIASES) <= set(module._parameters):
            shapes |= dict(zip(_BIASES, ((count, 2 * inner), (count, width)), strict=True))
        if set(module._parameters) != set(shapes):
            break
        probe = copy.copy(module)
        probe._parameters = {
            key: nn.Parameter(draw(*shape) * max(1.0, limit), requires_grad=False)  # some are clamped
            for key, shape in shapes.items()
        }
        for attribute in ("num_experts", "num_local_experts"):
            if hasattr(module, attribute):
                setattr(probe, attribute, count)
        if (config := getattr(module, "config", None)) is not None:
            own = copy.copy(config)
            own._experts_implementation = "eager"  # the model's own code
            probe.config = own
        x, weights = draw(tokens, width), draw(tokens, 2)
        ids = torch.tensor([[0, 1], [2, 0], [0, 2], [1, 2], [0, 1]])
        with torch.no_grad(), contextlib.suppress(RuntimeError, TypeError, ValueError, IndexError):
            expected = type(module).forward(probe, x, ids, weights)
            size = 4 * max(1.0, limit) ** 3  # the order of the values
            for activation in ops.ACTIVATIONS:
                parameters = (limit, alpha) if activation == "clamped_swiglu" else ()
                form = ExpertsForm(activation, transposed, *parameters)
                if close(form.compute(probe, x, ids, weights) / size, expected / size):
                    return form
    raise UnsupportedError(
        f"module {name} ({type(module).__name__}) is a mixture of experts that computes something else than "
        "llmc's",
        "llmc supports experts of a gated MLP, with silu, gelu or the clamped SwiGLU of gpt-oss, whose "
        "parameters are gate_up_proj and down_proj, and the biases of both",
    )


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention interface during the trace."""

    module: nn.Module
    scale: float
    softcap: float
    window: int
    chunk: int = 0
    #: The name of the module's parameter that holds the sinks; "" without sinks.
    sinks: str = ""


def attention(calls: list[AttentionCall]) -> None:
    """Compare `ops.attention` with the model's eager attention, once for calls with equal arguments.

    Raises UnsupportedError if they differ, or if the model has no eager attention.
    """
    seen = set()
    for call in calls:
        kind = (type(call.module), call.scale, call.softcap, call.window, call.chunk, call.sinks)
        if kind in seen:
            continue
        seen.add(kind)
        eager = getattr(sys.modules[type(call.module).__module__], "eager_attention_forward", None)
        if eager is None:
            raise UnsupportedError(
                f"{type(call.module).__name__} has no eager attention to compare with",
                "llmc does not support the attention of this architecture",
            )
        groups = int(getattr(call.module, "num_key_value_groups", 1))
        span = call.window or call.chunk
        length = span + 4 if 0 < span <= 64 else 9
        q, k, v = draw(1, 2 * groups, length, 8), draw(1, 2, length, 8), draw(1, 2, length, 8) * 2
        mask, module, sinks = causal_mask(length, call.window, call.chunk), call.module, None
        if call.sinks:
            sinks = nn.Parameter(draw(2 * groups), requires_grad=False)
            module = copy.copy(module)
            module._parameters = {**module._parameters, call.sinks: sinks}
        expected, _ = eager(
            module, q, k, v, mask, scaling=call.scale, dropout=0.0, softcap=call.softcap or None
        )
        attended = torch.ops.llmc.attention(
            q, k, v, sinks, call.scale, call.softcap, call.window, call.chunk, 0
        )
        if not close(attended, expected):
            raise UnsupportedError(
                f"the attention of {type(call.module).__name__} computes something else than llmc's",
                "llmc does not support the attention of this architecture",
            )
