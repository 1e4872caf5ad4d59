"""Puts a plan into a canonical fp32 graph: the weights that it names become codes and scales.

    before  Gemm(x, W)
    after   Gemm(x, DequantizeLinear(W, Cast(scale, fp32)))        W: int8 or int4, as in `formats.py`

The Cast is there for scales of 16 bits only. The new initializers have no data yet; `weights.py` makes it
from the checkpoint while it writes, by the sources that this returns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmc.compiler.quantize.formats import Format
from llmc.compiler.quantize.plan import QuantPlan, make_plan
from llmc.compiler.quantize.quantizer import quantize
from llmc.compiler.safetensors_index import TensorRef
from llmc.passes import edit
from llmc.passes.fuse_linears import JOIN

_WEIGHT, _SCALE = ".weight", "_scale"
_CODES = {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4}
_SCALES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class Source:
    """What an initializer of a quantized layer is made from.

    parts: the checkpoint's weights, whose rows follow one another; array: "weight" or "weight_scale".
    """

    parts: tuple[str, ...]
    form: Format
    array: str
    shape: tuple[int, int]

    @property
    def entry(self) -> tuple[str, tuple[int, ...]]:
        """Its dtype, in safetensors' names, and shape as stored."""
        return self.form.layout(self.shape)[self.array]

    def chunks(self, tensors: Mapping[str, TensorRef], max_bytes: int) -> Iterator[np.ndarray]:
        """The array, a block of rows at a time."""
        for part in self.parts:
            for rows in tensors[part].iter_chunks(max_bytes):
                yield quantize(rows, self.form, part)[self.array]


def plan_weights(
    model: ir.Model, form: str, exclude: tuple[str, ...], recipe_exclude: tuple[str, ...], stored_bits: int
) -> QuantPlan:
    """The plan for the linear layers of a canonical graph. Raises RequestError as `make_plan` does."""
    shapes: dict[str, tuple[int, int]] = {}
    groups, in_matrices = [], 0
    for node in _linears(model):
        parts = _parts(node)
        groups.append(parts)
        rows, columns = edit.dims(edit.operand(node, 1))
        in_matrices += rows * columns
        shapes |= dict(zip(parts, _shapes(node, len(parts)), strict=True))
    parameters = [value for value in model.graph.initializers.values() if _is_weight(value)]
    every = sum(math.prod(edit.dims(value)) for value in parameters)
    return make_plan(
        shapes, form, exclude, recipe_exclude, groups=groups, stored_bits=stored_bits,
        other_params=every - in_matrices,
    )  # fmt: skip


def apply_plan(model: ir.Model, plan: QuantPlan) -> dict[str, Source]:
    """Rewrites `model` in place. Returns initializer name -> where its data comes from."""
    quantized, sources = plan.quantized(), {}
    for node in _linears(model):
        parts = _parts(node)
        if parts[0] not in quantized:
            continue
        form = quantized[parts[0]].format
        assert form is not None
        weight = edit.operand(node, 1)
        rows, columns = edit.dims(weight)
        names = tuple(part + _WEIGHT for part in parts)
        weight.dtype = _CODES[form.codes]
        scale = ir.Value(
            name=JOIN.join(name + _SCALE for name in names), type=ir.TensorType(_SCALES[form.scales])
        )
        for value, array in ((weight, "weight"), (scale, "weight_scale")):
            sources[str(value.name)] = Source(names, form, array, (rows, columns))
        scale.shape = ir.Shape(sources[str(scale.name)].entry[1])
        model.graph.initializers.add(scale)
        node.replace_input_with(1, _dequantized(node, weight, scale, form))
    return sources


def _linears(model: ir.Model) -> list[ir.Node]:
    """Gemms that multiply with a parameter that nobody else reads (a tied lm_head is the embedding too)."""
    return [
        node
        for node in model.graph
        if node.op_type == "Gemm" and _is_weight(weight := edit.operand(node, 1)) and len(weight.uses()) == 1
    ]


def _is_weight(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is None


def _parts(node: ir.Node) -> tuple[str, ...]:
    return tuple(part.removesuffix(_WEIGHT) for part in str(edit.operand(node, 1).name).split(JOIN))


def _shapes(node: ir.Node, count: int) -> list[tuple[int, int]]:
    """The shapes of the layers in a Gemm; of fused ones, from the Split behind it."""
    rows, columns = edit.dims(edit.operand(node, 1))
    if count == 1:
        return [(rows, columns)]
    split = next(iter(node.outputs[0].uses())).node
    sizes = edit.operand(split, 1).const_value
    assert sizes is not None
    return [(int(size), columns) for size in sizes.numpy()]


def _dequantized(node: ir.Node, weight: ir.Value, scale: ir.Value, form: Format) -> ir.Value:
    fp32, name = ir.DataType.FLOAT, str(weight.name)
    if scale.dtype != fp32:
        scale_shape = edit.dims(scale)
        scale = edit.insert(node, "Cast", [scale], {"to": fp32.value}, f"{scale.name}.wide", scale_shape)
        scale.dtype = fp32
    settings = {"axis": 1, "block_size": form.block} if form.block else {"axis": 0}
    wide = edit.insert(node, "DequantizeLinear", [weight, scale], settings, f"{name}.wide", edit.dims(weight))
    wide.dtype = fp32
    return wide
