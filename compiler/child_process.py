"""A child process that takes one task and answers in JSON lines: verification and TensorRT builds.

A process of its own gives its memory back when it ends, and its crash is an error message here.

stdin, one line     the task
stdout, JSON lines  {"progress": [done, total]}, {"note": text}, and at the end either {"result": {...}} or
                    {"error": {"kind", "message", "hint"}}
stderr              anything; its last line is quoted when the child dies
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from llmc.compiler.progress import Progress
from llmc.runtime import errors
from llmc.runtime.errors import BuildError, LlmcError
from llmc.runtime.out_of_memory import says_out_of_memory

_PR_SET_PDEATHSIG = 1  # prctl(2)
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Child:
    """A child process and the hints for its failures.

    module: the Python module to run; it calls `serve`
    name: what messages call the process, as in "the TensorRT process"
    out_of_memory: the rest of the hint after SIGKILL, which "it may have run out of memory" begins
    crashed: the hint after any other signal
    """

    module: str
    name: str
    out_of_memory: str
    crashed: str = "please report this"

    def run(
        self,
        task: Mapping[str, Any],
        progress: Progress,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> dict[str, Any]:
        """Run the child on `task` and return its result.

        environment: variables of the child, those of this process by default
        directory: its working directory

        Raises the LlmcError that the child reports, and BuildError if it dies.
        """
        answer: dict[str, Any] = {}
        variables = _variables(os.environ | _ENVIRONMENT if environment is None else environment)
        with tempfile.TemporaryFile("w+", errors="replace") as stderr:  # an unread pipe would fill up
            child = subprocess.Popen(
                [sys.executable, "-m", self.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=variables,
                cwd=directory,
            )
            assert child.stdin and child.stdout
            try:
                with contextlib.suppress(BrokenPipeError):  # a child that died has written why to stderr
                    child.stdin.write(json.dumps(task) + "\n")
                    child.stdin.flush()
                for line in child.stdout:
                    answer |= _receive(line, progress)
                code = child.wait()
            finally:
                child.kill()
                child.wait()
                child.stdout.close()
                with contextlib.suppress(BrokenPipeError):
                    child.stdin.close()  # not before: its end tells the child that this process is gone
            stderr.seek(0)
            last = stderr.read().strip().rpartition("\n")[2] or "no message"
        if "error" in answer:
            raise _error(**answer["error"])
        if code != 0 or "result" not in answer:
            raise self._death(code, last)
        return answer["result"]

    def _death(self, code: int, last: str) -> BuildError:
        who = f"the {self.name} process"
        if code >= 0:
            if says_out_of_memory(last):
                return BuildError(f"{who} ran out of memory: {last}", self.out_of_memory)
            return BuildError(f"{who} failed with exit code {code}: {last}", "please report this")
        memory = f"it may have run out of memory; {self.out_of_memory}"
        return BuildError(
            f"{who} was killed by signal {-code} ({signal.strsignal(-code)}): {last}",
            memory if -code == signal.SIGKILL else self.crashed,
        )


class Messages:
    """The child's end of the pipe. Every method may be called from any thread.

    Each raises BrokenPipeError once the parent is gone.
    """

    def __init__(self, file: TextIO) -> None:
        self._file, self._lock = file, threading.Lock()

    def bar(self, done: int, total: int) -> None:
        """Report how far the task is, in any unit."""
        self.send(progress=[done, total])

    def note(self, text: str) -> None:
        """Report something that the user should know."""
        self.send(note=text)

    def send(self, **message: Any) -> None:
        """Send one line of the protocol."""
        with self._lock:
            self._file.write(json.dumps(message) + "\n")
            self._file.flush()


def serve(handler: Callable[[dict[str, Any], Messages], Mapping[str, Any]]) -> None:
    """Run `handler` on the task from stdin and send its result: the main function of a child process.

    An LlmcError becomes an error message. Any other exception ends the process with a traceback on stderr.
    """
    messages = Messages(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)  # stdout is for messages alone: what libraries print goes to stderr
    task = json.loads(sys.stdin.readline())
    _die_with_parent()
    try:
        messages.send(result=handler(task, messages))
    except LlmcError as error:
        messages.send(error={"kind": type(error).__name__, "message": error.message, "hint": error.hint})


def _die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, even by SIGKILL. Linux only."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if select.select([sys.stdin], [], [], 0)[0]:  # only the end of stdin can follow the task
        sys.exit("the parent process is gone")


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment`, in which Python imports nothing from the working directory (from Python 3.11 on)."""
    variables = dict(environment) | {"PYTHONSAFEPATH": "1"}
    paths = filter(None, variables.pop("PYTHONPATH", "").split(os.pathsep))  # an empty one is that directory
    if path := os.pathsep.join(map(os.path.abspath, paths)):
        variables["PYTHONPATH"] = path
    return variables


def _receive(line: str, progress: Progress) -> dict[str, Any]:
    """Show progress and notes. Returns the result or the error in `line`, if it is one."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}  # printed while Python started, before `serve`
    if not isinstance(message, dict):
        return {}
    if "progress" in message:
        progress.bar(*message["progress"])
    if "note" in message:
        progress.note(message["note"])
    return {key: message[key] for key in ("result", "error") if key in message}


def _error(kind: str, message: str, hint: str) -> LlmcError:
    return getattr(errors, kind)(message, hint)
