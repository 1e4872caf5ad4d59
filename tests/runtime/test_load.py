"""Loading a bundle: KV memory, operators, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llmc.runtime.backends.kv_cache import block_bytes
from llmc.runtime.bundle.manifest import Operator
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.errors import BackendError, BundleError, RequestError
from llmc.runtime.load import load_engine
from llmc.runtime.sampling import SamplingParams


def test_kv_memory_sets_the_number_of_blocks(bundle: Callable[[str], Path]) -> None:
    opened = Bundle.open(bundle("llama-tiny"))
    block = block_bytes(opened.manifest.geometry, "fp32")
    assert block == 2 * 2 * (16 + 16) * 32 * 4  # layers, KV heads, key and value width, tokens, bytes
    assert load_engine(opened, kv_memory=5 * block + 1).backend.num_blocks == 5


def test_no_more_blocks_than_the_sequences_could_use(bundle: Callable[[str], Path]) -> None:
    engine = load_engine(bundle("llama-tiny"), max_sequences=3)
    assert engine.backend.num_blocks == 3 * 256 // 32


def test_too_little_kv_memory_says_how_much_is_needed(bundle: Callable[[str], Path]) -> None:
    with pytest.raises(RequestError, match="hold no block") as caught:
        load_engine(bundle("llama-tiny"), kv_memory=1000)
    assert "16384" in caught.value.hint


def test_an_operator_of_another_abi_is_refused(bundle: Callable[[str], Path]) -> None:
    opened = Bundle.open(bundle("llama-tiny"))
    newer = replace(opened.manifest, operators=(Operator("llmc.PagedAttention", 2, 2),))
    with pytest.raises(BundleError, match="PagedAttention at ABI 2"):
        load_engine(replace(opened, manifest=newer))
    other = replace(opened.manifest, operators=(Operator("llmc.Experts", 1, 2),))
    with pytest.raises(
        BundleError, match=r"needs operator llmc\.Experts at ABI 1, this llmc has llmc\.Paged"
    ):
        load_engine(replace(opened, manifest=other))


def test_an_engine_that_this_llmc_lacks_is_refused(bundle: Callable[[str], Path]) -> None:
    opened = Bundle.open(bundle("llama-tiny"))
    target = replace(opened.manifest.target, engine="abacus")
    with pytest.raises(BackendError, match="there is no backend 'abacus'") as caught:
        load_engine(replace(opened, manifest=replace(opened.manifest, target=target)))
    assert "openvino" in caught.value.hint


def test_text_goes_in_and_comes_out(bundle: Callable[[str], Path]) -> None:
    engine = load_engine(bundle("llama-tiny"))
    output = engine.generate(["Hello"], SamplingParams(max_tokens=5, ignore_eos=True))[0]
    assert len(output.token_ids) == 5
    assert output.prompt_tokens == 5  # BOS, H, e, ll, o
    assert output.text == engine.tokenizer.decode(output.token_ids)  # type: ignore[union-attr]
