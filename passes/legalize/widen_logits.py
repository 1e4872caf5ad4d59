"""WidenLogits: return logits in fp32, which numpy and the samplers need. Widening is exact.

before  logits = Gemm(x, W)             16 bits
after   logits = Cast(Gemm(x, W), fp32)
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.spec import Stage


class WidenLogits:
    """Cast the logits to fp32. Counts 1, or 0 if they are fp32 already or in another pipeline stage.

    Nodes are out of order afterwards.
    """

    name = "widen-logits"
    requires = Stage.QUANTIZED
    ensures = Stage.QUANTIZED

    def __call__(self, model: ir.Model) -> Matches:
        logits = model.graph.outputs[0]
        if logits.name != "logits" or logits.dtype == ir.DataType.FLOAT:
            return Matches()
        last = logits.producer()
        assert last is not None
        logits.name = "logits_narrow"
        model.graph.outputs[0] = edit.cast(last, logits, ir.DataType.FLOAT, "logits")
        return Matches(1)
