"""A Hugging Face checkpoint directory, opened without loading it and without torch.

    config.json                    required, with a `model_type`
    model.safetensors              the weights, or
    model.safetensors.index.json   {"weight_map": {tensor: shard file}} and the shards it names
    generation_config.json         optional; its BOS id comes before that of config.json
    tokenizer.json, ...            optional here: see `Checkpoint.require_tokenizer`

Layout: https://huggingface.co/docs/transformers/main/en/main_classes/model (save_pretrained).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.compiler.checkpoint.safetensors import LFS_MARK, TensorRef, read_header, refuse_lfs_pointer
from llmc.runtime.dtypes import DTYPES, FLOATS
from llmc.runtime.errors import CheckpointError

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
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
_BLOCK = 1 << 24
_CONVERT = (
    'python -c "from transformers import {auto} as A; '
    "A.from_pretrained('{path}').save_pretrained('{path}-{suffix}')\""
)


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint directory. `open` checks everything but the tensors' values."""

    path: Path
    config: dict[str, Any]
    #: Empty if there is no generation_config.json.
    generation_config: dict[str, Any]
    #: All tensors, by name.
    tensors: dict[str, TensorRef]
    #: The files of TOKENIZER_FILES that exist.
    tokenizer_files: list[Path]

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        """Open a checkpoint directory.

        Raises CheckpointError, with a hint, for whatever is missing, damaged or contradictory.
        """
        root = Path(path)
        if root.is_file():
            raise CheckpointError(
                f"{root} is a file; a checkpoint is a directory with config.json and safetensors files",
                hint="GGUF files are not supported; use the safetensors checkpoint they were made from"
                if root.suffix == ".gguf"
                else f"give its directory: {root.parent}",
            )
        if not root.is_dir():
            raise CheckpointError(
                f"there is no directory {root}",
                hint="check the path; a checkpoint is a directory with config.json and safetensors files",
            )
        config = read_json(root / CONFIG) if (root / CONFIG).is_file() else None
        if config is None:
            raise CheckpointError(f"{root} has no {CONFIG}", hint="is this the checkpoint's directory?")
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
        return cls(
            path=root,
            config=config,
            generation_config=read_json(generation) if generation.is_file() else {},
            tensors=_read_tensors(root),
            tokenizer_files=files,
        )

    @property
    def model_type(self) -> str:
        return self.config["model_type"]

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
        """The ids that end a generation by any file but those of the tokenizer. May be empty."""
        return tuple(dict.fromkeys(token for ids in self.eos_by_file.values() for token in ids))

    @property
    def eos_by_file(self) -> dict[str, tuple[int, ...]]:
        """File -> the ids that end a generation by it: generation_config.json, then config.json.

        Files that say nothing are left out. Raises CheckpointError for what is no token id.
        """
        configs = (("generation_config.json", self.generation_config), (CONFIG, self.config))
        found = {file: self._token_ids(file, source, "eos_token_id") for file, source in configs}
        found[CONFIG] += self._token_ids(CONFIG, self._text_config, "eos_token_id")
        return {file: tuple(dict.fromkeys(ids)) for file, ids in found.items() if ids}

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a text, by generation_config.json or else config.json."""
        configs = (self.generation_config, self.config, self._text_config)
        ids = [one for source in configs for one in self._token_ids(CONFIG, source, "bos_token_id")[:1]]
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

    @property
    def _text_config(self) -> dict[str, Any]:
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else {}

    @property
    def dtype(self) -> str:
        """The dtype in config.json, else that of most bytes, by torch's name ("bfloat16")."""
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
        files = {self.path / CONFIG, *self.tokenizer_files, *(ref.file for ref in self.tensors.values())}
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
    """Return the JSON object in a file of a checkpoint. Raises CheckpointError."""
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


def _read_tensors(root: Path) -> dict[str, TensorRef]:
    if (root / WEIGHTS).is_file():
        tensors = read_header(root / WEIGHTS)
        if not tensors:
            raise CheckpointError(f"{root / WEIGHTS} holds no tensors", hint="write the checkpoint again")
        return tensors
    if not (root / INDEX).is_file():
        raise _no_weights(root)
    index = root / INDEX
    weight_map = read_json(index).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict) or not all(map(_is_name, weight_map.values())):
        raise CheckpointError(
            f"{index} has no weight_map from tensors to files beside it",
            hint="the file is damaged; download it again",
        )
    tensors = {}
    for shard in sorted(set(weight_map.values())):
        if not (root / shard).is_file():
            raise CheckpointError(
                f"{root} lacks {shard}, which {INDEX} names", hint="the download is incomplete; resume it"
            )
        found = read_header(root / shard)
        listed = {name for name, file in weight_map.items() if file == shard}
        if odd := sorted(listed ^ found.keys()):
            fact = "lacks" if odd[0] in listed else "holds"
            raise CheckpointError(
                f"{root / shard} {fact} {odd[0]!r}, contrary to {INDEX}; tensors that differ: {len(odd)}",
                hint="index and shards are of different versions; download both again",
            )
        tensors |= found
    return tensors


def _is_name(shard: Any) -> bool:
    """Return whether `shard` names a file in the same directory."""
    return isinstance(shard, str) and Path(shard).name == shard != ".." and "\\" not in shard


def _no_weights(root: Path) -> CheckpointError:
    def first(*patterns: str) -> str | None:
        return next((file.name for pattern in patterns for file in sorted(root.glob(pattern))), None)

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
    return CheckpointError(f"{root} has no weights ({WEIGHTS} or {INDEX})", hint="is the download complete?")
