"""LowerLinear and LowerRMSNorm: replace the traced layers by standard ONNX operators.

TracedLinear(x [T,K], W [N,K], b)    -> Gemm(x, W, b) with transB=1: W keeps the checkpoint's layout
TracedRMSNorm(x, w){offset}          -> RMSNormalization(x, w + offset), axis -1 (ONNX opset 23)

A norm that rounds once gets a mark for `legalize/widen_norms.py`, because ONNX has no attribute for it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.spec import ROUNDS_ONCE, Stage, module_of
from llmc.runtime.errors import UnsupportedError


class LowerLinear:
    """Replace TracedLinear by Gemm. Counts one match per linear layer."""

    name = "lower-linear"
    requires = Stage.PACKED
    ensures = Stage.PACKED

    def __call__(self, model: ir.Model) -> Matches:
        nodes = [node for node in model.graph if node.op_type == "TracedLinear"]
        for node in nodes:
            axes = len(edit.dims(edit.operand(node, 0)))
            if axes != 2:
                raise UnsupportedError(
                    f"module {module_of(node)} is a Linear over {axes} axes",
                    "llmc expects [tokens, features]",
                )
            inputs = [value for value in node.inputs if value is not None]
            shape = edit.dims(node.outputs[0])
            edit.replace(node, edit.insert(node, "Gemm", inputs, {"transB": 1}, module_of(node), shape))
        return Matches(len(nodes))


class LowerRMSNorm:
    """Replace TracedRMSNorm by RMSNormalization. Counts one match per norm."""

    name = "lower-rms-norm"
    requires = Stage.PACKED
    ensures = Stage.PACKED

    def __call__(self, model: ir.Model) -> Matches:
        nodes = [node for node in model.graph if node.op_type == "TracedRMSNorm"]
        for node in nodes:
            name, weight = module_of(node), edit.operand(node, 1)
            offset = float(edit.attribute(node, "offset"))
            if offset:
                assert weight.dtype is not None
                scalar = np.array(offset, weight.dtype.numpy())
                added = edit.constant(model.graph, scalar, f"offset_{weight.dtype.name}")
                weight = edit.insert(node, "Add", [weight, added], {}, f"{name}.scale", edit.dims(weight))
            settings = {"axis": -1, "epsilon": float(edit.attribute(node, "epsilon"))}
            inputs, shape = [edit.operand(node, 0), weight], edit.dims(node.outputs[0])
            norm = edit.insert(node, "RMSNormalization", inputs, settings, name, shape)
            if edit.attribute(node, "rounds_once"):
                norm_node = norm.producer()
                assert norm_node is not None
                norm_node.metadata_props[ROUNDS_ONCE] = "1"
            edit.replace(node, norm)
        return Matches(len(nodes))
