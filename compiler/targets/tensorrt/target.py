"""The targets `tensorrt-rtx` and `tensorrt`: a TensorRT engine with our attention plugin and its kernels.

tensorrt-rtx   builds without a GPU, for a list of compute capabilities or, without one, portably for Ampere
               and newer; it has no code for data-centre Hopper and Blackwell (SM90, SM100).
tensorrt       has it, and builds for the GPU of the machine it runs on only.

Everything else is shared. The engine holds the weights, so the bundle keeps neither them nor the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

import onnx_ir as ir

from llmc.compiler.bundle_writer import BundleWriter
from llmc.compiler.checkpoint.safetensors import TensorRef
from llmc.compiler.progress import Progress
from llmc.compiler.request import BuildRequest
from llmc.compiler.targets import capability
from llmc.compiler.targets.base import GRAPH_FILE, Finished, PhaseClock
from llmc.compiler.targets.tensorrt import build, kernels
from llmc.compiler.targets.tensorrt.build import EngineJob, EngineLimits
from llmc.compiler.verify import available_memory
from llmc.compiler.verify.prove import prove
from llmc.compiler.weights.write import WEIGHTS_FILE
from llmc.passes.geometry import attention_nodes
from llmc.passes.legalize.emulate_16bit import KV_ORACLE_FILE, ORACLE_FILE, oracle_model
from llmc.passes.legalize.finalize import serialize
from llmc.passes.legalize.lower_for_tensorrt import lower_for_tensorrt, without_functions
from llmc.passes.quantize import quantize_kv_cache
from llmc.runtime.bundle.manifest import Gpu, Target, Verification
from llmc.runtime.errors import BuildError, UnsupportedError

if TYPE_CHECKING:
    from llmc.compiler.driver import Plan

PLAN_FILE = "engines/rank0.plan"
_BF16_FROM = 80
_COMPARED = "the graph that TensorRT is given, in ONNX Runtime with the same roundings"


@dataclass(frozen=True)
class Flavor:
    """One of the two TensorRTs. name: the target, the engine and the package on PyPI; library: the module."""

    name: str
    library: str
    compute_capabilities: tuple[int, ...]
    builds_without_gpu: bool


RTX = Flavor("tensorrt-rtx", "tensorrt_rtx", (75, 80, 86, 89, 120, 121), True)
ENTERPRISE = Flavor("tensorrt", "tensorrt", (75, 80, 86, 89, 90, 100, 103, 120, 121), False)
FLAVORS = {flavor.name: flavor for flavor in (RTX, ENTERPRISE)}


class TensorRTTarget:
    """Computes in bf16 or fp16 on NVIDIA GPUs."""

    def __init__(self, flavor: Flavor) -> None:
        self.flavor = flavor
        self._sms: tuple[int, ...] = ()

    def check(self, request: BuildRequest, dtype: str) -> tuple[int, ...]:
        """See `TargetCompiler`. Libraries come last: what could never work is said first."""
        flavor = self.flavor
        if request.sms or flavor.builds_without_gpu:
            self._check_gpus(request, dtype, request.sms)
        if not build.is_installed(flavor.library):
            raise BuildError(
                f"the target {flavor.name} needs the package {flavor.name}", f"pip install {flavor.name}"
            )
        if flavor.builds_without_gpu:
            self._sms = request.sms
        else:
            self._sms = _this_gpu(request.sms)
            self._check_gpus(request, dtype, self._sms)
        return self._sms

    def _check_gpus(self, request: BuildRequest, dtype: str, sms: tuple[int, ...]) -> None:
        """Raises UnsupportedError if one of them lacks what is asked for; none: a portable engine's do."""
        flavor = self.flavor
        if unknown := [sm for sm in sms if sm not in flavor.compute_capabilities]:
            known = ", ".join(map(str, flavor.compute_capabilities))
            other = next((f for f in FLAVORS.values() if unknown[0] in f.compute_capabilities), None)
            hint = f"--target {other.name} does" if other else f"it knows SM {known}"
            raise UnsupportedError(f"{flavor.name} builds no engine for SM{unknown[0]}", hint)
        if dtype == "bf16" and (old := [sm for sm in sms if sm < _BF16_FROM]):
            raise UnsupportedError(f"SM{old[0]} has no bf16", "leave this GPU out of --sm")
        kernels.check(sms)
        if request.quant:
            capability.check(request.quant, request.target, sms)

    def head_format(self, fmt: str) -> str | None:
        del fmt
        return None

    def lower(self, model: ir.Model, dtype: str, tensors: Mapping[str, TensorRef]) -> Target:
        del tensors  # the engine stores its weights in the dtype that it computes in
        lower_for_tensorrt(model, dtype)
        return Target(
            name=self.flavor.name,  # type: ignore[arg-type]  # a key of FLAVORS
            engine=self.flavor.name,  # type: ignore[arg-type]
            reason=f"for {describe_sms(self._sms)}",
            requires={self.flavor.name: version(self.flavor.name)},
        )

    def finish(self, plan: Plan, writer: BundleWriter, progress: Progress, phase: PhaseClock) -> Finished:
        _check_memory(plan, progress)
        with phase("verify"):
            record = _verify(plan, writer, progress)
        with phase("compile the GPU kernels"):
            compiled = kernels.compile_into(plan, self._sms, writer, progress)
        if plan.model.functions:
            writer.path(GRAPH_FILE).write_bytes(serialize(without_functions(plan.model)))
        limits = EngineLimits(plan.max_seq_len)
        with phase("build the TensorRT engine"):
            self._build(plan, limits, writer, progress)
        writer.discard(GRAPH_FILE)
        writer.discard(WEIGHTS_FILE)
        gpu = Gpu(self._sms, limits.max_tokens, limits.max_sequences, limits.max_logits, compiled)
        note = "in the engine; tied tensors once"
        return Finished(PLAN_FILE, record, weights_file=False, weights_note=note, gpu=gpu)

    def _build(self, plan: Plan, limits: EngineLimits, writer: BundleWriter, progress: Progress) -> None:
        writer.check_disk_space(plan.weight_bytes)
        job = EngineJob(
            library=self.flavor.library,
            onnx=str(writer.path(GRAPH_FILE)),
            plan=str(writer.path(PLAN_FILE)),
            profile=build.profile(plan.model, limits),
            compute_capabilities=self._sms if self.flavor.builds_without_gpu else (),
        )
        built = build.build(job, progress)
        writer.add_hash(PLAN_FILE, built.plan_sha256, built.plan_bytes)
        if built.attention_layers != (expected := len(attention_nodes(plan.model))):
            raise BuildError(
                f"TensorRT made {built.attention_layers} attention plugins of {expected} layers",
                "please report this with the model's config.json",
            )


def _verify(plan: Plan, writer: BundleWriter, progress: Progress) -> Verification:
    """The proof is of the graph with its cache in the model's dtype; what FP8 loses is measured beside it."""
    criteria = {"dtype": plan.dtype, "compared": _COMPARED}
    oracle, rounded = writer.path(ORACLE_FILE), writer.path(KV_ORACLE_FILE)
    oracle.write_bytes(serialize(oracle_model(plan.model, plan.dtype, round_cache=False)))
    if plan.kv_dtype == quantize_kv_cache.FP8:
        rounded.write_bytes(serialize(oracle_model(plan.model, plan.dtype)))
        criteria |= {"kv_engine": str(rounded), "kv_dtype": plan.kv_dtype}
    record = prove(plan, oracle, "onnxruntime", progress, **criteria)
    if plan.kv_dtype == quantize_kv_cache.FP8:
        writer.discard(KV_ORACLE_FILE)
    writer.discard(ORACLE_FILE)
    return record


def _check_memory(plan: Plan, progress: Progress) -> None:
    needed, available = build.memory_needed(plan.weight_bytes), available_memory()
    progress.note(f"the TensorRT build needs about {needed / 2**30:.1f} GiB of memory")
    if available is not None and needed > available:
        raise BuildError(
            f"the TensorRT build needs about {needed / 2**30:.1f} GiB of memory, "
            f"{available / 2**30:.1f} GiB are available",
            "build on a larger machine: the bundle does not have to run there",
        )


def describe_sms(sms: tuple[int, ...]) -> str:
    """What an engine runs on, in words."""
    if not sms:
        return "NVIDIA GPUs from Ampere on (portable)"
    return f"NVIDIA GPUs of compute capability {', '.join(f'{sm // 10}.{sm % 10}' for sm in sms)}"


def _this_gpu(wanted: tuple[int, ...]) -> tuple[int, ...]:
    """The compute capability of the GPU here, which must be the one that is asked for, if any is."""
    try:
        from llmc.plugins.paged_attention.cuda_kernels import CudaError
        from llmc.runtime.backends.tensorrt.cuda import probe
    except ImportError as error:
        raise BuildError(f"the target tensorrt needs {error.name}", "pip install cuda-python") from error
    try:
        device = probe()
    except CudaError as error:
        raise BuildError(
            f"the target tensorrt builds on a machine with an NVIDIA GPU only: {error}",
            "--target tensorrt-rtx builds without one, for SM80, 86, 89, 120 and 121",
        ) from error
    if wanted and wanted != (device.sm,):
        raise UnsupportedError(
            f"the target tensorrt builds for the GPU that is here, SM{device.sm}",
            f"leave --sm out, or build on a machine with SM{wanted[0]}",
        )
    return (device.sm,)
