"""Prepare the standard streams: reopen closed ones, and silence libraries that write to stderr."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator

_restore: list[contextlib.ExitStack] = []


def plug_closed() -> None:
    """Connect closed standard streams to the null device. Daemons may start a process with closed streams.

    Otherwise the next files that are opened get their descriptors. `sys.stdin` stays None if it was closed.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number: this one
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


@contextlib.contextmanager
def libraries_silenced(note: Callable[[str], None]) -> Iterator[None]:
    """Discard warnings, log lines and what native libraries write to stderr. llmc's own lines still appear.

    note: called with the warnings of llmc itself

    Messages of libraries mean nothing to most users and hide those of llmc. `show_libraries` ends this early.
    """
    with contextlib.ExitStack() as stack:
        _restore.append(stack)
        stack.callback(_restore.remove, stack)
        _silence_python(stack, note)
        with contextlib.suppress(OSError, ValueError):  # stderr may have no descriptor
            _silence_native(stack)
        yield


def show_libraries() -> None:
    """Let libraries write to stderr again, until the end of the command."""
    if _restore:
        _restore[-1].close()


def _silence_python(stack: contextlib.ExitStack, note: Callable[[str], None]) -> None:
    import logging
    import warnings

    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    stack.callback(logging.disable, disabled)
    if not sys.warnoptions:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", category=UserWarning, module=r"llmc\.")
        warnings.showwarning = lambda message, *rest: note(str(message))


def _silence_native(stack: contextlib.ExitStack) -> None:
    """Connect descriptor 2 to the null device, and `sys.stderr` to a duplicate of the original descriptor."""
    kept = os.dup(2)
    stack.callback(os.close, kept)
    if sys.stderr.fileno() == 2:
        before = sys.stderr
        before.flush()
        raw = io.FileIO(os.dup(2), "w")  # not `kept`, which is closed: log handlers may keep this stream
        sys.stderr = io.TextIOWrapper(raw, before.encoding, "backslashreplace", write_through=True)
        stack.callback(setattr, sys, "stderr", before)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    stack.callback(os.dup2, kept, 2)
