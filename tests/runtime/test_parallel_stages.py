"""Pipeline stages in processes with several steps in flight: results, errors, deaths, and what is left."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.runtime.batch import Batch
from llmc.runtime.engine import Engine
from llmc.runtime.errors import LlmcError, RankError
from llmc.runtime.sampling import SamplingParams
from support import fake_stages
from support.fake_ranks import ends_with_its_parent, write_plan
from support.fake_stages import VOCAB, expected
from support.waiting import LONG, alive

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks in processes run on Linux only")

Plan = Callable[..., Path]
GREEDY = SamplingParams(max_tokens=8)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """What goes wrong -> the "bundle" of ranks that do it."""
    return partial(write_plan, tmp_path)


def batch(number: int, tokens: int = 3, wanted: Any = True) -> Batch:
    return Batch.pack([(np.arange(tokens) % VOCAB, number, range(40), wanted), ([5], number, [7], True)])


def serve(backend: Any, requests: int = 6) -> Engine:
    engine = Engine(backend, None, (), 512, vocab_size=VOCAB)
    for token in range(requests):
        engine.add_request([token], GREEDY)
    return engine


def continuation(size: int, token: int) -> list[int]:
    tokens = [token]
    for position in range(GREEDY.max_tokens):
        step = Batch.pack([(tokens[-1:], position, range(17), True)])
        tokens.append(int(expected(size, step)[0].argmax()))
    return tokens[1:]


def failure(path: Path, size: int, timeout: float = LONG) -> LlmcError:
    """Serve requests until a step fails. Return its error, after the followers are gone."""
    backend = fake_stages.start(path, size, timeout)
    pids = backend.pids
    engine = serve(backend)
    with pytest.raises(LlmcError) as error:  # noqa: PT012
        while True:
            engine.step()
    assert not any(map(alive, pids))
    assert engine.scheduler.pool.num_used == 0
    engine.scheduler.check()
    with pytest.raises(RankError, match="the ranks have ended: "):
        engine.step()
    engine.close()
    return error.value


def test_steps_are_collected_in_the_order_in_which_they_were_submitted(plan: Plan) -> None:
    files = os.listdir("/proc/self/fd"), os.listdir("/dev/shm")
    backend = fake_stages.start(plan(), 3)
    assert backend.depth == 3
    steps = [
        batch(0), batch(1), batch(2, 1000, [3, 40, 998]), batch(3, 1000, [0]), batch(4), batch(5, 1000),
    ]  # fmt: skip
    results = []
    for number, step in enumerate(steps):
        backend.submit(step)
        if number >= 2:
            results.append(backend.collect().copy())
    results += [backend.collect().copy(), backend.collect().copy()]
    for step, result in zip(steps, results, strict=True):
        np.testing.assert_array_equal(result, expected(3, step))
    np.testing.assert_array_equal(backend.forward(steps[0]), expected(3, steps[0]))
    backend.submit(steps[0])
    backend.discard()
    np.testing.assert_array_equal(backend.forward(steps[1]), expected(3, steps[1]))
    backend.close()
    backend.discard()
    del backend
    assert (os.listdir("/proc/self/fd"), os.listdir("/dev/shm")) == files


def test_a_step_without_logits_is_not_waited_for_until_many_are_on_their_way(plan: Plan) -> None:
    backend = fake_stages.start(plan(rank=1, step=1, do="slow"))
    none = Batch.pack([([1], 0, [0], False)])
    begun = time.perf_counter()
    backend.submit(none)
    assert len(backend.collect()) == 0
    assert time.perf_counter() - begun < fake_stages.SLOW
    for _ in range(40):
        backend.submit(none)
        backend.collect()
    assert time.perf_counter() - begun > fake_stages.SLOW
    np.testing.assert_array_equal(backend.forward(batch(3)), expected(2, batch(3)))
    backend.close()


def test_requests_get_the_same_tokens_with_and_without_steps_in_flight(plan: Plan) -> None:
    engine = serve(fake_stages.start(plan(), 3))
    outputs = [output for _ in range(100) for output in engine.step() if output.finish_reason]
    found = {output.request_id: list(output.token_ids) for output in outputs}
    assert found == {f"request-{token + 1}": continuation(3, token) for token in range(6)}
    engine.close()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("damaged", "rank 1: the file is damaged"),
        ("memory", "rank 1: ran out of memory: std::bad_alloc"),
        ("bug", "rank 1 failed in .* with exit code 1: ZeroDivisionError: a bug"),
        ("SIGKILL", r"rank 1 was killed by signal 9 \(Killed\) in "),
    ],
)
def test_an_error_of_a_stage_ends_all_steps_in_flight(plan: Plan, what: str, message: str) -> None:
    with pytest.raises(LlmcError, match=message):
        raise failure(plan(rank=1, step=4, do=what), 3)


@pytest.mark.parametrize("rank", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stage_that_hangs_is_named(plan: Plan, rank: int) -> None:
    begun = time.perf_counter()
    error = failure(plan(rank=rank, step=5, do="SIGSTOP"), 3, timeout=1.0)
    assert f"rank {rank} did not answer within 1 s in transfer {rank - 1} of step" in error.message
    assert time.perf_counter() - begun < LONG


@pytest.mark.slow
def test_a_stage_that_computes_for_long_does_not_hang(plan: Plan) -> None:
    engine = serve(fake_stages.start(plan(rank=1, step=3, do="slow"), 3, timeout=1.0))
    outputs = [output for _ in range(60) for output in engine.step() if output.finish_reason]
    assert len(outputs) == 6
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_stage_may_be_killed_anywhere(plan: Plan, seed: int) -> None:
    size = random.Random(seed).choice([2, 3])
    backend = fake_stages.start(plan(), size)
    pids = backend.pids
    engine = Engine(backend, None, (), 1024, vocab_size=VOCAB)
    for token in range(6):
        engine.add_request([token], SamplingParams(max_tokens=1000))
    killer = subprocess.Popen(
        ["sh", "-c", f"sleep {random.Random(seed).random() / 4}; kill -9 {random.Random(seed).choice(pids)}"]
    )
    with pytest.raises(RankError, match=r"rank [12] was killed by signal 9"):  # noqa: PT012
        while True:
            engine.step()
    killer.wait()
    assert not any(map(alive, pids))
    assert engine.scheduler.pool.num_used == 0


def test_ctrl_c_leaves_no_step_in_flight(plan: Plan) -> None:
    """Requests stay, and go on with the next step."""
    backend = fake_stages.start(plan(rank=0, step=5, do="SIGINT"))
    engine = serve(backend)
    outputs = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        while True:
            outputs += engine.step()
    assert not backend._in_flight
    assert engine.scheduler.pool.num_used == 0
    while engine.has_unfinished:
        outputs += engine.step()
    found = {output.request_id: list(output.token_ids) for output in outputs if output.finish_reason}
    assert found == {f"request-{token + 1}": continuation(2, token) for token in range(6)}
    engine.close()


def test_no_stage_survives_rank_0(plan: Plan) -> None:
    """Steps are in flight."""
    ends_with_its_parent("support.fake_stages", plan(), signal.SIGTERM, seconds=0.2)
