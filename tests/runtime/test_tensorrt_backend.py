"""Running a TensorRT engine: everything but TensorRT's own execution is tested without a GPU.

`test_steps_on_a_stand_in_for_the_gpu` starts serve_on_stand_in.py with a stand-in for the NVIDIA driver
(cuda_stand_in.py: memory of the host, compiled by cc): the real cuda-python calls it, the real plugin and
launcher put kernels on its stream, Triton's interpreter runs them, graphs are recorded and replayed. Only the
engine between the attention layers is numpy (tensorrt_stand_in.py). What that cannot show: that TensorRT and
the GPU do as they say. Tests on a GPU (tests/gpu) are for that.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from llmc.runtime.errors import BackendError
from support.cuda_stand_in import compile_driver
from support.gpu_bundle import needs_packages, no_cuda_python, write_files
from support.nccl_stand_in import compile_library

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """What a bundle of `manifest()` holds."""
    return write_files(tmp_path)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a libcuda.so.1 that is no NVIDIA driver, and a libnccl.so.2 that is no NCCL."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("there is no C compiler for the stand-in")
    folder = tmp_path_factory.mktemp("driver")
    compile_driver(compiler, folder)
    compile_library(compiler, folder)
    return folder


needs_stand_in = pytest.mark.skipif(
    sys.platform != "linux" or find_spec("triton") is None or find_spec("torch") is None,
    reason="the stand-in is a Linux library, and needs triton and torch",
)


def run_on_stand_in(script: Path, stand_in: Path, *arguments: str, **variables: str) -> str:
    """Run a script of tests/support in Triton's interpreter. Return its last line."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "LD_LIBRARY_PATH": str(stand_in), **variables}
    paths = [str(script.parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run(
        [sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


@needs_stand_in
@needs_packages
@pytest.mark.slow
@pytest.mark.parametrize("graphs", ["graphs", "no graphs", "no room", "graphs, FP8 cache"])
def test_steps_on_a_stand_in_for_the_gpu(
    graphs: str, stand_in: Path, directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    variables = {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
    if "FP8" in graphs:
        variables["LLMC_TEST_FP8_CACHE"] = "1"
    said = run_on_stand_in(SUPPORT / "serve_on_stand_in.py", stand_in, graphs, str(directory), **variables)
    assert said == "as the reference says"


STAGES = {"LLMC_TEST_STAGES": "2"}


@needs_stand_in
@needs_packages
@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "variables", "said"),
    [
        ("serve", {}, "as the reference says"),
        (
            "serve",
            {"LLMC_TEST_WRONG": "order"},
            "BackendError: rank 1: .*collective 2 where collective 1 is due",
        ),
        ("serve", {"LLMC_TEST_GPUS": "1"}, "BackendError: .* has 2 ranks with a GPU each: 2 are needed here"),
        ("killed", {}, "RankError: rank 1 was killed by signal 9"),
        ("serve", {"LLMC_TEST_RANKS": "1", **STAGES}, "as the reference says"),
        ("serve", {"LLMC_TEST_GPUS": "4", **STAGES}, "as the reference says"),
        (
            "serve",
            {"LLMC_TEST_RANKS": "1", "LLMC_TEST_WRONG": "transfers", **STAGES},
            "BackendError: rank 1: .*Recv 1 where Recv 0 is due",
        ),
        (
            "serve",
            {"LLMC_TEST_GPUS": "4", "LLMC_TEST_WRONG": "order", **STAGES},
            "BackendError: rank 1: .*collective 2 where collective 1 is due",
        ),
        ("serve", STAGES, "BackendError: .* has 4 ranks with a GPU each: 4 are needed here"),
        ("killed", {"LLMC_TEST_RANKS": "1", **STAGES}, "RankError: rank 1 was killed by signal 9"),
    ],
)
def test_ranks_on_stand_ins_for_gpus_and_nccl(
    what: str, variables: dict[str, str], said: str, stand_in: Path, directory: Path
) -> None:
    given = {"LLMC_TEST_GPUS": "2", "LLMC_TEST_RANKS": "2", "LLMC_TEST_NCCL": str(stand_in / "libnccl.so.2")}
    given |= {"XDG_CACHE_HOME": str(directory / "cache"), **variables}
    line = run_on_stand_in(SUPPORT / "serve_ranks_on_stand_in.py", stand_in, what, str(directory), **given)
    assert re.match(said, line), line


@needs_stand_in
@pytest.mark.skipif(no_cuda_python, reason="cuda-python is not installed")
@pytest.mark.slow
def test_gpu_check_finds_what_is_wrong_with_the_runtime(stand_in: Path) -> None:
    """Its part `runtime`: nothing, with the kernels as they are, and each mistake that is put in."""
    said = run_on_stand_in(SUPPORT / "gpu_check_on_stand_in.py", stand_in, str(stand_in / "libnccl.so.2"))
    assert said == "all as expected"


@pytest.mark.skipif(no_cuda_python, reason="cuda-python is not installed")
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("another llmc.PagedAttention\n  is registered with TensorRT already"),
        ImportError("libcudart.so.13: cannot open shared object file"),
        ValueError("TensorRT gave llmc.PagedAttention a copy of key_cache"),
    ],
)
def test_what_the_first_run_raises_is_one_line_for_the_user(error: Exception) -> None:
    from llmc.runtime.backends.tensorrt.backend import _as_backend_error

    with pytest.raises(BackendError) as raised, _as_backend_error("the step failed"):
        raise error
    assert raised.value.message == f"the step failed: {' '.join(str(error).split())}"
    assert raised.value.hint
