"""Loading a bundle: KV memory, operators, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llmc.runtime.backends.kv_cache import block_bytes
from llmc.runtime.backends.requirements import check_requirements
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
    other = replace(opened.manifest, operators=(Operator("llmc.Convolution", 1, 2),))
    with pytest.raises(
        BundleError, match=r"needs operator llmc\.Convolution at ABI 1, this llmc has llmc\.AllGather"
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


@pytest.mark.parametrize(
    ("requires", "fault"),
    [
        ({"openvino": "2030.1"}, r"it needs openvino 2030\.1, and 2026\.\S+ is installed"),
        ({"openvino": "2025.4"}, r"it needs openvino 2025\.4, and"),
        ({"onnxruntime": "9"}, r"it needs onnxruntime 9 or newer, and 1\."),
        ({"no-such-library": "1"}, "it needs no-such-library 1 or newer, which is not installed"),
        ({"no-such-library": "1", "numpy": "9.1"}, "no-such-library .*; it needs numpy 9.1 or newer"),
    ],
)
def test_a_cpu_bundle_runs_only_with_the_libraries_it_requires(
    requires: dict[str, str], fault: str, bundle: Callable[[str], Path]
) -> None:
    opened = Bundle.open(bundle("llama-tiny"))
    target = replace(opened.manifest.target, requires=requires)
    with pytest.raises(BackendError, match=fault) as caught:
        load_engine(replace(opened, manifest=replace(opened.manifest, target=target)))
    assert "pip install" in caught.value.hint


@pytest.mark.parametrize("version", ["new", "1.x", ">=1", "1..2", "9" * 5000])
def test_a_required_version_that_is_none_is_refused(version: str) -> None:
    with pytest.raises(BundleError, match="which is not a version"):
        check_requirements({"openvino": version}, "x")


@pytest.mark.parametrize(
    ("library", "wanted", "found", "fits"),
    [
        ("openvino", "2026.4", "2026.4.1", True),
        ("openvino", "2026.4", "2026.4.0.dev20261101", True),
        ("openvino", "2026.4", "2026.40", False),
        ("openvino", "2026.4", "2026.5.0", False),
        ("onnxruntime", "1.32", "1.32.0", True),
        ("onnxruntime", "1.32.0", "1.32", True),
        ("onnxruntime", "1.9", "1.32", True),
        ("onnxruntime", "1.32", "1.9.9", False),
        ("onnxruntime", "1.32", "unknown", False),
    ],
)
def test_which_versions_fit(library: str, wanted: str, found: str, fits: bool) -> None:
    if fits:
        check_requirements({library: wanted}, "x", lambda _: found)
    else:
        with pytest.raises(BackendError, match="cannot run here"):
            check_requirements({library: wanted}, "x", lambda _: found)
