"""The tasks of the comparing process and its answers. Both cross a pipe as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from llmc.compiler.verify.engine_weights import EngineWeight

MIN_TOP1 = {"fp32": 1.0, "fp16": 0.99, "bf16": 0.99}  # by the dtype that the engine computes in
ReferenceWeights = Literal["checkpoint", "dequantized"]


@dataclass(frozen=True)
class Job:
    """A comparison of an engine with its checkpoint."""

    #: The checkpoint's directory.
    checkpoint: str
    #: The engine's file, and the backend that runs it.
    engine: str
    backend: str
    #: Tokens of prompt and answer together.
    max_seq_len: int
    vocab_size: int
    #: Sizes of the model's attention windows.
    windows: list[int]
    #: Largest logit error accepted in fp32 (`recipe.Recipe`). 16 bits are held to transformers' own error.
    tolerance: float
    #: Bytes of memory that the comparison needs.
    needed_bytes: int
    #: What the engine computes in: "fp32", "fp16" or "bf16".
    dtype: str = "fp32"
    #: What stands in for the engine, for the record; "": nothing does.
    compared: str = ""
    #: Name of a weight in the checkpoint -> the engine's quantized weight. The reference uses it as well, and
    #: the quantization loss is recorded.
    quantized: Mapping[str, EngineWeight] = field(default_factory=dict)
    #: "dequantized" for a pre-quantized checkpoint.
    reference_weights: ReferenceWeights = "checkpoint"
    #: The same engine with its KV cache in `kv_dtype`, whose loss against `engine` is recorded; "": none.
    kv_engine: str = ""
    kv_dtype: str = ""
    #: In fp32, the same engine with activation quantization, which `engine` lacks then; "": none.
    quantizing_engine: str = ""
    #: The bundle's tokenizer.json; "": it has none, and the tokens are random.
    tokenizer: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"quantized": {name: one.to_json() for name, one in self.quantized.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        from llmc.compiler.verify.engine_weights import EngineWeight

        quantized = {name: EngineWeight.from_json(one) for name, one in data["quantized"].items()}
        return cls(**{**data, "quantized": quantized})


@dataclass(frozen=True)
class Findings:
    """The figures of a comparison."""

    #: Largest absolute error of a logit, over all positions and the whole vocabulary.
    max_logit_error: float
    #: The bound of that error, scaled to the logits.
    tolerance: float
    #: Share of positions where the engine's best token is the reference's, near ties included.
    top1_agreement: float
    positions: int
    #: None in 16 bits, where texts part at the first near tie.
    greedy_equal: bool | None
    greedy_tokens: int
    #: The engine's rms error over that of transformers in the same dtype; None in fp32.
    rms_ratio: float | None = None
    details: dict[str, Any] = field(default_factory=dict)
    #: In fp32 with activation quantization: rms difference from the reference that quantizes its activations
    #: too, over the rms of what that quantization changes; else None.
    activation_ratio: float | None = None
    #: The bound of top1_agreement where it is not the dtype's own; else None.
    least_top1: float | None = None


@dataclass(frozen=True)
class Question:
    """A measurement of an engine on a text, for `llmc verify`."""

    engine: str
    backend: str
    max_seq_len: int
    vocab_size: int
    #: A tokenizer.json; "": there is none.
    tokenizer: str
    #: A file in UTF-8; "": the evaluation text.
    text: str
    #: The checkpoint to compare with; "": none, only the engine's perplexity is measured.
    checkpoint: str
    tolerance: float
    reference_weights: ReferenceWeights = "checkpoint"
    #: What the engine's KV cache holds.
    kv_dtype: str = "fp32"
