"""onnxruntime-genai: its model builder and its Generator, with requests in one padded batch.

WEIGHT_FORMAT in the environment: fp32 (default), or int4 in blocks of 32 with int8 activations (accuracy
level 4).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
from protocol import Generation, main

WEIGHTS = os.environ.get("WEIGHT_FORMAT", "fp32")
OPTIONS = {"int4": ["--extra_options", "int4_accuracy_level=4"]}


def _load(model: Path, threads: int) -> og.Model:
    options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    config = og.Config(str(model))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    return og.Model(config)


class OnnxRuntimeGenai:
    """A `protocol.Tool`."""

    def __init__(self, model: Path, threads: int) -> None:
        self.model = _load(model, threads)
        settings = json.loads((model / "genai_config.json").read_text())
        self.pad = settings["model"]["pad_token_id"]
        self.describe: dict[str, Any] = {"threads": threads, "precision": WEIGHTS, "api": "Generator"}

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Generation:
        generation = Generation(len(prompts))
        longest = max(map(len, prompts))
        # The tool derives the attention mask from the padding token. Padding is on the right, because
        # GroupQueryAttention counts the tokens of a row from the left.
        ids = np.array([p + [self.pad] * (longest - len(p)) for p in prompts], dtype=np.int32)
        parameters = og.GeneratorParams(self.model)
        length = longest + new_tokens
        parameters.set_search_options(
            batch_size=len(prompts), max_length=length, min_length=length, do_sample=False
        )
        generator = og.Generator(self.model, parameters)
        generator.append_tokens(ids)
        for _ in range(new_tokens):
            generator.generate_next_token()
            at = generation.now()
            for request, token in enumerate(generator.get_next_tokens()):
                generation.emit(request, int(token), at)
        return generation


def first(model: Path, threads: int, text: str) -> str:
    loaded = _load(model, threads)
    tokenizer = og.Tokenizer(loaded)
    parameters = og.GeneratorParams(loaded)
    ids = tokenizer.encode(text)
    parameters.set_search_options(max_length=len(ids) + 1, do_sample=False)
    generator = og.Generator(loaded, parameters)
    generator.append_tokens(ids)
    generator.generate_next_token()
    return str(tokenizer.decode(generator.get_next_tokens()))


def convert(checkpoint: Path, model: Path) -> None:
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    subprocess.run(
        [*builder, "-i", checkpoint, "-o", model, "-p", WEIGHTS, "-e", "cpu", *OPTIONS.get(WEIGHTS, [])],
        check=True,
    )


if __name__ == "__main__":
    main(OnnxRuntimeGenai, first, convert, packages=("onnxruntime-genai", "onnxruntime", "onnx"))
