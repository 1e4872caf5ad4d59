"""Checkpoints that store each expert of a mixture by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.config import load_config
from llmc.compiler.checkpoint.model_keys import read_model
from llmc.compiler.checkpoint.safetensors import StackedTensor, TensorRef
from llmc.compiler.driver import plan_build
from llmc.compiler.request import BuildRequest
from llmc.runtime.errors import CheckpointError, UnsupportedError

EXPERTS = "model.layers.0.block_sparse_moe.experts"


def renamed_tensors(path: Path) -> dict[str, TensorRef]:
    checkpoint = Checkpoint.open(path)
    _, renamed = read_model(checkpoint, load_config(checkpoint))
    return dict(renamed.checkpoint.tensors)


def changed(source: Path, directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    directory.mkdir()
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    return directory


@pytest.mark.parametrize("name", ["mixtral-tiny", "qwen3-moe-tiny"])
def test_the_tensors_are_stacked_as_transformers_does(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=torch.float32)
    tensors, found = renamed_tensors(checkpoint(name)), 0
    for key, value in model.named_parameters():
        ref, want = tensors[key], value.detach().numpy()
        np.testing.assert_array_equal(ref.read(), want)
        if isinstance(ref, StackedTensor):
            found += 1
            np.testing.assert_array_equal(ref.read(slice(1, 3)), want[1:3])
            blocks = list(ref.iter_chunks(1024))
            assert max(block.nbytes for block in blocks) <= 1024  # no whole expert is in memory
            np.testing.assert_array_equal(np.concatenate(blocks), want.reshape(-1, want.shape[-1]))
    assert found == 4
    model.save_pretrained(tmp_path, save_original_format=False)  # one tensor for all experts
    for key, ref in renamed_tensors(tmp_path).items():
        np.testing.assert_array_equal(ref.read(), tensors[key].read())


def test_a_checkpoint_that_lacks_a_tensor_of_an_expert_is_incomplete(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    def remove(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{EXPERTS}.2.w3.weight"]

    path = changed(checkpoint("mixtral-tiny"), tmp_path / "x", remove)
    message = (
        r"incomplete: .*gate_up_proj is made of 4 \.experts\.\*\.w1\.weight and 3 \.experts\.\*\.w3\.weight"
    )
    with pytest.raises(CheckpointError, match=message):
        renamed_tensors(path)


def test_a_checkpoint_that_lacks_an_expert_does_not_fit(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    def remove(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("w1", "w2", "w3"):
            del tensors[f"{EXPERTS}.1.{name}.weight"]

    path = changed(checkpoint("mixtral-tiny"), tmp_path / "x", remove)
    with pytest.raises(CheckpointError, match=r"down_proj is \[3, 64, 96\], not \[4, 64, 96\]"):
        plan_build(BuildRequest(str(path), tmp_path / "x.llmc"))


def test_experts_of_different_shapes_are_no_stack(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{EXPERTS}.3.w1.weight"] = torch.zeros(96, 65)

    path = changed(checkpoint("mixtral-tiny"), tmp_path / "x", widen)
    with pytest.raises(CheckpointError, match=r"3\.w1\.weight is F32 \[96, 65\]; they cannot be one tensor"):
        renamed_tensors(path)


def test_quantized_experts_are_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = torch.ones(())

    path = changed(checkpoint("mixtral-tiny"), tmp_path / "x", quantize)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="the experts of this checkpoint are quantized already"):
        plan_build(BuildRequest(str(path), tmp_path / "x.llmc"))
