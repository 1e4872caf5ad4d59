"""Progress of a build, as the command line draws it. Tests and libraries need not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Called from the thread that builds."""

    def phase(self, name: str) -> None:
        """Begin a new phase; the one before is complete."""

    def bar(self, done: int, total: int) -> None:
        """Report how far the current phase is, in any unit."""

    def note(self, text: str) -> None:
        """Tell the user something that needs no action."""


class Silent:
    """Says nothing."""

    def phase(self, name: str) -> None:
        del name

    def bar(self, done: int, total: int) -> None:
        del done, total

    def note(self, text: str) -> None:
        del text


class Clock:
    """Times the phases of a build and announces them. `seconds`: phase -> duration, in order."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.progress.phase(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
