"""Child processes: what they may print and import, and what becomes of their errors, deaths and parents."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llmc.compiler.child_process import Child
from llmc.compiler.progress import Progress, Silent
from llmc.runtime.errors import BuildError, UnsupportedError

VERIFICATION = Child("llmc.compiler.verify.child", "verification", "use more")
TASK = {"measure": {"no such": "field"}}  # not a task: the child fails with a traceback

Make = Callable[[str], Child]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """The body of a handler -> a child that runs it."""

    def child(body: str) -> Child:
        (tmp_path / "child_of_test.py").write_text(
            "import os, signal, sys, time\n"
            "from llmc.compiler.child_process import serve\n"
            "from llmc.runtime.errors import *\n"
            f"def handle(task, messages):\n    {body}\n"
            "serve(handle)\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
        return Child("child_of_test", "test", "use more", "ask its author")

    return child


class Heard(Silent):
    def __init__(self) -> None:
        self.all: list[object] = []

    def bar(self, done: int, total: int) -> None:
        self.all.append((done, total))

    def note(self, text: str) -> None:
        self.all.append(text)


def test_a_task_goes_in_and_progress_notes_and_a_result_come_out(make: Make) -> None:
    heard: Progress = Heard()
    child = make("messages.bar(1, 2); messages.note('half'); return {'twice': 2 * task['x']}")
    assert child.run({"x": "é\n"}, heard) == {"twice": "é\né\n"}
    assert heard.all == [(1, 2), "half"]


def test_an_error_keeps_its_kind_and_hint(make: Make) -> None:
    with pytest.raises(UnsupportedError, match="no such GPU") as error:
        make("raise UnsupportedError('no such GPU', 'leave it out')").run({}, Silent())
    assert error.value.hint == "leave it out"


def test_another_exception_is_told_by_its_last_line(make: Make) -> None:
    with pytest.raises(BuildError, match="the test process failed with exit code 1: ValueError: wrong"):
        make("raise ValueError('wrong')").run({}, Silent())


@pytest.mark.parametrize("error", ["MemoryError", "RuntimeError('std::bad_alloc')"])
def test_a_lack_of_memory_is_called_that(make: Make, error: str) -> None:
    with pytest.raises(BuildError, match="the test process ran out of memory: ") as caught:
        make(f"raise {error}").run({}, Silent())
    assert caught.value.hint == "use more"


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("SIGKILL", r"killed by signal 9 \(Killed\): last words", "it may have run out of memory; use more"),
        ("SIGABRT", r"killed by signal 6 \(Aborted\): last words", "ask its author"),
    ],
)
def test_a_signal_is_named_with_a_hint(make: Make, name: str, message: str, hint: str) -> None:
    child = make(f"print('last words', file=sys.stderr, flush=True); os.kill(os.getpid(), signal.{name})")
    with pytest.raises(BuildError, match=message) as error:
        child.run({}, Silent())
    assert error.value.hint == hint


def test_a_result_does_not_count_if_the_process_then_crashes(make: Make) -> None:
    child = make("messages.send(result={}); os.abort()")
    with pytest.raises(BuildError, match="killed by signal 6"):
        child.run({}, Silent())


def test_a_child_that_dies_before_it_reads_its_task() -> None:
    child = Child("llmc.no_such_module", "test", "")
    with pytest.raises(BuildError, match=r"exit code 1: .*No module named llmc\.no_such_module"):
        child.run({"much": "x" * 1_000_000}, Silent())


def test_a_child_that_says_much_on_stderr_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python lists every import there, more than a pipe holds."""
    monkeypatch.setenv("PYTHONVERBOSE", "1")
    with pytest.raises(BuildError, match="the verification process failed with exit code 1"):
        VERIFICATION.run(TASK, Silent())


def test_what_libraries_print_is_no_message(make: Make) -> None:
    """oneDNN and others can be asked to print to stdout, past Python."""
    child = make("os.write(1, b'{\"result\": 0}\\n'); print('{\"result\": 1}'); return {'x': 2}")
    assert child.run({}, Silent()) == {"x": 2}


def test_what_python_prints_while_it_starts_is_no_message(make: Make, tmp_path: Path) -> None:
    child = make("return {'x': 2}")
    (tmp_path / "sitecustomize.py").write_text("print('hello')\nprint([1])\n")
    assert child.run({}, Silent()) == {"x": 2}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no PYTHONSAFEPATH")
@pytest.mark.parametrize("path", [None, "", ":", "{elsewhere}:"])
def test_nothing_is_imported_from_the_working_directory(
    path: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if PYTHONPATH has an empty entry, which means that directory."""
    trap = tmp_path / "trap"
    trap.mkdir()
    for name in ("numpy", "json", "dataclasses", "openvino"):
        (trap / f"{name}.py").write_text("raise SystemExit('the trap')")
    installed = os.environ.get("PYTHONPATH")
    if path is not None:
        monkeypatch.setenv("PYTHONPATH", path.format(elsewhere=tmp_path) + (installed or ""))
    monkeypatch.chdir(trap)
    with pytest.raises(BuildError) as error:
        VERIFICATION.run(TASK, Silent())
    assert "unexpected keyword argument 'no such'" in error.value.message


@pytest.mark.skipif(sys.platform != "linux", reason="the child dies with its parent on Linux only")
def test_a_child_dies_with_its_parent(make: Make) -> None:
    make("messages.note(str(os.getpid())); time.sleep(600)")
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from llmc.compiler.child_process import Child\n"
            "from llmc.compiler.progress import Silent\n"
            "class Tell(Silent):\n"
            "    def note(self, text): print(text, flush=True)\n"
            "Child('child_of_test', 'test', '').run({}, Tell())\n",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 20
    while alive(child) and time.monotonic() < end:
        time.sleep(0.02)
    assert not alive(child)


def test_a_child_whose_parent_is_gone_before_it_starts_does_nothing(make: Make) -> None:
    make("print('worked', file=sys.stderr); return {}")
    ran = subprocess.run(
        [sys.executable, "-m", "child_of_test"], input="{}\n", capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "the parent process is gone\n"


def alive(process: int) -> bool:
    """A zombie, which waits for a parent to ask for its exit code, is dead."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
