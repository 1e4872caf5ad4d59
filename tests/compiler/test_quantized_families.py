"""Every format on every target that supports it, for every family of the zoo: built and verified.

The build itself verifies: it compares the engine (or TensorRT's graph, in ONNX Runtime) with transformers,
with the same codes dequantized in numpy and the same activation quantization, within the tolerances of
docs/explanation/fidelity.md. To save time, each family is traced once, and the verification runs in this
process.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmc.compiler import zoo
from llmc.compiler.driver import compile_model
from llmc.compiler.request import BuildRequest
from llmc.compiler.targets.tensorrt import build as tensorrt_build
from llmc.compiler.verify import verify_build
from llmc.compiler.verify.compare import compare
from llmc.compiler.verify.job import Findings, Job
from llmc.passes.quantize.formats import FORMATS
from llmc.runtime.bundle.manifest import Manifest
from llmc.runtime.errors import RequestError
from support.families import DENSE, MIXTURES
from support.traces import share_traces

FAMILIES = [entry.name for entry in zoo.list_zoo() if entry.name.endswith(("-tiny", "-tiny-plain"))]
NARROW = ("llama-tiny", "mistral-tiny", "olmo2-tiny")  # no block of 128 divides their 64 columns
OLDEST_SM = {"int8": 80, "int4": 80, "e4m3": 89, "e2m1": 120}  # by the element type of the weights
PAIRS = [(n, f) for n in DENSE for f in FORMATS if f != "int4-block128" or n not in NARROW]
WEIGHT_ONLY = ("int8", "int4", "mxfp4", "nvfp4-weight-only")
WITH_EXPERTS = [(name, fmt) for name in MIXTURES for fmt in WEIGHT_ONLY]
needs_tensorrt = pytest.mark.skipif(
    not tensorrt_build.is_installed("tensorrt_rtx"), reason="the package tensorrt-rtx is not installed"
)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_this_process(job: Job, *_: object) -> Findings:
        return compare(Job.from_json(job.to_json()))

    share_traces(monkeypatch)
    monkeypatch.setattr(verify_build, "compare_in_child", in_this_process)
    monkeypatch.setattr(
        "llmc.compiler.driver.VERIFICATION",
        SimpleNamespace(start=lambda: nullcontext(SimpleNamespace(prepare=lambda data: None))),
    )


def build(checkpoint: Path, output: Path, fmt: str, **options: Any) -> Manifest:
    manifest = compile_model(BuildRequest(str(checkpoint), output, quant=fmt, **options)).manifest
    assert manifest.verification.status == "passed"
    assert manifest.quantization is not None
    assert manifest.quantization["format"] == fmt
    loss = manifest.verification.details["quantization_loss"]
    assert 0 < loss["rms_logit_error"] < 1.0
    return manifest


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fmt"), PAIRS + WITH_EXPERTS)
def test_on_the_cpu(name: str, fmt: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """On the native engine, which is the default, and on the first of the others that runs the model."""
    in_openvino = FORMATS[fmt].activations in ("", "int8") and name not in ("gemma2-tiny", *MIXTURES)
    for engine in (None, "openvino" if in_openvino else "onnxruntime"):
        manifest = build(checkpoint(name), tmp_path / f"{engine}.llmc", fmt, engine=engine)
        assert manifest.target.engine == (engine or "native")
        assert ("calibration.json" in manifest.files) == (fmt != "int8")
        if FORMATS[fmt].activations:
            inputs = manifest.verification.details["activation_quantization"]
            assert inputs["engine"]["rms_logit_error"] <= 0.5 * inputs["changes"]["rms_logit_error"]


@pytest.mark.slow
@needs_tensorrt
@pytest.mark.parametrize(("name", "fmt"), PAIRS)
def test_for_tensorrt(name: str, fmt: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    dtype = "bf16" if (FAMILIES.index(name) + list(FORMATS).index(fmt)) % 2 else "fp16"
    sm = OLDEST_SM[FORMATS[fmt].element]
    manifest = build(
        checkpoint(name), tmp_path / "x.llmc", fmt, target="tensorrt-rtx", sms=(sm,), dtype=dtype
    )
    assert manifest.operators[0].count == manifest.geometry.num_layers
    assert "engine" in manifest.verification.details["quantization_loss"]
    assert asdict(manifest.precision) == {"dtype": dtype, "kv_dtype": dtype}


def test_inputs_of_experts_are_not_quantized(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"fp8 quantizes the inputs of layers, .* for experts"):
        build(checkpoint("mixtral-tiny"), tmp_path / "x.llmc", "fp8")


@pytest.mark.parametrize("name", NARROW)
def test_model_without_whole_blocks_is_refused(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match="64 columns are not a multiple of the block of 128"):
        build(checkpoint(name), tmp_path / "x.llmc", "int4-block128")
    assert list(tmp_path.glob("*")) == []
