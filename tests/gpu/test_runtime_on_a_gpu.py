"""The runtime on a GPU: `python -m pytest -m gpu tests/gpu`.

They need llmc, triton, cuda-python, numpy, ml_dtypes and pytest; one also needs a TensorRT and what builds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.plugins.cuda.gpus import SMS
from llmc.plugins.paged_attention import launch, reference
from llmc.plugins.sampling import launch as sampling
from llmc.runtime.backends.tensorrt.checks import Device
from llmc.runtime.backends.tensorrt.sizes import longest_decode
from llmc.runtime.backends.tensorrt.step import fill, room
from support.gpu_bundle import (
    ATTENTION,
    DV,
    HEADS,
    KV_HEADS,
    MAX_LEN,
    NAMES,
    SCALE,
    VARIANTS,
    D,
    batch,
    needs_packages,
    no_cuda_python,
)


@pytest.fixture(scope="module")
def gpu() -> Device:
    if no_cuda_python:
        pytest.skip("cuda-python is not installed")
    from llmc.plugins.cuda.driver import CudaError
    from llmc.runtime.backends.tensorrt.cuda import probe

    try:
        return probe()
    except CudaError as error:
        pytest.skip(f"there is no GPU: {error}")


def attention_images(gpu: Device, folder: Path) -> tuple[int, list[Any]]:
    """The SM that the attention kernels are compiled for, and those of `ATTENTION`."""
    from llmc.plugins.cuda.kernel import KernelImage
    from llmc.plugins.paged_attention.compile_kernels import compile_variant

    exact = gpu.sm in SMS
    sm = gpu.sm if exact else max(s for s in SMS if s < min(gpu.sm, 90))
    made = [compile_variant(v, sm, folder) for v in launch.variants_for(ATTENTION, [("fp16", None)])]
    named = zip(VARIANTS, made, strict=True)
    return sm, [
        KernelImage(v, k.name, k.cubin if exact else k.ptx, k.shared_memory, k.num_warps) for v, k in named
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
def test_attention_on_a_gpu(gpu: Device, captured: bool, tmp_path: Path) -> None:
    """A mixed step with splits, by the launcher alone: no TensorRT."""
    pytest.importorskip("triton")
    from llmc.plugins.cuda.kernel import Kernels
    from llmc.plugins.paged_attention.launcher import AttentionLauncher
    from llmc.runtime.backends.tensorrt.cuda import Cuda

    sm, images = attention_images(gpu, tmp_path)
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
        loaded = Kernels(images, launch.ARGUMENTS)
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
        np.testing.assert_allclose(host["output"], wanted, atol=4e-3, err_msg=str(attention))
        np.testing.assert_array_equal(host["key_cache"], given[3])
        np.testing.assert_array_equal(host["value_cache"], given[4])
        loaded.close()
        cuda.close()


@pytest.mark.gpu
def test_one_graph_serves_every_decode_step(gpu: Device, tmp_path: Path) -> None:
    """As the runtime does it: captured for the longest decode of four sequences, replayed on what comes,
    fewer and shorter sequences, padded. No TensorRT."""
    pytest.importorskip("triton")
    from llmc.plugins.cuda.kernel import Kernels
    from llmc.plugins.paged_attention.launcher import AttentionLauncher
    from llmc.runtime.backends.tensorrt.cuda import Cuda

    sm, images = attention_images(gpu, tmp_path)
    bucket, rng = 4, np.random.default_rng(0)
    most = room(bucket, bucket, MAX_LEN)
    blocks = most["block_indices"] + 1
    shapes = [(bucket, HEADS * D), (bucket, KV_HEADS * D), (bucket, KV_HEADS * DV)]
    shapes += [(blocks, KV_HEADS, 32, D), (blocks, KV_HEADS, 32, DV), (bucket, HEADS * DV)]
    for attention in ATTENTION:
        cuda = Cuda()
        loaded = Kernels(images, launch.ARGUMENTS)
        host = {name: cuda.pinned(4 * size).view(np.int32) for name, size in most.items()}
        for name, shape in zip([*NAMES[:5], "output"], shapes, strict=True):
            host[name] = cuda.pinned(2 * int(np.prod(shape))).view(np.float16).reshape(shape)
        places = {name: cuda.allocate(array.nbytes) for name, array in host.items()}
        for name in NAMES[3:5]:
            host[name][:] = rng.standard_normal(host[name].shape)
            host[name][0] = np.nan  # belongs to nobody
            cuda.upload(host[name], places[name])
        cuda.wait()
        caches = [host[name].copy() for name in NAMES[3:5]]
        scratch = 1 << 22
        launcher = AttentionLauncher(loaded, sm, gpu.multiprocessors, cuda.allocate(scratch), scratch)
        launcher.begin(*longest_decode(bucket, MAX_LEN))
        run = partial(launcher.launch, attention, "fp16", SCALE, places, bucket, bucket, cuda.stream)
        graph = None
        for past in ([1000, 3, 70, 31], [1001, 4, 71], [MAX_LEN - 1, 0], [255], [5, 700, 39, 40]):
            step = batch(past, [1] * len(past))
            fill(step, bucket, host)
            for name in NAMES[:3]:
                host[name][:] = rng.standard_normal(host[name].shape)
            host["output"][:] = np.nan
            for name in places.keys() - set(NAMES[3:5]):
                cuda.upload(host[name], places[name])
            if graph is None:  # a first run may load what a capture could not
                run()
                cuda.wait()
                graph = cuda.capture(run)
            graph.launch()
            cuda.download(places["output"], host["output"])
            cuda.wait()
            given = [host[name][: len(past)].copy() for name in NAMES[:3]] + caches
            given += [getattr(step, name) for name in NAMES[5:]]
            settings: dict[str, Any] = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "scale": SCALE}
            wanted = reference.paged_attention(*given, window=attention.window, **settings)
            np.testing.assert_allclose(host["output"][: len(past)], wanted, atol=4e-3)
        for name, cache in zip(NAMES[3:5], caches, strict=True):  # padding wrote to nobody's
            cuda.download(places[name], host[name])
            cuda.wait()
            np.testing.assert_array_equal(host[name], cache)
        assert graph is not None
        graph.close()
        loaded.close()
        cuda.close()


@pytest.mark.gpu
@needs_packages
def test_a_gpu_bundle_answers_as_the_cpu_bundle_does(
    gpu: Device, bundle: Callable[[str], Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    from llmc.compiler.driver import compile_model
    from llmc.compiler.request import TARGETS, BuildRequest
    from llmc.runtime.load import load_engine

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
    from llmc.plugins.cuda.kernel import KernelImage
    from llmc.plugins.sampling.compile_kernels import compile_kernel
    from llmc.runtime.backends.tensorrt.cuda import Cuda
    from llmc.runtime.backends.tensorrt.sampling import TokenSampler

    exact = gpu.sm in SMS
    sm = gpu.sm if exact else max(s for s in SMS if s < min(gpu.sm, 90))
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
