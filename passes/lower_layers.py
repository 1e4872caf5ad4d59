"""LowerLinear and LowerRMSNorm: the traced layers become standard ONNX operators.

TracedLinear(x [T,K], W [N,K], b)    -> Gemm(x, W, b) with transB=1: the weight stays as the checkpoint has it
TracedRMSNorm(x, w){offset}          -> RMSNormalization(x, w + offset), axis -1 (ONNX opset 23)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.spec import Stage, module_of
from llmc.runtime.errors import UnsupportedError


class LowerLinear:
    """Counts one match per linear layer."""

    name = "lower-linear"
    requires = Stage.PACKED
    ensures = Stage.PACKED

    def __call__(self, model: ir.Model) -> Matches:
        nodes = [node for node in model.graph if node.op_type == "TracedLinear"]
        for node in nodes:
            x, output = node.inputs[0], node.outputs[0]
            assert x is not None and x.shape is not None and output.shape is not None
            if len(x.shape) != 2:
                raise UnsupportedError(
                    f"module {module_of(node)} is a Linear over {len(x.shape)} axes", "llmc expects [tokens, features]"
                )
            inputs = [value for value in node.inputs if value is not None]
            name = module_of(node)
            shape = list(output.shape)
            edit.replace(node, edit.insert(node, "Gemm", inputs, {"transB": 1}, name, shape, output.dtype))  # type: ignore[arg-type]
        return Matches(len(nodes))


class LowerRMSNorm:
    """Counts one match per normalization."""

    name = "lower-rms-norm"
    requires = Stage.PACKED
    ensures = Stage.PACKED

    def __call__(self, model: ir.Model) -> Matches:
        nodes = [node for node in model.graph if node.op_type == "TracedRMSNorm"]
        for node in nodes:
            x, weight = node.inputs
            output = node.outputs[0]
            assert x is not None and weight is not None and weight.shape is not None and output.shape is not None
            name = module_of(node)
            offset = float(edit.attribute(node, "offset"))
            if offset:
                assert weight.dtype is not None
                one = edit.constant(model.graph, np.array(offset, weight.dtype.numpy()), f"offset_{weight.dtype.name}")
                shape = [int(dim) for dim in weight.shape]  # type: ignore[arg-type]
                weight = edit.insert(node, "Add", [weight, one], {}, f"{name}.scale", shape, weight.dtype)
            attributes = {"axis": -1, "epsilon": float(edit.attribute(node, "epsilon"))}
            result = edit.insert(
                node, "RMSNormalization", [x, weight], attributes, name, list(output.shape), output.dtype  # type: ignore[arg-type]
            )
            edit.replace(node, result)
        return Matches(len(nodes))
