"""UnnameDims: drop the names of dimensions of graph inputs and outputs, except T, the number of tokens.

With more than one name, their order in TensorRT's engine changes from build to build. The other names are not
needed: none of them relates two tensors of one standard operator.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.spec import Stage


class UnnameDims:
    """Drop dimension names. Counts one match per input or output."""

    name = "unname-dims"
    requires = Stage.QUANTIZED
    ensures = Stage.QUANTIZED

    def __call__(self, model: ir.Model) -> Matches:
        matches = Matches()
        for value in (*model.graph.inputs, *model.graph.outputs):
            sizes = list(value.shape or [])
            if any(_has_other_name(dim) for dim in sizes):
                value.shape = ir.Shape([None if _has_other_name(dim) else dim for dim in sizes])
                matches.count += 1
        return matches


def _has_other_name(dim: int | ir.SymbolicDim) -> bool:
    return not isinstance(dim, int) and dim.value not in (None, edit.TOKENS)
