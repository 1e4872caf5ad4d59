"""A bundle of several ranks on one machine: rank 0 in this process, the others in followers."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar, cast

import numpy as np

from llmc.runtime.backends import load_backend
from llmc.runtime.backends.base import (
    Candidates,
    EngineFile,
    ExchangingBackend,
    LoadOptions,
    RankBackend,
    StageBackend,
)
from llmc.runtime.backends.kv_cache import cpu_blocks
from llmc.runtime.batch import Batch
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.cpus import engine_threads
from llmc.runtime.errors import BackendError, LlmcError, RankError
from llmc.runtime.native.weights import Weights
from llmc.runtime.parallel.communicator import Communicator, RankEnded
from llmc.runtime.parallel.follower import lack, manifest_sha256
from llmc.runtime.parallel.followers import Followers
from llmc.runtime.parallel.messages import Job
from llmc.runtime.parallel.processes import TIMEOUT, ProcessCommunicator, pipeline
from llmc.runtime.parallel.tcp import TcpCommunicator

# A step of a pipeline is split into parts, which follow each other through the stages.
_PARTS = 4  # for each stage: of N parts, each of S stages works N / (N + S - 1) of the time
_MOST_PARTS = 16  # other steps in flight fill the gaps that remain
_TOKENS = 32  # of a part, at least: with few, a stage needs as long to read its weights for a part as for all
_AHEAD = 16  # parts without logits that rank 0 may be ahead of the last stage: their arrays wait in memory

_T = TypeVar("_T")


def load_parallel(
    bundle: Bundle, options: LoadOptions, weights: Weights | None = None, timeout: float = TIMEOUT
) -> ParallelBackend:
    """Load all ranks of a bundle: rank 0 here, and the others in processes of their own.

    options: `threads` is the number of threads of all ranks together. Each gets the same share, at least one.
    weights: the weights of rank 0, if a thread reads them already
    timeout: the seconds that a rank waits for another one in a step

    Raises what `load_backend` raises, for any rank, and RankError if a process ends.
    """
    size, stages = bundle.manifest.parallel.world_size, bundle.manifest.parallel.pp
    engine = EngineFile.of(bundle, weights)
    job = job_of(bundle, engine, options, max(1, engine_threads(options.threads) // size), timeout)

    def load(communicator: Communicator) -> RankBackend:
        return cast(RankBackend, load_backend(engine, job.load_options(communicator)))

    return start_ranks(str(bundle.path), size, job, load, stages=stages)


def job_of(bundle: Bundle, engine: EngineFile, options: LoadOptions, threads: int, timeout: float) -> Job:
    """Return the job of all ranks. engine: of rank 0; threads: of each rank"""
    on_gpus = bundle.manifest.gpu is not None
    return Job(
        manifest_sha256=manifest_sha256(bundle),
        kv_blocks=None if on_gpus else cpu_blocks(engine, options),
        kv_memory=options.kv_memory if on_gpus else None,
        max_tokens=options.max_tokens,
        max_sequences=options.max_sequences,
        threads=threads,
        activation_group=options.activation_group,
        timeout=timeout,
    )


def start_ranks(
    path: str,
    size: int,
    job: Job,
    load: Callable[[Communicator], RankBackend],
    module: str = "llmc.runtime.parallel.follower",
    paths: Sequence[str] = (),
    stages: int = 1,
) -> ParallelBackend:
    """Start the followers, load rank 0 with `load` meanwhile, and wait until all are loaded.

    path, module, paths: see `Followers`
    stages: the number of pipeline stages that the ranks form
    """
    if sys.platform != "linux":
        raise BackendError(
            "bundles of several ranks run on Linux only",
            "build the bundle without --tp and --pp to run it here",
        )
    try:
        own, *others = pipeline(size, stages)
    except OSError as error:
        raise RankError(f"cannot connect the ranks: {error.strerror or error}", lack(error)) from error
    communicator = ProcessCommunicator(own, job.timeout, job.threads)
    followers = None
    try:
        followers = Followers(path, job, others, module, paths)
        backend = load(communicator)
        followers.wait_until_loaded()
    except BaseException as error:
        cause = followers.cause(error) if followers and isinstance(error, RankEnded) else error
        communicator.close()
        if followers is not None:
            followers.close()
        if cause is not error:
            raise cause from error
        raise
    return ParallelBackend(backend, communicator, followers, stages)


class _Part(NamedTuple):
    """A part of a step in flight, which the ranks compute as a step of its own."""

    step: int
    #: The rows of logits.
    rows: int
    #: The candidates of each row; 0: whole rows.
    k: int


class ParallelBackend:
    """The ranks of a bundle as one backend. See `Backend`, and `PipelineBackend` if there are stages.

    The first error of a rank ends all of them, and so does a second Ctrl-C within a step. Later calls raise
    RankError.
    """

    def __init__(
        self,
        own: RankBackend,
        communicator: ProcessCommunicator | TcpCommunicator,
        followers: Followers,
        stages: int = 1,
    ) -> None:
        #: See `PipelineBackend`: each stage has a step to compute.
        self.depth = stages
        #: See `SamplingBackend`.
        self.max_candidates: int = getattr(own, "max_exchanged", 0)
        self._in_flight: deque[list[_Part]] = deque()
        self._ahead: deque[_Part] = deque()  # parts of collected steps that the last stage may still compute
        self.name, self.num_blocks, self.block_size = own.name, own.num_blocks, own.block_size
        self._own, self._communicator, self._followers = own, communicator, followers
        self._steps, self._process = 0, os.getpid()
        self._failure: str | None = None

    @property
    def pids(self) -> list[int]:
        """The process ids of the followers."""
        return self._followers.pids

    def forward(self, batch: Batch) -> np.ndarray:
        """Run a step on all ranks. Return the logits of rank 0, which are valid until the next call.

        No other step may be in flight.
        """
        if self.depth == 1:
            return self._together(lambda: self._forward(batch))
        self.submit(batch)
        return self._together(lambda: self._collect(wait=True))

    def forward_sampled(self, batch: Batch, k: int) -> list[Candidates]:
        """See `SamplingBackend`. No other step may be in flight."""
        if self.depth == 1:
            return self._together(lambda: self._forward_sampled(batch, k))
        self.submit_sampled(batch, k)
        return self.collect_sampled()

    def submit(self, batch: Batch) -> None:
        """See `PipelineBackend`."""
        self._together(lambda: self._submit(batch, 0))

    def submit_sampled(self, batch: Batch, k: int) -> None:
        """See `SamplingPipelineBackend`."""
        self._together(lambda: self._submit(batch, k))

    def collect(self) -> np.ndarray:
        """See `PipelineBackend`."""
        return self._together(lambda: self._collect(wait=False))

    def collect_sampled(self) -> list[Candidates]:
        """See `SamplingPipelineBackend`."""
        return self._together(self._collect_sampled)

    def discard(self) -> None:
        """See `PipelineBackend`."""
        if self._failure is None and (self._in_flight or self._ahead):
            self._together(self._discard)

    def close(self) -> None:
        """End all ranks."""
        self._end("the bundle was closed")

    def _together(self, call: Callable[[], _T]) -> _T:
        """Return the result of a call in which ranks wait for each other. An error ends them all."""
        if self._failure is not None:
            raise RankError(f"the ranks have ended: {self._failure}", "load the bundle again")
        if self._process != os.getpid():
            raise RankError(
                "this process is a fork of the one that loaded the bundle", "load the bundle here"
            )
        with _interrupts_later():
            try:
                return call()
            except RankEnded as error:
                cause = self._followers.cause(error)
                self._end(cause)
                raise cause from error
            except BaseException as error:
                self._end(error)
                raise

    def _forward(self, batch: Batch) -> np.ndarray:
        self._begin_step(batch)
        return self._own.forward(batch)

    def _forward_sampled(self, batch: Batch, k: int) -> list[Candidates]:
        own = cast(ExchangingBackend, self._own)
        self._begin_step(batch, k)
        own.begin_sampled(batch, k)
        return own.finish_sampled(len(batch.logits_index), k)

    def _submit(self, batch: Batch, k: int) -> None:
        own, parts = cast(ExchangingBackend, self._own), []
        for part in self._parts(batch):
            asked = k if len(part.logits_index) else 0
            self._begin_step(part, asked)
            if asked:
                own.begin_sampled(part, asked)
            else:
                own.begin(part)
            parts.append(_Part(self._steps, len(part.logits_index), asked))
        self._in_flight.append(parts)

    def _collect(self, wait: bool) -> np.ndarray:
        parts = self._in_flight.popleft()
        if not wait and not any(part.rows for part in parts):
            self._ahead.extend(parts)
            parts = []
        self._finish_ahead(0 if parts else _AHEAD)
        logits = np.empty((0, 0), np.float32)
        for part in parts:
            logits = self._finish(part, len(logits))
        return logits

    def _collect_sampled(self) -> list[Candidates]:
        parts, own = self._in_flight.popleft(), cast(ExchangingBackend, self._own)
        self._finish_ahead(0)
        found: list[Candidates] = []
        for part in parts:
            if part.k:
                self._communicator.begin_step(part.step)
                found += own.finish_sampled(part.rows, part.k)
            else:
                self._finish(part, 0)
        return found

    def _finish_ahead(self, most: int) -> None:
        """Wait for parts without logits, until at most `most` are computed."""
        while len(self._ahead) > most:
            self._finish(self._ahead.popleft(), 0)

    def _discard(self) -> None:
        while self._in_flight:
            if any(part.k for part in self._in_flight[0]):
                self._collect_sampled()
            else:
                self._collect(wait=True)
        self._finish_ahead(0)

    def _finish(self, part: _Part, first: int) -> np.ndarray:
        """Wait until the last stage has computed a part. Return the logits of all parts of its step so far.

        first: the number of rows of logits of the parts before
        """
        self._communicator.begin_step(part.step)
        return cast(StageBackend, self._own).finish(first, part.rows)

    def _begin_step(self, batch: Batch, k: int = 0) -> None:
        self._steps += 1
        self._followers.send(self._steps, batch, k)
        self._communicator.begin_step(self._steps)

    def _parts(self, batch: Batch) -> list[Batch]:
        """Split a step so that all stages work at the same time, if its parts keep them busy long enough."""
        tokens = len(batch.input_ids)
        count = min(_PARTS * self.depth, _MOST_PARTS, tokens // _TOKENS)
        if count < 2:
            return [batch]
        return list(batch.split_tokens(-(-tokens // count)))

    def _end(self, reason: BaseException | str) -> None:
        if self._failure is None:
            known = isinstance(reason, str | LlmcError)
            self._failure = str(reason) if known else f"{type(reason).__name__} in step {self._steps}"
        self._communicator.close()
        self._followers.close()
        self._own.close()


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Handle Ctrl-C after the block, so that no rank is left in the middle of a step.

    A second Ctrl-C is handled at once.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    seen: list[int] = []

    def later(number: int, frame: object) -> None:
        if seen:
            handler(number, None)
        seen.append(number)

    signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if seen:
        handler(signal.SIGINT, None)
