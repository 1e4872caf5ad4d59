"""Opening checkpoint directories, and refusing every kind of damage."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.names import compare_names
from llmc.compiler.checkpoint.safetensors import TensorRef
from llmc.runtime.errors import CheckpointError
from support.content_hash import content_hash

TENSORS = {
    "model.embed_tokens.weight": np.arange(12, dtype=np.float16).reshape(4, 3),
    "model.norm.weight": np.ones(3, np.float32),
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    config = {"model_type": "llama", "eos_token_id": 2, "bos_token_id": 1, "torch_dtype": "float16"}
    (path / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(TENSORS, path / "model.safetensors", metadata={"format": "pt"})
    (path / "tokenizer.json").write_text("{}")
    return path


def edit(root: Path, **changes: object) -> None:
    config = json.loads((root / "config.json").read_text()) | changes
    (root / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def shard(root: Path) -> dict[str, str]:
    (root / "model.safetensors").unlink()
    weight_map = dict(zip(TENSORS, SHARDS, strict=True))
    for name, file in weight_map.items():
        safetensors.numpy.save_file({name: TENSORS[name]}, root / file)
    (root / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_reads_a_directory(root: Path) -> None:
    (root / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    (root / "chat_template.jinja").write_text("{{ messages }}")
    checkpoint = Checkpoint.open(str(root))
    assert checkpoint.path == root
    assert checkpoint.model_type == "llama"
    assert checkpoint.eos_token_ids == (2, 3)
    assert checkpoint.bos_token_id == 1
    assert checkpoint.dtype == "float16"
    assert checkpoint.total_bytes == 36
    names = [file.name for file in checkpoint.tokenizer_files]
    assert names == ["tokenizer.json", "chat_template.jinja", "generation_config.json"]
    assert checkpoint.require_tokenizer() == root / "tokenizer.json"
    for name, values in TENSORS.items():
        np.testing.assert_array_equal(checkpoint.tensors[name].read(), values)


def test_token_ids_and_dtype_have_fallbacks(root: Path) -> None:
    edit(root, eos_token_id=None, bos_token_id=None, torch_dtype=None)
    checkpoint = Checkpoint.open(root)
    assert checkpoint.eos_token_ids == ()
    assert checkpoint.bos_token_id is None
    assert checkpoint.dtype == "float16"  # 24 of 36 bytes
    edit(root, text_config={"eos_token_id": 7, "dtype": "bfloat16"})
    assert Checkpoint.open(root).eos_token_ids == (7,)
    assert Checkpoint.open(root).dtype == "bfloat16"
    edit(root, eos_token_id="</s>")
    with pytest.raises(CheckpointError, match="eos_token_id is '</s>'"):
        _ = Checkpoint.open(root).eos_token_ids


def test_shards_hold_the_same_content(root: Path) -> None:
    whole = Checkpoint.open(root)
    content = content_hash(whole)
    assert whole.file_hashes().keys() == {"config.json", "model.safetensors", "tokenizer.json"}
    assert (
        whole.file_hashes()["config.json"] == hashlib.sha256((root / "config.json").read_bytes()).hexdigest()
    )
    shard(root)
    sharded = Checkpoint.open(root)
    assert sharded.tensors.keys() == whole.tensors.keys()
    assert content_hash(sharded) == content
    assert sharded.file_hashes().keys() == {"config.json", INDEX, "tokenizer.json", *SHARDS}
    with (root / SHARDS[1]).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\7")
    assert content_hash(Checkpoint.open(root)) != content
    edit(root, rms_norm_eps=1e-5)
    assert content_hash(Checkpoint.open(root)) != content


def drop(name: str) -> Callable[[Path], object]:
    return lambda root: (root / name).unlink()


def put(name: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text(text)


def swap(name: str, text: str = "x") -> Callable[[Path], object]:
    """Replace model.safetensors with another file."""
    return lambda root: (drop("model.safetensors")(root), put(name, text)(root))


def index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], object]:
    def write(root: Path) -> None:
        weight_map = shard(root)
        change(weight_map)
        (root / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return write


@pytest.mark.parametrize(
    ("damage", "fact", "hint"),
    [
        (drop("config.json"), "has no config.json", "directory"),
        (put("config.json", "{"), "config.json is not valid JSON", "download"),
        (put("config.json", "[]"), "config.json is not a JSON object", "download"),
        (put("config.json", "[" * 100_000), "config.json is not valid JSON", "download"),
        (put("config.json", LFS), "config.json is a git-LFS pointer", "git lfs pull"),
        (put("config.json", "{}"), "has no model_type", "save_pretrained"),
        (put("generation_config.json", "{"), "generation_config.json is not valid JSON", "download"),
        (put("tokenizer.json", LFS), "tokenizer.json is a git-LFS pointer", "git lfs pull"),
        (put("model.safetensors", LFS), "model.safetensors is a git-LFS pointer", "git lfs pull"),
        (put("model.safetensors", "\2\0\0\0\0\0\0\0{}"), "holds no tensors", "write"),
        (drop("model.safetensors"), "has no weights", "complete"),
        (swap("pytorch_model.bin"), r"only pickled weights \(pytorch_model.bin\)", "AutoModelForCausalLM"),
        (swap("pytorch_model-00001-of-00002.bin"), "only pickled weights", "save_pretrained"),
        (swap("model-00001-of-00002.safetensors"), "but neither model.safetensors nor", "index.json"),
        (swap(INDEX, "{}"), "no weight_map", "download"),
        (swap(INDEX, '{"weight_map": {"a": 1}}'), "no weight_map", "download"),
        (swap(INDEX, '{"weight_map": {"a": "../other.safetensors"}}'), "no weight_map", "download"),
        (swap(INDEX, '{"weight_map": {"a": ".."}}'), "no weight_map", "download"),
        (index(lambda m: m.update(more="model-00003.safetensors")), "lacks model-00003", "resume"),
        (index(lambda m: m.update(more=SHARDS[0])), "00001-of-00002.safetensors lacks 'more'", "versions"),
        (index(lambda m: m.update({"model.norm.weight": SHARDS[0]})), "lacks 'model.norm", "versions"),
    ],
)
def test_errors(root: Path, damage: Callable[[Path], object], fact: str, hint: str) -> None:
    damage(root)
    with pytest.raises(CheckpointError, match=fact) as caught:
        Checkpoint.open(root)
    assert hint in caught.value.hint
    assert "\n" not in caught.value.message


def test_contradictory_shard_is_refused(root: Path) -> None:
    shard(root)
    safetensors.numpy.save_file(TENSORS, root / SHARDS[1])
    with pytest.raises(
        CheckpointError, match=r"holds 'model.embed_tokens.weight', contrary to .*; tensors that differ: 1$"
    ):
        Checkpoint.open(root)


def test_tensors_that_the_index_leaves_out_are_read(root: Path) -> None:
    """transformers loads all of every shard that the index names. `./` before a shard's name is usual."""
    weight_map = {name: f"./{file}" for name, file in shard(root).items()}
    safetensors.numpy.save_file(
        {"model.norm.weight": TENSORS["model.norm.weight"], "more": np.ones(2, np.float32)}, root / SHARDS[1]
    )
    (root / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = Checkpoint.open(root)
    assert checkpoint.tensors.keys() == {*TENSORS, "more"}
    assert checkpoint.notes == ("model.safetensors.index.json does not list more, which its shards hold",)
    safetensors.numpy.save_file(
        {"model.embed_tokens.weight": TENSORS["model.embed_tokens.weight"], "more": np.ones(2)},
        root / SHARDS[0],
    )
    with pytest.raises(CheckpointError, match="both hold 'more', which"):
        Checkpoint.open(root)


def test_unindexed_shard_is_ignored(root: Path) -> None:
    index(lambda weight_map: weight_map.pop("model.norm.weight"))(root)
    assert list(Checkpoint.open(root).tensors) == ["model.embed_tokens.weight"]


def test_not_a_directory(root: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no directory"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is a file") as caught:
        Checkpoint.open(root / "model.safetensors")
    assert str(root) in caught.value.hint
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match="is a file") as caught:
        Checkpoint.open(tmp_path / "model.gguf")
    assert "GGUF" in caught.value.hint


def test_adapters_and_gguf_files_are_named(root: Path) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (root / "adapter_config.json").write_text(json.dumps(adapter))
    assert "adapter_config.json is not used" in Checkpoint.open(root).notes[0]
    for name in ("model.safetensors", "config.json"):  # without weights, and without a configuration too
        (root / name).unlink()
        with pytest.raises(CheckpointError, match="is a LORA adapter of org/base, not a model") as caught:
            Checkpoint.open(root)
        assert "merge_and_unload" in caught.value.hint
    (root / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is an adapter, not a model"):
        Checkpoint.open(root)
    (root / "adapter_config.json").unlink()
    (root / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"has no config.json, but model-Q4_K_M\.gguf") as caught:
        Checkpoint.open(root)
    assert "GGUF files are not supported" in caught.value.hint
    (root / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"only GGUF weights"):
        Checkpoint.open(root)
    (root / "without_suffix").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(CheckpointError, match="is a file") as caught:
        Checkpoint.open(root / "without_suffix")
    assert "GGUF" in caught.value.hint


def test_missing_tokenizer_json(root: Path) -> None:
    (root / "tokenizer.json").unlink()
    checkpoint = Checkpoint.open(root)
    assert checkpoint.tokenizer is None
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json$"):
        checkpoint.require_tokenizer()
    (root / "tokenizer.model").touch()
    with pytest.raises(CheckpointError, match=r"only tokenizer\.model") as caught:
        Checkpoint.open(root).require_tokenizer()
    assert "AutoTokenizer" in caught.value.hint


def refs(**changes: tuple[int, ...] | None) -> dict[str, TensorRef]:
    shapes = expected() | {name.replace("__", "."): shape for name, shape in changes.items()}
    return {n: TensorRef(n, Path("f"), "F32", s, 0, 0) for n, s in shapes.items() if s is not None}


def expected(layers: int = 12) -> dict[str, tuple[int, ...]]:
    names = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,)}
    for layer in range(layers):
        names[f"model.layers.{layer}.self_attn.q_norm.weight"] = (2,)
        names[f"model.layers.{layer}.mlp.up_proj.weight"] = (6, 4)
    return names


def difference(want: dict[str, tuple[int, ...]], have: dict[str, TensorRef], *unused: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        compare_names(want, have, unused)
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value.message.removeprefix("the checkpoint does not fit its config.json: ")


def test_unused_tensors_matter_only_beside_a_difference() -> None:
    compare_names(expected(), refs())
    compare_names(expected(), refs(), ["mtp.0"])
    assert difference(expected(), refs(model__norm__weight=None), "mtp.0") == (
        "no model.norm.weight; unexpected mtp.0"
    )


def test_differing_names_are_collapsed_and_paired() -> None:
    renamed = {n.replace("q_norm", "query_norm"): r for n, r in refs(model__norm__weight=(5,)).items()}
    assert difference(expected(), renamed, *(n for n in renamed if "query" in n)) == (
        "no model.layers.{0-11}.self_attn.q_norm.weight "
        "(it has model.layers.{0-11}.self_attn.query_norm.weight); "
        "model.norm.weight is [5], not [4]"
    )
    assert difference(expected(14), refs()) == (
        "no model.layers.{12-13}.self_attn.q_norm.weight; no model.layers.{12-13}.mlp.up_proj.weight"
    )
    holes = {n: r for n, r in refs().items() if n.split(".")[2] not in ("1", "2", "7")}
    assert "no model.layers.{1-2,7}.mlp.up_proj.weight" in difference(expected(), holes)


def test_long_difference_is_truncated() -> None:
    text = difference({f"tensor_{i}": (1,) for i in range(30)}, refs())
    assert text.endswith("; and 24 more differences")
    assert text.count(";") == 6
