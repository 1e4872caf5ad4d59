"""The plugins of collectives and NCCL, on a stand-in for the library. No GPU is needed."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llmc.plugins.collectives.tensorrt_plugin import Attributes, use_collectives
from llmc.runtime.backends.tensorrt import nccl
from llmc.runtime.backends.tensorrt.nccl import Nccl, NcclCollectives, smallest, unique_id
from llmc.runtime.errors import BackendError, LlmcError, RankError
from llmc.runtime.parallel.threads import thread_group
from support.gpu_bundle import make_collective
from support.nccl_stand_in import Hub, StandInNccl, compile_library

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the stand-in is a Linux library")

STREAM = 34
NUMPY = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
TENSORRT = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
Work = Callable[[NcclCollectives], Any]


@pytest.fixture(scope="module")
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("there is no C compiler for the stand-in")
    folder = tmp_path_factory.mktemp("nccl")
    compile_library(compiler, folder)
    return folder / nccl.LIBRARY


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub(2)
    yield hub
    hub.close()


@pytest.fixture
def stand_in(library: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> StandInNccl:
    monkeypatch.setattr(nccl, "packaged", lambda: library)
    return StandInNccl(library, hub.address)


def on_ranks(*work: Work, count: int = 2) -> list[Any]:
    """Run work on each rank, in threads. Return the results; an LlmcError is one."""
    results: list[Any] = [None] * len(work)
    group = thread_group(len(work), 20)

    def run(rank: int) -> None:
        library = Nccl()
        identity = unique_id(library, group[rank])
        collectives = NcclCollectives(library, len(work), rank, identity, count)
        try:
            collectives.begin()
            results[rank] = work[rank](collectives)
            collectives.end()
        except LlmcError as error:
            results[rank] = error
        collectives.close()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return results


def run_plugin(plugin: Any, trt: Any, dtype: str, x: np.ndarray, y: np.ndarray) -> None:
    described = trt.PluginTensorDesc()
    described.dims, described.type = trt.Dims(x.shape), getattr(trt.DataType, TENSORRT[dtype])
    plugin.enqueue([described], [], [x.ctypes.data], [y.ctypes.data], 0, STREAM)


@pytest.mark.parametrize("dtype", list(NUMPY))
def test_plugins_sum_and_gather_what_the_ranks_have(
    dtype: str, trt: Any, stand_in: StandInNccl, hub: Hub
) -> None:
    kind = np.dtype(NUMPY[dtype])
    rng = np.random.default_rng(0)
    xs = [rng.standard_normal((5, 6)).astype(kind) for _ in range(2)]

    def work(collectives: NcclCollectives) -> tuple[np.ndarray, np.ndarray]:
        x = xs[collectives.rank]
        total, parts = np.empty_like(x), np.empty((2, *x.shape), kind)
        reduce, gather = (make_collective(trt, *each, 2) for each in enumerate(("AllReduce", "AllGather")))
        stored = {field.name: np.asarray(field.data).item() for field in gather[0].get_fields_to_serialize()}
        assert stored == {"ranks": 2, "sequence": 1}
        with use_collectives(collectives):
            run_plugin(reduce[0], trt, dtype, x, total)
            run_plugin(gather[0], trt, dtype, x, parts)
        return total, parts

    for total, parts in on_ranks(work, work):
        wanted = xs[0].astype(np.float32) + xs[1].astype(np.float32)
        np.testing.assert_array_equal(total.astype(np.float32), wanted.astype(kind).astype(np.float32))
        np.testing.assert_array_equal(parts.astype(np.float32), np.stack(xs).astype(np.float32))
    assert hub.calls == [("AllReduce", 30, kind.name), ("AllGather", 30, kind.name)]
    assert not hub.wrong
    assert stand_in.log.count("abort") == 2


def reduce(sequence: int, count: int = 4, dtype: str = "fp32", operation: str = "AllReduce") -> Work:
    def work(collectives: NcclCollectives) -> None:
        x, y = np.zeros(64, np.uint8), np.zeros(128, np.uint8)
        addresses = x.ctypes.data, y.ctypes.data
        collectives.run(operation, Attributes(2, sequence), dtype, *addresses, count, STREAM)

    return work


@pytest.mark.parametrize(
    "other",
    [
        reduce(0, operation="AllGather"),
        reduce(0, count=3),
        reduce(0, dtype="bf16"),
    ],
)
def test_ranks_that_call_different_collectives_are_caught(
    other: Work, stand_in: StandInNccl, hub: Hub
) -> None:
    for result in on_ranks(reduce(0), other, count=1):
        assert isinstance(result, BackendError)
        assert "failed: invalid usage" in result.message
    assert len(hub.wrong) == 1


def test_a_rank_that_calls_them_in_another_order_is_caught(stand_in: StandInNccl, hub: Hub) -> None:
    """Its own numbers tell, before anything is exchanged with the wrong one."""

    def both(first: int, second: int) -> Work:
        return lambda c: (reduce(first)(c), reduce(second)(c))

    good, bad = on_ranks(both(0, 1), both(1, 0))
    assert isinstance(bad, BackendError)
    assert bad.message == "the engine runs collective 1 where 0 is due"
    assert isinstance(good, BackendError)  # the other rank has gone
    assert not hub.calls


@pytest.mark.parametrize(
    ("work", "count", "fact"),
    [
        (lambda c: None, 1, "the engine ran 0 of 1 collectives"),
        (
            lambda c: c.run("AllReduce", Attributes(4, 0), "fp32", 0, 0, 1, STREAM),
            1,
            "the engine is one of 4 ranks, here are 2",
        ),
    ],
)
def test_an_engine_that_is_not_of_these_ranks(
    work: Work, count: int, fact: str, stand_in: StandInNccl
) -> None:
    for result in on_ranks(work, work, count=count):
        assert result.message == fact


def test_a_rank_waits_for_the_others_in_bounded_time(stand_in: StandInNccl, hub: Hub) -> None:
    with pytest.raises(RankError, match=r"did not answer within 0\.1 s while the ranks met in NCCL"):
        NcclCollectives(Nccl(), 2, 1, hub.address.encode().ljust(128, b"\0"), 0, timeout=0.1)


def test_what_happens_while_a_step_runs_on_the_gpu(stand_in: StandInNccl) -> None:
    answers = iter([False, False, True])

    def work(collectives: NcclCollectives) -> str:
        if collectives.rank == 0:
            collectives.wait(lambda: next(answers))
            collectives._timeout = 0.05
            with pytest.raises(RankError, match=r"another rank did not answer within 0.05 s"):
                collectives.wait(lambda: False)
            stand_in.asked = 3
            with pytest.raises(BackendError, match="a collective failed: as it was told to"):
                collectives.wait(lambda: False)
        return "done"

    assert on_ranks(work, work, count=0) == ["done", "done"]


def test_a_plugin_without_a_communicator_does_not_run(trt: Any) -> None:
    plugin, _creator = make_collective(trt, 0, "AllReduce", 2)
    x = np.zeros((2, 2), np.float32)
    with pytest.raises(RuntimeError, match="collectives have no communicator in this process"):
        run_plugin(plugin, trt, "fp32", x, x)


def test_fields_that_are_not_those_of_the_operator() -> None:
    with pytest.raises(ValueError, match="has the fields ranks"):
        Attributes.read("AllReduce", {"ranks": 2})
    with pytest.raises(ValueError, match="has the fields"):
        Attributes.read("AllReduce", {"ranks": 0, "sequence": 0})


def test_without_nccl_the_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nccl, "packaged", lambda: tmp_path / "libnccl.so.2")
    with pytest.raises(BackendError, match="several ranks on GPUs need NCCL: ") as error:
        Nccl()
    assert error.value.hint == "pip install nvidia-nccl-cu13"


def test_the_version(stand_in: StandInNccl) -> None:
    assert Nccl().version() == "2.32.3"


def test_ranks_agree_on_the_smallest_number() -> None:
    numbers = [(1 << 40) + 3, (1 << 40) + 1, 1 << 41]
    found: list[int] = []
    group = thread_group(3)
    threads = [
        threading.Thread(target=lambda r=rank: found.append(smallest(numbers[r], group[r])))
        for rank in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [(1 << 40) + 1] * 3
