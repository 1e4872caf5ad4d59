"""openvino-genai: continuous batching on the CPU, with models converted by optimum-intel.

Environment: WEIGHT_FORMAT is fp32 (default), fp16, int8 or int4. With fp32 and fp16, arithmetic and KV cache
are fp32. With int8 and int4 they are the tool's defaults: int8 activations, an 8-bit KV cache, and bf16
arithmetic if the CPU supports it. ARITHMETIC=f32 and KV_CACHE=f32 set arithmetic and KV cache to fp32;
activations stay int8.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from protocol import Generation, main

WEIGHTS = os.environ.get("WEIGHT_FORMAT", "fp32")
INTEGER = {"int8": [], "int4": ["--sym", "--group-size", "128"]}  # and their optimum-cli options


def _properties(threads: int) -> dict[str, Any]:
    properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
    integer = WEIGHTS in INTEGER
    if os.environ.get("ARITHMETIC") == "f32" or not integer:
        properties["INFERENCE_PRECISION_HINT"] = "f32"
    if os.environ.get("KV_CACHE") == "f32" or not integer:
        properties["KV_CACHE_PRECISION"] = "f32"
    if not integer:
        properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
    return properties


def _scheduler() -> genai.SchedulerConfig:
    config = genai.SchedulerConfig()
    config.max_num_batched_tokens = 2048  # every prompt of the workload in one step
    config.enable_prefix_caching = False
    return config


class OpenVinoGenai:
    """A `protocol.Tool`."""

    def __init__(self, model: Path, threads: int) -> None:
        properties = _properties(threads)
        self.pipeline = genai.ContinuousBatchingPipeline(str(model), _scheduler(), "CPU", properties)
        self.requests = 0
        names = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
        defaults = {name: f"{ov.Core().get_property('CPU', name)} (default)" for name in names}
        self.describe = defaults | properties | {"pipeline": "ContinuousBatchingPipeline"}

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Generation:
        config = genai.GenerationConfig()
        config.max_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        generation = Generation(len(prompts))
        handles = []
        for prompt in prompts:
            ids = ov.Tensor(np.array([prompt], dtype=np.int64))
            handles.append(self.pipeline.add_request(self.requests, ids, config))
            self.requests += 1
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            at = generation.now()
            for request, handle in enumerate(handles):
                if handle.can_read():
                    for output in handle.read().values():
                        for token in output.generated_ids:
                            generation.emit(request, token, at)
        return generation


def first(model: Path, threads: int, text: str) -> str:
    properties = _properties(threads) | {"scheduler_config": _scheduler()}
    pipeline = genai.LLMPipeline(str(model), "CPU", **properties)
    return str(
        pipeline.generate(text, max_new_tokens=1, ignore_eos=True, do_sample=False, apply_chat_template=False)
    )


def convert(checkpoint: Path, model: Path) -> None:
    export = Path(sys.executable).with_name("optimum-cli")
    task = ["--task", "text-generation-with-past", "--weight-format", WEIGHTS, *INTEGER.get(WEIGHTS, [])]
    subprocess.run([export, "export", "openvino", "--model", checkpoint, *task, model], check=True)


if __name__ == "__main__":
    ov.Core().get_versions("CPU")  # loads the CPU plugin, so that its memory counts as the libraries'
    main(
        OpenVinoGenai,
        first,
        convert,
        packages=("openvino-genai", "openvino", "openvino-tokenizers", "optimum-intel", "nncf"),
    )
