"""gpt-oss in the layout that is published: experts in MXFP4, everything else in bf16."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config

from llmc.compiler.checkpoint.check.check import check_checkpoint
from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.prequantized.dequantize import dequantize
from llmc.compiler.checkpoint.prequantized.layout import read_quantized
from llmc.compiler.driver import compile_model, plan_build
from llmc.compiler.request import BuildRequest
from llmc.runtime.backends import load_backend
from llmc.runtime.backends.base import EngineFile, LoadOptions
from llmc.runtime.batch import Batch
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.errors import CheckpointError, UnsupportedError

GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"


def mxfp4(matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round [experts, out, in] to MXFP4. Return blocks [experts, out, in / 32, 16] and scales, uint8.

    OCP Microscaling Formats (MX) Specification 1.0, sections 5.3.3, 5.4.1 and 6.3, in the layout of
    https://huggingface.co/openai/gpt-oss-20b: the even column is in the low nibble.
    """
    blocks = matrices.reshape(*matrices.shape[:2], -1, 32)
    exponent = np.floor(np.log2(np.abs(blocks).max(-1, keepdims=True))) - 2  # the largest E2M1 is 1.5 x 2^2
    rounded = np.clip(blocks / 2.0**exponent, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    codes = rounded.view(np.uint8) & 15
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponent[..., 0] + 127).astype(np.uint8)


def published(
    source: Path,
    directory: Path,
    change: Callable[[dict[str, torch.Tensor]], None] = lambda tensors: None,
    dtype: str = "float32",
) -> Path:
    """Write the checkpoint `source` as gpt-oss is published.

    dtype: of what is not in MXFP4. It is bfloat16 in published files; tests in float32 share traces.
    """
    directory.mkdir()
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            parts = mxfp4(tensor.transpose(1, 2).contiguous().numpy())
            tensors |= {
                f"{name}_{part}": torch.from_numpy(array)
                for part, array in zip(("blocks", "scales"), parts, strict=True)
            }
        else:
            tensors[name] = tensor.to(getattr(torch, dtype))
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"dtype": dtype}
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
        ],
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    for file in source.glob("tokenizer*"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def dequantized(path: Path) -> torch.nn.Module:
    """Return transformers' model, with the experts dequantized by its own code."""
    options = {"quantization_config": Mxfp4Config(dequantize=True), "attn_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).eval()


def test_the_codes_are_those_of_transformers(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = published(checkpoint("gpt-oss-tiny"), tmp_path / "x")
    parameters = dict(dequantized(path).named_parameters())
    modules = read_quantized(Checkpoint.open(path)).modules
    assert len(modules) == 8
    for name, module in modules.items():
        assert (module.format, module.block, module.experts) == ("mxfp4", (1, 32), 6)
        wanted = parameters[name].detach().transpose(1, 2).reshape(module.shape).numpy()
        np.testing.assert_array_equal(dequantize(module), wanted)
    report = check_checkpoint(path, full=True)
    assert not report.findings
    assert (report.quantization, report.formats) == ("MXFP4 (gpt-oss)", {"mxfp4 in groups of 32": 8})


def test_the_published_layout_builds_with_its_codes(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = published(checkpoint("gpt-oss-tiny"), tmp_path / "x")
    bundle = Bundle.open(compile_model(BuildRequest(str(path), tmp_path / "x.llmc", verify=False)).path)
    assert bundle.manifest.quantization is not None
    assert bundle.manifest.quantization["formats"] == {"mxfp4": 8}
    ids = np.random.default_rng(0).integers(0, 384, 90)
    with torch.no_grad():
        wanted = dequantized(path)(input_ids=torch.from_numpy(ids)[None]).logits[0].numpy()
    backend = load_backend(EngineFile("native", bundle.engine_path()), LoadOptions(kv_blocks=4))
    logits = backend.forward(Batch.pack([(ids.tolist(), 0, range(3), range(90))]))
    assert np.ptp(wanted) > 1
    assert np.abs(logits - wanted).max() < 1e-4


@pytest.mark.slow
def test_a_build_verifies_the_published_layout(
    checkpoint: Callable[[str], Path], tmp_path: Path, fast_builds: None
) -> None:
    path = published(checkpoint("gpt-oss-tiny"), tmp_path / "x", dtype="bfloat16")
    record = compile_model(BuildRequest(str(path), tmp_path / "x.llmc")).manifest.verification
    assert record.status == "passed"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda tensors: tensors.pop(f"{GATE_UP}_scales"),
            CheckpointError,
            rf"{GATE_UP}_blocks its weight_scale is missing",
        ),
        (
            lambda tensors: tensors.update(
                {f"{GATE_UP}_scales": torch.full((6, 192, 1), 120, dtype=torch.uint8)}
            ),
            CheckpointError,
            rf"{GATE_UP}_scales has 1 scales per row of 64: groups of 64, but the configuration says 32",
        ),
        (
            lambda tensors: tensors[f"{GATE_UP}_scales"].fill_(255),
            CheckpointError,
            rf"{GATE_UP}_scales has scales that are not finite",
        ),
        (
            lambda tensors: tensors.pop(f"{GATE_UP}_bias"),
            CheckpointError,
            rf"no {GATE_UP}_bias",
        ),
    ],
)  # fmt: skip
def test_damaged_experts_are_refused(
    change: Callable[[dict[str, torch.Tensor]], None],
    error: type[Exception],
    message: str,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    path = published(checkpoint("gpt-oss-tiny"), tmp_path / "x", change)
    with pytest.raises(error, match=message):
        compile_model(BuildRequest(str(path), tmp_path / "x.llmc", verify=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp": 2}, r"model\.layers\.0\.self_attn has attention sinks, which --tp does not divide"),
        ({"engine": "openvino"}, r"model\.layers\.0\.self_attn has attention sinks"),
        pytest.param(
            {"target": "tensorrt-rtx", "dtype": "bf16", "sms": (120,)},
            r"model\.layers\.0\.self_attn has attention sinks, which llmc cannot build for GPUs yet",
            marks=pytest.mark.slow,  # another trace
        ),
    ],
)
def test_what_cannot_run_it_says_so(
    options: dict,
    message: str,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    path = published(checkpoint("gpt-oss-tiny"), tmp_path / "x")
    with pytest.raises(UnsupportedError, match=message):
        plan_build(BuildRequest(str(path), tmp_path / "x.llmc", **options))
