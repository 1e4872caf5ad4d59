"""A Hugging Face checkpoint directory, opened without loading it and without torch.

    config.json                    required, with a `model_type`
    model.safetensors              the weights, or
    model.safetensors.index.json   {"weight_map": {tensor: shard file}} and the shards it names
    generation_config.json         optional; its BOS id takes precedence over that of config.json
    tokenizer.json, ...            optional here: see `Checkpoint.require_tokenizer`
    adapter_config.json            makes a directory without weights an adapter, which is refused

Layout: https://huggingface.co/docs/transformers/main/en/main_classes/model (save_pretrained).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.compiler.checkpoint.safetensors import LFS_MARK, TensorRef, read_header, refuse_lfs_pointer
from llmc.runtime.dtypes import DTYPES, FLOATS
from llmc.runtime.errors import CheckpointError

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
ADAPTER = "adapter_config.json"
# The files beside config.json and the weights that a build may read: those of the tokenizer, and
# generation_config.json. The manifest has their hashes, and transformers loads the tokenizer from a directory
# that has only them and config.json.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "tokenizer.model",
    "tiktoken.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
_LAYERS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers"}  # keys of config.json
# The same for other parts of a model, which a checkpoint may lack, and how many layers they may have.
_OTHER_LAYERS = _LAYERS | {"depth", "num_mtp_layers", "num_nextn_predict_layers"}
_MAX_OTHER_LAYERS = 1000
_ORIGINAL = "compare it with the config.json of the original model"
_BLOCK = 1 << 24  # bytes that are hashed at a time
_GGUF_MAGIC = b"GGUF"
_NO_GGUF = "GGUF files are not supported; use the safetensors checkpoint they were made from"
_CONVERT = (
    'python -c "from transformers import {auto} as A; '
    "A.from_pretrained('{path}').save_pretrained('{path}-{suffix}')\""
)
_MERGE = (
    'python -c "from peft import AutoPeftModelForCausalLM as A; '
    "A.from_pretrained('{path}').merge_and_unload().save_pretrained('{path}-merged')\""
)


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint directory. `open` checks everything except the values of tensors."""

    path: Path
    #: The values of config.json.
    config: dict[str, Any]
    #: The values of generation_config.json; empty if there is none.
    generation_config: dict[str, Any]
    #: All tensors, by name.
    tensors: dict[str, TensorRef]
    #: The safetensors files, sorted.
    weight_files: tuple[Path, ...]
    #: The files of TOKENIZER_FILES that exist.
    tokenizer_files: list[Path]
    #: Notes for the user about contents that llmc does not use.
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        """Open a checkpoint directory.

        Raises CheckpointError, with a hint, for whatever is missing, damaged or contradictory.
        """
        root = Path(path)
        if root.is_file():
            raise CheckpointError(
                f"{root} is a file; a checkpoint is a directory with config.json and safetensors files",
                hint=_NO_GGUF if _is_gguf(root) else f"give its directory: {root.parent}",
            )
        if not root.is_dir():
            raise CheckpointError(
                f"there is no directory {root}",
                hint="check the path; a checkpoint is a directory with config.json and safetensors files",
            )
        config = read_json(root / CONFIG) if (root / CONFIG).is_file() else None
        if config is None:
            raise _no_config(root)
        if not isinstance(config.get("model_type"), str):
            raise CheckpointError(
                f"{root / CONFIG} has no model_type",
                hint="llmc needs the config.json that transformers' save_pretrained writes",
            )
        generation = root / "generation_config.json"
        files = [root / name for name in TOKENIZER_FILES if (root / name).is_file()]
        for file in files:
            with file.open("rb") as stream:
                refuse_lfs_pointer(file, stream.read(len(LFS_MARK)))
        tensors, notes = _read_tensors(root)
        if (root / ADAPTER).is_file():
            notes.append(f"{ADAPTER} is not used: merge the adapter first if the model is to have it")
        return cls(
            path=root,
            config=config,
            generation_config=read_json(generation) if generation.is_file() else {},
            tensors=tensors,
            weight_files=tuple(sorted({ref.file for ref in tensors.values()})),
            tokenizer_files=files,
            notes=tuple(notes),
        )

    @property
    def model_type(self) -> str:
        return self.config["model_type"]

    @property
    def family(self) -> str:
        """The model_type of the language model, which is a part of a multimodal model."""
        nested = self._text_config.get("model_type")
        return nested if isinstance(nested, str) else self.model_type

    @property
    def tokenizer(self) -> Path | None:
        """The path of tokenizer.json, or None. Without it a model can be built, but not prompted by text."""
        return next((file for file in self.tokenizer_files if file.name == "tokenizer.json"), None)

    def require_tokenizer(self) -> Path:
        """Return the path of tokenizer.json.

        Raises CheckpointError if there is none; the hint says how to make one.
        """
        if self.tokenizer is not None:
            return self.tokenizer
        names = {file.name for file in self.tokenizer_files}
        others = sorted(names & {"tokenizer.model", "vocab.json"})
        convert = _CONVERT.format(auto="AutoTokenizer", path=self.path, suffix="tokenizer")
        raise CheckpointError(
            f"{self.path} has no tokenizer.json" + (f", only {' and '.join(others)}" if others else ""),
            hint=f"convert it, then copy the files over: {convert}"
            if others
            else "add the model's tokenizer.json",
        )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The token ids that end a generation, from generation_config.json and config.json. May be empty."""
        return tuple(dict.fromkeys(token for ids in self.eos_by_file.values() for token in ids))

    @property
    def eos_by_file(self) -> dict[str, tuple[int, ...]]:
        """File -> the token ids that end a generation according to it. generation_config.json comes first.

        Files without such ids are left out. Raises CheckpointError for a value that is not a token id.
        """
        configs = (("generation_config.json", self.generation_config), (CONFIG, self.config))
        ids_by_file = {file: self._token_ids(file, source, "eos_token_id") for file, source in configs}
        ids_by_file[CONFIG] += self._token_ids(CONFIG, self._text_config, "eos_token_id")
        return {file: tuple(dict.fromkeys(ids)) for file, ids in ids_by_file.items() if ids}

    @property
    def bos_token_id(self) -> int | None:
        """The id of the token that begins a text, from generation_config.json, else from config.json."""
        configs = (self.generation_config, self.config, self._text_config)
        ids = [token for source in configs for token in self._token_ids(CONFIG, source, "bos_token_id")[:1]]
        return ids[0] if ids else None

    def _token_ids(self, file: str, source: dict[str, Any], key: str) -> tuple[int, ...]:
        value = source.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(item) is int and 0 <= item < 2**31 for item in ids):
            shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:80]}..."
            raise CheckpointError(
                f"{self.path / file}: {key} is {shown}", hint="it must be a token id or a list of token ids"
            )
        return tuple(ids)

    def check_layers(self) -> None:
        """Compare the number of layers in config.json with the tensors, before a model of that size is made.

        Raises CheckpointError if it is not a positive number, if it is larger than the number of layers in
        the tensors' names, or if another part of the model has more than 1,000 layers.
        """
        numbers: defaultdict[tuple[str, int], set[str]] = defaultdict(set)
        for name in self.tensors:
            parts = name.split(".")
            for place, part in enumerate(parts):
                if part.isdecimal():
                    numbers[".".join(parts[:place]), place].add(part)
        stored = max(map(len, numbers.values()), default=0)
        for source in (self.config, self._text_config):
            for key in _LAYERS & source.keys():
                layers = source[key]
                if type(layers) is not int or layers < 1:
                    raise CheckpointError(
                        f"{self.path / CONFIG} has {key} {layers!r}, which must be a positive number",
                        _ORIGINAL,
                    )
                if stored and layers > stored:
                    raise CheckpointError(
                        f"{self.path / CONFIG} has {key} {layers}, but the weights have {stored} layers",
                        _ORIGINAL,
                    )
        for section in _sections(self.config):
            for key in _OTHER_LAYERS & section.keys():
                if isinstance(section[key], (int, float)) and section[key] > max(stored, _MAX_OTHER_LAYERS):
                    raise CheckpointError(
                        f"{self.path / CONFIG} has {key} {section[key]!r}, which is too many", _ORIGINAL
                    )

    @property
    def _text_config(self) -> dict[str, Any]:
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else {}

    @property
    def dtype(self) -> str:
        """The dtype in config.json, else that of most bytes of the weights, by torch's name ("bfloat16")."""
        for source in (self.config, self._text_config):
            named = source.get("dtype") or source.get("torch_dtype")
            if isinstance(named, str) and named != "auto":
                return named.removeprefix("torch.")
        sizes: Counter[str] = Counter()
        for ref in self.tensors.values():
            if ref.dtype in FLOATS:
                sizes[DTYPES[ref.dtype].numpy] += ref.nbytes
        return sizes.most_common(1)[0][0] if sizes else "float32"

    @property
    def total_bytes(self) -> int:
        """The size of the tensor data in bytes."""
        return sum(ref.nbytes for ref in self.tensors.values())

    def file_hashes(self) -> dict[str, str]:
        """Return the sha256 of every file of the checkpoint, by file name."""
        files = {self.path / CONFIG, *self.tokenizer_files, *self.weight_files}
        if not (self.path / WEIGHTS).is_file():
            files.add(self.path / INDEX)
        hashes: dict[str, str] = {}
        for file in sorted(files):
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while block := stream.read(_BLOCK):
                    digest.update(block)
            hashes[file.name] = digest.hexdigest()
        return hashes


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a checkpoint. Raises CheckpointError if it cannot be read."""
    try:
        data = file.read_bytes()
        refuse_lfs_pointer(file, data)
        value = json.loads(data)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is not valid JSON: {error}", hint="the file is damaged; download it again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is not a JSON object", hint="the file is damaged; download it again")
    return value


def _sections(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every object in a JSON document, however deep."""
    values: list[Any] = [document]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            yield value
            values.extend(value.values())
        elif isinstance(value, list):
            values.extend(value)


def _read_tensors(root: Path) -> tuple[dict[str, TensorRef], list[str]]:
    """Return the tensors by name, and a note about tensors that the index does not list."""
    if (root / WEIGHTS).is_file():
        tensors = read_header(root / WEIGHTS)
        if not tensors:
            raise CheckpointError(f"{root / WEIGHTS} holds no tensors", hint="write the checkpoint again")
        return tensors, []
    if not (root / INDEX).is_file():
        raise _no_weights(root)
    weight_map = _read_index(root / INDEX)
    tensors = {}
    unlisted: list[str] = []
    for shard in sorted(set(weight_map.values())):
        if not (root / shard).is_file():
            raise CheckpointError(
                f"{root} lacks {shard}, which {INDEX} names", hint="the download is incomplete; resume it"
            )
        shard_tensors = read_header(root / shard)
        lacking = [name for name, file in weight_map.items() if file == shard and name not in shard_tensors]
        moved = [name for name in shard_tensors if weight_map.get(name, shard) != shard]
        if differing := sorted(lacking) or sorted(moved):
            raise CheckpointError(
                f"{root / shard} {'lacks' if lacking else 'holds'} {differing[0]!r}, contrary to {INDEX}; "
                f"tensors that differ: {len(differing)}",
                hint="index and shards are of different versions; download both again",
            )
        extra = [name for name in shard_tensors if name not in weight_map]
        if duplicates := [name for name in extra if name in tensors]:
            raise CheckpointError(
                f"{root / shard} and {tensors[duplicates[0]].file.name} both hold {duplicates[0]!r}, "
                f"which {INDEX} does not list",
                hint="index and shards are of different versions; download both again",
            )
        unlisted += extra
        tensors |= shard_tensors
    # transformers loads every tensor of the shards that the index names.
    notes = [f"{INDEX} does not list {_some(unlisted)}, which its shards hold"] if unlisted else []
    return tensors, notes


def _read_index(index: Path) -> dict[str, str]:
    """Return the map from tensors to shards, each a file in the same directory."""
    weight_map = read_json(index).get("weight_map")
    if isinstance(weight_map, dict):
        weight_map = {
            name: shard.removeprefix("./") if isinstance(shard, str) else shard
            for name, shard in weight_map.items()
        }
    if not weight_map or not isinstance(weight_map, dict) or not all(map(_is_name, weight_map.values())):
        raise CheckpointError(
            f"{index} has no weight_map from tensors to files beside it",
            hint="the file is damaged; download it again",
        )
    return weight_map


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")


def _is_name(shard: Any) -> bool:
    """Return whether `shard` names a file in the same directory."""
    return isinstance(shard, str) and Path(shard).name == shard != ".." and "\\" not in shard


def _no_config(root: Path) -> CheckpointError:
    if adapter := _adapter_of(root):
        return adapter
    if gguf := next(iter(sorted(root.glob("*.gguf"))), None):
        return CheckpointError(f"{root} has no {CONFIG}, but {gguf.name}", hint=_NO_GGUF)
    return CheckpointError(f"{root} has no {CONFIG}", hint="is this the checkpoint's directory?")


def _adapter_of(root: Path) -> CheckpointError | None:
    """Return the error for a directory with an adapter (PEFT) instead of a model."""
    if not (root / ADAPTER).is_file():
        return None
    config = read_json(root / ADAPTER)
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    named = f"a {kind} adapter" if isinstance(kind, str) else "an adapter"
    of = f" of {base}" if isinstance(base, str) and base else ""
    return CheckpointError(
        f"{root} is {named}{of}, not a model",
        hint=f"merge it into its base model: {_MERGE.format(path=root)}",
    )


def _is_gguf(file: Path) -> bool:
    if file.suffix == ".gguf":
        return True
    try:
        with file.open("rb") as stream:
            return stream.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC
    except OSError:
        return False


def _no_weights(root: Path) -> CheckpointError:
    def first(*patterns: str) -> str | None:
        return next((file.name for pattern in patterns for file in sorted(root.glob(pattern))), None)

    if adapter := _adapter_of(root):
        return adapter
    if pickled := first("pytorch_model*.bin", "*.bin", "*.pth", "*.pt"):
        convert = _CONVERT.format(auto="AutoModelForCausalLM", path=root, suffix="safetensors")
        return CheckpointError(
            f"{root} has only pickled weights ({pickled}), which llmc never loads",
            hint=f"convert them, if you trust their source: {convert}",
        )
    if stray := first("*.safetensors"):
        return CheckpointError(
            f"{root} has {stray}, but neither {WEIGHTS} nor {INDEX}",
            hint=f"download the missing {INDEX}, or rename a single file to {WEIGHTS}",
        )
    if gguf := first("*.gguf"):
        return CheckpointError(f"{root} has only GGUF weights ({gguf})", hint=_NO_GGUF)
    return CheckpointError(f"{root} has no weights ({WEIGHTS} or {INDEX})", hint="is the download complete?")
