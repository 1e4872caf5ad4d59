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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    chunk: int,
    layer: int,
) -> Tensor:
    """Compute causal grouped-query self-attention of one sequence.

    query: [1, Hq, T, D]
    key: [1, Hkv, T, D]
    value: [1, Hkv, T, Dv]
    sinks: [Hq], a score without a value for each head, which takes a share of its softmax (gpt-oss; Xiao et
        al. 2023, arXiv:2309.17453)
    scale: the factor of the scores
    softcap: if positive, scores become softcap * tanh(scores / softcap) before the mask (Gemma 2,
        arXiv:2408.00118)
    window: if positive, a token attends to itself and the window - 1 tokens before it
    chunk: if positive, a token attends to itself and the tokens before it in its chunk: the positions are cut
        into chunks of so many (Llama 4)
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
    if chunk > 0:
        chunks = torch.arange(length) // chunk
        visible &= chunks[:, None] == chunks[None, :]
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., :length].to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous()


@attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    chunk: int,
    layer: int,
) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))


@torch.library.custom_op("llmc::latent_attention", mutates_args=())
def latent_attention(query: Tensor, key: Tensor, scale: float, value_width: int, layer: int) -> Tensor:
    """Compute causal attention of one sequence whose values are the first numbers of its keys.

    query: [1, Hq, T, D]
    key: [1, Hkv, T, D]
    scale: the factor of the scores
    value_width: the number of the numbers of a key that are its value
    layer: the index of the layer, which the exported node keeps

    Returns [1, T, Hq, value_width]. DeepSeek-AI 2024, arXiv:2405.04434, in the absorbed form.
    """
    return attention(query, key, key[..., :value_width].contiguous(), None, scale, 0.0, 0, 0, layer)


@latent_attention.register_fake
def _(query: Tensor, key: Tensor, scale: float, value_width: int, layer: int) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value_width))


@torch.library.custom_op("llmc::head_linear", mutates_args=())
def head_linear(x: Tensor, weight: Tensor, heads: int, begin: int, rows: int, transposed: bool) -> Tensor:
    """Multiply each head by a matrix of its own: y[..., h, :] = W_h @ x[..., h, :].

    x: [1, T, H, K]
    weight: [H*each, columns], a matrix [each, columns] for each head
    begin, rows: W_h is the rows begin to begin + rows - 1 of the matrix of head h
    transposed: multiply by W_h^T, so that K is `rows`; else K is `columns`

    Returns [1, T, H, columns] if transposed, else [1, T, H, rows].
    """
    matrices = weight.view(heads, -1, weight.shape[1])[:, begin : begin + rows]
    return torch.einsum("bthk,hkn->bthn" if transposed else "bthk,hnk->bthn", x, matrices)


@head_linear.register_fake
def _(x: Tensor, weight: Tensor, heads: int, begin: int, rows: int, transposed: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1] if transposed else rows))


@torch.library.custom_op("llmc::grouped_top_k", mutates_args=())
def grouped_top_k(
    x: Tensor, choice: Tensor, groups: int, kept: int, scored: int, k: int
) -> tuple[Tensor, Tensor]:
    """Choose the columns with the k largest numbers of `choice` among those of the best groups of columns.

    x, choice: [T, E]
    groups: the number of groups, of E / groups neighbouring columns
    kept: the number of groups whose columns can be chosen: those with the largest scores
    scored: the score of a group is the sum of so many of its largest numbers

    Returns the chosen columns of x, [T, k], and their indices, int64 [T, k], in falling order of `choice`.
    """
    of_group = choice.view(len(choice), groups, -1)
    scores = of_group.topk(scored, dim=-1)[0].sum(dim=-1)
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(kept, dim=-1)[1], 1.0).bool()
    ids = of_group.masked_fill(~chosen[..., None], float("-inf")).flatten(1).topk(k, dim=-1)[1]
    return x.gather(1, ids), ids


@grouped_top_k.register_fake
def _(x: Tensor, choice: Tensor, groups: int, kept: int, scored: int, k: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], k)), x.new_empty((x.shape[0], k), dtype=torch.int64)


def _silu(hidden: Tensor, limit: float, alpha: float) -> Tensor:
    gate, up = hidden.chunk(2)
    return torch.nn.functional.silu(gate) * up


def _gelu(hidden: Tensor, limit: float, alpha: float) -> Tensor:
    gate, up = hidden.chunk(2)
    return torch.nn.functional.gelu(gate) * up


def _clamped_swiglu(hidden: Tensor, limit: float, alpha: float) -> Tensor:
    gate, up = hidden[::2].clamp(max=limit), hidden[1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


#: What `experts` makes of the gates and ups of an expert: (hidden [2*I], limit, alpha) -> [I].
ACTIVATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "silu": _silu,
    "gelu": _gelu,
    "clamped_swiglu": _clamped_swiglu,
}


@torch.library.custom_op("llmc::experts", mutates_args=())
def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    transposed: bool,
    limit: float,
    alpha: float,
) -> Tensor:
    """Compute a mixture of experts: y[t] = sum over k of weights[t, k] * expert ids[t, k] of x[t].

    Expert e of x is down[e] @ f(gate_up[e] @ x + gate_up_bias[e]) + down_bias[e].

    x: [T, D]
    ids: the chosen experts, int64 [T, K]
    weights: [T, K]
    gate_up: [E, 2*I, D], or [E, D, 2*I] if transposed
    down: [E, D, I], or [E, I, D] if transposed
    gate_up_bias: [E, 2*I]; None: no biases
    down_bias: [E, D], likewise
    activation: a key of ACTIVATIONS, f. Gates and ups are halves, or alternate for "clamped_swiglu".
    limit, alpha: of "clamped_swiglu"

    Returns [T, D]. Shazeer et al. 2017, arXiv:1701.06538; gated as in Mixtral, arXiv:2401.04088, or as in
    gpt-oss, arXiv:2508.10925.
    """
    if transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    y = torch.zeros_like(x, dtype=torch.float32)
    for choice in range(ids.shape[1]):
        for token in range(len(x)):
            expert = ids[token, choice]
            hidden = gate_up[expert] @ x[token]
            if gate_up_bias is not None:
                hidden = hidden + gate_up_bias[expert]
            output = down[expert] @ ACTIVATIONS[activation](hidden, limit, alpha)
            if down_bias is not None:
                output = output + down_bias[expert]
            y[token] += weights[token, choice] * output
    return y.to(x.dtype)


@experts.register_fake
def _(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    transposed: bool,
    limit: float,
    alpha: float,
) -> Tensor:
    return torch.empty_like(x)
