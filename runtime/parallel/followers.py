"""The followers as rank 0 sees them: processes that it starts, sends steps to, and ends."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence

from llmc.runtime import errors
from llmc.runtime.batch import Batch
from llmc.runtime.errors import LlmcError, RankError
from llmc.runtime.import_paths import import_paths
from llmc.runtime.out_of_memory import says_out_of_memory
from llmc.runtime.parallel.communicator import RankEnded, no_answer
from llmc.runtime.parallel.follower import MORE_MEMORY, lack
from llmc.runtime.parallel.messages import Job, pack_step, receive_line
from llmc.runtime.parallel.processes import Endpoint

# -I: nothing is imported from the working directory. The module's `main` calls `serve`.
_START = "import importlib, sys; sys.path += sys.argv[5:]; importlib.import_module(sys.argv[1]).main()"
_GRACE = 5.0  # seconds that the report of a rank that ended may take
_LAST_WORDS = 4096  # bytes of stderr


class Followers:
    """The processes of the ranks above 0. They are killed when this object is closed or freed.

    path: the bundle
    endpoints: of these ranks; they are closed here once the processes have them
    module: the module that the processes run
    paths: more directories to import it from

    Raises RankError if the system has no process left.
    """

    def __init__(
        self,
        path: str,
        job: Job,
        endpoints: Sequence[Endpoint],
        module: str = "llmc.runtime.parallel.follower",
        paths: Sequence[str] = (),
    ) -> None:
        self._timeout = job.timeout
        self._followers: list[Follower] = []
        self.close: Callable[[], object] = weakref.finalize(self, _end, self._followers, os.getpid())
        paths = [*import_paths("llmc", "numpy"), *paths]
        try:
            for endpoint in endpoints:
                self._followers.append(_start(path, endpoint, module, paths))
        except OSError as error:
            self.close()
            raise RankError(
                f"cannot start rank {endpoint.number}: {error.strerror or error}", lack(error)
            ) from error
        finally:
            for endpoint in endpoints:
                endpoint.close()
        for follower in self._followers:
            follower.channel.settimeout(job.timeout)
            follower.tell(job.to_line())

    @property
    def pids(self) -> list[int]:
        """The process ids, in the order of the ranks."""
        return [follower.process.pid for follower in self._followers]

    def wait_until_loaded(self) -> None:
        """Wait until all have loaded their ranks. Raises the first error, which names the rank."""
        loading = {follower.channel.fileno(): follower for follower in self._followers}
        poll = select.poll()
        for number in loading:
            poll.register(number, select.POLLIN)
        while loading:
            for number, _ in poll.poll():
                if report := loading[number].report("while it was loaded"):
                    raise report
                poll.unregister(number)
                del loading[number]

    def send(self, number: int, batch: Batch, k: int = 0) -> None:
        """Send a step to all. Raises RankError if a process is gone or does not take it.

        k: the number of candidates of each row of logits; 0: whole rows
        """
        data = pack_step(number, batch, k)
        for follower in self._followers:
            try:
                follower.channel.sendall(data, socket.MSG_NOSIGNAL)
            except TimeoutError:
                raise no_answer(f"rank {follower.rank}", self._timeout, f"step {number}") from None
            except OSError as error:
                raise RankEnded(follower.rank, f"step {number}") from error

    def cause(self, error: RankEnded) -> LlmcError:
        """Return the error of the follower that failed first, or `error` if none has reported."""
        waiting = {follower.channel.fileno(): follower for follower in self._followers}
        poll = select.poll()
        for number in waiting:
            poll.register(number, select.POLLIN)
        while waiting and (ready := poll.poll(1000 * min(_GRACE, self._timeout))):
            for number, _ in ready:
                report = waiting[number].report(f"in {error.where}")
                if report is not None and not isinstance(report, RankEnded):
                    return report
                poll.unregister(number)
                del waiting[number]
        return error


class Follower:
    """One process."""

    def __init__(
        self, rank: int, process: subprocess.Popen[bytes], channel: socket.socket, stderr: int
    ) -> None:
        self.rank, self.process, self.channel, self.stderr = rank, process, channel, stderr

    def tell(self, data: bytes) -> None:
        try:
            self.channel.sendall(data, socket.MSG_NOSIGNAL)
        except ConnectionError:
            return  # the report says why

    def report(self, where: str) -> LlmcError | None:
        """Return the error that the process reports or died of, or None if it has loaded its rank.

        where: when it died, for the message. An error that followed from another rank's end is a RankEnded.
        """
        line = receive_line(self.channel)
        if not line:
            return self._death(where)
        error = json.loads(line).get("error")
        if error is None:
            return None
        if error["ended"]:
            return RankEnded(self.rank, where)
        kind = getattr(errors, error["kind"], RankError)
        return kind(f"rank {self.rank}: {error['message']}", error["hint"])

    def _death(self, where: str) -> RankError:
        who = f"rank {self.rank}"
        try:
            code = self.process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            return RankError(f"{who} closed its channel {where}", "please report this")
        size = os.fstat(self.stderr).st_size
        words = (
            os.pread(self.stderr, _LAST_WORDS, max(0, size - _LAST_WORDS)).decode(errors="replace").strip()
        )
        line = words.rpartition("\n")[2] or "no message"
        if code >= 0 and says_out_of_memory(line):
            return RankError(f"{who} ran out of memory {where}: {line}", MORE_MEMORY)
        if code >= 0:
            return RankError(f"{who} failed {where} with exit code {code}: {line}", "please report this")
        memory = f"it may have run out of memory: {MORE_MEMORY}"
        return RankError(
            f"{who} was killed by signal {-code} ({signal.strsignal(-code)}) {where}",
            memory if -code == signal.SIGKILL else "load the bundle again",
        )


def _start(path: str, endpoint: Endpoint, module: str, paths: Sequence[str]) -> Follower:
    """Start the process of a rank. Raises OSError."""
    mine, theirs = socket.socketpair()
    with theirs:
        stderr = os.memfd_create("llmc-stderr")
        try:
            inherited = [theirs.fileno(), *endpoint.descriptors()]
            process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-c", _START),
                    *(module, path, str(theirs.fileno()), json.dumps(endpoint.to_json())),
                    *paths,
                ],
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                pass_fds=inherited,
                env=os.environ
                | {"OPENBLAS_NUM_THREADS": "1"},  # numpy would start threads, which nobody uses
            )
        except BaseException:
            mine.close()
            os.close(stderr)
            raise
    return Follower(endpoint.number, process, mine, stderr)


def _end(followers: list[Follower], owner: int) -> None:
    for follower in followers:
        follower.channel.close()
        os.close(follower.stderr)
        if owner == os.getpid():  # not in a fork of the process that started them
            follower.process.kill()
    for follower in followers:
        if owner == os.getpid():
            follower.process.wait()
    followers.clear()
