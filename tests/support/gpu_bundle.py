"""A GPU bundle of a model of two layers: its manifest, its files, its engine's tensors and its steps.

With LLMC_TEST_RANKS in the environment, the tensors are those of one of several ranks of a stage, and with
LLMC_TEST_STAGES there are stages of a layer each.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llmc.plugins.collectives.tensorrt_plugin import make_plugins
from llmc.plugins.paged_attention import launch, spec
from llmc.plugins.paged_attention.launch import Attention
from llmc.plugins.paged_attention.tensorrt_plugin import make_plugin
from llmc.plugins.sampling import launch as sampling
from llmc.runtime.backends.tensorrt.bindings import Tensor
from llmc.runtime.backends.tensorrt.checks import Device, Step
from llmc.runtime.batch import Batch
from llmc.runtime.bundle.manifest import (
    Engine,
    ExchangeRecord,
    FileRecord,
    Geometry,
    Gpu,
    KernelFile,
    Layer,
    Limits,
    Manifest,
    Operator,
    Parallel,
    Precision,
    Producer,
    RankRecord,
    Source,
    Target,
    Tokens,
    Verification,
    Weights,
)

no_cuda_python = find_spec("cuda") is None
no_tensorrt = find_spec("tensorrt_rtx") is None
needs_packages = pytest.mark.skipif(
    no_cuda_python or no_tensorrt, reason="cuda-python or tensorrt-rtx is not installed"
)
SHA = "0" * 64
PLAN, PLAN_BYTES = "engines/rank0/rank0.plan", b"vtrt" + bytes(60)
VERSIONS = {"tensorrt-rtx": "1.7.1.116", "cuda-python": "13.4.4"}
STEP = Step(max_tokens=512, max_sequences=16)
L40 = Device("NVIDIA L40", 89, (13, 4), 142, 101376)

# A model of two layers, one of them with a sliding window.
HEADS, KV_HEADS, D, DV, VOCAB, MAX_LEN, WINDOW = 4, 2, 32, 16, 53, 1100, 40
# Set for the script that serves several ranks on the stand-ins.
RANKS = int(os.environ.get("LLMC_TEST_RANKS", "1"))
STAGES = int(os.environ.get("LLMC_TEST_STAGES", "1"))
OWN_HEADS, OWN_KV_HEADS = HEADS // RANKS, KV_HEADS // RANKS  # of one rank
LAYERS = (
    Layer("full", 0, KV_HEADS, D, DV),
    Layer("sliding", WINDOW, KV_HEADS, D, DV),
)
ATTENTION = [Attention(OWN_HEADS, OWN_KV_HEADS, D, DV, layer.window) for layer in LAYERS]
# (key_scale, value_scale) of FP8 caches; None: fp16. Set for the script that serves on the stand-ins.
KV_SCALES = (0.03, 0.02) if os.environ.get("LLMC_TEST_FP8_CACHE") else None
CACHE = np.dtype(ml_dtypes.float8_e4m3fn if KV_SCALES else np.float16)
SCALES = dict(zip(("key_scale", "value_scale"), KV_SCALES or (), strict=False))  # as attributes
PAIR = ("fp16", launch.FP8 if KV_SCALES else None)
VARIANTS = [str(v) for v in launch.variants_for(ATTENTION, [PAIR])]
NAMES = ["query", "key", "value", "key_cache", "value_cache"]
NAMES += ["query_start", "past_lengths", "block_indices", "block_begins"]
SCALE = 0.25


def kernel(variant: str, sm: int, kind: Any = "cubin", shared_memory: int = 20000) -> KernelFile:
    name = variant.split("-")[0]
    return KernelFile(variant, sm, kind, f"kernels/{variant}-sm{sm}.{kind}", name, shared_memory, 4, 90)


def kernels(*kinds: tuple[int, str]) -> tuple[KernelFile, ...]:
    return tuple(kernel(variant, sm, kind) for sm, kind in kinds for variant in VARIANTS)


def sampling_kernels(*kinds: tuple[int, str]) -> tuple[KernelFile, ...]:
    made = [kernel(sampling.variant(name), sm, kind, 64) for sm, kind in kinds for name in sampling.ARGUMENTS]
    return tuple(replace(k, num_warps=sampling.configure(k.entry).num_warps) for k in made)


def manifest(**changes: Any) -> Manifest:
    files = kernels((89, "cubin"), (80, "ptx"))
    made = Manifest(
        producer=Producer("0.1.0", {}),
        source=Source("somebody/model", "llama", "LlamaForCausalLM", SHA, "bfloat16", {}),
        geometry=Geometry(len(LAYERS), HEADS, KV_HEADS, D, DV, 64, VOCAB, LAYERS),
        limits=Limits(MAX_LEN),
        precision=Precision("fp16", "fp8" if KV_SCALES else "fp16"),
        target=Target("tensorrt-rtx", "tensorrt-rtx", "", {"tensorrt-rtx": "1.7.1.116"}),
        operators=(Operator("llmc.PagedAttention", spec.ABI_VERSION, len(LAYERS)),),
        tokens=Tokens(None, (0,)),
        passes=(),
        verification=Verification("skipped", "a test"),
        engines=(Engine(0, PLAN),),
        weights=Weights((), 0, "fp16"),
        files={
            PLAN: FileRecord(len(PLAN_BYTES), SHA),
            **{f.file: FileRecord(7, SHA) for f in files},
        },
        gpu=Gpu((), 512, 16, 32, files),
        format_version=2,
    )
    return replace(made, **changes)


def manifest_of_ranks(**changes: Any) -> Manifest:
    """Return the manifest of the same model for two ranks, with a gather and two sums a step.

    With stages: for all their ranks.
    """
    made = manifest()
    tp = RANKS if STAGES > 1 else 2
    plans = [PLAN.replace("rank0.plan", f"rank{rank}.plan") for rank in range(tp * STAGES)]
    counts = {"AllGather": 1, "AllReduce": len(LAYERS)}
    collectives = tuple(Operator(f"llmc.{name}", 1, count) for name, count in counts.items())
    changed = replace(
        made,
        engines=tuple(Engine(rank, plan) for rank, plan in enumerate(plans)),
        operators=(*collectives, *made.operators),
        parallel=Parallel(tp=tp, pp=STAGES, world_size=tp * STAGES),
        files={**made.files, **dict.fromkeys(plans, made.files[PLAN])},
        ranks=tuple(_record(rank // tp) for rank in range(tp * STAGES)) if STAGES > 1 else None,
        format_version=5 if STAGES > 1 else 4,
    )
    return replace(changed, **changes)


def _record(stage: int) -> RankRecord:
    first = stage == 0
    counts = {"AllGather": int(first), "AllReduce": 1} if RANKS > 1 else {}
    found = [ExchangeRecord(name, count, 1, 0) for name, count in counts.items() if count]  # type: ignore[arg-type]
    sent = ExchangeRecord("Send", 1, 96, 0) if first else ExchangeRecord("Send", 1, 0, 4 * VOCAB)
    return RankRecord(stage, stage + 1, (*found, sent))


def gpu_changes(**changes: Any) -> dict[str, Any]:
    gpu = manifest().gpu
    assert gpu is not None
    return {"gpu": replace(gpu, **changes)}


def write_files(folder: Path) -> Path:
    """Write the files of a bundle of `manifest()`, without the manifest, into `folder`. Return `folder`."""
    for name in manifest().files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PLAN_BYTES if name == PLAN else b"\n.version 8.8\n")
    return folder


def own_layers(stage: int) -> range:
    """Return the layers of a stage."""
    return range(len(LAYERS)) if STAGES == 1 else range(stage, stage + 1)


def tensors(cache: str = "FP8" if KV_SCALES else "HALF", stage: int = 0) -> list[Tensor]:
    """Return the tensors of a valid engine, as TensorRT lists them, with caches of that dtype."""
    most = {"input_ids": 512, "position_ids": 512, "query_start": 17, "past_lengths": 16, "block_begins": 17}
    most |= {"block_indices": 16 * 35, "logits_index": 32}
    if STAGES > 1:  # an engine lacks the inputs that it does not read
        del most["position_ids" if stage else "logits_index"]
    made = [Tensor(name, True, "INT32", (-1,), (size,)) for name, size in most.items()]
    for i in own_layers(stage):
        for kind, width in (("key", D), ("value", DV)):
            shape = (-1, OWN_KV_HEADS, 32, width)
            made.append(Tensor(f"{kind}_cache.{i}", True, cache, shape, (1000 + width, *shape[1:])))
            made.append(Tensor(f"{kind}_cache_out.{i}", False, cache, shape))
    if stage < STAGES - 1:
        return [*made, Tensor("sent.0", False, "HALF", (1,))]
    return [*made, Tensor("logits", False, "FLOAT", (-1, VOCAB))]


def batch(past: Sequence[int], new: Sequence[int], wants: Sequence[int] | None = None) -> Batch:
    """Return a step with arbitrary token ids; block tables hold consecutive numbers.

    past, new: tokens of each sequence in the cache, and of this step. wants: the rows of logits; None: the
        last token of each sequence.
    """
    ends = np.cumsum(new)
    need = [-(-(p + n) // 32) for p, n in zip(past, new, strict=True)]
    arrays = (
        np.arange(100, 100 + sum(new)),
        [p + i for p, n in zip(past, new, strict=True) for i in range(n)],
        [0, *ends],
        past,
        range(1, 1 + sum(need)),
        np.cumsum([0, *need]),
        ends - 1 if wants is None else wants,
    )
    return Batch(*(np.array(list(values), np.int32) for values in arrays))


def make_layer(trt: Any, attention: Attention, scale: float) -> Any:
    """Return an attention plugin as an engine holds it, and its creator."""
    values = {name: getattr(attention, name) for name in ("num_heads", "num_kv_heads", "window", "softcap")}
    given = trt.PluginFieldCollection([])
    kinds = {int: (np.int32, trt.PluginFieldType.INT32), float: (np.float32, trt.PluginFieldType.FLOAT32)}
    arrays = []
    for name, value in {**values, "scale": scale, **SCALES}.items():
        dtype, kind = kinds[type(value)]
        arrays.append(np.array([value], dtype))
        given.append(trt.PluginField(name, arrays[-1], kind))
    creator = make_plugin(trt)
    plugin = creator.create_plugin("layer", given, trt.TensorRTPhase.RUNTIME)
    return plugin.attach_to_context(None), creator


def make_collective(trt: Any, sequence: int, operation: str, ranks: int) -> Any:
    """Return a plugin of a collective as an engine holds it, and its creator."""
    return make_exchange(trt, operation, ranks=ranks, sequence=sequence)


def make_exchange(trt: Any, operation: str, **fields: int) -> Any:
    """Return a plugin of a collective or transfer as an engine holds it, and its creator."""
    creator = next(creator for creator in make_plugins(trt) if creator.name == operation)
    given = trt.PluginFieldCollection([])
    arrays = {name: np.array([value], np.int32) for name, value in fields.items()}
    for name, array in arrays.items():
        given.append(trt.PluginField(name, array, trt.PluginFieldType.INT32))
    plugin = creator.create_plugin("collective", given, trt.TensorRTPhase.RUNTIME)
    return plugin.attach_to_context(None), creator


def described(
    trt: Any, tokens: int, sequences: int, blocks: int, entries: int, fp8: bool = KV_SCALES is not None
) -> list[Any]:
    shapes = [(tokens, OWN_HEADS * D), (tokens, OWN_KV_HEADS * D), (tokens, OWN_KV_HEADS * DV)]
    shapes += [(blocks, OWN_KV_HEADS, 32, D), (blocks, OWN_KV_HEADS, 32, DV)]
    shapes += [(sequences + 1,), (sequences,), (entries,), (sequences + 1,)]
    made = []
    for shape in shapes:
        desc = trt.PluginTensorDesc()
        desc.dims, desc.type = trt.Dims(shape), trt.DataType.INT32 if len(shape) == 1 else trt.DataType.HALF
        if fp8 and len(shape) == 4:
            desc.type = trt.DataType.FP8
        made.append(desc)
    return made
