"""Load an engine to verify it: one rank, or all ranks in lock-step in this process."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from llmc.runtime.backends import load_backend
from llmc.runtime.backends.base import Backend, EngineFile, LoadOptions, RankBackend
from llmc.runtime.cpus import engine_threads
from llmc.runtime.parallel.threads import LockStepBackend, thread_group


def load(engine: EngineFile, blocks: int, ranks: int = 1, stages: int = 1) -> Backend:
    """Load an engine with `blocks` KV blocks.

    engine: the file of rank 0, rank0.*. Those of the other ranks have their number in place of 0.
    stages: the number of stages that the ranks form
    """
    options = LoadOptions(kv_blocks=blocks)
    if ranks == 1:
        return load_backend(engine, options)
    threads = max(1, engine_threads(None) // ranks)
    group = thread_group(ranks, stages=stages)
    backends: list[RankBackend] = []
    for rank, communicator in enumerate(group):
        path = engine.path.with_name(engine.path.name.replace("rank0", f"rank{rank}"))
        each = replace(options, threads=threads, communicator=communicator)
        backend = load_backend(replace(engine, rank=rank, path=path), each)
        backends.append(cast(RankBackend, backend))
    return LockStepBackend(backends, group)
