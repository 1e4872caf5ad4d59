"""One quantized matrix of a graph: the layers that it multiplies as one, and their initializers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmc.passes.canonicalize.fuse_linears import JOIN
from llmc.passes.quantize.formats import Format

_WEIGHT = ".weight"
_OF_INPUT = ("input_scale", "pre_quant_scale")


@dataclass(frozen=True)
class QuantizedMatrix:
    """modules: their names in the checkpoint, whose rows follow one another; rows: how many each has.

    Its initializers are `<weight>` for the codes and `<weight>_scale`, `<weight>_scale_2` for the scales,
    `<weight>` being the modules' weights joined by `|`; `input_scale` is that of static activations, and
    `pre_quant_scale` [columns] what smoothed ones are multiplied by before.
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

    def initializer(self, array: str) -> str:
        """The name in the graph of an array of the format's layout, or of one of the input."""
        if array in _OF_INPUT:
            return JOIN.join(f"{module}.{array}" for module in self.modules)
        suffix = array.removeprefix("weight")
        return JOIN.join(weight + suffix for weight in self.weights)

    @property
    def layout(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Initializer's name -> (dtype in safetensors' names, shape) of the weight's arrays."""
        arrays = self.format.layout(self.shape)
        return {self.initializer(array): entry for array, entry in arrays.items()}
