"""Mutated tokenizers and hostile chat templates end in one clear error or in text."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.runtime.errors import BundleError, LlmcError, RequestError
from llmc.runtime.tokenizer import Tokenizer
from support import tiny_tokenizers

EXAMPLES = max(30, settings.default.max_examples // 10)  # `make fuzz`: 100 a round
TEXTS = ("the hello", "", "  Two spaces 日本 🙂\n", "x" * 300, "</s><s> \r\n\t", "a\x00b")
FILES = {kind: make().to_str() for kind, make in tiny_tokenizers.KINDS.items()}
PATTERNS: tuple[dict[str, str], ...] = (
    {"Regex": "(a|aa)+$"}, {"Regex": "(x+x+)+y"}, {"Regex": "(?:x|y)*(?:x|z)*[?!]"},
    {"Regex": ""}, {"Regex": "("}, {"Regex": "(?=x)"}, {"Regex": r"\b"}, {"String": ""}, {"String": "x"},
)  # fmt: skip
REPLACEMENTS = [
    {"type": "Replace", "pattern": pattern, "content": content}
    for pattern in PATTERNS
    for content in ("", "x", "xx", "x" * 3000)
]
#: Components that the library takes, and that make it slow, large, or fail.
COMPONENTS: dict[str, list[dict[str, Any]]] = {
    "normalizer": [
        *REPLACEMENTS,
        {"type": "Sequence", "normalizers": [{**REPLACEMENTS[-2], "pattern": {"String": "x"}}] * 40},
        {"type": "Prepend", "prepend": "x" * 10_000},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Strip", "strip_left": True, "strip_right": True},
    ],
    "pre_tokenizer": [
        *({"type": "Split", "pattern": one, "behavior": "Isolated", "invert": False} for one in PATTERNS),
        {"type": "FixedLength", "length": 0},
        {"type": "Metaspace", "replacement": "x", "prepend_scheme": "always", "split": True},
        {"type": "Digits", "individual_digits": True},
    ],
    "decoder": [
        *REPLACEMENTS,
        {"type": "Strip", "content": " ", "start": 3, "stop": 3},
        {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
        {"type": "WordPiece", "prefix": "", "cleanup": True},
        {"type": "BPEDecoder", "suffix": ""},
    ],
    "post_processor": [
        {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * count,
         "pair": [], "special_tokens": {}}
        for count in (0, 2, 5000)
    ] + [{"type": "BertProcessing", "sep": ["?", 99_999], "cls": ["!", 2**31]}],
}  # fmt: skip
ODD: dict[type, tuple[Any, ...]] = {
    str: ("", "a", "\x00", "\ud7ff", "x" * 5000, "C:\\x", "##"),
    int: (0, 1, -1, 7, 2**31, 2**32 - 1),
    float: (0.0, -1e308, 1e308),
}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of values in nested JSON, of the first 12 entries of each object or list.

    That skips most of a vocabulary.
    """
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items)[:12]:
        found += places(item, (*path, key))
    return found


def mutate(content: str, rng: random.Random) -> str:
    """Replace a component or up to three values of a tokenizer.json, or damage its bytes."""
    if rng.random() < 0.1:
        cut = rng.randrange(len(content))
        return content[:cut] if rng.random() < 0.5 else content[:cut] + "\x00{" + content[cut + 1 :]
    value = json.loads(content)
    if rng.random() < 0.5:
        name = rng.choice(sorted(COMPONENTS))
        value[name] = rng.choice(COMPONENTS[name])
        return json.dumps(value)
    for _ in range(rng.randint(1, 3)):
        *path, last = rng.choice(places(value))
        parent = value
        for key in path:
            parent = parent[key]
        old = parent[last]
        if rng.random() < 0.1:
            del parent[last]
        elif isinstance(old, bool):
            parent[last] = not old
        elif type(old) in ODD:
            parent[last] = rng.choice(ODD[type(old)])
        elif isinstance(old, list) and old and rng.random() < 0.5:
            old.append(old[-1])
    return json.dumps(value)


def assert_clean(error: LlmcError) -> None:
    assert error.hint or "plain JSON" in error.message
    assert "\n" not in error.message
    assert len(error.message) < 1000


@given(seed=st.integers(0, 2**32), kind=st.sampled_from(sorted(FILES)))
@settings(max_examples=EXAMPLES)
def test_mutated_tokenizer_encodes_or_is_one_error(
    tmp_path_factory: pytest.TempPathFactory, seed: int, kind: str
) -> None:
    directory = tmp_path_factory.mktemp("mutated")
    (directory / "tokenizer.json").write_text(mutate(FILES[kind], random.Random(seed)))
    try:
        tokenizer = Tokenizer.load(directory)
    except BundleError as error:
        assert_clean(error)
        return
    for text in TEXTS:
        try:
            ids = tokenizer.encode(text)
            tokenizer.decode(ids)
        except RequestError as error:
            assert_clean(error)
            continue
        detokenizer = tokenizer.detokenizer(ids[:1])
        assert isinstance("".join(map(detokenizer.push, ids[:50])) + detokenizer.finish(), str)


ATOMS = (
    "'a'", "messages", "messages[0].content", "bos_token", "range(99999)", "''.__class__", "0", "-1", "3",
    "99999", "2000000000", "10**9", "none", "1.5",
)  # fmt: skip
OPERATORS = st.sampled_from(["+", "*", "**", "%", "~", "in", "//"])
FILTERS = st.sampled_from(["list", "join", "tojson", "upper", "safe", "string", "length", "first"])
SIZED = st.sampled_from(["center", "indent", "batch", "slice", "round", "wordwrap", "truncate"])
FUNCTIONS = st.sampled_from(["range", "raise_exception", "strftime_now", "namespace", "lipsum"])


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Expressions made of smaller ones."""
    return st.one_of(
        st.tuples(inner, OPERATORS, inner).map(" ".join).map("({})".format),
        st.tuples(inner, FILTERS).map(" | ".join),
        st.tuples(SIZED, inner).map(lambda parts: f"('abc' | {parts[0]}({parts[1]}))"),
        st.tuples(FUNCTIONS, inner).map(lambda parts: f"{parts[0]}({parts[1]})"),
        inner.map("'%{0}d' % {0}".format),
    )


VALUES = st.recursive(st.sampled_from(ATOMS), larger, max_leaves=6)
TEMPLATES = st.recursive(
    VALUES.map("{{{{ {} }}}}".format)
    | st.sampled_from(["text", "{% if %}", "{%", "{{", "{# ", "{% endfor %}"]),
    lambda inner: st.one_of(
        st.tuples(VALUES, inner).map(lambda p: f"{{% for x in {p[0]} %}}{p[1]}{{% endfor %}}"),
        st.tuples(VALUES, inner).map(lambda p: f"{{% set y = {p[0]} %}}{p[1]}"),
        inner.map("{{% macro m() %}}{}{{{{ m() }}}}{{% endmacro %}}{{{{ m() }}}}".format),
        st.tuples(inner, inner).map("".join),
    ),
    max_leaves=4,
)


@given(template=TEMPLATES)
@settings(max_examples=EXAMPLES)
def test_hostile_template_renders_or_is_one_error(template: str) -> None:
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(FILES["byte_level"]), {"bos_token": "<s>"}, template)
    started = time.monotonic()
    try:
        assert isinstance(tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}]), str)
    except RequestError as error:
        assert_clean(error)
    assert time.monotonic() - started < 30
