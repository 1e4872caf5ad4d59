"""A child process that takes one task and answers in JSON lines. Verification and TensorRT builds use it.

When it ends, all its memory is free again, and if it crashes, the parent reports an error.

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
# Python 3.10 has no PYTHONSAFEPATH: this takes the working directory off the path, then runs a module.
RUN_MODULE = (
    "import sys; sys.path.remove(''); import runpy; "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)
_START = ("-m",) if sys.version_info >= (3, 11) else ("-c", RUN_MODULE)
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Child:
    """A child process and the hints for its failures.

    module: the Python module to run; it calls `serve`
    name: the name of the process in messages, as in "the TensorRT process"
    out_of_memory: the hint if it ran out of memory
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

        task: what `serve` passes to the handler, as JSON
        environment: the child's environment variables; by default those of this process
        directory: the child's working directory; by default that of this process

        Raises the LlmcError that the child reports, and BuildError if it dies.
        """
        answer: dict[str, Any] = {}
        variables = _variables(os.environ | _ENVIRONMENT if environment is None else environment)
        with tempfile.TemporaryFile("w+", errors="replace") as stderr:  # an unread pipe would fill up
            child = subprocess.Popen(
                [sys.executable, *_START, self.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=variables,
                cwd=directory,
            )
            assert child.stdin and child.stdout
            try:
                with contextlib.suppress(BrokenPipeError):  # the child died; stderr says why
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
                    child.stdin.close()  # not earlier: at its end the child assumes that the parent died
            stderr.seek(0)
            last_line = stderr.read().strip().rpartition("\n")[2] or "no message"
        if "error" in answer:
            raise _error(**answer["error"])
        if code != 0 or "result" not in answer:
            raise self._death(code, last_line)
        return answer["result"]

    def _death(self, code: int, last_line: str) -> BuildError:
        who = f"the {self.name} process"
        if code >= 0:
            if says_out_of_memory(last_line):
                return BuildError(f"{who} ran out of memory: {last_line}", self.out_of_memory)
            return BuildError(f"{who} failed with exit code {code}: {last_line}", "please report this")
        memory = f"it may have run out of memory; {self.out_of_memory}"
        return BuildError(
            f"{who} was killed by signal {-code} ({signal.strsignal(-code)}): {last_line}",
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
    """The main function of a child process: run `handler` on the task from stdin and send its result.

    An LlmcError is sent as an error. Any other exception ends the process with a traceback on stderr.
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
    """End this process when its parent dies, even by SIGKILL.

    On Linux the kernel kills it. On other systems a thread waits for the end of stdin, which the parent holds
    open. The thread runs only when the GIL is free, so a library that holds the GIL delays the exit.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_exit_at_end_of_stdin, daemon=True).start()
    if select.select([sys.stdin], [], [], 0)[0]:  # only the end of stdin can follow the task
        sys.exit("the parent process is gone")


def _exit_at_end_of_stdin() -> None:
    while os.read(0, 1):  # not sys.stdin: at exit Python would wait for the lock that reading it holds
        pass
    os._exit(1)


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment`, changed so that Python imports nothing from the working directory."""
    variables = dict(environment) | {"PYTHONSAFEPATH": "1"}
    paths = filter(None, variables.pop("PYTHONPATH", "").split(os.pathsep))  # an empty path is that directory
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
