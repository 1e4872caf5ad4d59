"""The script that trains `tales`, on a tiny text, and the checkpoint that it left in the model zoo."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LLAMA = Path(__file__).parents[2] / "model_zoo" / "llama"
TALES = LLAMA / "tales"
WIDTHS = ("vocab_size", "hidden_size", "intermediate_size", "head_dim")
ROUND_TRIPS = (
    "Once upon a time there was a king.",
    "  two spaces,\ttabs\r\nand\n\nlines \n",
    "Grüße, 你好, \U0001f98a and a lone \u0301",
    "don't <b>1,234.5</b> 'twas\u2019",
    "",
)


Train = Callable[[str, int], Path]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tales", LLAMA / "train_tales.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_tales"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """Train once per (name, seed), for three small steps, on 216 short paragraphs and a second such text."""
    folder = tmp_path_factory.mktemp("tales")
    beasts = ("fox", "bear", "wolf", "raven", "frog", "hare")
    deeds = ("sang", "fought", "begged", "danced", "hid", "wept")
    tales = [f"The {a} {d} before the {b}\nuntil morning." for a in beasts for d in deeds for b in beasts]
    texts = [folder / "one.txt", folder / "two.txt"]
    for text in texts:
        text.write_text(f"{text.stem.upper()}\n\n\n" + "\n\n".join(tales), encoding="utf-8")

    @cache
    def run(name: str, seed: int) -> Path:
        out = folder / name
        script.main(["--text", *map(str, texts), "--out", str(out), "--steps", "3", "--seed", str(seed)])
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "TOKENS", 256)
        patch.setattr(script, "PROMPTS", ("The king",))
        yield run


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_short_run_leaves_a_checkpoint_that_transformers_loads(train: Train) -> None:
    out = train("first", 7)
    config = json.loads((out / "config.json").read_text())
    assert {name: config[name] % 64 for name in WIDTHS} == dict.fromkeys(WIDTHS, 0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == config["vocab_size"]
    assert [tokenizer.decode(tokenizer(text).input_ids) for text in ROUND_TRIPS] == list(ROUND_TRIPS)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.generate(**tokenizer("The king", return_tensors="pt"), max_new_tokens=2).shape[0] == 1


def test_the_readme_states_the_data_and_no_local_path(train: Train) -> None:
    out = train("first", 7)
    readme = (out / "README.md").read_text(encoding="utf-8")
    raw = (out.parent / "one.txt").read_bytes()
    cut = raw.index(b"\n\n", len(raw) * 95 // 100) + 2
    assert digest(out.parent / "one.txt") in readme
    assert f"Bytes [0, {cut}) trained; bytes [{cut}, {len(raw)}) held out: loss " in readme
    assert "| 3 steps (`--steps 3 --minutes 35`) |" in readme
    assert "> **The king**" in readme
    assert str(out.parent) not in readme


def test_the_seed_decides_the_weights(train: Train) -> None:
    first, again, other = (train(*run) for run in (("first", 7), ("again", 7), ("other", 8)))
    weights = "model.safetensors"
    assert digest(first / weights) == digest(again / weights) != digest(other / weights)
    assert digest(first / "tokenizer.json") == digest(other / "tokenizer.json")


def test_prose_joins_lines_keeps_verse_and_opens_tales(script: ModuleType) -> None:
    book = "A TALE\n\n\nHe\nsaid:\n\n \u2018No care,\n  no _sorrow_.\u2019\n\nEnd.\n\n\n\nTHE END\n\nAmen.\n"
    eos = script.EOS
    expected = f"{eos}A TALE\n\nHe said:\n\n'No care,\nno sorrow.'\n\nEnd.{eos}THE END\n\nAmen."
    assert script.prose(book.encode()) == expected


def test_a_text_without_a_paragraph_to_hold_out_is_refused(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("One paragraph.")
    with pytest.raises(SystemExit, match="hint: pass a longer text"):
        script.main(["--text", str(tmp_path / "short.txt"), "--out", str(tmp_path / "out")])


def test_a_text_without_a_vocabulary_is_refused(script: ModuleType) -> None:
    with pytest.raises(SystemExit, match="too few pairs"):
        script.train_tokenizer(["An only sentence."])


def test_the_shipped_checkpoint_is_small_bfloat16_and_finite() -> None:
    assert sum(file.stat().st_size for file in TALES.iterdir()) <= 12_000_000
    model = transformers.AutoModelForCausalLM.from_pretrained(TALES)
    config = model.config
    assert {name: getattr(config, name) % 64 for name in WIDTHS} == dict.fromkeys(WIDTHS, 0)
    assert config.num_attention_heads > config.num_key_value_heads > 1
    assert 2_000_000 <= model.num_parameters() <= 6_000_000
    weights = model.state_dict()
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert [name for name, tensor in weights.items() if not tensor.isfinite().all()] == []


def test_the_shipped_tokenizer_round_trips() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(TALES)
    assert [tokenizer.decode(tokenizer(text).input_ids) for text in ROUND_TRIPS] == list(ROUND_TRIPS)
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    config = json.loads((TALES / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_shipped_checkpoint_expects_a_sentence_that_it_never_saw() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(TALES)
    model = transformers.AutoModelForCausalLM.from_pretrained(TALES, dtype=torch.float32)
    story = (
        "There was once a miller who had three sons, and the youngest of them went out into the wide world."
    )
    ids = tokenizer(story, return_tensors="pt").input_ids
    with torch.no_grad():
        in_order = model(ids, labels=ids).loss.item()
        backwards = model(ids.flip(1), labels=ids.flip(1)).loss.item()
    assert in_order < 4.5  # nats per token; guessing blindly costs ln(4096) = 8.3
    assert in_order < backwards - 2
