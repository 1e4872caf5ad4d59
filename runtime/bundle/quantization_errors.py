"""The errors of all quantized matrices: `quantization_errors.json` in a bundle, with a strict parser.

    {"format": 1,
     "output": {"model.layers.0.mlp.down_proj": 0.0125, ...},
     "weight": {"lm_head": 0.0871, ...}}

The manifest names the largest of them only, so that it stays small.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from llmc.runtime.bundle.strict_json import DAMAGED, MAX_TEXT
from llmc.runtime.errors import BundleError

if TYPE_CHECKING:
    from llmc.runtime.bundle.reader import Bundle

FILE = "quantization_errors.json"  # in the bundle
FORMAT = 1
MAX_BYTES = 4 << 20  # 40,000 matrices
_KINDS = ("output", "weight")


@dataclass(frozen=True)
class QuantizationErrors:
    """The relative error of each quantized matrix, in the order of the graph."""

    #: Module -> error of its output on the calibration text, |Wx - W'x| / |Wx|.
    output: Mapping[str, float]
    #: Module -> error of its weight, |W - W'| / |W|, for modules that were rounded to nearest.
    weight: Mapping[str, float]

    def to_json(self) -> str:
        """Return the file's text, with figures of three significant digits."""
        errors = {
            kind: {module: float(f"{error:.3g}") for module, error in getattr(self, kind).items()}
            for kind in _KINDS
        }
        return json.dumps({"format": FORMAT, **errors}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, data: bytes) -> QuantizationErrors:
        """Parse the text of `to_json`. Raises BundleError, naming the field, for anything else."""
        try:
            table = json.loads(data)
        except (ValueError, RecursionError) as error:
            _bad("the whole", f"is not JSON ({ascii(str(error)[:80])[1:-1]})")
        if not isinstance(table, dict) or set(table) != {"format", *_KINDS}:
            _bad("the whole", f"must have the fields format, {' and '.join(_KINDS)}")
        if type(table["format"]) is not int or table["format"] != FORMAT:
            _bad("format", f"must be {FORMAT}")
        for kind in _KINDS:
            if not isinstance(table[kind], dict):
                _bad(kind, "must be an object")
            for module, figure in table[kind].items():
                if len(module) > MAX_TEXT or not module.isprintable():
                    _bad(kind, "has a name that is no module")
                if not _is_error(figure):
                    _bad(f"{kind}.{ascii(module)[1:81]}", "must be a finite number, 0 or more")
        return cls(table["output"], table["weight"])

    @classmethod
    def read(cls, bundle: Bundle) -> QuantizationErrors | None:
        """Return the errors of a bundle; None for a bundle without them.

        Raises BundleError if the file is damaged.
        """
        record = bundle.manifest.files.get(FILE)
        if record is None:
            return None
        if record.bytes > MAX_BYTES:
            _bad("the whole", f"has more than {MAX_BYTES} bytes")
        data = (bundle.path / FILE).read_bytes()
        if hashlib.sha256(data).hexdigest() != record.sha256:
            _bad("the whole", "does not fit its sha256 in the manifest")
        return cls.from_json(data)


def _is_error(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value < 1e300


def _bad(where: str, complaint: str) -> NoReturn:
    raise BundleError(f"{FILE}: {where} {complaint}", DAMAGED)
