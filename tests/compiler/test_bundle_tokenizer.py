"""The bundle's tokenizer: what it encodes, what is refused, what is noted."""

from __future__ import annotations

import base64
import io
import json
import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from llmc.compiler.checkpoint import tokenizer as tokenizer_module
from llmc.compiler.checkpoint.checkpoint import TOKENIZER_FILES, Checkpoint
from llmc.compiler.checkpoint.convert_sentencepiece import convert
from llmc.compiler.checkpoint.tokenizer import BundleTokenizer, end_of_sequence, read_bundle_tokenizer
from llmc.compiler.texts import EVALUATION_TEXT, read_text
from llmc.runtime.errors import CheckpointError
from llmc.runtime.tokenizer import Tokenizer
from support import tiny_tokenizers

# fmt: off
MODEL_TYPES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox",
    "olmo2", "granite", "starcoder2", "glm4", "exaone4", "cohere", "smollm3", "gpt_oss", "nemotron",
)
# fmt: on
CLASSES = ("PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2Tokenizer", None)
TEXTS = ("the hello to a cat.", "  two  spaces\n\nand\ta line ", "Hello 日本 🙂 e\u0301 1234", "", "a</s>b")


def checkpoint(
    directory: Path, model_type: str = "llama", settings: dict[str, Any] | None = None, **config: Any
) -> Checkpoint:
    """The checkpoint in a directory that has only tokenizer files."""
    if settings is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    files = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    generation = directory / "generation_config.json"
    read = json.loads(generation.read_text()) if generation.is_file() else {}
    return Checkpoint(directory, {"model_type": model_type, **config}, read, {}, (), files)


def opened(found: BundleTokenizer | None, directory: Path) -> Tokenizer:
    """The tokenizer, as the runtime opens it in the bundle."""
    assert found is not None
    directory.mkdir()
    for name, content in found.files.items():
        (directory / name).write_bytes(content)
    return Tokenizer.load(directory)


@pytest.mark.parametrize("kind", tiny_tokenizers.KINDS)
def test_bundle_encodes_as_the_tokenizer_file_whatever_the_model_and_class(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    source.mkdir()
    tiny_tokenizers.KINDS[kind]().save(str(source / "tokenizer.json"))
    file = Backend.from_file(str(source / "tokenizer.json"))
    for number, model_type in enumerate(MODEL_TYPES):
        settings = {"tokenizer_class": CLASSES[number % len(CLASSES)], "eos_token": "</s>"}
        found = read_bundle_tokenizer(checkpoint(source, model_type, settings), 1000)
        ours = opened(found, tmp_path / model_type)
        for text in TEXTS:
            ids = file.encode(text, add_special_tokens=False).ids
            assert ours.encode(text, add_special_tokens=False) == ids, (model_type, settings, text)
            assert ours.decode(ids) == file.decode(ids), (model_type, settings, text)


def test_class_that_encodes_otherwise_is_noted(tmp_path: Path) -> None:
    tiny_tokenizers.sentencepiece_bpe().save(str(tmp_path / "tokenizer.json"))
    found = read_bundle_tokenizer(checkpoint(tmp_path, "qwen2", {}), 1000)
    assert found is not None
    assert found.notes == (
        "the class Qwen2Tokenizer of transformers and tokenizer.json encode 'the hello' in different ways: "
        "the bundle follows tokenizer.json",
    )


@pytest.mark.parametrize("name", ["BartphoTokenizer", "CTRLTokenizer", "ByT5Tokenizer"])
def test_class_that_cannot_read_the_tokenizer_file_is_noted(name: str, tmp_path: Path) -> None:
    tiny_tokenizers.byte_level().save(str(tmp_path / "tokenizer.json"))
    found = read_bundle_tokenizer(checkpoint(tmp_path, settings={"tokenizer_class": name}), 1000)
    assert found is not None
    [note] = found.notes
    assert note.endswith(": the bundle follows tokenizer.json")
    text = opened(found, tmp_path / "bundle").decode([*range(3, 259)])
    assert text == tiny_tokenizers.byte_level().decode([*range(3, 259)])


def test_special_tokens_follow_transformers_with_a_note(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tiny_tokenizers.byte_level().save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "BartTokenizer"}
    source = checkpoint(tmp_path, "llama", settings)
    (tmp_path / "config.json").write_text(json.dumps(source.config))
    found = read_bundle_tokenizer(source, 1000)
    assert found is not None
    assert found.notes == (
        "transformers encodes 'a' as '<s> a </s>', tokenizer.json as 'a': the bundle follows transformers",
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert opened(found, tmp_path / "bundle").encode("the hello") == theirs("the hello")["input_ids"]


def test_code_of_a_checkpoint_is_refused_and_never_run(tmp_path: Path) -> None:
    tiny_tokenizers.byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenization_x.py").write_text("raise SystemExit('this ran')")
    own = {
        "tokenizer_class": "XTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]},
    }
    for settings in (
        own,
        own | {"auto_map": [None, "tokenization_x.XTokenizer"]},
        {"auto_map": own["auto_map"]},
    ):
        with pytest.raises(CheckpointError, match=r"\(auto_map: tokenization_x\.XTokenizer\)") as caught:
            read_bundle_tokenizer(checkpoint(tmp_path, settings=settings), 1000)
        assert "remove auto_map" in caught.value.hint
    with pytest.raises(CheckpointError, match="never runs"):
        read_bundle_tokenizer(checkpoint(tmp_path, settings={}, auto_map=own["auto_map"]), 1000)
    known = own | {"tokenizer_class": "PreTrainedTokenizerFast"}
    models = {"AutoConfig": "x.C", "AutoModelForImageClassification": "x.M"}
    found = read_bundle_tokenizer(checkpoint(tmp_path, settings=known, auto_map=models), 1000)
    assert (
        opened(found, tmp_path / "bundle").encode("the")
        == Backend.from_file(str(tmp_path / "tokenizer.json")).encode("the").ids
    )


@pytest.mark.parametrize("name", ["AutoTokenizer", "AutoModelForImageClassification", "pipeline", "logging"])
def test_class_that_is_no_tokenizer_is_refused(name: str, tmp_path: Path) -> None:
    tiny_tokenizers.byte_level().save(str(tmp_path / "tokenizer.json"))
    code = {"AutoModelForImageClassification": "tokenization_x.X"}
    with pytest.raises(CheckpointError, match=f"tokenizer_class '{name}' is no tokenizer"):
        read_bundle_tokenizer(checkpoint(tmp_path, settings={"tokenizer_class": name}, auto_map=code), 1000)


def test_tekken_is_converted_as_transformers_does(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    vocab = [
        {"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": chr(i)}
        for i in range(256)
    ]
    special = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
    tekken = {
        "config": {
            "pattern": r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+", "num_vocab_tokens": 256,
            "default_vocab_size": 261, "default_num_special_tokens": 5, "version": "v3",
        },
        "vocab": vocab,
        "special_tokens": [
            {"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(special)
        ],
    }  # fmt: skip
    (tmp_path / "tekken.json").write_text(json.dumps(tekken))
    source = checkpoint(tmp_path, "mistral")
    (tmp_path / "config.json").write_text(json.dumps(source.config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = opened(read_bundle_tokenizer(source, 300), tmp_path / "bundle")
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]


def test_checkpoint_without_a_vocabulary_has_no_tokenizer_and_a_note(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, settings={"eos_token": "</s>"}, eos_token_id=3)
    assert read_bundle_tokenizer(source, 300) is None
    assert end_of_sequence(source, None, 300) == (
        (3,), ("the checkpoint has no tokenizer: prompts of the bundle are token ids",)
    )  # fmt: skip


def test_tokens_without_an_embedding_are_noted_and_another_models_tokenizer_refused(tmp_path: Path) -> None:
    tiny_tokenizers.byte_level().save(str(tmp_path / "tokenizer.json"))
    size = tiny_tokenizers.byte_level().get_vocab_size()

    def notes(rows: int) -> tuple[str, ...]:
        found = read_bundle_tokenizer(checkpoint(tmp_path, "olmo2", {"eos_token": "<late>"}), rows)
        assert found is not None
        return found.notes

    assert notes(size + 1) == ()
    assert notes(size) == (
        f"token {size} of the tokenizer has no embedding ({size} rows): prompts cannot use it",
    )
    assert notes(size - 1)[0].startswith(f"tokens {size - 1} to {size} of the tokenizer have no embedding")
    with pytest.raises(CheckpointError, match="tokens of an English text are outside the model's vocabulary"):
        notes(100)


@pytest.mark.parametrize(
    ("generation", "config", "eos", "expected", "note"),
    [
        (256, 256, 256, (256,), None),
        ([258, 256], 256, 258, (258, 256), None),
        (256, None, 257, (256, 257), "differ (256 by generation_config.json; 257 by the tokenizer)"),
        (None, 256, 257, (256, 257), "differ (256 by config.json; 257 by the tokenizer)"),
        (1, [2, 3], None, (1, 2, 3), "differ (1 by generation_config.json; 2, 3 by config.json)"),
        (None, None, 5, (5,), None),
        (None, None, None, (), "generation ends by length"),
        (7, 1000, None, (7,), "outside the vocabulary of 300 are left out: 1000"),
    ],
)
def test_end_of_sequence_is_what_any_file_names(
    generation: Any, config: Any, eos: int | None, expected: tuple[int, ...], note: str | None, tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    source = checkpoint(tmp_path, eos_token_id=config)
    found, notes = end_of_sequence(source, BundleTokenizer({}, (), eos), 300)
    assert found == expected
    assert [note in one for one in notes] == ([True] if note else [])


@pytest.mark.parametrize("value", ["</s>", -1, True, 1.5, [2, None], [[2]], {"id": 2}, 2**40])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_malformed_end_of_sequence_names_its_file(value: Any, file: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": value if "gen" in file else 2})
    )
    source = checkpoint(tmp_path, eos_token_id=value if "gen" not in file else 2)
    with pytest.raises(CheckpointError, match=rf"{file}: eos_token_id is") as caught:
        end_of_sequence(source, None, 300)
    assert "token id" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}'),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 4000000000}, "merges": []}}'),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}'),
        ("tokenizer_config.json", '{"chat_template": {"default": 5}}'),
        ("tokenizer_config.json", '{"eos_token": {"no": "content"}}'),
        ("special_tokens_map.json", "[" * 100_000),
    ],
)
def test_unreadable_tokenizer_is_one_error(
    name: str, content: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny_tokenizers.byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError) as caught:
        read_bundle_tokenizer(checkpoint(tmp_path), 1000)
    assert str(tmp_path) in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert capfd.readouterr().err == ""


def sentencepiece_model(kind: str = "bpe", rule: str = "identity", **options: Any) -> bytes:
    """A small SentencePiece model as Llama 2 and Mistral have, or with other options of the trainer."""
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    options = {
        "byte_fallback": True, "remove_extra_whitespaces": False, "split_digits": True, "vocab_size": 500
    } | options  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(read_text(EVALUATION_TEXT).splitlines()), model_writer=written,
        model_type=kind, normalization_rule_name=rule, minloglevel=2, **options,
    )  # fmt: skip
    return written.getvalue()


SPACED = (
    *TEXTS[:4],
    " a leading space",
    "a",
    " ",
    "\u2581",
    "x<tool>y <tool> z",
    "tab\tand\x00zero",
    "na\u00efve",
)
SENTENCEPIECE_CLASSES = (None, {"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "GemmaTokenizer"})


@pytest.mark.parametrize(
    ("kind", "rule", "options"),
    [
        ("bpe", "identity", {}),
        ("bpe", "identity", {"add_dummy_prefix": False}),
        ("bpe", "identity", {"byte_fallback": False}),
        ("unigram", "identity", {}),
        (
            "unigram",
            "nmt_nfkc",
            {"remove_extra_whitespaces": True, "byte_fallback": False, "vocab_size": 300},
        ),
    ],
)
def test_sentencepiece_model_encodes_as_sentencepiece(
    kind: str, rule: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Spaces before a text, runs of spaces, bytes of unknown characters, user-defined symbols."""
    data = sentencepiece_model(kind, rule, user_defined_symbols=["<tool>"], **options)
    reference = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=data)
    kept = SPACED if rule == "identity" else [text for text in SPACED if "<tool>" not in text]
    for number, settings in enumerate(SENTENCEPIECE_CLASSES):
        stage, directory = tmp_path / f"{number}", tmp_path / f"{number}-saved"
        stage.mkdir()
        directory.mkdir()
        (stage / "tokenizer.model").write_bytes(data)
        (stage / "config.json").write_text('{"model_type": "llama"}')
        (stage / "tokenizer_config.json").write_text(json.dumps(settings or {}))
        convert(
            {
                "stage": stage,
                "directory": directory,
                "model": "tokenizer.model",
                "settings": settings or {},
                "texts": kept,
            }
        )
        ours = Tokenizer.load(directory)
        for text in kept:
            ids = reference.encode(text)
            assert ours.encode(text, add_special_tokens=False) == ids, (settings, text)
            if reference.unk_id() not in ids:
                assert ours.decode(ids) == reference.decode(ids), (settings, text)


def test_sentencepiece_model_keeps_the_added_and_special_tokens_of_transformers(tmp_path: Path) -> None:
    data = sentencepiece_model()
    reference = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=data)
    (tmp_path / "tokenizer.model").write_bytes(data)
    settings = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "chat_template": "{{ bos_token }}",
        "added_tokens_decoder": {"500": {"content": "<extra>", "special": True}},
    }  # fmt: skip
    found = read_bundle_tokenizer(checkpoint(tmp_path, settings=settings), 501)
    ours = opened(found, tmp_path / "bundle")
    assert found is not None
    assert found.notes == (
        "the class LlamaTokenizer of transformers and tokenizer.model encode '  Two spaces,\\n\\n\\ttabs "
        "\\r\\n and a line  ' in different ways: the bundle follows tokenizer.model",
    )
    assert found.eos_token_id == 2
    assert ours.encode(" the 日") == [1, *reference.encode(" the 日")]
    assert ours.encode("<s>a<extra>b</s>", add_special_tokens=False) == [
        *(1, reference.piece_to_id("a"), 500, reference.piece_to_id("b"), 2)
    ]
    assert ours.apply_chat_template([{"role": "user", "content": ""}]) == "<s>"


@pytest.mark.parametrize(
    ("name", "content", "message", "hint"),
    [
        ("tokenizer.model", b"", "no SentencePiece model", "download it again"),
        ("tokenizer.model", b"junk\xff" * 99, "no SentencePiece model", "download it again"),
        ("spiece.model", b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "no SentencePiece model", "again"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "needs the package tiktoken", "pip install tiktoken"),
        ("tiktoken.model", b"IQ== 0\nIg== 1\n", "needs the package tiktoken", "pip install tiktoken"),
        ("qwen.tiktoken", b"IQ== 0\nIg== 1\n", "llmc never runs", "remove the file"),
    ],
)
def test_file_that_cannot_be_converted_is_named(
    name: str, content: bytes, message: str, hint: str, tmp_path: Path
) -> None:
    if "tiktoken" in message and find_spec("tiktoken"):
        pytest.skip("tiktoken is installed")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_bundle_tokenizer(checkpoint(tmp_path, settings={}), 300)
    assert str(tmp_path / name) in caught.value.message
    assert "\n" not in caught.value.message
    assert hint in caught.value.hint


def test_sentencepiece_that_is_not_installed_is_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(CheckpointError, match="needs the package sentencepiece") as caught:
        convert(
            {
                "stage": tmp_path,
                "directory": tmp_path,
                "model": "tokenizer.model",
                "settings": {},
                "texts": [],
            }
        )
    assert caught.value.hint.startswith("pip install sentencepiece")


def test_conversion_that_takes_too_long_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that converts limits its computing time; here it ends as the kernel would end it."""
    (tmp_path / "hostile.py").write_text(
        "import os, signal\n"
        "from llmc.compiler.child_process import serve\n"
        "serve(lambda task, messages: os.kill(os.getpid(), signal.SIGXCPU))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(
        tokenizer_module, "_CONVERSION", replace(tokenizer_module._CONVERSION, module="hostile")
    )
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="CPU time limit exceeded") as caught:
        read_bundle_tokenizer(checkpoint(tmp_path, settings={}), 300)
    assert "remove it to build without a tokenizer" in caught.value.hint


@pytest.mark.slow
@examples(max_examples=max(5, examples.default.max_examples // 50), suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(("bpe", "unigram")),
    places=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=4)), min_size=1, max_size=4
    ),
    near_the_end=st.booleans(),
)
def test_damaged_sentencepiece_model_is_a_tokenizer_or_one_error(
    kind: str, places: list[tuple[float, bytes]], near_the_end: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Near the end lie the options of the model."""
    data = bytearray(sentencepiece_model(kind))
    start = len(data) - 400 if near_the_end else 0
    for place, new in places:
        at = start + int(place * (len(data) - start))
        data[at : at + max(1, len(new) - 1)] = new
    source = tmp_path_factory.mktemp("damaged")
    (source / "tokenizer.model").write_bytes(data)
    caught = None
    try:
        found = read_bundle_tokenizer(checkpoint(source, settings={}), 600)
        assert opened(found, source / "bundle").decode([300]) is not None
    except CheckpointError as error:
        caught = error
    assert caught is None or (caught.hint and "\n" not in caught.message + caught.hint)
    assert {path.name for path in source.iterdir()} <= {"tokenizer.model", "tokenizer_config.json", "bundle"}
