"""The charts of `llmc report` that show how accurate each quantized layer is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median
from typing import TYPE_CHECKING

from llmc.cli.html_elements import Html, bars, columns, element, folded, grid, paragraph
from llmc.cli.inspect import module_errors
from llmc.runtime.bundle.quantization_errors import QuantizationErrors

if TYPE_CHECKING:
    from llmc.runtime.bundle.manifest import Manifest
    from llmc.runtime.bundle.reader import Bundle

_MEASURES = {
    "output": "of the output of each linear layer on the calibration text",
    "weight": "of the weight of each linear layer, rounded to nearest",
}
_DIGITS = 9  # the longest number in a module's name that is a place in the model


def layer_charts(bundle: Bundle) -> Iterator[Html]:
    """Yield the charts of all layers; for a bundle of an older build those of the largest errors.

    Raises BundleError if the file with the errors is damaged.
    """
    errors = QuantizationErrors.read(bundle)
    if errors is None:
        yield from _largest(bundle.manifest)
        return
    for what, about in _MEASURES.items():
        if found := getattr(errors, what):
            yield element("h3", f"Error of the layers' {what}s")
            yield from _charts(found, about)


def _charts(errors: Mapping[str, float], about: str) -> Iterator[Html]:
    """Yield a chart for each kind of matrix, all on one scale, and a table of all figures."""
    full = max(errors.values())
    ordered = sorted(errors.items(), key=lambda item: _depth(item[0]))  # else in the order of the graph
    kinds: dict[str, list[tuple[str, float]]] = {}
    for module, error in ordered:
        kinds.setdefault(_kind(module), []).append((module, error))
    charts = {kind: found for kind, found in kinds.items() if len(found) > 1}
    yield paragraph(f"Relative error {about}.")
    if charts:
        place = "The first layer is on the left, the last on the right."
        yield paragraph(f"{place} Every chart has the scale 0 to {full:g}.")
    for kind, found in charts.items():
        worst, largest = max(found, key=lambda item: item[1])
        middle = median(error for _, error in found)
        yield columns(
            kind,
            f"{len(found)} matrices, median {middle:.3g}, largest {largest:g} in {_layer(worst)}",
            [(f"{module}: {error:g}", error) for module, error in found],
            full,
            (_layer(found[0][0]), _layer(found[-1][0])),
        )
    if single := [found[0] for found in kinds.values() if len(found) == 1]:
        yield bars([(module, [error], f"{error:g}") for module, error in single], full)
    rows = [(module, f"{error:g}") for module, error in ordered]
    if charts:
        yield folded(f"All {len(rows)} figures", grid(("layer", "relative error"), rows))


def _depth(module: str) -> tuple[bool, list[int]]:
    """Return a key that sorts modules by the numbers in their names, and those without numbers last."""
    numbers = [int(part) for part in module.split(".") if _is_number(part)]
    return not numbers, numbers


def _kind(module: str) -> str:
    """Return what a module has in common with those of other layers: its name after the layer's number."""
    parts = module.split(".")
    first = next((place for place, part in enumerate(parts) if _is_number(part)), -1)
    return ".".join("*" if _is_number(part) else part for part in parts[first + 1 :]) or module


def _layer(module: str) -> str:
    """Return a module's name up to its last number."""
    parts = module.split(".")
    last = max(place for place, part in enumerate(parts) if _is_number(part))
    return ".".join(parts[: last + 1])


def _is_number(part: str) -> bool:
    return part.isdecimal() and len(part) <= _DIGITS


def _largest(manifest: Manifest) -> Iterator[Html]:
    """Yield the chart of the layers with the largest errors that the manifest records."""
    what, errors = module_errors(manifest)
    if errors:
        yield element("h3", "Layers with the largest error")
        count = (manifest.quantization or {}).get("modules")
        layers = f"the {len(errors)} largest of {count}" if isinstance(count, int) else "the largest"
        yield paragraph(f"Relative error of the {what} of linear layers. The manifest records {layers}.")
        yield bars([(name, [error], f"{error:g}") for name, error in errors], errors[0][1])
