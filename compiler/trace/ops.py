"""The torch operators that a trace records in place of a model's modules.

Each is one opaque node in the exported program and one node of the domain `llmc` in ONNX.
The Python bodies define the operators. The probes compare them with the modules that they replace.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensor = torch.Tensor


@torch.library.custom_op("llmc::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute y[..., N] = x[..., K] @ weight[N, K]^T + bias[N]."""
    return torch.nn.functional.linear(x, weight, bias)


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("llmc::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float, rounds_once: bool) -> Tensor:
    """Compute y = x / sqrt(mean(x^2) + epsilon) * (weight + offset) over the last axis, statistics in fp32.

    x: [..., N]
    weight: [N]
    offset: 1 for the Gemma families, else 0
    rounds_once: whether x is multiplied by the weight in fp32 and only the product is rounded (Gemma,
        OLMo 2); else the normalized x is rounded to x's dtype first (Llama)

    Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    if not rounds_once:
        wide = wide.to(x.dtype).float()
    return (wide * (weight.float() + offset)).to(x.dtype)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, epsilon: float, offset: float, rounds_once: bool) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("llmc::rope", mutates_args=())
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Apply the rotary position embedding (Su et al. 2021, arXiv:2104.09864) to the first 2*R features of x.

    x: [1, H, T, D]
    cos, sin: [1, T, R]
    interleaved: rotate the pairs (2i, 2i + 1); else (i, i + R)
    """
    half = cos.shape[-1]
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = rotated[..., :half], rotated[..., half:]
        rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((rotated, rest), dim=-1)


@rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("llmc::attention", mutates_args=())
def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float, window: int, layer: int
) -> Tensor:
    """Compute causal grouped-query self-attention of one sequence.

    query: [1, Hq, T, D]
    key: [1, Hkv, T, D]
    value: [1, Hkv, T, Dv]
    scale: the factor of the scores
    softcap: if positive, scores become softcap * tanh(scores / softcap) before the mask (Gemma 2,
        arXiv:2408.00118)
    window: if positive, a token attends to itself and the window - 1 tokens before it
    layer: the index of the layer, which the exported node keeps

    Returns [1, T, Hq, Dv].
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scale
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    length = query.shape[2]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    visible = (distance >= 0) & (distance < window) if window > 0 else distance >= 0
    scores = scores.masked_fill(~visible, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous()


@attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float, window: int, layer: int
) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))


#: The gating functions of `experts`.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
}


@torch.library.custom_op("llmc::experts", mutates_args=())
def experts(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, activation: str
) -> Tensor:
    """Compute a mixture of experts: y[t] = sum over k of weights[t, k] * expert ids[t, k] of x[t].

    Expert e of x is down[e] @ (f(gate) * up), where [gate; up] = gate_up[e] @ x.

    x: [T, D]
    ids: the chosen experts, int64 [T, K]
    weights: [T, K]
    gate_up: [E, 2*I, D]
    down: [E, D, I]
    activation: a key of ACTIVATIONS

    Returns [T, D]. Shazeer et al. 2017, arXiv:1701.06538; gated as in Mixtral, arXiv:2401.04088.
    """
    y = torch.zeros_like(x, dtype=torch.float32)
    for choice in range(ids.shape[1]):
        for token in range(len(x)):
            expert = ids[token, choice]
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            y[token] += weights[token, choice] * (down[expert] @ (ACTIVATIONS[activation](gate) * up))
    return y.to(x.dtype)


@experts.register_fake
def _(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    return torch.empty_like(x)
