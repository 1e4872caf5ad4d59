"""The formats that a target supports, and the errors for the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llmc.cli import main
from llmc.compiler.targets import capability
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
