"""A checkpoint under the model's names equals the state dict that transformers loads from the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.config import load_config
from llmc.compiler.checkpoint.model_keys import ModelKeys, RenamedCheckpoint, read_model
from llmc.compiler.driver import compile_model
from llmc.compiler.request import BuildRequest
from llmc.compiler.trace.export import trace
from llmc.passes.parameter import parameter
from llmc.runtime.errors import CheckpointError

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 48, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
Tensors = dict[str, torch.Tensor]


def save(
    path: Path, model_type: str, settings: dict[str, object], change: Callable[[Tensors], Tensors]
) -> None:
    """Write a checkpoint of random weights whose tensors `change` renames, adds or removes."""
    torch.manual_seed(0)
    path.mkdir()
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings))
    model.config.save_pretrained(path)
    state = {name: torch.rand_like(value, dtype=torch.float32) for name, value in model.state_dict().items()}
    for alias, name in model.all_tied_weights_keys.items():
        if alias != name:
            del state[alias]
    changed = {name: value.contiguous().clone() for name, value in change(state).items()}
    safetensors.torch.save_file(changed, path / "model.safetensors", metadata={"format": "pt"})


def read(path: Path) -> tuple[ModelKeys, RenamedCheckpoint]:
    checkpoint = Checkpoint.open(path)
    return read_model(checkpoint, load_config(checkpoint))


def without(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda state: {name.removeprefix(prefix): value for name, value in state.items()}


def with_prefix(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda state: {f"{prefix}{name}": value for name, value in state.items()}


def gpt2_hub(state: Tensors) -> Tensors:
    mask = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(2)}
    return without("transformer.")(state) | mask


def embed_out(state: Tensors) -> Tensors:
    return {name.replace("lm_head.", "embed_out."): value for name, value in state.items()}


def mtp(state: Tensors) -> Tensors:
    layer = {
        name.replace("layers.1.", "layers.2."): value for name, value in state.items() if "layers.1." in name
    }
    return (
        state
        | layer
        | {"mtp.fc.weight": torch.zeros(4, 4), "model.layers.0.self_attn.q_proj.input_scale": torch.ones(1)}
    )


def head_only(state: Tensors) -> Tensors:
    embedding = state.pop("model.embed_tokens.weight")
    return state | {"lm_head.weight": embedding}


def head_twice(state: Tensors) -> Tensors:
    return state | {"lm_head.weight": state["model.embed_tokens.weight"]}


def own_head(state: Tensors) -> Tensors:
    return state | {"lm_head.weight": torch.rand(64, 32)}


TIED = SIZES | {"tie_word_embeddings": True}
CASES = {
    "llama": ("llama", SIZES, lambda state: state),
    "no base model prefix": ("llama", SIZES, without("model.")),
    "old rotary buffers": (
        "llama",
        SIZES,
        lambda state: state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
    ),
    "gpt2 of the hub": ("gpt2", GPT2, gpt2_hub),
    "gpt_neox": ("gpt_neox", SIZES, embed_out),
    "bloom without prefix": (
        "bloom",
        {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 2},
        without("transformer."),
    ),
    "buffers of apertus": ("apertus", SIZES, lambda state: state),
    "only the tied head": ("llama", TIED, head_only),
    "tied head, stored twice": ("llama", TIED, head_twice),
    "tied head of its own": ("llama", TIED, own_head),
    "extra tensors": ("qwen2", SIZES, mtp),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_tensors_are_those_that_transformers_loads(case: str, tmp_path: Path) -> None:
    save(tmp_path / "c", *CASES[case])
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "c", dtype=torch.float32)
    keys, renamed = read(tmp_path / "c")
    tensors = renamed.checkpoint.tensors
    renamed.compare({**keys.parameters, **keys.buffers}, tensors)
    assert tensors.keys() == keys.parameters.keys() | keys.buffers.keys()
    for name, value in loaded.state_dict().items():
        ref = tensors[keys.tied.get(name, name)]
        assert ref.name == keys.tied.get(name, name)
        np.testing.assert_array_equal(ref.read(), value.numpy(), name)


VISION = {
    "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip
SIGLIP = VISION | {"model_type": "siglip_vision_model"}
WRAPPERS = {
    "mistral3": ("mistral", VISION, {}),
    "llava": ("llama", SIGLIP | {"model_type": "clip_vision_model"}, {}),
    "gemma3": ("gemma3_text", SIGLIP, {"mm_tokens_per_image": 1}),
}  # fmt: skip


def save_wrapper(path: Path, model_type: str, **text: object) -> None:
    text_type, vision, more = WRAPPERS[model_type]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](
        text_config=SIZES | {"model_type": text_type, "head_dim": 16} | text, vision_config=vision, **more
    )
    AutoModelForMultimodalLM.from_config(config).save_pretrained(path)


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_the_language_model_of_a_multimodal_model(model_type: str, tmp_path: Path) -> None:
    save_wrapper(tmp_path / "c", model_type)
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path / "c", dtype=torch.float32)
    keys, renamed = read(tmp_path / "c")
    tensors = renamed.checkpoint.tensors
    renamed.compare(keys.parameters, tensors)
    assert tensors.keys() == keys.parameters.keys()
    assert len(renamed.notes) == 1
    assert f"only the language model ({WRAPPERS[model_type][0]}) of {model_type} is built" in renamed.notes[0]
    for name, ref in tensors.items():
        value = loaded.get_parameter(keys.loaded_name(name))
        np.testing.assert_array_equal(ref.read(), value.detach().numpy(), name)


@pytest.mark.parametrize("quant", [None, pytest.param("int8", marks=pytest.mark.slow)])
def test_a_multimodal_model_is_verified_as_a_whole(
    quant: str | None, tmp_path: Path, fast_builds: None
) -> None:
    """The reference is the model with its vision tower, given text."""
    save_wrapper(tmp_path / "c", "mistral3", tie_word_embeddings=False)
    result = compile_model(BuildRequest(str(tmp_path / "c"), tmp_path / "x.llmc", quant=quant))
    assert result.manifest.verification.status == "passed"
    assert result.manifest.source.model_type == "mistral"


def test_notes_name_what_is_not_used(tmp_path: Path) -> None:
    save(tmp_path / "a", *CASES["extra tensors"])
    (note,) = read(tmp_path / "a")[1].notes
    assert note.startswith(
        "the model does not use model.layers.0.self_attn.q_proj.input_scale, model.layers.2."
    )
    assert note.endswith("and 11 more; transformers ignores them too")
    save(tmp_path / "b", *CASES["tied head of its own"])
    (note,) = read(tmp_path / "b")[1].notes
    assert "config.json ties lm_head.weight" in note
    for case in ("old rotary buffers", "gpt2 of the hub", "tied head, stored twice"):
        save(tmp_path / case, *CASES[case])
        assert read(tmp_path / case)[1].notes == ()


def test_scales_are_renamed_with_their_module(tmp_path: Path) -> None:
    def quantized(state: Tensors) -> Tensors:
        state = without("model.")(state)
        for layer in (0, 1, 2):  # the last one belongs to no layer of the model
            state.pop(f"layers.{layer}.self_attn.q_proj.weight", None)
            state[f"layers.{layer}.self_attn.q_proj.weight_packed"] = torch.zeros(32, 16, dtype=torch.uint8)
            state[f"layers.{layer}.self_attn.q_proj.weight_scale"] = torch.ones(32, 2)
            state[f"layers.{layer}.self_attn.k_scale"] = torch.ones(1)
        return state

    save(tmp_path / "c", "llama", SIZES, quantized)
    _, renamed = read(tmp_path / "c")
    tensors = renamed.checkpoint.tensors
    module = "model.layers.1.self_attn"
    assert {
        f"{module}.q_proj.weight_packed",
        f"{module}.q_proj.weight_scale",
        f"{module}.k_scale",
    } <= tensors.keys()
    assert not any("layers.2" in name for name in tensors)
    assert len(renamed.unused) == 3


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    save(
        tmp_path / "c",
        "gpt2",
        GPT2,
        lambda state: state | {"wte.weight": state["transformer.wte.weight"]},
    )
    with pytest.raises(CheckpointError, match=r"holds transformer\.wte\.weight twice"):
        read(tmp_path / "c")


def test_a_bundle_of_an_own_head_and_extra_tensors_is_verified(tmp_path: Path, fast_builds: None) -> None:
    """tie_word_embeddings is wrong, the prefix of the base model is missing, and there is an MTP layer."""
    save(tmp_path / "c", "qwen2", TIED, lambda state: without("model.")(own_head(mtp(state))))
    result = compile_model(BuildRequest(str(tmp_path / "c"), tmp_path / "x.llmc"))
    assert result.manifest.verification.status == "passed"


def test_the_number_of_layers_is_compared_before_the_model_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "c", "llama", SIZES, lambda state: state)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    for layers, fact in ((10**6, "1000000, but the weights have 2 layers"), (0, "0, which must be positive")):
        (tmp_path / "c" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        with pytest.raises(CheckpointError, match=fact.replace("must be positive", "must be a positive")):
            Checkpoint.open(tmp_path / "c").check_layers()


def test_parts_that_are_not_compiled_have_a_bounded_number_of_layers(tmp_path: Path) -> None:
    save(tmp_path / "c", "llama", SIZES, lambda state: state)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    for more, accepted in (({"num_hidden_layers": 27}, True), ({"encoder": [{"depth": 2**31}]}, False)):
        (tmp_path / "c" / "config.json").write_text(json.dumps(config | {"vision_config": more}))
        with (
            nullcontext() if accepted else pytest.raises(CheckpointError, match="depth 2147483648, which is")
        ):
            Checkpoint.open(tmp_path / "c").check_layers()


def test_labels_of_a_classifier_are_not_made(tmp_path: Path) -> None:
    """transformers makes a dictionary of `num_labels` labels."""
    save(tmp_path / "c", "llama", SIZES, lambda state: state)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps(config | {"num_labels": 2**31}))
    assert load_config(Checkpoint.open(tmp_path / "c")).num_labels == 2


def test_persistent_buffers_are_parameters_of_the_graph(tmp_path: Path) -> None:
    """Apertus' activation has buffers whose values a checkpoint may change."""
    save(tmp_path / "c", *CASES["buffers of apertus"])
    graph = trace(load_config(Checkpoint.open(tmp_path / "c")), "fp32", 64).model.graph
    record = parameter(graph.initializers["model.layers.1.mlp.act_fn.beta"])
    assert record is not None
    assert [source.tensor for source in record.sources] == ["model.layers.1.mlp.act_fn.beta"]
