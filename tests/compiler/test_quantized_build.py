"""`llmc build --quant`: the engine computes with the quantized weights, and the loss is measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llmc.cli import main
from llmc.compiler.bundle_writer import BundleWriter
from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.safetensors import read_header
from llmc.compiler.driver import compile_model
from llmc.compiler.quantize.round_to_nearest import dequantize, quantize
from llmc.compiler.request import BuildRequest
from llmc.compiler.targets.native import pack
from llmc.compiler.targets.native.pack import pack_integers
from llmc.compiler.texts import EVALUATION_TEXT
from llmc.passes.quantize.formats import get_format
from llmc.runtime.backends.openvino.backend import OpenVinoBackend
from llmc.runtime.bundle.quantization_errors import QuantizationErrors
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.errors import BuildError, RequestError
from support.fast_builds import fast_builds
from support.packed_weights import read_packed

TALES = Path(__file__).parents[2] / "model_zoo/llama/tales"


@pytest.fixture(scope="module", autouse=True)
def _fast() -> Iterator[None]:
    with fast_builds():
        yield


def build(checkpoint: Path, output: Path, fmt: str, **options: object) -> dict[str, object]:
    request = BuildRequest(str(checkpoint), output, quant=fmt, **options)  # type: ignore[arg-type]
    return json.loads(compile_model(request).manifest.to_json())


@pytest.fixture(scope="module", params=["int8", pytest.param("int4", marks=pytest.mark.slow)])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp(request.param) / "tales.llmc"
    build(TALES, output, request.param)
    return output, request.param


def test_manifest_names_the_least_accurate_layers(
    built: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """int8 without calibration: by |W - code x scale| / |W|; calibrated int4: by the outputs."""
    bundle, fmt = built
    quantization = json.loads((bundle / "manifest.json").read_text())["quantization"]
    what = {"int8": "weight", "int4": "output"}[fmt]
    worst = quantization[f"largest_{what}_errors"]
    assert len(worst) == 5
    if fmt == "int8":
        tensors, (written, _) = Checkpoint.open(TALES).tensors, read_packed(bundle)
        errors = {}
        for layer in range(5):
            for projection in ("self_attn.o_proj", "mlp.down_proj"):  # (the others lie joined in the file)
                name = f"model.layers.{layer}.{projection}.weight"
                wide = tensors[name].read().astype(np.float64)
                lost = wide - written[name].exact
                errors[name.removesuffix(".weight")] = np.linalg.norm(lost) / np.linalg.norm(wide)
        shared = worst.keys() & errors.keys()
        assert shared
        assert all(worst[name] == pytest.approx(errors[name], rel=0.05) for name in shared)
        assert max(errors.values()) <= max(worst.values()) * 1.05
    stored = QuantizationErrors.read(Bundle.open(bundle))
    assert stored is not None
    found = {"int8": stored.weight, "int4": stored.output}[fmt]
    layers = {name for name in found if name.startswith("model.layers.")}
    assert len(layers) == 5 * 7  # every matrix
    assert found.keys() >= worst.keys()
    assert all(found[name] == pytest.approx(worst[name], rel=0.05) for name in worst)
    assert max(found.values()) == pytest.approx(max(worst.values()), rel=0.05)
    assert main.main(["inspect", str(bundle)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    listed = ", ".join(f"{name} {worst[name]}" for name in sorted(worst, key=lambda one: (-worst[one], one)))
    assert f"worst layers relative error of the {what}: {listed}" in shown


@pytest.fixture(scope="module")
def for_openvino(built: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The same for OpenVINO, not verified."""
    output = tmp_path_factory.mktemp("openvino") / "tales.llmc"
    build(TALES, output, built[1], engine="openvino", verify=False)
    return output, built[1]


FUSED = [f"model.layers.0.self_attn.{one}_proj.weight" for one in "qkv"]


def test_weights_file_has_the_codes_and_scales(built: tuple[Path, str]) -> None:
    bundle, fmt = built
    written, _ = read_packed(bundle)
    fused = written["|".join(FUSED)]
    assert fused.scales is not None
    scales = fused.scales if fmt == "int4" else fused.scales[:, 0]
    check_codes({"weight": fused.values, "weight_scale": scales}, fmt)
    assert fused.element == fmt
    assert written["model.embed_tokens.weight"].element == "bf16"
    assert written["lm_head.weight"].element == "int8"  # tied, and yet of its own


def test_weights_file_for_openvino_has_the_codes_and_scales(for_openvino: tuple[Path, str]) -> None:
    bundle, fmt = for_openvino
    written = read_header(bundle / "weights" / "model.safetensors")
    names = {"weight": "|".join(FUSED), "weight_scale": "|".join(f"{name}_scale" for name in FUSED)}
    check_codes({array: written[name].read() for array, name in names.items()}, fmt)
    assert written["model.embed_tokens.weight"].dtype == "BF16"
    assert written["lm_head.weight"].dtype == "I8"


def check_codes(arrays: dict[str, np.ndarray], fmt: str) -> None:
    """Check the codes and scales of the first q, k and v projections."""
    source, fused = Checkpoint.open(TALES).tensors, FUSED
    if fmt == "int8":  # rounded to nearest
        expected = [quantize(source[name].read(), get_format(fmt), name) for name in fused]
        for array, stored in arrays.items():
            assert np.array_equal(stored, np.concatenate([one[array] for one in expected]))
    else:  # rounded by what the layers see: not to the nearest code always, but to one near
        whole = np.concatenate([source[name].read() for name in fused]).astype(np.float32)
        steps = np.repeat(arrays["weight_scale"].astype(np.float32), 32, axis=1)
        away = np.abs(dequantize(arrays, get_format(fmt)) - whole) / steps
        assert np.mean(away > 0.5) > 0.01
        assert np.mean(away > 1.5) < 0.01


def test_openvino_keeps_the_codes_in_memory(for_openvino: tuple[Path, str]) -> None:
    bundle, fmt = for_openvino
    backend = OpenVinoBackend(bundle / "rank0.onnx", num_blocks=4)
    inside = backend._request.get_compiled_model().get_runtime_model().get_ops()
    constants = [
        (node.get_output_element_type(0).get_type_name(), list(node.get_output_shape(0)))
        for node in inside
        if node.get_rt_info()["layerType"].astype(str) == "Const"
    ]
    codes = [shape for kind, shape in constants if kind == {"int8": "i8", "int4": "i4"}[fmt]]
    assert len(codes) == 5 * 4 + (fmt == "int8")  # q/k/v and gate/up are one matrix each; lm_head is int8


def test_quantization_loss_of_a_trained_model_is_small_and_recorded(built: tuple[Path, str]) -> None:
    bundle, fmt = built
    manifest = json.loads((bundle / "manifest.json").read_text())
    loss = manifest["verification"]["details"]["quantization_loss"]
    assert loss["mean_kl"] < {"int8": 0.001, "int4": 0.1}[fmt]
    assert loss["top1_agreement_without_ties"] > {"int8": 0.97, "int4": 0.8}[fmt]
    assert loss["top1_agreement"] >= loss["top1_agreement_without_ties"]
    assert loss["perplexity"] < 1.1 * loss["perplexity_unquantized"]
    increase = 100 * (loss["perplexity"] / loss["perplexity_unquantized"] - 1)
    assert loss["perplexity_increase_percent"] == pytest.approx(increase, abs=0.05)
    assert loss["positions"] == 1464
    assert loss["text_sha256"] == hashlib.sha256(EVALUATION_TEXT.read_bytes()).hexdigest()
    # The embedding stays in bf16, and the lm_head that is tied to it has int8 codes of its own.
    assert manifest["quantization"]["bits_per_parameter"] < {"int8": 12, "int4": 9}[fmt]


def test_inspect_shows_the_format_and_the_loss(
    built: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, fmt = built
    assert main.main(["inspect", str(bundle)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line)
    assert f"format {fmt}, modules 36, bits per parameter" in lines["weights"]
    assert lines["loss"].startswith(f"{fmt}: mean KL 0.0")
    assert lines["loss"].endswith("on 1,464 positions")


def test_thresholds_accept_int8_and_refuse_int4(
    built: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, fmt = built
    assert main.main(["verify", str(bundle), "--min-top1", "0.97"]) == {"int8": 0, "int4": 3}[fmt]
    assert main.main(["verify", str(bundle), "--max-kl", "0.001"]) == {"int8": 0, "int4": 3}[fmt]
    assert ("misses mean KL 0.0" in capsys.readouterr().err) == (fmt == "int4")


@pytest.mark.slow
def test_verify_against_reproduces_the_recorded_loss(
    built: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The build computes both sides in transformers, `llmc verify --against` computes one with the engine."""
    bundle, _ = built
    assert main.main(["verify", str(bundle), "--against", str(TALES), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["figures"]
    assert measured["origin"] == "measured"
    loss = json.loads((bundle / "manifest.json").read_text())["verification"]["details"]["quantization_loss"]
    for name in ("mean_kl", "top1_agreement", "perplexity", "perplexity_unquantized", "max_logit_error"):
        assert measured[name] == pytest.approx(loss[name], rel=0.02), name


def test_builds_are_byte_identical(built: tuple[Path, str], tmp_path: Path) -> None:
    bundle, fmt = built
    build(TALES, tmp_path / "again.llmc", fmt, verify=False)
    for name in ("rank0.program.json", "weights/packed.safetensors"):
        assert (bundle / name).read_bytes() == (tmp_path / "again.llmc" / name).read_bytes()


def test_the_page_shows_how_to_read_codes_and_scales(built: tuple[Path, str]) -> None:
    page = (Path(__file__).parents[2] / "docs/reference/program.md").read_text("utf-8")
    example: dict[str, Any] = {}
    exec(page.partition("```python\n")[2].partition("```")[0], example)
    for name, stored in read_packed(built[0])[0].items():
        if stored.scales is not None:
            codes, scales = example["matrix"](built[0], name)
            np.testing.assert_array_equal(codes, stored.values)
            np.testing.assert_array_equal(scales, stored.scales)


def test_weights_of_the_native_engine_are_packed_as_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no other copy, and codes and scales leave the disk when their matrix is packed."""
    names, sizes = set(), [0]
    writer_path, check = BundleWriter.path, BundleWriter.check_disk_space

    def path(self: BundleWriter, name: str) -> Path:
        names.add(name)
        return writer_path(self, name)

    def write(self: BundleWriter, nbytes: int) -> None:
        sizes[0] = nbytes
        check(self, nbytes)

    def packed(*arguments: object) -> Iterator[np.ndarray]:
        yield from original(*arguments)  # type: ignore[arg-type]
        sizes.append(sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()))

    original = pack.pack
    monkeypatch.setattr(BundleWriter, "path", path)
    monkeypatch.setattr(BundleWriter, "check_disk_space", write)
    monkeypatch.setattr(pack, "pack", packed)
    build(TALES, tmp_path / "x.llmc", "int8", verify=False)
    assert not names & {"weights/model.safetensors", "rank0.onnx"}
    written = (tmp_path / "x.llmc/weights/packed.safetensors").stat().st_size
    assert max(sizes[1:]) < 1.2 * written
    assert sizes[0] < 0.9 * written


@pytest.mark.slow
def test_builds_for_openvino_are_byte_identical(for_openvino: tuple[Path, str], tmp_path: Path) -> None:
    bundle, fmt = for_openvino
    build(TALES, tmp_path / "again.llmc", fmt, engine="openvino")  # verified, which must change nothing
    for name in ("rank0.onnx", "weights/model.safetensors"):
        assert (bundle / name).read_bytes() == (tmp_path / "again.llmc" / name).read_bytes()


@pytest.mark.slow
def test_verified_builds_are_byte_identical(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Weights, graph and manifest are identical, the measured loss included."""
    for name in ("a", "b"):
        build(checkpoint("qwen3-tiny"), tmp_path / name / "x.llmc", "int4")
    for file in (path for path in (tmp_path / "a").rglob("*") if path.is_file()):
        other = tmp_path / "b" / file.relative_to(tmp_path / "a")
        assert file.read_bytes() == other.read_bytes(), file.name
    assert "quantization_loss" in (tmp_path / "a/x.llmc/manifest.json").read_text()


def test_a_matrix_in_the_place_of_another_is_found(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference computes with the weights that the engine reads: they must be the checkpoint's."""
    monkeypatch.setattr(pack, "pack_integers", lambda codes, *rest: pack_integers(codes[::-1], *rest))
    with pytest.raises(BuildError, match=r"the engine's model\.layers\.0\..* is not the checkpoint's"):
        build(checkpoint("llama-tiny"), tmp_path / "x.llmc", "int8")


def test_excluded_modules_are_not_quantized(tmp_path: Path) -> None:
    manifest = build(
        TALES, tmp_path / "x.llmc", "int4", exclude=("*.mlp.*", "*.0.self_attn.k_proj"), verify=False
    )
    kept = manifest["quantization"]["kept"]  # type: ignore[index]
    assert kept["model.layers.3.mlp.gate_proj"] == "--exclude *.mlp.*"
    assert "model.layers.0.self_attn.q_proj" in kept  # multiplied with k_proj as one
    assert manifest["quantization"]["modules"] == 5 * 4 - 3 + 1  # type: ignore[index]  # lm_head is int8
    kept_matrix = read_packed(tmp_path / "x.llmc")[0]["model.layers.3.mlp.down_proj.weight"]
    source = Checkpoint.open(TALES).tensors["model.layers.3.mlp.down_proj.weight"].read()
    assert (kept_matrix.element, source.dtype) == ("bf16", ml_dtypes.bfloat16)
    assert np.array_equal(kept_matrix.values, source)


@pytest.mark.slow
@pytest.mark.parametrize(("fmt", "pattern"), [("int8", "lm_head"), ("int4", "*head")])
def test_excluded_tied_head_stays_the_embedding(fmt: str, pattern: str, tmp_path: Path) -> None:
    manifest = build(TALES, tmp_path / "x.llmc", fmt, exclude=(pattern,))
    assert manifest["verification"]["status"] == "passed"  # type: ignore[index]
    assert manifest["quantization"]["kept"] == {"lm_head": f"--exclude {pattern}"}  # type: ignore[index]
    written, _ = read_packed(tmp_path / "x.llmc")
    assert written["model.embed_tokens.weight"].element == "bf16"
    assert not [name for name in written if name.startswith("lm_head")]
    build(TALES, tmp_path / "o.llmc", fmt, exclude=(pattern,), engine="openvino", verify=False)
    stored = read_header(tmp_path / "o.llmc/weights/model.safetensors")
    assert (
        stored["model.embed_tokens.weight"].dtype == "F16"
    )  # bf16 times a power of two: it is multiplied with
    assert not [name for name in stored if name.startswith("lm_head")]


def test_everything_excluded_with_a_tied_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="int8 quantizes nothing of this model"):
        build(TALES, tmp_path / "x.llmc", "int8", exclude=("*",))


@pytest.mark.slow
def test_matrices_without_whole_blocks_are_not_quantized(tmp_path: Path) -> None:
    manifest = build(TALES, tmp_path / "x.llmc", "int4-block128")
    assert manifest["verification"]["status"] == "passed"  # type: ignore[index]
    kept = manifest["quantization"]["kept"]  # type: ignore[index]
    assert set(kept) == {f"model.layers.{layer}.mlp.down_proj" for layer in range(5)}  # 704 columns
    assert "multiple of the block of 128" in kept["model.layers.0.mlp.down_proj"]


def test_dry_run_shows_the_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["build", str(TALES), "-o", str(tmp_path / "x.llmc"), "--quant", "int8", "--dry-run"]
    assert main.main(command) == 0
    out = capsys.readouterr().out
    assert "model.layers.0-4.mlp.down_proj" in out
    assert "36 of 36 matrices in int8" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ("*",)}, "--exclude needs quantization"),
    ],
)
def test_invalid_requests_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(BuildError, match=message) as error:
        BuildRequest("x", Path("x.llmc"), **options)  # type: ignore[arg-type]
    assert error.value.hint


def test_exclude_pattern_without_a_match_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="down_proj"):
        build(TALES, tmp_path / "x.llmc", "int8", exclude=("down_proj",))
    assert list(tmp_path.iterdir()) == []
