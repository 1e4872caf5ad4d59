"""Text while it is generated: no half characters, right spaces, an end before the stop string."""

from __future__ import annotations

import sys

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from llmc.runtime.detokenizer import Detokenizer, StopChecker, TextStream, TokenBytes

WORDS = ("the", "time", "once", "upon", "é", "日本")


def byte_level() -> tokenizers.Tokenizer:
    """Like GPT-2, Llama 3, Qwen: bytes as letters, some merged into words, one into half an emoji."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(alphabet)}
    merges = []
    for pair in [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ã", "©"), ("ð", "Ł"), ("Ġ", "a")]:
        merges.append(pair)
        vocab["".join(pair)] = len(vocab)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("two words", special=False)])
    return tokenizer


def sentencepiece(metaspace: bool = False) -> tokenizers.Tokenizer:
    """Like Llama 2, Mistral, Gemma: spaces as U+2581, unknown characters as byte tokens."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehimnopqrtux,."]
    pieces += [char for word in WORDS for char in word]
    merges = []
    for word in WORDS[:4]:
        for end in range(1, len(word)):
            merges.append((word[:end], word[end]))
            pieces.append(word[: end + 1])
        merges.append(("▁", word))
        pieces.append("▁" + word)
    pieces.remove("本")  # so that this one needs bytes
    vocab: dict[str, int] = {}
    for piece in pieces:
        vocab.setdefault(piece, len(vocab))
    model = models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


TOKENIZERS = {"byte-level": byte_level(), "sentencepiece": sentencepiece(), "metaspace": sentencepiece(True)}
TABLES = {name: TokenBytes(tokenizer) for name, tokenizer in TOKENIZERS.items()}
FAMILIES = pytest.mark.parametrize("family", TOKENIZERS)
TEXT = st.text(st.sampled_from("the time once, é日本🙂👨‍👩‍👧\u0301\n xyzß"), min_size=1, max_size=30)


def pieces(family: str, ids: list[int], previous: int | None = None) -> list[str]:
    detokenizer = Detokenizer(TABLES[family], previous)
    return [*map(detokenizer.push, ids), detokenizer.finish()]


@FAMILIES
@given(text=TEXT)
@settings(max_examples=150)
def test_pieces_add_up_to_the_decoded_text_and_hold_no_half_character(family: str, text: str) -> None:
    ids = TOKENIZERS[family].encode(text).ids
    parts = pieces(family, ids)
    assert "".join(parts) == TOKENIZERS[family].decode(ids)
    assert "\ufffd" not in "".join(parts)
    assert parts[-1] == ""


@FAMILIES
@given(prompt=TEXT, text=TEXT)
@settings(max_examples=150)
def test_output_continues_the_prompt_with_its_leading_space(family: str, prompt: str, text: str) -> None:
    tokenizer = TOKENIZERS[family]
    prompt_ids, ids = tokenizer.encode(prompt).ids, tokenizer.encode(text).ids
    expected = tokenizer.decode(prompt_ids + ids).removeprefix(tokenizer.decode(prompt_ids))
    assert "".join(pieces(family, ids, previous=prompt_ids[-1])) == expected


@pytest.mark.parametrize(
    ("after", "expected"),
    [("the", " time"), (None, "time"), ("</s>", "time")],
    ids=["after a word", "at the start", "after a special token"],
)
def test_a_first_word_has_its_space_unless_it_starts_a_text(after: str | None, expected: str) -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    previous = tokenizer.token_to_id(after) if after else None
    assert pieces("sentencepiece", [tokenizer.token_to_id("▁time")], previous)[0] == expected


@pytest.mark.parametrize("family", ["byte-level", "sentencepiece"])
def test_a_character_comes_with_its_last_byte(family: str) -> None:
    ids = TOKENIZERS[family].encode("a🙂").ids
    parts = pieces(family, ids)
    assert parts[-2:] == ["🙂", ""]
    assert "".join(parts[:-2]) == "a"


@pytest.mark.parametrize("family", ["byte-level", "sentencepiece"])
def test_an_unfinished_character_is_flushed_as_a_replacement_at_the_end(family: str) -> None:
    ids = TOKENIZERS[family].encode("a🙂").ids[:-1]
    parts = pieces(family, ids)
    assert parts[-1] == "\ufffd"
    assert "".join(parts[:-1]) == "a"


@given(ids=st.lists(st.integers(0, TOKENIZERS["byte-level"].get_vocab_size() + 3), max_size=30))
@settings(max_examples=300)
def test_arbitrary_bytes_come_out_as_the_library_decodes_them(ids: list[int]) -> None:
    expected = TOKENIZERS["byte-level"].decode(ids, skip_special_tokens=True)
    assert "".join(pieces("byte-level", ids)) == expected


def test_a_broken_byte_does_not_swallow_the_characters_after_it() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = [tokenizer.token_to_id(piece) for piece in ("<0xFF>", "<0xE6>", "<0x9C>", "<0xAC>", "▁the")]
    assert pieces("sentencepiece", ids) == ["\ufffd", "", "", "本", " the", ""]


@FAMILIES
def test_special_and_unknown_tokens_add_no_text(family: str) -> None:
    tokenizer = TOKENIZERS[family]
    word = tokenizer.encode("the").ids
    special = tokenizer.token_to_id("<|end|>" if family == "byte-level" else "</s>")
    assert "".join(pieces(family, [*word, special, 10**6, *word])) == tokenizer.decode(word + word)


def test_added_tokens_that_are_not_special_are_text() -> None:
    ids = TOKENIZERS["byte-level"].encode("a<think>two words").ids
    assert len(ids) == 3
    assert "".join(pieces("byte-level", ids)) == "a<think>two words"


def test_a_replacement_character_in_the_text_itself_is_not_held_back() -> None:
    ids = TOKENIZERS["byte-level"].encode("\ufffda").ids
    assert pieces("byte-level", ids) == ["", "", "\ufffd", "a", ""]


def test_a_tokenizer_without_a_decoder_separates_words_by_spaces() -> None:
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"once": 0, "upon": 1}, unk_token="once"))
    detokenizer = Detokenizer(TokenBytes(tokenizer))
    assert [detokenizer.push(token_id) for token_id in (0, 1, 0)] == ["once", " upon", " once"]


def word_suffix(decoder: decoders.Decoder) -> tokenizers.Tokenizer:
    """Like openai-gpt and XLM: the last piece of a word carries a suffix."""
    vocab = {"<unk>": 0, "on": 1, "ce</w>": 2, "the</w>": 3, "time</w>": 4, "!</w>": 5, "</w>": 6}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


SUFFIXES = {
    "BPE": decoders.BPEDecoder(suffix="</w>"),
    "in a sequence": decoders.Sequence([decoders.BPEDecoder(suffix="</w>")]),
}


@pytest.mark.parametrize("kind", SUFFIXES)
@given(ids=st.lists(st.integers(1, 7), min_size=1, max_size=8), cut=st.integers(0, 8))
def test_words_that_end_with_a_suffix_are_separated_as_the_library_does(
    kind: str, ids: list[int], cut: int
) -> None:
    tokenizer = word_suffix(SUFFIXES[kind])
    detokenizer = Detokenizer(TokenBytes(tokenizer))
    assert "".join(map(detokenizer.push, ids)) + detokenizer.finish() == tokenizer.decode(ids)
    prompt, output = ids[:cut], ids[cut:]
    if prompt and prompt[-1] != 7:
        detokenizer = Detokenizer(TokenBytes(tokenizer), prompt[-1])
        text = "".join(map(detokenizer.push, output)) + detokenizer.finish()
        assert tokenizer.decode(prompt) + text == tokenizer.decode(ids)


def test_word_pieces_are_joined_as_the_library_does() -> None:
    vocab = {"[UNK]": 0, "once": 1, "##s": 2, "time": 3}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    detokenizer = Detokenizer(TokenBytes(tokenizer))
    assert "".join(map(detokenizer.push, [3, 2, 1, 3])) == tokenizer.decode([3, 2, 1, 3]) == "times once time"


def test_token_that_the_decoder_fails_on_is_a_replacement_character() -> None:
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"x" * 60: 0, "the": 1}, unk_token="the"))
    tokenizer.decoder = decoders.Replace(tokenizers.Regex("(x+x+)+y"), "z")
    detokenizer = Detokenizer(TokenBytes(tokenizer))
    assert [detokenizer.push(token_id) for token_id in (0, 1)] == ["\ufffd", "the"]


def test_the_cost_of_a_token_does_not_grow_with_the_length_of_the_text() -> None:
    detokenizer = Detokenizer(TABLES["byte-level"])
    half_a_character = TOKENIZERS["byte-level"].encode("🙂").ids[0]

    def held() -> list[int]:
        """What the work of the next token can depend on: the sizes of all that is kept."""
        undecoded, _ = detokenizer._utf8.getstate()
        return [len(undecoded), *map(sys.getsizeof, vars(detokenizer).values())]

    detokenizer.push(half_a_character)
    first = held()
    for _ in range(2000):
        detokenizer.push(half_a_character)
        assert held() == first


STOPS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3)


def run(checker: StopChecker, parts: list[str]) -> str:
    return "".join([*map(checker.push, parts), checker.finish()])


@given(stop=STOPS, parts=st.lists(st.text("abc", max_size=4), max_size=8))
@settings(max_examples=500)
def test_the_text_ends_before_the_first_stop_string_however_it_is_cut(
    stop: list[str], parts: list[str]
) -> None:
    text = "".join(parts)
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stop)]
    expected = text
    if ends:
        length = max(len(s) for s in stop if text[: ends[0]].endswith(s))
        expected = text[: ends[0] - length]
    checker = StopChecker(stop)
    assert run(checker, parts) == expected
    assert checker.stopped == bool(ends)
    assert run(StopChecker(stop), list(text)) == expected


@given(stop=STOPS, parts=st.lists(st.text("abc", max_size=4), max_size=8))
@settings(max_examples=300)
def test_only_what_may_begin_a_stop_string_is_held_back(stop: list[str], parts: list[str]) -> None:
    checker, text, shown = StopChecker(stop), "", ""
    for part in parts:
        text += part
        shown += checker.push(part)
        if checker.stopped:
            break
        assert text.startswith(shown)
        held = text[len(shown) :]
        assert not held or any(s.startswith(held) and s != held for s in stop)


def test_without_stop_strings_text_passes_at_once() -> None:
    assert StopChecker(()).push("abc") == "abc"


def test_a_stop_string_may_span_tokens_and_characters() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode("once 🙂🙂 the").ids
    stream = TextStream(Detokenizer(TABLES["byte-level"]), ("🙂 t",))
    text = ""
    for token_id in ids:
        text += stream.push(token_id)
        if stream.stopped:
            break
    assert text == "once 🙂"
    assert stream.finish() == ""


def test_held_back_text_comes_at_the_end_with_the_unfinished_character() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    stream = TextStream(Detokenizer(TABLES["byte-level"]), ("be",))
    shown = "".join(map(stream.push, tokenizer.encode("ab🙂").ids[:-1]))
    assert shown == "a"
    assert stream.finish() == "b\ufffd"
    assert not stream.stopped
