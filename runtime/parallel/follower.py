"""The process of a rank above 0: it loads its part of a bundle, and runs the steps that rank 0 sends.

Its arguments are this module, the bundle, the descriptor of the channel to rank 0, and those of the shared
memory and of the sockets to other ranks (`Endpoint.to_json`). It inherits them all.

It waits without using the CPU, and ends with the process of rank 0, even if that is killed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import cast

from llmc.runtime.backends import load_backend
from llmc.runtime.backends.base import EngineFile, ExchangingBackend, RankBackend
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.bundle.strict_json import plain
from llmc.runtime.errors import BundleError, LlmcError, RankError
from llmc.runtime.out_of_memory import is_out_of_memory
from llmc.runtime.parallel.communicator import Communicator, RankEnded
from llmc.runtime.parallel.messages import Job, receive_line, receive_step, send_report
from llmc.runtime.parallel.processes import Endpoint, ProcessCommunicator
from llmc.runtime.parallel.tcp import TcpCommunicator

#: What is there to do if a rank lacks memory.
MORE_MEMORY = "use a machine with more memory, or give a smaller --kv-memory"
_MORE_FILES = "raise the limit of open files (ulimit -n), or build the bundle with a smaller --tp"


def main() -> None:
    """The main function of the process."""
    serve(load_rank)


def load_rank(path: str, rank: int, job: Job, communicator: Communicator) -> RankBackend:
    """Load a rank of the bundle at `path`, whose files rank 0 has checked."""
    bundle = Bundle.open(path, verify_hashes=False)
    if manifest_sha256(bundle) != job.manifest_sha256:
        raise BundleError(f"{path} was replaced while it was loaded", "load it again")
    return cast(RankBackend, load_backend(EngineFile.of(bundle, None, rank), job.load_options(communicator)))


def manifest_sha256(bundle: Bundle) -> str:
    """Return the sha256 of the manifest, which lists the sha256 of every other file."""
    return hashlib.sha256(json.dumps(plain(bundle.manifest), sort_keys=True).encode()).hexdigest()


def lack(error: OSError) -> str:
    """Return what to do about an error of the system that provides processes, memory and sockets."""
    return _MORE_FILES if error.errno in (errno.EMFILE, errno.ENFILE) else MORE_MEMORY


def serve(load: Callable[[str, int, Job, Communicator], RankBackend]) -> None:
    """Load a rank with `load`, and run steps until rank 0 closes the channel.

    An LlmcError is reported to rank 0. Any other exception ends the process with a traceback on stderr.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for rank 0
    path, channel = sys.argv[2], socket.socket(fileno=int(sys.argv[3]))
    endpoint = Endpoint.of_json(json.loads(sys.argv[4]))

    def load_with(job: Job) -> tuple[RankBackend, ProcessCommunicator]:
        communicator = ProcessCommunicator(endpoint, job.timeout, job.threads)
        return load(path, endpoint.number, job, communicator), communicator

    if not follow(channel, load_with):
        sys.exit(1)


def follow(
    channel: socket.socket,
    load: Callable[[Job], tuple[RankBackend, ProcessCommunicator | TcpCommunicator]],
    linger: float = 0,
) -> bool:
    """Load a rank with `load`, and run the steps of rank 0 until its last one. Return False after an error.

    This process ends `linger` seconds after rank 0 closes the channel. An LlmcError is reported to
    rank 0. Any other exception is raised.
    """
    threading.Thread(target=_end_with, args=(channel, linger), daemon=True).start()
    try:
        if not (line := receive_line(channel)):
            return False
        backend, communicator = load(Job.of_line(line))
        send_report(channel, loaded=True)
        while (step := receive_step(channel)) is not None:
            number, batch, k = step
            if not number:
                backend.close()
                return True
            communicator.begin_step(number)
            if k:
                cast(ExchangingBackend, backend).begin_sampled(batch, k)
            else:
                backend.forward(batch)
    except Exception as error:
        if not is_out_of_memory(error):
            if not isinstance(error, LlmcError):
                raise
            _report(channel, error)
            return False
        _report(channel, RankError(f"ran out of memory: {error or type(error).__name__}", MORE_MEMORY))
    return False


def _report(channel: socket.socket, error: LlmcError) -> None:
    report = {
        "kind": type(error).__name__,
        "message": error.message,
        "hint": error.hint,
        "ended": isinstance(error, RankEnded),
    }
    with contextlib.suppress(ConnectionError):  # rank 0 ended; there is nobody to tell
        send_report(channel, error=report)


def _end_with(channel: socket.socket, linger: float) -> None:
    """End this process when the process of rank 0 closes the channel or ends, whatever this one does then.

    linger: seconds to wait before

    The kernel can kill a process when its parent dies (prctl). But the parent is the thread that started it,
    and a server may load a bundle in a thread that ends.
    """
    poll = select.poll()
    poll.register(channel, select.POLLRDHUP)
    poll.poll()
    time.sleep(linger)
    os._exit(1)
