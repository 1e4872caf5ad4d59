"""Encode texts with a tokenizer that may be hostile or broken.

The Rust library raises a plain Exception for errors, and for its bugs PanicException, which derives from
BaseException. Both become ValueError here. Texts that could take unbounded time or memory are encoded in a
`Worker`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from llmc.runtime.errors import RequestError
from llmc.runtime.split_patterns import LINEAR_PATTERNS
from llmc.runtime.worker import Worker, WorkerError, describe

_CHARACTERS_A_SECOND = 100_000  # a tenth of a tokenizer's speed
_MAX_GROWTH = 64  # a normalizer may make a text this many times as long
_MAX_ADDED = 32  # special tokens around a text, and characters that a normalizer puts before it
_STDERR = threading.Lock()
_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "Strip", "StripAccents", "Precompiled")
_SIMPLE = frozenset(
    (
        *_NORMALIZERS,
        *("BertNormalizer", "Sequence", "Prepend", "Replace", "ByteLevel", "Metaspace", "Split", "Digits"),
        *("Punctuation", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts"),
        *("CharDelimiterSplit", "BertProcessing", "RobertaProcessing", "TemplateProcessing"),
    )
)


@dataclass(frozen=True)
class Encoded:
    """The tokens of a text."""

    #: The token ids.
    ids: list[int]
    #: For each token 1 if the tokenizer added it, such as BOS, else 0.
    special: list[int]


class TextEncoder:
    """Encodes texts without truncation and padding, as transformers does."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        # Truncation and padding are leftovers of training; transformers does not apply them either.
        backend.no_truncation()
        backend.no_padding()

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoded:
        """Return the tokens of `text`. Raises RequestError if the tokenizer cannot encode it."""
        if (place := _surrogate(text)) is not None:
            raise RequestError(f"character {place} of the text is no character: {text[place]!r}", "remove it")
        try:
            if self._worker is None:
                with errors_as_values():
                    encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
                return Encoded(encoding.ids, encoding.special_tokens_mask)
            seconds = len(text) // _CHARACTERS_A_SECOND
            reply = self._worker.call(seconds, encode=text, special=add_special_tokens)
            return Encoded(reply["ids"], reply["special"])
        except WorkerError as error:
            limit = error.kind == "limit"
            hint = "its regular expressions may be at fault; give a shorter text" if limit else _OTHER_TEXT
            raise RequestError(f"the tokenizer cannot encode this text: {error}", hint) from error
        except ValueError as error:
            raise RequestError(f"the tokenizer cannot encode this text: {error}", _OTHER_TEXT) from error

    @cached_property
    def _worker(self) -> Worker | None:
        """The process that encodes; None: this process does."""
        if is_bounded(self.backend):
            return None
        return Worker(self.backend.to_str(), self.backend.encode_special_tokens)


def _surrogate(text: str) -> int | None:
    """Return the index of the first lone surrogate, which is not a character, or None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


_OTHER_TEXT = "the model's tokenizer is at fault; try another text, or prompt with token ids"


def read_tokenizer(file: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json. Raises ValueError, with one line, if the library cannot."""
    with quiet_stderr(), errors_as_values():
        return tokenizers.Tokenizer.from_file(str(file))


@contextlib.contextmanager
def errors_as_values() -> Iterator[None]:
    """Turn the exceptions of the Rust library into ValueError with a message of one line."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(describe(error)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library fails: {describe(error)}") from error


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Drop this process's output on stderr. The Rust library prints a panic there and also raises it."""
    with _STDERR:
        try:
            kept = os.dup(2)
        except OSError:  # there is no stderr
            yield
            return
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def quiet_decoder(backend: tokenizers.Tokenizer) -> Callable[[], AbstractContextManager[None]]:
    """Return `quiet_stderr` for a decoder that makes the library panic on some texts, else a no-op."""
    state = b"" if backend.decoder is None else backend.decoder.__getstate__()
    return quiet_stderr if re.search(b'"Regex"|"stop":[1-9]', state) else contextlib.nullcontext


def is_bounded(backend: tokenizers.Tokenizer) -> bool:
    """Return whether encoding takes time and memory in proportion to the length of any text."""
    try:
        normalizer, pre_tokenizer = _state(backend.normalizer), _state(backend.pre_tokenizer)
        steps = [*_steps(normalizer), *_steps(pre_tokenizer), *_steps(_state(backend.post_processor))]
        growth = math.prod(map(_growth, _steps(normalizer)))
        return growth <= _MAX_GROWTH and _is_plain(backend.model) and all(map(_is_simple, steps))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return False  # a component of a newer version of the library


def _state(component: Any) -> Any:
    return None if component is None else json.loads(component.__getstate__())


def _steps(state: Any) -> Iterator[dict[str, Any]]:
    """Yield the components that a component is made of."""
    if state is None:
        return
    yield state
    for name in ("normalizers", "pretokenizers", "processors"):
        for part in state.get(name, ()):
            yield from _steps(part)


def _is_simple(step: dict[str, Any]) -> bool:
    if step["type"] not in _SIMPLE:
        return False
    pattern = step.get("pattern")
    if isinstance(pattern, dict) and not (pattern.get("String") or pattern.get("Regex") in LINEAR_PATTERNS):
        return False
    if step["type"] == "TemplateProcessing":
        named = [part["SpecialToken"]["id"] for part in step["single"] if "SpecialToken" in part]
        return len(step["single"]) <= _MAX_ADDED and all(name in step["special_tokens"] for name in named)
    return len(step.get("prepend", "")) <= _MAX_ADDED


def _growth(step: dict[str, Any]) -> float:
    """Return how many times longer a normalizer can make a text."""
    if step["type"] != "Replace":
        return 1
    return max(1.0, len(step["content"]) / max(1, len(step["pattern"].get("String", " "))))


def _is_plain(model: Any) -> bool:
    """Return whether a model has no option that the library fails with."""
    if getattr(model, "continuing_subword_prefix", None) and type(model).__name__ == "BPE":
        return False
    return getattr(model, "max_input_chars_per_word", 0) <= 1000
