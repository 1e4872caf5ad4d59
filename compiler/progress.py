"""The interface through which a build reports its progress, and a clock for its phases."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Receives the progress of a build. The methods are called from the thread that builds."""

    def phase(self, name: str) -> None:
        """Begin a new phase; the one before is complete."""

    def bar(self, done: int, total: int) -> None:
        """Report that `done` of `total` units of the current phase are done. The unit is arbitrary."""

    def note(self, text: str) -> None:
        """Tell the user something that needs no action."""


class Silent:
    """A Progress that ignores all reports."""

    def phase(self, name: str) -> None:
        del name

    def bar(self, done: int, total: int) -> None:
        del done, total

    def note(self, text: str) -> None:
        del text


class Clock:
    """Times the phases of a build and reports them to `progress`.

    `seconds` maps each finished phase to its duration, in order.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Report the phase and time the code in the context."""
        self.progress.phase(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
