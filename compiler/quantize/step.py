"""The step of a build that makes codes and scales: which way, from what, and what the record says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.compiler.calibrate.sequences import read_text, sequences
from llmc.compiler.calibrate.table import CalibrationTable, Source, config_sha256
from llmc.compiler.progress import Progress
from llmc.compiler.quantize import produce
from llmc.compiler.quantize.prequantized_arrays import produce_prequantized
from llmc.compiler.quantize.produce import Produced
from llmc.compiler.request import METHODS
from llmc.passes.quantize import quantize_kv_cache
from llmc.passes.quantize.formats import Format
from llmc.passes.quantize.qdq import SCALES_OF
from llmc.runtime.errors import RequestError

if TYPE_CHECKING:
    from llmc.compiler.bundle_writer import BundleWriter
    from llmc.compiler.driver import Plan

TABLE_FILE = "calibration.json"  # in the bundle: what was measured, to be kept, reviewed and passed back
_SCRATCH = "scratch"
_WORST = 5

Calibration = str | CalibrationTable | None  # a text, what an earlier build measured on one, or nothing


def read_calibration(path: Path | None, fmt: Format | None, kv_cache: bool, method: str) -> Calibration:
    """What `--calibration` names, or llmc's own text where `fmt` or an FP8 cache (`kv_cache`) needs one.

    Raises RequestError for a file that cannot be read, for a table where inputs must be seen, and for a
    `method` other than the default where no activations are rounded.
    """
    activations = kv_cache or bool(fmt and fmt.activations)
    if fmt and not fmt.activations and method != METHODS[0]:
        raise RequestError(
            f"--calibration-method {method} is about activations, and {fmt.name} does not round them",
            "leave it out, or choose a format that rounds them, such as fp8",
        )
    if path is None:
        return read_text(None) if activations or (fmt and fmt.packed) else None
    if path.suffix != ".json":
        return read_text(path)
    try:
        table = CalibrationTable.from_json(path.read_bytes())
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror or error}", "check the path") from error
    if fmt and fmt.smoothed:
        raise RequestError(
            f"{fmt.name} takes nothing from a table of ranges: smoothing needs the range of every channel",
            "give a text to calibrate on, or leave --calibration out for llmc's own",
        )
    if fmt and not activations:
        raise RequestError(
            f"{fmt.name} takes nothing from a table of ranges: its activations are not rounded",
            "give a text to calibrate on, or leave --calibration out",
        )
    return table


def check_calibration(calibration: Calibration, config: Mapping[str, Any], layers: int) -> None:
    """Raises RequestError for a table of another model than that of `config` (config.json), or one without
    the ranges of the caches of `layers` layers."""
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
            "it is not complete; leave --calibration out to measure this checkpoint",
        )


def quantize(
    plan: Plan,
    writer: BundleWriter,
    progress: Progress,
    phase: Callable[[str], AbstractContextManager[None]],
) -> Produced:
    """Makes the data of the plan's matrices in files of `writer` that `discard` removes again, and gives an
    FP8 cache its scales. A calibrated build leaves its table in the bundle."""
    if not plan.matrices and plan.calibration is None and plan.stored is None:
        return Produced()
    directory = writer.path(f"{_SCRATCH}/x").parent

    def on_matrix(done: int) -> None:
        progress.bar(done, len(plan.matrices))

    given, tensors = plan.calibration, dict(plan.checkpoint.tensors)
    tensors |= {name: tensors[own] for name, own in plan.tied.items() if own in tensors}
    if plan.stored:
        with phase("copy the quantized weights"):
            made = produce_prequantized(plan.matrices, plan.stored.modules, directory, on_matrix)
            if plan.kv_dtype == quantize_kv_cache.FP8:
                quantize_kv_cache.set_kv_scales(plan.model, plan.stored.largest_kv)
    elif not isinstance(given, str):
        with phase("quantize"):
            made = produce.produce(plan.matrices, tensors, directory, on_matrix)
            made.table = given
    else:
        from llmc.compiler.calibrate.run_layers import layers
        from llmc.compiler.quantize.produce_calibrated import produce_calibrated

        with phase("trace for calibration"):
            graph = plan.unquantized()
        with phase("calibrate and quantize"):
            vocabulary, tokenizer = plan.geometry.vocab_size, plan.checkpoint.tokenizer
            own_text = plan.request.calibration is None
            ids = sequences(given, tokenizer, vocabulary, plan.max_seq_len, all_parts=not own_text)
            source = Source.of(given if tokenizer else "", ids, plan.checkpoint.config)
            found = layers(graph, tensors, ids)
            method = plan.request.calibration_method
            made = produce_calibrated(plan.matrices, tensors, found, source, directory, method, on_matrix)
    if made.table is not None:
        writer.path(TABLE_FILE).write_text(made.table.to_json(), "utf-8")
        method, dtype = plan.request.calibration_method, SCALES_OF.get(plan.dtype, "F32")
        produce.add_input_scales(made, plan.matrices, method, dtype, directory)
        if plan.kv_dtype == quantize_kv_cache.FP8:
            quantize_kv_cache.set_kv_scales(plan.model, made.table.kv)
    return made


def discard(writer: BundleWriter) -> None:
    """Removes what `quantize` made, once it has been copied."""
    directory = writer.path(f"{_SCRATCH}/x").parent
    for file in sorted(directory.iterdir()):
        writer.discard(f"{_SCRATCH}/{file.name}")
    if directory.exists():
        directory.rmdir()


def record(plan: Plan, made: Produced) -> Mapping[str, Any] | None:
    """What the manifest says: the plan in short, what was measured on, and the least accurate modules."""
    if plan.quantization is None:
        return None
    found = plan.quantization.record()
    if made.table is not None:
        source = made.table.source
        found["calibration"] = {"text_sha256": source.text_sha256, "tokens": source.tokens}
        if any(matrix.format.activations for matrix in plan.matrices):
            found["calibration"]["method"] = plan.request.calibration_method
    for name, errors in (("output", made.errors), ("weight", made.weight_errors)):
        if errors:
            worst = sorted(errors.items(), key=lambda item: (-item[1], item[0]))[:_WORST]
            found[f"largest_{name}_errors"] = {module: float(f"{error:.2g}") for module, error in worst}
    return found
