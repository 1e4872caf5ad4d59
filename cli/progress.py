"""The progress display of `llmc build`. If stderr is not a terminal, only notes are printed."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from types import TracebackType

from llmc.compiler.progress import Progress


@contextlib.contextmanager
def shown() -> Iterator[Progress]:
    """Yield the progress that fits stderr: a display on a terminal, else notes."""
    if not sys.stderr.isatty():
        yield Notes()
        return
    with Display() as display:
        yield display


class Notes:
    """A Progress that prints notes to stderr and nothing else."""

    def phase(self, name: str) -> None:
        del name

    def bar(self, done: int, total: int) -> None:
        del done, total

    def note(self, text: str) -> None:
        print(f"note: {text}", file=sys.stderr)


class Display:
    """A Progress that draws one line for each phase on stderr: a bar while it runs, then its duration."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self._console = Console(stderr=True, highlight=False)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._bars = Bars(*columns, console=self._console, transient=True)
        self._task = self._bars.add_task("", total=None)
        self._phase: str | None = None
        self._phases = 0
        self._start = 0.0

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        self._end_phase("" if error is None else "  stopped")

    def phase(self, name: str) -> None:
        self._end_phase()
        self._phase, self._start = name, time.perf_counter()
        self._bars.reset(self._task, description=name.ljust(30), total=None)
        self._phases += 1
        # The first phase may download the checkpoint, and huggingface_hub draws bars of its own then.
        if self._phases == 2:
            self._bars.start()

    def bar(self, done: int, total: int) -> None:
        self._bars.update(self._task, completed=done, total=total)

    def note(self, text: str) -> None:
        self._console.print(f"note: {text}", markup=False)

    def _end_phase(self, remark: str = "") -> None:
        if self._phase is not None:
            seconds = time.perf_counter() - self._start
            self._console.print(f"  {self._phase:30}{seconds:8.1f} s{remark}", markup=False)
        self._phase = None
