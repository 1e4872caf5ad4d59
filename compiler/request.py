"""The request for a build: one frozen object that the command line passes to the driver."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmc.plugins.paged_attention.spec import QUANTIZED_CACHES, QuantizedCache
from llmc.runtime.errors import BuildError, RequestError


@dataclass(frozen=True)
class TargetOptions:
    """The choices that a target offers."""

    #: The compute dtypes, the default first.
    dtypes: tuple[str, ...]
    #: Value of --kv-dtype -> the name of that KV cache. In manifests OpenVINO's int8 cache is called u8.
    caches: Mapping[str, str]


TARGETS: Mapping[str, TargetOptions] = {
    "cpu": TargetOptions(("fp32",), {"fp16": "fp16", "int8": "int8"}),
    "tensorrt-rtx": TargetOptions(("bf16", "fp16"), {"fp8": "fp8"}),
    "tensorrt": TargetOptions(("bf16", "fp16"), {"fp8": "fp8"}),
}
AUTO: Literal["auto"] = "auto"  # of --tp: the fewest ranks that --rank-memory can hold
ENGINES = ("native", "openvino", "onnxruntime")  # of the target cpu, in the order of preference
MAX_TP, MAX_PP, MAX_RANKS = 64, 64, 256
METHODS = ("max", "percentile", "mse")  # the calibration methods, the default first
ROUNDINGS = ("auto", "gptq", "nearest")
DTYPES = ("auto", "fp32", "bf16", "fp16")
KV_DTYPES = ("auto", *sorted({name for options in TARGETS.values() for name in options.caches}))


@dataclass(frozen=True)
class BuildRequest:
    """The options of a build. Raises BuildError or RequestError for an invalid value."""

    #: A directory or a Hugging Face hub id.
    checkpoint: str
    #: The path of the bundle to write.
    output: Path
    #: One of TARGETS.
    target: str = "cpu"
    #: The engine that runs the model on the CPU, one of ENGINES. None: llmc chooses.
    engine: str | None = None
    #: The compute dtype. `auto`: fp32 on the CPU; on a GPU fp16 for fp16 checkpoints, else bf16.
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    #: The format of the linear layers' weights; None: unquantized.
    quant: str | None = None
    #: Modules that are not quantized, as shell patterns.
    exclude: tuple[str, ...] = ()
    #: A text to calibrate on, or the table (.json) of an earlier build. None: llmc's text, if the format
    #: needs calibration.
    calibration: Path | None = None
    #: The clip range of static activations: the largest magnitude, a percentile, or the least squared error.
    calibration_method: Literal["max", "percentile", "mse"] = "max"
    #: How weights are rounded. `auto`: by GPTQ if the build calibrates on a text, else to nearest.
    rounding: Literal["auto", "gptq", "nearest"] = "auto"
    #: The dtype of the KV cache. `auto`: the compute dtype. TARGETS lists the others.
    kv_dtype: str = "auto"
    #: The compute capabilities of the GPUs, 89 for 8.9. Empty: portable.
    sms: tuple[int, ...] = ()
    #: The largest length of a sequence (prompt and answer) in tokens. None: the model's context length.
    max_seq_len: int | None = None
    #: The number of ranks that each compute a part of every layer (tensor parallelism). AUTO: the fewest, of
    #: those that get as many heads each, whose `rank_memory` holds the model and a sequence of the context.
    tp: int | Literal["auto"] = 1
    #: The number of groups of ranks that each have some of the layers (pipeline parallelism).
    pp: int = 1
    #: The memory of each rank in bytes: of its GPU, or its share of a machine. None: any.
    rank_memory: int | None = None
    #: A branch, tag or commit of the hub repository.
    revision: str | None = None
    #: Compare the engine with transformers, and fail the build if they differ.
    verify: bool = True
    #: Replace an existing bundle.
    force: bool = False

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise BuildError(
                f"there is no target {self.target!r}", f"known targets: {', '.join(TARGETS)}", "target"
            )
        if self.dtype not in DTYPES:
            raise BuildError(
                f"there is no dtype {self.dtype!r}", f"known dtypes: {', '.join(DTYPES)}", "dtype"
            )
        if self.engine is not None and self.engine not in ENGINES:
            raise BuildError(
                f"there is no engine {self.engine!r}", f"known engines: {', '.join(ENGINES)}", "engine"
            )
        if self.engine is not None and self.target != "cpu":
            raise BuildError(
                f"--engine is for --target cpu, and the target is {self.target}",
                "leave --engine out",
                "engine",
            )
        options = TARGETS[self.target]
        if self.dtype not in ("auto", *options.dtypes):
            possible = " or ".join(options.dtypes)
            raise BuildError(
                f"the target {self.target} does not compute in {self.dtype}",
                f"--dtype auto, {possible}",
                "dtype",
            )
        if self.kv_dtype not in KV_DTYPES:
            raise BuildError(
                f"there is no KV cache of {self.kv_dtype!r}", f"known: {', '.join(KV_DTYPES)}", "kv_dtype"
            )
        if self.kv_dtype not in ("auto", *options.caches):
            raise BuildError(
                f"the target {self.target} has no KV cache of {self.kv_dtype}",
                f"--kv-dtype {' or '.join(options.caches)}, or leave it out",
                "kv_dtype",
            )
        if self.exclude and self.quant is None:
            raise BuildError("--exclude needs quantization", "add --quant FORMAT", "exclude")
        if self.calibration_method not in METHODS:
            raise BuildError(
                f"there is no calibration method {self.calibration_method!r}",
                f"known: {', '.join(METHODS)}",
                "calibration_method",
            )
        if self.calibration_method != METHODS[0] and self.quant is None:
            raise RequestError(
                f"--calibration-method {self.calibration_method} needs activation quantization",
                "leave it out, or add --quant with a format that quantizes activations, such as fp8",
                "calibration_method",
            )
        if self.rounding not in ROUNDINGS:
            raise BuildError(
                f"there is no rounding {self.rounding!r}", f"known: {', '.join(ROUNDINGS)}", "rounding"
            )
        if self.rounding != "auto" and self.quant is None:
            raise BuildError("--rounding needs quantization", "add --quant FORMAT", "rounding")
        if self.calibration is not None and self.quant is None and not quantized_cache(self):
            raise BuildError("--calibration needs quantization", "add --quant FORMAT", "calibration")
        if self.sms and self.target == "cpu":
            raise BuildError("--sm names GPUs, and the target is the CPU", "add --target tensorrt-rtx", "sms")
        tp = 1 if self.tp == AUTO else self.tp
        for name, count, what, most in (("tp", tp, "ranks", MAX_TP), ("pp", self.pp, "stages", MAX_PP)):
            if not 1 <= count <= most:
                raise BuildError(f"--{name} is {count}", f"give a number of {what}, 1 to {most}", name)
        if self.tp != 1 and self.engine not in (None, "native"):
            raise BuildError(
                f"--tp is for the native engine and TensorRT, not for {self.engine}",
                "leave --tp out, or --engine",
                "tp",
            )
        if self.pp > 1 and self.engine not in (None, "native"):
            raise BuildError(
                f"--pp is for the native engine and TensorRT, not for {self.engine}",
                "leave --pp out, or --engine",
                "pp",
            )
        if tp * self.pp > MAX_RANKS:
            raise BuildError(
                f"--tp {tp} and --pp {self.pp} make {tp * self.pp} ranks",
                f"choose both so that there are at most {MAX_RANKS}",
                "pp",
            )
        if self.tp == AUTO and self.rank_memory is None:
            raise BuildError(
                "--tp auto needs the memory of a rank: of its GPU, or its share of a machine",
                "add --rank-memory SIZE, such as 24GB",
                "rank_memory",
            )
        if self.rank_memory is not None and self.rank_memory < 1:
            raise BuildError(
                f"--rank-memory is {self.rank_memory} bytes",
                "give a size such as 24GB or 22.5GiB",
                "rank_memory",
            )
        if self.max_seq_len is not None and self.max_seq_len < 1:
            raise BuildError(
                f"--max-seq-len is {self.max_seq_len}", "give a number of tokens, at least 1", "max_seq_len"
            )


def compute_dtype(request: BuildRequest, checkpoint_dtype: str) -> str:
    """Return the engine's compute dtype for a checkpoint of `checkpoint_dtype` (torch's name)."""
    if request.dtype != "auto":
        return request.dtype
    dtypes = TARGETS[request.target].dtypes
    return "fp16" if checkpoint_dtype == "float16" and "fp16" in dtypes else dtypes[0]


def cache_dtype(request: BuildRequest, dtype: str) -> str:
    """Return the manifest's name of the KV cache of an engine that computes in `dtype`."""
    return TARGETS[request.target].caches.get(request.kv_dtype, dtype)


def quantized_cache(request: BuildRequest) -> QuantizedCache | None:
    """Return the format of the engine's quantized KV cache; None if the cache is not quantized."""
    return QUANTIZED_CACHES.get(cache_dtype(request, "auto"))


def parse_sms(text: str) -> tuple[int, ...]:
    """Return the compute capabilities, sorted: "86,89,120" -> (86, 89, 120).

    Raises BuildError for a part that is not a number.
    """
    parts = [part.strip().lower().removeprefix("sm").lstrip("_") for part in text.split(",") if part.strip()]
    if bad := [part for part in parts if not part.isdigit()]:
        raise BuildError(
            f"--sm {text}: {bad[0]!r} is not a compute capability", "write them as in --sm 86,89,120", "sms"
        )
    return tuple(sorted({int(part) for part in parts}))


def parse_tp(text: str) -> int | Literal["auto"]:
    """Return the value of --tp: a number, or AUTO. Raises BuildError for anything else."""
    if text == AUTO:
        return AUTO
    try:
        return int(text)
    except ValueError as error:
        raise BuildError(
            f"--tp is {text!r}", f"give a number of ranks, 1 to {MAX_TP}, or auto", "tp"
        ) from error


def parse_memory(text: str) -> int:
    """Return a size in bytes: "24GB" -> 24 x 10^9, "22.5GiB" -> 22.5 x 2^30.

    Raises BuildError for a text that is not a size, or has no unit.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT])(i?)B", text.strip(), re.ASCII | re.IGNORECASE)
    if match is None:
        raise BuildError(
            f"--rank-memory is {text!r}",
            "give a size in GB, which are 10^9 bytes, as those of a GPU of 24GB; or in GiB",
            "rank_memory",
        )
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** (" KMGT".index(unit.upper())))
