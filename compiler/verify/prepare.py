"""Let the verification process work while the build traces and quantizes."""

from __future__ import annotations

import math
from dataclasses import asdict

from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.child_process import Started
from llmc.compiler.verify.job import Evaluation
from llmc.runtime.memory import available_memory, memory_needed

_MEMORY = 1.5  # times what a verification needs: the build itself needs some, too


def evaluate_early(
    process: Started, checkpoint: Checkpoint, tokenizer: str, vocab_size: int, max_seq_len: int
) -> None:
    """Have the process run the unquantized reference on the evaluation text, and return at once.

    process: the verification process
    tokenizer: the path of the bundle's tokenizer.json; "" if it has none

    The process keeps the reference, which holds the weights in fp32, for the verification. With little memory
    nothing is done: the verification itself loads and runs it then.
    """
    parameters = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    available = available_memory()
    if available is None or available >= _MEMORY * memory_needed(4 * parameters):
        process.prepare(asdict(Evaluation(str(checkpoint.path), max_seq_len, vocab_size, tokenizer)))
