"""The record of a large initializer: its modules in the checkpoint, and the tensors of its data.

The record is in the value's `meta`, which `ir.Model.clone` copies. An initializer has a Parameter, data, or
both. A parameter gets its data when the weights are written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

META = "llmc.parameter"  # the key in `ir.Value.meta`
_JOIN = "|"
_WEIGHT = "weight"


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint."""

    tensor: str
    #: Whether the checkpoint has the rows of each matrix of a stack as columns: [experts, in, out].
    transposed: bool = False


@dataclass(frozen=True)
class Parameter:
    """The contents of an initializer."""

    #: The checkpoint's modules, in the order of their rows.
    modules: tuple[str, ...]
    #: The rows of each module's weight, or of its vector.
    rows: tuple[int, ...]
    #: The tensors that make up the data, concatenated along axis 0. Empty where the build computes the data.
    sources: tuple[Source, ...]
    #: The array's name: "weight", "bias", or for a quantized module "weight_scale" and so on.
    array: str = _WEIGHT
    #: The file holds value * 2**exponent.
    exponent: int = 0
    #: The packed element type of the computed array ("e2m1"), where the file holds another type; else "".
    packed: str = ""
    #: The shape of the whole array, if the initializer is a part of it; else ().
    whole: tuple[int, ...] = ()
    #: (axis, ranges of indices) that the part keeps, one after the other.
    kept: tuple[tuple[int, tuple[tuple[int, int], ...]], ...] = ()

    @property
    def file_name(self) -> str:
        """The name in the weights file and in the graph: `a.weight|b.weight` for fused layers a and b."""
        return _JOIN.join(f"{module}.{self.array}" if module else self.array for module in self.modules)


def of_tensor(name: str, shape: tuple[int, ...]) -> Parameter:
    """Return the parameter for the whole tensor `name` of the checkpoint."""
    module, _, array = name.rpartition(".")
    return Parameter((module,), (shape[0] if shape else 1,), (Source(name),), array)


def joined(parts: Iterable[Parameter]) -> Parameter:
    """Join the rows of several parameters, in order. All must be the same array of their modules."""
    records = list(parts)
    (array,) = {part.array for part in records}
    return Parameter(
        tuple(module for part in records for module in part.modules),
        tuple(rows for part in records for rows in part.rows),
        tuple(source for part in records for source in part.sources),
        array,
    )


def parameter(value: ir.Value) -> Parameter | None:
    """Return the record of an initializer, or None for a constant and for any other value."""
    stored = value.meta.get(META)
    assert stored is None or isinstance(stored, Parameter)
    return stored


def set_parameter(value: ir.Value, record: Parameter) -> None:
    """Record what `value` holds."""
    value.meta[META] = record


def parameters(model: ir.Model) -> list[tuple[ir.Value, Parameter]]:
    """Return the initializers that are parameters, in the order of the graph."""
    pairs = ((value, parameter(value)) for value in model.graph.initializers.values())
    return [(value, record) for value, record in pairs if record is not None]


def new_parameter(graph: ir.Graph, record: Parameter, shape: ir.Shape, dtype: ir.DataType) -> ir.Value:
    """Add the initializer that `record` describes, without data."""
    value = ir.Value(name=record.file_name, shape=shape, type=ir.TensorType(dtype))
    set_parameter(value, record)
    graph.initializers.add(value)  # register_initializer requires data
    return value
