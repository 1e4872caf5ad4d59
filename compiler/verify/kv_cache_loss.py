"""Measure the loss of a quantized KV cache, separately from the comparison with the checkpoint.

The checkpoint is compared with the graph whose cache has the compute dtype, because transformers has no
quantized cache to compare with. Here the same graph with the quantized cache runs on the same tokens in the
same steps. The difference of the logits is the error of the cache alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llmc.compiler.verify.difference import Difference
from llmc.compiler.verify.job import Job
from llmc.compiler.verify.load import load
from llmc.runtime.backends.base import Backend, EngineFile


def load_quantized(job: Job, blocks: int) -> Backend:
    """Load the engine with the quantized cache.

    blocks: the number of KV blocks

    The CPU engines quantize the cache themselves. The graph that stands in for TensorRT rounds keys and
    values before they enter the cache, so ONNX Runtime, which runs it, keeps the cache in fp32.
    """
    kv_dtype = job.kv_dtype if job.backend in ("native", "openvino") else "fp32"
    return load(EngineFile(job.backend, Path(job.kv_engine), kv_dtype), blocks, job.ranks, job.stages)


def kv_cache_loss(exact: list[np.ndarray], quantized: list[np.ndarray], kv_dtype: str) -> dict[str, Any]:
    """Return mean KL divergence (nats), top-1 agreement, largest and rms difference of the logits.

    exact: the logits of each sequence without the quantized cache, float32 [length, vocabulary]
    quantized: the same with the quantized cache
    kv_dtype: the dtype of the quantized cache, by its name in the manifest
    """
    difference = Difference.between(exact, quantized)
    return {"kv_dtype": kv_dtype, "positions": len(difference.top1_gap), **difference.summary()}
