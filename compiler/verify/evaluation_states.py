"""The unquantized reference on the evaluation text, which quantized models are compared with.

It does not depend on the engine, so a build computes it while the model is traced and quantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from llmc.compiler import texts
from llmc.compiler.verify.job import Evaluation
from llmc.compiler.verify.reference import Reference


@dataclass(frozen=True)
class EvaluationStates:
    """The last hidden states of the unquantized reference."""

    evaluation: Evaluation
    #: The evaluation text; "" if the tokens are random.
    text: str
    #: The token ids of each window.
    windows: list[list[int]]
    #: The states of each window, [tokens, hidden].
    states: list[torch.Tensor]
    #: The reference, which still has the checkpoint's weights.
    reference: Reference

    @classmethod
    def of(cls, evaluation: Evaluation, reference: Reference) -> EvaluationStates:
        """Run the unquantized `reference` on the evaluation text, or on random tokens without a tokenizer."""
        vocab_size, max_seq_len = evaluation.vocab_size, evaluation.max_seq_len
        if evaluation.tokenizer:
            text = texts.read_text(texts.EVALUATION_TEXT)
            windows = texts.windows_of(text, Path(evaluation.tokenizer), vocab_size, max_seq_len)
        else:
            text, windows = "", texts.random_windows(vocab_size, max_seq_len)
        return cls(evaluation, text, windows, [reference.states(ids) for ids in windows], reference)

    @classmethod
    def early(cls, evaluation: Evaluation) -> EvaluationStates | None:
        """Load the reference and run it while the build traces, which takes one CPU.

        Returns None after an error: the comparison runs the reference again and reports it.
        """
        threads = torch.get_num_threads()
        # Threads of one product wait for each other without sleeping, so they need a CPU each.
        torch.set_num_threads(max(1, threads - 1))
        try:
            reference = Reference(
                evaluation.checkpoint, "fp32", evaluation.reference_weights, evaluation.max_seq_len
            )
            return cls.of(evaluation, reference)
        except Exception:  # transformers raises many kinds
            return None
        finally:
            torch.set_num_threads(threads)
