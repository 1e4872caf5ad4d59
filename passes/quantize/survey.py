"""The linear layers of a canonical graph, from which a quantization plan is made."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.parameter import Parameter, parameter, parameters
from llmc.passes.spec import module_of
from llmc.plugins.experts.spec import MATRICES as EXPERT_MATRICES
from llmc.plugins.experts.spec import NAME as EXPERTS


@dataclass(frozen=True)
class Survey:
    """The linear layers of a graph."""

    #: Module -> [out, in].
    shapes: dict[str, tuple[int, int]]
    #: The modules of each Gemm, and the matrices of experts one by one.
    groups: list[tuple[str, ...]]
    #: The matrices of experts.
    experts: tuple[str, ...]
    #: The modules that share their weight with the embedding.
    tied: tuple[str, ...]
    #: Number of parameters outside the matrices.
    other_params: int


def survey(model: ir.Model, *, with_tied: bool = False) -> Survey:
    """Return the linear layers of `model`. with_tied: also those tied to the embedding."""
    shapes: dict[str, tuple[int, int]] = {}
    groups: list[tuple[str, ...]] = []
    experts: list[str] = []
    tied: list[str] = []
    in_matrices = 0
    for node in model.graph:
        for index, record in matrices(node):
            columns = edit.dims(edit.operand(node, index))[1]
            experts += record.modules if node.op_type == EXPERTS else ()
            groups.append(record.modules)
            shapes |= {name: (rows, columns) for name, rows in zip(record.modules, record.rows, strict=True)}
            in_matrices += sum(record.rows) * columns
        if with_tied and tied_linear(node) is not None:
            name = module_of(node)
            rows, columns = edit.dims(edit.operand(node, 1))
            groups.append((name,))
            shapes[name] = (rows, columns)
            tied.append(name)
    all_params = sum(math.prod(edit.dims(value)) for value, _ in parameters(model))
    return Survey(shapes, groups, tuple(experts), tuple(tied), all_params - in_matrices)


def has_rows_first(node: ir.Node) -> bool:
    """Return whether the weight of a Gemm is [out, in], as formats describe it. GPT-2 stores [in, out]."""
    return "transB" in node.attributes and edit.attribute(node, "transB") == 1


def matrices(node: ir.Node) -> list[tuple[int, Parameter]]:
    """Return the matrices of a Gemm or of experts that nothing else reads, with their places as inputs."""
    if node.op_type == EXPERTS:
        places = [(index, edit.operand(node, index)) for index in EXPERT_MATRICES]
        records = [(index, parameter(value)) for index, value in places if len(value.uses()) == 1]
        return [(index, record) for index, record in records if record is not None]
    record = linear(node)
    return [] if record is None else [(1, record)]


def linear(node: ir.Node) -> Parameter | None:
    """Return the weight of a Gemm if nothing else reads it, or None."""
    return _weight(node, shared=False)


def tied_linear(node: ir.Node) -> Parameter | None:
    """Return the weight of a Gemm if another node also reads it (a tied lm_head), or None."""
    return _weight(node, shared=True)


def _weight(node: ir.Node, *, shared: bool) -> Parameter | None:
    if node.op_type != "Gemm" or not has_rows_first(node):
        return None
    weight = edit.operand(node, 1)
    return parameter(weight) if (len(weight.uses()) > 1) == shared else None
