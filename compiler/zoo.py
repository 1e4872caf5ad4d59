"""Random-weight checkpoints for the geometries in `model_zoo/`, for tests, benchmarks and bug reports.

`make` writes a directory that transformers loads like any other: config.json (a copy of the zoo's
file), generation_config.json, a byte-level BPE tokenizer with a chat template, and safetensors
shards. Weights are drawn a few megabytes at a time, so that the size of the model is limited by the disk and
not by memory.

The same name and seed give the same bytes: every value is exact integer arithmetic on raw PCG64
output, whose stream numpy guarantees across versions (NEP 19; it does not guarantee the normal sampler's).

Token ids: 0-255 are the bytes, 256-259 the special tokens; a few English merges follow. The remaining ids
up to `vocab_size` have no token, as in most published checkpoints.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from llmc.compiler.weights.safetensors_writer import write_safetensors, write_sparse_safetensors
from llmc.runtime.dtypes import BY_NUMPY, numpy_dtype
from llmc.runtime.errors import CheckpointError, UnsupportedError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHARD_BYTES = 2_000_000_000
SPECIAL_TOKENS = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258, "<|pad|>": 259}
_CHUNK = 1 << 20  # values drawn at a time: 8 MB of raw bits
_MERGES = (
    "t h,th e,a n,an d,i n,in g,e d,e r,o n,r e,a t,e n,o r,e s,i s,i t,a l,s t,o u,l l,a s,a r,"
    "\u0120 the,\u0120 and,\u0120 a,\u0120 o,\u0120o f,\u0120 t,\u0120t o,\u0120 in,\u0120 w,\u0120w as,"
    "\u0120 h,\u0120h e,\u0120 s,\u0120 b,\u0120 c,\u0120 is,\u0120 it,\u0120 on,o m,l e,v er,l y,i c,en t"
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class ZooEntry:
    """One model that `make` can write: an entry of `model_zoo/<model_type>/zoo.toml`."""

    name: str
    model_type: str
    description: str
    #: The number of parameters; tied weights count once.
    parameters: int
    #: The file in that folder that becomes config.json.
    config: str
    #: Whether the tokenizer puts the BOS token before a text.
    prepends_bos: bool


@dataclass(frozen=True)
class Family:
    """The properties of a model family that random weights depend on: the table `weights` of its zoo.toml."""

    #: Whether norms multiply by 1 + weight.
    norms_add_one: bool = False
    #: Whether the model multiplies embeddings by sqrt(hidden size).
    scaled_embeddings: bool = False


def list_zoo() -> list[ZooEntry]:
    """Return the models that `make` can write, the smallest first. Imports nothing heavy."""
    families = [entry.name for entry in resources.files("llmc.model_zoo").iterdir() if entry.is_dir()]
    entries = [
        ZooEntry(model_type=family, **model)
        for family in families
        for model in _table(family).get("models", ())
    ]
    return sorted(entries, key=lambda entry: (entry.parameters, entry.name))


def _table(model_type: str) -> dict[str, Any]:
    """Return the contents of a family's zoo.toml; empty if it has none."""
    file = resources.files("llmc.model_zoo") / model_type / "zoo.toml"
    return tomllib.loads(file.read_text("utf-8")) if file.is_file() else {}


def zoo_config(name: str) -> dict[str, Any]:
    """Return the config.json of a zoo model. Raises UnsupportedError for an unknown name."""
    return json.loads(_config_text(_entry(name)))


def make(name: str, directory: str | Path, seed: int = 0, *, headers_only: bool = False) -> Path:
    """Write the random checkpoint `name` to `directory`, which must be empty or must not exist.

    headers_only: write zeros that take no space on the disk, to plan the build of a large model

    It is written to a temporary directory beside it, which is renamed when complete. Returns the directory.
    Raises UnsupportedError for an unknown name and CheckpointError for an occupied directory.
    """
    entry = _entry(name)
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(
            f"{target} exists and is not an empty directory",
            hint="name a new directory, or remove this one first",
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written: {error.strerror or error}", hint="name a directory you may write to"
        ) from error
    try:
        (staging / "config.json").write_text(_config_text(entry), encoding="utf-8")
        config = zoo_config(name)
        generation = {key: config[key] for key in ("bos_token_id", "pad_token_id")}
        generation["eos_token_id"] = [config["eos_token_id"], SPECIAL_TOKENS["<|endoftext|>"]]
        _write_json(staging / "generation_config.json", generation)
        _write_tokenizer(staging, entry, config)
        write_weights(staging, _weights(staging), config["dtype"], None if headers_only else seed)
        staging.chmod(0o755)
        os.rename(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return target


@dataclass(frozen=True)
class Weight:
    """One tensor to draw, approximately normal: mean `center`, standard deviation `std`, cut at 3.5 `std`."""

    shape: tuple[int, ...]
    center: float
    std: float


def _entry(name: str) -> ZooEntry:
    entries = {entry.name: entry for entry in list_zoo()}
    if name in entries:
        return entries[name]
    known = ", ".join(entries)
    raise UnsupportedError(f"the model zoo has no model named {name!r}", f"known names: {known}", "name")


def _config_text(entry: ZooEntry) -> str:
    folder = resources.files("llmc.model_zoo").joinpath(entry.model_type)
    return folder.joinpath(entry.config).read_text(encoding="utf-8")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _weights(directory: Path) -> dict[str, Weight]:
    """Return every tensor that transformers would save for the config in `directory`, by name.

    Linear weights get std 1/sqrt(fan_in), which keeps activations at unit scale, so that the output
    depends on the input through every layer. Embeddings and the head get twice that, so that logits
    spread (std about 2) and the most likely token is far from the second. If the model scales the embeddings,
    that gain would make every token predict itself, so the last norm gets the gain instead.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    tied = set(model.all_tied_weights_keys)
    head = model.get_output_embeddings()
    family = Family(**_table(model.config.model_type).get("weights", {}))
    gain = 1.0 if family.scaled_embeddings else 2.0
    weights: dict[str, Weight] = {}
    known = model.state_dict()
    for name, tensor in revert_weight_conversion(model, known).items():
        if name in tied:
            continue
        shape = tuple(tensor.shape)
        if name not in known:  # a matrix of experts or of their router, which checkpoints store otherwise
            weights[name] = Weight(shape, 0.0, 1.0 / math.sqrt(shape[-1]))
            continue
        module = model.get_submodule(name.rpartition(".")[0])
        class_name = type(module).__name__
        if name.endswith(".bias"):
            weights[name] = Weight(shape, 0.0, 0.1)
        elif class_name.endswith("Norm"):
            is_last_norm = family.scaled_embeddings and name == "model.norm.weight"
            weights[name] = Weight(shape, float(not family.norms_add_one) + is_last_norm, 0.1)
        else:
            outer = module is head or isinstance(module, torch.nn.Embedding)
            weights[name] = Weight(shape, 0.0, (gain if outer else 1.0) / math.sqrt(shape[-1]))
    return weights


def write_weights(
    directory: Path,
    weights: Mapping[str, Weight],
    dtype: str,
    seed: int | None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Draw `weights` into model.safetensors, or into shards with an index above `shard_bytes`.

    `dtype` is a config.json name, such as bfloat16. Without a seed the files are sparse, and all zeros.
    """
    st_name = BY_NUMPY[dtype].safetensors
    np_dtype = numpy_dtype(st_name)
    sizes = {name: math.prod(weights[name].shape) * np_dtype.itemsize for name in sorted(weights)}
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size

    def produce(name: str) -> Iterator[bytes]:
        assert seed is not None
        return (values.astype(np_dtype).tobytes() for values in _draw(weights[name], seed, name))

    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = directory / f"model{suffix}.safetensors"
        entries = [(name, st_name, weights[name].shape) for name in names]
        if seed is None:
            write_sparse_safetensors(file, entries, {"format": "pt"})
        else:
            write_safetensors(file, entries, produce, alignment=1, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file.name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)


def _draw(weight: Weight, seed: int, name: str) -> Iterator[np.ndarray]:
    """Yield float32 chunks of one tensor.

    A value is the sum of four 16-bit uniforms, of mean 131070 and variance 4 * (2**32 - 1) / 12: nearly
    normal, and exact on every machine.
    """
    generator = np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(name.encode())]))
    scale = np.float32(weight.std / math.sqrt((2**32 - 1) / 3))
    remaining = math.prod(weight.shape)
    while remaining > 0:
        count = min(remaining, _CHUNK)
        bits = generator.random_raw(count)
        pairs = (bits & 0x0000FFFF0000FFFF) + ((bits >> np.uint64(16)) & 0x0000FFFF0000FFFF)
        sums = ((pairs & 0xFFFFFFFF) + (pairs >> np.uint64(32))).astype(np.float32)
        yield (sums - np.float32(131070)) * scale + np.float32(weight.center)
        remaining -= count


def _write_tokenizer(directory: Path, entry: ZooEntry, config: Mapping[str, Any]) -> None:
    """Write tokenizer.json (byte-level BPE, see the module's docstring) and tokenizer_config.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = iter(range(0x100, 0x200))  # GPT-2's byte alphabet: other bytes move to U+0100 and up
    vocab = {chr(byte if byte in printable else next(shifted)): byte for byte in range(256)}
    merges = [(left, right) for left, right in (pair.split() for pair in _MERGES.split(","))]
    vocab |= {left + right: 260 + rank for rank, (left, right) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab | SPECIAL_TOKENS, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    text_of = {number: token for token, number in SPECIAL_TOKENS.items()}
    bos = text_of[config["bos_token_id"]]
    if entry.prepends_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, config["bos_token_id"])]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "bos_token": bos if entry.prepends_bos else None,
        "eos_token": text_of[config["eos_token_id"]],
        "pad_token": text_of[config["pad_token_id"]],
        "chat_template": ("{{ bos_token }}" if entry.prepends_bos else "") + _CHAT_TEMPLATE,
    }
    _write_json(directory / "tokenizer_config.json", settings)
