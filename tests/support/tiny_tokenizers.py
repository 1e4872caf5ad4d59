"""Tokenizers of at most a few hundred tokens, one of each kind that checkpoints have."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIAL = ("<unk>", "<s>", "</s>")
_WORDS = ("the", "he", "hello", "to", "a", "in")
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(split: str = "") -> Tokenizer:
    """Byte-level BPE as in GPT-2; with `split` as in Llama 3 and Qwen."""
    vocab = {
        text: number for number, text in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("h", "e"), ("he", "l")]
    vocab |= {left + right: len(vocab) + place for place, (left, right) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), bytes_only])
        if split
        else bytes_only
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _with_special(tokenizer)


def gpt4() -> Tokenizer:
    return byte_level(_GPT4)


def sentencepiece_bpe(prepend: bool = True) -> Tokenizer:
    """Llama 2 (with a space before the text) or Gemma (without)."""
    vocab = {text: number for number, text in enumerate(SPECIAL)}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "h"), ("▁h", "e")]
    for text in (*"▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,", *map("".join, merges)):
        vocab.setdefault(text, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prepend else space
    strip = [decoders.Strip(" ", 1, 0)] if prepend else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return _with_special(tokenizer)


def gemma() -> Tokenizer:
    return sentencepiece_bpe(prepend=False)


def unigram() -> Tokenizer:
    """T5 and XGLM."""
    letters = [(char, -6.0) for char in "▁abcdefghijklmnopqrstuvwxyz.,'"]
    scores = [*((text, 0.0) for text in SPECIAL), *letters, *((f"▁{word}", -3.0) for word in _WORDS)]
    tokenizer = Tokenizer(models.Unigram(scores, 0, False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _with_special(tokenizer)


def word_piece() -> Tokenizer:
    """BERT: lower case, and suffixes that begin with ##."""
    pieces = [
        *SPECIAL,
        *"abcdefghijklmnopqrstuvwxyz.,",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
        *_WORDS,
    ]
    vocab: dict[str, int] = {}
    for piece in pieces:
        vocab.setdefault(piece, len(vocab))
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _with_special(tokenizer)


def word_suffix() -> Tokenizer:
    """GPT-1 and XLM: the last piece of a word carries a suffix."""
    letters = "abcdefghijklmnopqrstuvwxyz.,"
    pieces = [*SPECIAL, *letters, *(f"{char}</w>" for char in letters), "he</w>", "the</w>"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = [("h", "e</w>"), ("t", "he</w>")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return _with_special(tokenizer)


def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    """Have the tokenizer put <s> before a text."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    one.__name__: one
    for one in (byte_level, gpt4, sentencepiece_bpe, gemma, unigram, word_piece, word_suffix)
}


def _with_special(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return tokenizer
