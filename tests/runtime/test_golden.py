"""Bundles of every format so far, frozen as they were built, load and answer as they did."""

from __future__ import annotations

import json
from dataclasses import replace
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
    assert (bundle.manifest.gpu is not None) == (version in (2, 5))
    assert (bundle.manifest.sampling is not None) == (version >= 3)
    assert (bundle.manifest.geometry.v_head_dim == 0) == (version == 6)
    assert any(layer.kind == "chunked" for layer in bundle.manifest.geometry.layers) == (version == 7)
    assert bundle.manifest.parallel.tp == (2 if version == 4 else 1)
    assert bundle.manifest.parallel.pp == (2 if version == 5 else 1)
    assert (bundle.manifest.ranks is not None) == (version == 5)


@pytest.mark.parametrize("version", [1, 3, 4, 6, 7])  # formats 2 and 5 are for GPUs
def test_a_frozen_bundle_generates_what_transformers_did(version: int) -> None:
    path = GOLDEN / f"format-{version}.llmc"
    expected = json.loads(path.with_suffix(".json").read_text())
    engine = load_engine(path)
    # Formats from 3 on have a repetition penalty, which greedy decoding applies too.
    assert (engine.default_params.repetition_penalty != 1) == (version >= 3)
    params = replace(engine.default_params, max_tokens=len(expected["tokens"]), ignore_eos=True)
    assert list(engine.generate([expected["prompt"]], params)[0].token_ids) == expected["tokens"]
    assert engine.generate(["A hen"], SamplingParams(max_tokens=3))[0].prompt_tokens > 1
