"""One quantized matrix of a graph: its fused linear layers, and their initializers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmc.passes.parameter import Parameter
from llmc.passes.quantize.formats import Format

_WEIGHT = ".weight"


@dataclass(frozen=True)
class QuantizedMatrix:
    """modules: their names in the checkpoint, whose rows follow one another; rows: how many each has.

    Its arrays are `weight` for the codes and `weight_scale`, `weight_scale_2` for the scales;
    `input_scale` for that of static activations, `pre_quant_scale` [columns] for what smoothed ones are
    multiplied by before.
    """

    modules: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int
    format: Format

    @property
    def shape(self) -> tuple[int, int]:
        return sum(self.rows), self.columns

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the checkpoint's tensors."""
        return tuple(module + _WEIGHT for module in self.modules)

    def parameter(self, array: str) -> Parameter:
        """The record of an array of the format's layout, or of one of the input; the build makes the data."""
        return Parameter(self.modules, self.rows, (), array)

    def initializer(self, array: str) -> str:
        """The name of that array in the graph."""
        return self.parameter(array).file_name

    @property
    def layout(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Initializer's name -> (dtype in safetensors' names, shape) of the weight's arrays."""
        arrays = self.format.layout(self.shape)
        return {self.initializer(array): entry for array, entry in arrays.items()}
