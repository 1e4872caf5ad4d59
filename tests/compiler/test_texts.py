"""Texts as windows of token ids: special tokens, vocabularies, and invalid files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from llmc.compiler.calibrate.source import default_text
from llmc.compiler.texts import CALIBRATION_TOKENS, calibration_windows, read_text
from llmc.runtime.errors import CheckpointError, RequestError

TALES = Path(__file__).parents[2] / "model_zoo/llama/tales/tokenizer.json"


def test_default_text() -> None:
    text = default_text()
    assert 2500 < len(text.split()) < 4000
    assert {"FOX", "DUKE:", "def", "litres"} <= set(text.split())  # tale, verse, code, figures
    assert sum(map(len, calibration_windows(text, TALES, 4096, 1024))) > CALIBRATION_TOKENS - 256
    windows = calibration_windows(text, TALES, 4096, 1024, max_tokens=8192)
    encoder = Tokenizer.from_file(str(TALES))
    assert encoder.decode([token for ids in windows for token in ids]) == text  # all of it, in order


def test_windows_begin_like_prompts(checkpoint: Callable[[str], Path]) -> None:
    tokenizer = checkpoint("llama-tiny") / "tokenizer.json"  # it puts 256 first
    windows = calibration_windows("the king and the queen " * 400, tokenizer, 320, 100, max_tokens=450)
    assert [len(ids) for ids in windows[:-1]] == [100, 100, 100, 100]
    assert 1 < len(windows[-1]) <= 50
    assert all(ids.count(256) == 1 and ids[0] == 256 for ids in windows)
    encoder = Tokenizer.from_file(str(tokenizer))
    expected = encoder.encode("the king and the queen " * 400, add_special_tokens=False).ids
    cut = [expected[first : first + 99] for first in range(0, len(expected), 99)]
    places = [cut.index(ids[1:]) for ids in windows[:-1]]
    assert places == sorted(places)


def test_windows_are_sampled_from_the_whole_text(checkpoint: Callable[[str], Path]) -> None:
    tokenizer = checkpoint("llama-tiny") / "tokenizer.json"  # it puts 256 first
    parts = [f"{letter} " * 10_000 for letter in "abcd"]
    windows = calibration_windows("".join(parts), tokenizer, 320, 1024)
    assert len(windows) == 16
    assert CALIBRATION_TOKENS - 256 < sum(map(len, windows)) <= CALIBRATION_TOKENS
    assert all(ids[0] == 256 for ids in windows)
    encoder = Tokenizer.from_file(str(tokenizer))
    assert [encoder.decode(ids).split()[1] for ids in windows[::4]] == ["a", "b", "c", "d"]


def test_tokenizer_truncation_and_padding_are_ignored(tmp_path: Path) -> None:
    encoder = Tokenizer.from_file(str(TALES))
    encoder.enable_truncation(16)
    encoder.enable_padding(length=100_000)
    encoder.save(str(tmp_path / "tokenizer.json"))
    text = default_text()
    assert calibration_windows(text, tmp_path / "tokenizer.json", 4096, 1024) == calibration_windows(
        text, TALES, 4096, 1024
    )


def test_no_window_is_longer_than_the_context_or_256(checkpoint: Callable[[str], Path]) -> None:
    tokenizer = checkpoint("qwen3-tiny") / "tokenizer.json"
    assert max(map(len, calibration_windows(default_text(), tokenizer, 320, 4096))) == 256
    assert max(map(len, calibration_windows(default_text(), tokenizer, 320, 7))) == 7
    tokens = sum(map(len, calibration_windows(default_text(), tokenizer, 320, 4096)))
    assert CALIBRATION_TOKENS - 256 < tokens <= CALIBRATION_TOKENS


def test_ids_beyond_the_vocabulary_are_dropped() -> None:
    windows = calibration_windows(default_text(), TALES, 300, 1024)
    assert windows
    assert max(token for ids in windows for token in ids) < 300
    with pytest.raises(CheckpointError, match="no token of the calibration text"):
        calibration_windows("Z", TALES, 5, 1024)


def test_ids_without_a_tokenizer_are_random_and_repeatable() -> None:
    windows = calibration_windows("", None, 1000, 64)
    assert windows == calibration_windows("other", None, 1000, 64)
    assert {len(ids) for ids in windows} == {64}
    ids = [token for window in windows for token in window]
    assert len(ids) == CALIBRATION_TOKENS
    assert 0 <= min(ids) < 20 < 980 < max(ids) < 1000


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        (b"", "has no text", "plain text"),
        (b" \n\t\n", "has no text", "plain text"),
        (b"caf\xe9", "is not UTF-8: unexpected end of data at byte 3", "iconv -f ENCODING"),
        (None, "cannot read", "check the path"),
    ],
)
def test_non_text_files_are_refused(tmp_path: Path, content: bytes | None, message: str, hint: str) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RequestError, match=message) as raised:
        read_text(file)
    assert hint in raised.value.hint


def test_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\n")
    assert read_text(tmp_path / "text.txt") == "caf\u00e9\n"


def test_damaged_tokenizer_names_its_path(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be used"):
        calibration_windows("a text", file, 100, 64)
