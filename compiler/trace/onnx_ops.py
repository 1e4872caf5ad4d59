"""Translate each operator of `ops.py` to one ONNX node of the domain `llmc`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx.defs
import onnxscript
import torch

DOMAIN = "llmc"
# The names differ from those of all standard operators: onnxscript refuses a name that two domains use.
SIGNATURES: dict[str, tuple[list[str], list[str], dict[str, str]]] = {
    # operator: (inputs, optional inputs, attributes and their types)
    "TracedLinear": (["x", "weight"], ["bias"], {}),
    "TracedRMSNorm": (["x", "weight"], [], {"epsilon": "FLOAT", "offset": "FLOAT", "rounds_once": "INT"}),
    "TracedRope": (["x", "cos", "sin"], [], {"interleaved": "INT"}),
    "TracedAttention": (
        ["query", "key"],
        ["value", "sinks"],
        {
            "scale": "FLOAT",
            "softcap": "FLOAT",
            "window": "INT",
            "chunk": "INT",
            "layer": "INT",
            "value_width": "INT",
        },
    ),
    "TracedHeadLinear": (
        ["x", "weight"],
        [],
        {"heads": "INT", "begin": "INT", "rows": "INT", "transposed": "INT"},
    ),
    "GroupedTopK": (
        ["x", "choice"],
        [],
        {"groups": "INT", "kept": "INT", "scored": "INT", "k": "INT"},
    ),
    "TracedExperts": (
        ["x", "ids", "weights", "gate_up", "down"],
        ["gate_up_bias", "down_bias"],
        {"activation": "STRING", "transposed": "INT", "limit": "FLOAT", "alpha": "FLOAT"},
    ),
}
# Inputs of another type than the others.
_TYPES = {"ids": "tensor(int64)", "weights": "W"}
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


def _register_schemas() -> None:
    for operator, (inputs, optional, attributes) in SIGNATURES.items():
        if onnx.defs.has(operator, DOMAIN):
            continue
        formal = onnx.defs.OpSchema.FormalParameter
        option = onnx.defs.OpSchema.FormalParameterOption
        schema = onnx.defs.OpSchema(
            operator,
            DOMAIN,
            1,
            inputs=[formal(i, _TYPES.get(i, "T")) for i in inputs]
            + [formal(i, "T", param_option=option.Optional) for i in optional],
            outputs=[
                formal("y", "T"),
                *([formal("ids", "tensor(int64)")] if operator == "GroupedTopK" else []),
            ],
            type_constraints=[(name, _FLOATS, "") for name in ("T", "W")[: 1 + ("weights" in inputs)]],
            attributes=[
                onnx.defs.OpSchema.Attribute(key, getattr(onnx.defs.OpSchema.AttrType, kind))
                for key, kind in attributes.items()
            ],
        )
        onnx.defs.register_schema(schema)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the `custom_translation_table` for `torch.onnx.export`."""
    _register_schemas()
    op = onnxscript.values.Opset(DOMAIN, 1)

    def linear(x, weight, bias=None):  # type: ignore[no-untyped-def]
        return op.TracedLinear(x, weight, bias)

    def rms_norm(x, weight, epsilon: float, offset: float, rounds_once: bool):  # type: ignore[no-untyped-def]
        return op.TracedRMSNorm(x, weight, epsilon=epsilon, offset=offset, rounds_once=int(rounds_once))

    def rope(x, cos, sin, interleaved: bool):  # type: ignore[no-untyped-def]
        return op.TracedRope(x, cos, sin, interleaved=int(interleaved))

    def attention(  # type: ignore[no-untyped-def]
        query, key, value, sinks, scale: float, softcap: float, window: int, chunk: int, layer: int,
    ):  # fmt: skip
        return op.TracedAttention(
            query, key, value, sinks,
            scale=scale, softcap=softcap, window=window, chunk=chunk, layer=layer, value_width=0,
        )  # fmt: skip

    def latent_attention(query, key, scale: float, value_width: int, layer: int):  # type: ignore[no-untyped-def]
        return op.TracedAttention(
            query, key, None, None,
            scale=scale, softcap=0.0, window=0, chunk=0, layer=layer, value_width=value_width,
        )  # fmt: skip

    def head_linear(x, weight, heads: int, begin: int, rows: int, transposed: bool):  # type: ignore[no-untyped-def]
        return op.TracedHeadLinear(x, weight, heads=heads, begin=begin, rows=rows, transposed=int(transposed))

    def grouped_top_k(x, choice, groups: int, kept: int, scored: int, k: int):  # type: ignore[no-untyped-def]
        return op.GroupedTopK(x, choice, groups=groups, kept=kept, scored=scored, k=k)

    def experts(  # type: ignore[no-untyped-def]
        x, ids, weights, gate_up, down, gate_up_bias, down_bias, activation: str, transposed: bool,
        limit: float, alpha: float,
    ):  # fmt: skip
        return op.TracedExperts(
            x, ids, weights, gate_up, down, gate_up_bias, down_bias,
            activation=activation, transposed=int(transposed), limit=limit, alpha=alpha,
        )  # fmt: skip

    return {
        torch.ops.llmc.experts.default: experts,
        torch.ops.llmc.linear.default: linear,
        torch.ops.llmc.rms_norm.default: rms_norm,
        torch.ops.llmc.rope.default: rope,
        torch.ops.llmc.attention.default: attention,
        torch.ops.llmc.latent_attention.default: latent_attention,
        torch.ops.llmc.head_linear.default: head_linear,
        torch.ops.llmc.grouped_top_k.default: grouped_top_k,
    }
