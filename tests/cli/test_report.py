"""`llmc report`: its page is well-formed, says what `llmc inspect` says, and is never anything but text."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llmc.cli import errors, main
from llmc.cli.html_elements import element
from llmc.cli.inspect import describe_loss, describe_worst
from llmc.cli.report_page import report_page
from llmc.cli.text import size
from llmc.runtime.bundle import quantization_errors
from llmc.runtime.bundle.manifest import FileRecord, Manifest
from llmc.runtime.bundle.quantization_errors import QuantizationErrors
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.errors import BundleError

GOLDEN = Path(__file__).parents[1] / "golden"
VOID = {"meta"}
HOSTILE = "\"'></td><script>alert(1)</script>&lt;<img src=//evil.example>"


class Page(HTMLParser):
    """A page: its elements with their attributes, its text, and its tables as lists of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def facts(self) -> dict[str, list[str]]:
        """First cell -> the others, of every row of every table."""
        return {row[0]: row[1:] for row in self.rows}


@pytest.fixture(scope="module")
def tiny(bundle: Callable[[str], Path]) -> Path:
    return bundle("llama-tiny")


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def run(*arguments: object) -> int:
    return main.main([str(argument) for argument in arguments])


def quantized(tiny: Path, **errors_of: Any) -> Bundle:
    """Return the tiny bundle with the record of a quantization in its manifest."""
    manifest = Bundle.open(tiny).manifest
    loss = {
        "mean_kl": 0.0131,
        "top1_agreement": 0.9105,
        "top1_agreement_without_ties": 0.9105,
        "perplexity": 27.5,
        "perplexity_unquantized": 25.0,
        "perplexity_increase_percent": 10.0,
        "positions": 1464,
        "reference": "checkpoint",
    }
    verification = replace(
        manifest.verification,
        status="passed",
        reason=None,
        reference="transformers",
        max_logit_error=2e-5,
        tolerance=2e-4,
        tokens_compared=1480,
        top1_agreement=1.0,
        details={"quantization_loss": loss},
    )
    plan = {"format": "int4", "modules": 35, "bits_per_parameter": 4.5, **errors_of}
    return Bundle(tiny, replace(manifest, quantization=plan, verification=verification))


def bar_lengths(page: Page) -> list[str | None]:
    """Return the lengths of the bars, in the order of the page."""
    return [given["width"] for tag, given in page.elements if tag == "rect" and given.get("class") == "bar"]


# What the page says


def test_the_figures_are_those_of_inspect(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", tiny) == errors.OK
    assert os.listdir() == ["llama-tiny.html"]
    written = Path("llama-tiny.html").read_text("utf-8")
    assert capsys.readouterr() == (f"llama-tiny.html: {size(len(written.encode()))}\n", "")
    page = Page(written)
    run("inspect", tiny, "--json")
    record = json.loads(capsys.readouterr().out)
    manifest, token = record["manifest"], record["kv_bytes_per_token"]
    assert f"{manifest['limits']['max_seq_len']:,}tokens of context" in page.text
    assert f"{size(record['bytes'])}on disk" in page.text
    assert f"{size(token)} a token" in page.text
    assert manifest["verification"]["reason"] in page.text
    assert (page.facts["requires"], manifest["target"]["requires"]) == (["nothing besides llmc"], {})
    assert page.facts["context"] == ["1 sequence", "4 sequences", "16 sequences", "64 sequences"]
    for tokens in (32, 64, 128, 256):
        assert page.facts[f"{tokens}"] == [size(count * tokens * token) for count in (1, 4, 16, 64)]
    assert page.facts["16"] == page.facts["32"]  # a block is never shared by two sequences
    for name, file in manifest["files"].items():
        assert page.facts[name] == [f"{file['bytes']:,}", file["sha256"][:12]]
    run("inspect", tiny)
    inspected = capsys.readouterr().out
    for name in ("model", "attention", "sampling", "built by"):
        assert re.search(rf"^{name} +{re.escape(page.facts[name][0])}$", inspected, re.MULTILINE)


def test_memory_counts_the_weights_and_the_engine(tiny: Path) -> None:
    manifest = Bundle.open(tiny).manifest
    fixed = manifest.weights.bytes + manifest.files[manifest.engines[0].file].bytes
    page = Page(report_page(Bundle.open(tiny), ()))
    assert f"weights and engine, {size(fixed)}" in page.text
    assert page.facts["4 sequences"] == ["", size(fixed + 4 * 256 * 512)]
    assert bar_lengths(page)[-1] == f"{100 * fixed / (fixed + 64 * 256 * 512):.2f}%"


def test_the_loss_and_the_error_of_layers(tiny: Path) -> None:
    layers = {"a.small": 0.02, "b.large": 0.08}
    page = Page(report_page(quantized(tiny, largest_output_errors=layers), ()))
    assert page.facts["mean KL"] == ["0.0131 nats"]
    assert page.facts["top-1 agreement with the checkpoint"] == ["", "0.9105"]
    assert page.facts["perplexity, not quantized"] == ["", "25"]
    assert page.facts["perplexity, quantized"] == ["", "27.5"]
    assert page.facts["largest logit error, of the tolerance"] == ["", "2e-05 of 0.0002"]
    assert "error of the output of linear layers. The manifest records the 2 largest of 35." in page.text
    assert [row[0] for row in page.rows if row[0] in layers] == ["b.large", "a.small"]
    lengths = bar_lengths(page)
    assert lengths[:6] == ["10.00%", "100.00%", "91.05%", "90.91%", "100.00%", "100.00%"]
    assert lengths[6] == "25.00%"


def with_errors(bundle: Bundle, directory: Path, content: str) -> Bundle:
    """Return the bundle with a file of the errors of its matrices."""
    directory.mkdir()
    (directory / "manifest.json").touch()  # for its size
    (directory / quantization_errors.FILE).write_text(content, "utf-8")
    data = content.encode()
    record = FileRecord(len(data), hashlib.sha256(data).hexdigest())
    files = {**bundle.manifest.files, quantization_errors.FILE: record}
    return Bundle(directory, replace(bundle.manifest, files=files))


def shapes(page: Page, name: str) -> list[list[tuple[str, dict[str, str | None]]]]:
    """Return the elements of each chart of the class `name`."""
    starts = [
        i for i, (tag, given) in enumerate(page.elements) if tag == "svg" and given.get("class") == name
    ]
    rest = [page.elements[start:] for start in starts]
    return [chart[: next(i for i, (tag, _) in enumerate(chart) if tag == "div")] for chart in rest]


@pytest.mark.parametrize("layers", [28, 126])
def test_every_layer_is_charted_in_the_order_of_depth(tiny: Path, tmp_path: Path, layers: int) -> None:
    kinds = ("self_attn.q_proj", "self_attn.o_proj", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj")
    output = {
        f"model.layers.{layer}.{kind}": (layer + 1) / 1000
        for layer in sorted(range(layers), key=str)  # another order: 0, 1, 10, 11, ..., 2
        for kind in kinds
    }
    content = QuantizationErrors(output, {"lm_head": 0.09}).to_json()
    written = report_page(with_errors(quantized(tiny), tmp_path / "x", content), ())
    page = Page(written)
    charts = shapes(page, "columns")
    assert len(charts) == 3
    for chart, count in zip(charts, (layers, layers, 2 * layers), strict=True):
        assert chart[0][1]["role"] == "img"
        assert chart[0][1]["viewbox"] == f"0 0 {count} 100"
        assert chart[1][0] == "title"  # what a screen reader says
        heights = [float(given["height"] or 0) for tag, given in chart if given.get("class") == "bar"]
        assert len(heights) == count
        assert heights == sorted(heights)
        assert heights[-1] == 100
    assert "mlp.experts.*.up_proj" in page.text
    assert f"largest {layers / 1000:g} in model.layers.{layers - 1}" in page.text
    table = [row for row in page.rows if row[0] in output]
    assert [row[0] for row in table] == sorted(output, key=lambda name: int(name.split(".")[2]))
    assert all(float(row[1]) == pytest.approx(output[row[0]], rel=1e-2) for row in table)
    assert page.facts["lm_head"] == ["", "0.09"]
    assert not re.search(r"https?:|//|url\(|<script|style=", written)


@pytest.mark.parametrize(
    "content",
    [
        "", "[" * 100_000, "[]", "{}", '{"format": 2, "output": {}, "weight": {}}',
        '{"format": 1, "output": [], "weight": {}}', '{"format": 1, "output": {"x": "1"}, "weight": {}}',
        '{"format": 1, "output": {"x": NaN}, "weight": {}}',
        '{"format": 1, "output": {"x": -1}, "weight": {}}',
        '{"format": 1, "output": {"x": 1e400}, "weight": {}}',
        '{"format": 1, "output": {"x": true}, "weight": {}}',
        '{"format": 1, "output": {"\\n": 1}, "weight": {}}',
        '{"format": 1, "output": {}, "weight": {}, "more": {}}',
    ],
)  # fmt: skip
def test_damaged_errors_are_one_error(tiny: Path, tmp_path: Path, content: str) -> None:
    with pytest.raises(BundleError, match=r"quantization_errors\.json: ") as caught:
        report_page(with_errors(quantized(tiny), tmp_path / "x", content), ())
    assert "\n" not in caught.value.message
    good = QuantizationErrors({"a": 0.1}, {}).to_json()
    other = with_errors(quantized(tiny), tmp_path / "y", good)
    (other.path / quantization_errors.FILE).write_text(good.replace("0.1", "0.2"))
    with pytest.raises(BundleError, match="does not fit its sha256"):
        report_page(other, ())


@pytest.mark.parametrize("name", [HOSTILE, "1.2", "1", "", "9" * 4000, "a..1.", "x.0.y.1"])
def test_names_of_modules_are_text(tiny: Path, tmp_path: Path, name: str) -> None:
    content = QuantizationErrors({name: 0.0, f"{name}.0.z": 0.0, f"{name}.1.z": 0.0}, {}).to_json()
    assert name in Page(report_page(with_errors(quantized(tiny), tmp_path / "x", content), ())).text


def test_a_bundle_for_gpus_names_them() -> None:
    page = Page(report_page(Bundle.open(GOLDEN / "format-2.llmc"), ()))
    assert page.facts["runs on"] == ["an NVIDIA GPU"]
    assert page.facts["GPUs"] == ["SM89"]
    assert page.facts["requires"] == ["tensorrt-rtx 1.7.1.116"]
    assert "In place of the engine it compared the graph" in page.text
    assert page.facts["context"][-1] == "256 sequences"  # the largest step of the engine


# Hostile bundles


def test_everything_of_a_manifest_is_text(tiny: Path) -> None:
    manifest = quantized(tiny, largest_weight_errors={HOSTILE: 0.5}, note=HOSTILE).manifest
    source = dict.fromkeys(("model_type", "architecture", "dtype"), HOSTILE)
    hostile = replace(
        manifest,
        producer=replace(manifest.producer, llmc=HOSTILE, libraries={HOSTILE: HOSTILE}),
        source=replace(manifest.source, name=HOSTILE, **source),
        target=replace(manifest.target, reason=HOSTILE, requires={HOSTILE: HOSTILE}),
        passes=tuple(replace(one, name=HOSTILE) for one in manifest.passes[:3]),
        verification=replace(
            manifest.verification,
            reference=HOSTILE,
            details={**manifest.verification.details, "compared": HOSTILE},
        ),
        weights=replace(manifest.weights, dtype=HOSTILE, note=HOSTILE),
        quantization={**(manifest.quantization or {}), "format": HOSTILE, "modules": HOSTILE},
    )
    Manifest.from_json(hostile.to_json())  # a reader accepts all of this
    plain = Page(report_page(quantized(tiny, largest_weight_errors={"x": 0.5}), ()))
    page = Page(report_page(Bundle(tiny, hostile), ()))
    assert page.text.count(HOSTILE) > 15
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in plain.elements}
    assert {name for _, given in page.elements for name in given} == {
        name for _, given in plain.elements for name in given
    }


@pytest.mark.parametrize("odd", [None, True, -1.0, 1e300, "x", [], {}, {"a": "b"}, {"a": {}}])
def test_open_fields_may_hold_anything(tiny: Path, odd: Any) -> None:
    sound = quantized(tiny).manifest
    loss = dict.fromkeys(sound.verification.details["quantization_loss"], odd)
    for details in (
        dict.fromkeys(("quantization_loss", "kv_cache_loss", "compared"), odd),
        {"quantization_loss": loss},
    ):
        manifest = replace(
            sound,
            precision=replace(sound.precision, kv_dtype="int8"),
            quantization={"format": odd, "modules": odd, "largest_output_errors": odd}
            | {"largest_weight_errors": {"x": odd}},
            verification=replace(sound.verification, details=details),
        )
        Page(report_page(Bundle(tiny, Manifest.from_json(manifest.to_json())), ()))
        assert all(isinstance(text, str) for _, text in (*describe_loss(manifest), *describe_worst(manifest)))


def test_names_of_directories_are_text_too(tiny: Path) -> None:
    shutil.copytree(tiny, "a<b>\n\udcff.llmc")
    assert run("report", "a<b>\n\udcff.llmc", "-o", "page.html") == errors.OK
    assert "a<b> \\udcff" in Page(Path("page.html").read_text("utf-8")).text


def test_nothing_is_loaded_and_nothing_runs(tiny: Path) -> None:
    written = report_page(Bundle.open(tiny), ())
    assert not re.search(r"https?:|//|url\(|@import|<script|<link|<img| on\w+=", written)
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'\"" in written
    assert "prefers-color-scheme: dark" in written


def test_an_element_escapes_its_text_and_attributes() -> None:
    inner = element("b", "<&>")
    assert element("p", inner, '"', class_='"><i>') == (
        '<p class="&quot;&gt;&lt;i&gt;"><b>&lt;&amp;&gt;</b>&quot;</p>'
    )


# Where the page goes


def test_an_existing_page_is_kept_without_force(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("page.html").write_text("mine")
    assert run("report", tiny, "-o", "page.html") == errors.ERROR
    assert capsys.readouterr() == (
        "",
        "error: page.html exists\nhint: replace it with `--force`, or choose another `--output`\n",
    )
    assert Path("page.html").read_text() == "mine"
    assert run("report", tiny, "-o", "page.html", "--force") == errors.OK
    assert Path("page.html").read_text("utf-8").startswith("<!doctype html>")
    assert os.listdir() == ["page.html"]


def test_a_page_never_gets_into_a_bundle(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tiny.rglob("*"))
    assert run("report", tiny, "-o", tiny / "report.html") == errors.ERROR
    assert "is inside the bundle" in capsys.readouterr().err
    assert run("report", tiny, "-o", tiny / "manifest.json", "--force") == errors.ERROR
    assert run("report", tiny, "-o", tiny, "--force") == errors.ERROR
    assert sorted(tiny.rglob("*")) == before
    Bundle.open(tiny).verify()


def test_a_page_that_cannot_be_written_leaves_nothing(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    assert run("report", tiny) == errors.ERROR
    assert "No space left on device" in capsys.readouterr().err
    assert os.listdir() == []


def test_errors_name_the_page_of_the_user(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A page is written to a draft first, whose name means nothing to the user."""
    Path("folder").write_text("a file")
    Path("closed").mkdir(mode=0o500)
    for page in ("missing/x.html", "folder/x.html", "x" * 300, *(["closed/x.html"] * bool(os.getuid()))):
        assert run("report", tiny, "-o", page) == errors.ERROR
        error, hint = capsys.readouterr().err.splitlines()
        assert error.startswith(f"error: {page}: ")
        assert hint.startswith("hint: ")


# Measurements


def measured(bundle: Bundle, **changed: Any) -> dict[str, Any]:
    """Return an object as `llmc bench --json` prints it."""
    manifest = bundle.manifest
    precision = {"dtype": manifest.precision.dtype, "kv_dtype": manifest.precision.kv_dtype}
    median = {
        "seconds": 0.5,
        "first_token_seconds": 0.0123,
        "prefill_tokens_per_second": 12345.6,
        "decode_tokens_per_second": 210.4,
    }
    record = {"command": "bench", "ok": True, "source": "llama-tiny", "engine": "native"}
    record |= {"precision": precision, "weights": "float32", "prompt_tokens": 128, "new_tokens": 64}
    record |= {"concurrency": 1, "median": median, "machine": {"cpu": "A <fast> CPU", "cores": 2}}
    return record | changed


def test_measurements(tiny: Path) -> None:
    one = measured(Bundle.open(tiny))
    four = measured(Bundle.open(tiny), concurrency=4)
    four["median"] = one["median"] | {"decode_tokens_per_second": 420.8}
    Path("bench.json").write_text(f"{json.dumps(one)}\n\n{json.dumps(four)}\n")
    assert run("report", tiny, "--bench", "bench.json") == errors.OK
    page = Page(Path("llama-tiny.html").read_text("utf-8"))
    assert "Measured by llmc bench on A <fast> CPU, 2 logical CPUs." in page.text
    figures = ["12.3 ms", "12,346 tok/s", "210.4 tok/s", "0.500 s"]
    assert ["128 prompt tokens, 64 new ones", *figures] in page.rows
    assert ["4 x 128 prompt tokens, 64 new ones", "", "420.8 tok/s"] in page.rows
    assert bar_lengths(page)[-2:] == ["50.00%", "100.00%"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"source": "other"}, "measured on another bundle than llama-tiny"),
        ({"weights": "int4"}, "measured on another bundle than llama-tiny"),
        ({"engine": "openvino"}, "measured on another bundle than llama-tiny"),
        ({"command": "run"}, "not an object that `llmc bench --json` prints"),
        ({"ok": False}, "not an object that `llmc bench --json` prints"),
        ({"median": None}, "not an object that `llmc bench --json` prints"),
        ({"median": {"seconds": "1"}}, "not an object that `llmc bench --json` prints"),
        ({"concurrency": float("nan")}, "not an object that `llmc bench --json` prints"),
        ({"prompt_tokens": 10**400}, "not an object that `llmc bench --json` prints"),
        ({"machine": []}, "not an object that `llmc bench --json` prints"),
    ],
)
def test_other_measurements_are_refused(
    tiny: Path, change: dict[str, Any], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bench.json").write_text(json.dumps(measured(Bundle.open(tiny), **change)))
    assert run("report", tiny, "--bench", "bench.json") == errors.USAGE
    assert f"error: bench.json, line 1: {complaint}\nhint: " in capsys.readouterr().err
    assert os.listdir() == ["bench.json"]


@pytest.mark.parametrize("data", [b"", b"\n", b"[]", b"\xff", b"[" * 5000, b"x" * 2**20 + b"y"])
def test_other_files_are_refused(tiny: Path, data: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bench.json").write_bytes(data)
    assert run("report", tiny, "--bench", "bench.json") == errors.USAGE
    err = capsys.readouterr().err
    assert err.startswith("error: bench.json")
    assert len(err.splitlines()) == 2
