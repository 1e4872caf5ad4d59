"""Turn a text into windows of token ids for calibration, verification and `llmc verify --text`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmc.runtime.errors import CheckpointError, RequestError
from llmc.runtime.text_encoder import TextEncoder, read_tokenizer

EVALUATION_TEXT = Path(__file__).with_name("evaluation.txt")
WINDOW = 256  # tokens: long enough for sentences to depend on each other, short enough for every model
MAX_WINDOWS = 6  # that a build evaluates
MAX_WINDOWS_OF_FILE = 64  # of the file given with `llmc verify --text`: 16,384 tokens
CALIBRATION_TOKENS = 4096


def read_text(path: Path) -> str:
    """Read a text file, without a byte order mark.

    Raises RequestError if the file cannot be read, is not UTF-8, or has nothing but white space.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror or error}", "check the path") from error
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path} is not UTF-8: {error.reason} at byte {error.start}",
            f"convert it: iconv -f ENCODING -t UTF-8 {path}",
        ) from error
    if not text.strip():
        raise RequestError(f"{path} has no text", "give a file of plain text")
    return text


def sha256(text: str) -> str:
    """Return the SHA-256 of `text` in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


class Encoder:
    """Encodes whole texts with a tokenizer.json, without truncation and padding.

    Raises CheckpointError if the file cannot be used.
    """

    def __init__(self, file: Path, vocab_size: int) -> None:
        self._file, self._vocab_size = file, vocab_size
        try:
            self._encoder = TextEncoder(read_tokenizer(file))
        except ValueError as error:
            raise self._unusable(str(error)) from error

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Return the special tokens that begin every prompt (usually BOS), and the tokens of `text`.

        Ids from `vocab_size` on are left out: the model has no embedding for them.
        """
        try:
            encoding = self._encoder.encode(text)
        except RequestError as error:
            raise self._unusable(error.message) from error
        added = encoding.special
        first = added.index(0) if 0 in added else len(added)
        body = [token for token, special in zip(encoding.ids, added, strict=True) if not special]
        return self._known(encoding.ids[:first]), self._known(body)

    def _known(self, ids: list[int]) -> list[int]:
        return [token for token in ids if token < self._vocab_size]

    def _unusable(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self._file} cannot be used: {reason}",
            "the file is damaged or of a newer version; download it again",
        )


def windows(prefix: Sequence[int], body: Sequence[int], max_seq_len: int) -> list[list[int]]:
    """Cut `body` into consecutive windows that begin with `prefix`.

    A window has at most WINDOW and at most `max_seq_len` ids, `prefix` included.
    """
    width = min(WINDOW, max_seq_len)
    start = list(prefix[: width - 1])
    step = width - len(start)
    return [start + list(body[first : first + step]) for first in range(0, len(body), step)]


def spread(windows: Sequence[list[int]], most: int) -> list[list[int]]:
    """Return at most `most` of `windows`, evenly spaced from the first to the last."""
    chosen = np.linspace(0, len(windows) - 1, min(most, len(windows))).round().astype(int)
    return [windows[index] for index in chosen]


def windows_of(
    text: str, tokenizer: Path, vocab_size: int, max_seq_len: int, most: int = MAX_WINDOWS
) -> list[list[int]]:
    """Return at most `most` windows of token ids for an evaluation, taken from all parts of `text`.

    Windows with fewer than two tokens are left out: nothing can be predicted in them.
    Raises RequestError if no window is left, CheckpointError if the tokenizer cannot be used.
    """
    prefix, body = Encoder(tokenizer, vocab_size).encode(text)
    long_enough = [window for window in windows(prefix, body, max_seq_len) if len(window) >= 2]
    if not long_enough:
        raise RequestError(f"the text has too few tokens: {len(body)}", "give a longer one")
    return spread(long_enough, most)


def calibration_windows(
    text: str,
    tokenizer: Path | None,
    vocab_size: int,
    max_seq_len: int,
    max_tokens: int = CALIBRATION_TOKENS,
) -> list[list[int]]:
    """Return windows of token ids for calibration, with at most `max_tokens` tokens in total.

    The windows are from all parts of the text.

    tokenizer: the checkpoint's tokenizer.json; without one the ids are random, but the same each time

    Raises CheckpointError if the tokenizer cannot be used, or has no token of `text` below `vocab_size`.
    """
    if tokenizer is None:
        return random_windows(vocab_size, max_seq_len, max_tokens)
    prefix, body = Encoder(tokenizer, vocab_size).encode(text)
    if not body:
        raise CheckpointError(
            f"{tokenizer} gives no token of the calibration text an id below the vocabulary's {vocab_size}",
            "is it this model's tokenizer?",
        )
    all_windows = windows(prefix, body, max_seq_len)
    max_windows = -(-max_tokens // min(WINDOW, max_seq_len))
    chosen, remaining = [], max_tokens
    for window in spread(all_windows, max_windows):
        if remaining <= len(prefix):  # nothing of the text would follow the prefix
            break
        chosen.append(window[:remaining])
        remaining -= len(chosen[-1])
    return chosen


def random_windows(vocab_size: int, max_seq_len: int, tokens: int | None = None) -> list[list[int]]:
    """Return windows of random ids, the same each time, for a model without a tokenizer.

    tokens: the total number of tokens; by default MAX_WINDOWS full windows
    """
    count = MAX_WINDOWS * min(WINDOW, max_seq_len) if tokens is None else tokens
    ids = np.random.default_rng(0).integers(0, vocab_size, count).tolist()
    return windows([], ids, max_seq_len)
