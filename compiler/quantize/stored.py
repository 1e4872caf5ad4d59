"""Where the rounded version of one weight lies, and how the engine rounds what it is multiplied with.

This is how a build tells whoever checks it what the engine computes with, whatever made the codes: rounding,
calibration, or a checkpoint that came quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llmc.compiler.quantize.activations import round_e2m1, round_e4m3
from llmc.compiler.quantize.formats import get_format
from llmc.compiler.quantize.quantizer import dequantize
from llmc.compiler.safetensors_index import TensorRef


@dataclass(frozen=True)
class InputRounding:
    """kind "e4m3": one static scale; "e2m1": NVFP4, where `scale` is the global one. See activations.py."""

    kind: str
    scale: float

    def __post_init__(self) -> None:
        if self.kind not in ("e4m3", "e2m1") or not self.scale > 0:
            raise ValueError(f"inputs are not rounded to {self.kind!r} by {self.scale}")

    def apply(self, x: np.ndarray) -> np.ndarray:
        """`x` [..., in] as the layer multiplies it, float32."""
        return round_e4m3(x, self.scale) if self.kind == "e4m3" else round_e2m1(x, self.scale)


@dataclass(frozen=True)
class StoredWeight:
    """One weight [out, in] of the checkpoint as the engine has it.

    format: a name in FORMATS. file: a safetensors file. arrays: "weight", "weight_scale" and, for NVFP4,
    "weight_scale_2" -> names of tensors in it. rows: first and stop of its rows in these tensors, in which
    several weights may follow one another; a tensor without as many rows as the codes is for all of them.
    """

    format: str
    file: str
    arrays: Mapping[str, str]
    rows: tuple[int, int]
    input: InputRounding | None = None

    def read(self, tensors: Mapping[str, TensorRef]) -> np.ndarray:
        """float32 [rows, in]: what its codes stand for. `tensors`: the header of `file`."""
        refs = {array: tensors[name] for array, name in self.arrays.items()}
        height, rows = refs["weight"].shape[0], slice(*self.rows)
        arrays = {
            array: ref.read(rows if ref.shape and ref.shape[0] == height else None)
            for array, ref in refs.items()
        }
        return dequantize(arrays, get_format(self.format))

    def to_json(self) -> dict[str, Any]:
        """Of an input: {"kind": "e4m3", "scale": float} or {"kind": "e2m1", "global_scale": float}."""
        return asdict(self) | {"input": self._input_json(), "rows": list(self.rows)}

    def _input_json(self) -> dict[str, Any] | None:
        if self.input is None:
            return None
        return {"kind": self.input.kind, _SCALE_NAMES[self.input.kind]: self.input.scale}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StoredWeight:
        """The inverse of `to_json`."""
        first, stop = data["rows"]
        given = data["input"]
        rounding = InputRounding(given["kind"], given[_SCALE_NAMES[given["kind"]]]) if given else None
        return cls(data["format"], data["file"], dict(data["arrays"]), (first, stop), rounding)


_SCALE_NAMES = {"e4m3": "scale", "e2m1": "global_scale"}
