"""`--engine`: what each engine of the CPU runs, what is refused, and `llmc inspect --program`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmc.cli import main
from llmc.compiler.driver import compile_model, plan_build
from llmc.compiler.request import BuildRequest
from llmc.runtime.bundle.manifest import Manifest
from llmc.runtime.errors import BuildError
from support.fast_builds import fast_builds


@pytest.fixture(scope="module")
def built(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Engine -> a bundle of llama-tiny for it, built and verified once."""
    root = tmp_path_factory.mktemp("engines")

    def get(engine: str) -> Path:
        path = root / f"{engine}.llmc"
        if not path.exists():
            with fast_builds():
                compile_model(BuildRequest(str(checkpoint("llama-tiny")), path, engine=engine))
        return path

    return get


@pytest.mark.parametrize("engine", ["native", "onnxruntime"])
def test_the_named_engine_is_built_and_equals_transformers(engine: str, built: Callable[[str], Path]) -> None:
    manifest = Manifest.from_json((built(engine) / "manifest.json").read_bytes())
    assert (manifest.target.engine, manifest.target.reason) == (engine, "--engine named it")
    assert list(manifest.target.requires) == [engine] * (engine != "native")
    assert (manifest.verification.status, manifest.verification.greedy_tokens_equal) == ("passed", True)


def test_openvino_is_refused_for_a_softcap(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "x.llmc"
    command = [
        "build",
        str(checkpoint("gemma2-tiny")),
        "-o",
        str(output),
        "--engine",
        "openvino",
        "-q",
        "--no-verify",
    ]
    assert main.main(command) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: OpenVINO cannot run this model: ")
    assert error.endswith(" has an attention softcap")
    assert hint == "hint: leave --engine out"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tensorrt", "engine": "native"}, "the target is tensorrt"),
        ({"target": "tensorrt-rtx", "engine": "openvino"}, "the target is tensorrt-rtx"),
        ({"engine": "abacus"}, "there is no engine 'abacus'"),
    ],
)
def test_an_engine_of_another_target_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BuildError, match=message) as error:
        BuildRequest("x", Path("x.llmc"), **options)
    assert error.value.argument == "engine"


def test_native_takes_formats_of_gpus_and_an_int8_cache(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    request = BuildRequest(
        str(checkpoint("llama-tiny")), tmp_path / "x.llmc", engine="native", quant="fp8", kv_dtype="int8"
    )
    plan, _ = plan_build(request)
    assert plan.target.engine == "native"
    assert plan.resolved.kv_dtype == "int8"


def test_a_program_is_printed_an_instruction_a_line(
    built: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["inspect", str(built("native")), "--program"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in lines] == list(range(len(lines)))
    assert lines[0].split()[1:4] == ["b0", "=", "embed(model.embed_tokens.weight)"]
    assert sum("attention(" in line for line in lines) == 2


def test_a_bundle_of_another_engine_has_no_program(
    built: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["inspect", str(built("onnxruntime")), "--program"]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: onnxruntime has no program: its engine is onnxruntime"
    assert hint == "hint: build it with --engine native"
