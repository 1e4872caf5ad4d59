"""Reads the linear layers off a canonical graph, for a plan that says which of them are quantized."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.parameter import Parameter, parameter, parameters
from llmc.passes.spec import module_of


@dataclass(frozen=True)
class Survey:
    """The linear layers of a graph.

    shapes: module -> [out, in]. groups: the modules of each Gemm. tied: those that share the embedding.
    other_params: the elements of parameters outside of the matrices.
    """

    shapes: dict[str, tuple[int, int]]
    groups: list[tuple[str, ...]]
    tied: tuple[str, ...]
    other_params: int


def survey(model: ir.Model, *, with_tied: bool = False) -> Survey:
    """The linear layers of `model`. with_tied: also those whose weight is the embedding (a tied lm_head)."""
    shapes: dict[str, tuple[int, int]] = {}
    groups: list[tuple[str, ...]] = []
    tied: list[str] = []
    in_matrices = 0
    for node in model.graph:
        if (record := linear(node)) is not None:
            columns = edit.dims(edit.operand(node, 1))[1]
            groups.append(record.modules)
            shapes |= {name: (rows, columns) for name, rows in zip(record.modules, record.rows, strict=True)}
            in_matrices += sum(record.rows) * columns
        elif with_tied and tied_linear(node) is not None:
            name = module_of(node)
            rows, columns = edit.dims(edit.operand(node, 1))
            groups.append((name,))
            shapes[name] = (rows, columns)
            tied.append(name)
    every = sum(math.prod(edit.dims(value)) for value, _ in parameters(model))
    return Survey(shapes, groups, tuple(tied), every - in_matrices)


def linear(node: ir.Node) -> Parameter | None:
    """The weight of a Gemm that nothing else reads; None for any other node."""
    return _weight(node, shared=False)


def tied_linear(node: ir.Node) -> Parameter | None:
    """The weight of a Gemm that something else reads too, as an lm_head tied to the embedding has it."""
    return _weight(node, shared=True)


def _weight(node: ir.Node, *, shared: bool) -> Parameter | None:
    if node.op_type != "Gemm":
        return None
    weight = edit.operand(node, 1)
    return parameter(weight) if (len(weight.uses()) > 1) == shared else None
