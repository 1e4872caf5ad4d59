"""Every format on every target that supports it, for every family of the zoo: built and verified.

The build itself verifies: it compares the engine (or TensorRT's graph, in ONNX Runtime) with transformers,
with the same codes dequantized in numpy and the same activation quantization, within the tolerances of
docs/explanation/fidelity.md. To save time, each family is traced once, and the verification runs in this
process. Every family and format is verified on the native engine and as TensorRT's graph; a third of them,
with every family and every format, becomes an engine of TensorRT and of a second engine for the CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import pytest

from llmc.compiler import zoo
from llmc.compiler.driver import compile_model
from llmc.compiler.request import BuildRequest
from llmc.compiler.targets.tensorrt import build as tensorrt_build
from llmc.passes.quantize.formats import FORMATS
from llmc.plugins.paged_attention import spec
from llmc.runtime.bundle.manifest import Manifest
from llmc.runtime.errors import RequestError
from support.families import DENSE, MIXTURES
from support.sampled import every_nth

FAMILIES = [entry.name for entry in zoo.list_zoo() if entry.name.endswith(("-tiny", "-tiny-plain"))]
NARROW = ("llama-tiny", "mistral-tiny", "olmo2-tiny")  # no block of 128 divides their 64 columns
OLDEST_SM = {"int8": 80, "int4": 80, "e4m3": 89, "e2m1": 120}  # by the element type of the weights
PAIRS = [(n, f) for n in DENSE for f in FORMATS if f != "int4-block128" or n not in NARROW]
WEIGHT_ONLY = ("int8", "int4", "mxfp4", "nvfp4-weight-only")
WITH_EXPERTS = [(name, fmt) for name in MIXTURES for fmt in WEIGHT_ONLY]
needs_tensorrt = pytest.mark.skipif(
    not tensorrt_build.is_installed("tensorrt_rtx"), reason="the package tensorrt-rtx is not installed"
)
pytestmark = pytest.mark.usefixtures("fast_builds")
# The pairs that become engines of TensorRT and of a second engine for the CPU.
THIRD = {*every_nth(3, DENSE, FORMATS), *every_nth(3, MIXTURES, WEIGHT_ONLY)}


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
    """On the native engine, which is the default, and some on the first of the others that runs the model."""
    in_openvino = FORMATS[fmt].activations in ("", "int8") and name not in ("gemma2-tiny", *MIXTURES)
    other = "openvino" if in_openvino else "onnxruntime"
    for engine in (None, other) if (name, fmt) in THIRD else (None,):
        manifest = build(checkpoint(name), tmp_path / f"{engine}.llmc", fmt, engine=engine)
        assert manifest.target.engine == (engine or "native")
        assert ("calibration.json" in manifest.files) == (fmt != "int8")
        if FORMATS[fmt].activations:
            inputs = manifest.verification.details["activation_quantization"]
            assert inputs["engine"]["rms_logit_error"] <= 0.5 * inputs["changes"]["rms_logit_error"]


def no_engine(job: tensorrt_build.EngineJob, *_: object) -> tensorrt_build.BuiltEngine:
    """Stand in for `build`: a file without an engine, and the graph's number of attention layers."""
    Path(job.plan).write_bytes(b"")
    nodes = onnx.load(job.onnx).graph.node
    layers = sum(node.op_type == spec.NAME for node in nodes)
    return tensorrt_build.BuiltEngine(0, hashlib.sha256(b"").hexdigest(), layers, 0, "none")


@pytest.mark.slow
@needs_tensorrt
@pytest.mark.parametrize(("name", "fmt"), PAIRS)
def test_for_tensorrt(
    name: str,
    fmt: str,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its graph, and some of its engines."""
    if (name, fmt) not in THIRD:
        monkeypatch.setattr(tensorrt_build, "build", no_engine)
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
