"""The text that calibration runs on, as sequences of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from llmc.runtime.errors import CheckpointError, RequestError

MAX_TOKENS = 8192  # in all
WINDOW = 256  # tokens of a sequence
_ANOTHER = "give a UTF-8 text of some thousand words, like those that the model will meet"


def read_text(path: Path | None = None) -> str:
    """The text in the file `path`, or the one that comes with llmc.

    Raises RequestError for a file that cannot be read, is not UTF-8, or holds nothing.
    """
    if path is None:
        files = resources.files("llmc.compiler.calibrate").joinpath("text").iterdir()
        texts = [file.read_text(encoding="utf-8") for file in sorted(files, key=lambda file: file.name)]
        return "\n\n".join(text.strip() for text in texts) + "\n"
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RequestError(
            f"the calibration text {path} cannot be read: {error.strerror or error}", _ANOTHER
        ) from error
    except UnicodeDecodeError as error:
        raise RequestError(
            f"the calibration text {path} is not UTF-8 (byte {error.start})", _ANOTHER
        ) from error
    if not text.strip():
        raise RequestError(f"the calibration text {path} is empty", _ANOTHER)
    return text


def sequences(
    text: str,
    tokenizer: Path | None,
    vocab_size: int,
    max_seq_len: int,
    max_tokens: int = MAX_TOKENS,
    all_parts: bool = False,
) -> list[list[int]]:
    """`text` in consecutive windows of at most WINDOW and `max_seq_len` tokens, `max_tokens` in all.

    Of a longer text the first ones, or with `all_parts` as many from all parts of it. Each window begins with
    the special tokens that the tokenizer puts before a text, as every prompt does.
    Ids that the model has no embedding for are left out. `tokenizer` is the checkpoint's tokenizer.json;
    without one the ids are random, the same ones each time.
    Raises CheckpointError when the tokenizer cannot be read, or no token of the text is the model's.
    """
    width = min(WINDOW, max_seq_len)
    if tokenizer is None:
        ids = np.random.default_rng(0).integers(0, vocab_size, max_tokens).tolist()
        return _windows(ids, [], width, max_tokens)
    from tokenizers import Tokenizer

    try:
        encoder = Tokenizer.from_file(str(tokenizer))
        encoder.no_truncation()
        encoder.no_padding()
        encoding = encoder.encode(text)
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(
            f"{tokenizer} cannot be used: {str(error).splitlines()[0]}",
            "the file is damaged or of a newer version; download it again",
        ) from error
    special = encoding.special_tokens_mask
    first = special.index(0) if 0 in special else len(special)
    prefix = [token for token in encoding.ids[:first] if token < vocab_size]
    body = [token for token, added in zip(encoding.ids, special, strict=True) if not added]
    body = [token for token in body if token < vocab_size]
    if not body:
        raise CheckpointError(
            f"{tokenizer} makes no token of the calibration text that is below the vocabulary's {vocab_size}",
            "is it this model's tokenizer?",
        )
    return _windows(body, prefix[: width - 1], width, max_tokens, all_parts)


def spread(windows: Sequence[list[int]], most: int) -> list[list[int]]:
    """All `windows`, or `most` of them at equal distances, from the first to the last."""
    chosen = np.linspace(0, len(windows) - 1, min(most, len(windows))).round().astype(int)
    return [windows[index] for index in chosen]


def _windows(
    ids: list[int], prefix: list[int], width: int, max_tokens: int, all_parts: bool = False
) -> list[list[int]]:
    step = width - len(prefix)
    windows = [prefix + ids[first : first + step] for first in range(0, len(ids), step)]
    if all_parts:
        windows = spread(windows, -(-max_tokens // width))
    kept, left = [], max_tokens
    for window in windows:
        kept.append(window[:left])
        left -= len(kept[-1])
        if left <= len(prefix):
            break
    return kept
