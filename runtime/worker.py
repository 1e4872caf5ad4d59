"""A separate process for the programs that come with a model.

Chat templates are programs, and so are the regular expressions of a tokenizer. A hostile or careless one runs
forever, takes all memory, or crashes the library. In this process it has limits, and only its request fails.

    Requests and replies are JSON lines on the pipes:
    {"template": source, "values": {...}}        -> {"text": ...}
    {"encode": text, "special": bool}            -> {"ids": [...], "special": [0 or 1, ...]}
    any of them                                  -> {"error": "refused" | "failed" | "invalid" | "limit",
                                                     "message": one line}
    The first line of a process sets it up:
    {"tokenizer": the text of a tokenizer.json, or null, "split_special_tokens": bool}
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import IO, Any

from llmc.runtime.import_paths import import_paths

SECONDS = 3  # for a request; ordinary requests take milliseconds
_LOAD_SECONDS = 60  # to load the tokenizer; a large one usually takes a second
MEMORY = 1 << 30  # bytes of address space; more for a process with a tokenizer (`_limit_memory`)
MAX_CHARACTERS = 1 << 25  # of a rendered conversation
MAX_MESSAGE = 300  # characters of an error message
_START = "import sys; sys.path += sys.argv[1:]; from llmc.runtime.worker import serve; serve()"


class WorkerError(Exception):
    """A request failed. kind: the "error" of the reply, or "limit" if the process died."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Worker:
    """A process for requests. It starts at the first request, and again after a request that ended it.

    Threads may share a worker: their requests wait for each other.

    tokenizer: the text of the tokenizer.json to encode with.
    split_special_tokens: encode the name of a special token in a text as plain text.
    """

    def __init__(self, tokenizer: str | None = None, split_special_tokens: bool = False) -> None:
        self._setup = json.dumps({"tokenizer": tokenizer, "split_special_tokens": split_special_tokens})
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0
        self._lock = threading.Lock()
        _WORKERS.add(self)

    def call(self, more_seconds: float = 0, **request: Any) -> dict[str, Any]:
        """Return the reply to a request. Raises WorkerError.

        more_seconds: the time that this request may take beyond SECONDS.
        """
        seconds = SECONDS + more_seconds
        with self._lock:
            reply = self._exchange(json.dumps({**request, "seconds": seconds}), seconds)
        if "error" in reply:
            raise WorkerError(reply["error"], reply["message"])
        return reply

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]

    def __del__(self) -> None:
        self.close()

    def _exchange(self, line: str, seconds: float) -> dict[str, Any]:
        if self._owner != os.getpid():  # a forked process must not share the pipes
            self._process = None
        process = self._process or self._start()
        answer = ""
        try:
            with contextlib.suppress(BrokenPipeError):
                _write(process.stdin, line)
            answer = process.stdout.readline()  # type: ignore[union-attr]
        finally:
            if not answer:  # the process died, or this thread was interrupted
                self.close()
        if answer:
            return json.loads(answer)
        if process.returncode == -signal.SIGALRM:
            raise WorkerError("limit", f"it takes more than {seconds:g} seconds")
        raise WorkerError("limit", f"it ends the process ({_outcome(process.returncode)})")

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-c",
                _START,
                *import_paths("llmc", "jinja2", "tokenizers"),
            ],  # -I: nothing of the working directory
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # where the Rust library reports panics
            text=True,
            encoding="utf-8",
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
        )
        self._process, self._owner = process, os.getpid()
        with contextlib.suppress(BrokenPipeError):
            _write(process.stdin, self._setup)
        return process


_WORKERS: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for worker in list(_WORKERS):
        worker.close()


def _write(pipe: IO[str] | None, line: str) -> None:
    assert pipe is not None
    pipe.write(line + "\n")
    pipe.flush()


def _outcome(code: int) -> str:
    return f"exit code {code}" if code >= 0 else str(signal.strsignal(-code))


def serve() -> None:
    """Answer requests until stdin ends: the main function of the process."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # stdout is for replies alone
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent process
    setup = json.loads(requests.readline())
    _limit_memory(setup["tokenizer"])
    with _alarm(_LOAD_SECONDS):
        backend = None if setup["tokenizer"] is None else _read_tokenizer(**setup)
    for line in requests:
        request = json.loads(line)
        with _alarm(request["seconds"]):
            try:
                reply = _answer(request, backend)
            except BaseException as error:
                reply = {"error": _kind(error), "message": describe(error)}
            text = json.dumps(reply)
        _write(replies, text)


def _answer(request: Mapping[str, Any], backend: Any) -> dict[str, Any]:
    if "encode" in request:
        encoding = backend.encode(request["encode"], add_special_tokens=request["special"])
        return {"ids": encoding.ids, "special": encoding.special_tokens_mask}
    from llmc.runtime.chat_template import render

    text = render(request["template"], request["values"])
    if len(text) > MAX_CHARACTERS:
        raise MemoryError(f"it renders {len(text):,} characters")
    return {"text": text}


def _read_tokenizer(tokenizer: str, split_special_tokens: bool) -> Any:
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(tokenizer)
    backend.encode_special_tokens = split_special_tokens
    return backend


def _kind(error: BaseException) -> str:
    import jinja2

    from llmc.runtime.chat_template import Refusal

    if isinstance(error, MemoryError | RecursionError | OverflowError):
        return "limit"
    if isinstance(error, Refusal):
        return "refused"
    invalid = (jinja2.TemplateSyntaxError, jinja2.exceptions.SecurityError)
    return "invalid" if isinstance(error, invalid) else "failed"


def describe(error: BaseException) -> str:
    """Return the message of an error in one line of bounded length."""
    text = " ".join(str(error)[: 4 * MAX_MESSAGE].split())
    if isinstance(error, MemoryError):
        text = text or "it needs too much memory"
    elif isinstance(error, RecursionError):
        text = "it is nested too deeply"
    text = text or type(error).__name__
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 4]} ..."


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """End this process if the block takes longer than `seconds`."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)


def _limit_memory(tokenizer: str | None) -> None:
    import resource

    limit = MEMORY if tokenizer is None else 2 * MEMORY + 32 * len(tokenizer)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    with contextlib.suppress(ValueError, OSError):  # systems without this limit
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
