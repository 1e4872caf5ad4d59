"""Sampling defaults of generation_config.json: read as transformers does, recorded, used by the runtime."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.sampling import not_followed, sampling_defaults
from llmc.compiler.driver import compile_model, plan_build
from llmc.compiler.progress import Silent
from llmc.compiler.request import BuildRequest
from llmc.runtime.bundle.manifest import Sampling
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.errors import CheckpointError
from llmc.runtime.load import default_params, load_engine
from llmc.runtime.sampling import SamplingParams


@pytest.fixture
def model(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint("llama-tiny"), tmp_path / "model")


def write(model: Path, **generation: Any) -> Checkpoint:
    (model / "generation_config.json").write_text(json.dumps(generation))
    return Checkpoint.open(model)


CONFIGS: list[dict[str, Any]] = [
    {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
    {"do_sample": True, "temperature": 1, "top_k": 0, "min_p": 0.05},
    {"do_sample": True},
    {"do_sample": True, "top_k": None, "temperature": None},
    {"repetition_penalty": 1.1},
]


@pytest.mark.parametrize("generation", CONFIGS, ids=str)
def test_missing_values_are_those_of_transformers(model: Path, generation: dict[str, Any]) -> None:
    sampling = sampling_defaults(write(model, **generation))
    assert sampling is not None
    theirs = GenerationConfig.from_pretrained(model)
    theirs.update(**theirs._get_default_generation_params(), defaults_only=True)
    assert sampling.do_sample == bool(theirs.do_sample)
    for name in ("temperature", "top_p", "repetition_penalty"):
        assert getattr(sampling, name) == getattr(theirs, name), name
    assert sampling.min_p == (theirs.min_p or 0)
    if sampling.do_sample:
        assert sampling.top_k == theirs.top_k


def test_without_settings_nothing_is_recorded(model: Path) -> None:
    assert sampling_defaults(write(model, eos_token_id=2, top_p=None)) is None
    (model / "generation_config.json").unlink()
    assert sampling_defaults(Checkpoint.open(model)) is None


def test_greedy_checkpoints_stay_greedy_with_their_penalty(model: Path) -> None:
    sampling = sampling_defaults(write(model, do_sample=False, temperature=0.6, repetition_penalty=1.2))
    assert sampling == Sampling(False, 0.6, 0, 1.0, 0.0, 1.2)
    assert default_params(sampling) == SamplingParams(temperature=0.0, repetition_penalty=1.2)
    sampled = Sampling(True, 0.6, 20, 0.9, 0.1, 1.2)
    assert default_params(sampled) == SamplingParams(128, 0.6, 20, 0.9, 0.1, 1.2)
    assert default_params(None) == SamplingParams()


def test_top_k_can_be_off_as_other_tools_write_it_and_beyond_any_vocabulary(model: Path) -> None:
    sampling = [sampling_defaults(write(model, do_sample=True, top_k=k)) for k in (-1, 10**30)]
    assert [one.top_k for one in sampling if one] == [0, 2**31 - 1]


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"do_sample": "yes"}, "do_sample is 'yes'"),
        ({"do_sample": 1}, "do_sample is 1"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": "0.6"}, "temperature is '0.6'"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"top_k": 20.5}, "top_k is 20.5"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_p": 95}, "top_p is 95"),
        ({"min_p": True}, "min_p is True"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"repetition_penalty": [1.1]}, r"repetition_penalty is \[1.1\]"),
    ],
    ids=str,
)
def test_an_invalid_value_is_found_while_the_checkpoint_is_read(
    model: Path, generation: dict[str, Any], message: str
) -> None:
    write(model, **generation)
    with pytest.raises(CheckpointError, match=f"generation_config.json: {message}") as caught:
        plan_build(BuildRequest(str(model), model.parent / "x.llmc"))
    assert caught.value.hint


def test_settings_without_a_counterpart_are_named(model: Path) -> None:
    given = write(model, num_beams=4, typical_p=1.0, no_repeat_ngram_size=3, suppress_tokens=[], top_p=0.9)
    assert list(not_followed(given)) == ["num_beams", "no_repeat_ngram_size"]


@pytest.mark.slow
def test_a_bundle_has_the_defaults_and_its_verification_stays_greedy(model: Path, fast_builds: None) -> None:
    class Notes(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    notes: list[str] = []
    generation = {
        "do_sample": True,
        "temperature": 0.5,
        "top_p": 0.9,
        "repetition_penalty": 1.3,
        "num_beams": 2,
    }
    write(model, **generation)
    path = compile_model(BuildRequest(str(model), model.parent / "x.llmc"), Notes()).path
    assert "generation_config.json sets num_beams, which `llmc run` does not follow" in notes
    manifest = Bundle.open(path).manifest
    assert manifest.format_version == 3
    assert manifest.sampling == Sampling(True, 0.5, 50, 0.9, 0.0, 1.3)
    assert manifest.verification.status == "passed"
    assert manifest.verification.greedy_tokens_equal
    engine = load_engine(path)
    assert engine.default_params == SamplingParams(128, 0.5, 50, 0.9, 0.0, 1.3)
