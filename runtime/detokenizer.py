"""Incremental detokenization: text while tokens are being generated.

A token is bytes, not text. A character may span several tokens, and a stop string several characters. Text
that may still change is held back until a later token or the end.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import tokenizers

from llmc.runtime.text_encoder import errors_as_values, quiet_decoder


class TokenBytes:
    """The UTF-8 bytes of each token of a vocabulary, in one table for all requests.

    The tokenizer's decoder renders each token once, after a letter or at the start of a text (where
    SentencePiece drops a space). Only tokens that are not valid UTF-8 are parsed: byte-fallback tokens
    such as <0xE2>, and byte-level BPE pieces. A token that the decoder fails on is U+FFFD.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._quiet = quiet_decoder(tokenizer)
        self._byte_level = self._render(["Ġ"]) == " "
        self._table: dict[tuple[int, bool], bytes] = {}
        self._gaps: dict[int, bytes] = {}

    def __call__(self, token_id: int, at_start: bool) -> bytes:
        """Return the bytes of a token. Special tokens and unknown ids have none."""
        data = self._table.get((token_id, at_start))
        if data is None:
            data = self._table[token_id, at_start] = self._look_up(token_id, at_start)
        return data

    def gap(self, token_id: int) -> bytes:
        """Return the bytes that stand between a token and the next one, if there is a next one.

        For example, a token whose suffix ends a word, such as "time</w>", is followed by a space.
        """
        data = self._gaps.get(token_id)
        if data is None:
            data = self._gaps[token_id] = self._look_up_gap(token_id)
        return data

    def _look_up_gap(self, token_id: int) -> bytes:
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None or token_id in self.special:
            return b""
        alone, followed = self._render(["a", piece]), self._render(["a", piece, "b"])
        following = self._render(["a", "b"]).removeprefix("a")
        if not followed.startswith(alone) or not followed.endswith(following):
            return b""
        return followed[len(alone) : len(followed) - len(following)].encode()

    def _look_up(self, token_id: int, at_start: bool) -> bytes:
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None or token_id in self.special:
            return b""
        text = self._render([piece]) if at_start else self._render(["a", piece]).removeprefix("a")
        if "\ufffd" not in text:
            return text.encode()
        if self._byte_level and all(char in _BYTE_OF_CHAR for char in piece):
            return bytes(_BYTE_OF_CHAR[char] for char in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return text.encode()

    def _render(self, pieces: list[str]) -> str:
        decoder = self._tokenizer.decoder
        if decoder is None:
            return " ".join(pieces)
        try:
            with self._quiet(), errors_as_values():
                return decoder.decode(pieces)
        except ValueError:
            return "\ufffd"


class Detokenizer:
    """The text of one output, built token by token. Each token takes constant time.

    previous: the last token of the prompt. The output continues the prompt's text, so its first word keeps
    its leading space. After a special token (a chat template ends with one), or without a prompt, the output
    is a separate text and starts as in the tokenizer's `decode`.
    """

    def __init__(self, token_bytes: TokenBytes, previous: int | None = None) -> None:
        self._token_bytes = token_bytes
        self._at_start = previous is None or previous in token_bytes.special
        self._gap = b"" if previous is None else token_bytes.gap(previous)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Return the characters that `token_id` completes. Bytes of an incomplete character are held back."""
        data = self._token_bytes(token_id, self._at_start)
        if token_id not in self._token_bytes.special:
            data = self._gap + data
            self._gap = self._token_bytes.gap(token_id)
            self._at_start = False
        return self._utf8.decode(data)

    def finish(self) -> str:
        """Return the bytes held back as U+FFFD, because they stay incomplete."""
        return self._utf8.decode(b"", final=True)


class StopChecker:
    """Cut a text before the first of the `stop` strings.

    The first stop string is the one that is complete first, so the result does not depend on how the text is
    split. Text that may be the beginning of a stop string is held back.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stopped = False
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""

    def push(self, text: str) -> str:
        """Return the text that can no longer change and was not returned before."""
        if not self._stop or self.stopped:
            return "" if self.stopped else text
        text = self._held + text
        matches = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if matches:
            self.stopped, self._held = True, ""
            return text[: min(matches)[1]]
        keep = min(self._longest - 1, len(text))
        while keep and not any(stop.startswith(text[len(text) - keep :]) for stop in self._stop):
            keep -= 1
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return the text held back. It cannot become a stop string, because the text ends here."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """A request's output text: detokenizer, then stop strings."""

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._checker = StopChecker(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found, so that the text has ended."""
        return self._checker.stopped

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes."""
        return self._checker.push(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """Return all text that was held back."""
        return self._checker.push(self._detokenizer.finish()) + self._checker.finish()


def _byte_level_alphabet() -> dict[str, int]:
    """Return the map from the characters of byte-level BPE (GPT-2) to bytes.

    Printable Latin-1 characters stand for themselves, U+0100, U+0101, ... for the other 68 bytes in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return alphabet


_BYTE_OF_CHAR = _byte_level_alphabet()
