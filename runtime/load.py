"""From a bundle on disk to a serving engine: `load_engine(path)`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmc.plugins.operator import unsupported
from llmc.runtime.backends import load_backend
from llmc.runtime.backends.base import EngineFile, LoadOptions
from llmc.runtime.bundle.manifest import Manifest
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.engine import Engine
from llmc.runtime.errors import BundleError, RequestError
from llmc.runtime.tokenizer import Tokenizer

# Activations that share an int8 scale when `fast` is asked for: as many as the blocks of the weights allow.
# docs/explanation/performance.md has what was tried. OpenVINO rounds none in groups that do not divide a
# block, nor in groups of less than its 16 lanes.
_LARGEST_GROUP, _SMALLEST_GROUP = 128, 16
_INTEGER = re.compile(r"int[48](?:-per-channel|-block(\d+))?")


def load_engine(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    kv_memory: int | None = None,
    max_batch_tokens: int = 2048,
    max_sequences: int = 64,
    threads: int | None = None,
    prefix_cache: bool = True,
    fast: bool = False,
) -> Engine:
    """Opens a bundle (checking it) and loads its engine.

    kv_memory: bytes for the KV cache; by default what `max_sequences` full contexts could use, within a
        quarter of the free memory and 4 GiB. Pages are taken from the system when first written. On a GPU:
        within what is free once the engine is loaded.
    max_batch_tokens: tokens computed in one step at most; longer prompts are prefilled in chunks. Smaller
        steps let running requests go on sooner, larger ones serve more tokens a second.
    threads: CPU threads, by default one for each physical core that the process may use.
    fast: round activations to int8 before they meet int8 or int4 weights (OpenVINO only), and with a u8 KV
        cache compute the rest in bf16 where the CPU can. It is faster and not exact:
        docs/explanation/quantization.md has what it costs. By default arithmetic is fp32.
    Raises BundleError, BackendError, RequestError.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    manifest = opened.manifest
    _check_operators(manifest)
    if manifest.gpu is not None:  # what a step may hold was fixed when the engine was built
        max_sequences = min(max_sequences, manifest.gpu.max_sequences)
        max_batch_tokens = min(max_batch_tokens, manifest.gpu.max_tokens)
    max_sequences = min(max_sequences, max_batch_tokens)
    options = LoadOptions(
        kv_memory=kv_memory,
        max_tokens=max_batch_tokens,
        max_sequences=max_sequences,
        threads=threads,
        activation_group=_activation_group(opened) if fast else None,
    )
    backend = load_backend(EngineFile.of(opened), options)
    directory = opened.tokenizer_dir
    tokenizer = Tokenizer.load(directory) if directory and (directory / "tokenizer.json").is_file() else None
    return Engine(
        backend,
        tokenizer,
        manifest.tokens.eos,
        manifest.limits.max_seq_len,
        max_batch_tokens,
        max_sequences,
        vocab_size=manifest.geometry.vocab_size,
        prefix_cache=prefix_cache,
    )


def _activation_group(opened: Bundle) -> int:
    """What `fast` asks of the backend. Raises RequestError where the flag would do nothing."""
    manifest = opened.manifest
    plan = manifest.quantization or {}
    group = activation_group(formats_of(plan))
    if group < _SMALLEST_GROUP:
        names = " and ".join(formats_of(plan))
        own = "recipe" in plan  # of a checkpoint that came quantized: --quant is not for those
        raise RequestError(
            f"`fast` is for int8 or int4 weights, in blocks of {_SMALLEST_GROUP} or more; {opened.name} has "
            + (f"them in {names}" if names else "no quantized ones"),
            "leave --fast out" + ("" if own else ", or build with --quant int8 or int4"),
        )
    return group


def formats_of(plan: Mapping[str, Any]) -> list[str]:
    """The formats of the weights that a manifest's `quantization` names, which is an open field."""
    formats = plan.get("formats")  # of checkpoints that came quantized, which may mix them
    if isinstance(formats, Mapping):
        return [str(name) for name in formats]
    return [str(plan["format"])] if "format" in plan else []


def activation_group(formats: Sequence[str]) -> int:
    """The largest group, up to 128, that divides the blocks of all int8 and int4 formats; 0 without any.

    A format with a scale for a whole row has no blocks.
    """
    found = [match for name in formats if (match := _INTEGER.fullmatch(name))]
    blocks = [int(match[1] or (32 if match[0] == "int4" else 0)) for match in found]
    return math.gcd(_LARGEST_GROUP, *blocks) if found else 0


def _check_operators(manifest: Manifest) -> None:
    """Raises BundleError if the engine uses an operator that this runtime lacks, at that ABI."""
    if missing := unsupported((one.name, one.abi) for one in manifest.operators):
        raise BundleError(missing[0], "build the bundle again with this llmc")
