"""Standard streams: closed ones, lines of libraries on stderr, and a lack of memory."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmc.cli import errors, main, output, streams
from support.waiting import LONG


@pytest.fixture
def tiny(bundle: Callable[[str], Path]) -> Path:
    return bundle("llama-tiny")


@pytest.mark.parametrize(
    ("closed", "prompt", "code", "error"),
    [
        (">&-", "Once", errors.OK, ""),
        ("<&-", "-", errors.ERROR, "error: stdin is closed\n"),
        ("2>&-", "Once", errors.OK, ""),
        ("<&- >&- 2>&-", "Once", errors.OK, ""),
    ],
)
def test_closed_standard_streams(tiny: Path, closed: str, prompt: str, code: int, error: str) -> None:
    """As cron and some supervisors leave them."""
    command = f'"$1" -m llmc run "$2" {prompt} --max-tokens 2 {closed}'
    done = subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, str(tiny)], capture_output=True, text=True, timeout=LONG
    )
    assert done.returncode == code
    assert done.stderr.startswith(error)
    assert ("2>&-" in closed or done.stderr == "") == (code == errors.OK)
    assert (done.stdout != "") == (closed == "2>&-")


def test_a_file_does_not_get_the_number_of_a_closed_stream() -> None:
    code = "import os; from llmc.cli import streams; streams.plug_closed(); print(os.open(os.devnull, 0) > 2)"
    command = ["sh", "-c", '"$1" -c "$2" <&- 2>&-', "sh", sys.executable, code]
    assert subprocess.run(command, capture_output=True, text=True, timeout=LONG).stdout == "True\n"


NOISE = """
import logging, os, sys, warnings
from llmc.cli import app, main, output, streams
def command(argv):
    if argv[1:]:
        streams.show_libraries()
    os.write(2, b"native\\n")
    logging.getLogger("torch").warning("logged")
    warnings.warn("warned")
    print("ours", file=sys.stderr)
    return 0
app.invoke = command
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("verbose", "shown"), [(False, set()), (True, {"native", "logged"})])
def test_lines_of_libraries_are_for_verbose_only(verbose: bool, shown: set[str]) -> None:
    command = [sys.executable, "-c", NOISE, "x", *(["-v"] if verbose else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0
    lines = set(done.stderr.splitlines())
    assert shown | {"ours"} <= lines
    assert verbose or lines == {"ours"}


def test_silence_ends_with_the_command(capfd: pytest.CaptureFixture[str]) -> None:
    before = sys.stderr
    with streams.libraries_silenced(output.note):
        os.write(2, b"native\n")
    os.write(2, b"after\n")
    assert sys.stderr is before
    assert capfd.readouterr().err == "after\n"


def test_warnings_of_our_own_are_notes(capsys: pytest.CaptureFixture[str]) -> None:
    output.start("test", False)
    scope = {"__name__": "llmc.runtime.somewhere"}
    with streams.libraries_silenced(output.note):
        exec("import warnings; warnings.warn('slow path')", scope)
    assert capsys.readouterr().err == "note: slow path\n"


@contextlib.contextmanager
def _error_of(cause: Exception) -> Iterator[None]:
    from llmc.runtime.errors import BackendError

    try:
        raise cause
    except Exception as error:
        raise BackendError("cannot load rank0.onnx") from error
    yield


def test_a_lack_of_memory_is_found_behind_an_error_of_ours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmc.cli import app

    def fails(argv: object) -> int:
        with _error_of(RuntimeError("std::bad_alloc")):
            return 0

    monkeypatch.setattr(app, "invoke", fails)
    assert main.main(["run"]) == errors.ERROR
    assert capsys.readouterr().err.splitlines()[0] == "error: out of memory"
