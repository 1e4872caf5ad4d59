"""Estimate the memory that an engine takes for activations."""

from __future__ import annotations

import math

import onnx_ir as ir

from llmc.compiler.targets.tensorrt.build import EngineLimits
from llmc.passes import edit
from llmc.passes.spec import STRUCTURAL
from llmc.plugins.collectives.spec import RECV
from llmc.plugins.paged_attention.spec import NAME as ATTENTION


def activation_bytes(model: ir.Model) -> int:
    """Return the bytes of the values that are needed at the same time in the largest step.

    model: TensorRT's graph

    What moves numbers shares the memory of its inputs. TensorRT fuses operators and needs less, and it needs
    more for the kernels that it chooses. The engine says how much only when a GPU has loaded it.
    """
    order, given = list(model.graph), set(model.graph.inputs)
    holds: dict[ir.Value, frozenset[ir.Value]] = {}  # value -> the values whose memory it needs
    last: dict[ir.Value, int] = {}
    for number, node in enumerate(order):
        inputs = [value for value in node.inputs if value is not None and (value in holds or value in given)]
        read = frozenset[ir.Value]().union(*(holds.get(value, ()) for value in inputs))
        last.update(dict.fromkeys(read, number))
        outputs = node.outputs[:1] if node.op_type == ATTENTION else node.outputs  # caches are in place
        for output in outputs if inputs or node.op_type == RECV else ():
            holds[output] = read if node.op_type in STRUCTURAL and read else frozenset((output,))
            last.update(dict.fromkeys(holds[output], number))
    ends: dict[int, int] = {}
    live = most = 0
    for number, node in enumerate(order):
        for output in node.outputs:
            if holds.get(output) == {output}:
                size = _nbytes(output)
                live += size
                ends[last[output]] = ends.get(last[output], 0) + size
        most = max(most, live)
        live -= ends.get(number, 0)
    return most


def _nbytes(value: ir.Value) -> int:
    assert value.shape is not None and value.dtype is not None
    tokens = str(value.shape[0]) == edit.TOKENS if len(value.shape) else False
    rows = EngineLimits.max_tokens if tokens else EngineLimits.max_logits
    return math.prod(rows if size == -1 else size for size in edit.dims(value)) * value.dtype.bitwidth // 8
