"""The pipelines: every graph pass of a build, in order, from the traced graph to one engine's file."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from llmc.passes.canonicalize.fold_expands import FoldExpands
from llmc.passes.canonicalize.fold_reshapes import FoldReshapes
from llmc.passes.canonicalize.fuse_linears import FuseLinears, FusionPlan
from llmc.passes.canonicalize.fuse_partial_rope import FusePartialRope
from llmc.passes.canonicalize.gather_logits import GatherLogits
from llmc.passes.canonicalize.gather_rows import GatherRows
from llmc.passes.canonicalize.lower_experts import LowerExperts
from llmc.passes.canonicalize.lower_head_linears import LowerHeadLinears
from llmc.passes.canonicalize.lower_layers import LowerLinear, LowerRMSNorm
from llmc.passes.canonicalize.lower_rope import LowerRope
from llmc.passes.canonicalize.number_tokens import NumberTokens
from llmc.passes.canonicalize.pack_tokens import PackTokens
from llmc.passes.canonicalize.page_attention import PageAttention
from llmc.passes.canonicalize.sink_transposes import SinkTransposes
from llmc.passes.contract import Pass
from llmc.passes.legalize.attach_bodies import AttachBodies
from llmc.passes.legalize.drop_activation_quantization import DropActivationQuantization
from llmc.passes.legalize.emulate_16bit import RoundOutputs, RoundSoftmax, WidenCaches
from llmc.passes.legalize.factor_rotary_tables import FactorRotaryTables
from llmc.passes.legalize.finalize import Finalize
from llmc.passes.legalize.keep_16bit_weights import Keep16BitWeights, NarrowPlan
from llmc.passes.legalize.lower_partial_embedding import LowerPartialEmbedding
from llmc.passes.legalize.mxfp4_weights import DoubleFP4Weights, FloatScales
from llmc.passes.legalize.require_dtype import RequireDtype
from llmc.passes.legalize.unname_dims import UnnameDims
from llmc.passes.legalize.unpack_fp4_weights import UnpackFP4Weights
from llmc.passes.legalize.widen_int8_weights import WidenInt8Weights
from llmc.passes.legalize.widen_logits import WidenLogits
from llmc.passes.legalize.widen_norms import WidenNorms
from llmc.passes.legalize.widen_quantized_caches import WidenQuantizedCaches
from llmc.passes.quantize.plan import QuantPlan
from llmc.passes.quantize.quantize_kv_cache import QuantizeKVCache
from llmc.passes.quantize.quantize_linears import QuantizeLinears
from llmc.passes.quantize.untie_head import UntieHead
from llmc.passes.shard.shard import Shard
from llmc.passes.shard.stages import CutStage
from llmc.passes.shard.stages import Stage as PipelineStage
from llmc.passes.spec import Stage
from llmc.plugins.paged_attention.spec import QuantizedCache

# The dtypes of graphs for TensorRT. Engines compute in 16 bits. Tests compare a whole graph in fp32.
DTYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16, "fp32": ir.DataType.FLOAT}


def canonicalize(fusion: FusionPlan = FusionPlan()) -> list[Pass]:  # noqa: B008 (it is frozen)
    """Return the passes from a traced graph to the canonical one.

    fusion: the linear layers that must stay apart.
    """
    return [
        # 1. Attention: from one sequence without a cache to packed sequences with a paged cache.
        NumberTokens(),  # first: later passes only know position_ids
        GatherRows(),  # later passes only handle Gather
        FusePartialRope(),  # before LowerRope, which lowers what it fuses
        FoldExpands(),  # before LowerRope: it finds repeated heads behind a TracedRope
        LowerRope(),  # it leaves transposes
        SinkTransposes(),  # before paging, which consumes the transposes that reach it
        PageAttention(),
        # 2. Tokens: only attention mixes them, so the batch axis can go once attention is paged.
        PackTokens(),
        LowerHeadLinears(),  # it leaves reshapes
        FoldReshapes(),  # the rewrites above leave pairs of reshapes around attention
        # 3. Layers: standard operators, now that activations are [T, features].
        LowerLinear(),
        LowerRMSNorm(),
        LowerExperts(),
        FuseLinears(fusion),  # after LowerLinear: it joins Gemms
        # 4. Output: needs the lm_head as a Gemm.
        GatherLogits(),
    ]


def quantize(plan: QuantPlan | None, cache: QuantizedCache | None) -> list[Pass]:
    """Return the passes from a canonical graph to a quantized one; none if nothing is quantized."""
    linears: list[Pass] = []
    if plan is not None:
        linears = [
            UntieHead(plan),  # first: only one Gemm may read a quantized weight
            QuantizeLinears(plan),
        ]
    return [*linears, *([QuantizeKVCache(cache)] if cache else [])]


def shard(rank: int, tp: int, stages: Sequence[PipelineStage] = (), *, logits: bool = True) -> list[Pass]:
    """Return the passes from a quantized graph to the part of it that a rank computes.

    rank: 0 .. tp - 1 in the first stage, tp .. 2 x tp - 1 in the second one, and so on
    tp: the ranks of a stage
    stages: the stages of a pipeline; none: every rank has all layers
    logits: see `CutStage`
    """
    stage, place = divmod(rank, tp)
    passes: list[Pass] = [Shard(place, tp)] if tp > 1 else []
    if stages:
        passes.append(CutStage(stages, stage, place, tp, logits))  # last: collectives need no stages
    return passes


def legalize_native(narrow: NarrowPlan) -> list[Pass]:
    """Return the passes from a quantized fp32 graph to the one that is lowered to a native program.

    narrow: the matrices that stay 16-bit
    """
    return [
        Keep16BitWeights(narrow),
        Finalize(Stage.FOR_NATIVE),
    ]


def legalize_openvino(narrow: NarrowPlan) -> list[Pass]:
    """Return the passes from a quantized fp32 graph to the one that OpenVINO runs.

    narrow: the matrices that stay 16-bit
    """
    return [
        DoubleFP4Weights(),  # MXFP4 as int8, which OpenVINO keeps compressed
        Keep16BitWeights(narrow),  # OpenVINO widens them in registers
        AttachBodies(),  # so that ONNX Runtime can run the file too
        Finalize(Stage.FOR_OPENVINO),
    ]


def legalize_onnxruntime() -> list[Pass]:
    """Return the passes from a quantized fp32 graph to ONNX Runtime's."""
    return [
        DoubleFP4Weights(),  # before UnpackFP4Weights: int8 needs no unpacking
        UnpackFP4Weights(),  # ONNX Runtime has no 4-bit floats
        WidenInt8Weights(),  # two DequantizeLinear would become an int8 product that overflows
        AttachBodies(),
        Finalize(Stage.FOR_ONNXRUNTIME),
    ]


def legalize_tensorrt(dtype: str) -> list[Pass]:
    """Return the passes from a quantized graph traced in `dtype` (a key of DTYPES) to TensorRT's.

    `tensorrt_boundary.to_tensorrt` then replaces llmc's operators. The parser takes these operators unchanged
    (TensorRT-RTX 1.7.1, 2026-11-23): RotaryEmbedding over [T, heads, 1, D] without position ids,
    RMSNormalization (statistics in fp32, rounded before the weight, as in Llama), Gather with int32 indices,
    Split, Gemm.
    """
    narrow = DTYPES[dtype]
    return [
        RequireDtype(narrow, dtype),  # first: no other pass checks the graph's dtype
        LowerPartialEmbedding(),  # of one of several ranks
        FloatScales(),  # MXFP4: the parser takes no E8M0
        WidenNorms(),
        FactorRotaryTables(),
        WidenLogits(),
        UnnameDims(),  # after WidenLogits, which adds an output
        Finalize(Stage.FOR_TENSORRT),  # last: sorts the nodes
    ]


def oracle(dtype: str, round_cache: bool) -> list[Pass]:
    """Return the passes that turn a clone of TensorRT's graph into a stand-in that ONNX Runtime runs.

    dtype: the dtype that the engine computes in. With "fp32" nothing is rounded.
    round_cache: False computes with caches in that dtype in place of quantized ones.
    The stand-in refers to the same external data, so its file must be in the directory of the original.
    """
    rounding: list[Pass] = []
    narrow = DTYPES[dtype]
    if narrow != ir.DataType.FLOAT:
        rounding = [
            WidenCaches(narrow),  # before RoundOutputs, which would round the contents of the caches twice
            RoundOutputs(narrow),
            RoundSoftmax(narrow),  # after AttachBodies: it edits attention's body
        ]
    return [
        UnpackFP4Weights(),
        # Before RoundOutputs: this pass rounds to the element type of the caches, not to `dtype`.
        WidenQuantizedCaches(rounded=round_cache),
        AttachBodies(),
        *rounding,
        Finalize(Stage.ORACLE),
    ]


def exact_activations() -> list[Pass]:
    """Return the passes that drop activation quantization from a clone of a CPU graph.

    Such a graph can be verified to the bounds of fp32.
    """
    return [DropActivationQuantization()]
