"""`llmc check`: its output, its exit code and its imports."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from llmc.cli import main
from support.waiting import LONG

Run = Callable[..., tuple[int, str, str]]
WIDTH = 64


@pytest.fixture
def llmc(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process -> exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main.main([str(argument) for argument in arguments])
        return (code, *capsys.readouterr())

    return call


def write(root: Path, **changes: np.ndarray | None) -> Path:
    """Write a ModelOpt FP8 checkpoint of two projections. changes: tensors, such as q_proj__weight_scale."""
    draw = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {
        "model.embed_tokens.weight": draw.normal(size=(32, WIDTH)).astype(ml_dtypes.bfloat16),
        "lm_head.weight": draw.normal(size=(32, WIDTH)).astype(ml_dtypes.bfloat16),
    }
    for name in ("q_proj", "k_proj"):
        weight = draw.normal(0, 0.125, (WIDTH, WIDTH))
        scale = np.float32(np.abs(weight).max() / 448)
        module = f"model.layers.0.self_attn.{name}"
        tensors[f"{module}.weight"] = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
        tensors[f"{module}.weight_scale"] = np.float32(scale)
        tensors[f"{module}.input_scale"] = np.float32(0.01)
    for key, value in changes.items():
        name = f"model.layers.0.self_attn.{key.replace('__', '.')}"
        tensors[name] = value if value is not None else tensors[name]
        if value is None:
            del tensors[name]
    dtypes = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float32": "F32"}
    header, data = {}, b""
    for name, value in tensors.items():
        value = np.asarray(value)
        begin, data = len(data), data + value.tobytes()
        entry = {"dtype": dtypes[value.dtype.name], "shape": list(value.shape)}
        header[name] = entry | {"data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    root.mkdir()
    (root / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (root / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": WIDTH}))
    said = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    quantization = {"producer": {"name": "modelopt", "version": "0.33.0"}, "quantization": said}
    (root / "hf_quant_config.json").write_text(json.dumps(quantization))
    return root


def test_a_sound_checkpoint(llmc: Run, tmp_path: Path) -> None:
    root = write(tmp_path / "fp8")
    code, out, err = llmc("check", root)
    assert (code, err) == (0, "")
    assert dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines()) == {
        "checkpoint": f"{root} (llama)",
        "size": "16 KiB in 8 tensors",
        "parameters": "12,288, 10.68 bits each",
        "quantization": "ModelOpt FP8, written by modelopt 0.33.0",
        "modules": "2 fp8, 8.02 bits a weight",
        "excluded": "lm_head",
        "KV cache": "not quantized",
        "read": "every scale, samples of the weights; --full reads all",
        "result": "0 faults, 0 warnings",
    }
    assert "read          every value\n" in llmc("check", root, "--full")[1]


def test_an_unquantized_checkpoint(llmc: Run, checkpoint: Callable[[str], Path]) -> None:
    code, out, err = llmc("check", checkpoint("llama-tiny-plain"), "--full")
    assert (code, err) == (0, "")
    assert "\nquantization  not quantized\n" in out
    assert "\nparameters    123,200, 32.00 bits each\n" in out


def test_faults_become_a_table_and_one_error_with_their_number(llmc: Run, tmp_path: Path) -> None:
    root = write(
        tmp_path / "bad",
        q_proj__weight_scale=None,
        k_proj__input_scale=np.float32(np.nan),
        odd__weight_scale_9=np.float32(1),
    )
    code, out, err = llmc("check", root)
    assert code == 1
    assert err == (
        f"error: {root} has 3 faults\n"
        "hint: the findings name the tensors, the remedies say what to do about each kind\n"
    )
    facts, table, remedies = out.split("\n\n")
    assert facts.endswith("result        3 faults, 0 warnings")
    assert "1 fp8, 1 that cannot be read" in facts
    header, *rows = [re.split(r"  +", line.strip()) for line in table.splitlines()]
    assert header == ["KIND", "TENSOR", "WHAT"]
    attention = "model.layers.0.self_attn"
    assert sorted(rows) == [
        ["fault", "missing", f"{attention}.q_proj.weight", "its weight_scale is missing"],
        ["fault", "unclaimed", f"{attention}.odd.weight_scale_9", "F32 [] belongs to no weight"],
        ["fault", "value", f"{attention}.k_proj.input_scale", "1 NaN of 1 values"],
    ]
    assert re.findall(r"^(\w+) {2,}\w", remedies, re.MULTILINE) == ["KIND", "missing", "value", "unclaimed"]


def test_warnings_alone_exit_with_0(llmc: Run, tmp_path: Path) -> None:
    root = write(tmp_path / "warn", k_proj__input_scale=np.float32(0.5))
    code, out, err = llmc("check", root)
    assert (code, err) == (0, "")
    assert "result        0 faults, 1 warning\n" in out
    assert re.search(
        r"^warning +fused +model\.layers\.0\.self_attn\.q_proj\.input_scale +differs among q_proj, k_proj",
        out,
        re.MULTILINE,
    )


def test_json(llmc: Run, tmp_path: Path) -> None:
    code, out, err = llmc("check", write(tmp_path / "good"), "--json")
    record = json.loads(out)
    assert (code, err, record["ok"], record["findings"]) == (0, "", True, [])
    assert (record["formats"], record["remedies"]) == ({"fp8": 2}, {})
    code, out, err = llmc("check", write(tmp_path / "bad", q_proj__weight_scale=None), "--json")
    record = json.loads(out)
    assert (code, record["ok"]) == (1, False)
    assert err.startswith(f"error: {tmp_path / 'bad'} has 1 fault\n")
    [finding] = record["findings"]
    assert finding == {
        "kind": "missing",
        "tensor": "model.layers.0.self_attn.q_proj.weight",
        "what": "its weight_scale is missing",
        "warning": False,
    }


@pytest.mark.parametrize("damage", ["lfs", "truncated", "gptq", "nowhere"])
def test_files_that_cannot_be_checked(llmc: Run, tmp_path: Path, damage: str) -> None:
    root = write(tmp_path / "model")
    file = root / "model.safetensors"
    if damage == "lfs":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
        expected = f"{file} is a git-LFS pointer, not the file itself"
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
        expected = r"truncated: tensor .* ends \d+ bytes after the file does"
    elif damage == "gptq":
        (root / "config.json").write_text(
            '{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}'
        )
        expected = "is quantized with 'gptq', which llmc does not read"
    else:
        root, expected = tmp_path / "nowhere", "there is no directory"
    code, out, err = llmc("check", root)
    assert (code, out) == (1, "")
    error, hint = err.splitlines()
    assert error.startswith("error: ")
    assert re.search(expected, error)
    assert hint.startswith("hint: ")


def test_names_reach_the_terminal_without_control_characters(llmc: Run, tmp_path: Path) -> None:
    code, out, _ = llmc("check", write(tmp_path / "odd", **{"\x1b[31m__weight_scale": np.float32(1)}))
    assert code == 1
    assert "\x1b" not in out
    assert r"\x1b[31m.weight_scale" in out


def test_imports_neither_torch_nor_an_engine(tmp_path: Path) -> None:
    code = (
        "import json, sys\nfrom llmc.cli.main import main\ncode = main(sys.argv[1:])\n"
        "print(json.dumps([code, *{name.partition('.')[0] for name in sys.modules}]), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "check", str(write(tmp_path / "fp8"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG, check=True)
    code, *modules = json.loads(done.stderr.splitlines()[-1])
    assert code == 0
    assert not set(modules) & {
        "torch",
        "transformers",
        "onnx",
        "onnx_ir",
        "openvino",
        "onnxruntime",
        "safetensors",
    }
