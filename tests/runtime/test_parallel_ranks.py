"""Ranks in processes: steps, errors, deaths, Ctrl-C, and what is left of them."""

from __future__ import annotations

import gc
import os
import random
import re
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.runtime.backends.base import EngineFile, LoadOptions
from llmc.runtime.backends.kv_cache import cpu_blocks
from llmc.runtime.batch import Batch
from llmc.runtime.bundle.manifest import Parallel
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.errors import BackendError, BundleError, LlmcError, RankError
from llmc.runtime.load import load_engine
from llmc.runtime.parallel import backend as parallel
from llmc.runtime.parallel.follower import manifest_sha256
from llmc.runtime.parallel.messages import Job
from support import fake_ranks
from support.fake_ranks import STEP, FakeRank, expected
from support.waiting import alive, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks in processes run on Linux only")

GOLDEN = Path(__file__).parents[1] / "golden" / "format-3.llmc"
Plan = Callable[..., Path]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """What goes wrong -> the "bundle" of ranks that do it."""
    return partial(fake_ranks.write_plan, tmp_path)


def failure(path: Path, size: int = 2, timeout: float = 600) -> LlmcError:
    """Run steps until one fails. Return its error, after the followers are gone."""
    backend = fake_ranks.start(path, size, timeout)
    pids = backend.pids
    with pytest.raises(LlmcError) as error:  # noqa: PT012
        for step in count(1):
            np.testing.assert_array_equal(backend.forward(STEP), expected(size, step, STEP))
    assert not any(map(alive, pids))
    with pytest.raises(RankError, match="the ranks have ended: "):
        backend.forward(STEP)
    return error.value


@pytest.mark.parametrize("size", [2, 4])
def test_steps_run_on_all_ranks(plan: Plan, size: int) -> None:
    files = os.listdir("/proc/self/fd"), os.listdir("/dev/shm")
    backend = fake_ranks.start(plan(), size)
    assert (backend.name, backend.num_blocks, backend.block_size) == ("fake", 4, 32)
    long = Batch.pack([(range(64), 0, range(30_000), True)])  # more block indices than a socket holds
    for step, batch in enumerate([STEP, long, *STEP.split(1), STEP], 1):
        np.testing.assert_array_equal(backend.forward(batch), expected(size, step, batch))
    pids = backend.pids
    assert len(pids) == size - 1
    for pid in pids:
        os.kill(pid, signal.SIGINT)  # a terminal sends Ctrl-C to all processes
    np.testing.assert_array_equal(backend.forward(STEP), expected(size, step + 1, STEP))
    backend.close()
    backend.close()
    assert not any(map(alive, pids))
    with pytest.raises(RankError, match="the ranks have ended: the bundle was closed"):
        backend.forward(STEP)
    del backend
    assert (os.listdir("/proc/self/fd"), os.listdir("/dev/shm")) == files


def test_followers_end_when_the_backend_is_freed(plan: Plan) -> None:
    backend = fake_ranks.start(plan())
    (pid,) = backend.pids
    del backend
    gc.collect()
    assert not alive(pid)


@pytest.mark.parametrize(
    ("what", "kind", "message", "hint"),
    [
        ("damaged", BundleError, "rank 1: the file is damaged", "copy it again"),
        ("memory", RankError, "rank 1: ran out of memory: std::bad_alloc", "--kv-memory"),
        (
            "bug",
            RankError,
            "rank 1 failed while it was loaded with exit code 1: ZeroDivisionError: a bug",
            "report",
        ),
        (
            "SIGKILL",
            RankError,
            r"rank 1 was killed by signal 9 \(Killed\) while it was loaded",
            "more memory",
        ),
    ],
)
def test_an_error_while_a_rank_is_loaded(plan: Plan, what: str, kind: type, message: str, hint: str) -> None:
    with pytest.raises(kind, match=message) as error:
        fake_ranks.start(plan(rank=1, step=0, do=what))
    assert hint in error.value.hint


def test_an_error_while_rank_0_is_loaded(plan: Plan) -> None:
    files = os.listdir("/proc/self/fd")
    with pytest.raises(BundleError, match=r"^the file is damaged$"):
        fake_ranks.start(plan(rank=0, step=0, do="damaged"))
    gc.collect()
    assert os.listdir("/proc/self/fd") == files


def test_a_follower_of_another_version_is_refused(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.__version__", "0.0.1")
    with pytest.raises(RankError, match=r"rank 1: llmc is .*, and 0\.0\.1 in rank 0"):
        fake_ranks.start(plan())


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("damaged", "^rank 2: the file is damaged$"),
        ("memory", "^rank 2: ran out of memory"),
        (
            "bug",
            r"^rank 2 failed in all_gather 2 of step 3 \(shape .*\) with exit code 1: ZeroDivisionError: a",
        ),
        ("exit", "^rank 2 failed in all_gather 2 of step 3 .* with exit code 7: no message$"),
        (
            "gather",
            r"the ranks disagree: .* in all_gather 2 of step 3 .*, rank . in all_gather 2 of step 3 ",
        ),
    ],
)
def test_an_error_in_a_step_names_the_rank_that_failed_first(plan: Plan, what: str, message: str) -> None:
    """Rank 1 fails too, because rank 2 has ended."""
    error = failure(plan(rank=2, step=3, place=2, do=what), 3)
    assert re.search(message, error.message), error.message


def kill(plan: Plan, seed: int) -> None:
    """Kill a rank at a random place. After the last collective of a step it is missed in the next step."""
    generator = random.Random(seed)
    size = generator.choice([2, 3])
    rank, step, place = generator.randrange(1, size), generator.randrange(1, 9), generator.randrange(1, 4)
    error = failure(plan(rank=rank, step=step, place=place, do="SIGKILL"), size)
    assert isinstance(error, RankError)
    assert error.message.startswith(f"rank {rank} was killed by signal 9 (Killed) in ")
    assert f"step {step + (place == 3)}" in error.message


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_rank_ends_the_others(plan: Plan, seed: int) -> None:
    kill(plan, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 23))
def test_a_rank_may_be_killed_anywhere(plan: Plan, seed: int) -> None:
    kill(plan, seed)


def test_a_rank_that_hangs_is_named(plan: Plan) -> None:
    error = failure(plan(rank=1, step=1, place=1, do="SIGSTOP"), timeout=0.2)
    assert error.message.startswith("rank 1 did not answer within 0.2 s in all_reduce 1 of step 1")


def test_a_follower_does_not_wait_forever(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = fake_ranks.start(plan(rank=0, step=2, place=2, do="wait"), timeout=0.2)
    (pid,) = backend.pids
    monkeypatch.setattr(fake_ranks, "act", lambda what, communicator: wait_until(lambda: not alive(pid)))
    backend.forward(STEP)
    message = r"rank 1: rank 0 did not answer within 0\.2 s in all_gather 2 of step 2"
    with pytest.raises(RankError, match=message):  # noqa: PT012
        backend.forward(STEP)  # rank 1 has sent what this step needs, so it may succeed
        backend.forward(STEP)


def test_ctrl_c_leaves_no_rank_in_the_middle_of_a_step(plan: Plan) -> None:
    backend = fake_ranks.start(plan(rank=0, step=2, place=2, do="SIGINT"))
    backend.forward(STEP)
    with pytest.raises(KeyboardInterrupt):
        backend.forward(STEP)
    np.testing.assert_array_equal(backend.forward(STEP), expected(2, 3, STEP))
    backend.close()


def test_a_second_ctrl_c_ends_the_ranks(plan: Plan) -> None:
    backend = fake_ranks.start(plan(rank=0, step=2, place=2, do="SIGINT twice"))
    backend.forward(STEP)
    with pytest.raises(KeyboardInterrupt):
        backend.forward(STEP)
    with pytest.raises(RankError, match="the ranks have ended: KeyboardInterrupt in step 2"):
        backend.forward(STEP)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_follower_survives_its_parent(plan: Plan, number: signal.Signals) -> None:
    fake_ranks.ends_with_its_parent("support.fake_ranks", plan(), number)


def test_a_fork_of_the_process_leaves_the_ranks_alone(plan: Plan) -> None:
    backend = fake_ranks.start(plan())
    if (child := os.fork()) == 0:
        try:
            backend.forward(STEP)
        except RankError:
            backend.close()
            os._exit(17)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
    np.testing.assert_array_equal(backend.forward(STEP), expected(2, 1, STEP))
    backend.close()


def test_other_systems_are_refused(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel.sys, "platform", "darwin")
    with pytest.raises(BackendError, match="run on Linux only"):
        fake_ranks.start(plan())


def test_nothing_is_imported_from_the_working_directory(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('the trap')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    backend = fake_ranks.start(plan())
    backend.close()


@pytest.mark.parametrize(("threads", "each", "pp"), [(5, 2, 1), (1, 1, 1), (5, 1, 2)])
def test_every_rank_of_a_bundle_gets_the_same_job(
    monkeypatch: pytest.MonkeyPatch, threads: int, each: int, pp: int
) -> None:
    """The KV cache has as many blocks in every rank, and the ranks share the threads."""
    golden = Bundle.open(GOLDEN)
    two = replace(golden.manifest, parallel=Parallel(tp=2, pp=pp, world_size=2 * pp))  # type: ignore[arg-type]
    bundle = replace(golden, manifest=two)
    jobs = []

    def start_ranks(*arguments: Any, stages: int) -> FakeRank:
        jobs.append((*arguments, stages))
        return FakeRank.__new__(FakeRank)

    monkeypatch.setattr(parallel, "start_ranks", start_ranks)
    load_engine(bundle, kv_memory=1 << 20, max_batch_tokens=64, max_sequences=8, threads=threads)
    ((path, size, job, _, stages),) = jobs
    assert (path, size, stages) == (str(golden.path), 2 * pp, pp)
    assert job.manifest_sha256 == manifest_sha256(bundle) != manifest_sha256(golden)
    options = LoadOptions(kv_memory=1 << 20, max_tokens=64, max_sequences=8)
    blocks = cpu_blocks(EngineFile.of(bundle), options)
    communicator = object()
    assert job.load_options(communicator) == replace(
        options, kv_memory=None, kv_blocks=blocks, threads=each, communicator=communicator
    )


@pytest.mark.parametrize("same", [True, False])
def test_a_follower_loads_its_rank_of_the_bundle_that_rank_0_has_read(plan: Plan, same: bool) -> None:
    digest = manifest_sha256(Bundle.open(GOLDEN)) if same else "0" * 64
    message = "no engine for rank 1, it has 1" if same else "format-3.llmc was replaced while it was loaded"
    path = str(plan())
    with pytest.raises(BundleError, match=rf"^rank 1: .*{message}$"):
        parallel.start_ranks(
            str(GOLDEN),
            2,
            Job(digest, 4, 64, 8, 1, None, 600),
            lambda communicator: fake_ranks.FakeRank(path, 0, communicator),
        )


def test_a_lack_of_descriptors_is_not_called_a_lack_of_memory(plan: Plan) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 1, hard))
    try:
        with pytest.raises(RankError, match="Too many open files") as caught:
            fake_ranks.start(plan())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "ulimit -n" in caught.value.hint
