"""The text that losses are measured on, and how a text becomes windows of tokens."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from llmc.compiler.calibrate.sequences import spread
from llmc.runtime.errors import RequestError

EVALUATION_TEXT = Path(__file__).with_name("evaluation.txt")
WINDOW = 256  # tokens: long enough for sentences to depend on each other, short enough for every model
MAX_WINDOWS = 6  # of our own text
MAX_WINDOWS_OF_FILE = 64  # 16,384 tokens


def read_text(path: Path) -> str:
    """A text file. Raises RequestError unless it is UTF-8 and says something."""
    try:
        text = path.read_bytes().decode()
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
    return hashlib.sha256(text.encode()).hexdigest()


def windows_of(
    text: str, tokenizer: Path, vocab_size: int, max_seq_len: int, most: int = MAX_WINDOWS
) -> list[list[int]]:
    """`text` in windows of at most WINDOW tokens, each begun as the tokenizer begins a prompt.

    Of a text of more than `most` windows, as many from all parts of it. The last may be shorter.
    Raises RequestError for a text of fewer than two tokens.
    """
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer))
    encoder.no_truncation()
    encoder.no_padding()
    plain = encoder.encode(text, add_special_tokens=False).ids
    whole = encoder.encode("a").ids
    core = encoder.encode("a", add_special_tokens=False).ids
    begin = next((whole[:at] for at in range(len(whole)) if whole[at : at + len(core)] == core), [])
    tokens = [token for token in plain if token < vocab_size]
    size = min(WINDOW, max_seq_len) - len(begin)
    cut = [begin + tokens[start : start + size] for start in range(0, len(tokens), max(1, size))]
    windows = [window for window in cut if len(window) >= 2]
    if size < 1 or not windows:
        raise RequestError(f"the text has too few tokens: {len(tokens)}", "give a longer one")
    return spread(windows, most)


def random_windows(vocab_size: int, max_seq_len: int) -> list[list[int]]:
    """As many tokens without meaning, for a model without a tokenizer."""
    rng = np.random.default_rng(0)
    return rng.integers(0, vocab_size, (MAX_WINDOWS, min(WINDOW, max_seq_len))).tolist()
