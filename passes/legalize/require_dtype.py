"""RequireDtype: refuse a graph whose dtype is not the engine's. The pass changes nothing."""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.geometry import attention_nodes
from llmc.passes.spec import Stage, module_of
from llmc.runtime.errors import BuildError


class RequireDtype:
    """Check the dtype of every attention layer.

    dtype: the dtype that each must compute in. called: the dtype's name in the error, such as "fp16".
    Raises BuildError for a layer that computes in another dtype.
    """

    name = "require-dtype"
    requires = Stage.QUANTIZED
    ensures = Stage.QUANTIZED

    def __init__(self, dtype: ir.DataType, called: str) -> None:
        self._dtype, self._called = dtype, called

    def __call__(self, model: ir.Model) -> Matches:
        for node in attention_nodes(model):
            if (actual := edit.operand(node, 0).dtype) != self._dtype:
                raise BuildError(
                    f"{module_of(node)} computes in {actual}, the TensorRT engine in {self._called}"
                )
        return Matches()
