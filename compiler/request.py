"""The request for a build: one frozen object from the command line to the driver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmc.plugins.paged_attention.spec import QUANTIZED_CACHES, QuantizedCache
from llmc.runtime.errors import BuildError, RequestError


@dataclass(frozen=True)
class TargetOptions:
    """The choices that a target offers."""

    #: What an engine computes in, the default first.
    dtypes: tuple[str, ...]
    #: Value of --kv-dtype -> what the manifest calls that KV cache.
    caches: Mapping[str, str]


TARGETS: Mapping[str, TargetOptions] = {
    "cpu": TargetOptions(("fp32",), {"int8": "u8"}),
    "tensorrt-rtx": TargetOptions(("bf16", "fp16"), {"fp8": "fp8"}),
    "tensorrt": TargetOptions(("bf16", "fp16"), {"fp8": "fp8"}),
}
METHODS = ("max", "percentile", "mse")  # of calibration, the default first
DTYPES = ("auto", "fp32", "bf16", "fp16")
KV_DTYPES = ("auto", *sorted({name for options in TARGETS.values() for name in options.caches}))


@dataclass(frozen=True)
class BuildRequest:
    """checkpoint: a directory or a hub id. output: the bundle to write.

    dtype: what the engine computes in; `auto` is fp32 on the CPU, where nothing else is exact, and on a GPU
    the checkpoint's own 16-bit dtype, bf16 for others.
    quant: the format of the linear layers' weights, None as they are; exclude: modules to leave as they are,
    shell patterns.
    calibration: a text that the layers' inputs are measured on, or a table (.json) of what an earlier build
    measured; None is a text of llmc's own, where the format needs one. calibration_method: how the range of
    static activations is taken from what was measured: the largest, a percentile, the least squared error;
    for formats that quantize activations.
    kv_dtype: what the KV cache holds; `auto` is what the engine computes in; TARGETS has the others.
    sms: the GPUs' compute capabilities, 89 meaning 8.9; none means portable.
    max_seq_len: prompt and answer together, in tokens; None is the model's own context.
    verify: compare the engine with transformers, and fail the build when they differ.
    force: replace an existing bundle.
    Raises BuildError or RequestError for an invalid value.
    """

    checkpoint: str
    output: Path
    target: str = "cpu"
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    quant: str | None = None
    exclude: tuple[str, ...] = ()
    calibration: Path | None = None
    calibration_method: Literal["max", "percentile", "mse"] = "max"
    kv_dtype: str = "auto"
    sms: tuple[int, ...] = ()
    max_seq_len: int | None = None
    revision: str | None = None
    verify: bool = True
    force: bool = False

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise BuildError(f"there is no target {self.target!r}", f"known targets: {', '.join(TARGETS)}")
        if self.dtype not in DTYPES:
            raise BuildError(f"there is no dtype {self.dtype!r}", f"known dtypes: {', '.join(DTYPES)}")
        options = TARGETS[self.target]
        if self.dtype not in ("auto", *options.dtypes):
            possible = " or ".join(options.dtypes)
            raise BuildError(
                f"the target {self.target} does not compute in {self.dtype}", f"--dtype auto, {possible}"
            )
        if self.kv_dtype not in KV_DTYPES:
            raise BuildError(f"there is no KV cache of {self.kv_dtype!r}", f"known: {', '.join(KV_DTYPES)}")
        if self.kv_dtype not in ("auto", *options.caches):
            raise BuildError(
                f"the target {self.target} has no KV cache of {self.kv_dtype}",
                f"--kv-dtype {' or '.join(options.caches)}, or leave it out",
            )
        if self.exclude and self.quant is None:
            raise BuildError("--exclude is about quantization, and there is none", "add --quant FORMAT")
        if self.calibration_method not in METHODS:
            raise BuildError(
                f"there is no calibration method {self.calibration_method!r}", f"known: {', '.join(METHODS)}"
            )
        if self.calibration_method != METHODS[0] and self.quant is None:
            raise RequestError(
                f"--calibration-method {self.calibration_method} needs activation quantization",
                "leave it out, or add --quant with a format that quantizes them, such as fp8",
            )
        if self.calibration is not None and self.quant is None and not quantized_cache(self):
            raise BuildError("--calibration is about quantization, and there is none", "add --quant FORMAT")
        if self.sms and self.target == "cpu":
            raise BuildError("--sm names GPUs, and the target is the CPU", "add --target tensorrt-rtx")
        if self.max_seq_len is not None and self.max_seq_len < 1:
            raise BuildError(f"--max-seq-len is {self.max_seq_len}", "give a number of tokens, at least 1")


def compute_dtype(request: BuildRequest, checkpoint_dtype: str) -> str:
    """Return what the engine computes in, for a checkpoint of `checkpoint_dtype` (torch's name)."""
    if request.dtype != "auto":
        return request.dtype
    dtypes = TARGETS[request.target].dtypes
    return "fp16" if checkpoint_dtype == "float16" and "fp16" in dtypes else dtypes[0]


def cache_dtype(request: BuildRequest, dtype: str) -> str:
    """Return what the KV cache of an engine that computes in `dtype` holds, as the manifest names it."""
    return TARGETS[request.target].caches.get(request.kv_dtype, dtype)


def quantized_cache(request: BuildRequest) -> QuantizedCache | None:
    """Return the cache of codes with scales that the engine gets; None: its cache has no scales."""
    return QUANTIZED_CACHES.get(cache_dtype(request, "auto"))


def parse_sms(text: str) -> tuple[int, ...]:
    """`--sm 86,89,120` -> (86, 89, 120). Raises BuildError for what is no number."""
    parts = [part.strip().lower().removeprefix("sm").lstrip("_") for part in text.split(",") if part.strip()]
    if bad := [part for part in parts if not part.isdigit()]:
        raise BuildError(
            f"--sm {text}: {bad[0]!r} is not a compute capability", "write them as in --sm 86,89,120"
        )
    return tuple(sorted({int(part) for part in parts}))
