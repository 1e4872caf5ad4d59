"""llmc's engine, driven step by step on a bundle. The interpreter must have llmc.

Environment: WEIGHT_FORMAT is `--quant`, KV_CACHE is `--kv-dtype` and ENGINE is `--engine` when the bundle is
built. FAST=1 is `--fast`, which quantizes activations to int8.

The time to the first token is not measured here but with `llmc run` as a whole process (see ../peers.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from protocol import Generation, main

from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.load import load_engine
from llmc.runtime.sampling import SamplingParams


class Llmc:
    """A `protocol.Tool`."""

    def __init__(self, model: Path, threads: int) -> None:
        # A disturbed sample is repeated with the same prompts: a prefix cache would answer from memory.
        fast = os.environ.get("FAST") == "1"
        bundle = Bundle.open(model)
        self.engine = load_engine(bundle, threads=threads, prefix_cache=False, fast=fast)
        self.describe = {
            "backend": type(self.engine.backend).__name__,
            "threads": threads,
            "weights": (bundle.manifest.quantization or {}).get("format", "the checkpoint's"),
            "activations": "int8" if fast else bundle.manifest.precision.dtype,
            "kv_cache": bundle.manifest.precision.kv_dtype,
        }

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Generation:
        engine = self.engine
        steps, backend = engine.stats.step_seconds, engine.stats.backend_seconds
        generation = Generation(len(prompts))
        sampling = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
        requests = {engine.add_request(prompt, sampling): i for i, prompt in enumerate(prompts)}
        while engine.has_unfinished:
            outputs = engine.step()
            at = generation.now()
            for output in outputs:
                request = requests[output.request_id]
                for token in output.token_ids[len(generation.tokens[request]) :]:
                    generation.emit(request, int(token), at)
        generation.extra = {
            "step_seconds": engine.stats.step_seconds - steps,
            "backend_seconds": engine.stats.backend_seconds - backend,
        }
        return generation


def convert(checkpoint: Path, model: Path) -> None:
    options = []
    if weights := os.environ.get("WEIGHT_FORMAT"):
        options += ["--quant", weights]
    if kv_cache := os.environ.get("KV_CACHE"):
        options += ["--kv-dtype", kv_cache]
    if engine := os.environ.get("ENGINE"):
        options += ["--engine", engine]
    build = [sys.executable, "-m", "llmc", "build", checkpoint, "-o", model, *options]
    if status := subprocess.run(build, stdout=sys.stderr).returncode:
        raise SystemExit(status)  # without a traceback, so that llmc's own message is the last of the log


if __name__ == "__main__":
    if os.environ.get("ENGINE") == "openvino":
        import openvino as ov

        ov.Core().get_versions("CPU")  # loads the CPU plugin, so that its memory counts as the libraries'
    main(Llmc, convert=convert, packages=("llmc", "openvino", "onnxruntime", "numpy"))
