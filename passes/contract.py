"""The contract of a pass, and the runner that checks it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import onnx_ir as ir

from llmc.passes import spec
from llmc.runtime.errors import BuildError, UnsupportedError

DUMP = "LLMC_DUMP"  # environment variable: the directory for the graph after every pass, as text
_DUMPED_ELEMENTS = 64  # constants with more elements are dumped without their data


@dataclass
class Matches:
    """The result of one pass."""

    #: The number of places that the pass rewrote.
    count: int = 0
    #: The places that almost matched, each with the reason.
    near_misses: list[str] = field(default_factory=list)
    #: The number of places that the pass was told to leave.
    declined: int = 0


class Pass(Protocol):
    """A rewrite of the graph in place.

    `requires` and `ensures` name stages of `spec.py`; the runner checks both.
    Running a pass on its own result changes nothing: it returns 0 matches.
    """

    name: str
    requires: spec.Stage
    ensures: spec.Stage

    def __call__(self, model: ir.Model) -> Matches: ...


@dataclass(frozen=True)
class PassReport:
    """The result of one pass, a line of the build report."""

    #: The name of the pass.
    name: str
    #: The number of places that the pass rewrote.
    matches: int
    #: The places that almost matched, each with the reason.
    near_misses: tuple[str, ...]
    #: The time that the pass took, in seconds.
    seconds: float


def run(
    model: ir.Model,
    passes: Sequence[Pass],
    expected: Mapping[str, int] = MappingProxyType({}),
    dump: Path | None = None,
) -> list[PassReport]:
    """Run `passes` over `model` in order and check every stage.

    expected: pass name -> the number of matches that the model's recipe demands.
    dump: a directory for the graph after every pass, as text. The default is LLMC_DUMP, if it is set.
    Raises UnsupportedError for a model that llmc cannot lower or that differs from its recipe, and BuildError
    when a pass leaves a graph that violates its stage.
    """
    if dump is None and os.environ.get(DUMP):
        dump = Path(os.environ[DUMP])
    reports: list[PassReport] = []
    checked: spec.Stage | None = None
    for rewrite in passes:
        if rewrite.requires is not checked:  # else the pass before ensured it
            _require(model, rewrite, first=not reports)
        start = time.perf_counter()
        matches = rewrite(model)
        seconds = time.perf_counter() - start
        if dump is not None:
            _dump(model, dump, rewrite.name)
        reports.append(PassReport(rewrite.name, matches.count, tuple(matches.near_misses), seconds))
        wanted = expected.get(rewrite.name)
        if wanted is not None and wanted != matches.count + matches.declined:
            declined = f" and was told to leave {matches.declined}" if matches.declined else ""
            missed = f"; first near miss: {matches.near_misses[0]}" if matches.near_misses else ""
            raise UnsupportedError(
                f"pass {rewrite.name} rewrote {matches.count} of {wanted} places{declined}{missed}",
                "the model differs from its family's recipe; please report it with its config.json",
            )
        if problems := spec.check(model, rewrite.ensures):
            raise BuildError(
                f"after pass {rewrite.name} the graph is not {rewrite.ensures.value}: {_first(problems)}",
                "its stage does not allow that; please report it with the model's config.json",
            )
        checked = rewrite.ensures
    return reports


def _require(model: ir.Model, rewrite: Pass, *, first: bool) -> None:
    problems = spec.check(model, rewrite.requires)
    if problems and first and rewrite.requires is spec.Stage.TRACED:
        raise UnsupportedError(
            _first(problems),
            "llmc cannot lower this architecture yet; `llmc zoo list` shows the families it knows",
        )
    if problems:
        raise BuildError(
            f"pass {rewrite.name} requires a {rewrite.requires.value} graph: {problems[0]}",
            "the pipeline is in the wrong order; please report this",
        )


def _first(problems: Sequence[str]) -> str:
    return problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


def _dump(model: ir.Model, directory: Path, name: str) -> None:
    """Write the graph to the next numbered text file in `directory`, without the data of large constants."""
    directory.mkdir(parents=True, exist_ok=True)
    number = 1 + sum(1 for file in directory.iterdir() if file.suffix == ".txt")
    (directory / f"{number:02}-{name}.txt").write_text(as_text(model), "utf-8")


def as_text(model: ir.Model) -> str:
    """Return the graph in ONNX's text format, without the data of large initializers."""
    large = {
        value: value.const_value
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.size > _DUMPED_ELEMENTS
    }
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # onnx_ir logs a warning for every initializer without data
    try:
        for value in large:  # change the graph itself: a graph with nodes out of order cannot be cloned
            value.const_value = None
        return ir.to_onnx_text(model)
    finally:
        for value, data in large.items():
            value.const_value = data
        logging.disable(level)
