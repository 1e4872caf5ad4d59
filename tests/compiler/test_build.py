"""The build as a whole: what it writes, that it repeats byte for byte, what it refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from llmc.compiler.checkpoint import recipe
from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.safetensors import read_header
from llmc.compiler.driver import compile_model, plan_build
from llmc.compiler.progress import Silent
from llmc.compiler.request import BuildRequest
from llmc.compiler.verify import verify_build
from llmc.compiler.verify.job import Findings, Job
from llmc.compiler.zoo import list_zoo, make
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.errors import BuildError, CheckpointError, VerificationError
from llmc.runtime.load import load_engine
from llmc.runtime.sampling import SamplingParams
from support.fast_builds import verify_in_this_process
from support.packed_weights import read_packed


class Notes(Silent):
    """Keeps what a build said."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.phases: list[str] = []

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def note(self, text: str) -> None:
        self.notes.append(text)


def tree(path: Path) -> dict[str, str]:
    """Every file below `path` with the sha256 of its bytes."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def job(checkpoint: Path, bundle: Path) -> Job:
    opened = Bundle.open(bundle)
    geometry = opened.manifest.geometry
    windows = sorted({layer.window for layer in geometry.layers if layer.window})
    return Job(
        checkpoint=str(checkpoint),
        engine=str(opened.engine_path()),
        backend=opened.manifest.target.engine,
        max_seq_len=opened.manifest.limits.max_seq_len,
        vocab_size=geometry.vocab_size,
        windows=windows,
        tolerance=1e-4,
        needed_bytes=1,
        tokenizer=str(bundle / "tokenizer" / "tokenizer.json"),
    )


def test_two_verified_builds_are_byte_identical(
    checkpoint: Callable[[str], Path], tmp_path: Path, own_traces: None
) -> None:
    """The first is verified in a child process, the second in this one."""
    source = checkpoint("gemma3-tiny")
    copy = tmp_path / "elsewhere" / source.name  # another place must make no difference
    shutil.copytree(source, copy)
    progress = Notes()
    first = compile_model(BuildRequest(str(source), tmp_path / "a.llmc"), progress)
    with pytest.MonkeyPatch.context() as patch:
        verify_in_this_process(patch)
        second = compile_model(BuildRequest(str(copy), tmp_path / "b" / "a.llmc"))
    assert tree(first.path) == tree(second.path)
    record = first.manifest.verification
    assert record.status == "passed"
    assert record.tokens_compared is not None
    assert record.tokens_compared > 100
    assert record.details["window_crossed"] is True
    assert any("GiB of memory" in note for note in progress.notes)
    assert progress.phases[0] == "read checkpoint"
    assert not any(str(tmp_path).encode() in file.read_bytes() for file in first.path.rglob("*.onnx"))


def test_the_file_for_openvino_is_valid_onnx_with_weights_outside(bundle: Callable[..., Path]) -> None:
    path = Bundle.open(bundle("qwen3-tiny", "openvino")).engine_path()
    onnx.checker.check_model(str(path))
    model = onnx.load(str(path), load_external_data=False)
    assert [function.name for function in model.functions] == ["PagedAttention"]
    assert {node.domain for node in model.graph.node} == {"", "llmc"}
    assert path.stat().st_size < 100_000


def test_tied_weights_are_stored_once_and_values_are_the_checkpoints(
    checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    """Of 16-bit checkpoints tests/passes/test_keep_16bit_weights.py checks it."""
    source = Checkpoint.open(checkpoint("qwen3-tiny")).tensors
    packed, vectors = read_packed(bundle("qwen3-tiny"))
    native = {**{name: matrix.values for name, matrix in packed.items()}, **vectors}
    header = read_header(bundle("qwen3-tiny", "openvino") / "weights" / "model.safetensors")
    for written in (native, {name: ref.read() for name, ref in header.items()}):
        names = [part for name in written for part in name.split("|") if part in source]
        assert sorted(names) == sorted(source)  # each once
        for name, found in written.items():
            parts = [source[part].read() for part in name.split("|") if part in source]
            if parts:  # no rotary table
                assert found.dtype == np.float32
                assert np.array_equal(found, np.concatenate(parts))


def test_a_plan_writes_nothing(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    plan, _ = plan_build(BuildRequest(str(checkpoint("mistral-tiny")), tmp_path / "x.llmc", max_seq_len=100))
    assert list(tmp_path.iterdir()) == []
    assert plan.sizes.max_seq_len == 100
    assert {layer.window for layer in plan.geometry.layers} == {24}
    assert plan.sizes.weight_bytes > 135_488 * 4


def test_the_context_is_a_limit_of_the_bundle(
    checkpoint: Callable[[str], Path], tmp_path: Path, fast_builds: None
) -> None:
    request = BuildRequest(str(checkpoint("llama-tiny")), tmp_path / "x.llmc", max_seq_len=40, verify=False)
    engine = load_engine(compile_model(request).path)
    output = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=500, ignore_eos=True))[0]
    assert len(output.token_ids) == 37
    assert output.finish_reason == "length"
    with pytest.raises(BuildError, match="more than the model's context of 256"):
        plan_build(BuildRequest(str(checkpoint("llama-tiny")), tmp_path / "y.llmc", max_seq_len=257))


def test_an_engine_with_other_weights_fails_verification(
    bundle: Callable[[str], Path], tmp_path: Path, fast_builds: None
) -> None:
    other = make("llama-tiny", tmp_path / "other", seed=1)
    with pytest.raises(VerificationError, match="does not reproduce the checkpoint"):
        verify_build.run(job(other, bundle("llama-tiny")), Silent())


def test_a_failed_verification_leaves_no_bundle(
    checkpoint: Callable[[str], Path], tmp_path: Path, fast_builds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Findings(1.0, 1e-4, 0.5, 100, False, 48)
    monkeypatch.setattr(verify_build, "compare_in_child", lambda *_: wrong)
    with pytest.raises(VerificationError, match=r"max logit error 1\.00e\+00"):
        compile_model(BuildRequest(str(checkpoint("llama-tiny")), tmp_path / "x.llmc"))
    assert list(tmp_path.iterdir()) == []


def test_a_model_too_large_to_verify_is_recorded_as_such(
    checkpoint: Callable[[str], Path], bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_build, "available_memory", lambda: 0)
    progress = Notes()
    record = verify_build.run(job(checkpoint("llama-tiny"), bundle("llama-tiny")), progress)
    assert record.status == "skipped"
    assert "memory" in str(record.reason)
    assert any("not verified" in note for note in progress.notes)


def test_a_killed_verification_process_is_a_message(
    checkpoint: Callable[[str], Path],
    bundle: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nread task\nkill -9 $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(BuildError, match="verification process was killed by signal 9") as caught:
        verify_build.run(job(checkpoint("llama-tiny"), bundle("llama-tiny")), Silent())
    assert "memory" in caught.value.hint


def test_a_checkpoint_without_a_tokenizer_builds_and_runs_on_token_ids(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "bare"
    shutil.copytree(checkpoint("llama-tiny"), source)
    for file in source.glob("tokenizer*"):
        file.unlink()
    result = compile_model(BuildRequest(str(source), tmp_path / "bare.llmc", verify=False))
    assert not (result.path / "tokenizer").exists()
    engine = load_engine(result.path)
    assert len(engine.generate([[5, 6]], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids) == 4


def test_a_checkpoint_that_only_says_it_is_quantized(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "quantized"
    shutil.copytree(checkpoint("llama-tiny"), source)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no tensor is quantized") as caught:
        plan_build(BuildRequest(str(source), tmp_path / "x.llmc"))
    assert "llmc check" in caught.value.hint


def test_a_value_that_transformers_refuses_is_a_checkpoint_error(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "odd"
    shutil.copytree(checkpoint("llama-tiny"), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    with pytest.raises(CheckpointError, match="transformers refuses"):
        plan_build(BuildRequest(str(source), tmp_path / "x.llmc"))


def test_a_family_without_a_recipe_gets_an_honest_try(tmp_path: Path, fast_builds: None) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = AutoConfig.for_model("ernie4_5", **settings, **heads, head_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "ernie4_5")
    result = compile_model(BuildRequest(str(tmp_path / "ernie4_5"), tmp_path / "ernie4_5.llmc"))
    assert result.manifest.verification.status == "passed"
    assert not recipe.load("ernie4_5").known


def test_every_zoo_family_has_a_recipe() -> None:
    assert {entry.model_type for entry in list_zoo()} <= set(recipe.known_families())


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [("target", "tpu", "no target"), ("dtype", "int3", "no dtype"), ("max_seq_len", 0, "max-seq-len is 0")],
)
def test_a_request_that_means_nothing_is_refused(field: str, value: object, complaint: str) -> None:
    with pytest.raises(BuildError, match=complaint):
        BuildRequest("x", Path("x.llmc"), **{field: value})  # type: ignore[arg-type]
