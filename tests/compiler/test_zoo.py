"""The model zoo: its checkpoints load in transformers, and the settings of each family take effect."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.compiler import zoo
from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.names import compare_names
from llmc.compiler.zoo import Weight, list_zoo, make, write_weights, zoo_config
from llmc.runtime.errors import CheckpointError, UnsupportedError
from support.content_hash import content_hash

TINY = [entry.name for entry in list_zoo() if not entry.name.endswith("-shape")]
TEXT = "The cat was in the house; it's 42 \u2014 \u00fcn\u00efcode\n"
TOKENS = 64


@pytest.fixture(scope="module", autouse=True)
def no_network() -> Any:
    """Fail the test on any connection: loading a local directory must not ask the hub."""
    import socket

    def refuse(self: socket.socket, address: object) -> None:
        raise AssertionError(f"connection to {address}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        yield


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("zoo")
    return {name: make(name, root / name) for name in TINY}


def load(directory: Path, **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", **kwargs)


def logits(model: Any) -> np.ndarray:
    """Return the logits [TOKENS, vocab] of a fixed random prompt."""
    import torch

    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, TOKENS)))
    with torch.inference_mode():
        return model(ids).logits[0].numpy()


@pytest.mark.parametrize("name", TINY)
def test_loads_in_transformers(name: str, checkpoints: dict[str, Path]) -> None:
    entry = next(entry for entry in list_zoo() if entry.name == name)
    model, info = load(checkpoints[name], output_loading_info=True)
    assert not any(info.values()), info
    assert sum(parameter.numel() for parameter in model.parameters()) == entry.parameters
    values = logits(model)
    assert 1.5 < values.std() < 2.5
    assert len(set(values.argmax(-1))) > TOKENS // 4  # the prediction depends on the input


@pytest.mark.parametrize("name", TINY)
def test_opens_as_a_checkpoint(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The tensors are those that transformers' save_pretrained writes."""
    ours = Checkpoint.open(checkpoints[name])
    load(checkpoints[name]).save_pretrained(tmp_path)
    theirs = Checkpoint.open(tmp_path)
    assert ours.tensors.keys() == theirs.tensors.keys()
    compare_names({name: ref.shape for name, ref in ours.tensors.items()}, theirs.tensors)
    for tensor, ref in ours.tensors.items():
        np.testing.assert_array_equal(ref.read(), theirs.tensors[tensor].read())
    assert ours.model_type == next(entry.model_type for entry in list_zoo() if entry.name == name)
    assert ours.dtype == "float32"
    assert (ours.eos_token_ids, ours.bos_token_id) == ((258, 256), 256)
    assert max(258, ours.config["pad_token_id"]) < ours.config["vocab_size"]


@pytest.mark.parametrize("name", TINY)
def test_tokenizer(name: str, checkpoints: dict[str, Path]) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    entry = next(entry for entry in list_zoo() if entry.name == name)
    theirs = AutoTokenizer.from_pretrained(checkpoints[name])
    ids = theirs(TEXT)["input_ids"]
    assert ids == Tokenizer.from_file(str(checkpoints[name] / "tokenizer.json")).encode(TEXT).ids
    assert (ids[0] == 256) == entry.prepends_bos
    assert len(ids) < len(TEXT.encode())  # merges apply
    assert theirs.decode(ids, skip_special_tokens=True) == TEXT
    assert (theirs.eos_token_id, theirs.pad_token_id) == (258, 259)
    assert len(theirs) <= zoo_config(name)["vocab_size"]
    chat = theirs.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert chat.startswith("<|endoftext|>") == entry.prepends_bos


PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("name", "key", "value", "first"),
    [
        ("llama-tiny", "rope_scaling", None, 1),
        ("mistral-tiny", "sliding_window", TOKENS, 24),
        ("qwen2-tiny", "sliding_window", TOKENS, 24),
        ("qwen2-tiny", "layer_types", ["full_attention"] * 4, 24),
        ("phi3-tiny", "rope_parameters", PLAIN_ROPE, 1),
        ("gemma2-tiny", "sliding_window", TOKENS, 24),
        ("gemma2-tiny", "layer_types", ["sliding_attention"] * 4, 24),
        ("gemma2-tiny", "attn_logit_softcapping", None, 1),
        ("gemma2-tiny", "final_logit_softcapping", None, 0),
        ("gemma2-tiny", "query_pre_attn_scalar", 32, 1),
        ("gemma3-tiny", "sliding_window", TOKENS, 24),
        ("gemma3-tiny", "layer_types", ["sliding_attention"] * 4, 1),
        ("gemma3-tiny", "rope_parameters", {f"{k}_attention": PLAIN_ROPE for k in ("sliding", "full")}, 1),
    ],
)
def test_family_settings_are_effective(
    name: str, key: str, value: object, first: int, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Changing the key changes the logits from position `first` on, and not before it."""
    config = zoo_config(name)
    assert config[key] != value
    shutil.copy(checkpoints[name] / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    change = np.abs(logits(load(tmp_path)) - logits(load(checkpoints[name]))).max(axis=-1)
    assert change[:first].max(initial=0) < 1e-4
    assert change[first:].max() > 0.2


def test_geometries_distinguish_dimensions() -> None:
    configs = {name: zoo_config(name) for name in TINY}
    for config in configs.values():  # latent attention has one latent vector, and no heads that share keys
        assert "kv_lora_rank" in config or config["num_key_value_heads"] < config["num_attention_heads"]
    wide = {n for n, c in configs.items() if 4 * c.get("head_dim", c["hidden_size"] // 4) != c["hidden_size"]}
    assert wide == {"qwen3-tiny", "qwen3-moe-tiny", "gemma2-tiny", "gemma3-tiny"}
    assert {c["tie_word_embeddings"] for c in configs.values()} == {True, False}


def test_same_seed_gives_the_same_bytes(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    again = make("qwen2-tiny", tmp_path / "again")
    files = sorted(file.name for file in again.iterdir())
    assert files == sorted(file.name for file in checkpoints["qwen2-tiny"].iterdir())
    for file in files:
        assert (again / file).read_bytes() == (checkpoints["qwen2-tiny"] / file).read_bytes()
    other = make("qwen2-tiny", tmp_path / "other", seed=1)
    for name, ref in Checkpoint.open(other).tensors.items():
        assert not np.array_equal(ref.read(), Checkpoint.open(again).tensors[name].read())


def test_values_do_not_drift_between_releases(checkpoints: dict[str, Path]) -> None:
    """Published measurements refer to these weights."""
    values = Checkpoint.open(checkpoints["llama-tiny"]).tensors["model.norm.weight"].read()
    assert values[:3].tolist() == pytest.approx([0.8774434328079224, 1.063165307044983, 1.1161236763000488])


def test_shards(tmp_path: Path) -> None:
    weights = {f"w{i}": Weight((3, 5), 0.0, 1.0) for i in range(5)} | {"big": Weight((100, 4), 1.0, 0.1)}
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    write_weights(tmp_path, weights, "bfloat16", seed=0, shard_bytes=70)
    checkpoint = Checkpoint.open(tmp_path)
    assert {name: ref.shape for name, ref in checkpoint.tensors.items()} == {
        name: weight.shape for name, weight in weights.items()
    }
    assert {ref.file.name for ref in checkpoint.tensors.values()} == {
        f"model-{number:05d}-of-00004.safetensors" for number in (1, 2, 3, 4)
    }
    assert checkpoint.dtype == "bfloat16"
    content = content_hash(checkpoint)
    for file in tmp_path.glob("model*"):
        file.unlink()
    write_weights(tmp_path, weights, "bfloat16", seed=0)
    assert content_hash(Checkpoint.open(tmp_path)) == content


def test_drawn_values_are_bell_shaped(tmp_path: Path) -> None:
    write_weights(tmp_path, {"w": Weight((1500, 1000), 2.0, 0.5)}, "float32", seed=3)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    values = (Checkpoint.open(tmp_path).tensors["w"].read() - 2.0) / 0.5
    assert abs(values.mean()) < 3e-3
    assert abs(values.std() - 1) < 3e-3
    assert 3 < np.abs(values).max() < 3.5
    assert abs((values**4).mean() - 2.7) < 0.02  # four uniforms; a normal has 3
    assert len(np.unique(values[:2].view(np.uint32))) > 1900


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "query"),
    [
        ("qwen3-0.6b-shape", 28, 1024, 2048),
        ("llama3.2-1b-shape", 16, 2048, 2048),
        ("llama3.1-70b-shape", 80, 8192, 8192),
    ],
)
def test_large_shapes_need_little_of_transformers(
    tmp_path: Path, name: str, layers: int, hidden: int, query: int
) -> None:
    """They are gigabytes, so only their names, shapes and counts are checked."""
    (tmp_path / "config.json").write_text(json.dumps(zoo_config(name)))
    weights = zoo._weights(tmp_path)
    assert weights["model.embed_tokens.weight"].shape == (zoo_config(name)["vocab_size"], hidden)
    assert weights[f"model.layers.{layers - 1}.self_attn.q_proj.weight"].shape == (query, hidden)
    assert f"model.layers.{layers}.self_attn.q_proj.weight" not in weights
    assert ("lm_head.weight" in weights) != zoo_config(name)["tie_word_embeddings"]
    entry = next(entry for entry in list_zoo() if entry.name == name)
    assert sum(int(np.prod(weight.shape)) for weight in weights.values()) == entry.parameters


def test_headers_alone_describe_the_same_tensors(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    whole, sparse = checkpoints["qwen3-tiny"], make("qwen3-tiny", tmp_path / "sparse", headers_only=True)
    wanted, got = Checkpoint.open(whole).tensors, Checkpoint.open(sparse).tensors
    assert {name: (ref.shape, ref.dtype) for name, ref in got.items()} == {
        name: (ref.shape, ref.dtype) for name, ref in wanted.items()
    }
    assert not any(ref.read().any() for ref in got.values())
    files = [directory / "model.safetensors" for directory in (whole, sparse)]
    assert files[0].stat().st_size == files[1].stat().st_size
    assert 512 * files[1].stat().st_blocks < files[1].stat().st_size / 10


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="no model named 'gpt'") as unknown:
        make("gpt", tmp_path / "x")
    assert "llama-tiny, " in unknown.value.hint
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for target in ("full", "full/file"):
        with pytest.raises(CheckpointError, match="not an empty directory") as occupied:
            make("llama-tiny", tmp_path / target)
        assert "remove" in occupied.value.hint
    with pytest.raises(CheckpointError, match="cannot be written"):
        make("llama-tiny", tmp_path / "full" / "file" / "below")
    monkeypatch.setattr(zoo, "_write_tokenizer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make("llama-tiny", tmp_path / "half")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_empty_directory_is_accepted(tmp_path: Path) -> None:
    assert make("llama-tiny", str(tmp_path)) == tmp_path
    assert Checkpoint.open(tmp_path).model_type == "llama"
    assert tmp_path.stat().st_mode & 0o777 == 0o755
