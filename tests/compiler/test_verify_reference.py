"""The reference of a verification: transformers with rounded weights and inputs, or on dequantized ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from llmc.compiler.verify import verify_build
from llmc.compiler.verify.compare import _sequences, compare
from llmc.compiler.verify.engine_weights import ActivationQuantization, EngineWeight
from llmc.compiler.verify.job import Job
from llmc.compiler.verify.reference import Reference
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.errors import BuildError, CheckpointError

IDS = [5, 9, 300, 41, 7, 7, 120, 33]
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"


def own_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS])).logits[0].numpy()


def int8(
    path: Path, weights: dict[str, torch.Tensor]
) -> tuple[dict[str, EngineWeight], dict[str, torch.Tensor]]:
    """Each weight in int8, one scale a row -> where it lies, and what it stands for."""
    arrays, stored, exact = {}, {}, {}
    for name, weight in weights.items():
        scale = weight.abs().amax(1) / 127
        codes = (weight / scale[:, None]).round()
        arrays |= {name: codes.to(torch.int8), f"{name}_scale": scale}
        names = {"weight": name, "weight_scale": f"{name}_scale"}
        stored[name] = EngineWeight("int8", str(path), names, (0, len(weight)))
        exact[name] = codes * scale[:, None]
    save_file(arrays, path)
    return stored, exact


def test_greedy_continuations_are_those_of_transformers(checkpoint: Callable[[str], Path]) -> None:
    source = checkpoint("llama-tiny")
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    generated = model.generate(torch.tensor([IDS]), do_sample=False, max_new_tokens=9, eos_token_id=-1)
    tokens = generated[0, len(IDS) :].tolist()
    reference = Reference(str(source), "fp32")
    assert len(tokens) == 9
    assert reference.continues_with(IDS, tokens)
    assert reference.continues_with(IDS, tokens[:1])
    for place in range(len(tokens)):
        assert not reference.continues_with(IDS, [*tokens[:place], tokens[place] + 1, *tokens[place + 1 :]])


def test_weights_are_replaced_and_inputs_rounded(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoint("llama-tiny")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    weights = {name: model.get_parameter(name).detach() for name in (UP, DOWN)}
    stored, exact = int8(tmp_path / "w.safetensors", weights)
    step = 0.013
    stored[UP] = replace(stored[UP], input=ActivationQuantization("e4m3", step))
    reference = Reference(str(source), "fp32")
    np.testing.assert_allclose(reference.logits(IDS), own_logits(model), atol=1e-5)
    reference.use_weights(stored)
    reference.quantize_activations(stored)

    for name, values in exact.items():
        model.get_parameter(name).data = values

    def fp8(x: torch.Tensor) -> torch.Tensor:
        return (x / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step

    linear = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj.forward = lambda x: torch.nn.functional.linear(fp8(x), linear.weight)
    np.testing.assert_allclose(reference.logits(IDS), own_logits(model), atol=1e-5)


@pytest.mark.parametrize("name", ["llama-tiny", "gemma2-tiny", "qwen3-tiny"])
def test_states_and_head_make_the_logits(name: str, checkpoint: Callable[[str], Path]) -> None:
    """gemma2: with a softcap on the logits; all tied. Also when the decoder's layers are gone."""
    reference = Reference(str(checkpoint(name)), "fp32")
    expected, states, head = reference.logits(IDS), reference.states(IDS), reference.head()
    np.testing.assert_allclose(head.logits(states), expected, atol=1e-5)
    reference.drop_layers()
    np.testing.assert_allclose(head.logits(states[3:5]), expected[3:5], atol=1e-5)
    left = sum(one.numel() for one in reference.model.parameters())
    assert left == 384 * 64 + 64  # the embedding, which is also lm_head, and the last norm


@pytest.mark.parametrize("family", ["gpt2", "granite", "opt"])
def test_states_and_head_of_other_decoders(family: str, tmp_path: Path) -> None:
    """More outputs than one, a factor on the logits, a decoder inside the base model."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 384}
    config = AutoConfig.for_model(family, **sizes, num_attention_heads=4, max_position_embeddings=64)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    reference = Reference(str(tmp_path), "fp32")
    expected, states, head = reference.logits(IDS), reference.states(IDS), reference.head()
    reference.drop_layers()
    np.testing.assert_allclose(head.logits(states), expected, atol=1e-5)


def test_a_rounded_head_leaves_the_other_one_and_the_embedding(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    reference = Reference(str(checkpoint("llama-tiny")), "fp32")
    embedding = reference.model.get_input_embeddings().weight
    stored, exact = int8(tmp_path / "w.safetensors", {"lm_head.weight": embedding.detach().clone()})
    rounding = ActivationQuantization("e2m1", 0.001)
    before, states, head = reference.logits(IDS), reference.states(IDS), reference.head()
    stored["lm_head.weight"] = replace(stored["lm_head.weight"], input=rounding)
    reference.use_weights(stored)
    reference.quantize_activations(stored)
    np.testing.assert_allclose(head.logits(states), before, atol=1e-5)
    rounded = torch.from_numpy(rounding.apply(states.numpy())) @ exact["lm_head.weight"].T
    np.testing.assert_allclose(reference.logits(IDS), rounded.numpy(), atol=1e-5)
    np.testing.assert_allclose(reference.head().logits(states), rounded.numpy(), atol=1e-5)
    assert reference.model.get_input_embeddings().weight is embedding


@pytest.mark.parametrize("name", ["model.layers.9.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.bias"])
def test_a_weight_that_transformers_lacks(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    stored, _ = int8(tmp_path / "w.safetensors", {name: torch.ones(4, 4)})
    with pytest.raises(BuildError, match=name):
        Reference(str(checkpoint("llama-tiny")), "fp32").use_weights(stored)


def test_a_weight_of_another_shape(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    stored, _ = int8(tmp_path / "w.safetensors", {UP: torch.ones(4, 4)})
    with pytest.raises(BuildError, match=r"as \[4, 4\], transformers as \[160, 64\]"):
        Reference(str(checkpoint("llama-tiny")), "fp32").use_weights(stored)


# Checkpoints that are quantized themselves


def modelopt(
    source: Path, root: Path, algorithm: str, quantize: Callable[[torch.Tensor], Iterator[Any]]
) -> tuple[Path, Path]:
    """`source` as ModelOpt writes it, and the plain checkpoint of the weights that it stands for."""
    tensors = load_file(source / "model.safetensors")
    written, exact = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if name.endswith("_proj.weight"):
            module = name.removesuffix("weight")
            made, exact[name] = quantize(weight.float())
            written |= {module + last: tensor for last, tensor in made.items()}
    paths = root / "quantized", root / "plain"
    config = json.loads((source / "config.json").read_text())
    for path, data in zip(paths, (written, exact), strict=True):
        path.mkdir()
        save_file(data, path / "model.safetensors", {"format": "pt"})
        (path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
        (path / "config.json").write_text(json.dumps(config))
    said = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    if algorithm != "FP8":
        said["group_size"] = 16
    document = {"producer": {"name": "modelopt", "version": "0.33.0"}, "quantization": said}
    (paths[0] / "hf_quant_config.json").write_text(json.dumps(document))
    (paths[0] / "config.json").write_text(
        json.dumps(config | {"quantization_config": said | {"quant_method": "modelopt"}})
    )
    return paths


def fp8(weight: torch.Tensor) -> Any:
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    tensors = {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.02)}
    return tensors, codes.float() * scale


def int4_awq(weight: torch.Tensor) -> Any:
    """The input is multiplied by pre_quant_scale before the product."""
    groups = weight.reshape(len(weight), -1, 16)
    scale = groups.abs().amax(2) / 7
    codes = (groups / scale[:, :, None]).round().clamp(-8, 7)
    exact = (codes * scale[:, :, None]).reshape(weight.shape)
    bits = codes.reshape(weight.shape).to(torch.int8).view(torch.uint8) & 15
    before = torch.linspace(0.5, 2, weight.shape[1])
    tensors = {"weight": bits[0::2] | bits[1::2] << 4, "weight_scale": scale, "pre_quant_scale": before}
    return tensors, exact * before


@pytest.mark.parametrize(("algorithm", "quantize"), [("FP8", fp8), ("W4A16_AWQ", int4_awq)])
def test_a_quantized_checkpoint_is_read_without_its_own_code(
    algorithm: str, quantize: Any, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    quantized, plain = modelopt(checkpoint("llama-tiny"), tmp_path, algorithm, quantize)
    reference = Reference(str(quantized), "fp32", "dequantized")
    np.testing.assert_allclose(reference.logits(IDS), Reference(str(plain), "fp32").logits(IDS), atol=1e-5)
    assert reference.model.config.tie_word_embeddings
    assert reference.model.lm_head.weight is reference.model.model.embed_tokens.weight


def test_a_quantized_checkpoint_that_lacks_a_tensor(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    quantized, _ = modelopt(checkpoint("llama-tiny"), tmp_path, "FP8", fp8)
    tensors = load_file(quantized / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, quantized / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no model\.norm\.weight of shape \[64\]"):
        Reference(str(quantized), "fp32", "dequantized")


@pytest.mark.slow
def test_an_engine_of_the_dequantized_weights_is_verified(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """The bundle is built from the plain weights; verified against the quantized checkpoint, it passes."""
    from llmc.compiler.driver import compile_model
    from llmc.compiler.request import BuildRequest

    quantized, plain = modelopt(checkpoint("llama-tiny"), tmp_path, "FP8", fp8)
    bundle = Bundle.open(compile_model(BuildRequest(str(plain), tmp_path / "x.llmc", verify=False)).path)
    job = Job(
        checkpoint=str(quantized),
        engine=str(bundle.engine_path()),
        backend=bundle.manifest.target.engine,
        max_seq_len=256,
        vocab_size=384,
        windows=[],
        tolerance=1e-4,
        needed_bytes=0,
        tokenizer=str(plain / "tokenizer.json"),
        reference_weights="dequantized",
    )
    findings = compare(Job.from_json(json.loads(json.dumps(job.to_json()))))
    assert not verify_build.faults(findings, "fp32")
    assert "quantization_loss" not in findings.details
    # With weights that differ from these in one module the verification fails.
    weight = load_file(plain / "model.safetensors")[UP]
    stored, _ = int8(tmp_path / "w.safetensors", {UP: weight})
    assert verify_build.faults(compare(replace(job, quantized=stored)), "fp32")


def test_truncation_and_padding_of_the_tokenizer_are_left_out_of_the_texts(tmp_path: Path) -> None:
    tales = Path(__file__).parents[2] / "model_zoo/llama/tales"
    encoder = Tokenizer.from_file(str(tales / "tokenizer.json"))
    encoder.enable_truncation(4)
    encoder.enable_padding(length=1000)
    encoder.save(str(tmp_path / "tokenizer.json"))
    job = Job("", "", "openvino", 256, 4096, [], 1e-4, 0)
    files = [path / "tokenizer.json" for path in (tales, tmp_path)]
    given = [_sequences(replace(job, tokenizer=str(file))) for file in files]
    assert given[0] == given[1] != _sequences(job)
