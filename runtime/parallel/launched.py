"""A bundle whose ranks torchrun, mpirun or srun started: every process runs the same command."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from llmc.runtime.backends import load_backend
from llmc.runtime.backends.base import EngineFile, LoadOptions, RankBackend
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.cpus import available_cpus, engine_threads
from llmc.runtime.errors import BackendError, LlmcError, RankError
from llmc.runtime.native.weights import Weights
from llmc.runtime.parallel.backend import ParallelBackend, job_of
from llmc.runtime.parallel.communicator import RankEnded
from llmc.runtime.parallel.follower import follow, load_rank, manifest_sha256
from llmc.runtime.parallel.followers import Follower, Followers
from llmc.runtime.parallel.launch import Place, meeting_of, place_of
from llmc.runtime.parallel.messages import END, Job
from llmc.runtime.parallel.processes import TIMEOUT
from llmc.runtime.parallel.rendezvous import Refused, gather, join
from llmc.runtime.parallel.tcp import TcpCommunicator

_GRACE = 10.0  # seconds that a follower has to end after the last step, and rank 0 after an error
_MOMENT = 0.5  # seconds that rank 0 has to print why, because mpirun kills it when another rank fails


class WrongSize(RankError):
    """The launcher started another number of ranks than the bundle has."""


def launched(bundle: Bundle) -> Place | None:
    """Return the place of this process among the ranks of a bundle, or None if no launcher started them.

    Raises RankError for a malformed environment, and WrongSize.
    """
    place, ranks = place_of(os.environ), bundle.manifest.parallel.world_size
    if place is None:
        return None
    if sys.platform != "linux":
        raise BackendError(
            "bundles of several ranks run on Linux only",
            "build the bundle without --tp and --pp to run it here",
        )
    if place.size != ranks:
        raise WrongSize(
            f"{place.variable} is {place.size}, and {bundle.name} has {ranks} ranks",
            f"start {ranks} processes, or unset {place.variable} to have llmc start the ranks",
        )
    return place


def load_launched(
    bundle: Bundle, options: LoadOptions, place: Place, weights: Weights | None, timeout: float = TIMEOUT
) -> ParallelBackend:
    """Load rank 0 of a bundle, and wait until the other ranks are loaded. See `load_parallel`."""
    if place.rank:
        raise RankError(
            f"this process is rank {place.rank} of {place.size}, which follows rank 0",
            f"use `llmc run`, or call follow_if_launched before load_engine, or unset {place.variable}",
        )
    group = gather(place, meeting_of(os.environ, place), manifest_sha256(bundle))
    followers = None
    try:
        engine = EngineFile.of(bundle, weights)
        job = job_of(bundle, engine, options, threads_of(place, options.threads), timeout)
        members = bundle.manifest.parallel.tp
        communicator = TcpCommunicator(0, group.links, timeout, _spins(place), members)
        followers = LaunchedFollowers(group.channels, job)
        backend = load_backend(engine, job.load_options(communicator))
        followers.wait_until_loaded()
    except BaseException as error:
        cause = followers.cause(error) if followers and isinstance(error, RankEnded) else error
        group.close()  # the other ranks end, too
        if cause is not error:
            raise cause from error
        raise
    stages = bundle.manifest.parallel.pp
    return LaunchedBackend(cast(RankBackend, backend), communicator, followers, stages)


def follow_launched(bundle: Bundle, threads: int | None) -> int | None:
    """Follow rank 0. See `follow_if_launched`."""
    place = None
    try:
        place = launched(bundle)
        if place is None or place.rank == 0:
            return None
        group = join(place, meeting_of(os.environ, place), manifest_sha256(bundle))
    except (Refused, WrongSize):
        own = place_of(os.environ)
        if own is None or own.rank == 0:
            raise
        time.sleep(_MOMENT)  # rank 0 prints it
        return 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for rank 0
    rank, each = place.rank, threads_of(place, threads)

    def load(job: Job) -> tuple[RankBackend, TcpCommunicator]:
        members = bundle.manifest.parallel.tp
        communicator = TcpCommunicator(rank, group.links, job.timeout, _spins(place), members)
        return load_rank(str(bundle.path), rank, replace(job, threads=each), communicator), communicator

    with contextlib.suppress(ConnectionError, TimeoutError):  # rank 0 ended
        if follow(group.channels[0], load, _MOMENT):
            return 0
        time.sleep(_GRACE)  # `follow` ends this process when rank 0 has closed the channel
    return 1


def threads_of(place: Place, threads: int | None) -> int:
    """Return the number of threads of a rank. threads: of all ranks together; None: the machine's cores"""
    return max(1, threads // place.size if threads else engine_threads() // (place.local_size or 1))


def _spins(place: Place) -> bool:
    return (place.local_size or place.size) <= available_cpus()


class LaunchedBackend(ParallelBackend):
    """The ranks of a bundle as one backend in rank 0. After an error the other ranks end with exit code 1."""

    def _end(self, reason: BaseException | str) -> None:
        if isinstance(reason, BaseException):
            cast(LaunchedFollowers, self._followers).fail()
        super()._end(reason)


class LaunchedFollowers(Followers):
    """The ranks above 0, which end when this object is closed or freed.

    channels: rank -> the connection to it
    """

    def __init__(self, channels: Mapping[int, socket.socket], job: Job) -> None:
        self._timeout = job.timeout
        self._followers = [_Launched(rank, channel) for rank, channel in sorted(channels.items())]
        self._failed = threading.Event()
        self.close = weakref.finalize(self, _end, self._followers, self._failed, os.getpid())
        for follower in self._followers:
            follower.channel.settimeout(job.timeout)
            follower.tell(job.to_line())

    @property
    def pids(self) -> list[int]:
        """Nothing: the launcher started the processes."""
        return []

    def fail(self) -> None:
        """End the followers because of an error."""
        self._failed.set()
        self.close()


class _Launched(Follower):
    """The process of a rank, which may run on another machine."""

    def __init__(self, rank: int, channel: socket.socket) -> None:
        self.rank, self.channel = rank, channel

    def report(self, where: str) -> LlmcError | None:
        try:
            return super().report(where)
        except OSError:
            return self._death(where)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return RankError(f"rank {self.rank} sent a report that is none {where}", "please report this")

    def _death(self, where: str) -> RankError:
        return RankError(
            f"rank {self.rank} ended {where}",
            "see what it or its launcher printed; its machine may be out of memory or unreachable",
        )


def _end(followers: list[Follower], failed: threading.Event, owner: int) -> None:
    """Tell the followers that there are no more steps, unless one failed, and wait until they have ended.

    A follower that sees the end of its channel first takes it for an error.
    """
    if owner == os.getpid() and not failed.is_set():  # not in a fork of the process that loaded the bundle
        for follower in followers:
            with contextlib.suppress(OSError):
                follower.channel.sendall(END, socket.MSG_NOSIGNAL)
        for follower in followers:
            with contextlib.suppress(OSError):
                follower.channel.settimeout(_GRACE)
                follower.channel.recv(1)
    for follower in followers:
        follower.channel.close()
    followers.clear()
