"""What rounding loses: the figures against torch's, the windows of a text, and an engine in 16 bits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmc.compiler import texts
from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.child_process import Child
from llmc.compiler.progress import Silent
from llmc.compiler.verify import compare, difference, loss, prepare, verify_build
from llmc.compiler.verify.difference import DifferenceMeter
from llmc.compiler.verify.engine_weights import EngineWeight
from llmc.compiler.verify.evaluation_states import EvaluationStates
from llmc.compiler.verify.job import Evaluation, Findings, Job, Question
from llmc.compiler.verify.reference import Reference
from llmc.runtime.errors import RequestError
from support.passes import lower_for_tensorrt, oracle_graph

TALES = Path(__file__).parents[2] / "model_zoo/llama/tales"
TOKENIZER = TALES / "tokenizer.json"


def test_the_figures_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difference, "_BLOCK_ELEMENTS", 130)  # two rows at a time
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50, 12).tolist()
    reference = rng.standard_normal((12, 50)).astype(np.float32) * 3
    other = reference + rng.standard_normal((12, 50)).astype(np.float32)
    meter = DifferenceMeter()
    for start in (0, 5, 10):
        stop = min(start + 5, 12)
        meter.add(reference[start:stop], other[start:stop], ids[start + 1 : stop + 1])
    got = meter.result()
    p, q = torch.tensor(reference).double(), torch.tensor(other).double()
    following = torch.tensor(ids[1:])
    kl = torch.nn.functional.kl_div(
        q.log_softmax(1), p.log_softmax(1), log_target=True, reduction="batchmean"
    )
    assert got.kl == pytest.approx(float(kl), rel=1e-9)
    for logits, perplexity in ((p, got.reference_perplexity), (q, got.perplexity)):
        expected = torch.nn.functional.cross_entropy(logits[:-1], following).exp()
        assert perplexity == pytest.approx(float(expected), rel=1e-9)
    assert got.perplexity_increase == pytest.approx(100 * (got.perplexity / got.reference_perplexity - 1))  # type: ignore[operator]
    assert got.agreement() == float((p.argmax(1) == q.argmax(1)).double().mean())
    short = p.max(1).values - p[torch.arange(12), q.argmax(1)]
    assert got.agreement(0.8) == float((short <= 0.8).double().mean()) > got.agreement()
    assert got.scale == np.abs(reference).max()
    alone = loss.perplexity([ids], [iter([other[:7], other[7:]])])
    assert alone == pytest.approx(got.perplexity, rel=1e-3)


def test_numbers_that_are_not_finite_are_seen() -> None:
    meter = DifferenceMeter()
    meter.add(np.zeros((2, 8), np.float32), np.array([[0.0] * 8, [np.inf] + [0.0] * 7], np.float32), [1, 2])
    record = loss.record(meter.result(), 0.1, text=True)
    assert not np.isfinite(record["mean_kl"])
    found = Findings(0.1, 0.2, 1.0, 10, None, 0, 1.0, {"quantization_loss": {"engine": record}})
    assert "logits of the evaluation text that are not finite" in verify_build.faults(found, "bf16")


def test_the_last_matrix_is_applied_a_few_rows_at_a_time(checkpoint: Callable[[str], Path]) -> None:
    reference = Reference(str(checkpoint("llama-tiny")), "fp32")
    windows = texts.random_windows(384, 100)
    states = [reference.states(ids) for ids in windows]
    head = reference.head()
    shapes = [chunk.shape for chunks in loss.rows_of(head, states) for chunk in chunks]
    assert shapes == [(64, 384), (36, 384)] * len(windows)
    same = loss.measure(head, states, windows, loss.rows_of(head, states))
    assert (same.largest, same.kl, same.agreement()) == (0, 0, 1)
    # Probabilities add up to 1 but for the last bit, and which way it is rounded depends on the CPU.
    assert same.perplexity_increase == pytest.approx(0, abs=1e-12)
    assert len(same.top1_gap) == 100 * len(windows)
    whole = [reference.logits(ids) for ids in windows]
    assert loss.perplexity(windows, ([one] for one in whole)) == pytest.approx(same.perplexity, rel=1e-3)


def test_the_reference_may_run_before_the_engine_exists(
    checkpoint: Callable[[str], Path],
) -> None:
    evaluation = Evaluation(str(checkpoint("llama-tiny")), 100, 384)
    reference = Reference(evaluation.checkpoint, "fp32", max_seq_len=100)
    early, late = EvaluationStates.early(evaluation), EvaluationStates.of(evaluation, reference)
    assert early is not None
    assert early.windows == late.windows
    assert all(map(torch.equal, early.states, late.states))
    assert EvaluationStates.early(replace(evaluation, checkpoint="nowhere")) is None  # the build says why
    quantized = {"model.layers.0.mlp.up_proj.weight": EngineWeight("int8", "", {}, (0, 1))}
    job = Job(evaluation.checkpoint, "", "", 100, 384, [], 1e-4, 0, quantized=quantized)
    assert compare._load_reference(job, early) == (early.reference, early)
    model, another = compare._load_reference(replace(job, max_seq_len=90), early)
    assert another is not None
    assert model is another.reference is not early.reference
    assert [len(window) for window in another.windows] == [90] * len(another.windows)


@pytest.mark.parametrize(("available", "early"), [(None, True), (2 << 30, True), (1 << 30, False)])
def test_with_little_memory_the_reference_runs_after_the_engine(
    available: int | None, early: bool, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "available_memory", lambda: available)
    sent: list[dict[str, Any]] = []
    opened = Checkpoint.open(checkpoint("llama-tiny"))
    prepare.evaluate_early(SimpleNamespace(prepare=sent.append), opened, "t.json", 384, 100)  # type: ignore[arg-type]
    evaluation = {"checkpoint": str(opened.path), "max_seq_len": 100, "vocab_size": 384}
    assert sent == [evaluation | {"tokenizer": "t.json", "reference_weights": "checkpoint"}] * early


# The text


def test_the_evaluation_text_is_long_enough_and_of_several_kinds() -> None:
    text = texts.read_text(texts.EVALUATION_TEXT)
    assert 1300 < len(text.split()) < 1700
    windows = texts.windows_of(text, TOKENIZER, 4096, 1024)
    assert 1400 < sum(map(len, windows)) <= 6 * 256
    assert texts.sha256(text) == hashlib.sha256(texts.EVALUATION_TEXT.read_bytes()).hexdigest()
    from tokenizers import Tokenizer

    shown = [Tokenizer.from_file(str(TOKENIZER)).decode(window) for window in windows]
    for word, index in (("ferryman", 0), ("Marta", 1), ("lighthouse", 2), ("float(line)", -1)):
        assert word in shown[index]


def tokenizer(path: Path, begin: bool) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2, "c": 3, "d": 900}, unk_token="b"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if begin:
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    made.save(str(path))
    return path


def test_every_window_begins_as_a_prompt_does(tmp_path: Path) -> None:
    with_begin = tokenizer(tmp_path / "t.json", begin=True)
    windows = texts.windows_of("a c " * 300 + "d", with_begin, 800, 1000)
    assert [len(window) for window in windows] == [256, 256, 600 - 2 * 255 + 1]
    assert all(window[0] == 0 for window in windows)
    assert windows[0][1:4] == [1, 3, 1]
    without = texts.windows_of("a c " * 300, tokenizer(tmp_path / "u.json", begin=False), 800, 10)
    assert all(window[0] == 1 and len(window) == 10 for window in without)
    assert len(without) == 6


def test_windows_come_from_all_parts_of_a_long_text(tmp_path: Path) -> None:
    plain = tokenizer(tmp_path / "t.json", begin=False)
    text = "a " * 256 * 10 + "b " * 256 * 10 + "c " * 256 * 10
    kinds = [window[0] for window in texts.windows_of(text, plain, 800, 1000, most=7)]
    assert kinds == [1, 1, 2, 2, 2, 3, 3]


@pytest.mark.parametrize(("text", "tokens"), [("a", 1), ("d d d", 0)])
def test_a_text_that_is_too_short(text: str, tokens: int, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=f"too few tokens: {tokens}"):
        texts.windows_of(text, tokenizer(tmp_path / "t.json", begin=False), 800, 1000)


def test_what_the_child_refuses_is_an_error_here(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    words = tokenizer(tmp_path / "t.json", begin=False)
    question = Question("", "openvino", 256, 800, str(words), str(tmp_path / "a.txt"), "", 1e-4)
    child = Child("llmc.compiler.verify.child", "verification", "more memory")
    with pytest.raises(RequestError, match="too few tokens: 1") as error:
        child.run({"measure": asdict(question)}, Silent())
    assert error.value.hint == "give a longer one"


# An engine that computes in 16 bits


@pytest.mark.slow
def test_what_an_engine_in_16_bits_loses_is_recorded_apart(tmp_path: Path) -> None:
    """Weights that E4M3 holds exactly: rounding them loses nothing, the engine's own bf16 does."""
    source, arrays, stored = tmp_path / "exact", {}, {}
    source.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (source / name).write_bytes((TALES / name).read_bytes())
    tensors = load_file(TALES / "model.safetensors")
    for name, weight in tensors.items():
        if name.endswith("_proj.weight"):
            scale = 2.0**-8
            codes = (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            tensors[name] = (codes.float() * scale).bfloat16()
            arrays |= {name: codes, f"{name}_scale": torch.tensor(scale)}
            names = {"weight": name, "weight_scale": f"{name}_scale"}
            stored[name] = EngineWeight("fp8", str(tmp_path / "w.safetensors"), names, (0, len(weight)))
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    save_file(arrays, tmp_path / "w.safetensors")
    findings = compare_oracle(source, stored, tmp_path)
    assert not verify_build.faults(findings, "bf16")
    found = findings.details["quantization_loss"]
    assert (found["max_logit_error"], found["mean_kl"], found["top1_agreement"]) == (0, 0, 1)
    assert found["perplexity"] == found["perplexity_unquantized"]
    engine = found["engine"]
    assert engine["positions"] == found["positions"] == 1464
    assert 0 < engine["mean_kl"] < 0.001
    assert engine["top1_agreement"] > 0.99 > engine["top1_agreement_without_ties"]
    assert engine["near_tie"] == findings.details["near_tie"]
    assert abs(engine["perplexity_increase_percent"]) < 1


def compare_oracle(source: Path, stored: dict[str, EngineWeight], directory: Path) -> Findings:
    """The oracle of a TensorRT build in bf16, against `source`."""
    from llmc.compiler.bundle_writer import BundleWriter
    from llmc.compiler.checkpoint.checkpoint import Checkpoint
    from llmc.compiler.checkpoint.config import load_config
    from llmc.compiler.trace.export import trace
    from llmc.compiler.verify.compare import compare
    from llmc.compiler.weights.write import write_weights
    from llmc.passes import contract
    from llmc.passes.legalize.finalize import serialize
    from llmc.passes.pipeline import canonicalize

    opened = Checkpoint.open(source)
    model = trace(load_config(opened), "bf16", 1024).model
    contract.run(model, canonicalize())
    lower_for_tensorrt(model, "bf16")
    with BundleWriter(directory / "x.llmc") as writer:
        write_weights(model, opened.tensors, writer)
        path = writer.path("oracle.onnx")
        path.write_bytes(serialize(oracle_graph(model, "bf16")))
        common = {
            "max_seq_len": 1024,
            "vocab_size": 4096,
            "windows": [],
            "tolerance": 1e-4,
            "needed_bytes": 0,
            "tokenizer": str(source / "tokenizer.json"),
        }
        job = Job(str(source), str(path), "onnxruntime", **common, dtype="bf16", quantized=stored)  # type: ignore[arg-type]
        return compare(job)
