"""Load a bundle as a serving engine: `load_engine(path)`."""

from __future__ import annotations

import os
from dataclasses import asdict

from llmc.plugins.operator import unsupported
from llmc.runtime.arguments import check_count, check_flag
from llmc.runtime.backends import load_backend
from llmc.runtime.backends.base import Backend, EngineFile, LoadOptions
from llmc.runtime.bundle.manifest import Manifest, Sampling
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.engine import Engine
from llmc.runtime.errors import BundleError, RequestError
from llmc.runtime.native.weights import Weights, start_reading
from llmc.runtime.sampling import SamplingParams
from llmc.runtime.tokenizer import Tokenizer


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
    """Open and check a bundle, and load its engine.

    kv_memory: the bytes of the KV cache. The default is enough for `max_sequences` full contexts, within a
        quarter of the free memory and 4 GiB. The system provides pages when they are first written. On a GPU
        the limit is the free memory after the engine is loaded.
    max_batch_tokens: the maximum number of tokens in a step. Longer prompts are prefilled in chunks. Smaller
        steps reduce the latency of running requests, larger steps increase the throughput.
    max_sequences: the maximum number of sequences in a step.
    threads: the number of CPU threads, of all ranks together. The default is one per physical core that the
        process may use, at most the CPU quota of the container. Each rank has at least one.
    prefix_cache: reuse the KV blocks of equal prefixes.
    fast: quantize activations to int8 in layers with int8 or int4 weights (OpenVINO and the native engine).
        With OpenVINO and a u8 KV cache the rest is computed in bf16 if the CPU supports it. This is faster
        but not exact: docs/explanation/quantization.md lists the quantization loss. By default arithmetic
        is fp32.
    Raises BundleError, BackendError, RequestError.
    """
    if not isinstance(bundle, str | os.PathLike | Bundle):
        hint = "give the path of a bundle, such as 'model.llmc'"
        raise RequestError(f"bundle is of type {type(bundle).__name__}", hint, "bundle")
    for name, value in (("kv_memory", kv_memory), ("threads", threads)):
        check_count(name, value, optional=True)
    for name, value in (("max_batch_tokens", max_batch_tokens), ("max_sequences", max_sequences)):
        check_count(name, value)
    for name, value in (("prefix_cache", prefix_cache), ("fast", fast)):
        check_flag(name, value)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    manifest = opened.manifest
    _check_operators(manifest)
    if manifest.gpu is not None:  # the build fixed the limits of a step
        max_sequences = min(max_sequences, manifest.gpu.max_sequences)
        max_batch_tokens = min(max_batch_tokens, manifest.gpu.max_tokens)
    max_sequences = min(max_sequences, max_batch_tokens)
    options = LoadOptions(
        kv_memory=kv_memory,
        max_tokens=max_batch_tokens,
        max_sequences=max_sequences,
        threads=threads,
        activation_group=activation_group(opened) if fast else None,
    )
    weights = None
    if manifest.target.engine == "native":
        rank = 0 if manifest.parallel.world_size > 1 else None
        weights = start_reading(opened.engine_path(), rank)
    directory = opened.tokenizer_dir
    tokenizer = Tokenizer.load(directory) if directory and (directory / "tokenizer.json").is_file() else None
    backend = _load_ranks(opened, options, weights)
    return Engine(
        backend,
        tokenizer,
        manifest.tokens.eos,
        manifest.limits.max_seq_len,
        max_batch_tokens,
        max_sequences,
        vocab_size=manifest.geometry.vocab_size,
        prefix_cache=prefix_cache,
        default_params=default_params(manifest.sampling),
    )


def follow_if_launched(bundle: str | os.PathLike[str] | Bundle, threads: int | None = None) -> int | None:
    """Follow rank 0 if torchrun, mpirun or srun started this process as another rank of a bundle.

    Returns the exit code for this process after the last step, or None if the caller shall load the engine:
    in rank 0, for a bundle of one rank, and without a launcher.

    threads: see `load_engine`
    Raises RankError if the ranks do not meet or the number of processes is not the bundle's, and BundleError.
    """
    from llmc.runtime.parallel.launch import SIZES

    if not any(name in os.environ for name in SIZES):
        return None
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    if opened.manifest.parallel.world_size == 1:
        return None
    from llmc.runtime.parallel.launched import follow_launched

    return follow_launched(opened, threads)


def _load_ranks(opened: Bundle, options: LoadOptions, weights: Weights | None) -> Backend:
    """Load all ranks of a bundle. weights: of rank 0, if a thread reads them already."""
    if opened.manifest.parallel.world_size == 1:
        return load_backend(EngineFile.of(opened, weights), options)
    # Most bundles have one rank.
    from llmc.runtime.parallel.backend import load_parallel
    from llmc.runtime.parallel.launched import launched, load_launched

    if place := launched(opened):
        return load_launched(opened, options, place, weights)
    return load_parallel(opened, options, weights)


def default_params(sampling: Sampling | None) -> SamplingParams:
    """Return the sampling parameters of requests that have none: the bundle's, else greedy decoding."""
    if sampling is None:
        return SamplingParams()
    values = asdict(sampling)
    if not values.pop("do_sample"):
        values["temperature"] = 0.0
    return SamplingParams(**values)


def activation_group(opened: Bundle) -> int:
    """Return how many activations share a scale with `fast`. Raises RequestError if `fast` has no effect."""
    plan = opened.manifest.quantization
    if plan is None:
        raise RequestError(
            f"`fast` is for int8 or int4 weights; {opened.name} has no quantized ones",
            "leave --fast out, or build with --quant int8 or int4",
            "fast",
        )
    group = plan.get("activation_group")
    if group is None:
        raise RequestError(
            f"{opened.name} was built by an older llmc and does not say whether `fast` applies to it",
            "build it again, or leave --fast out",
            "fast",
        )
    if not isinstance(group, int) or group < 1:
        prequantized = "recipe" in plan  # --quant does not apply to pre-quantized checkpoints
        raise RequestError(
            f"`fast` is for int8 or int4 weights, in blocks of 16 or more; {opened.name} has them in "
            f"{plan.get('format')}",
            "leave --fast out" + ("" if prequantized else ", or build with --quant int8 or int4"),
            "fast",
        )
    return group


def _check_operators(manifest: Manifest) -> None:
    """Raise BundleError if the engine uses an operator that this runtime lacks in that ABI version."""
    if missing := unsupported((operator.name, operator.abi) for operator in manifest.operators):
        raise BundleError(missing[0], "build the bundle again with this llmc")
