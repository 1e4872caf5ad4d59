"""llama.cpp through llama-cpp-python: one context, and one `llama_decode` per step for all sequences.

WEIGHT_FORMAT in the environment: q4_0 or q8_0, written by llama.cpp's quantizer. llama.cpp quantizes
activations to int8. The KV cache is f16, its default.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from gguf_writer import write_gguf
from protocol import Generation, main

STEP = 4096  # tokens of a step: room for all prompts of a phase
# (sequences, tokens of each) of a context: several prompts of up to 512 tokens, or a long one
CONTEXTS = ((8, 512 + 256), (1, 4096 + 256))
FORMATS = {"q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}


class LlamaCpp:
    """llama.cpp as a `protocol.Tool`: a model, and contexts, which all their sequences share."""

    def __init__(self, model: Path, threads: int) -> None:
        file = next(model.glob("*.gguf"))
        parameters = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), parameters)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {file.name}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.threads = threads
        self.contexts: dict[tuple[int, int], Any] = {}
        self.context = self._context_for(1, 1)
        self.batch = llama_cpp.llama_batch_init(STEP, 0, 1)
        self.describe: dict[str, Any] = {
            "weights": file.stem,
            "kv_cache": "f16 (default)",
            "threads": threads,
            "n_ubatch": llama_cpp.llama_n_ubatch(self.context),
            "system": llama_cpp.llama_print_system_info().decode(),
        }

    def _context_for(self, sequences: int, tokens: int) -> Any:
        """Return a context for this many sequences of up to `tokens` tokens."""
        fitting = [size for size in CONTEXTS if sequences <= size[0] and tokens <= size[1]]
        if not fitting:
            raise SystemExit(
                f"{sequences} sequences of {tokens} tokens exceed this worker's contexts: {CONTEXTS}"
            )
        size = fitting[0]
        if size not in self.contexts:
            settings = llama_cpp.llama_context_default_params()
            settings.n_ctx = size[0] * size[1]
            settings.n_batch = STEP
            settings.n_seq_max = size[0]
            settings.n_threads = settings.n_threads_batch = self.threads
            self.contexts[size] = llama_cpp.llama_init_from_model(self.model, settings)
        return self.contexts[size]

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Generation:
        self.context = self._context_for(len(prompts), max(map(len, prompts)) + new_tokens)
        generation = Generation(len(prompts))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        pending, past = prompts, [0] * len(prompts)
        for _ in range(new_tokens):
            tokens = self._step(pending, past)
            at = generation.now()
            past = [before + len(new) for before, new in zip(past, pending, strict=True)]
            pending = [[token] for token in tokens]
            for request, token in enumerate(tokens):
                generation.emit(request, token, at)
        return generation

    def _step(self, pending: list[list[int]], past: list[int]) -> list[int]:
        """Compute each sequence's pending tokens. Return the most likely next token of each."""
        batch, row, last = self.batch, 0, []
        for sequence, (tokens, begin) in enumerate(zip(pending, past, strict=True)):
            for offset, token in enumerate(tokens):
                batch.token[row], batch.pos[row] = token, begin + offset
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
                batch.logits[row] = offset == len(tokens) - 1
                row += 1
            last.append(row - 1)
        batch.n_tokens = row
        if status := llama_cpp.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode returned {status}")
        next_tokens = []
        for index in last:
            logits = llama_cpp.llama_get_logits_ith(self.context, index)
            next_tokens.append(int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax()))
        return next_tokens


def convert(checkpoint: Path, model: Path) -> None:
    """Write the checkpoint as GGUF in the format WEIGHT_FORMAT to the new directory `model`."""
    fmt = os.environ["WEIGHT_FORMAT"]
    model.mkdir(parents=True)
    plain = model / "plain.gguf"
    write_gguf(checkpoint, plain)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FORMATS[fmt]
    parameters.nthread = os.cpu_count() or 1
    target = model / f"{fmt}.gguf"
    if llama_cpp.llama_model_quantize(str(plain).encode(), str(target).encode(), parameters):
        raise SystemExit("llama_model_quantize failed")
    plain.unlink()


if __name__ == "__main__":
    main(LlamaCpp, convert=convert, packages=("llama-cpp-python", "gguf", "numpy"))
