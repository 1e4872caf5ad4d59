"""The constants of a native program: the graph's values that they are made of, and what these are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.spec import module_of
from llmc.runtime.errors import UnsupportedError

_FUNCTIONS = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Floor": np.floor,
    "Log": np.log,
}
#: Operators that `evaluate` computes element by element, or that keep the order of elements.
ELEMENTWISE = frozenset((*_FUNCTIONS, "Cast", "Reshape"))


@dataclass(frozen=True)
class HeadRows:
    """Some rows of the matrix of each head, which lie one below the other. As `llmc.HeadLinear`."""

    heads: int
    begin: int
    rows: int
    #: Whether each part becomes its transpose.
    transposed: bool

    def take(self, matrix: np.ndarray) -> np.ndarray:
        """Return the rows of all heads, [heads * N, K]."""
        columns = matrix.shape[1]
        part = matrix.reshape(self.heads, -1, columns)[:, self.begin : self.begin + self.rows]
        return (
            part.transpose(0, 2, 1).reshape(-1, self.rows) if self.transposed else part.reshape(-1, columns)
        )


@dataclass(frozen=True)
class MatrixSource:
    """The constant values of the graph that a matrix of the program is made of."""

    #: The codes of a quantized matrix, else its elements.
    codes: ir.Value
    #: The scales of a quantized matrix; None if it is not quantized.
    scales: ir.Value | None = None
    #: The dequantized matrix, if it is stored in fp32 because the engine has no kernel for its codes.
    dequantized: ir.Value | None = None
    #: Whether the graph has the columns of the matrix as rows.
    transposed: bool = False
    #: Rows of the graph's matrix that the program's leaves out.
    skip: int = 0
    #: The rows of each head, of which the program's matrix has some.
    heads: HeadRows | None = None


@dataclass(frozen=True)
class ConstantSource:
    """The constant value of the graph that a constant of the program is made of."""

    value: ir.Value
    #: The first of its columns, and their number.
    begin: int
    width: int
    #: The factor of each row, [rows, 1]; None: 1.
    factors: np.ndarray | None = None

    @property
    def elements(self) -> int:
        """The number of elements of the constant."""
        shape = edit.dims(self.value)
        return int(np.prod(shape[:-1])) * self.width if shape else 1

    def read(self) -> np.ndarray:
        """Return the elements, float32, flat."""
        values = np.atleast_1d(evaluate(self.value))[..., self.begin : self.begin + self.width]
        if self.factors is not None:
            values = values * self.factors
        return np.ascontiguousarray(values.astype(np.float32)).reshape(-1)


def evaluate(value: ir.Value, known: Mapping[ir.Value, np.ndarray] = MappingProxyType({})) -> np.ndarray:
    """Return the array of a constant value: an initializer, or an expression of initializers.

    known: the arrays of other values in the expression
    """
    if value in known:
        return known[value]
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    assert node is not None, f"{value.name} has no data"
    inputs = [evaluate(operand, known) for operand in node.inputs if operand is not None]
    if node.op_type == "Cast":
        assert node.outputs[0].dtype is not None
        return inputs[0].astype(node.outputs[0].dtype.numpy())
    if node.op_type == "DequantizeLinear":
        codes, scales = inputs[0].astype(np.float32), inputs[1].astype(np.float32)
        if scales.ndim == 2:
            scales = np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1)
        elif scales.ndim == 1:
            scales = scales.reshape(-1, *[1] * (codes.ndim - 1))
        return codes * scales
    if node.op_type in _FUNCTIONS:
        result: np.ndarray = _FUNCTIONS[node.op_type](*inputs)
        return result
    if node.op_type == "Reshape":
        return inputs[0].reshape([int(dim) for dim in inputs[1]])
    raise refusal(node, "the native engine cannot compute this of weights")


def leaves(value: ir.Value) -> Iterator[str]:
    """Yield the names of the initializers in a constant value."""
    node = value.producer()
    if node is None:
        yield str(value.name)
        return
    for operand in node.inputs:
        if operand is not None:
            yield from leaves(operand)


def integers(value: ir.Value | None) -> list[int]:
    """Return the numbers of a constant value of integers."""
    assert value is not None
    return [int(element) for element in evaluate(value).reshape(-1)]


def refusal(node: ir.Node, reason: str) -> UnsupportedError:
    """Return the error that says which module the native engine cannot run, and why."""
    return UnsupportedError(
        f"{module_of(node)} ({node.op_type}): {reason}",
        "choose another engine: --engine openvino or onnxruntime",
    )
