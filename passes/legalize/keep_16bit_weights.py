"""Keep16BitWeights: keep 16-bit weights in the file. The graph widens them, which changes no value.

    before  Gemm(x, W)              Gather(E, ids)              W, E: fp32
    after   Gemm(x, Cast(W, fp32))  Cast(Gather(E, ids), fp32)  W, E: bf16 or fp16, as in the checkpoint
    or      Gemm(x * 2^-k, Cast(W * 2^k))  Cast(Gather(E * 2^k, ids)) * 2^-k       bf16 stored as fp16

OpenVINO widens such weights in registers, so decoding reads half the bytes
(`runtime/backends/openvino/backend.py`). Arithmetic stays fp32 throughout, and a power of two changes no bit
of it. (The pass scales the inputs of layers, because OpenVINO computes a factor after a Gemm more slowly.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.parameter import Parameter, parameter, set_parameter
from llmc.passes.spec import Stage
from llmc.plugins.experts.spec import MATRICES as EXPERT_MATRICES
from llmc.plugins.experts.spec import NAME as EXPERTS
from llmc.plugins.head_linear.spec import MATRICES as HEAD_MATRICES
from llmc.plugins.head_linear.spec import NAME as HEAD_LINEAR

_NARROW = {"bf16": ir.DataType.BFLOAT16, "fp16": ir.DataType.FLOAT16}


@dataclass(frozen=True)
class Narrow:
    """One matrix that stays in 16 bits."""

    #: "bf16" or "fp16".
    dtype: str
    #: The file holds W * 2**exponent.
    exponent: int = 0


@dataclass(frozen=True)
class NarrowPlan:
    """The matrices that stay in 16 bits."""

    #: Each matrix, by its `Parameter.file_name`.
    matrices: Mapping[str, Narrow] = field(default_factory=dict)


class Keep16BitWeights:
    """Keep the plan's matrices in 16 bits. Counts one match per matrix.

    Each must be an fp32 parameter for which `read_as_matrix` is true.
    """

    name = "keep-16bit-weights"
    requires = Stage.QUANTIZED
    ensures = Stage.QUANTIZED

    def __init__(self, plan: NarrowPlan) -> None:
        self._plan = plan

    def __call__(self, model: ir.Model) -> Matches:
        matches = Matches()
        for weight in list(model.graph.initializers.values()):
            record = parameter(weight)
            narrow = self._plan.matrices.get(record.file_name) if record else None
            if record is None or narrow is None or weight.dtype != ir.DataType.FLOAT:
                continue
            if not read_as_matrix(weight):
                matches.near_misses.append(f"{record.file_name} is not only multiplied and looked up")
                continue
            _keep(weight, record, narrow)
            matches.count += 1
        return matches


def read_as_matrix(weight: ir.Value) -> bool:
    """Return whether only linear layers and Experts read it as their matrix, and Gathers as their table."""
    places = {"Gemm": (1,), "Gather": (0,), EXPERTS: EXPERT_MATRICES, HEAD_LINEAR: (HEAD_MATRICES,)}
    return all(index in places.get(node.op_type, ()) for node, index in weight.uses())


def _keep(weight: ir.Value, record: Parameter, narrow: Narrow) -> None:
    dtype, power = _NARROW[narrow.dtype], narrow.exponent
    set_parameter(weight, replace(record, exponent=power))
    weight.type = ir.TensorType(dtype)  # a new object: a clone of the graph shares its types
    for node, index in list(weight.uses()):
        if node.op_type == "Gather":
            _widen_output(node, dtype, power)
            continue
        node.replace_input_with(index, edit.cast(node, weight, ir.DataType.FLOAT, f"{weight.name}.wide"))
        if power:
            x = edit.operand(node, 0)
            name = f"{node.outputs[0].name}.input"
            scaled = edit.insert(node, "Mul", [x, _factor(node, power)], {}, name, edit.dims(x))
            node.replace_input_with(0, scaled)


def _factor(node: ir.Node, power: int) -> ir.Value:
    """Return the constant 2 ** -power."""
    assert isinstance(node.graph, ir.Graph)
    return edit.constant(node.graph, np.array(2.0**-power, np.float32), f"two_to_{-power}")


def _widen_output(gather: ir.Node, narrow: ir.DataType, power: int) -> None:
    rows = gather.outputs[0]
    uses = list(rows.uses())
    after = uses[0].node
    rows.type = ir.TensorType(narrow)
    wide = edit.cast(after, rows, ir.DataType.FLOAT, f"{rows.name}.wide")
    if power:
        wide = edit.insert(
            after, "Mul", [wide, _factor(gather, power)], {}, f"{rows.name}.scaled", edit.dims(rows)
        )
    for node, index in uses:
        node.replace_input_with(index, wide)
