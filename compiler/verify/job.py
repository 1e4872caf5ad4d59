"""The verification process, and its tasks and results, which are passed through pipes as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from llmc.compiler.child_process import Child

if TYPE_CHECKING:
    from llmc.compiler.verify.engine_weights import EngineWeight

VERIFICATION = Child("llmc.compiler.verify.child", "verification", "--no-verify builds without verification")
MIN_TOP1 = {"fp32": 1.0, "fp16": 0.99, "bf16": 0.99}  # compute dtype -> least top-1 agreement
ReferenceWeights = Literal["checkpoint", "dequantized"]


@dataclass(frozen=True)
class Evaluation:
    """The part of a Job that the unquantized reference on the evaluation text depends on."""

    checkpoint: str
    max_seq_len: int
    vocab_size: int
    tokenizer: str = ""
    reference_weights: ReferenceWeights = "checkpoint"


@dataclass(frozen=True)
class Job:
    """A comparison of an engine with its checkpoint."""

    #: The checkpoint's directory.
    checkpoint: str
    #: The path of the engine's file, and the name of the backend that runs it.
    engine: str
    backend: str
    #: The context length: tokens of prompt and answer together.
    max_seq_len: int
    vocab_size: int
    #: Sizes of the model's sliding attention windows and of its chunks, in tokens.
    windows: list[int]
    #: The largest logit error accepted in fp32 (`recipe.Recipe`). The bound of a 16-bit engine follows from
    #: the error of transformers in the same dtype.
    tolerance: float
    #: Bytes of memory that the comparison needs.
    needed_bytes: int
    #: The compute dtype of the engine: "fp32", "fp16" or "bf16".
    dtype: str = "fp32"
    #: A description of what stands in for the engine, for the manifest; "": the engine itself runs.
    compared: str = ""
    #: Name of a weight in the checkpoint -> the engine's quantized weight, which the reference uses too.
    quantized: Mapping[str, EngineWeight] = field(default_factory=dict)
    #: "dequantized" for a pre-quantized checkpoint.
    reference_weights: ReferenceWeights = "checkpoint"
    #: The engine with a KV cache of `kv_dtype`, whose loss against `engine` is recorded; "": no such cache.
    kv_engine: str = ""
    kv_dtype: str = ""
    #: In fp32, the engine with activation quantization if `engine` is without it; "": there is none.
    quantizing_engine: str = ""
    #: The bundle's tokenizer.json; "": it has none, and the tokens are random.
    tokenizer: str = ""
    #: The number of ranks. The engines are the files of rank 0.
    ranks: int = 1
    #: The number of stages that they form.
    stages: int = 1

    @property
    def evaluation(self) -> Evaluation:
        return Evaluation(
            self.checkpoint, self.max_seq_len, self.vocab_size, self.tokenizer, self.reference_weights
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "quantized": {name: weight.to_json() for name, weight in self.quantized.items()}
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        from llmc.compiler.verify.engine_weights import EngineWeight

        quantized = {name: EngineWeight.from_json(weight) for name, weight in data["quantized"].items()}
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
    #: Whether the greedy continuations are equal. None in 16 bits, where they diverge at the first near tie.
    greedy_equal: bool | None
    greedy_tokens: int
    #: The engine's rms error over that of transformers in the same dtype; None in fp32.
    rms_ratio: float | None = None
    details: dict[str, Any] = field(default_factory=dict)
    #: For an fp32 engine with activation quantization: its rms difference from the reference with activation
    #: quantization, divided by the rms difference that the quantization makes in the reference; else None.
    activation_ratio: float | None = None
    #: The bound of activation_ratio.
    activation_bound: float | None = None
    #: For such an engine: the rms difference that the quantization makes in it, divided by the rms difference
    #: that it makes in the reference; else None.
    activation_effect: float | None = None
    #: The bound of top1_agreement; None for MIN_TOP1 of the dtype.
    least_top1: float | None = None


@dataclass(frozen=True)
class Question:
    """A measurement of an engine on a text, for `llmc verify`."""

    engine: str
    backend: str
    max_seq_len: int
    vocab_size: int
    #: The path of a tokenizer.json; "": there is none, and the tokens are random.
    tokenizer: str
    #: The path of a text file in UTF-8; "": the evaluation text.
    text: str
    #: The directory of the checkpoint to compare with; "": only the engine's perplexity is measured.
    checkpoint: str
    tolerance: float
    reference_weights: ReferenceWeights = "checkpoint"
    #: The dtype of the engine's KV cache, by its name in the manifest.
    kv_dtype: str = "fp32"
    #: The number of ranks. `engine` is the file of rank 0.
    ranks: int = 1
    #: The number of stages that they form.
    stages: int = 1
