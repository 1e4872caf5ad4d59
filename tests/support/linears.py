"""A graph of two linear layers without data, for tests of quantized layers in a graph."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from support.passes import mark_parameters

TYPES = {"fp32": ir.DataType.FLOAT, "bf16": ir.DataType.BFLOAT16, "fp16": ir.DataType.FLOAT16}
NUMPY = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16, "fp16": np.float16}
ROWS, COLUMNS = {"a": 96, "b": 32}, 256
# Relative to the largest output. It covers sums of 256 products in another order, one rounding of the output
# and, with activation quantization, inputs that are rounded to the neighboring code.
TOLERANCE = {"fp32": 1e-6, "bf16": 2**-8, "fp16": 2**-11}


def two_linears(dtype: str) -> ir.Model:
    """Return y = x a^T and z = x b^T, computed in `dtype`, without data; x, y and z are fp32."""
    narrow = TYPES[dtype]

    def cast(value: ir.Value, name: str, kind: ir.DataType) -> ir.Node:
        output = ir.Value(name=name, shape=value.shape, type=ir.TensorType(kind))
        return ir.node("Cast", [value], {"to": kind.value}, outputs=[output], name=name)

    x = ir.Value(name="x", shape=ir.Shape(["T", COLUMNS]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes = [cast(x, "x.narrow", narrow)]
    weights, outputs = [], []
    for name, rows in ROWS.items():
        weight = ir.Value(name=f"{name}.weight", shape=ir.Shape((rows, COLUMNS)), type=ir.TensorType(narrow))
        out = ir.Value(name=f"{name}.out", shape=ir.Shape(["T", rows]), type=ir.TensorType(narrow))
        inputs = [nodes[0].outputs[0], weight]
        nodes.append(ir.node("Gemm", inputs, {"transB": 1}, outputs=[out], name=name))
        nodes[-1].metadata_props["pkg.torch.onnx.name_scopes"] = f"['', 'model.{name}', 'op']"
        weights.append(weight)
        outputs.append(cast(out, f"{name}.wide", ir.DataType.FLOAT))
    graph = ir.Graph(
        [x], [o.outputs[0] for o in outputs], nodes=nodes + outputs, name="g", opset_imports={"": 23}
    )
    for weight in weights:
        graph.initializers.add(weight)
    return mark_parameters(ir.Model(graph, ir_version=10))
