"""Reading config.json: what is refused and why, and the context that its rotary embedding reaches."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.config import load_config
from llmc.compiler.checkpoint.context import choose_context
from llmc.compiler.checkpoint.model_keys import ModelKeys
from llmc.compiler.trace import probes
from llmc.runtime.errors import BuildError, CheckpointError, UnsupportedError

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
ALBERT: dict[str, Any] = LLAMA | {"model_type": "albert"}


def checkpoint(**config: Any) -> Checkpoint:
    return Checkpoint(Path("c"), config, {}, {}, (), [])


def refused(**config: Any) -> str:
    with pytest.raises((CheckpointError, UnsupportedError)) as caught:
        load_config(checkpoint(**config))
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.fixture
def own_code(tmp_path: Path) -> Path:
    """A directory with code of its own, which leaves a file when it is run."""
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\nclass Own: pass\n")
    return tmp_path


@pytest.mark.parametrize("model_type", ["albert", "own_architecture"])
def test_code_of_a_checkpoint_is_named_and_never_run(
    model_type: str, own_code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    auto_map = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    (own_code / "config.json").write_text(
        json.dumps(ALBERT | {"model_type": model_type, "auto_map": auto_map})
    )
    message = refused(
        **ALBERT | {"model_type": model_type, "auto_map": auto_map, "_name_or_path": str(own_code)}
    )
    assert message.endswith("needs the checkpoint's own code (auto_map: own.Own), which llmc never runs")
    assert not (own_code / "RAN").exists()
    assert not any(name.startswith("transformers_modules") for name in sys.modules)


def test_a_known_model_type_is_built_in_spite_of_auto_map(own_code: Path) -> None:
    settings = {"auto_map": {"AutoModelForCausalLM": "own.Own"}, "_name_or_path": str(own_code)}
    config = load_config(checkpoint(**LLAMA, **settings, return_dict=False, attn_implementation="org/kernel"))
    assert not hasattr(config, "auto_map")
    assert config.return_dict
    assert ModelKeys.of(config).parameters["model.norm.weight"] == (32,)
    assert not (own_code / "RAN").exists()


def test_infinity_is_read_as_transformers_writes_it(tmp_path: Path) -> None:
    settings = {
        "model_type": "mamba2",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 16,
    }
    config = load_config(checkpoint(**settings, time_step_limit=[0.0, {"__float__": "Infinity"}]))
    assert tuple(config.time_step_limit) == (0.0, math.inf)


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers 0, which must be a positive number"),
        ({"hidden_size": -32}, "hidden_size -32"),
        ({"vocab_size": 2**40}, "vocab_size 1099511627776"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "cannot share evenly"),
        ({"hidden_size": "32"}, "transformers refuses c/config.json"),
        ({"model_type": "albert"}, "no causal language model for model_type 'albert'"),
    ],
)
def test_unusable_configurations(changes: dict[str, Any], fact: str) -> None:
    assert fact in refused(**LLAMA | changes)


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **settings}}


def table(config: PreTrainedConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosines and sines that transformers computes for one sequence of `length` tokens."""
    with torch.no_grad():
        cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    return cos[0], sin[0]


def test_yarn_reaches_factor_times_the_original_context() -> None:
    yarn = rope("yarn", factor=4.0, original_max_position_embeddings=64)
    config = LlamaConfig(**LLAMA, **yarn)
    assert choose_context(config, None).max_seq_len == 256
    assert choose_context(config, 200).max_seq_len == 200
    with pytest.raises(BuildError, match="more than the model's context of 256") as caught:
        choose_context(config, 257)
    assert "256" in caught.value.hint
    assert (
        choose_context(LlamaConfig(**LLAMA | {"max_position_embeddings": 512}, **yarn), None).max_seq_len
        == 512
    )


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_one_table_serves_a_longer_context(kind: str) -> None:
    """It is that of transformers for a sequence of the whole context."""
    factors = (
        {"short_factor": [1.0] * 8, "long_factor": [4.0 + i for i in range(8)]} if kind == "longrope" else {}
    )
    size = {"max_position_embeddings": 256 if kind == "longrope" else 64}
    config = LlamaConfig(
        **LLAMA | size, **rope(kind, factor=4.0, original_max_position_embeddings=64, **factors)
    )
    unchanged = choose_context(config, None)
    assert (unchanged.max_seq_len, unchanged.config) == (64, config)
    assert "up to 256, uses the angles" in unchanged.notes[0]
    context = choose_context(config, 200)
    assert "the rotary angles of 200 tokens" in context.notes[0]
    tables = probes.rotary_tables("rope", LlamaRotaryEmbedding(context.config), 200)[""]
    cos, sin = table(config, 200)
    torch.testing.assert_close(tables.cos, cos[:, :8], rtol=0, atol=1e-5)
    torch.testing.assert_close(tables.sin, sin[:, :8], rtol=0, atol=1e-5)
    assert not torch.allclose(table(config, 64)[0], cos[:64], atol=1e-3)
    with pytest.raises(BuildError, match="context of 256"):
        choose_context(config, 257)


def test_unknown_ropes_and_hopeless_contexts_are_refused() -> None:
    with pytest.raises(CheckpointError, match="unknown rope type 'helical'") as caught:
        choose_context(load_config(checkpoint(**LLAMA, **rope("helical"))), None)
    assert "yarn" in caught.value.hint
    with pytest.raises(UnsupportedError, match="positions of 32 bits"):
        choose_context(LlamaConfig(**LLAMA | {"max_position_embeddings": 2**40}), None)
    with pytest.raises(
        BuildError, match="rotary tables of a context of 2000000000 tokens need about"
    ) as error:
        choose_context(LlamaConfig(**LLAMA | {"max_position_embeddings": 2 * 10**9, "head_dim": 4096}), None)
    assert "--max-seq-len" in error.value.hint
    assert choose_context(LlamaConfig(**LLAMA | {"max_position_embeddings": 2**40}), 64).max_seq_len == 64
