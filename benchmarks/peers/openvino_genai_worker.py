"""openvino-genai: continuous batching on the CPU, in fp32; converted with optimum-intel.

WEIGHT_FORMAT=fp16 in the environment: weights rounded to fp16; arithmetic and cache stay fp32.
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

# Without these the CPU plugin would use bf16 where the machine has it, and an 8-bit KV cache.
FP32: dict[str, Any] = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}


def _scheduler() -> genai.SchedulerConfig:
    config = genai.SchedulerConfig()
    config.max_num_batched_tokens = 2048  # every prompt of the workload in one step
    config.enable_prefix_caching = False
    return config


class OpenVinoGenai:
    def __init__(self, model: Path, threads: int) -> None:
        properties = FP32 | {"INFERENCE_NUM_THREADS": threads}
        self.pipeline = genai.ContinuousBatchingPipeline(str(model), _scheduler(), "CPU", properties)
        self.requests = 0
        self.describe = properties | {"pipeline": "ContinuousBatchingPipeline"}

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
    properties = FP32 | {"INFERENCE_NUM_THREADS": threads, "scheduler_config": _scheduler()}
    pipeline = genai.LLMPipeline(str(model), "CPU", **properties)
    return str(
        pipeline.generate(text, max_new_tokens=1, ignore_eos=True, do_sample=False, apply_chat_template=False)
    )


def convert(checkpoint: Path, model: Path) -> None:
    export = Path(sys.executable).with_name("optimum-cli")
    weights = os.environ.get("WEIGHT_FORMAT", "fp32")
    task = ["--task", "text-generation-with-past", "--weight-format", weights]
    subprocess.run([export, "export", "openvino", "--model", checkpoint, *task, model], check=True)


if __name__ == "__main__":
    main(
        OpenVinoGenai,
        first,
        convert,
        packages=("openvino-genai", "openvino", "openvino-tokenizers", "optimum-intel", "nncf"),
    )
