"""The step of a build that makes the codes and scales of quantized matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmc.compiler.checkpoint.safetensors import TensorRef
from llmc.compiler.quantize import produce
from llmc.compiler.quantize.prequantized_arrays import produce_prequantized
from llmc.compiler.quantize.produce import Produced
from llmc.passes.quantize.qdq import SCALES_OF
from llmc.runtime.bundle import quantization_errors
from llmc.runtime.bundle.quantization_errors import QuantizationErrors

if TYPE_CHECKING:
    from llmc.compiler.bundle_writer import BundleWriter
    from llmc.compiler.calibrate.cache import CalibrationCache
    from llmc.compiler.calibrate.run_layers import LayerInputs
    from llmc.compiler.calibrate.table import CalibrationTable, Source
    from llmc.compiler.quantize.prequantized_form import PrequantizedModule
    from llmc.passes.quantize.matrix import QuantizedMatrix
    from llmc.passes.quantize.plan import QuantPlan

TABLE_FILE = "calibration.json"  # in the bundle; --calibration of another build accepts it
_SCRATCH = "scratch"
_WORST = 5  # modules with the largest error that the manifest lists
OnMatrix = Callable[[int], None]


class Maker(Protocol):
    """Makes the codes and scales of quantized matrices."""

    def make(self, matrices: Sequence[QuantizedMatrix], directory: Path, on_matrix: OnMatrix) -> Produced:
        """Write the arrays to files in `directory`. on_matrix: called with the number of matrices done."""
        ...


@dataclass(frozen=True)
class RoundToNearest:
    """Rounds the weights to nearest. The clip ranges of activations come from `table`, if there is one."""

    #: The checkpoint's tensors, by name.
    tensors: Mapping[str, TensorRef]
    #: The calibration table of an earlier build.
    table: CalibrationTable | None = None

    def make(self, matrices: Sequence[QuantizedMatrix], directory: Path, on_matrix: OnMatrix) -> Produced:
        produced = produce.produce(matrices, self.tensors, directory, on_matrix)
        produced.table = self.table
        return produced


@dataclass(frozen=True)
class Calibrated:
    """Quantizes the weights and activations with the inputs of the layers on a calibration text."""

    tensors: Mapping[str, TensorRef]
    layer_inputs: Iterable[LayerInputs]
    source: Source
    #: The calibration method, "max", "percentile" or "mse".
    method: str
    #: Whether weights are rounded by GPTQ; if not, to nearest.
    gptq: bool
    cache: CalibrationCache
    #: Tells the user something.
    note: Callable[[str], None]

    def make(self, matrices: Sequence[QuantizedMatrix], directory: Path, on_matrix: OnMatrix) -> Produced:
        from llmc.compiler.calibrate.statistics import ahead, measure
        from llmc.compiler.quantize.produce_calibrated import MOST_COLUMNS, produce_calibrated

        most_columns = MOST_COLUMNS if self.gptq else 0
        smoothed = {matrix.modules for matrix in matrices if matrix.format.smoothed}
        rounded = {
            matrix.modules: matrix.columns
            for matrix in matrices
            if matrix.columns <= most_columns and not matrix.format.smoothed
        }
        statistics = None if smoothed else self.cache.load(rounded)
        if statistics is not None:
            self.note("calibrated by an earlier build of this checkpoint")
        else:
            measured = measure(self.layer_inputs, rounded.__contains__, smoothed.__contains__)
            statistics = ahead(measured if smoothed else self.cache.keep(measured))
        return produce_calibrated(
            matrices, self.tensors, statistics, self.source, directory, self.method, most_columns, on_matrix
        )


@dataclass(frozen=True)
class Prequantized:
    """Copies the codes and scales of a pre-quantized checkpoint."""

    modules: Mapping[str, PrequantizedModule]

    def make(self, matrices: Sequence[QuantizedMatrix], directory: Path, on_matrix: OnMatrix) -> Produced:
        return produce_prequantized(matrices, self.modules, directory, on_matrix)


def make_weights(
    maker: Maker,
    matrices: Sequence[QuantizedMatrix],
    dtype: str,
    method: str,
    work: BundleWriter,
    on_matrix: OnMatrix,
) -> Produced:
    """Make the arrays of `matrices` in scratch files of `work`, which `discard` removes.

    dtype: the engine's compute dtype
    method: the calibration method, "max", "percentile" or "mse"
    on_matrix: called with the number of matrices that are done

    The bundle keeps the errors of all matrices, and TABLE_FILE if activations were measured.
    """
    directory = work.path(f"{_SCRATCH}/x").parent
    produced = maker.make(matrices, directory, on_matrix)
    if produced.table is not None:
        work.path(TABLE_FILE).write_text(produced.table.to_json(), "utf-8")
        produce.add_input_scales(produced, matrices, method, SCALES_OF.get(dtype, "F32"), directory)
    if produced.errors or produced.weight_errors:
        modules = [module for matrix in matrices for module in matrix.modules]
        output, weight = (
            {module: errors[module] for module in modules if module in errors}
            for errors in (produced.errors, produced.weight_errors)
        )
        text = QuantizationErrors(output, weight).to_json()
        work.path(quantization_errors.FILE).write_text(text, "utf-8")
    return produced


def discard(work: BundleWriter) -> None:
    """Remove the scratch files of `make_weights`."""
    directory = work.path(f"{_SCRATCH}/x").parent
    for file in sorted(directory.iterdir()):
        work.discard(f"{_SCRATCH}/{file.name}")
    if directory.exists():
        directory.rmdir()


def record(
    plan: QuantPlan | None, matrices: Sequence[QuantizedMatrix], made: Produced, method: str
) -> Mapping[str, Any] | None:
    """Return the manifest's record: a summary of the plan, the calibration and the least accurate modules.

    Returns None without a plan.
    """
    if plan is None:
        return None
    fields = plan.record()
    if made.table is not None:
        source = made.table.source
        fields["calibration"] = {"text_sha256": source.text_sha256, "tokens": source.tokens}
        if any(matrix.format.activations for matrix in matrices):
            fields["calibration"]["method"] = method
    for name, errors in (("output", made.errors), ("weight", made.weight_errors)):
        if errors:
            worst = sorted(errors.items(), key=lambda item: (-item[1], item[0]))[:_WORST]
            fields[f"largest_{name}_errors"] = {module: float(f"{error:.2g}") for module, error in worst}
    return fields
