"""Show the progress of a command on stderr: bars on a terminal, else a line for each phase.

With --log-level `warning` only notes are shown, with `info` also phases, with `debug` also their durations.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType

from llmc.cli import output
from llmc.compiler.progress import Progress

_FIRST, _EVERY = 10.0, 30.0  # seconds until the first line about a running phase, and between later lines


@contextlib.contextmanager
def shown(title: str = "") -> Iterator[Progress]:
    """Yield a Progress that suits stderr and --log-level.

    title: the line that is printed first, before heavy imports
    """
    if not output.allows("info"):
        yield Notes()
    elif sys.stderr.isatty():
        if title:
            print(title, file=sys.stderr, flush=True)
        with Display() as display:
            yield display
    else:
        with Lines(title) as lines:
            yield lines


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """On a terminal, show `what` while the block runs. Elsewhere show nothing."""
    if not (sys.stderr.isatty() and output.allows("info")):
        yield
        return
    print(what, end="\r", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(" " * len(what), end="\r", file=sys.stderr, flush=True)


def remaining(done: int, total: int, seconds: float) -> str:
    """Estimate the remaining time of a phase, as text: ", about 40 s left"; "" if it cannot be estimated.

    seconds: the time that `done` of `total` units took
    """
    if not 0 < done < total:
        return ""
    left = seconds / done * (total - done)
    return f", about {left:.0f} s left" if left < 90 else f", about {left / 60:.0f} min left"


class Notes:
    """A Progress that prints notes to stderr and nothing else."""

    def phase(self, name: str) -> None:
        del name

    def bar(self, done: int, total: int) -> None:
        del done, total

    def note(self, text: str) -> None:
        output.note(text)


class Lines:
    """A Progress that prints a line when a phase begins, and further lines at intervals while it runs.

    A thread prints them, because a phase may run for minutes without a report, and CI systems stop a job that
    prints nothing.
    """

    def __init__(self, title: str = "", first: float = _FIRST, every: float = _EVERY) -> None:
        self._begin = self._start = time.perf_counter()
        self._first, self._every = first, every
        self._phase, self._done, self._total = "", 0, 0
        self._changed, self._ended = threading.Condition(), False
        self._thread = threading.Thread(target=self._tell, daemon=True)
        if title:
            self._print(title)

    def __enter__(self) -> Lines:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._end_phase()
            self._ended = True
            self._changed.notify()
        self._thread.join()

    def phase(self, name: str) -> None:
        with self._changed:
            self._end_phase()
            self._phase, self._done, self._total = name, 0, 0
            self._start = time.perf_counter()
            self._print(name)
            self._changed.notify()

    def bar(self, done: int, total: int) -> None:
        self._done, self._total = done, total

    def note(self, text: str) -> None:
        output.note(text)

    def _end_phase(self) -> None:
        if self._phase and output.allows("debug"):
            self._print(f"{self._phase}: done in {time.perf_counter() - self._start:.1f} s")

    def _tell(self) -> None:
        """Print a line about the phase whenever it has lasted for another interval."""
        with self._changed:
            phase, wait = "", self._first
            while not self._ended:
                changed = self._changed.wait(wait)
                if changed or self._phase != phase:
                    phase, wait = self._phase, self._first
                else:
                    self._print(f"{phase}: {self._state()}")
                    wait = self._every

    def _state(self) -> str:
        if not self._done:
            return "still running"
        share = 100 * self._done // self._total
        return f"{share} %{remaining(self._done, self._total, time.perf_counter() - self._start)}"

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # if stderr is closed, the build continues
            print(f"[{time.perf_counter() - self._begin:6.1f} s] {text}", file=sys.stderr, flush=True)


class Display:
    """A Progress that draws one line for each phase on stderr: a bar while it runs, then its duration."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self._console = Console(stderr=True, highlight=False)
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._bars = Bars(*columns, console=self._console, transient=True)
        self._task = self._bars.add_task("", total=None, left="")
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
        self._bars.reset(self._task, description=name.ljust(30), total=None, left="")
        self._phases += 1
        # The first phase may download the checkpoint, and huggingface_hub draws bars of its own then.
        if self._phases == 2:
            self._bars.start()

    def bar(self, done: int, total: int) -> None:
        left = remaining(done, total, time.perf_counter() - self._start)
        self._bars.update(self._task, completed=done, total=total, left=left.removeprefix(", "))

    def note(self, text: str) -> None:
        self._console.print(f"note: {text}", markup=False)

    def _end_phase(self, remark: str = "") -> None:
        if self._phase is not None:
            seconds = time.perf_counter() - self._start
            self._console.print(f"  {self._phase:30}{seconds:8.1f} s{remark}", markup=False)
        self._phase = None
