"""The quantized weights that an engine computes with, and the quantization of its activations.

The verification gives the reference the same weights, whatever made them: rounding, calibration, or a
pre-quantized checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llmc.compiler.checkpoint.safetensors import TensorRef, read_header
from llmc.compiler.quantize.round_to_nearest import dequantize
from llmc.compiler.targets.native.unpack import read_rows
from llmc.passes.quantize.fake_quantize import round_e2m1, round_e4m3, round_int8
from llmc.passes.quantize.formats import get_format
from llmc.runtime.native.program import Matrix


@dataclass(frozen=True)
class ActivationQuantization:
    """The quantization of a linear layer's input (passes/quantize/fake_quantize.py)."""

    #: Element type: "int8", "e4m3" or "e2m1".
    kind: str
    #: The static scale; for "e2m1" (NVFP4) the global scale.
    scale: float
    #: (safetensors file, name of a tensor [in] in it). Before quantization the input is multiplied by this
    #: tensor, and the weight is divided by it (`pre_quant_scale` of AWQ and SmoothQuant).
    factor: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if self.kind not in _QUANTIZERS or not self.scale > 0:
            raise ValueError(f"there is no quantization of activations to {self.kind!r} by {self.scale}")

    def apply(self, x: np.ndarray) -> np.ndarray:
        """Quantize the input `x`, float32 [..., in], and return it dequantized, in the same shape."""
        quantize, factor = _QUANTIZERS[self.kind], self.factors
        return quantize(x * factor, self.scale) / factor

    @property
    def factors(self) -> np.ndarray:
        """The values of `factor`, float32 [in]; [1.0] if it is None."""
        return _tensor(*self.factor) if self.factor else np.ones(1, np.float32)


@dataclass(frozen=True)
class EngineWeight:
    """One quantized weight [out, in] of the engine."""

    #: A name in FORMATS.
    format: str
    #: A safetensors file.
    file: str
    #: "weight", "weight_scale" and, for NVFP4, "weight_scale_2" -> names of tensors in the file. Empty for a
    #: weight of a pre-quantized checkpoint: the reference has it already.
    arrays: Mapping[str, str]
    #: (first row, stop) of this weight in the tensors, which may hold several fused weights. A tensor with
    #: another number of rows than "weight" belongs to all of them.
    rows: tuple[int, int]
    input: ActivationQuantization | None = None
    #: The native engine's matrix, whose tiles are the only tensor, "weight". None: the arrays of `format`.
    matrix: Matrix | None = None

    def read(self, tensors: Mapping[str, TensorRef]) -> np.ndarray:
        """Return the dequantized weight, float32 [rows, in].

        tensors: the header of `file`

        The weight is multiplied by the factor of its input, because the reference does not multiply its
        inputs by it.
        """
        refs = {array: tensors[name] for array, name in self.arrays.items()}
        if self.matrix is not None:
            wide = read_rows(self.matrix, refs["weight"], *self.rows)
            return wide * self.input.factors if self.input else wide
        height, rows = refs["weight"].shape[0], slice(*self.rows)
        arrays = {
            array: ref.read(rows if ref.shape and ref.shape[0] == height else None)
            for array, ref in refs.items()
        }
        wide = dequantize(arrays, get_format(self.format))
        return wide * self.input.factors if self.input else wide

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object.

        "matrix", only where there is one, has the fields of a matrix in a native program.
        "input" is {"kind": "e4m3", "scale": x} or {"kind": "e2m1", "global_scale": x}, with an optional
        "factor", or None.
        """
        data = asdict(self) | {"input": self._input_json(), "rows": list(self.rows)}
        if self.matrix is None:
            del data["matrix"]
        return data

    def _input_json(self) -> dict[str, Any] | None:
        if self.input is None:
            return None
        factor = {"factor": list(self.input.factor)} if self.input.factor else {}
        return {"kind": self.input.kind, _SCALE_NAMES[self.input.kind]: self.input.scale, **factor}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineWeight:
        """Parse what `to_json` returns."""
        first, stop = data["rows"]
        activation = data["input"]
        quantization = None
        if activation:
            location = activation.get("factor")
            factor = (location[0], location[1]) if location else None
            quantization = ActivationQuantization(
                activation["kind"], activation[_SCALE_NAMES[activation["kind"]]], factor
            )
        matrix = Matrix(**data["matrix"]) if "matrix" in data else None
        return cls(data["format"], data["file"], dict(data["arrays"]), (first, stop), quantization, matrix)


@functools.cache
def _tensor(file: str, name: str) -> np.ndarray:
    return read_header(file)[name].read().astype(np.float32)


_QUANTIZERS = {"int8": round_int8, "e4m3": round_e4m3, "e2m1": round_e2m1}
_SCALE_NAMES = {"int8": "scale", "e4m3": "scale", "e2m1": "global_scale"}
