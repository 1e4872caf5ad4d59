"""Convert a SentencePiece model, or a tiktoken file, to a tokenizer.json, in a process of its own.

transformers converts it. Some of its classes then encode a text in another way than the model does: they
leave out the space before a text, or the model's normalization. So the result is compared with SentencePiece
itself, and corrected where it differs.

SentencePiece reads the file in C++, and the conversion takes quadratic time for a long piece. The file may be
hostile, so the process has limits.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmc.compiler.child_process import Messages, serve
from llmc.runtime.errors import CheckpointError
from llmc.runtime.text_encoder import TextEncoder, describe, errors_as_values, read_tokenizer

SECONDS = 300  # of computing; a vocabulary of 256k pieces takes about 20
MEMORY = 16 << 30  # bytes of addresses
_INSTALL = "pip install {}, or remove the file to build without a tokenizer"
_REMOVE = "remove the file to build without a tokenizer"
_DAMAGED = "the file is damaged; download it again"
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")  # the first line of a tiktoken file
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_UNKNOWN, _USER_DEFINED = 2, 4  # SentencePiece.Type
_SPACE = "\u2581"


def handle(task: dict[str, Any], messages: Messages) -> dict[str, Any]:
    """Carry out `convert` under the limits of this process."""
    _set_limits()
    return convert(task)


def convert(task: dict[str, Any]) -> dict[str, Any]:
    """Save the tokenizer of `stage` to `directory`.

    task: `stage`, a directory with the tokenizer's files and a config.json; `directory`, an empty one;
        `model`, the name of the file to convert; `settings`, the values of tokenizer_config.json; `texts` to
        compare

    Returns `chosen`, the class of transformers; `text`, the first text that it encodes differently from
    SentencePiece, or ""; `left`, the first text that the saved tokenizer encodes differently, or "".

    Raises CheckpointError if the model cannot be read.
    """
    stage, directory, settings = Path(task["stage"]), Path(task["directory"]), task["settings"]
    data = (stage / task["model"]).read_bytes()
    if task["model"] == "tiktoken.model" or _TIKTOKEN.match(data):
        if find_spec("tiktoken") is None:
            raise CheckpointError("a tiktoken file needs the package tiktoken", _INSTALL.format("tiktoken"))
        return {"chosen": _save(stage, directory), "text": "", "left": ""}
    reference = _Reference(data, settings.get("add_prefix_space") is not False)
    chosen = _save(stage, directory)
    file = directory / "tokenizer.json"
    texts = [*task["texts"], *reference.probes()]
    first = reference.differences(file, texts)
    left = first
    if first:
        converted = file.read_text(encoding="utf-8")
        corrected = reference.correct(json.loads(converted), settings)
        file.write_text(json.dumps(corrected, ensure_ascii=False), encoding="utf-8")
        left = reference.differences(file, texts)
        if len(left) >= len(first):
            file.write_text(converted, encoding="utf-8")
            left = first
    return {"chosen": chosen, "text": first[0] if first else "", "left": left[0] if left else ""}


def _save(stage: Path, directory: Path) -> str:
    """Convert the tokenizer with transformers and return the name of the class that it chose."""
    from transformers import AutoTokenizer

    try:
        with errors_as_values():
            tokenizer = AutoTokenizer.from_pretrained(stage, local_files_only=True, trust_remote_code=False)
            tokenizer.save_pretrained(directory)
            if not (directory / "tokenizer.json").is_file():
                raise ValueError(f"{type(tokenizer).__name__} has no tokenizer.json")
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return type(tokenizer).__name__


class _Reference:
    """What SentencePiece itself makes of a text.

    data: the bytes of the model
    prefix: False: no space is put before a text, whatever the model says
    """

    def __init__(self, data: bytes, prefix: bool) -> None:
        try:
            import sentencepiece
            from sentencepiece import sentencepiece_model_pb2
        except ImportError as error:
            message = "a SentencePiece model needs the package sentencepiece"
            raise CheckpointError(f"{message} ({error})", _INSTALL.format("sentencepiece")) from error
        self.proto = sentencepiece_model_pb2.ModelProto()
        try:
            with errors_as_values():
                self.proto.ParseFromString(data)
                self.proto.normalizer_spec.add_dummy_prefix &= prefix
                self._processor = sentencepiece.SentencePieceProcessor(
                    model_proto=self.proto.SerializeToString()
                )
        except ValueError as error:
            raise CheckpointError(f"it is no SentencePiece model: {describe(error)}", _DAMAGED) from error
        if not self.proto.pieces:
            raise CheckpointError("it is no SentencePiece model: it has no pieces", _DAMAGED)
        if self.proto.trainer_spec.model_type not in (_UNIGRAM, _BPE):
            raise CheckpointError("a SentencePiece model of words or characters is not supported", _REMOVE)

    def probes(self) -> list[str]:
        """Return a text with the model's user-defined symbols, if it has any."""
        named = [piece.piece for piece in self.proto.pieces if piece.type == _USER_DEFINED]
        return ["a ".join(["", *named[:100]]).replace(_SPACE, " ")] if named else []

    def differences(self, file: Path, texts: Sequence[str]) -> list[str]:
        """Return the texts that a tokenizer.json encodes or decodes differently."""
        encoder = TextEncoder(read_tokenizer(file))
        return [text for text in texts if self._round_trip(text) != self._round_trip_of(encoder, text)]

    def _round_trip(self, text: str) -> tuple[list[str], str | None]:
        ids = self._processor.encode(text)
        return self._processor.id_to_piece(ids), None if self._unknown(ids) else self._processor.decode(ids)

    def _round_trip_of(self, encoder: TextEncoder, text: str) -> tuple[list[str | None], str | None] | None:
        """Return tokens, not their ids: transformers gives those of some models other numbers."""
        try:
            ids = encoder.encode(text, add_special_tokens=False).ids
            with errors_as_values():
                tokens = [encoder.backend.id_to_token(token) for token in ids]
                unknown = self._unknown(self._processor.encode(text))
                return tokens, None if unknown else encoder.backend.decode(ids, skip_special_tokens=False)
        except ValueError:
            return None

    def _unknown(self, ids: Sequence[int]) -> bool:
        """Return whether a text has characters that the model lacks: their decoding is a matter of taste."""
        return self._processor.unk_id() in ids

    def correct(self, tokenizer: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
        """Return a tokenizer.json with the model and the normalization of SentencePiece.

        tokenizer: the tokenizer.json of transformers, whose added and special tokens are kept
        settings: the values of tokenizer_config.json
        """
        spec, fallback = self.proto.normalizer_spec, self.proto.trainer_spec.byte_fallback
        scheme = (tokenizer["pre_tokenizer"] or {}).get("prepend_scheme")
        # Of a text with special tokens: a space before every part, or before the first one only. Metaspace
        # finds no first part in a text whose spaces were removed.
        every_part = settings.get("legacy") is True or scheme == "always" or spec.remove_extra_whitespaces
        normalizers: list[dict[str, Any]] = []
        if spec.precompiled_charsmap:
            charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
            normalizers.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
        if spec.remove_extra_whitespaces:
            normalizers.append({"type": "Strip", "strip_left": True, "strip_right": True})
            normalizers.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
        if spec.add_dummy_prefix and every_part:
            normalizers.append({"type": "Prepend", "prepend": _SPACE})
        if spec.escape_whitespaces:
            normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
        decoders: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
            *([{"type": "ByteFallback"}] if fallback else []),
            {"type": "Fuse"},
            *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if spec.add_dummy_prefix else []),
        ]
        # Metaspace puts no space before a text that begins with one. No text does at the first of these two.
        steps = [_metaspace(" ", "first"), _metaspace(_SPACE, "never")]
        return {
            **tokenizer,
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}
            if spec.add_dummy_prefix and not every_part
            else None,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": self._model(tokenizer["model"], fallback),
        }

    def _model(self, model: dict[str, Any], fallback: bool) -> dict[str, Any]:
        """Return the model of transformers if it is of the right type, else one made of the pieces."""
        pieces = self.proto.pieces
        unknown = next((number for number, piece in enumerate(pieces) if piece.type == _UNKNOWN), 0)
        if self.proto.trainer_spec.model_type == _UNIGRAM:
            if model["type"] == "Unigram":
                return {**model, "byte_fallback": fallback}
            vocab = [[piece.piece, piece.score] for piece in pieces]
            return {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": fallback}
        if model["type"] == "BPE":
            own: dict[str, Any] = model
        else:
            from transformers.tokenization_utils_base import generate_merges

            vocabulary = {piece.piece: number for number, piece in enumerate(pieces)}
            own = {"vocab": vocabulary, "merges": generate_merges(vocabulary)}
        options = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
        return {
            "type": "BPE", **options, "unk_token": pieces[unknown].piece, "fuse_unk": True,
            "byte_fallback": fallback, "ignore_merges": False, "vocab": own["vocab"], "merges": own["merges"],
        }  # fmt: skip


def _metaspace(replacement: str, scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": replacement, "prepend_scheme": scheme, "split": False}


def _set_limits() -> None:
    if sys.platform == "win32":
        return
    import resource

    for kind, limit in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, MEMORY)):
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        with contextlib.suppress(ValueError, OSError):  # systems without this limit
            resource.setrlimit(kind, (limit, hard))


if __name__ == "__main__":
    serve(handle)
