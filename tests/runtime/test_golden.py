"""Bundles of every format so far, frozen as they were built, load and answer as they did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmc.runtime.bundle.manifest import FORMAT_VERSION
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.load import load_engine
from llmc.runtime.sampling import SamplingParams

GOLDEN = Path(__file__).parents[1] / "golden"


def test_there_is_a_frozen_bundle_of_every_format() -> None:
    assert {path.name for path in GOLDEN.glob("*.llmc")} == {
        f"format-{version}.llmc" for version in range(1, FORMAT_VERSION + 1)
    }


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_a_frozen_bundle_opens_and_is_whole(version: int) -> None:
    bundle = Bundle.open(GOLDEN / f"format-{version}.llmc")
    bundle.verify()
    assert bundle.manifest.format_version == version
    assert (bundle.manifest.gpu is None) == (version == 1)


def test_a_frozen_bundle_generates_what_transformers_did() -> None:
    path = GOLDEN / "format-1.llmc"  # format 2 is for GPUs
    expected = json.loads(path.with_suffix(".json").read_text())
    engine = load_engine(path)
    params = SamplingParams(max_tokens=len(expected["tokens"]), ignore_eos=True)
    assert list(engine.generate([expected["prompt"]], params)[0].token_ids) == expected["tokens"]
    assert engine.generate(["A hen"], SamplingParams(max_tokens=3))[0].prompt_tokens > 1
