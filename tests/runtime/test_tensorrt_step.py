"""Sizes, bindings and padded steps of a TensorRT engine: functions, tested as such."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from llmc.runtime.backends.tensorrt import sizes
from llmc.runtime.backends.tensorrt.bindings import Tensor, bind
from llmc.runtime.backends.tensorrt.stages import Place
from llmc.runtime.backends.tensorrt.step import bucket_of, buckets, fill, room
from llmc.runtime.batch import STEP_INPUTS, Batch
from llmc.runtime.bundle.manifest import (
    Engine,
    ExchangeRecord,
    Manifest,
    Parallel,
    Precision,
    RankRecord,
)
from llmc.runtime.errors import BackendError, RequestError
from support.gpu_bundle import (
    DV,
    HEADS,
    KV_HEADS,
    LAYERS,
    MAX_LEN,
    PLAN,
    VOCAB,
    D,
    batch,
    manifest,
    no_cuda_python,
    tensors,
)

# Sizes.

GIB = 1 << 30


def blocks(**changes: Any) -> int:
    given: dict[str, Any] = {"free": 20 * GIB, "total": 24 * GIB, "kv_memory": None}
    given |= {"useful": 10**9, "most": 10**9}
    return sizes.cache_blocks(1 << 20, **{**given, **changes})


def test_the_cache_takes_what_is_left_and_useful() -> None:
    assert blocks() == 20 * 1024 - int(0.03 * 24 * GIB) // 2**20 - 1  # the reserve of 737.28 MiB
    assert blocks(total=8 * GIB) == 20 * 1024 - 512
    assert blocks(kv_memory=GIB + 5) == 1024
    assert blocks(useful=7) == 7
    assert blocks(most=9) == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_memory": 20 * GIB}, r"21474836480 bytes of KV cache are asked for, the GPU has 20\d{9}"),
        ({"kv_memory": 1000}, r"1000 bytes of KV cache hold no block \(1048576 bytes\)"),
        ({"free": GIB // 2}, r"0 bytes of KV cache hold no block"),
    ],
)
def test_a_cache_that_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        blocks(**changes)
    assert error.value.hint


def test_scratch_is_enough_for_every_decode_step() -> None:
    fp16, fp8 = Precision("fp16", "fp16"), Precision("fp16", "fp8")
    most = sizes.scratch_bytes(manifest().geometry, 16, MAX_LEN, fp16, 89, 142)
    # 16 sequences with 2 kv heads could have 9 splits on 142 multiprocessors, but a context of 1100 has room
    # for 8 shares of 128 keys; so they have most: 16 * 4 heads * 8 splits * (16 + 1 + 1).
    assert most == 16 * HEADS * 8 * (DV + 2) * 4
    assert sizes.scratch_bytes(manifest().geometry, 16, 128, fp16, 89, 142) == 0
    # Long FP8 caches are split further.
    long = 1 << 15
    more = sizes.scratch_bytes(manifest().geometry, 16, long, fp8, 89, 142)
    assert more > sizes.scratch_bytes(manifest().geometry, 16, long, fp16, 89, 142)


# The bindings table.


def test_the_table_covers_every_tensor_once() -> None:
    table = bind(tensors(), manifest())
    caches = {name for cache in table.caches for name in (cache.input, cache.output)}
    assert {*table.step, *caches, "logits"} == {tensor.name for tensor in tensors()}
    assert tuple(table.step) == tuple(STEP_INPUTS) == tuple(field.name for field in fields(Batch))
    assert table.step["block_indices"] == 560
    assert table.max_blocks == 1016
    assert table.block_bytes == len(LAYERS) * KV_HEADS * 32 * (D + DV) * 2
    assert all(cache.output == cache.input.replace("_cache.", "_cache_out.") for cache in table.caches)


def test_fp8_caches_are_half_as_large() -> None:
    fp8 = manifest(precision=Precision("fp16", "fp8"))
    assert 2 * bind(tensors("FP8"), fp8).block_bytes == bind(tensors("HALF"), manifest()).block_bytes
    for engine, said in (("HALF", fp8), ("FP8", manifest())):
        with pytest.raises(BackendError, match=rf"it has input key_cache\.0, {engine} "):
            bind(tensors(engine), said)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ts: ts[1:], r"it lacks input input_ids, INT32 \[-1\]"),
        (
            lambda ts: [*ts, Tensor("present.0", False, "HALF", (-1,))],
            r"it has present\.0, which the model does not",
        ),
        (lambda ts: [replace(t, dtype="BF16") for t in ts], r"it has input input_ids, BF16"),
        (
            lambda ts: [replace(t, shape=(-1, 99)) if t.name == "logits" else t for t in ts],
            r"output logits, FLOAT \[-1, 99\], not output logits, FLOAT \[-1, 53\]",
        ),
        (
            lambda ts: [replace(t, is_input=True) if t.name == "key_cache_out.1" else t for t in ts],
            r"it has input key_cache_out\.1",
        ),
    ],
)  # fmt: skip
def test_an_engine_of_another_model_is_refused(change: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        bind(change(tensors()), manifest())


def stages() -> Manifest:
    """The manifest of two stages of a layer each."""
    plans = [PLAN, PLAN.replace("rank0.plan", "rank1.plan")]
    sent = [ExchangeRecord("Send", 1, 96, 0), ExchangeRecord("Send", 1, 0, 4 * VOCAB)]
    return manifest(
        engines=tuple(Engine(rank, plan) for rank, plan in enumerate(plans)),
        parallel=Parallel(pp=2, world_size=2),
        ranks=tuple(RankRecord(stage, stage + 1, (sent[stage],)) for stage in range(2)),
    )


def of_stage(number: int) -> list[Tensor]:
    """The tensors of an engine of `stages`."""
    lacks = [("logits_index", "logits"), ("position_ids",)][number]
    own = [t for t in tensors() if t.name not in lacks and not t.name.endswith(f".{1 - number}")]
    return own if number else [*own, Tensor("sent.0", False, "HALF", (1,))]


def test_the_table_of_a_stage_has_its_layers_and_what_it_reads() -> None:
    first, last = (bind(of_stage(number), stages(), Place(number, 1, 2)) for number in range(2))
    assert [cache.input for cache in first.caches] == ["key_cache.0", "value_cache.0"]
    assert [cache.input for cache in last.caches] == ["key_cache.1", "value_cache.1"]
    assert (first.has_logits, first.sent, last.has_logits, last.sent) == (False, ("sent.0",), True, ())
    assert set(STEP_INPUTS) - first.step.keys() == {"logits_index"}
    assert set(STEP_INPUTS) - last.step.keys() == {"position_ids"}


@pytest.mark.parametrize(
    ("number", "tensors", "message"),
    [
        (0, of_stage(1), r"it lacks input key_cache\.0"),
        (1, of_stage(0), r"it lacks input logits_index"),
        (0, of_stage(0)[:-1], r"it lacks output sent\.0, HALF \[1\]"),
        (1, [*of_stage(1), of_stage(0)[-1]], r"it has sent\.0, which the model does not"),
        (1, tensors(), r"it has key_cache\.0, .*, which the model does not"),
    ],
)
def test_an_engine_of_another_stage_is_refused(number: int, tensors: list[Tensor], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        bind(tensors, stages(), Place(number, 1, 2))


# Steps.


@pytest.mark.parametrize(
    ("most", "expected"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (64, (1, 2, 4, 8, 16, 32, 64))]
)
def test_buckets(most: int, expected: tuple[int, ...]) -> None:
    assert buckets(most) == expected


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (batch([5], [1]), 1),
        (batch([5, 0, 70], [1, 1, 1]), 4),
        (batch([5] * 5, [1] * 5), 6),
        (batch([5, 0], [1, 2]), None),
        (batch([5, 4], [1, 1], wants=[0]), None),
        (batch([5] * 7, [1] * 7), None),
    ],
)
def test_which_steps_are_decode_steps(step: Batch, expected: int | None) -> None:
    assert bucket_of(step, buckets(6)) == expected


def filled(step: Batch, bucket: int | None) -> dict[str, np.ndarray]:
    arrays = {name: np.full(size, -7, np.int32) for name, size in room(64, 8, 256).items()}
    lengths = fill(step, bucket, arrays)
    for name, length in lengths.items():
        assert (arrays[name][length:] == -7).all()
    return {name: arrays[name][:length] for name, length in lengths.items()}


def test_a_padded_step_holds_the_step_and_harmless_rows() -> None:
    step = batch([5, 40, 0], [1, 1, 1])
    got = filled(step, 8)
    assert {name: len(array) for name, array in got.items()} == {
        "input_ids": 8, "position_ids": 8, "query_start": 9, "past_lengths": 8, "block_indices": 4,
        "block_begins": 9, "logits_index": 8,
    }  # fmt: skip
    for name, array in got.items():
        assert (array[: len(getattr(step, name))] == getattr(step, name)).all()
    assert got["query_start"].tolist() == [0, 1, 2, 3, 3, 3, 3, 3, 3]
    assert got["block_begins"].tolist() == [0, 1, 3, 4, 4, 4, 4, 4, 4]
    assert got["input_ids"][3:].tolist() == got["position_ids"][3:].tolist() == [0] * 5
    assert got["past_lengths"][3:].tolist() == got["logits_index"][3:].tolist() == [0] * 5


def test_a_step_without_logits_asks_for_one() -> None:
    got = filled(batch([0], [9], wants=[]), None)
    assert got["logits_index"].tolist() == [0]
    assert len(got["input_ids"]) == 9


def test_a_step_beyond_the_engine() -> None:
    with pytest.raises(BackendError, match=r"the step needs 65 elements of input_ids, .* for 64"):
        filled(batch([0], [65]), None)


# The copy of a step to the GPU.


class FakeCuda:
    """Memory of the host, and the copies that were started."""

    def __init__(self) -> None:
        self.copies: list[tuple[np.ndarray, int]] = []

    def pinned(self, nbytes: int) -> np.ndarray:
        return np.full(nbytes, 255, np.uint8)

    def allocate(self, nbytes: int) -> int:
        return 1 << 20

    def upload(self, source: np.ndarray, target: int) -> None:
        self.copies.append((source.copy(), target))


@pytest.mark.skipif(no_cuda_python, reason="cuda-python is not installed")
@pytest.mark.parametrize("bucket", [None, 4])
def test_one_copy_takes_a_step_to_the_gpu(bucket: int | None) -> None:
    from llmc.runtime.backends.tensorrt.step_arrays import StepArrays

    cuda: Any = FakeCuda()
    most = room(64, 6, MAX_LEN)
    arrays = StepArrays(cuda, most)
    step = batch([70, 31, 5], [1, 1, 1] if bucket else [1, 40, 3])
    lengths = arrays.upload(step, bucket)
    ((copied, target),) = cuda.copies
    for name, address in arrays.addresses.items():
        assert address % 256 == 0
        begin = address - target
        end = begin + 4 * lengths[name]
        assert end <= len(copied)
        values = getattr(step, name)
        np.testing.assert_array_equal(copied[begin:end].view(np.int32)[: len(values)], values)
    # Only the used part of the longest array is copied.
    assert len(copied) == arrays.addresses["block_indices"] - target + 4 * len(step.block_indices)
    assert len(copied) < 4 * most["block_indices"] + 2048
    spans = sorted((arrays.addresses[name], 4 * size) for name, size in most.items())
    assert all(a + size <= b for (a, size), (b, _) in pairwise(spans))
