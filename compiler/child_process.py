"""A child process that takes one task and answers in JSON lines. Verification and TensorRT builds use it.

When it ends, all its memory is free again, and if it crashes before it has sent its result, the parent
reports an error. It may be started before its task is known, and imports its libraries meanwhile.

stdin, JSON lines   {"prepare": {...}}, which may be left out, and the task
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TextIO

from llmc.compiler.progress import Progress
from llmc.runtime import errors
from llmc.runtime.errors import BuildError, LlmcError
from llmc.runtime.out_of_memory import says_out_of_memory

_PR_SET_PDEATHSIG = 1  # prctl(2)
_PARENT_IS_GONE = "the parent process is gone"
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
        """Start the child, run `task` and return its result. See `start` and `Started.run`."""
        with self.start(environment, directory) as started:
            return started.run(task, progress)

    @contextlib.contextmanager
    def start(
        self, environment: Mapping[str, str] | None = None, directory: Path | None = None
    ) -> Iterator[Started]:
        """Start the child, which waits for its task. It is killed at the end of the context.

        environment: the child's environment variables; by default those of this process
        directory: the child's working directory; by default that of this process
        """
        variables = _variables(os.environ | _ENVIRONMENT if environment is None else environment)
        with tempfile.TemporaryFile("w+", errors="replace") as stderr:  # an unread pipe would fill up
            process = subprocess.Popen(
                [sys.executable, *_START, self.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=variables,
                cwd=directory,
            )
            assert process.stdin and process.stdout
            try:
                yield Started(self, process, stderr)
            finally:
                process.kill()
                process.wait()
                process.stdout.close()
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()  # not earlier: at its end the child assumes that the parent died

    def death(self, code: int, last_line: str) -> BuildError:
        """Return the error for a child that died. last_line: of its stderr."""
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


@dataclass(frozen=True)
class Started:
    """A child process that waits for its task."""

    child: Child
    process: subprocess.Popen[str]
    stderr: IO[str]

    @property
    def pid(self) -> int:
        return self.process.pid

    def prepare(self, data: Mapping[str, Any]) -> None:
        """Have the child prepare for its task, and return at once. data: what it needs for that, as JSON"""
        self._send({"prepare": data})

    def run(self, task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        """Run `task` and return its result. A process runs one task.

        task: what `serve` passes to the handler, as JSON

        Raises the LlmcError that the child reports, and BuildError if it dies.
        """
        assert self.process.stdout
        self._send(task)
        for line in self.process.stdout:
            answer = _receive(line, progress)
            if "error" in answer:
                raise _error(**answer["error"])
            if "result" in answer:
                return answer["result"]  # the process may still free its memory, which nobody waits for
        code = self.process.wait()
        self.stderr.seek(0)
        raise self.child.death(code, self.stderr.read().strip().rpartition("\n")[2] or "no message")

    def _send(self, line: Mapping[str, Any]) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # the child died; stderr says why
            self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()


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


def serve(
    handler: Callable[[dict[str, Any], Messages], Mapping[str, Any]],
    prepare: Callable[[Mapping[str, Any]], None] = lambda data: None,
) -> None:
    """The main function of a child process: run `handler` on the task from stdin and send its result.

    prepare: called with the data of `Started.prepare`, before the task is known

    An LlmcError is sent as an error. Any other exception ends the process with a traceback on stderr.
    """
    messages = Messages(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)  # stdout is for messages alone: what libraries print goes to stderr
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    while "prepare" in (task := _read()):
        prepare(task["prepare"])
    _die_with_parent()
    try:
        messages.send(result=handler(task, messages))
    except LlmcError as error:
        messages.send(error={"kind": type(error).__name__, "message": error.message, "hint": error.hint})


def _read() -> dict[str, Any]:
    """Return the next line of stdin. Ends this process if there is none."""
    line = sys.stdin.buffer.readline()
    if not line:
        sys.exit(_PARENT_IS_GONE)
    return json.loads(line)


def _die_with_parent() -> None:
    """End this process if its parent is dead, or when it dies, even by SIGKILL.

    Call it after the task is read. On Linux the kernel kills this process. On other systems a thread waits
    for the end of stdin, which the parent holds open. The thread runs only when the GIL is free, so a library
    that holds the GIL delays the exit.
    """
    if sys.platform != "linux":
        threading.Thread(target=_exit_at_end_of_stdin, daemon=True).start()
    if select.select([sys.stdin], [], [], 0)[0]:  # only the end of stdin can follow the task
        sys.exit(_PARENT_IS_GONE)


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
