"""Running a TensorRT engine: everything but TensorRT's own execution is tested here, without a GPU.

Checks, sizes, bindings and padding are functions. For the rest, `test_steps_on_a_stand_in_for_the_gpu`
starts this file as a script with a stand-in for the NVIDIA driver (`_DRIVER`, memory of the host, compiled
by cc): the real cuda-python calls it, the real plugin and launcher put kernels on its stream, Triton's
interpreter runs them, graphs are recorded and replayed. Only the engine between the attention layers is
numpy. What that cannot show: that TensorRT and the GPU do as they say. Tests marked gpu are for that.
"""

from __future__ import annotations

import ast
import ctypes
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llmc.plugins.paged_attention import launch, reference, spec
from llmc.plugins.paged_attention.launch import Attention
from llmc.plugins.paged_attention.tensorrt_plugin import launching, make_plugin
from llmc.plugins.sampling import launch as sampling
from llmc.runtime.backends import load_gpu_backend, tensorrt_checks, tensorrt_sizes
from llmc.runtime.backends.tensorrt_bindings import Tensor, bind
from llmc.runtime.backends.tensorrt_checks import (
    Device,
    Step,
    choose_kernels,
    choose_sampling_kernels,
    cuda_of_ptx,
    faults,
    hint,
)
from llmc.runtime.backends.tensorrt_step import bucket_of, buckets, fill, room
from llmc.runtime.batch import Batch
from llmc.runtime.bundle.manifest import (
    Engine,
    FileRecord,
    Geometry,
    Gpu,
    KernelFile,
    Layer,
    Limits,
    Manifest,
    Operator,
    Precision,
    Producer,
    Source,
    Target,
    Tokens,
    Verification,
    Weights,
)
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.engine import Engine as ServingEngine
from llmc.runtime.errors import BackendError, RequestError
from llmc.runtime.sampling import SamplingParams

no_cuda_python = find_spec("cuda") is None
no_tensorrt = find_spec("tensorrt_rtx") is None
needs_packages = pytest.mark.skipif(
    no_cuda_python or no_tensorrt, reason="cuda-python or tensorrt-rtx is not installed"
)
SHA = "0" * 64
PLAN, PLAN_BYTES = "engines/rank0/rank0.plan", b"vtrt" + bytes(60)
VERSIONS = {"tensorrt-rtx": "1.7.1.116", "cuda-python": "13.4.4"}
STEP = Step(max_tokens=512, max_sequences=16)
L40 = Device("NVIDIA L40", 89, (13, 4), 142, 101376)

# A model of two layers, one of them with a sliding window.
HEADS, KV_HEADS, D, DV, VOCAB, MAX_LEN, WINDOW = 4, 2, 32, 16, 53, 1100, 40
LAYERS = (
    Layer("full", 0, KV_HEADS, D, DV),
    Layer("sliding", WINDOW, KV_HEADS, D, DV),
)
ATTENTION = [Attention(HEADS, KV_HEADS, D, DV, layer.window) for layer in LAYERS]
# (key_scale, value_scale) of FP8 caches; None: fp16. Set for the script that steps on a stand-in.
KV_SCALES = (0.03, 0.02) if os.environ.get("LLMC_TEST_FP8_CACHE") else None
CACHE = np.dtype(ml_dtypes.float8_e4m3fn if KV_SCALES else np.float16)
PAIR = ("fp16", launch.FP8 if KV_SCALES else None)
VARIANTS = [str(v) for v in launch.variants_for(ATTENTION, [PAIR])]


def kernel(variant: str, sm: int, kind: Any = "cubin", shared_memory: int = 20000) -> KernelFile:
    name = variant.split("-")[0]
    return KernelFile(variant, sm, kind, f"kernels/{variant}-sm{sm}.{kind}", name, shared_memory, 4, 90)


def kernels(*kinds: tuple[int, str]) -> tuple[KernelFile, ...]:
    return tuple(kernel(variant, sm, kind) for sm, kind in kinds for variant in VARIANTS)


def sampling_kernels(*kinds: tuple[int, str]) -> tuple[KernelFile, ...]:
    made = [kernel(sampling.variant(name), sm, kind, 64) for sm, kind in kinds for name in sampling.ARGUMENTS]
    return tuple(replace(k, num_warps=sampling.configure(k.entry).num_warps) for k in made)


def manifest(**changes: Any) -> Manifest:
    files = kernels((89, "cubin"), (80, "ptx"))
    made = Manifest(
        producer=Producer("0.1.0", {}),
        source=Source("somebody/model", "llama", "LlamaForCausalLM", SHA, "bfloat16", {}),
        geometry=Geometry(len(LAYERS), HEADS, KV_HEADS, D, DV, 64, VOCAB, LAYERS),
        limits=Limits(MAX_LEN),
        precision=Precision("fp16", "fp8" if KV_SCALES else "fp16"),
        target=Target("tensorrt-rtx", "tensorrt-rtx", "", {"tensorrt-rtx": "1.7.1.116"}),
        operators=(Operator("llmc.PagedAttention", spec.ABI_VERSION, len(LAYERS)),),
        tokens=Tokens(None, (0,)),
        passes=(),
        verification=Verification("skipped", "a test"),
        engines=(Engine(0, PLAN),),
        weights=Weights((), 0, "fp16"),
        files={
            PLAN: FileRecord(len(PLAN_BYTES), SHA),
            **{f.file: FileRecord(7, SHA) for f in files},
        },
        gpu=Gpu((), 512, 16, 32, files),
        format_version=2,
    )
    return replace(made, **changes)


def gpu_changes(**changes: Any) -> dict[str, Any]:
    gpu = manifest().gpu
    assert gpu is not None
    return {"gpu": replace(gpu, **changes)}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """What a bundle of `manifest()` holds."""
    for name in manifest().files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(PLAN_BYTES if name == PLAN else b"\n.version 8.8\n")
    return tmp_path


# Checks.


def test_nothing_is_wrong_with_a_bundle_for_this_machine(directory: Path) -> None:
    manifest().to_json()  # a manifest that can be written
    assert faults(manifest(), directory, L40, VERSIONS, STEP) == []


@pytest.mark.parametrize(
    ("changes", "device", "versions", "step", "expected"),
    [
        ({}, "there is no GPU: cuInit", VERSIONS, STEP, "there is no GPU: cuInit"),
        ({}, replace(L40, sm=90), VERSIONS, STEP, "no code for data-centre Hopper, the target tensorrt has"),
        ({}, replace(L40, sm=75), VERSIONS, STEP, "SM75, the engine is for SM80 and newer"),
        (
            gpu_changes(compute_capabilities=(86, 120)), L40, VERSIONS, STEP,
            "is SM89, the engine is for SM86, SM120",
        ),
        (gpu_changes(kernels=()), L40, VERSIONS, STEP, "attention kernels for SM89: it has none"),
        (
            gpu_changes(kernels=kernels((120, "cubin"), (120, "ptx"))), L40, VERSIONS, STEP,
            "kernels for SM89: cubin for SM120, ptx for SM120",
        ),
        (
            {}, replace(L40, cuda=(12, 9)), VERSIONS, STEP,
            "knows CUDA 12.9, the engine and its kernels need 13.0",
        ),
        (
            {}, L40, {**VERSIONS, "tensorrt-rtx": None}, STEP,
            "tensorrt-rtx is not installed (pip install tensorrt-rtx==1.7.1.116)",
        ),
        (
            {}, L40, {**VERSIONS, "tensorrt-rtx": "1.6.0"}, STEP,
            "tensorrt-rtx is 1.6.0, the engine needs 1.7.1.116",
        ),
        ({}, L40, {**VERSIONS, "cuda-python": None}, STEP, "cuda-python is not installed (pip install"),
        (
            {"operators": (Operator("llmc.PagedAttention", 9, 2),)}, L40, VERSIONS, STEP,
            "llmc.PagedAttention at ABI 9, this llmc has llmc.PagedAttention at ABI 1",
        ),
        ({}, L40, VERSIONS, Step(513, 16), "steps of 513 tokens are asked for, the engine takes 512"),
        ({}, L40, VERSIONS, Step(512, 17), "17 sequences at once are asked for, the engine takes 16"),
    ],
)  # fmt: skip
def test_each_reason_is_named(
    changes: dict[str, Any], device: Device | str, versions: Any, step: Step, expected: str, directory: Path
) -> None:
    found = faults(manifest(**changes), directory, device, versions, step)
    assert len([reason for reason in found if expected in reason]) == 1, found
    assert all("no complete set of attention kernels" in reason for reason in found if expected not in reason)


def test_all_reasons_are_told_together(directory: Path) -> None:
    (directory / PLAN).write_bytes(b"ftrt")
    (directory / kernels((89, "cubin"))[0].file).unlink()
    device = replace(L40, cuda=(12, 0))
    found = faults(manifest(), directory, device, {"tensorrt-rtx": None, "cuda-python": None}, Step(513, 17))
    expected = (
        "tensorrt-rtx is not",
        "cuda-python is not",
        "cannot be read",
        "CUDA 12.0",
        "4 of its 64",
        "513",
        "17 seq",
    )
    assert all(any(part in reason for reason in found) for part in expected), found
    assert len(found) == len(expected)


def test_an_engine_file_of_something_else(directory: Path) -> None:
    (directory / PLAN).write_bytes(b"PK\3\4" + bytes(60))
    assert faults(manifest(), directory, L40, VERSIONS, STEP) == [
        f"{PLAN} is no engine of tensorrt-rtx: it begins with b'PK\\x03\\x04'"
    ]


def test_ptx_newer_than_the_driver(directory: Path) -> None:
    for file in kernels((80, "ptx")):
        (directory / file.file).write_bytes(b"//\n// Generated by LLVM\n//\n\n.version 9.4\n.target sm_80\n")
    ada, ampere = replace(L40, cuda=(13, 0)), replace(L40, sm=86, cuda=(13, 0))
    assert faults(manifest(), directory, ada, VERSIONS, STEP) == []  # its cubins do
    (reason,) = faults(manifest(), directory, ampere, VERSIONS, STEP)
    assert "knows CUDA 13.0, the engine and its kernels need 13.4" in reason


def test_the_hint_is_the_command_to_build_with() -> None:
    command = "llmc build somebody/model --target"
    assert hint(manifest(), L40).endswith(f"{command} tensorrt-rtx --sm 89")
    assert hint(manifest(), replace(L40, sm=90)).endswith(f"{command} tensorrt --sm 90")
    assert "--target cpu" in hint(manifest(), "no GPU")


@pytest.mark.parametrize(
    ("available", "sm", "expected"),
    [
        ([(80, "cubin"), (89, "cubin"), (89, "ptx")], 89, (89, "cubin")),
        ([(80, "cubin"), (80, "ptx")], 86, (80, "ptx")),
        ([(80, "ptx"), (86, "ptx"), (89, "ptx")], 120, (89, "ptx")),
        ([(80, "ptx"), (86, "ptx"), (89, "ptx")], 86, (86, "ptx")),
        ([(80, "cubin"), (86, "cubin")], 89, None),  # a cubin is for one SM
        ([(89, "ptx")], 86, None),
        ([(120, "ptx")], 121, None),  # that is PTX for sm_120a
        ([(120, "ptx")], 120, (120, "ptx")),
    ],
)
def test_kernels_for_a_gpu(available: Any, sm: int, expected: tuple[int, str] | None) -> None:
    chosen = choose_kernels(kernels(*available), replace(L40, sm=sm))
    assert {(k.sm, k.kind) for k in chosen} == ({expected} if expected else set())
    assert [k.variant for k in chosen] == (VARIANTS if expected else [])


def test_kernels_that_lack_a_variant_or_want_too_much_are_passed_over() -> None:
    whole = kernels((89, "cubin"), (80, "ptx"))
    assert {k.kind for k in choose_kernels(whole[1:], L40)} == {"ptx"}
    greedy = (replace(whole[0], shared_memory=L40.shared_memory + 1), *whole[1:])
    assert {k.kind for k in choose_kernels(greedy, L40)} == {"ptx"}
    assert choose_kernels((), L40) == ()


def test_sampling_kernels_are_chosen_apart() -> None:
    """A bundle without them runs; so does one with those of another llmc, which are left alone."""
    attention, ours = kernels((89, "cubin"), (80, "ptx")), sampling_kernels((89, "cubin"), (80, "ptx"))
    theirs = tuple(replace(k, variant=k.variant.replace("abi1", "abi2")) for k in ours)
    for others in ((), ours[1:4], theirs, ours[5:]):
        assert choose_sampling_kernels((*attention, *others), L40) == ()
        assert choose_kernels((*attention, *others), L40) == choose_kernels(attention, L40)
    assert choose_sampling_kernels((*attention, *ours, *theirs), L40) == ours[:4]
    assert choose_sampling_kernels((*attention, *ours[1:]), replace(L40, sm=86)) == ours[4:]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (b"//\n.version 9.4\n", (13, 4)),
        (b".version 9.0\n", (13, 0)),
        (b".version 8.8\n", (0, 0)),
        (b"\x7fELF", (0, 0)),
    ],
)
def test_what_ptx_asks_of_the_driver(text: bytes, version: tuple[int, int]) -> None:
    assert cuda_of_ptx(text) == version


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("sm", "target"), [(80, "sm_80"), (120, "sm_120a")])
def test_only_ptx_before_sm90_is_for_newer_gpus(sm: int, target: str, tmp_path: Path) -> None:
    """What `choose_kernels` takes for granted, of the PTX that bundles carry."""
    from llmc.plugins.paged_attention.compile_kernels import compile_variant

    made = compile_variant(launch.variant("reduce", ATTENTION[0], "fp16"), sm, tmp_path)
    assert f"\n.target {target}\n".encode() in made.ptx
    assert cuda_of_ptx(made.ptx[:4096]) <= (13, 4)


# Sizes.

GIB = 1 << 30


def blocks(**changes: Any) -> int:
    given: dict[str, Any] = {"free": 20 * GIB, "total": 24 * GIB, "kv_memory": None}
    given |= {"useful": 10**9, "most": 10**9}
    return tensorrt_sizes.cache_blocks(1 << 20, **{**given, **changes})


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
    most = tensorrt_sizes.scratch_bytes(manifest().geometry, 16, MAX_LEN, "fp16", 89, 142)
    # 16 sequences with 2 kv heads could have 9 splits on 142 multiprocessors, but a context of 1100 has room
    # for 4 shares of 256 keys; so they have most: 16 * 4 heads * 4 splits * (16 + 1 + 1).
    assert most == 16 * HEADS * 4 * (DV + 2) * 4
    assert tensorrt_sizes.scratch_bytes(manifest().geometry, 16, 256, "fp16", 89, 142) == 0


# The bindings table.


def tensors(cache: str = "FP8" if KV_SCALES else "HALF") -> list[Tensor]:
    """What TensorRT says of a well-built engine, with caches of that dtype."""
    most = {"input_ids": 512, "position_ids": 512, "query_start": 17, "past_lengths": 16, "block_begins": 17}
    most |= {"block_indices": 16 * 35, "logits_index": 32}
    made = [Tensor(name, True, "INT32", (-1,), (size,)) for name, size in most.items()]
    for i in range(len(LAYERS)):
        for kind, width in (("key", D), ("value", DV)):
            shape = (-1, KV_HEADS, 32, width)
            made.append(Tensor(f"{kind}_cache.{i}", True, cache, shape, (1000 + width, *shape[1:])))
            made.append(Tensor(f"{kind}_cache_out.{i}", False, cache, shape))
    return [*made, Tensor("logits", False, "FLOAT", (-1, VOCAB))]


def test_the_table_covers_every_tensor_once() -> None:
    table = bind(tensors(), manifest())
    caches = {name for cache in table.caches for name in (cache.input, cache.output)}
    assert {*table.step, *caches, "logits"} == {tensor.name for tensor in tensors()}
    assert set(table.step) == {field.name for field in fields(Batch)}
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


# Steps.


def batch(past: Sequence[int], new: Sequence[int], wants: Sequence[int] | None = None) -> Batch:
    """A step with made-up contents; block tables hold consecutive numbers."""
    ends = np.cumsum(new)
    need = [-(-(p + n) // 32) for p, n in zip(past, new, strict=True)]
    arrays = (
        np.arange(100, 100 + sum(new)),
        [p + i for p, n in zip(past, new, strict=True) for i in range(n)],
        [0, *ends],
        past,
        range(1, 1 + sum(need)),
        np.cumsum([0, *need]),
        ends - 1 if wants is None else wants,
    )
    return Batch(*(np.array(list(values), np.int32) for values in arrays))


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
    with pytest.raises(BackendError, match="the step has 65 input_ids, the engine was loaded for 64"):
        filled(batch([0], [65]), None)


# Plugin and launcher.


@pytest.fixture(scope="module")
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx")


def make_layer(trt: Any, attention: Attention, scale: float) -> Any:
    """A plugin as an engine holds it."""
    values = {name: getattr(attention, name) for name in ("num_heads", "num_kv_heads", "window", "softcap")}
    given = trt.PluginFieldCollection([])
    kinds = {int: (np.int32, trt.PluginFieldType.INT32), float: (np.float32, trt.PluginFieldType.FLOAT32)}
    arrays = []
    values |= dict(zip(("key_scale", "value_scale"), KV_SCALES or (), strict=False))
    for name, value in {**values, "scale": scale}.items():
        dtype, kind = kinds[type(value)]
        arrays.append(np.array([value], dtype))
        given.append(trt.PluginField(name, arrays[-1], kind))
    creator = make_plugin(trt)
    plugin = creator.create_plugin("layer", given, trt.TensorRTPhase.RUNTIME)
    return plugin.attach_to_context(None), creator


def described(
    trt: Any, tokens: int, sequences: int, blocks: int, entries: int, fp8: bool = KV_SCALES is not None
) -> list[Any]:
    shapes = [(tokens, HEADS * D), (tokens, KV_HEADS * D), (tokens, KV_HEADS * DV)]
    shapes += [(blocks, KV_HEADS, 32, D), (blocks, KV_HEADS, 32, DV)]
    shapes += [(sequences + 1,), (sequences,), (entries,), (sequences + 1,)]
    made = []
    for shape in shapes:
        desc = trt.PluginTensorDesc()
        desc.dims, desc.type = trt.Dims(shape), trt.DataType.INT32 if len(shape) == 1 else trt.DataType.HALF
        if fp8 and len(shape) == 4:
            desc.type = trt.DataType.FP8
        made.append(desc)
    return made


INPUTS = [16 * n for n in range(1, 10)]
NAMES = ["query", "key", "value", "key_cache", "value_cache"]
NAMES += ["query_start", "past_lengths", "block_indices", "block_begins"]
TENSORS = {**dict(zip(NAMES, INPUTS, strict=True)), "output": 800}


class Recorder:
    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.error = error

    def launch(self, *arguments: Any) -> None:
        self.calls.append(arguments)
        if self.error:
            raise self.error


def test_a_plugin_launches_what_its_tensors_say(trt: Any) -> None:
    plugin, _creator = make_layer(trt, ATTENTION[1], 0.25)
    recorder = Recorder()
    with launching(recorder):
        plugin.enqueue(described(trt, 8, 3, 99, 7), [], INPUTS, [800, *INPUTS[3:5]], 0, 5)
        plugin.enqueue(described(trt, 8, 3, 99, 7, fp8=True), [], INPUTS, [800, *INPUTS[3:5]], 0, 5)
    call = (ATTENTION[1], "fp16", 0.25, TENSORS, 8, 3, 5)
    assert recorder.calls == [(*call, None), (*call, (1.0, 1.0))]
    with pytest.raises(RuntimeError, match="cannot launch"):
        plugin.enqueue(described(trt, 8, 3, 99, 7), [], INPUTS, [800, *INPUTS[3:5]], 0, 5)


def test_a_copied_cache_is_an_error_not_a_wrong_answer(trt: Any) -> None:
    plugin, _creator = make_layer(trt, ATTENTION[0], 0.25)
    with pytest.raises(RuntimeError, match="a copy of value_cache"), launching(Recorder()):
        plugin.enqueue(described(trt, 8, 3, 99, 7), [], INPUTS, [800, INPUTS[3], 16 * 77], 0, 5)


def test_what_a_plugin_raises_is_not_lost_in_tensorrt(trt: Any) -> None:
    plugin, _creator = make_layer(trt, ATTENTION[0], 0.25)
    recorder = Recorder(ValueError("first"))

    def engine() -> None:  # TensorRT swallows what plugins raise, and reports a failure of its own
        try:
            plugin.enqueue(described(trt, 8, 3, 99, 7), [], INPUTS, [800, *INPUTS[3:5]], 0, 5)
        except ValueError:
            raise BackendError("execute_async_v3 failed", "") from None

    with pytest.raises(ValueError, match="first"), launching(recorder):
        engine()


@needs_packages
class TestLauncher:
    class Kernels:
        def __init__(self) -> None:
            self.launches: list[tuple[str, tuple[int, int, int], dict[str, Any]]] = []
            self.variants: list[str] = []

        def launch(self, what: launch.Launch, arguments: dict[str, Any], stream: int) -> None:
            self.launches.append((what.variant.kernel, what.grid, dict(arguments)))
            self.variants.append(str(what.variant))

    def launcher(self, scratch_bytes: int = 1 << 30) -> tuple[Any, Kernels]:
        from llmc.plugins.paged_attention.cuda_kernels import AttentionLauncher

        kernels = self.Kernels()
        return AttentionLauncher(kernels, 89, 142, 1 << 20, scratch_bytes), kernels  # type: ignore[arg-type]

    def test_a_graph_of_the_longest_decode_covers_every_step(self) -> None:
        """Grids and splits of the captured step are at least those that any step of the bucket needs."""
        launcher, kernels = self.launcher()
        launcher.begin(*tensorrt_sizes.longest_decode(4, MAX_LEN))
        launcher.launch(ATTENTION[0], "fp16", 1.0, TENSORS, 4, 4, 0)
        captured = {kernel: grid for kernel, grid, _ in kernels.launches}
        assert captured == {"write_kv": (4, 1, 1), "decode": (4, 2, 4), "reduce": (4, 4, 1)}
        for past in ([0], [255, 3], [MAX_LEN - 1] * 4, [600, 0, 1]):
            kernels.launches.clear()
            start = np.minimum(np.arange(5), len(past)).astype(np.int32)
            launcher.begin(start, np.array([*past, 0, 0, 0][:4], np.int32))
            launcher.launch(ATTENTION[0], "fp16", 1.0, TENSORS, 4, 4, 0)
            for kernel, grid, _ in kernels.launches:
                assert all(a <= b for a, b in zip(grid, captured[kernel], strict=True))

    def test_layers_of_a_kind_share_a_plan_and_scratch(self) -> None:
        launcher, kernels = self.launcher()
        launcher.begin(*tensorrt_sizes.longest_decode(2, MAX_LEN))
        for attention in (*ATTENTION, *ATTENTION):
            launcher.launch(attention, "fp16", 0.5, TENSORS, 2, 2, 0)
        per_layer = [
            ["write_kv", "decode", "reduce"],
            ["write_kv", "decode"],
        ] * 2  # a window of 40: no splits
        assert [kernel for kernel, _, _ in kernels.launches] == list(chain(*per_layer))
        reduce = kernels.launches[2][2]
        rows = 2 * HEADS * reduce["num_splits"] * 4
        assert reduce["partial_sums"] == 1 << 20
        assert reduce["partial_top"] == (1 << 20) + rows * DV
        assert reduce["partial_total"] == (1 << 20) + rows * (DV + 1)

    def test_each_layers_cache_decides_the_kernels_and_their_scales(self) -> None:
        launcher, kernels = self.launcher()
        launcher.begin(np.array([0, 3, 4], np.int32), np.array([0, 9], np.int32))
        for scales in (None, (0.5, 0.25), (0.125, 2.0)):
            launcher.launch(ATTENTION[0], "fp16", 1.0, TENSORS, 4, 2, 0, scales)
        tails = [f"fp16{cache}-h2x{g}d32v16" for cache in ("", "-fp8kv", "-fp8kv") for g in (1, 2, 2)]
        names = ["write_kv", "prefill", "decode"] * 3
        assert kernels.variants == [f"{name}-{tail}" for name, tail in zip(names, tails, strict=True)]
        given = [(arguments["k_scale"], arguments["v_scale"]) for _, _, arguments in kernels.launches]
        assert given == [(1.0, 1.0)] * 3 + [(0.5, 0.25)] * 3 + [(0.125, 2.0)] * 3

    @pytest.mark.parametrize("scratch", [0, 500, 5000, 20000, 10**6])
    def test_little_scratch_means_fewer_splits(self, scratch: int) -> None:
        launcher, kernels = self.launcher(scratch)
        past = np.array([1000, *[0] * 9], np.int32)  # one long decode among prompts
        launcher.begin(np.array([0, *range(1, 20, 2)], np.int32), past)
        launcher.launch(ATTENTION[0], "fp16", 1.0, TENSORS, 19, 10, 0)
        splits = next(grid[2] for kernel, grid, _ in kernels.launches if kernel == "decode")
        per_split = 10 * HEADS * (DV + 2) * 4
        assert splits == max(1, min(3, scratch // per_split)) or splits == max(1, scratch // per_split - 1)
        assert splits == 1 or splits * per_split <= scratch

    def test_tensors_of_another_step_are_refused(self) -> None:
        launcher, kernels = self.launcher()
        launcher.begin(np.array([0, 3, 4], np.int32), np.array([0, 9], np.int32))
        for tokens, sequences in ((3, 2), (4, 3)):
            with pytest.raises(ValueError, match="a step of 4 tokens, 2 sequences does not fit"):
                launcher.launch(ATTENTION[0], "fp16", 1.0, TENSORS, tokens, sequences, 0)
        with pytest.raises(ValueError, match="value does not begin at a multiple of 16"):
            launcher.launch(ATTENTION[0], "fp16", 1.0, {**TENSORS, "value": 40}, 4, 2, 0)
        assert not kernels.launches


# The real packages.


def attributes_of(path: Path, objects: dict[str, Any]) -> dict[str, list[str]]:
    """Dotted names in a source file that begin with one of `objects`, as (object, attributes)."""
    found: dict[str, list[str]] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Attribute) or node.attr.startswith("_"):
            continue
        if (owner := ast.unparse(node.value)) in objects:
            found.setdefault(owner, []).append(node.attr)
    return found


@needs_packages
def test_every_call_exists_in_the_real_packages(trt: Any) -> None:
    """cuda-python and TensorRT have no type stubs: this is what mypy would check."""
    from cuda.bindings import driver

    from llmc.plugins.paged_attention import cuda_kernels
    from llmc.runtime.backends import cuda, tensorrt_engine

    checked = 0
    for module in (cuda_kernels, cuda):
        objects = {
            "driver": driver,
            "attributes": driver.CUdevice_attribute,
            "driver.CUresult": driver.CUresult,
        }
        objects |= {
            name: getattr(driver, name.split(".")[1])
            for name in ("driver.CUfunction_attribute", "driver.CUstream_flags", "driver.CUstreamCaptureMode")
        }
        for owner, names in attributes_of(Path(module.__file__ or ""), objects).items():
            for name in names:
                assert hasattr(objects[owner], name), f"{owner}.{name}"
                checked += 1
    objects = {
        "trt": trt, "self._trt": trt, "engine": trt.ICudaEngine, "self._engine": trt.ICudaEngine,
        "config": trt.IRuntimeConfig, "self._context": trt.IExecutionContext, "self._runtime": trt.Runtime,
        "trt.ExecutionContextAllocationStrategy": trt.ExecutionContextAllocationStrategy,
        "strategies": trt.DynamicShapesKernelSpecializationStrategy, "trt.ILogger": trt.ILogger,
        "trt.TensorLocation": trt.TensorLocation, "trt.TensorIOMode": trt.TensorIOMode,
    }  # fmt: skip
    for owner, names in attributes_of(Path(tensorrt_engine.__file__ or ""), objects).items():
        for name in names:
            assert hasattr(objects[owner], name), f"{owner}.{name}"
            checked += 1
    assert hasattr(trt.IExecutionContext, "is_stream_capturable")
    assert checked > 50


@needs_packages
def test_a_machine_without_a_gpu_says_so(directory: Path) -> None:
    from llmc.plugins.paged_attention.cuda_kernels import CudaError
    from llmc.runtime.backends.cuda import probe

    try:
        probe()
    except CudaError:
        pass
    else:
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendError, match=r"^test_\w+ cannot run here: there is no GPU: cuInit: ") as error:
        load_gpu_backend(
            Bundle(directory.rename(directory.with_name("test_bundle")), manifest()),
            kv_memory=None, max_sequences=4, max_batch_tokens=64,
        )  # fmt: skip
    assert "--target cpu" in error.value.hint


@needs_packages
def test_an_engine_that_does_not_load_is_a_plain_error(directory: Path) -> None:
    """Here for want of a GPU; a damaged file ends the same way."""
    from llmc.runtime.backends.tensorrt_engine import LoadedEngine

    with pytest.raises(BackendError, match=r"TensorRT 1\.7\.1\.\d+ cannot load rank0\.plan: .*Error Code"):
        LoadedEngine("tensorrt_rtx", directory / PLAN)


# Steps on a stand-in for the GPU.

_DRIVER = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
typedef int R; typedef uint64_t U;
static U (*event)(const char *, U, U, U);
void stand_in(void *f) { event = f; }
#define SAY(name, a, b, c) (R)event(name, (U)(a), (U)(b), (U)(c))
static U room(U n) { return (n + 511) / 512 * 512; }
R cuInit(unsigned f) { return 0; }
R cuDeviceGet(int *d, int o) { *d = o; return 0; }
R cuDriverGetVersion(int *v) { *v = 13040; return 0; }
R cuDeviceGetName(char *n, int l, int d) { strncpy(n, "stand-in", l); return 0; }
R cuDeviceGetAttribute(int *v, int a, int d) {
  *v = a == 75 ? 8 : a == 76 ? 9 : a == 16 ? 8 : a == 97 ? 101376 : -1; return 0; }
R cuDevicePrimaryCtxRetain(U *c, int d) { *c = 17; return SAY("retain", 0, 0, 0); }
R cuDevicePrimaryCtxRelease(int d) { return SAY("release", 0, 0, 0); }
R cuCtxSetCurrent(U c) { return c == 17 ? 0 : 201; }
R cuStreamCreate(U *s, unsigned f) { *s = 34; return f == 1 ? SAY("stream", 0, 0, 0) : 1; }
R cuStreamDestroy(U s) { return SAY("drop stream", s, 0, 0); }
R cuStreamSynchronize(U s) { return SAY("wait", s, 0, 0); }
R cuMemGetInfo(U *f, U *t) { *f = (U)1 << 33; *t = (U)1 << 34; return 0; }
R cuMemAlloc(U *p, U n) { *p = (U)aligned_alloc(512, room(n)); memset((void *)*p, 255, n);
  return SAY("allocate", *p, n, 0); }
R cuMemFree(U p) { R r = SAY("free", p, 0, 0); free((void *)p); return r; }
R cuMemHostAlloc(U *p, U n, unsigned f) {
  *p = (U)aligned_alloc(512, room(n)); return SAY("pin", *p, n, 0); }
R cuMemFreeHost(U p) { R r = SAY("unpin", p, 0, 0); free((void *)p); return r; }
R cuMemcpyHtoDAsync(U d, const void *s, U n, U st) {
  memcpy((void *)d, s, n); return SAY("upload", d, n, st); }
R cuMemcpyDtoHAsync(void *d, U s, U n, U st) {
  memcpy(d, (void *)s, n); return SAY("download", s, n, st); }
R cuStreamBeginCapture(U s, int mode) { return mode == 1 ? SAY("begin capture", s, 0, 0) : 1; }
R cuStreamEndCapture(U s, U *g) { *g = 51; return SAY("end capture", s, 0, 0); }
R cuGraphInstantiateWithFlags(U *e, U g, U f) { *e = 0; return SAY("instantiate", e, g, f); }
R cuGraphDestroy(U g) { return 0; }
R cuGraphLaunch(U e, U s) { return SAY("replay", e, s, 0); }
R cuGraphExecDestroy(U e) { return SAY("drop graph", e, 0, 0); }
R cuModuleLoadData(U *m, const void *d) { *m = 0; return SAY("load", m, d, 0); }
R cuModuleUnload(U m) { return SAY("unload", m, 0, 0); }
R cuModuleGetFunction(U *f, U m, const char *n) { *f = m; return SAY("function", m, n, 0); }
R cuFuncSetAttribute(U f, int a, int v) { return SAY("attribute", f, a, v); }
R cuLaunchKernel(U f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                 unsigned shared, U s, void **parameters, void **extra) {
  U shape[8] = {gx, gy, gz, bx, by, bz, shared, s};
  return extra ? 1 : SAY("launch", f, shape, parameters); }
R cuGetErrorName(int e, const char **s) { *s = "CUDA_ERROR_STAND_IN"; return 0; }
R cuGetErrorString(int e, const char **s) { *s = "as it was told to"; return 0; }
static struct { const char *name; void *f; } table[] = { TABLE {0, 0}};
R cuGetProcAddress_v2(const char *name, void **f, int v, U flags, int *status) {
  *f = strcmp(name, "cuGetProcAddress") ? 0 : cuGetProcAddress_v2;
  for (int i = 0; table[i].name; i++) if (!strcmp(table[i].name, name)) *f = table[i].f;
  if (status) *status = !*f;
  return *f ? 0 : 500; }
R cuGetProcAddress(const char *name, void **f, int v, U flags) {
  return cuGetProcAddress_v2(name, f, v, flags, 0); }
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a libcuda.so.1 that is no NVIDIA driver."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("there is no C compiler for the stand-in")
    folder = tmp_path_factory.mktemp("driver")
    functions = [line[2:].split("(")[0] for line in _DRIVER.splitlines() if line.startswith("R cu")]
    table = " ".join(f'{{"{name}", {name}}},' for name in functions if "ProcAddress" not in name)
    (folder / "driver.c").write_text(_DRIVER.replace("TABLE", table))
    command = [
        compiler,
        "-shared",
        "-fPIC",
        "-w",
        "-o",
        str(folder / "libcuda.so.1"),
        str(folder / "driver.c"),
    ]
    subprocess.run(command, check=True)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="the stand-in is a Linux library")
@pytest.mark.skipif(
    find_spec("triton") is None or find_spec("torch") is None, reason="triton or torch is missing"
)
@needs_packages
@pytest.mark.slow
@pytest.mark.parametrize("graphs", ["graphs", "no graphs", "graphs, FP8 cache"])
def test_steps_on_a_stand_in_for_the_gpu(graphs: str, stand_in: Path, directory: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "LD_LIBRARY_PATH": str(stand_in)}
    if "FP8" in graphs:
        environment["LLMC_TEST_FP8_CACHE"] = "1"
    done = subprocess.run(
        [sys.executable, __file__, graphs, str(directory)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "as the reference says"


class StandIn:
    """What the stand-in driver does: keeps memory, runs kernels in Triton's interpreter, records graphs."""

    def __init__(self, fail: str = "") -> None:
        self.fail, self.log = fail, []
        self.memory: dict[int, int] = {}
        self.modules: dict[int, str] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.recording: list[Callable[[], None]] | None = None
        self._kind = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_char_p, *[ctypes.c_uint64] * 3)
        self._callback = self._kind(self.event)
        ctypes.CDLL("libcuda.so.1").stand_in(self._callback)
        self.variants: dict[str, Any] = {str(v): v for v in launch.variants_for(ATTENTION, [PAIR])}
        self.variants |= {sampling.variant(name): name for name in sampling.ARGUMENTS}
        self.downloads: list[int] = []  # bytes

    def event(self, name: bytes, a: int, b: int, c: int) -> int:
        try:
            self.log.append(what := name.decode())
            if what == self.fail:
                self.recording = None
                return 900
            getattr(self, "on_" + what.replace(" ", "_"), lambda *_: None)(a, b, c)
            return 0
        except BaseException as error:  # would be lost in C
            print(what, repr(error), file=sys.stderr)
            os._exit(1)

    def submit(self, work: Callable[[], None]) -> None:
        (work() if self.recording is None else self.recording.append(work))

    def on_allocate(self, address: int, size: int, _: int) -> None:
        self.memory[address] = size

    def on_free(self, address: int, *_: int) -> None:
        del self.memory[address]

    on_pin, on_unpin = on_allocate, on_free

    def on_upload(self, address: int, size: int, stream: int) -> None:
        assert stream == 34
        assert self.recording is None
        self.view(address, np.uint8, (size,))  # lies in allocated memory

    def on_download(self, address: int, size: int, stream: int) -> None:
        self.on_upload(address, size, stream)
        self.downloads.append(size)

    def on_load(self, place: int, data: int, _: int) -> None:
        self.modules[handle := len(self.modules) + 1000] = ctypes.string_at(data).decode()
        ctypes.c_uint64.from_address(place).value = handle

    def on_unload(self, handle: int, *_: int) -> None:
        del self.modules[handle]

    def on_function(self, handle: int, name: int, _: int) -> None:
        assert ctypes.string_at(name).decode() == self.modules[handle].split("-")[0]

    def on_begin_capture(self, *_: int) -> None:
        assert self.recording is None
        self.recording = []

    def on_end_capture(self, *_: int) -> None:
        self.finished, self.recording = self.recording, None

    def on_instantiate(self, place: int, *_: int) -> None:
        assert self.finished
        self.graphs[handle := len(self.log)] = self.finished
        ctypes.c_uint64.from_address(place).value = handle

    def on_replay(self, handle: int, stream: int, _: int) -> None:
        assert stream == 34
        for work in self.graphs[handle]:
            work()

    def on_drop_graph(self, handle: int, *_: int) -> None:
        del self.graphs[handle]

    def view(self, address: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Device memory. Whatever reaches past what was allocated is an error."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert any(start <= address and address + size <= start + n for start, n in self.memory.items())
        return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)

    def on_launch(self, function: int, shape: int, parameters: int) -> None:
        name = self.modules[function]
        variant = self.variants[name]
        *sizes, stream = (ctypes.c_uint64 * 8).from_address(shape)
        made = (*kernels((89, "cubin")), *sampling_kernels((89, "cubin")))
        file = next(k for k in made if k.variant == name)
        assert sizes[3:] == [32 * file.num_warps, 1, 1, file.shared_memory]
        assert stream == 34
        types = sampling.ARGUMENTS.get(variant) or launch.signature(variant)
        places = (ctypes.c_void_p * (len(types) + 2)).from_address(parameters)
        raw = [ctypes.string_at(place, 8) for place in places]
        assert raw[-2:] == [bytes(8)] * 2
        self.submit(
            lambda: self.run(variant, tuple(sizes[:3]), dict(zip(types.items(), raw[:-2], strict=True)))
        )

    def run(self, variant: Any, grid: tuple[int, ...], raw: dict[tuple[str, str], bytes]) -> None:
        import torch

        from llmc.plugins.paged_attention import kernels as attention_kernels
        from llmc.plugins.sampling import kernels as sampling_kernels

        arguments: dict[str, Any] = {}
        for (name, type_), data in raw.items():
            if not type_.startswith("*"):
                arguments[name] = np.frombuffer(data, {"i32": np.int32, "fp32": np.float32}[type_])[0].item()
                continue
            address = int.from_bytes(data, "little")
            dtype = {
                "*fp16": torch.float16, "*fp32": torch.float32, "*i32": torch.int32, "*i64": torch.int64,
                "*u8": torch.uint8,
            }[type_]  # fmt: skip
            if not address:
                arguments[name] = torch.full((1,), float("nan"))
                continue
            start, size = next((s, n) for s, n in self.memory.items() if s <= address < s + n)
            left = (start + size - address) // dtype.itemsize * dtype.itemsize
            arguments[name] = torch.frombuffer((ctypes.c_uint8 * left).from_address(address), dtype=dtype)
        if variant in sampling.ARGUMENTS:
            constants = sampling.configure(variant).constants
            getattr(sampling_kernels, variant)[grid](**arguments, **constants)
        else:
            constants = launch.configure(variant, 89).constants
            getattr(attention_kernels, variant.kernel)[grid](**arguments, **constants)


class Model:
    """Weights between the attention layers."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)

        def matrix(*shape: int) -> np.ndarray:
            return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

        self.table, self.head = matrix(VOCAB, 24) * 7, matrix(24, VOCAB)
        widths = (HEADS * D, KV_HEADS * D, KV_HEADS * DV)
        self.qkv = [[matrix(24, width) for width in widths] for _ in LAYERS]
        self.out = [matrix(HEADS * DV, 24) for _ in LAYERS]

    def embed(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return self.table[ids] + np.sin(positions[:, None] / np.arange(1, 25))

    def project(self, layer: int, x: np.ndarray) -> list[np.ndarray]:
        return [(x @ matrix).astype(np.float16) for matrix in self.qkv[layer]]


SCALE = 0.25
# A number near the middle between two codes may become either, where the layer before rounded otherwise.
STEP_OF_E4M3 = 2**-3
ATOL = 0.1 if KV_SCALES else 0.02


class ReferenceBackend:
    """The model in numpy, with caches of its own."""

    name, block_size = "reference", 32

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks, self.model = num_blocks, Model()
        sizes = [(num_blocks, KV_HEADS, 32, width) for width in (D, DV)]
        self.caches = [[np.full(size, np.nan, CACHE) for size in sizes] for _ in LAYERS]

    def forward(self, step: Batch) -> np.ndarray:
        x = self.model.embed(step.input_ids, step.position_ids)
        tables = (step.query_start, step.past_lengths, step.block_indices, step.block_begins)
        for i, layer in enumerate(LAYERS):
            settings: dict[str, Any] = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "window": layer.window}
            settings |= dict(zip(("key_scale", "value_scale"), KV_SCALES or (), strict=False))
            y = reference.paged_attention(
                *self.model.project(i, x), *self.caches[i], *tables, scale=SCALE, **settings
            )
            x = x + y.astype(np.float32) @ self.model.out[i]
        return (x[step.logits_index] @ self.model.head).astype(np.float32)


class StandInTensorRt:
    """TensorRT's module, but for the engine."""

    def __init__(self, real: Any, gpu: StandIn, capturable: bool) -> None:
        self._real, self.gpu, self.capturable = real, gpu, capturable

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def Runtime(self, log: Any) -> Any:
        del log
        return self

    def deserialize_cuda_engine(self, data: Any) -> Any:
        assert bytes(data) == PLAN_BYTES
        return StandInEngine(self)


class StandInEngine:
    """An engine of `Model`, seen as the backend sees one."""

    device_memory_size_v2 = 1 << 20

    def __init__(self, trt: StandInTensorRt) -> None:
        self.trt, self.model, self.contexts = trt, Model(), 0
        self.given = {tensor.name: tensor for tensor in tensors()}
        self.num_io_tensors = len(self.given)
        self.layers = [make_layer(trt._real, attention, SCALE) for attention in ATTENTION]

    def get_tensor_name(self, index: int) -> str:
        return list(self.given)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self.trt.TensorIOMode.INPUT if self.given[name].is_input else self.trt.TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        return self.trt.TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self.trt.DataType, self.given[name].dtype)

    def get_tensor_shape(self, name: str) -> Any:
        return self.trt.Dims(self.given[name].shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[Any]:
        assert self.given[name].is_input
        return [None, None, self.trt.Dims(self.given[name].most)]

    def create_runtime_config(self) -> Any:
        return StandInConfig()

    def create_execution_context(self, config: Any) -> Any:
        self.contexts += 1
        assert config.strategy == self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        assert config.cache == "one cache"
        return StandInContext(self, config)


class StandInConfig:
    dynamic_shapes_kernel_specialization_strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> str:
        return "one cache"

    def set_runtime_cache(self, cache: str) -> bool:
        self.cache = cache
        return True


class StandInContext:
    def __init__(self, engine: StandInEngine, config: StandInConfig) -> None:
        self.engine, self.gpu = engine, engine.trt.gpu
        kinds = engine.trt.DynamicShapesKernelSpecializationStrategy
        self.one_shape = config.dynamic_shapes_kernel_specialization_strategy == kinds.EAGER
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.seen: set[tuple[tuple[str, tuple[int, ...]], ...]] = set()

    def set_device_memory(self, memory: int, size: int) -> None:
        self.memory = memory
        assert memory % 256 == 0
        assert size == self.engine.device_memory_size_v2

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address % 256 == 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return all(1 <= size <= most for size, most in zip(shape, self.engine.given[name].most, strict=True))

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.trt.capturable

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 34
        engine, gpu, at, shapes = self.engine, self.gpu, dict(self.addresses), dict(self.shapes)
        assert set(at) == set(engine.given)
        assert set(shapes) == {tensor.name for tensor in engine.given.values() if tensor.is_input}
        self.seen.add(tuple(sorted(shapes.items())))
        assert not self.one_shape or len(self.seen) == 1
        (tokens,), (sequences,), (rows,) = shapes["input_ids"], shapes["past_lengths"], shapes["logits_index"]
        assert shapes["position_ids"] == (tokens,)
        assert shapes["query_start"] == shapes["block_begins"] == (sequences + 1,)
        widths = {
            "x": 48,
            "query": HEADS * D,
            "key": KV_HEADS * D,
            "value": KV_HEADS * DV,
            "output": HEADS * DV,
        }
        place = {name: self.memory + i * (1 << 17) for i, name in enumerate(widths)}

        def array(name: str, dtype: Any = np.float16) -> np.ndarray:
            return gpu.view(place[name], dtype, (tokens, widths[name] * 2 // np.dtype(dtype).itemsize))

        def integers(name: str) -> np.ndarray:
            return gpu.view(at[name], np.int32, shapes[name])

        def embed() -> None:
            array("x", np.float32)[:] = engine.model.embed(integers("input_ids"), integers("position_ids"))

        def project(layer: int) -> None:
            for name, made in zip(
                widths, [None, *engine.model.project(layer, array("x", np.float32))], strict=False
            ):
                if made is not None:
                    array(name)[:] = made
            array("output")[:] = np.nan  # memory that anything was in

        def add(layer: int) -> None:
            array("x", np.float32)[:] += array("output").astype(np.float32) @ engine.model.out[layer]

        def head() -> None:
            chosen = array("x", np.float32)[integers("logits_index")]
            gpu.view(at["logits"], np.float32, (rows, VOCAB))[:] = chosen @ engine.model.head

        gpu.submit(embed)
        for i, (plugin, _creator) in enumerate(engine.layers):
            gpu.submit(lambda i=i: project(i))
            caches = [f"key_cache.{i}", f"value_cache.{i}"]
            inputs = [place[name] for name in ("query", "key", "value")] + [at[name] for name in caches]
            inputs += [at[name] for name in NAMES[5:]]
            outputs = [place["output"], *(at[name.replace("_cache", "_cache_out")] for name in caches)]
            blocks, (entries,) = shapes[caches[0]][0], shapes["block_indices"]
            try:
                plugin.enqueue(
                    described(engine.trt._real, tokens, sequences, blocks, entries),
                    [],
                    inputs,
                    outputs,
                    0,
                    stream,
                )
            except Exception:
                return False
            gpu.submit(lambda i=i: add(i))
        gpu.submit(head)
        return True


def main(graphs: str, directory: Path) -> None:
    """Serves a few requests with the backend and checks every step, and what is left of memory."""
    import warnings

    real = importlib.import_module("tensorrt_rtx")
    gpu = StandIn(fail="end capture" if graphs == "no graphs" else "")
    trt: Any = StandInTensorRt(real, gpu, capturable=True)
    sys.modules["tensorrt_rtx"] = trt
    files = (*kernels((89, "cubin"), (80, "ptx")), *sampling_kernels((89, "cubin")))
    made = manifest(**gpu_changes(kernels=files))
    for file in (*kernels((89, "cubin")), *sampling_kernels((89, "cubin"))):
        (directory / file.file).write_bytes(file.variant.encode())
    told: list[Any] = []
    warnings.showwarning = lambda message, *_, **__: told.append(str(message))
    warnings.simplefilter("always")

    tensorrt_checks.MODULES["tensorrt-rtx"] = "tensorrt_rtx"
    backend: Any = load_gpu_backend(
        Bundle(directory, made), kv_memory=40 * 6144 * CACHE.itemsize, max_sequences=6, max_batch_tokens=64
    )
    assert backend.num_blocks == 40
    assert backend.name == "tensorrt-rtx"
    loaded = gpu.log.count("launch")
    assert loaded >= 2 * 2 * len(LAYERS)  # a prompt and a decode were tried

    expected = ReferenceBackend(backend.num_blocks)
    device = [[gpu.view(backend._addresses[f"{kind}_cache.{i}"], CACHE, expected.caches[i][j].shape)
               for j, kind in enumerate(("key", "value"))] for i in range(len(LAYERS))]  # fmt: skip
    for i in range(len(LAYERS)):
        for mine, theirs in zip(expected.caches[i], device[i], strict=True):
            mine[:] = theirs
            mine = mine.astype(np.float32)
            assert np.isfinite(mine[0, :, :2]).all()
            assert np.isnan(mine[0, :, 2:]).all()
            assert np.isnan(mine[1:]).all()
    sizes: list[tuple[int, int]] = []

    class Both:
        name, num_blocks, block_size = backend.name, backend.num_blocks, backend.block_size

        def forward(self, step: Batch) -> np.ndarray:
            logits, wanted = backend.forward(step), expected.forward(step)
            assert logits.shape == wanted.shape
            np.testing.assert_allclose(logits, wanted, atol=ATOL)
            sizes.append((len(step.input_ids), len(step.past_lengths)))
            return logits

    engine = ServingEngine(Both(), None, (), MAX_LEN, 64, 6, vocab_size=VOCAB)
    rng = np.random.default_rng(1)
    lengths, answers = [300, 3, 70, 1, 33, 5, 40], [8, 3, 6, 9, 2, 4, 5]
    prompts = [rng.integers(0, VOCAB, length).tolist() for length in lengths]
    engine.generate(prompts, [SamplingParams(max_tokens=answer) for answer in answers])
    decodes = [count for tokens, count in sizes if tokens == count]
    assert len(set(decodes)) >= 4, sizes
    for i in range(len(LAYERS)):
        for codes in zip(expected.caches[i], device[i], strict=True):
            mine, theirs = (array.astype(np.float32) for array in codes)
            np.testing.assert_array_equal(np.isnan(mine), np.isnan(theirs))  # nothing else was written
            np.testing.assert_allclose(mine, theirs, atol=0.02, rtol=STEP_OF_E4M3 if KV_SCALES else 0)
            assert not KV_SCALES or (mine != theirs)[~np.isnan(mine)].mean() < 0.02
    used = {next(size for size in (1, 2, 4, 6) if size >= count) for count in (1, *decodes)}
    assert backend._engine._engine.contexts == 1 + len(used)
    if graphs != "no graphs":
        assert gpu.log.count("instantiate") == len(used), told
        assert gpu.log.count("replay") == len(decodes) + 1 - len(used)
        assert told == []
    else:
        assert gpu.log.count("replay") == 0
        assert len(told) == len(used)
        assert "CUDA_ERROR_STAND_IN: as it was told to" in told[0]
    sample_on(backend, gpu)
    steps = gpu.log[gpu.log.index("wait") :]
    assert steps.count("allocate") == steps.count("pin") == 0  # nothing is allocated for a step

    before = len(gpu.log)
    backend.close()
    backend.close()
    closing = list(dict.fromkeys(gpu.log[before:]))
    order = ["wait", "drop graph", "unload", "free", "drop stream", "release"]
    assert [what for what in closing if what in order] == [
        w for w in order if w in closing or w != "drop graph"
    ]
    assert not gpu.memory
    assert not gpu.graphs
    assert not gpu.modules
    print("as the reference says")


def sample_on(backend: Any, gpu: StandIn) -> None:
    """Serves requests with all logits and with candidates: the same tokens, and little comes to the host."""
    assert backend.max_candidates == sampling.MAX_K

    class AllLogits:
        name, num_blocks, block_size = backend.name, backend.num_blocks, backend.block_size
        forward = backend.forward

    def tokens(on: Any, options: list[dict[str, Any]]) -> tuple[list[tuple[int, ...]], int, list[int]]:
        """The tokens, logits and bytes that came to the host."""
        engine = ServingEngine(on, None, (), MAX_LEN, 64, 6, vocab_size=VOCAB)
        params = [SamplingParams(max_tokens=4 + i, **given) for i, given in enumerate(options)]
        prompts = [
            np.random.default_rng(i).integers(0, VOCAB, 20 * i + 1).tolist() for i in range(len(params))
        ]
        before = len(gpu.downloads)
        outputs = engine.generate(prompts, params)
        return [o.token_ids for o in outputs], engine.stats.generated_tokens, gpu.downloads[before:]

    top_k: dict[str, Any] = {"temperature": 1.5, "top_k": 9, "top_p": 0.95}
    row = 4 * (1 + 2 * sampling.CAPACITY)
    for options, nbytes in (
        ([{}] * 3, 4),
        ([{**top_k, "seed": i} for i in range(3)], row),
        ([{"temperature": 0.7, "top_k": 300, "seed": 8}, {}, {**top_k, "seed": 7}], None),
    ):
        wanted, logits, whole = tokens(AllLogits(), options)
        got, count, downloads = tokens(backend, options)
        assert got == wanted
        assert (count, sum(whole)) == (logits, logits * 4 * VOCAB)
        assert nbytes is None or sum(downloads) == count * nbytes
    assert any(size % (4 * VOCAB) == 0 for size in downloads)  # steps with a k that is too large
    assert {row, 2 * row} <= set(downloads)  # and those after that request's end

    # Rows that the kernels cannot answer come whole.
    device = gpu.view(backend._addresses["logits"], np.float32, (3, VOCAB))
    device[:], device[1, 5], device[2, 6] = -1, np.nan, np.inf
    device[0, 7:9] = 3
    found = backend._sampler.candidates(3, 1)
    assert [c.ids is None for c in found] == [False, True, True]
    assert found[0].ids.tolist() == [7]
    np.testing.assert_array_equal(found[1].logits, device[1])
    assert backend._sampler.candidates(1, 2)[0].ids.tolist() == [7, 8]


# On a GPU.


@pytest.fixture(scope="module")
def gpu() -> Device:
    if no_cuda_python:
        pytest.skip("cuda-python is not installed")
    from llmc.plugins.paged_attention.cuda_kernels import CudaError
    from llmc.runtime.backends.cuda import probe

    try:
        return probe()
    except CudaError as error:
        pytest.skip(f"there is no GPU: {error}")


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
def test_attention_on_a_gpu(gpu: Device, captured: bool, tmp_path: Path) -> None:
    """A mixed step with splits, by the launcher alone: no TensorRT."""
    pytest.importorskip("triton")
    from llmc.plugins.paged_attention.compile_kernels import compile_variant
    from llmc.plugins.paged_attention.cuda_kernels import AttentionLauncher, KernelImage, Kernels
    from llmc.runtime.backends.cuda import Cuda

    exact = gpu.sm in launch.SMS
    sm = gpu.sm if exact else max(s for s in launch.SMS if s < min(gpu.sm, 90))
    made = [compile_variant(v, sm, tmp_path) for v in launch.variants_for(ATTENTION, [("fp16", None)])]
    named = zip(VARIANTS, made, strict=True)
    images = [
        KernelImage(v, k.name, k.cubin if exact else k.ptx, k.shared_memory, k.num_warps) for v, k in named
    ]
    past, new = [1000, 3, 0, 40, 0], [1, 40, 5, 1, 0]
    step, rng = batch(past, new), np.random.default_rng(0)
    tokens, blocks = sum(new), len(step.block_indices) + 1
    shapes = [(tokens, HEADS * D), (tokens, KV_HEADS * D), (tokens, KV_HEADS * DV)]
    shapes += [(blocks, KV_HEADS, 32, D), (blocks, KV_HEADS, 32, DV)]
    arrays = dict(
        zip(NAMES, (rng.standard_normal(shape).astype(np.float16) for shape in shapes), strict=False)
    )
    arrays |= {name: getattr(step, name) for name in NAMES[5:]}
    arrays["output"] = np.full((tokens, HEADS * DV), np.nan, np.float16)
    for attention in ATTENTION:
        cuda = Cuda()
        loaded = Kernels(images)
        places, host = {}, {}
        for name, array in arrays.items():
            host[name] = cuda.pinned(array.nbytes).view(array.dtype).reshape(array.shape)
            host[name][:] = array
            places[name] = cuda.allocate(array.nbytes)
            cuda.upload(host[name], places[name])
        scratch = 1 << 22
        launcher = AttentionLauncher(loaded, sm, gpu.multiprocessors, cuda.allocate(scratch), scratch)
        launcher.begin(step.query_start, step.past_lengths)

        run = partial(launcher.launch, attention, "fp16", SCALE, places, tokens, len(past), cuda.stream)
        if captured:
            graph = cuda.capture(run)
            graph.launch()
            graph.close()
        else:
            run()
        for name in ("output", "key_cache", "value_cache"):
            cuda.download(places[name], host[name])
        cuda.wait()
        given = [arrays[name].copy() for name in NAMES]
        settings: dict[str, Any] = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "scale": SCALE}
        wanted = reference.paged_attention(*given, window=attention.window, **settings)
        np.testing.assert_allclose(host["output"], wanted, atol=4e-3)
        np.testing.assert_array_equal(host["key_cache"], given[3])
        np.testing.assert_array_equal(host["value_cache"], given[4])
        loaded.close()
        cuda.close()


@pytest.mark.gpu
@needs_packages
def test_a_gpu_bundle_answers_as_the_cpu_bundle_does(
    gpu: Device, bundle: Callable[[str], Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    from llmc.compiler.driver import compile_model
    from llmc.compiler.request import TARGETS, BuildRequest
    from llmc.runtime.llm import load_engine

    if "tensorrt-rtx" not in TARGETS:
        pytest.skip("llmc build does not offer tensorrt-rtx yet")
    if gpu.sm in (90, 100, 103):
        pytest.skip(f"TensorRT-RTX has no code for SM{gpu.sm}")
    path = tmp_path / "gpu.llmc"
    compile_model(BuildRequest(str(checkpoint("llama-tiny")), path, target="tensorrt-rtx", verify=False))
    on_cpu, on_gpu = load_engine(bundle("llama-tiny")), load_engine(path)
    rng = np.random.default_rng(0)
    for past, new in (([0, 0], [40, 7]), ([40, 7], [1, 1]), ([41, 8], [1, 1]), ([42, 9, 0], [1, 1, 20])):
        step = batch(past, new)
        fixed = np.array([1, 2, 3, 4, 5, 6][: len(step.block_indices)], np.int32)
        tables = {"block_indices": fixed, "input_ids": rng.integers(0, 384, sum(new)).astype(np.int32)}
        step = replace(step, **tables)
        wanted = on_cpu.backend.forward(step).copy()
        np.testing.assert_allclose(on_gpu.backend.forward(step), wanted, atol=0.1 * np.abs(wanted).max())


@pytest.mark.gpu
def test_sampling_on_a_gpu(gpu: Device, tmp_path: Path) -> None:
    """What the kernels find in rows with ties, infinities and a NaN, against numpy."""
    pytest.importorskip("triton")
    from llmc.plugins.paged_attention.cuda_kernels import KernelImage
    from llmc.plugins.sampling.compile_kernels import compile_kernel
    from llmc.runtime.backends.cuda import Cuda
    from llmc.runtime.backends.tensorrt_sampling import TokenSampler

    exact = gpu.sm in launch.SMS
    sm = gpu.sm if exact else max(s for s in launch.SMS if s < min(gpu.sm, 90))
    made = {name: compile_kernel(name, sm, tmp_path) for name in sampling.ARGUMENTS}
    images = [
        KernelImage(sampling.variant(n), k.name, k.cubin if exact else k.ptx, k.shared_memory, k.num_warps)
        for n, k in made.items()
    ]
    cuda, rng = Cuda(), np.random.default_rng(0)
    logits = cuda.pinned(4 * 6 * 128_257).view(np.float32).reshape(6, -1)
    logits[:] = rng.normal(0, 4, logits.shape).astype(np.float16)
    logits[1, rng.random(128_257) < 0.9] = -np.inf
    logits[2], logits[3, 99], logits[4, :5000] = 0, np.nan, np.round(logits[4, :5000]) + 40
    given, device = logits.copy(), cuda.allocate(logits.nbytes)
    cuda.upload(logits, device)
    cuda.wait()
    logits[:] = 0
    sampler = TokenSampler(cuda, images, device, logits)
    for k in (1, 2, 50, 256):
        for row, (ids, values) in zip(given, sampler.candidates(6, k), strict=True):
            kth = np.partition(row, -k)[-k] if not np.isnan(row).any() else np.nan
            wanted = np.flatnonzero(row >= kth) if k > 1 else row.argmax(keepdims=True)
            if ids is None:
                np.testing.assert_array_equal(values, row)
                assert len(wanted) > sampling.CAPACITY or np.isnan(row).any()
            elif np.isnan(kth):
                assert 99 in ids
            else:
                np.testing.assert_array_equal(ids, wanted)
                assert k == 1 or np.array_equal(values, row[ids])
    sampler.close()
    cuda.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
