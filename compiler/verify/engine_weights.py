"""Where the rounded version of one weight lies, and how the engine rounds what it is multiplied with.

This is how a build tells whoever checks it what the engine computes with, whatever made the codes: rounding,
calibration, or a checkpoint that came quantized.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llmc.compiler.checkpoint.safetensors import TensorRef, read_header
from llmc.compiler.quantize.round_to_nearest import dequantize
from llmc.passes.quantize.fake_quantize import round_e2m1, round_e4m3, round_int8
from llmc.passes.quantize.formats import get_format


@dataclass(frozen=True)
class ActivationQuantization:
    """kind "int8" or "e4m3": one static scale; "e2m1": NVFP4, `scale` is the global one. See activations.py.

    factor: a safetensors file and the name of a tensor [in] in it that the input is multiplied by before it
    is rounded (`pre_quant_scale` of AWQ and SmoothQuant), and that the weight is divided by.
    """

    kind: str
    scale: float
    factor: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if self.kind not in _ROUNDINGS or not self.scale > 0:
            raise ValueError(f"inputs are not rounded to {self.kind!r} by {self.scale}")

    def apply(self, x: np.ndarray) -> np.ndarray:
        """`x` [..., in] as the layer multiplies it, float32."""
        rounded, factor = _ROUNDINGS[self.kind], self.factors
        return rounded(x * factor, self.scale) / factor

    @property
    def factors(self) -> np.ndarray:
        """float32 [in], or one 1."""
        return _tensor(*self.factor) if self.factor else np.ones(1, np.float32)


@dataclass(frozen=True)
class EngineWeight:
    """One weight [out, in] of the checkpoint as the engine has it.

    format: a name in FORMATS. file: a safetensors file. arrays: "weight", "weight_scale" and, for NVFP4,
    "weight_scale_2" -> names of tensors in it. rows: first and stop of its rows in these tensors, in which
    several weights may follow one another; a tensor without as many rows as the codes is for all of them.
    No arrays: the checkpoint itself has the weight in codes, which need no replacement.
    """

    format: str
    file: str
    arrays: Mapping[str, str]
    rows: tuple[int, int]
    input: ActivationQuantization | None = None

    def read(self, tensors: Mapping[str, TensorRef]) -> np.ndarray:
        """float32 [rows, in]: what its codes stand for, times the factor of its input, by which transformers
        does not multiply. `tensors`: the header of `file`."""
        refs = {array: tensors[name] for array, name in self.arrays.items()}
        height, rows = refs["weight"].shape[0], slice(*self.rows)
        arrays = {
            array: ref.read(rows if ref.shape and ref.shape[0] == height else None)
            for array, ref in refs.items()
        }
        wide = dequantize(arrays, get_format(self.format))
        return wide * self.input.factors if self.input else wide

    def to_json(self) -> dict[str, Any]:
        """Of an input: {"kind": "e4m3", "scale": float} or {"kind": "e2m1", "global_scale": float}, and
        "factor" where it has one."""
        return asdict(self) | {"input": self._input_json(), "rows": list(self.rows)}

    def _input_json(self) -> dict[str, Any] | None:
        if self.input is None:
            return None
        factor = {"factor": list(self.input.factor)} if self.input.factor else {}
        return {"kind": self.input.kind, _SCALE_NAMES[self.input.kind]: self.input.scale, **factor}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineWeight:
        """The inverse of `to_json`."""
        first, stop = data["rows"]
        given = data["input"]
        rounding = None
        if given:
            file = given.get("factor")
            factor = (file[0], file[1]) if file else None
            rounding = ActivationQuantization(given["kind"], given[_SCALE_NAMES[given["kind"]]], factor)
        return cls(data["format"], data["file"], dict(data["arrays"]), (first, stop), rounding)


@functools.cache
def _tensor(file: str, name: str) -> np.ndarray:
    return read_header(file)[name].read().astype(np.float32)


_ROUNDINGS = {"int8": round_int8, "e4m3": round_e4m3, "e2m1": round_e2m1}
_SCALE_NAMES = {"int8": "scale", "e4m3": "scale", "e2m1": "global_scale"}
