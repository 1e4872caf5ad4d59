"""Llama 4 text models: attention in chunks, scaled queries, and experts whose input the router scales."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.models.llama4 import modeling_llama4

from llmc.compiler.driver import compile_model, plan_build
from llmc.compiler.progress import Silent
from llmc.compiler.request import BuildRequest
from llmc.compiler.trace.export import trace
from llmc.compiler.trace.probes import draw
from llmc.compiler.zoo import zoo_config
from llmc.runtime.errors import UnsupportedError
from support.traces import share_traces

NAME = "llama4-text-tiny"


def config(**changes: Any) -> Any:
    settings = zoo_config(NAME) | changes
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp": 2}, r"model\.layers\.1\.feed_forward is a mixture of experts, which --tp does not divide"),
        ({"engine": "openvino"}, r"model\.layers\.0\.self_attn is attention in chunks"),
        pytest.param(
            {"target": "tensorrt-rtx", "dtype": "fp16"},
            r"model\.layers\.0\.self_attn is attention in chunks, which llmc cannot build for GPUs yet",
            marks=pytest.mark.slow,  # another trace
        ),
    ],
)
def test_it_is_refused_elsewhere(
    options: dict[str, Any],
    message: str,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    share_traces(monkeypatch)
    with pytest.raises(UnsupportedError, match=message):
        plan_build(BuildRequest(str(checkpoint(NAME)), tmp_path / "x.llmc", **options))


def test_several_experts_with_scaled_inputs_are_refused() -> None:
    wanted = r"layers\.1\.feed_forward \(Llama4TextMoe\) scales the inputs of 2 experts for each token"
    with pytest.raises(UnsupportedError, match=wanted):
        trace(config(num_experts_per_tok=2), "fp32", 64)


@pytest.mark.parametrize(
    ("owner", "method", "message"),
    [
        (
            modeling_llama4.Llama4Router,
            "forward",
            r"feed_forward \(Llama4TextMoe\) is a mixture of experts that",
        ),
        (modeling_llama4, "apply_rotary_emb", r"apply_rotary_emb is neither of the two known rotations"),
        (
            modeling_llama4,
            "eager_attention_forward",
            "the attention of Llama4TextAttention computes something",
        ),
    ],
)
def test_a_module_that_computes_something_else_is_refused(
    owner: Any, method: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(owner, method)

    @functools.wraps(original)
    def doubled(*args: Any, **kwargs: Any) -> Any:
        first, second = original(*args, **kwargs)
        return first * 2, second

    monkeypatch.setattr(owner, method, doubled)
    with pytest.raises(UnsupportedError, match=message):
        trace(config(), "fp32", 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "options"),
    [
        # As Llama 4 Maverick, without norms behind rope. All layers have experts.
        ({"use_qk_norm": False, "interleave_moe_layer_step": 1, "moe_layers": None}, {"quant": "int8"}),
        # The first layer has no rope; biases; chunks of whole blocks.
        (
            {
                "no_rope_layers": [0, 1, 1, 1],
                "attention_bias": True,
                "attention_chunk_size": 32,
                "layer_types": None,
            },
            {"quant": "int4"},
        ),
        ({"attn_temperature_tuning": False, "hidden_act": "gelu"}, {"kv_dtype": "int8"}),
        ({"tie_word_embeddings": True}, {"pp": 2}),
        ({}, {"engine": "onnxruntime", "quant": "int8"}),
    ],
)
def test_other_forms_equal_transformers(
    changes: dict[str, Any], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share_traces(monkeypatch)
    path = write(config(**changes), tmp_path)
    record = compile_model(BuildRequest(str(path), tmp_path / "x.llmc", **options)).manifest.verification
    assert record.status == "passed"
    assert record.details["window_crossed"]


def write(settings: Any, directory: Path) -> Path:
    """Write a checkpoint whose logits depend on the input, as transformers saves it."""
    torch.manual_seed(0)
    auto = AutoModelForMultimodalLM if settings.model_type == "llama4" else AutoModelForCausalLM
    model = auto.from_config(settings, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.copy_(
            draw(*parameter.shape) * (0.1 if parameter.dim() > 1 else 0.2) + (parameter.dim() < 2)
        )
    model.save_pretrained(directory / "checkpoint")
    return directory / "checkpoint"


def test_the_language_model_of_a_multimodal_checkpoint_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_output_dim": 64,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
    }
    text = {key: value for key, value in zoo_config(NAME).items() if key != "architectures"}
    whole = AutoConfig.for_model("llama4", text_config=text, vision_config=vision, pad_token_id=0)
    path = write(whole, tmp_path)
    assert json.loads((path / "config.json").read_text())["architectures"] == [
        "Llama4ForConditionalGeneration"
    ]
    progress = Silent()
    monkeypatch.setattr(progress, "note", lambda note: notes.append(note))
    manifest = compile_model(BuildRequest(str(path), tmp_path / "x.llmc"), progress).manifest
    assert manifest.verification.status == "passed"
    assert manifest.source.architecture == "Llama4ForConditionalGeneration"
    assert "only the language model (llama4_text) of llama4 is built, for text" in notes
