"""One quantized matrix of a graph: its fused linear layers, and their initializers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmc.passes.parameter import Parameter
from llmc.passes.quantize.formats import Format

_WEIGHT = ".weight"


@dataclass(frozen=True)
class QuantizedMatrix:
    """One quantized matrix.

    `weight` holds its codes, and `weight_scale` and `weight_scale_2` hold their scales. Statically quantized
    activations have an `input_scale`. Smoothed activations also have the factors `pre_quant_scale` [columns].
    """

    #: The names of the fused modules in the checkpoint, in the order of their rows.
    modules: tuple[str, ...]
    #: The number of rows of each module.
    rows: tuple[int, ...]
    #: The number of input features.
    columns: int
    #: The format of the weight.
    format: Format

    @property
    def shape(self) -> tuple[int, int]:
        """The shape [out, in]."""
        return sum(self.rows), self.columns

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the weights in the checkpoint."""
        return tuple(module + _WEIGHT for module in self.modules)

    def parameter(self, array: str) -> Parameter:
        """Return the record of an array of the weight or of the input. The build computes its data."""
        return Parameter(self.modules, self.rows, (), array)

    def initializer(self, array: str) -> str:
        """Return the name of `array` in the graph."""
        return self.parameter(array).file_name

    @property
    def layout(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """The weight's arrays: name of the initializer -> (safetensors dtype, shape)."""
        arrays = self.format.layout(self.shape)
        return {self.initializer(array): entry for array, entry in arrays.items()}
