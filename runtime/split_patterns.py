"""The regular expressions by which published tokenizers split a text. They take linear time.

A tokenizer with another expression works too. It encodes in a separate process (`text_encoder.py`), because
its expression may take exponential time.
"""

from __future__ import annotations

_SUFFIXES = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT4_SUFFIXES = f"(?i:{_SUFFIXES})"
_LINES = r"\s*[\r\n]+"
_SPACES = r"\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""


def _gpt4(digits: str) -> str:
    """Return the pattern of GPT-4's tokenizer, with `digits` as the pattern of a number."""
    return "|".join((_GPT4_SUFFIXES, _LETTERS, digits, _SIGNS, _LINES, _SPACES))


def _cased(digits: str, suffixes: str) -> str:
    """Return the pattern of GPT-4o and later tokenizers, which split a word before its capital letters."""
    words = [
        rf"[^\r\n\p{{L}}\p{{N}}]?{first}{second}{suffixes}"
        for first, second in ((f"{_UPPER}*", f"{_LOWER}+"), (f"{_UPPER}+", f"{_LOWER}*"))
    ]
    return "|".join((*words, digits, r" ?[^\s\p{L}\p{N}]+[\r\n/]*", _LINES, _SPACES))


LINEAR_PATTERNS = frozenset(
    [
        # GPT-2, GPT-NeoX, OPT, Phi-2, StarCoder
        rf"{_SUFFIXES}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}",
        rf"'(?:[sdmt]|ll|ve|re)| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}",
        _gpt4(r"\p{N}{1,3}"),  # Llama 3, OLMo 2, SmolLM 3, GLM 4
        _gpt4(r"\p{N}"),  # Qwen 2, Qwen 3, StableLM 2
        _gpt4(r"\p{N}+"),
        # Qwen 3.5
        rf"{_GPT4_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}|{_SPACES}",
        _cased(r"\p{N}{1,3}", f"{_GPT4_SUFFIXES}?"),  # gpt-oss, Phi-4-mini, Llama 4
        _cased(r"\p{N}", ""),  # Mistral's tekken
        # DeepSeek V3 and R1
        rf"{_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}|{_SPACES}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        r"\p{N}{1,3}",
        r"\p{N}",
        r"\p{N}+",
        r"\d",
        r"\d{1,3}",
        r"[0-9]",
        r"[0-9][0-9][0-9]",
        # normalizers of SentencePiece models
        " {2,}",
        r"\s+",
        r"\n",
        r"[\n\r\t]",
    ]
)
