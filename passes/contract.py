"""The contract of a pass, and the runner that holds every pass to it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import onnx_ir as ir

from llmc.passes import spec
from llmc.runtime.errors import BuildError, UnsupportedError


@dataclass
class Matches:
    """What one pass found: how many places it rewrote, and where it nearly did and why not.

    declined: places that it could have rewritten, and was told not to.
    """

    count: int = 0
    near_misses: list[str] = field(default_factory=list)
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
    """One line of the build report."""

    name: str
    matches: int
    near_misses: tuple[str, ...]
    seconds: float


def run(
    model: ir.Model,
    pipeline: Sequence[Pass],
    expected: Mapping[str, int],
) -> list[PassReport]:
    """Runs `pipeline` over `model` in order and checks every stage.

    `expected`: pass name -> the number of matches that the model's recipe demands.
    Raises UnsupportedError for a model that llmc cannot lower or that differs from its recipe, and BuildError
    when a pass leaves a graph that violates its stage.
    """
    if problems := spec.check(model, spec.Stage.TRACED):
        raise UnsupportedError(
            f"{problems[0]}" + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""),
            "llmc cannot lower this architecture yet; `llmc zoo list` shows the families it knows",
        )
    reports: list[PassReport] = []
    for one in pipeline:
        if problems := spec.check(model, one.requires):
            raise BuildError(
                f"pass {one.name} requires a {one.requires.value} graph: {problems[0]}",
                "the pipeline is in the wrong order; please report this",
            )
        start = time.perf_counter()
        matches = one(model)
        seconds = time.perf_counter() - start
        report = PassReport(one.name, matches.count, tuple(matches.near_misses), seconds)
        reports.append(report)
        want = expected.get(one.name)
        if want is not None and want != matches.count + matches.declined:
            missed = f"; first near miss: {matches.near_misses[0]}" if matches.near_misses else ""
            raise UnsupportedError(
                f"pass {one.name} rewrote {matches.count} of {want} places{missed}",
                "the model differs from its family's recipe; please report it with its config.json",
            )
        violations = spec.check(model, one.ensures)
        if violations:
            raise BuildError(
                f"after pass {one.name} the graph is not {one.ensures.value}: {violations[0]}"
                + (f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""),
                "this architecture uses something llmc cannot lower yet",
            )
    return reports
