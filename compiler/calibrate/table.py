"""A model's activation ranges as a JSON file that people can read, with a strict parser.

    {"format": 1,
     "source": {"text_sha256": ..., "tokens": ..., "config_sha256": ...},
     "activations": {"model.layers.0.mlp.down_proj": {"max": ..., "percentile": ..., "mse": ...}, ...},
     "kv": {"0": {"key": ..., "value": ...}, ...}}

Figures are rounded to six significant digits before use: a table read back equals the one written.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, NoReturn

from llmc.compiler.calibrate.ranges import ClipRanges
from llmc.runtime.errors import CheckpointError, RequestError

FORMAT = 1
_KV = ("key", "value")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Source:
    """The text and the model that a table was measured with."""

    #: The sha256 of the text in UTF-8. For random tokens it is that of the empty text.
    text_sha256: str
    #: The number of tokens that the model was run on.
    tokens: int
    #: `config_sha256` of the model.
    config_sha256: str

    @classmethod
    def of(cls, text: str, sequences: Iterable[list[int]], config: Mapping[str, Any]) -> Source:
        """Return the source for a text, its token ids and the values of config.json."""
        text_sha256 = hashlib.sha256(text.encode()).hexdigest()
        return cls(text_sha256, sum(len(ids) for ids in sequences), config_sha256(config))


def config_sha256(config: Mapping[str, Any]) -> str:
    """Return the sha256 of the values in config.json, whatever their order and whitespace."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class CalibrationTable:
    """The activation ranges of a model."""

    #: Module -> the clip ranges of its input.
    entries: Mapping[str, ClipRanges]
    #: Layer -> (largest magnitude of its keys, largest magnitude of its values).
    kv: Mapping[int, tuple[float, float]]
    source: Source

    def __post_init__(self) -> None:
        entries = {
            name: ClipRanges(*(_rounded(figure, f"activations[{name}]") for figure in asdict(entry).values()))
            for name, entry in self.entries.items()
        }
        kv = {
            layer: (_rounded(key, f"kv[{layer}]"), _rounded(value, f"kv[{layer}]"))
            for layer, (key, value) in self.kv.items()
        }
        object.__setattr__(self, "entries", entries)
        object.__setattr__(self, "kv", kv)

    def amax(self, module: str, method: str) -> float:
        """Return the clip range of the input of `module` by "max", "percentile" or "mse".

        Raises RequestError for an unknown method or module.
        """
        if module not in self.entries:
            near = get_close_matches(module, self.entries, n=1)
            raise RequestError(
                f"the calibration table has no module {module}",
                f"it has {near[0]}" if near else "the table belongs to another model; calibrate this one",
            )
        return self.entries[module].amax(method)

    def to_json(self) -> str:
        """Return the file's text. Equal tables give equal text."""
        table = {
            "format": FORMAT,
            "source": asdict(self.source),
            "activations": {name: asdict(entry) for name, entry in self.entries.items()},
            "kv": {str(layer): dict(zip(_KV, pair, strict=True)) for layer, pair in sorted(self.kv.items())},
        }
        return json.dumps(table, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> CalibrationTable:
        """Parse the text of `to_json`. Raises CheckpointError, naming the field, for anything else."""
        try:
            table = json.loads(text, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            _bad("the whole", f"is not JSON ({str(error)[:80]})")
        top = _record(table, "the whole", ("format", "source", "activations", "kv"))
        if type(top["format"]) is not int or top["format"] != FORMAT:
            _bad("format", f"must be {FORMAT}, got {str(top['format'])[:40]}")
        source = _record(top["source"], "source", [field.name for field in fields(Source)])
        for name in ("text_sha256", "config_sha256"):
            if not isinstance(source[name], str) or not _SHA256.fullmatch(source[name]):
                _bad(f"source.{name}", "must be 64 hexadecimal digits")
        if type(source["tokens"]) is not int or not 0 < source["tokens"] < 2**63:
            _bad("source.tokens", "must be a positive integer")
        names = [field.name for field in fields(ClipRanges)]
        entries = {
            module: ClipRanges(**_figures(record, f"activations[{module}]", names))
            for module, record in _mapping(top["activations"], "activations").items()
        }
        kv = {}
        for layer, record in _mapping(top["kv"], "kv").items():
            if not re.fullmatch(r"0|[1-9][0-9]{0,5}", layer):
                _bad(f"kv[{layer}]", "must be the number of a layer")
            key, value = _figures(record, f"kv[{layer}]", _KV).values()
            kv[int(layer)] = (key, value)
        return cls(entries, kv, Source(**source))


def _rounded(figure: float, where: str) -> float:
    if not math.isfinite(figure) or figure < 0:
        _bad(where, f"must be a finite number, 0 or more, got {figure}")
    return float(f"{figure:.6g}")


def _figures(record: Any, where: str, names: Iterable[str]) -> dict[str, float]:
    figures = _record(record, where, list(names))
    for name, figure in figures.items():
        number = type(figure) in (int, float) and 0 <= figure < 1e39  # (NaN compares false)
        if not number:
            _bad(f"{where}.{name}", f"must be a finite number, 0 or more, got {str(figure)[:40]}")
    return {name: float(figures[name]) for name in names}


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        _bad(where, "must be an object with at least one field")
    return value


def _record(value: Any, where: str, names: Iterable[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        _bad(where, "must be an object")
    for name in names:
        if name not in value:
            _bad(f"{where}.{name}", "is missing")
    for name in value:
        if name not in names:
            _bad(f"{where}.{name}", "is unknown")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return result


def _bad(where: str, complaint: str) -> NoReturn:
    raise CheckpointError(
        f"calibration table: {ascii(where)[1:-1][:120]} {complaint}",
        "it is damaged; calibrate the model again",
    )
