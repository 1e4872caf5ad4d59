"""What the process that compares is asked, and what it answers. Both cross a pipe as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from llmc.compiler.verify.engine_weights import EngineWeight

MIN_TOP1 = {"fp32": 1.0, "fp16": 0.99, "bf16": 0.99}  # dtype that the engine computes in -> least agreement
ReferenceWeights = Literal["checkpoint", "dequantized"]


@dataclass(frozen=True)
class Job:
    """What the child is asked to compare.

    tolerance: see `recipe.Recipe`; of fp32 only, as 16 bits are measured against transformers in the same
    dtype. dtype: what the engine computes in, "fp32", "fp16" or "bf16". compared: what stands in for the
    engine, for the record; empty where it is the engine itself. quantized: name of a weight of the checkpoint
    -> what the engine has in its place; it must then reproduce the checkpoint with these, and what they lose
    is recorded. reference_weights: "dequantized" where the checkpoint itself holds quantized weights.
    kv_engine: the engine with its KV cache in kv_dtype, whose loss against `engine` is recorded; "" for none.
    rounding_engine: where layers round their inputs in fp32, the engine that does; `engine` is then the same
    one without that rounding.
    """

    checkpoint: str
    engine: str
    backend: str
    max_seq_len: int
    vocab_size: int
    windows: list[int]
    tolerance: float
    needed_bytes: int
    dtype: str = "fp32"
    compared: str = ""
    quantized: Mapping[str, EngineWeight] = field(default_factory=dict)
    reference_weights: ReferenceWeights = "checkpoint"
    kv_engine: str = ""
    kv_dtype: str = ""
    rounding_engine: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"quantized": {name: one.to_json() for name, one in self.quantized.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        from llmc.compiler.verify.engine_weights import EngineWeight

        quantized = {name: EngineWeight.from_json(one) for name, one in data["quantized"].items()}
        return cls(**{**data, "quantized": quantized})


@dataclass(frozen=True)
class Findings:
    """What the child measured.

    max_logit_error: absolute, over all positions and the whole vocabulary; tolerance: scaled to the
    logits; top1_agreement: share of positions where the engine's best token is the reference's, or as
    good as it within what rounding hides; greedy_equal: None in 16 bits, where texts part at the first near
    tie; rms_ratio: the engine's rms error over that of transformers in the same dtype, None in fp32;
    rounding_ratio: of an fp32 engine that rounds the inputs of layers, the rms difference from the reference
    that rounds them too, over the rms of what that rounding changes; least_top1: what top1_agreement must be,
    where that is not the dtype's own bar.
    """

    max_logit_error: float
    tolerance: float
    top1_agreement: float
    positions: int
    greedy_equal: bool | None
    greedy_tokens: int
    rms_ratio: float | None = None
    details: dict[str, Any] = field(default_factory=dict)
    rounding_ratio: float | None = None
    least_top1: float | None = None


@dataclass(frozen=True)
class Question:
    """What `llmc verify` asks the child: how an engine does on a text.

    engine, backend, max_seq_len, vocab_size: as in Job. tokenizer: a tokenizer.json, "" without one. text: a
    file in UTF-8, "" for the evaluation text. checkpoint: what it is compared with in transformers, "" for
    nothing (only its perplexity is measured then). dequantized: whether that checkpoint is quantized.
    kv_dtype: what the engine's KV cache holds.
    """

    engine: str
    backend: str
    max_seq_len: int
    vocab_size: int
    tokenizer: str
    text: str
    checkpoint: str
    tolerance: float
    reference_weights: ReferenceWeights = "checkpoint"
    kv_dtype: str = "fp32"
