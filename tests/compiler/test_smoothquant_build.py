"""`llmc build --quant int8-smoothquant` on the trained checkpoint: bundles, and how OpenVINO runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llmc.cli import main
from llmc.compiler.checkpoint.safetensors import read_header
from llmc.compiler.driver import compile_model
from llmc.compiler.request import BuildRequest
from llmc.runtime.backends.openvino import backend as openvino
from llmc.runtime.backends.openvino import int8
from llmc.runtime.errors import RequestError
from llmc.runtime.load import load_engine
from support.fast_builds import fast_builds
from support.openvino_layers import layers_of
from support.packed_weights import read_packed

TALES = Path(__file__).parents[2] / "model_zoo/llama/tales"
FORM = "int8-smoothquant"


def build(output: Path, **options: object) -> Path:
    return compile_model(BuildRequest(str(TALES), output, quant=FORM, **options)).path  # type: ignore[arg-type]


@pytest.fixture(scope="module", autouse=True)
def _fast() -> Iterator[None]:
    with fast_builds():
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("built") / "tales.llmc")


@pytest.fixture(scope="module")
def for_openvino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("built") / "tales.llmc", engine="openvino", verify=False)


def test_build_is_verified_and_its_loss_recorded(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_verified(built, "native", capsys)


@pytest.mark.slow
def test_builds_for_openvino_are_verified_and_byte_identical(
    for_openvino: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = build(tmp_path / "again.llmc", engine="openvino")
    for name in ("rank0.onnx", "weights/model.safetensors", "calibration.json"):
        assert (for_openvino / name).read_bytes() == (again / name).read_bytes()
    check_verified(again, "openvino", capsys)


def check_verified(built: Path, engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    verification = manifest["verification"]
    assert (verification["status"], verification["top1_agreement"]) == ("passed", 1)
    assert manifest["target"]["engine"] == engine
    assert manifest["quantization"]["format"] == FORM
    assert manifest["quantization"]["calibration"]["method"] == "max"
    inputs = verification["details"]["activation_quantization"]
    assert 0 < inputs["engine"]["rms_logit_error"] <= 0.5 * inputs["changes"]["rms_logit_error"]
    loss = verification["details"]["quantization_loss"]
    assert loss["mean_kl"] < 0.005
    assert loss["top1_agreement_without_ties"] > 0.94
    assert main.main(["inspect", str(built)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line)
    assert f"format {FORM}, modules 36" in lines["weights"]
    assert lines["loss"].startswith(f"{FORM}: mean KL 0.0")
    assert main.main(["verify", str(built), "--min-top1", "0.94", "--max-kl", "0.005"]) == 0


def name(last: str) -> str:
    """Return the name of a tensor of the first q, k and v projections."""
    return "|".join(f"model.layers.0.self_attn.{one}_proj.{last}" for one in "qkv")


def test_fused_layers_share_their_factors(built: Path) -> None:
    matrices, constants = read_packed(built)
    assert constants[name("pre_quant_scale")].shape == (256,)
    assert constants[name("input_scale")].shape == (1,)
    assert sum(one.endswith(".input_scale") for one in constants) == 5 * 4  # lm_head has none
    assert matrices[name("weight")].element == matrices["lm_head.weight"].element == "int8"


def test_fused_layers_share_their_factors_in_openvino(for_openvino: Path, built: Path) -> None:
    tensors = read_header(for_openvino / "weights/model.safetensors")
    matrices, constants = read_packed(built)
    assert (tensors[name("pre_quant_scale")].dtype, tensors[name("pre_quant_scale")].shape) == ("F32", (256,))
    assert (tensors[name("input_scale")].dtype, tensors[name("input_scale")].shape) == ("F32", ())
    assert tensors[name("weight")].dtype == "I8"
    assert sum(one.endswith(".input_scale") for one in tensors) == 5 * 4  # lm_head has none
    assert tensors["lm_head.weight"].dtype == "I8"
    for one in ("pre_quant_scale", "input_scale"):  # the native engine's are the same
        assert np.array_equal(constants[name(one)], tensors[name(one)].read().reshape(-1))
    assert np.array_equal(matrices[name("weight")].values, tensors[name("weight")].read())


def test_openvino_multiplies_in_int8_and_keeps_the_codes(for_openvino: Path) -> None:
    """lm_head is an exception, because its inputs are not quantized. The test below runs without VNNI."""
    core, config = openvino.tested_core()
    if not int8.is_exact(core, config):
        pytest.skip("no VNNI here")
    backend = openvino.OpenVinoBackend(for_openvino / "rank0.onnx", num_blocks=4)
    kinds, constants = layers_of(backend)
    assert kinds == {"i8": 20, "f32": 1}
    assert constants.count("i8") == 21
    assert not backend._few_at_once


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_without_vnni_products_are_fp32(for_openvino: Path, isa: str) -> None:
    """oneDNN is limited to instructions without VNNI; the engine must compute nearly the same logits."""
    script = """
import sys
import numpy as np
from pathlib import Path
from llmc.runtime.backends.openvino import backend as openvino, int8
from llmc.runtime.batch import Batch
sys.path.insert(0, sys.argv[1])
from support.openvino_layers import layers_of, prompt
core, config = openvino.tested_core()
print(int8.is_exact(core, config), int8.is_exact(core, config | int8.IN_FP32))
backend = openvino.OpenVinoBackend(Path(sys.argv[2]), num_blocks=4)
print(sorted(layers_of(backend)[0]), layers_of(backend)[1].count("i8"))
np.save(sys.argv[3], backend.forward(prompt()))
"""
    found = []
    for name in (isa, "DEFAULT"):
        file = for_openvino.parent / f"{name}.npy"
        command = [
            sys.executable,
            "-c",
            script,
            str(Path(__file__).parents[1]),
            str(for_openvino / "rank0.onnx"),
            str(file),
        ]
        environment = os.environ | {"ONEDNN_MAX_CPU_ISA": name}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.append((ran.stdout.splitlines(), np.load(file)))
    said, narrow = found[0]
    assert said == ["False True", "['f32'] 21"]
    whole = found[1][1]
    rms = float(np.sqrt(np.square(narrow - whole).mean()))
    # Inputs near a rounding boundary get the neighbouring code. Logits have an rms of 5, and overflow makes
    # an error of that size.
    assert rms < 0.1
    assert (narrow.argmax(1) == whole.argmax(1)).mean() > 0.9


def test_fast_is_refused(built: Path) -> None:
    with pytest.raises(RequestError, match=f"has them in {FORM}") as caught:
        load_engine(built, fast=True)
    assert "leave --fast out" in caught.value.hint


@pytest.mark.slow
def test_builds_are_byte_identical(built: Path, tmp_path: Path) -> None:
    again = build(tmp_path / "again.llmc", verify=False)
    for name in ("rank0.program.json", "weights/packed.safetensors", "calibration.json"):
        assert (built / name).read_bytes() == (again / name).read_bytes()


@pytest.mark.slow
def test_excluded_modules_are_not_quantized(tmp_path: Path) -> None:
    bundle = build(tmp_path / "x.llmc", exclude=("*.down_proj",), kv_dtype="int8")
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["verification"]["status"] == "passed"
    details = manifest["verification"]["details"]
    # Measured without activation quantization: the loss of the cache alone.
    assert details["kv_cache_loss"]["mean_kl"] < 0.0005
    assert details["quantization_loss"]["mean_kl"] < 0.001  # down_proj's inputs are the hardest to round
    assert manifest["quantization"]["kept"]["model.layers.3.mlp.down_proj"] == "--exclude *.down_proj"
    _, constants = read_packed(bundle)
    assert "model.layers.3.mlp.up_proj.input_scale" in "|".join(constants)
    assert "model.layers.3.mlp.down_proj.pre_quant_scale" not in constants


def test_dry_run_shows_the_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["build", str(TALES), "-o", str(tmp_path / "x.llmc"), "--quant", FORM, "--dry-run"]
    assert main.main(command) == 0
    out = capsys.readouterr().out
    assert f"36 of 36 matrices in {FORM} and int8" in out
    assert list(tmp_path.iterdir()) == []


def test_bench_names_the_activation_quantization(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["bench", str(built), "--prompt-tokens", "20", "--new-tokens", "3"]) == 0
    assert "activations quantized to int8 as built, the rest in fp32" in capsys.readouterr().out
