"""From a bundle on disk to a serving engine: `load_engine(path)`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmc.plugins.paged_attention import spec
from llmc.runtime.backends import load_backend, load_gpu_backend
from llmc.runtime.backends.base import Backend
from llmc.runtime.bundle.manifest import Geometry, Manifest
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.dtypes import BY_NAME
from llmc.runtime.engine import Engine
from llmc.runtime.errors import BundleError, RequestError
from llmc.runtime.tokenizer import Tokenizer

# Activations that share an int8 scale when `fast` is asked for: as many as the blocks of the weights allow.
# docs/explanation/performance.md has what was tried. OpenVINO rounds none in groups that do not divide a
# block, nor in groups of less than its 16 lanes.
_LARGEST_GROUP, _SMALLEST_GROUP = 128, 16
_INTEGER = re.compile(r"int[48](?:-per-channel|-block(\d+))?")
_DEFAULT_SHARE = 0.25  # of the memory that is available now
_DEFAULT_LIMIT = 4 << 30


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
    geometry, limits = manifest.geometry, manifest.limits
    group = _activation_group(opened) if fast else None
    if manifest.gpu is not None:
        max_sequences = min(max_sequences, manifest.gpu.max_sequences)
        max_batch_tokens = min(max_batch_tokens, manifest.gpu.max_tokens)
        backend = load_gpu_backend(
            opened,
            kv_memory=kv_memory,
            max_sequences=min(max_sequences, max_batch_tokens),
            max_batch_tokens=max_batch_tokens,
        )
    else:
        backend = _load_on_cpu(opened, kv_memory, max_sequences, threads, group)
    directory = opened.tokenizer_dir
    tokenizer = Tokenizer.load(directory) if directory and (directory / "tokenizer.json").is_file() else None
    return Engine(
        backend,
        tokenizer,
        manifest.tokens.eos,
        limits.max_seq_len,
        max_batch_tokens,
        min(max_sequences, max_batch_tokens),
        vocab_size=geometry.vocab_size,
        prefix_cache=prefix_cache,
    )


def _activation_group(opened: Bundle) -> int:
    """What `fast` asks of the backend. Raises RequestError where the flag would do nothing."""
    manifest = opened.manifest
    if manifest.gpu is not None:
        raise RequestError(
            f"{opened.name} runs on a GPU; `fast` is about engines for the CPU", "leave --fast out"
        )
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


def _load_on_cpu(
    opened: Bundle, kv_memory: int | None, max_sequences: int, threads: int | None, group: int | None
) -> Backend:
    manifest = opened.manifest
    _check_operators(manifest)
    geometry = manifest.geometry
    block = block_bytes(geometry, manifest.precision.kv_dtype)
    useful = max_sequences * -(-manifest.limits.max_seq_len // geometry.block_size)
    budget = kv_memory if kv_memory is not None else _default_kv_memory()
    num_blocks = min(useful, budget // block)
    if num_blocks < 1:
        raise RequestError(
            f"{budget} bytes of KV cache hold no block of {geometry.block_size} tokens ({block} bytes)",
            f"give at least {block} bytes with --kv-memory",
        )
    return load_backend(
        manifest.target.engine,
        opened.engine_path(),
        num_blocks,
        threads,
        kv_dtype=manifest.precision.kv_dtype,
        activation_group=group,
    )


def block_bytes(geometry: Geometry, kv_dtype: str) -> int:
    """Bytes of one KV block over all layers, keys and values.

    u8 is OpenVINO's cache: a scale and a zero point, fp32, for each channel of a block of keys and for
    each token's value.
    """
    size, layers = geometry.block_size, geometry.layers
    if kv_dtype == "u8":
        return sum(
            one.num_kv_heads * ((size + 8) * one.head_dim + size * (one.v_head_dim + 8)) for one in layers
        )
    elements = sum(one.num_kv_heads * (one.head_dim + one.v_head_dim) for one in layers)
    return elements * size * BY_NAME[kv_dtype].bits // 8


def _check_operators(manifest: Manifest) -> None:
    """Raises BundleError if the engine uses an operator that this runtime lacks, at that ABI."""
    ours = {f"{spec.DOMAIN}.{spec.NAME}": spec.ABI_VERSION}
    for operator in manifest.operators:
        if ours.get(operator.name) != operator.abi:
            raise BundleError(
                f"the engine needs operator {operator.name} at ABI {operator.abi}; this llmc has "
                + ", ".join(f"{name} at ABI {abi}" for name, abi in ours.items()),
                "build the bundle again with this llmc",
            )


def _default_kv_memory() -> int:
    memory = Path("/proc/meminfo")
    if not memory.is_file():
        return _DEFAULT_LIMIT
    line = next(line for line in memory.read_text().splitlines() if line.startswith("MemAvailable:"))
    return min(_DEFAULT_LIMIT, int((int(line.split()[1]) << 10) * _DEFAULT_SHARE))
