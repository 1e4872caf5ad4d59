"""`llmc verify`: its output, its thresholds and its errors."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.cli import main
from llmc.compiler import texts
from llmc.compiler.verify import judge
from llmc.runtime.bundle.manifest import Gpu, Manifest, Precision, Target, Verification
from llmc.runtime.bundle.reader import Bundle

SHA = texts.sha256(texts.EVALUATION_TEXT.read_text("utf-8"))
LOSS = {
    "text_sha256": SHA,
    "reference": "checkpoint",
    "positions": 1464,
    "max_logit_error": 2.3,
    "rms_logit_error": 0.26,
    "mean_kl": 0.019,
    "top1_agreement": 0.8962,
    "top1_agreement_without_ties": 0.8955,
    "near_tie": 0.0005,
    "perplexity_unquantized": 40.0,
    "perplexity": 41.0,
    "perplexity_increase_percent": 2.5,
}
PASSED = Verification("passed", None, "transformers", 2e-5, 2e-4, 1.0, True, 148, {})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def llmc(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, list[str]]]:
    """Run a command line in this process -> exit code, stdout, lines of stderr without notes."""

    def call(*arguments: object) -> tuple[int, str, list[str]]:
        capsys.readouterr()
        code = main.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return (
            code,
            out,
            [line for line in err.splitlines() if not re.match(r"note: this needs|\[ *[\d.]+ s\] ", line)],
        )

    return call


@pytest.fixture
def tiny(bundle: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of llama-tiny's bundle, which was not verified."""
    return shutil.copytree(bundle("llama-tiny"), tmp_path / "tiny.llmc")


def rewrite(bundle: Path, **changes: Any) -> None:
    """Change fields in the manifest of a bundle."""
    manifest = Manifest.from_json((bundle / "manifest.json").read_bytes())
    (bundle / "manifest.json").write_bytes(replace(manifest, **changes).to_json())


@pytest.fixture
def quantized(tiny: Path) -> Path:
    """A bundle whose manifest records that it is quantized and verified, with the quantization loss."""
    record = replace(PASSED, details={"quantization_loss": LOSS})
    rewrite(
        tiny, verification=record, quantization={"format": "int4", "modules": 14, "bits_per_parameter": 4.5}
    )
    return tiny


@pytest.fixture
def for_gpu(tiny: Path) -> Path:
    """A bundle for a GPU in 16 bits, with the figures of its engine as well."""
    engine = LOSS | {"mean_kl": 0.021, "top1_agreement": 0.9, "positions": 1464}
    rewrite(
        tiny,
        verification=replace(
            PASSED, greedy_tokens_equal=None, details={"quantization_loss": LOSS | {"engine": engine}}
        ),
        quantization={"format": "nvfp4", "modules": 14},
        target=Target("tensorrt-rtx", "tensorrt-rtx", "a test", {}),
        gpu=Gpu((), 512, 16, 32, ()),
        format_version=2,
    )
    return tiny


# Output


def test_the_recorded_figures(llmc: Any, quantized: Path) -> None:
    code, out, errors = llmc(
        "verify", quantized, "--min-top1", "0.89", "--max-kl", "0.05", "--max-perplexity-increase", 3
    )
    assert (code, errors) == (0, [])
    assert out.splitlines() == [
        "bundle           tiny, every byte of 5 files verified",
        "figures          recorded, on 1,464 positions of the evaluation text",
        "top-1 agreement  0.8962, 0.8955 without near ties",
        "mean KL          0.019 nats",
        "perplexity       40 -> 41 (+2.50 %)",
        "max logit error  2.3",
        "ok               top-1 agreement 0.8962 (at least 0.89)",
        "ok               mean KL 0.019 (at most 0.05)",
        "ok               perplexity increase in % 2.5 (at most 3)",
    ]


def test_a_quantized_cache_must_meet_the_thresholds_too(llmc: Any, quantized: Path) -> None:
    """The losses of the weights and of the cache are measured apart, and an engine has both."""
    cache = {"kv_dtype": "int8", "mean_kl": 0.0037, "positions": 148, "top1_agreement_without_ties": 0.88}
    rewrite(
        quantized,
        verification=replace(PASSED, details={"quantization_loss": LOSS, "kv_cache_loss": cache}),
        precision=Precision("fp32", "int8"),
    )
    code, out, errors = llmc("verify", quantized, "--min-top1", "0.89", "--max-kl", "0.05")
    assert code == 3
    assert "KV cache int8" in out
    assert "apart from these: mean KL 0.0037, top-1 agreement 0.8800" in out
    assert "top-1 agreement 0.8962 (at least 0.89)" in out
    assert "mean KL of the KV cache 0.0037 (at most 0.05)" in out
    assert "misses top-1 agreement of the KV cache 0.88 (at least 0.89)" in errors[0]


def test_as_json(llmc: Any, quantized: Path) -> None:
    code, out, _ = llmc("verify", quantized, "--json", "--max-kl", "0.01")
    record = json.loads(out)
    assert code == 3
    assert record["ok"] is False
    assert record["error"]["kind"] == "ThresholdError"
    assert record["error"]["exit_code"] == 3
    assert record["path"] == str(quantized)
    assert record["files_verified"] == 5
    assert record["text_sha256"] == SHA
    assert record["figures"] == {
        "origin": "recorded",
        **{
            name: value
            for name, value in LOSS.items()
            if name not in ("text_sha256", "near_tie", "rms_logit_error")
        },
        "kv_cache_top1_agreement": None,
        "kv_cache_mean_kl": None,
    }
    assert record["thresholds"] == [
        {
            "name": "mean KL",
            "figure": 0.019,
            "bound": 0.01,
            "at_least": False,
            "lossless": False,
            "met": False,
        }
    ]


def test_a_bundle_that_was_not_verified_has_its_bytes_checked(llmc: Any, tiny: Path) -> None:
    code, out, errors = llmc("verify", tiny)
    assert (code, errors) == (0, [])
    assert out.splitlines() == [
        "bundle   tiny, every byte of 5 files verified",
        "figures  recorded, on nothing",
    ]


def test_inspect_shows_the_loss(llmc: Any, quantized: Path) -> None:
    code, out, _ = llmc("inspect", quantized)
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("loss "))
    assert line.split(maxsplit=1)[1] == (
        "int4: mean KL 0.019 nats, top-1 agreement 0.8962, perplexity 40 -> 41 (+2.50 %), on 1,464 positions"
    )
    record = json.loads(llmc("inspect", quantized, "--json")[1])
    assert record["quantization_loss"] == {"format": "int4", **LOSS}


def test_a_loss_against_dequantized_weights_is_called_that(llmc: Any, quantized: Path) -> None:
    details = {"quantization_loss": LOSS | {"reference": "dequantized"}}
    rewrite(quantized, verification=replace(PASSED, details=details))
    assert "on 1,464 positions, against the dequantized checkpoint\n" in llmc("inspect", quantized)[1]
    out = llmc("verify", quantized)[1]
    assert re.search(r"^figures .*evaluation text, against the dequantized checkpoint$", out, re.MULTILINE)
    assert json.loads(llmc("verify", quantized, "--json")[1])["figures"]["reference"] == "dequantized"


def test_inspect_of_weights_that_are_not_quantized_or_not_measured(llmc: Any, tiny: Path) -> None:
    assert "\nloss " not in llmc("inspect", tiny)[1]
    assert json.loads(llmc("inspect", tiny, "--json")[1])["quantization_loss"] is None
    rewrite(tiny, quantization={"format": "int8"})
    assert re.search(r"^loss +int8: not measured$", llmc("inspect", tiny)[1], re.MULTILINE)


# Thresholds


def test_every_threshold_that_is_missed_is_named(llmc: Any, quantized: Path) -> None:
    options = ("--min-top1", "0.97", "--max-kl", "0.01", "--max-perplexity-increase", "2.5")
    code, out, errors = llmc("verify", quantized, *options)
    assert code == 3
    assert "MISSED           mean KL 0.019 (at most 0.01)" in out
    assert "ok               perplexity increase in % 2.5 (at most 2.5)" in out
    assert errors == [
        f"error: {quantized} misses top-1 agreement 0.8962 (at least 0.97), mean KL 0.019 (at most 0.01)",
        "hint: build with a format of more bits, or leave the most sensitive layers out with --exclude",
    ]


@pytest.mark.parametrize("option", ["--min-top1", "--max-kl", "--max-perplexity-increase"])
def test_a_threshold_without_a_figure(option: str, llmc: Any, tiny: Path) -> None:
    code, _, errors = llmc("verify", tiny, option, "0")
    assert code == 3
    assert errors[0].startswith(f"error: {tiny} misses ")
    assert errors[0].endswith(" unknown (at least 0): switched off with --no-verify") or errors[0].endswith(
        " unknown (at most 0): switched off with --no-verify"
    )
    assert errors[1] == "hint: --against CHECKPOINT measures it"


def test_an_unquantized_bundle_that_was_verified_has_lost_nothing(llmc: Any, tiny: Path) -> None:
    rewrite(tiny, verification=PASSED)
    options = ("--min-top1", "1", "--max-kl", "0", "--max-perplexity-increase", "0")
    code, out, errors = llmc("verify", tiny, *options)
    assert (code, errors) == (0, [])
    assert "ok               mean KL not lost: unquantized and verified (at most 0)" in out
    rewrite(tiny, precision=Precision("fp32", "int8"))  # its cache may lose something
    assert llmc("verify", tiny, *options)[0] == 3


def test_a_recorded_figure_counts_for_an_unquantized_bundle_too(llmc: Any, tiny: Path) -> None:
    rewrite(tiny, verification=replace(PASSED, top1_agreement=0.99))
    assert llmc("verify", tiny, "--min-top1", "1")[0] == 3


def test_a_figure_that_the_build_did_not_record(llmc: Any, tiny: Path) -> None:
    rewrite(tiny, verification=PASSED, quantization={"format": "int4"})
    code, _, errors = llmc("verify", tiny, "--max-kl", "0.1")
    assert code == 3
    assert errors[0].endswith("misses mean KL unknown (at most 0.1): its build recorded no such figure")


def test_figures_of_older_builds(llmc: Any, quantized: Path) -> None:
    """They record two perplexities and the plain count alone."""
    names = ("mean_kl", "top1_agreement_without_ties", "perplexity", "perplexity_unquantized")
    old = {name: LOSS[name] for name in names}
    rewrite(quantized, verification=replace(PASSED, details={"quantization_loss": old}))
    figures = json.loads(llmc("verify", quantized, "--json")[1])["figures"]
    assert figures["top1_agreement"] == 0.8955
    assert figures["perplexity_increase_percent"] == 2.5
    assert figures["positions"] is None


@pytest.mark.parametrize(
    "details", [{"quantization_loss": "none"}, {"quantization_loss": {"mean_kl": "low"}}]
)
def test_malformed_details_are_no_figures(details: dict[str, Any], llmc: Any, quantized: Path) -> None:
    rewrite(quantized, verification=replace(PASSED, details=details))
    code, _, errors = llmc("verify", quantized, "--max-kl", "1")
    assert code == 3
    assert "mean KL unknown" in errors[0]


@pytest.mark.parametrize("options", [("--min-top1", "1.5"), ("--max-kl", "-1"), ("--max-kl", "low")])
def test_invalid_thresholds(options: tuple[str, str], llmc: Any, quantized: Path) -> None:
    code, out, errors = llmc("verify", quantized, *options)
    assert (code, out, len(errors)) == (2, "", 2)


# Engines for GPUs


def test_a_gpu_bundle_is_judged_by_the_record_of_its_engine(
    llmc: Any, for_gpu: Path, checkpoint: Callable[[str], Path]
) -> None:
    command = ("verify", for_gpu, "--against", checkpoint("llama-tiny"), "--max-kl", "0.02")
    code, out, errors = llmc(*command)
    assert code == 3
    assert errors[0] == (
        "note: the engine is for a GPU (tensorrt-rtx) and cannot be run here: "
        "the figures are those that its build recorded"
    )
    assert errors[1].endswith("misses mean KL 0.021 (at most 0.02)")
    assert "figures          recorded, on 1,464 positions" in out
    assert "the one it was made from" in out


def test_a_gpu_bundle_reads_no_text(llmc: Any, for_gpu: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("some text")
    code, out, errors = llmc("verify", for_gpu, "--text", tmp_path / "t.txt")
    assert (code, out) == (2, "")
    assert "is for a GPU (tensorrt-rtx) and cannot be run here" in errors[0]


# Errors


def test_another_checkpoint(llmc: Any, tiny: Path, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    code, out, errors = llmc("verify", tiny, "--against", checkpoint("llama-tiny-plain"))
    assert (code, out) == (1, "")
    assert "is not the checkpoint that the bundle was made from: config.json has sha256" in errors[0]
    other = shutil.copytree(checkpoint("llama-tiny"), tmp_path / "other")
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    assert "model.safetensors has sha256" in llmc("verify", tiny, "--against", other)[2][0]
    shutil.copy(checkpoint("llama-tiny") / "model.safetensors", other)
    (other / "chat_template.jinja").write_text("{{ messages }}")
    assert "it has chat_template.jinja, which was not there" in llmc("verify", tiny, "--against", other)[2][0]
    (other / "chat_template.jinja").unlink()
    (other / "tokenizer_config.json").unlink()
    code, _, errors = llmc("verify", tiny, "--against", other)
    assert "it has no tokenizer_config.json" in errors[0]
    assert errors[1].startswith("hint: give the files of llama-tiny as they were")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [(None, "cannot read"), (b"", "has no text"), (b" \n\t", "has no text"), (b"\xff\xfea", "is not UTF-8")],
)
def test_texts_that_cannot_be_read(
    data: bytes | None, complaint: str, llmc: Any, tiny: Path, tmp_path: Path
) -> None:
    if data is not None:
        (tmp_path / "t.txt").write_bytes(data)
    code, out, errors = llmc("verify", tiny, "--text", tmp_path / "t.txt")
    assert (code, out, len(errors)) == (1, "", 2)
    assert complaint in errors[0]


def test_a_bundle_without_a_tokenizer_reads_no_text(llmc: Any, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("some text")
    files = Bundle.open(tiny).manifest.files
    rewrite(tiny, files={name: file for name, file in files.items() if not name.startswith("tokenizer/")})
    shutil.rmtree(tiny / "tokenizer")
    code, out, errors = llmc("verify", tiny, "--text", tmp_path / "t.txt")
    assert (code, out) == (2, "")
    assert errors[0] == f"error: {tiny} has no tokenizer to read a text with"


def test_too_little_memory(llmc: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.txt").write_text("some text")
    monkeypatch.setattr(judge, "available_memory", lambda: 1 << 20)
    code, _, errors = llmc("verify", tiny, "--text", tmp_path / "t.txt")
    assert code == 1
    assert errors[0] == "error: this needs about 0.9 GiB of memory, 0.0 GiB are available"


# Measurements


def test_perplexity_of_the_engine_alone(llmc: Any, tiny: Path, tmp_path: Path) -> None:
    """It equals the definition, computed from the logits of whole windows."""
    from llmc.compiler.verify.engine_logits import ragged
    from llmc.runtime.backends import load_backend
    from llmc.runtime.backends.base import EngineFile, LoadOptions

    text = "The king said: 'Go home.' " * 30
    (tmp_path / "t.txt").write_text(text)
    record = json.loads(llmc("verify", tiny, "--text", tmp_path / "t.txt", "--json")[1])
    bundle = Bundle.open(tiny)
    windows = texts.windows_of(text, bundle.path / "tokenizer/tokenizer.json", 384, 256, most=64)
    logits = ragged(load_backend(EngineFile.of(bundle), LoadOptions(kv_blocks=64)), windows)
    losses = []
    for ids, rows in zip(windows, logits, strict=True):
        exact = rows.astype(np.float64)
        exact -= np.log(np.exp(exact).sum(1, keepdims=True))
        losses += [-row[token] for row, token in zip(exact, ids[1:], strict=False)]
    assert record["engine_perplexity"] == pytest.approx(float(np.exp(np.mean(losses))), rel=1e-3)
    assert record["engine_positions"] == sum(map(len, windows)) > 600
    assert record["figures"]["origin"] == "recorded"


def test_without_a_checkpoint_no_build_libraries_are_imported() -> None:
    code = (
        "import llmc.compiler.verify.judge, llmc.compiler.verify.measure, llmc.compiler.verify.child, sys; "
        "print({'torch', 'transformers', 'onnx', 'onnx_ir', 'ml_dtypes'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.slow
def test_a_cpu_engine_beside_its_checkpoint(
    llmc: Any, tiny: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Both are the same unquantized model in fp32."""
    source = checkpoint("llama-tiny")
    options = ("--min-top1", "1", "--max-kl", "1e-6", "--max-perplexity-increase", "0.01")
    code, out, errors = llmc("verify", tiny, "--against", source, *options)
    assert (code, errors) == (0, [])
    assert f"checkpoint       {source}, the one it was made from" in out
    assert "measured, on 1,507 positions of the evaluation text" in out
    (tmp_path / "my.txt").write_text("To be compared on. " * 20)
    code, out, _ = llmc("verify", tiny, "--against", source, "--text", tmp_path / "my.txt", "--json")
    record = json.loads(out)
    assert code == 0
    assert record["text"] == "my.txt"
    assert record["figures"]["max_logit_error"] < 1e-4
    assert record["figures"]["positions"] < 500
    assert record["engine_perplexity"] is None


@pytest.mark.slow
def test_an_engine_with_other_weights_misses_the_thresholds(
    llmc: Any, tiny: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """The manifest names a checkpoint whose weights the engine does not have."""
    from llmc.compiler import zoo
    from llmc.compiler.checkpoint.checkpoint import Checkpoint

    other = zoo.make("llama-tiny", tmp_path / "other", seed=1)
    manifest = Bundle.open(tiny).manifest
    rewrite(tiny, source=replace(manifest.source, files=Checkpoint.open(other).file_hashes()))
    code, _, errors = llmc("verify", tiny, "--against", other, "--min-top1", "0.9")
    assert code == 3
    assert "misses top-1 agreement 0.0" in errors[0]
