"""Damaged checkpoints: whatever their JSON files say, reading them ends in a result or in one clear error."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmc.compiler.checkpoint.checkpoint import CONFIG, INDEX, Checkpoint
from llmc.compiler.checkpoint.config import load_config
from llmc.compiler.checkpoint.context import choose_context
from llmc.compiler.checkpoint.model_keys import read_model
from llmc.compiler.checkpoint.prequantized.layout import read_quantized
from llmc.compiler.driver import plan_build
from llmc.compiler.request import BuildRequest
from llmc.runtime.errors import LlmcError

SHARDS = ("a.safetensors", "b.safetensors")
Edit = tuple[str, Any]
# A quarter of the profile's examples: each opens a checkpoint.
FEW = settings(max_examples=settings.default.max_examples // 4)
CONFIGURATION: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "intermediate_size": 24, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "attention_bias": False, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0,
                        "original_max_position_embeddings": 32},
    "dtype": "float32",
}  # fmt: skip
# Keys that the configuration lacks and transformers or llmc reads.
MORE_KEYS = (
    "rope_scaling", "rope_theta", "quantization_config", "auto_map", "text_config", "layer_types",
    "sliding_window", "attn_implementation", "torch_dtype", "pretraining_tp", "mlp_bias", "n_layer",
    "transformers_weights", "partial_rotary_factor", "num_labels", "id2label", "use_bidirectional_attention",
)  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(
        (None, True, False, 0, -1, 1, 3, 7, 2**31, 2**63, 2**80, 10**400, 0.5, -0.0, 1e308, float("nan"),
         float("inf"), "", "a", "float8", "None", [], [1], [[]], {}, {"a": 1}, {"__float__": "Infinity"},
         {"__float__": 1}, "llama", "gemma3", "mamba2", "mistral3", "albert", "gpt2", "dynamic", "longrope",
         {"rope_type": "longrope"}, {"type": "dynamic", "factor": 2.0}, {"quant_method": "fp8"})
    ),
    st.integers(), st.floats(), st.text(max_size=8),
)  # fmt: skip
CONFIG_EDITS = st.lists(
    st.tuples(st.sampled_from((*CONFIGURATION, *MORE_KEYS, *(f"rope_parameters.{key}" for key in (
        "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "long_factor", "beta_fast",
        "partial_rotary_factor", "attention_factor", "mscale",
    )))), VALUES),
    min_size=1, max_size=3,
)  # fmt: skip


def write(root: Path) -> None:
    """Write a checkpoint of one layer in two shards."""
    rng = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (32, 16), "model.norm.weight": (16,),
        **{f"model.layers.0.{name}.weight": shape for name, shape in {
            "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16),
            "self_attn.o_proj": (16, 16), "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16),
            "mlp.down_proj": (16, 24), "input_layernorm": (16,), "post_attention_layernorm": (16,),
        }.items()},
    }  # fmt: skip
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    shard_of = {name: SHARDS[place % 2] for place, name in enumerate(tensors)}
    for shard in SHARDS:
        safetensors.numpy.save_file({n: t for n, t in tensors.items() if shard_of[n] == shard}, root / shard)
    (root / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    (root / CONFIG).write_text(json.dumps(CONFIGURATION))
    (root / "generation_config.json").write_text('{"eos_token_id": [2, 3], "bos_token_id": 1}')


def edited(document: dict[str, Any], edits: list[Edit]) -> dict[str, Any]:
    document = copy.deepcopy(document)
    for path, value in edits:
        *above, key = path.split(".")
        place = document
        for part in above:
            place = place[part] if isinstance(place.get(part), dict) else place
        place[key] = value
    return document


def attempt(damage: Callable[[Path], None], use: Callable[[Path], object]) -> None:
    """Damage a checkpoint and use it; anything but success and a clean LlmcError fails the test."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "c"
        root.mkdir()
        write(root)
        damage(root)
        before = sorted(path.name for path in root.iterdir())
        caught = None
        try:
            use(root)
        except LlmcError as error:
            caught = error
        assert caught is None or (caught.message and "\n" not in caught.message + caught.hint)
        assert sorted(path.name for path in root.iterdir()) == before
        assert [path.name for path in Path(directory).iterdir()] == ["c"]


def open_only(root: Path) -> Checkpoint:
    checkpoint = Checkpoint.open(root)
    assert all(type(token) is int for token in checkpoint.eos_token_ids)
    _ = checkpoint.bos_token_id, checkpoint.dtype
    checkpoint.check_layers()
    read_quantized(checkpoint)
    return checkpoint


def read(root: Path) -> None:
    checkpoint = open_only(root)
    context = choose_context(load_config(checkpoint), None)
    keys, renamed = read_model(checkpoint, context.config)
    read_quantized(renamed.checkpoint)
    renamed.compare(keys.parameters, renamed.checkpoint.tensors)


def plan(root: Path) -> None:
    plan_build(BuildRequest(str(root), root.parent / "x.llmc"))


def put(name: str, content: Any) -> Callable[[Path], None]:
    return lambda root: (root / name).write_text(json.dumps(content)) and None


@FEW
@given(edits=CONFIG_EDITS)
@example(edits=[("num_labels", 2**31)])  # transformers makes a dictionary of so many labels
def test_damaged_config(edits: list[Edit]) -> None:
    attempt(put(CONFIG, edited(CONFIGURATION, edits)), read)


@pytest.mark.slow
@settings(max_examples=25)
@given(edits=CONFIG_EDITS)
def test_damaged_config_in_a_plan(edits: list[Edit]) -> None:
    attempt(put(CONFIG, edited(CONFIGURATION, edits)), plan)


@FEW
@given(key=st.sampled_from(("eos_token_id", "bos_token_id", "temperature")), value=VALUES)
def test_damaged_generation_config(key: str, value: Any) -> None:
    attempt(put("generation_config.json", {key: value}), open_only)


@FEW
@given(
    edits=st.lists(
        st.tuples(
            st.sampled_from(("model.norm.weight", "more", "model.layers.0.mlp.up_proj.weight")),
            VALUES
            | st.sampled_from((*SHARDS, "./a.safetensors", "../c/a.safetensors", "/a", "c.safetensors")),
        ),
        min_size=1,
        max_size=3,
    )
)
@example(edits=[("model.norm.weight", "\n")])  # the name of a missing shard is in the message
def test_damaged_index(edits: list[Edit]) -> None:
    def damage(root: Path) -> None:
        index = json.loads((root / INDEX).read_text())
        index["weight_map"].update(edits)
        (root / INDEX).write_text(json.dumps(index))

    attempt(damage, open_only)


@FEW
@given(
    name=st.sampled_from((CONFIG, INDEX, *SHARDS)),
    places=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=4)), min_size=1, max_size=4
    ),
)
def test_damaged_bytes(name: str, places: list[tuple[float, bytes]]) -> None:
    """Bytes of a JSON file, or of the header of a shard, are replaced, inserted or removed."""

    def damage(root: Path) -> None:
        data = bytearray((root / name).read_bytes())
        end = 8 + int.from_bytes(data[:8], "little") if name in SHARDS else len(data)
        for place, new in places:
            at = int(place * end)
            data[at : at + max(1, len(new) - 1)] = new
        (root / name).write_bytes(data)

    attempt(damage, open_only)


def test_an_undamaged_checkpoint_is_read(tmp_path: Path) -> None:
    write(tmp_path)
    read(tmp_path)
    shutil.rmtree(tmp_path)
