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
from llmc.runtime.backends.tensorrt.nccl import Nccl, NcclCollectives, Neighbors, unique_id
from llmc.runtime.backends.tensorrt.stages import Place, id_of_all, smallest_of_all
from llmc.runtime.errors import BackendError, LlmcError, RankError
from llmc.runtime.parallel.threads import thread_group
from support.gpu_bundle import make_collective, make_exchange
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
    hub = Hub()
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
    assert bad.message == "the engine runs collective 1 where collective 0 is due"
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


ONNX = {"fp32": 1, "fp16": 10, "bf16": 16}


def on_stages(*work: Work) -> list[Any]:
    """Run work on each rank of two stages of one rank, with a transfer. An LlmcError is a result."""
    results: list[Any] = [None] * 2
    group = thread_group(2, 20, stages=2)

    def run(rank: int) -> None:
        library, place = Nccl(), Place(rank, 1, 2)
        identity = id_of_all(library, group[rank], place)
        neighbors = Neighbors(identity, rank, 2, place.before, rank, place.behind, 1 - rank)
        collectives = NcclCollectives(library, 1, 0, b"", 0, neighbors=neighbors)
        try:
            collectives.begin()
            results[rank] = work[rank](collectives)
            collectives.end()
        except LlmcError as error:
            results[rank] = error
        collectives.close()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return results


@pytest.mark.parametrize("dtype", list(NUMPY))
def test_plugins_send_to_the_next_stage(dtype: str, trt: Any, stand_in: StandInNccl, hub: Hub) -> None:
    kind = np.dtype(NUMPY[dtype])
    x = np.random.default_rng(0).standard_normal((5, 6)).astype(kind)

    def send(collectives: NcclCollectives) -> None:
        plugin, _creator = make_exchange(trt, "Send", peer=1, sequence=0)
        assert plugin.get_output_data_types([trt.DataType.HALF]) == [trt.DataType.HALF]
        with use_collectives(collectives):
            run_plugin(plugin, trt, dtype, x, np.empty(1, kind))

    def receive(collectives: NcclCollectives) -> np.ndarray:
        fields = {"peer": 0, "sequence": 0, "width": 6, "dtype": ONNX[dtype]}
        plugin, _creator = make_exchange(trt, "Recv", **fields)
        stored = {field.name: np.asarray(field.data).item() for field in plugin.get_fields_to_serialize()}
        assert stored == fields
        wanted = [getattr(trt.DataType, TENSORRT[dtype])]
        assert plugin.get_output_data_types([trt.DataType.INT32]) == wanted
        ids, y = trt.PluginTensorDesc(), np.empty((5, 6), kind)
        ids.dims, ids.type = trt.Dims((5,)), trt.DataType.INT32
        with use_collectives(collectives):
            plugin.enqueue([ids], [], [0], [y.ctypes.data], 0, STREAM)
        return y

    _, y = on_stages(send, receive)
    np.testing.assert_array_equal(y.astype(np.float32), x.astype(np.float32))
    assert hub.calls == [("Send 0 to 1", 30, kind.name)]
    assert stand_in.log.count("abort") == 2


def transfer(operation: str, sequence: int = 0, peer: int = 0, count: int = 4, dtype: str = "bf16") -> Work:
    def work(collectives: NcclCollectives) -> None:
        x = np.zeros(64, np.uint8)
        given = Attributes(sequence=sequence, peer=peer)
        collectives.run(operation, given, dtype, x.ctypes.data, x.ctypes.data, count, STREAM)

    return work


@pytest.mark.parametrize("sent", [{"count": 3}, {"dtype": "fp16"}])
def test_stages_that_expect_different_arrays_are_caught(
    sent: dict[str, Any], stand_in: StandInNccl, hub: Hub
) -> None:
    for result in on_stages(transfer("Send", peer=1, **sent), transfer("Recv")):
        assert isinstance(result, BackendError)
        assert "failed: invalid usage" in result.message
    assert len(hub.wrong) == 1


@pytest.mark.parametrize(
    ("wrong", "fact"),
    [
        (transfer("Recv", 1), "the engine runs Recv 1 where Recv 0 is due"),
        (transfer("Send"), "the engine runs Send 0 where Recv 0 is due"),
        (reduce(0), "the engine is one of 2 ranks, here are 1"),
        (transfer("Recv", peer=1), "the engine runs Recv 0 with rank 1, not rank 0"),
        (
            lambda c: (transfer("Recv")(c), transfer("Recv", 1)(c)),
            "the engine runs Recv 1 where nothing is due",
        ),
        (lambda c: None, "the engine ran 0 of 1 collectives and transfers"),
    ],
)
def test_a_stage_with_other_transfers_is_caught(wrong: Work, fact: str, stand_in: StandInNccl) -> None:
    _, result = on_stages(transfer("Send", peer=1), wrong)
    assert isinstance(result, BackendError)
    assert result.message == fact


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
    with pytest.raises(ValueError, match="has the fields"):
        Attributes.read("Recv", {"peer": 0, "sequence": 0, "width": 4, "dtype": 2})
    with pytest.raises(ValueError, match="Send has the fields"):
        Attributes.read("Send", {"peer": -1, "sequence": 0})


def test_without_nccl_the_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nccl, "packaged", lambda: tmp_path / "libnccl.so.2")
    with pytest.raises(BackendError, match="several ranks on GPUs need NCCL: ") as error:
        Nccl()
    assert error.value.hint == "pip install nvidia-nccl-cu13"


def test_the_version(stand_in: StandInNccl) -> None:
    assert Nccl().version() == "2.32.3"


@pytest.mark.parametrize(("tp", "pp"), [(4, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("where", range(4))
def test_ranks_agree_on_the_smallest_number(tp: int, pp: int, where: int) -> None:
    numbers = [(1 << 40) + 3, (1 << 40) + 2, 1 << 41, 1 << 42]
    numbers[where] = (1 << 40) + 1
    found: list[int] = []
    group = thread_group(4, stages=pp)
    threads = [
        threading.Thread(
            target=lambda r=rank: found.append(smallest_of_all(numbers[r], group[r], Place(r, tp, pp)))
        )
        for rank in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [(1 << 40) + 1] * 4
