"""`--calibration`: the table in a bundle, a reused table, a text, and invalid files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmc.cli import main
from llmc.compiler.calibrate.table import CalibrationTable
from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.safetensors import read_header
from llmc.compiler.driver import compile_model, plan_build
from llmc.compiler.quantize.round_to_nearest import dequantize, quantize
from llmc.compiler.request import BuildRequest
from llmc.passes.quantize.formats import get_format
from llmc.runtime.errors import BuildError, CheckpointError, RequestError
from support.packed_weights import read_packed

MODULES = "model.layers.0.self_attn.{}_proj"


def build(checkpoint: Path, output: Path, fmt: str = "fp8", **options: object) -> Path:
    request = BuildRequest(str(checkpoint), output, quant=fmt, verify=False, **options)  # type: ignore[arg-type]
    return compile_model(request).path


@pytest.fixture(scope="module")
def first(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(checkpoint("llama-tiny"), tmp_path_factory.mktemp("first") / "x.llmc")


def scales(bundle: Path) -> dict[str, float]:
    tensors = read_header(bundle / "weights/packed.safetensors")
    return {name: float(ref.read()[0]) for name, ref in tensors.items() if name.endswith(".input_scale")}


def test_fp8_scale_is_the_amax_of_the_table_over_448(first: Path) -> None:
    table = CalibrationTable.from_json((first / "calibration.json").read_bytes())
    fused = "|".join(f"{MODULES.format(one)}.input_scale" for one in "qkv")
    expected = np.float32(table.amax(MODULES.format("q"), "max")) / np.float32(448)
    assert scales(first)[fused] == expected
    manifest = json.loads((first / "manifest.json").read_text())
    assert manifest["quantization"]["calibration"] == {
        "text_sha256": table.source.text_sha256,
        "tokens": table.source.tokens,
        "method": "max",
    }
    worst = manifest["quantization"]["largest_output_errors"]
    assert len(worst) == 5
    assert all(0 < error < 0.1 for error in worst.values())


def test_reused_table_gives_the_same_scales(
    first: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    table = first / "calibration.json"
    again = build(checkpoint("llama-tiny"), tmp_path / "x.llmc", calibration=table)
    assert scales(again) == scales(first)
    assert (again / "calibration.json").read_bytes() == table.read_bytes()
    other = build(
        checkpoint("llama-tiny"), tmp_path / "y.llmc", calibration=table, calibration_method="percentile"
    )
    assert all(scale <= scales(first)[name] for name, scale in scales(other).items())
    assert scales(other) != scales(first)


def test_custom_calibration_text(first: Path, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The sea was calm, and nobody spoke. " * 30, "utf-8")
    bundle = build(checkpoint("llama-tiny"), tmp_path / "x.llmc", "int8", calibration=text)
    table = CalibrationTable.from_json((bundle / "calibration.json").read_bytes())
    assert (
        table.source.text_sha256
        != json.loads((first / "calibration.json").read_text())["source"]["text_sha256"]
    )


def test_windows_are_sampled_from_the_whole_text(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Texts that differ only at their end give different ranges. At most 4,096 tokens of each run."""
    tables = []
    for name, end in (("a", "the sea was calm. "), ("b", "QUIT; NOTHING! 0123456789 ")):
        text = tmp_path / f"{name}.txt"
        text.write_text("the sea was calm. " * 2000 + end * 2000, "utf-8")
        bundle = build(checkpoint("llama-tiny"), tmp_path / f"{name}.llmc", calibration=text)
        tables.append(CalibrationTable.from_json((bundle / "calibration.json").read_bytes()))
    assert tables[0].entries != tables[1].entries
    assert max(table.source.tokens for table in tables) <= 4096


def test_invalid_calibration_files_are_refused(
    first: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source, output = checkpoint("llama-tiny"), tmp_path / "x.llmc"
    with pytest.raises(RequestError, match="int4 cannot use a calibration table"):
        build(source, output, "int4", calibration=first / "calibration.json")
    with pytest.raises(RequestError, match=r"cannot read .*nowhere"):
        build(source, output, calibration=tmp_path / "nowhere.txt")
    with pytest.raises(RequestError, match="cannot read"):
        build(source, output, calibration=tmp_path / "nowhere.json")
    with pytest.raises(RequestError, match="smoothing needs the range of every channel") as caught:
        build(source, output, "int8-smoothquant", calibration=first / "calibration.json")
    assert "give a text" in caught.value.hint
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{}")
    with pytest.raises(CheckpointError, match="calibration table"):
        build(source, output, calibration=damaged)
    with pytest.raises(RequestError, match="has no module"):
        build(source, output, calibration=renamed(first, tmp_path))
    with pytest.raises(BuildError, match="--calibration needs quantization"):
        BuildRequest(str(source), output, calibration=damaged)
    with pytest.raises(BuildError, match="no calibration method 'median'"):
        BuildRequest(str(source), output, quant="fp8", calibration_method="median")  # type: ignore[arg-type]
    assert not list(tmp_path.glob("*.llmc*"))


@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_method_without_activation_quantization_is_refused(
    method: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    where = str(checkpoint("llama-tiny")), tmp_path / "x.llmc"
    for fmt in ("int8", "int4", "nvfp4-weight-only"):
        request = BuildRequest(*where, quant=fmt, calibration_method=method)  # type: ignore[arg-type]
        with pytest.raises(
            RequestError, match=f"{method} needs activation quantization, which {fmt} does not"
        ) as caught:
            plan_build(request)
        assert "such as fp8" in caught.value.hint
    for options in ({}, {"target": "tensorrt-rtx", "kv_dtype": "fp8"}):
        with pytest.raises(RequestError, match=f"{method} needs activation quantization") as caught:
            BuildRequest(*where, calibration_method=method, **options)  # type: ignore[arg-type]
        assert "--quant" in caught.value.hint
    BuildRequest(*where, quant="nvfp4", calibration_method=method)  # type: ignore[arg-type]


def test_rounding_to_nearest(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Weight-only formats need no calibration then; the inputs of others are still calibrated."""
    source = checkpoint("llama-tiny")
    int4 = build(source, tmp_path / "int4.llmc", "int4", rounding="nearest")
    fp8 = build(source, tmp_path / "fp8.llmc", "fp8", rounding="nearest")
    assert not (int4 / "calibration.json").exists()
    assert (fp8 / "calibration.json").exists()
    name = "model.layers.1.mlp.down_proj.weight"
    weight = Checkpoint.open(source).tensors[name].read()
    for bundle, fmt, search in ((int4, "int4", "mse"), (fp8, "fp8", "amax")):
        written = read_packed(bundle)[0][name]
        assert written.scales is not None
        expected = quantize(weight, get_format(fmt), name, search=search)
        assert np.array_equal(written.scales, np.broadcast_to(expected["weight_scale"], written.scales.shape))
        dequantized = dequantize(expected, get_format(fmt))
        assert np.array_equal(written.exact.astype(np.float32), dequantized)
        quantization = json.loads((bundle / "manifest.json").read_text())["quantization"]
        assert "largest_weight_errors" in quantization
        assert "largest_output_errors" not in quantization


def test_rounding_and_calibration_that_do_not_fit_are_refused(
    first: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source, text = str(checkpoint("llama-tiny")), tmp_path / "text.txt"
    text.write_text("The sea was calm.")
    request = BuildRequest(source, tmp_path / "x.llmc", quant="int4", rounding="nearest", calibration=text)
    with pytest.raises(RequestError, match="int4 with --rounding nearest has nothing to calibrate"):
        plan_build(request)
    table = first / "calibration.json"
    with pytest.raises(RequestError, match="--rounding gptq cannot use a calibration table"):
        plan_build(replace(request, quant="fp8", rounding="gptq", calibration=table))
    with pytest.raises(BuildError, match="no rounding 'up'"):
        replace(request, rounding="up")  # type: ignore[arg-type]
    with pytest.raises(BuildError, match="--rounding needs quantization"):
        BuildRequest(source, tmp_path / "x.llmc", rounding="nearest")
    _, inputs = plan_build(replace(request, quant="int8", rounding="gptq", calibration=None))
    assert isinstance(inputs.calibration, str)  # llmc's text


def test_table_of_another_model_is_refused_before_the_trace(
    first: Path, checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """llama-tiny-plain has the same modules as llama-tiny."""
    command = ["build", str(checkpoint("llama-tiny-plain")), "-o", str(tmp_path / "x.llmc"), "--quant", "fp8"]
    assert main.main([*command, "--calibration", str(first / "calibration.json"), "--dry-run"]) == 1
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert error.startswith("error: the calibration table is of another model")
    assert "leave --calibration out" in hint


def test_fp8_cache_needs_every_layer_in_the_table(
    first: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    table = json.loads((first / "calibration.json").read_text())
    del table["kv"]["1"]
    path = tmp_path / "short.json"
    path.write_text(json.dumps(table))
    request = BuildRequest(
        str(checkpoint("llama-tiny")), tmp_path / "x.llmc", "tensorrt-rtx", calibration=path, kv_dtype="fp8"
    )
    with pytest.raises(RequestError, match="no range of keys and values for layer 1") as caught:
        plan_build(request)
    assert caught.value.hint
    plan_build(replace(request, calibration=first / "calibration.json"))
    build(checkpoint("llama-tiny"), tmp_path / "y.llmc", calibration=path)  # the cache is fp32


def renamed(first: Path, directory: Path) -> Path:
    """Write a table with the modules of another model."""
    path = directory / "other.json"
    path.write_text((first / "calibration.json").read_text().replace("model.layers", "transformer.h"))
    return path


def test_the_command_line(
    first: Path, checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "build",
        str(checkpoint("llama-tiny")),
        "-o",
        str(first.with_name("new.llmc")),
        "--quant",
        "int4",
        "-q",
    ]
    assert main.main([*command, "--calibration", str(first / "calibration.json")]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: int4 cannot use a calibration table")
    assert hint.startswith("hint: give a text")
