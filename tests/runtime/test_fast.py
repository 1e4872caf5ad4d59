"""`fast` (int8 activations) and the KV cache of 8 bits: what they change, and where they are refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmc.cli import main
from llmc.compiler.driver import compile_model
from llmc.compiler.request import BuildRequest
from llmc.runtime.backends import load_backend
from llmc.runtime.backends.base import Backend, EngineFile, LoadOptions
from llmc.runtime.backends.kv_cache import block_bytes
from llmc.runtime.backends.native import NativeBackend
from llmc.runtime.backends.openvino import backend as openvino
from llmc.runtime.backends.openvino.backend import OpenVinoBackend
from llmc.runtime.batch import Batch
from llmc.runtime.bundle.manifest import Manifest, Target
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.engine import Engine
from llmc.runtime.errors import BackendError, RequestError
from llmc.runtime.load import load_engine
from llmc.runtime.sampling import SamplingParams
from support.traces import share_traces

TALES = Path(__file__).parents[2] / "model_zoo/llama/tales"
TEXT = "Once upon a time there was a king who had three daughters, and the youngest of them was"


@pytest.fixture(
    scope="module",
    params=[
        "native-int8",
        "openvino-int8",
        pytest.param("native-int4", marks=pytest.mark.slow),
        pytest.param("openvino-int4", marks=pytest.mark.slow),
    ],
)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp(request.param) / "tales.llmc"
    engine, fmt = request.param.split("-")
    with pytest.MonkeyPatch.context() as patch:
        share_traces(patch)
        return compile_model(BuildRequest(str(TALES), output, engine=engine, quant=fmt, verify=False)).path


def small_cache(bundle: Path) -> str:
    """Return the name of the engine's KV cache of 8 bits."""
    return {"native": "int8", "openvino": "u8"}[Bundle.open(bundle).manifest.target.engine]


def logits(backend: Backend, steps: tuple[int, ...], ids: list[int]) -> np.ndarray:
    """Logits [len(ids), vocabulary] of one sequence, fed in steps of these sizes."""
    rows, past = [], 0
    for count in steps:
        blocks = -(-(past + count) // 32)
        batch = Batch.pack([(ids[past : past + count], past, range(blocks), range(count))])
        rows.append(backend.forward(batch).copy())
        past += count
    return np.concatenate(rows)


def exact_and(
    bundle: Path, activation_group: int | None = None, kv_dtype: str = "fp32"
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the engine as it is, and with these options."""
    opened = Bundle.open(bundle)
    ids = np.random.default_rng(0).integers(3, opened.manifest.geometry.vocab_size, 72).tolist()
    steps = (40, 1, 1, 20, 10)
    exact, changed = (
        load_backend(
            EngineFile(opened.manifest.target.engine, opened.engine_path(), cache),
            LoadOptions(kv_blocks=3, activation_group=group),
        )
        for cache, group in (("fp32", None), (kv_dtype, activation_group))
    )
    return logits(exact, steps, ids), logits(changed, steps, ids)


def test_fast_rounds_activations_and_stays_near(built: Path) -> None:
    manifest = Bundle.open(built).manifest
    if manifest.target.engine == "openvino" and not re.search(
        r"\bavx(512)?_vnni\b", Path("/proc/cpuinfo").read_text()
    ):
        pytest.skip("OpenVINO rounds activations only where the CPU has VNNI")
    plan = manifest.quantization
    assert plan is not None
    assert plan["activation_group"] == {"int8": 128, "int4": 32}[plan["format"]]
    exact, fast = exact_and(built, activation_group=plan["activation_group"])
    error = np.abs(fast - exact)
    assert 1e-3 < error.max() < 0.5  # of logits up to about 10 (docs/explanation/quantization.md)
    assert np.sqrt((error**2).mean()) < 0.1


def test_a_cache_of_8_bits_stays_near_and_is_as_large_as_it_says(built: Path) -> None:
    kv_dtype = small_cache(built)
    exact, small = exact_and(built, kv_dtype=kv_dtype)
    error = np.abs(small - exact)
    assert 1e-5 < error.max() < 0.3
    opened = Bundle.open(built)
    geometry, engine = opened.manifest.geometry, opened.manifest.target.engine
    backend = load_backend(EngineFile(engine, opened.engine_path(), kv_dtype), LoadOptions(kv_blocks=5))
    if isinstance(backend, OpenVinoBackend):
        assert {cache.dtype for cache in backend._caches} == {np.dtype(np.uint8)}
        allocated = sum(cache.nbytes for cache in backend._caches)
    else:
        assert isinstance(backend, NativeBackend)
        allocated = len(backend.executor._cache) - 64  # which is there to align it
    assert allocated == 5 * block_bytes(geometry, kv_dtype)
    assert allocated < 0.4 * 5 * block_bytes(geometry, "fp32")


def test_the_manifest_decides_the_cache(built: Path) -> None:
    opened, kv_dtype = Bundle.open(built), small_cache(built)
    manifest = opened.manifest
    precision = replace(manifest.precision, kv_dtype=kv_dtype)
    small = replace(opened, manifest=replace(manifest, precision=precision))
    engine = load_engine(small, kv_memory=1 << 20)
    assert engine.backend.num_blocks == (1 << 20) // block_bytes(manifest.geometry, kv_dtype)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    expected = load_engine(opened).generate([TEXT], params)[0].token_ids
    assert engine.generate([TEXT], params)[0].token_ids == expected


def test_bf16_only_where_the_cpu_and_the_cache_allow_it() -> None:
    def hint(**options: object) -> object:
        return openvino.tested_core(**options)[1]["INFERENCE_PRECISION_HINT"]  # type: ignore[arg-type]

    has_bf16 = "BF16" in openvino.ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert hint(activation_group=128, kv_dtype="u8") == ("bf16" if has_bf16 else "f32")
    assert hint(activation_group=128) == hint(kv_dtype="u8") == "f32"


def test_a_cache_that_openvino_does_not_have() -> None:
    with pytest.raises(BackendError, match="no KV cache of bf16"):
        openvino.tested_core(kv_dtype="bf16")


@pytest.mark.parametrize("fast", [False, True])
def test_requests_together_get_what_each_gets_alone(built: Path, fast: bool) -> None:
    """OpenVINO runs exact steps of 5 to 16 sequences as several of four; fast ones whole."""
    engine: Engine = load_engine(built, prefix_cache=False, fast=fast)
    exact = not fast or engine.backend.name == "native"  # whose rows do not depend on each other
    if engine.backend.name == "openvino":
        assert engine.backend._few_at_once == (not fast)  # type: ignore[attr-defined]
    rng = np.random.default_rng(9)
    prompts = [rng.integers(3, 200, rng.integers(1, 40)).tolist() for _ in range(9)]
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    alone = [engine.generate([prompt], params)[0].token_ids for prompt in prompts]
    together = [output.token_ids for output in engine.generate(prompts, params)]
    same = sum(a == b for a, b in zip(together, alone, strict=True))
    assert same == 9 if exact else same >= 7  # int8 rounding turns a last bit into a visible difference


def refused(opened: Bundle, change: Callable[[Manifest], Manifest]) -> RequestError | BackendError:
    with pytest.raises((RequestError, BackendError)) as caught:
        load_engine(replace(opened, manifest=change(opened.manifest)), fast=True)
    return caught.value


def test_fast_is_refused_where_it_would_do_nothing(built: Path, bundle: Callable[[str], Path]) -> None:
    with pytest.raises(RequestError, match="no quantized ones") as caught:
        load_engine(bundle("llama-tiny"), fast=True)
    assert "--quant int8 or int4" in caught.value.hint
    error = refused(
        Bundle.open(built), lambda m: replace(m, quantization={"format": "nvfp4", "activation_group": 0})
    )
    assert "has them in nvfp4" in error.message
    assert "--quant int8 or int4" in error.hint
    stored = {"format": "fp8 and int8-block24", "activation_group": 0, "recipe": "x"}
    error = refused(Bundle.open(built), lambda m: replace(m, quantization=stored))
    assert "has them in fp8 and int8-block24" in error.message
    assert error.hint == "leave --fast out"  # --quant is not for pre-quantized checkpoints

    error = refused(Bundle.open(built), lambda m: replace(m, quantization={"format": "int8"}))
    assert "built by an older llmc" in error.message
    assert error.hint == "build it again, or leave --fast out"

    def onnxruntime(manifest: Manifest) -> Manifest:
        target: Target = replace(manifest.target, engine="onnxruntime")
        return replace(manifest, target=target)

    error = refused(Bundle.open(built), onnxruntime)
    assert "`fast` would change nothing" in error.message
    assert error.hint == "leave --fast out"


def test_the_command_line(
    built: Path, bundle: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--prompt-tokens", "20", "--new-tokens", "3"]
    assert main.main(["bench", str(built), *short]) == 0
    assert "fp32 activations, not quantized" in capsys.readouterr().out
    assert main.main(["bench", str(built), "--fast", *short]) == 0
    assert "fast: activations quantized to int8" in capsys.readouterr().out
    assert main.main(["run", str(built), TEXT, "--fast", "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out.strip()
    assert main.main(["run", str(bundle("llama-tiny")), "x", "--fast"]) == 2
    assert "no quantized ones" in capsys.readouterr().err
