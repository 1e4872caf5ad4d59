"""The formats that a target supports, and the errors for the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from llmc.cli import main
from llmc.compiler.targets import capability
from llmc.compiler.targets.base import Resolved
from llmc.compiler.targets.cpu import CpuTarget
from llmc.passes.quantize.formats import FORMATS
from llmc.runtime.errors import RequestError, UnsupportedError


@pytest.mark.parametrize("fmt", FORMATS)
def test_cpu_supports_every_format(fmt: str) -> None:
    assert capability.check(fmt, "cpu", ()) is FORMATS[fmt]


@pytest.mark.parametrize(
    ("fmt", "sms", "needed", "instead"),
    [
        ("fp8", (80, 89), "fp8 needs SM89 or newer, but the engine is for SM80", "int8"),
        ("fp8-per-channel", (), "a portable engine must run on SM80", "int8"),
        ("nvfp4", (89,), "nvfp4 needs SM100 or newer, but the engine is for SM89", "int4"),
        ("nvfp4-weight-only", (), "a portable engine must run on SM80", "int4"),
    ],
)
def test_unsupported_format_names_the_nearest_one(
    fmt: str, sms: tuple[int, ...], needed: str, instead: str
) -> None:
    with pytest.raises(UnsupportedError, match=needed) as caught:
        capability.check(fmt, "tensorrt-rtx", sms)
    assert f"use --quant {instead}, which runs there" in caught.value.hint


@pytest.mark.parametrize(
    ("fmt", "sms"),
    [
        ("fp8", (89, 120)),
        ("nvfp4", (120,)),
        ("nvfp4-weight-only", (100,)),
        ("int4", ()),
        ("int8", (80,)),
        ("int8-smoothquant", ()),
    ],
)
def test_formats_that_a_gpu_supports(fmt: str, sms: tuple[int, ...]) -> None:
    assert capability.check(fmt, "tensorrt-rtx", sms) is FORMATS[fmt]


def test_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(RequestError, match="'q4_0'") as caught:
        capability.check("q4_0", "cpu", ())
    assert "nvfp4-weight-only" in caught.value.hint


def test_unsupported_format_is_refused_before_the_trace(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "x.llmc"
    command = ["build", str(checkpoint("llama-tiny")), "-o", str(output), "--target", "tensorrt-rtx", "-q"]
    assert main.main([*command, "--quant", "nvfp4", "--sm", "89"]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: nvfp4 needs SM100 or newer, but the engine is for SM89"
    assert hint == "hint: use --quant int4, which runs there; or name newer GPUs only, as in --sm 120"
    assert list(tmp_path.iterdir()) == []


SOFTCAP = "llmc.PagedAttention <softcap = 30.0> (x, x, x, keys)"


@pytest.mark.parametrize(
    ("engine", "kv_dtype", "node", "argument", "message"),
    [
        ("openvino", "fp32", SOFTCAP, "engine", "OpenVINO cannot run this model: .* attention softcap"),
        ("native", "fp32", "Cos (x)", "engine", "the native engine cannot run this model: .*Cos"),
        ("onnxruntime", "int8", "Neg (x)", "engine", "no KV cache of int8"),
    ],
)
def test_an_engine_that_cannot_run_the_model_is_a_refused_option(
    engine: str, kv_dtype: str, node: str, argument: str, message: str
) -> None:
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 23, "llmc" : 1]>
        g (float[T,4] x, float[1,1,32,4] keys) => (float[T,4] y) {{ y = {node} }}"""
    )
    model.graph.inputs[1].name = "key_cache.0"
    with pytest.raises(UnsupportedError, match=message) as error:
        CpuTarget().choose_engine(Resolved("cpu", "fp32", kv_dtype, engine=engine), model)
    assert error.value.argument == argument
    assert error.value.hint
