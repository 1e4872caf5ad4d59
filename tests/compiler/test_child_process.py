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

from llmc.compiler.child_process import RUN_MODULE, Child
from llmc.compiler.progress import Progress, Silent
from llmc.runtime.errors import BuildError, UnsupportedError
from llmc.runtime.memory import private_memory

VERIFICATION = Child("llmc.compiler.verify.child", "verification", "use more")
TASK = {"measure": {"no such": "field"}}  # not a task: the child fails with a traceback

Make = Callable[..., Child]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """The body of a handler, and of what it does before its task -> a child that runs it."""

    def child(body: str, platform: str = sys.platform, prepare: str = "pass") -> Child:
        (tmp_path / "child_of_test.py").write_text(
            "import os, signal, sys, time\n"
            "from llmc.compiler.child_process import serve\n"
            "from llmc.runtime.errors import *\n"
            f"def handle(task, messages):\n    {body}\n"
            f"seen = []\ndef prepare(data):\n    {prepare}\n"
            f"sys.platform = {platform!r}\n"
            "serve(handle, prepare)\n"
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


def test_a_child_may_prepare_before_its_task_is_known(make: Make) -> None:
    child = make("return {'seen': seen, 'x': task['x']}", prepare="seen.append(data)")
    with child.start() as started:
        started.prepare({})
        started.prepare({"y": "é\n"})
        assert started.run({"x": 1}, Silent()) == {"seen": [{}, {"y": "é\n"}], "x": 1}
    assert not alive(started.pid)


def test_a_child_without_a_task_ends_with_its_context(make: Make) -> None:
    with make("return {}").start() as started:
        assert alive(started.pid)
        assert private_memory(started.pid) >= 0
    assert not alive(started.pid)
    assert private_memory(started.pid) == 0


@pytest.mark.parametrize("prepare", ["os.abort()", "raise ImportError('no torch')"])
def test_a_child_that_dies_before_its_task_is_an_error(make: Make, prepare: str) -> None:
    with make("return {}", prepare=prepare).start() as started:
        started.prepare({})
        started.process.wait()
        with pytest.raises(BuildError, match=r"no torch|killed by signal 6"):
            started.run({"much": "x" * 1_000_000}, Silent())


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


@pytest.mark.parametrize("end", ["os.abort()", "time.sleep(600)"])
def test_nobody_waits_for_a_process_that_has_sent_its_result(make: Make, end: str) -> None:
    """Libraries may crash, or free memory for seconds, when a process ends."""
    with make(f"import time; messages.send(result={{'x': 1}}); {end}").start() as started:
        assert started.run({}, Silent()) == {"x": 1}
    assert not alive(started.pid)


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


def test_the_working_directory_comes_off_the_path_where_python_has_no_safe_path(tmp_path: Path) -> None:
    (tmp_path / "runpy.py").write_text("raise SystemExit('the trap')")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, "-c", RUN_MODULE, "llmc.compiler.verify.child"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, input="{}\n", capture_output=True, text=True
    )
    assert "the parent process is gone" in done.stderr


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_a_child_dies_with_its_parent(make: Make, platform: str, waits: bool) -> None:
    """In two ways: Linux kills it, elsewhere it waits for the end of stdin. waits: for its task"""
    make("messages.note(str(os.getpid())); time.sleep(600)", platform)
    run = "with child.start() as started:\n    print(started.pid, flush=True); time.sleep(600)\n"
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import time\n"
            "from llmc.compiler.child_process import Child\n"
            "from llmc.compiler.progress import Silent\n"
            "class Tell(Silent):\n"
            "    def note(self, text): print(text, flush=True)\n"
            "child = Child('child_of_test', 'test', '')\n" + (run if waits else "child.run({}, Tell())\n"),
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
