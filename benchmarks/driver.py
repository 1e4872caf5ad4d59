"""Drive worker processes one at a time. The others are stopped (SIGSTOP) and use no CPU.

Linux only: CPU seconds and memory are read from /proc.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).resolve().parent
TICKS = os.sysconf("SC_CLK_TCK")


class PeerError(Exception):
    """A tool cannot be measured. The message says why."""


@dataclass(frozen=True)
class Peer:
    """How to start one tool."""

    #: NAME+FORMAT+SWITCH, as in `--tools`.
    name: str
    #: The interpreter.
    python: Path
    #: The worker's file.
    worker: Path
    #: The file or directory that the tool loads.
    model: Path
    threads: int
    #: Additional environment variables.
    environment: tuple[tuple[str, str], ...] = ()

    def command(self, verb: str, *rest: str) -> list[str]:
        """Return the command line for "serve", "first" or "convert" with its arguments."""
        threads = [] if verb == "convert" else ["--threads", str(self.threads)]
        return [str(self.python), str(self.worker), verb, *rest, *threads]

    def environ(self) -> dict[str, str]:
        """Return the whole environment of the process."""
        fixed = {
            "OMP_NUM_THREADS": str(self.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        return {**os.environ, **fixed, **dict(self.environment)}


def machine_busy_seconds() -> float:
    """Return the CPU seconds that all processes and the hypervisor's other guests have used."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields[:8]
    return (user + nice + system + irq + softirq + steal) / TICKS


def process_busy_seconds(pid: int) -> float:
    """Return the CPU seconds of one process and of its finished children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(x) for x in fields[11:15]) / TICKS


def wait_until_idle(limit: float, busy: float = 0.1) -> float:
    """Wait until other processes use less than the share `busy` of the machine, at most `limit` seconds.

    Returns the seconds that it waited.
    """
    started = time.perf_counter()
    cores = os.cpu_count() or 1
    while (waited := time.perf_counter() - started) < limit:
        before, at = machine_busy_seconds(), time.perf_counter()
        time.sleep(0.5)
        if machine_busy_seconds() - before < busy * cores * (time.perf_counter() - at):
            break
    return waited


class Worker:
    """A persistent worker process, stopped except while it answers."""

    def __init__(self, peer: Peer, log: Path, timeout: float = 900.0) -> None:
        self.peer = peer
        self.timeout = timeout
        self.log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                peer.command("serve", str(peer.model)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=peer.environ(),
                bufsize=0,  # so that `select` sees every line that is there
            )
        self.hello = self._reply()
        self.pause()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def pause(self) -> None:
        """Stop the process until the next request."""
        self.process.send_signal(signal.SIGSTOP)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request while no other worker runs. Return the answer.

        Its field `foreign` is the share of the whole machine that other processes used meanwhile.
        Raises PeerError if the worker fails.
        """
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        machine, own_seconds = machine_busy_seconds(), process_busy_seconds(self.process.pid)
        started = time.perf_counter()
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        answer = self._reply()
        wall = time.perf_counter() - started
        others = machine_busy_seconds() - machine - (process_busy_seconds(self.process.pid) - own_seconds)
        self.pause()
        answer["foreign"] = max(0.0, others / (wall * (os.cpu_count() or 1)))
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.kill()  # SIGKILL also ends a stopped process
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def _died(self) -> PeerError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)
        self.close()
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        return PeerError(f"the worker ended with status {self.process.returncode}: {lines[-1]}")

    def _reply(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._line())
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _line(self) -> bytes:
        assert self.process.stdout is not None
        line = b""
        while not line.startswith(b"{"):  # some libraries print while they are imported
            with selectors.DefaultSelector() as selector:
                selector.register(self.process.stdout, selectors.EVENT_READ)
                if not selector.select(self.timeout):
                    self.close()
                    raise PeerError(f"no answer within {self.timeout:.0f} s")
            line = self.process.stdout.readline()
            if not line:
                raise self._died()
        return line


def run_to_end(command: list[str], environ: dict[str, str], log: Path) -> dict[str, Any]:
    """Run a process. Return the seconds to its first output and to its end, and its peak RSS in bytes.

    Raises PeerError if it fails or prints nothing.
    """
    machine, started = machine_busy_seconds(), time.perf_counter()
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=environ)
        assert process.stdout is not None
        with process.stdout:
            head = os.read(process.stdout.fileno(), 1)
            first = time.perf_counter() - started
            process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - started
    if process.returncode != 0 or not head:
        lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        raise PeerError(f"{Path(command[1]).name} ended with status {process.returncode}: {lines[-1]}")
    own_seconds = usage.ru_utime + usage.ru_stime
    others = max(0.0, machine_busy_seconds() - machine - own_seconds)
    return {
        "first_output_seconds": first,
        "seconds": wall,
        "cpu_seconds": own_seconds,
        "peak_rss": usage.ru_maxrss * 1024,
        "foreign": others / (wall * (os.cpu_count() or 1)),
    }
