"""The same build again is answered from the bundle that exists; any other one is not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llmc.cli import main
from llmc.compiler import build_key as module
from llmc.compiler.build_key import FIELD, build_key
from llmc.compiler.driver import compile_model
from llmc.compiler.request import BuildRequest
from llmc.runtime.bundle.manifest import MANIFEST_NAME, Manifest
from llmc.runtime.errors import BuildError

REQUEST = BuildRequest("x", Path("x.llmc"), quant="fp8")
FILES = {"config.json": "0" * 64}


@pytest.fixture(scope="module")
def built(bundle: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(bundle("llama-tiny"), tmp_path_factory.mktemp("built") / "x.llmc"))


@pytest.fixture
def request_again(built: Path, checkpoint: Callable[[str], Path]) -> BuildRequest:
    return BuildRequest(str(checkpoint("llama-tiny")), built, verify=False)


def edit(path: Path, **details: object) -> None:
    manifest = Manifest.from_json((path / MANIFEST_NAME).read_bytes())
    verification = replace(manifest.verification, details=details)
    (path / MANIFEST_NAME).write_bytes(replace(manifest, verification=verification).to_json())


def test_the_same_build_again_is_answered_from_the_bundle(
    request_again: BuildRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in request_again.output.rglob("*")}
    result = compile_model(request_again)
    assert result.reused
    assert result.path == request_again.output.resolve()
    code = main.main(["build", request_again.checkpoint, "-o", str(request_again.output), "--no-verify"])
    assert (code, "was up to date, nothing was built" in capsys.readouterr().out) == (0, True)
    assert {file: file.stat().st_mtime_ns for file in request_again.output.rglob("*")} == before


def test_other_options_are_not(request_again: BuildRequest) -> None:
    for other in (replace(request_again, max_seq_len=64), replace(request_again, verify=True)):
        with pytest.raises(BuildError, match="exists"):
            compile_model(other)


def test_another_checkpoint_is_not(request_again: BuildRequest, tmp_path: Path) -> None:
    other = tmp_path / Path(request_again.checkpoint).name
    shutil.copytree(request_again.checkpoint, other)
    (other / "generation_config.json").write_text('{"eos_token_id": 1}')
    with pytest.raises(BuildError, match="exists"):
        compile_model(replace(request_again, checkpoint=str(other)))


def test_a_damaged_bundle_and_one_of_an_older_llmc_are_not(
    request_again: BuildRequest, tmp_path: Path
) -> None:
    old = Path(shutil.copytree(request_again.output, tmp_path / "old.llmc"))
    edit(old)
    damaged = Path(shutil.copytree(request_again.output, tmp_path / "damaged.llmc"))
    with open(damaged / "rank0.program.json", "r+b") as file:
        file.write(b"damaged")
    for output in (old, damaged):
        with pytest.raises(BuildError, match="exists"):
            compile_model(replace(request_again, output=output))


def test_the_key_follows_from_inputs_options_and_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one")
    calibrated = replace(REQUEST, calibration=text)
    keys = [
        build_key(REQUEST, "x", FILES),
        build_key(REQUEST, "y", FILES),
        build_key(REQUEST, "x", {**FILES, "model.safetensors": "1" * 64}),
        build_key(replace(REQUEST, quant="int4"), "x", FILES),
        build_key(replace(REQUEST, kv_dtype="int8"), "x", FILES),
        build_key(replace(REQUEST, exclude=("a",)), "x", FILES),
        build_key(calibrated, "x", FILES),
    ]
    text.write_text("two")
    keys.append(build_key(calibrated, "x", FILES))
    monkeypatch.setattr(module, "version", lambda name: "9")
    keys.append(build_key(REQUEST, "x", FILES))
    monkeypatch.setattr(module, "_code", lambda: "edited")
    keys.append(build_key(REQUEST, "x", FILES))
    assert len(set(keys)) == len(keys)


def test_where_it_is_written_and_what_it_replaces_does_not_matter() -> None:
    same = replace(REQUEST, output=Path("/else/where.llmc"), checkpoint="./x", force=True)
    assert build_key(same, "x", FILES) == build_key(REQUEST, "x", FILES)


def test_the_key_is_in_the_manifest(built: Path) -> None:
    key = Manifest.from_json((built / MANIFEST_NAME).read_bytes()).verification.details[FIELD]
    assert len(key) == 64
