"""The loss of a quantized KV cache, measured beside the comparison with the checkpoint.

That comparison is of the graph with a cache in the dtype that the engine computes in: only there can it be
held to what transformers does. The same graph with the quantized cache gets the same tokens in the same
steps, and the difference of the logits is the error of the cache alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llmc.compiler.verify.difference import Difference
from llmc.compiler.verify.job import Job
from llmc.runtime.backends import load_backend
from llmc.runtime.backends.base import Backend, EngineFile, LoadOptions


def load_quantized(job: Job, blocks: int) -> Backend:
    """Load the engine with the quantized cache.

    OpenVINO quantizes by itself. The graph that stands in for TensorRT rounds what enters its cache, which
    the backend holds in fp32.
    """
    kv_dtype = job.kv_dtype if job.backend == "openvino" else "fp32"
    return load_backend(EngineFile(job.backend, Path(job.kv_engine), kv_dtype), LoadOptions(kv_blocks=blocks))


def kv_cache_loss(exact: list[np.ndarray], quantized: list[np.ndarray], kv_dtype: str) -> dict[str, Any]:
    """Return mean KL divergence (nats), top-1 agreement, largest and rms difference of the logits.

    exact, quantized: logits float32 [length, vocabulary] of each sequence, by the cache that they came from;
    kv_dtype: the quantized one, as the manifest calls it.
    """
    difference = Difference.between(exact, quantized)
    return {"kv_dtype": kv_dtype, "positions": len(difference.top1_gap), **difference.summary()}
