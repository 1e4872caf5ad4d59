"""Groups of ranks in the threads of a test."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llmc.runtime.parallel.tcp import TcpCommunicator


def tcp_group(size: int, timeout: float = 600, members: int | None = None) -> list[TcpCommunicator]:
    """The communicators of processes of several machines. test_parallel_launch.py has how they meet."""
    links: list[dict[int, socket.socket]] = [{} for _ in range(size)]
    with socket.create_server(("127.0.0.1", 0)) as server:
        for first in range(size):
            for second in range(first):
                links[first][second] = socket.create_connection(server.getsockname())
                links[second][first] = server.accept()[0]
    return [TcpCommunicator(rank, links[rank], timeout, rank == 0, members) for rank in range(size)]


def together(ranks: Sequence[Any], run: Callable[[Any], Any]) -> list[Any]:
    """Return the result, or the exception, of `run` for each rank, each in a thread."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        jobs = [pool.submit(run, rank) for rank in ranks]
        return [job.exception() or job.result() for job in jobs]
