"""The plugin and the launcher of attention, and that all they call exists in the real packages."""

from __future__ import annotations

import ast
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.plugins.paged_attention.tensorrt_plugin import use_launcher
from llmc.runtime.backends import load_backend
from llmc.runtime.backends.base import EngineFile, LoadOptions
from llmc.runtime.backends.tensorrt import sizes
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.errors import BackendError
from support.gpu_bundle import (
    ATTENTION,
    DV,
    HEADS,
    L40,
    MAX_LEN,
    NAMES,
    PLAN,
    SHA,
    described,
    make_layer,
    manifest,
    needs_packages,
    write_files,
)


@pytest.fixture(scope="module")
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx")


INPUTS = [16 * n for n in range(1, 10)]
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
    with use_launcher(recorder):
        plugin.enqueue(described(trt, 8, 3, 99, 7), [], INPUTS, [800, *INPUTS[3:5]], 0, 5)
        plugin.enqueue(described(trt, 8, 3, 99, 7, fp8=True), [], INPUTS, [800, *INPUTS[3:5]], 0, 5)
    call = (ATTENTION[1], "fp16", 0.25, TENSORS, 8, 3, 5)
    assert recorder.calls == [(*call, None, (1.0, 1.0)), (*call, "fp8", (1.0, 1.0))]
    with pytest.raises(RuntimeError, match="cannot launch"):
        plugin.enqueue(described(trt, 8, 3, 99, 7), [], INPUTS, [800, *INPUTS[3:5]], 0, 5)


def test_a_copied_cache_is_an_error_not_a_wrong_answer(trt: Any) -> None:
    plugin, _creator = make_layer(trt, ATTENTION[0], 0.25)
    with pytest.raises(ValueError, match="a copy of value_cache"), use_launcher(Recorder()):
        plugin.enqueue(described(trt, 8, 3, 99, 7), [], INPUTS, [800, INPUTS[3], 16 * 77], 0, 5)


def test_what_a_plugin_raises_is_not_lost_in_tensorrt(trt: Any) -> None:
    plugin, _creator = make_layer(trt, ATTENTION[0], 0.25)
    recorder = Recorder(ValueError("first"))

    def engine() -> None:  # TensorRT swallows what plugins raise, and reports a failure of its own
        try:
            plugin.enqueue(described(trt, 8, 3, 99, 7), [], INPUTS, [800, *INPUTS[3:5]], 0, 5)
        except ValueError:
            raise BackendError("execute_async_v3 failed", "") from None

    with pytest.raises(ValueError, match="first"), use_launcher(recorder):
        engine()


@needs_packages
class TestLauncher:
    class Kernels:
        def __init__(self) -> None:
            self.launches: list[tuple[str, tuple[int, int, int], dict[str, Any]]] = []
            self.variants: list[str] = []

        def launch(
            self, variant: str, grid: tuple[int, int, int], arguments: dict[str, Any], stream: int
        ) -> None:
            self.launches.append((variant.split("-")[0], grid, dict(arguments)))
            self.variants.append(variant)

    def launcher(self, scratch_bytes: int = 1 << 30) -> tuple[Any, Kernels]:
        from llmc.plugins.paged_attention.launcher import AttentionLauncher

        kernels = self.Kernels()
        return AttentionLauncher(kernels, 89, 142, 1 << 20, scratch_bytes), kernels  # type: ignore[arg-type]

    def test_a_graph_of_the_longest_decode_covers_every_step(self) -> None:
        """Grids and splits of the captured step are at least those that any step of the bucket needs."""
        launcher, kernels = self.launcher()
        launcher.begin(*sizes.longest_decode(4, MAX_LEN))
        launcher.launch(ATTENTION[0], "fp16", 1.0, TENSORS, 4, 4, 0)
        captured = {kernel: grid for kernel, grid, _ in kernels.launches}
        assert captured == {"write_kv": (4, 1, 1), "decode": (4, 2, 8), "reduce": (4, 4, 1)}
        for past in ([0], [255, 3], [MAX_LEN - 1] * 4, [600, 0, 1]):
            kernels.launches.clear()
            start = np.minimum(np.arange(5), len(past)).astype(np.int32)
            launcher.begin(start, np.array([*past, 0, 0, 0][:4], np.int32))
            launcher.launch(ATTENTION[0], "fp16", 1.0, TENSORS, 4, 4, 0)
            for kernel, grid, _ in kernels.launches:
                assert all(a <= b for a, b in zip(grid, captured[kernel], strict=True))

    def test_layers_of_a_kind_share_a_plan_and_scratch(self) -> None:
        launcher, kernels = self.launcher()
        launcher.begin(*sizes.longest_decode(2, MAX_LEN))
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
        for cache, scales in ((None, (1.0, 1.0)), ("fp8", (0.5, 0.25)), ("fp8", (0.125, 2.0))):
            launcher.launch(ATTENTION[0], "fp16", 1.0, TENSORS, 4, 2, 0, cache, scales)
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
        assert splits == max(1, min(7, scratch // per_split)) or splits == max(1, scratch // per_split - 1)
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


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """What a bundle of `manifest()` holds."""
    return write_files(tmp_path)


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

    from llmc.plugins.cuda import driver as calls
    from llmc.plugins.cuda import kernel
    from llmc.runtime.backends.tensorrt import cuda
    from llmc.runtime.backends.tensorrt import engine as tensorrt_engine

    checked = 0
    for module in (calls, kernel, cuda):
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
        "cache": trt.IRuntimeCache, "self._cache": trt.IRuntimeCache,
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
    from llmc.plugins.cuda.driver import CudaError
    from llmc.runtime.backends.tensorrt.cuda import probe

    try:
        probe()
    except CudaError:
        pass
    else:
        pytest.skip("this machine has a GPU")
    bundle = Bundle(directory.rename(directory.with_name("test_bundle")), manifest())
    with pytest.raises(BackendError, match=r"^test_\w+ cannot run here: there is no GPU: cuInit: ") as error:
        load_backend(EngineFile.of(bundle), LoadOptions(max_sequences=4, max_tokens=64))
    assert "--target cpu" in error.value.hint


@needs_packages
def test_an_engine_that_does_not_load_is_a_plain_error(directory: Path) -> None:
    """Here for want of a GPU; a damaged file ends the same way."""
    from llmc.runtime.backends.tensorrt.engine import LoadedEngine

    with pytest.raises(BackendError, match=r"TensorRT 1\.7\.1\.\d+ cannot load rank0\.plan: .*Error Code"):
        LoadedEngine("tensorrt_rtx", directory / PLAN, SHA, L40)
