"""Choose the calibration data of a build: a text, the table of an earlier build, or none."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from llmc.compiler.calibrate.table import CalibrationTable, config_sha256
from llmc.compiler.request import METHODS
from llmc.compiler.texts import read_text
from llmc.passes.quantize.formats import Format
from llmc.runtime.errors import RequestError

Calibration = str | CalibrationTable | None  # a text, the table of an earlier build, or no calibration


def default_text() -> str:
    """Return llmc's calibration text."""
    files = resources.files("llmc.compiler.calibrate").joinpath("text").iterdir()
    texts = [file.read_text(encoding="utf-8") for file in sorted(files, key=lambda file: file.name)]
    return "\n\n".join(text.strip() for text in texts) + "\n"


def read_calibration(
    path: Path | None, fmt: Format | None, kv_cache: bool, method: str, rounding: str = "auto"
) -> Calibration:
    """Read the file given with `--calibration`, or return llmc's text if the build needs calibration.

    path: a table (`.json`) or a text (any other name); None for llmc's text
    fmt: the format of quantized weights, None for unquantized ones
    kv_cache: whether the KV cache needs scales
    method: the calibration method
    rounding: how weights are rounded, one of ROUNDINGS

    Returns None if nothing needs calibration.
    Raises RequestError for a file that cannot be read or has no use, for a table if the format or the
    rounding needs a text, and for a `method` other than the default if the format does not quantize
    activations; CheckpointError for a damaged table.
    """
    activations = kv_cache or bool(fmt and fmt.activations)
    if fmt and not fmt.activations and method != METHODS[0]:
        raise RequestError(
            f"--calibration-method {method} needs activation quantization, which {fmt.name} does not have",
            "leave it out, or choose a format that quantizes activations, such as fp8",
            "calibration_method",
        )
    needs_text = rounding == "gptq" or bool(fmt and fmt.packed and rounding == "auto")
    if path is None:
        return default_text() if activations or needs_text else None
    if fmt and not activations and rounding == "nearest":
        raise RequestError(
            f"{fmt.name} with --rounding nearest has nothing to calibrate",
            "leave --calibration out, or --rounding",
            "calibration",
        )
    if path.suffix != ".json":
        return read_text(path)
    try:
        table = CalibrationTable.from_json(path.read_bytes())
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror or error}", "check the path") from error
    if fmt and fmt.smoothed:
        raise RequestError(
            f"{fmt.name} cannot use a calibration table: smoothing needs the range of every channel",
            "give a text to calibrate on, or leave --calibration out for llmc's text",
            "calibration",
        )
    if rounding == "gptq":
        raise RequestError(
            "--rounding gptq cannot use a calibration table: it needs the inputs of every layer",
            "give a text to calibrate on, or leave --calibration out for llmc's text",
            "calibration",
        )
    if fmt and not activations:
        raise RequestError(
            f"{fmt.name} cannot use a calibration table: it does not quantize activations",
            "give a text to calibrate on, or leave --calibration out",
            "calibration",
        )
    return table


def check_calibration(calibration: Calibration, config: Mapping[str, Any], layers: int) -> None:
    """Check that a calibration table belongs to this model. A text fits every model.

    config: the values of config.json
    layers: the number of layers whose KV cache needs a range

    Raises RequestError for the table of another model, or if the table lacks a layer's KV cache.
    """
    if not isinstance(calibration, CalibrationTable):
        return
    if calibration.source.config_sha256 != config_sha256(config):
        raise RequestError(
            "the calibration table is of another model: its config_sha256 is not that of this config.json",
            "give the table of a build of this checkpoint, or leave --calibration out to measure it",
        )
    if missing := sorted(set(range(layers)) - calibration.kv.keys()):
        raise RequestError(
            f"the calibration table has no range of keys and values for layer {missing[0]}",
            "the table is incomplete; leave --calibration out to measure this checkpoint",
        )
