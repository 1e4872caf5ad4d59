"""Read the scales of a checkpoint's KV cache."""

from __future__ import annotations

import re

from llmc.compiler.checkpoint.prequantized.layout import QuantizedCheckpoint
from llmc.runtime.errors import CheckpointError

_NAME = re.compile(r"(?:.*\.)?layers\.(\d+)\..*?(?:[kv]_proj\.)?([kv])_scale")


def layer_kv_scales(checkpoint: QuantizedCheckpoint) -> dict[int, tuple[float, float]]:
    """Return layer -> (scale of the keys, scale of the values), which multiply the cached codes.

    ModelOpt stores the scales under k_proj and v_proj, compressed-tensors under the attention module. If a
    layer has only one of the two scales, the other is 1. The block scales of an NVFP4 cache are not returned.
    Raises CheckpointError for a scale that is not a positive number.
    """
    scales_of: dict[int, dict[str, float]] = {}
    for name, ref in checkpoint.kv_scales.items():
        match = _NAME.fullmatch(name)
        if match is None:
            continue  # a scale of queries, or a bias
        values = ref.read().astype("float32").reshape(-1)
        if values.size != 1 or not 0 < values[0] < float("inf"):
            raise CheckpointError(
                f"tensor {name} of shape {list(ref.shape)} is not one positive number",
                "llmc reads one scale for the keys and one for the values of a layer",
            )
        scales_of.setdefault(int(match[1]), {})[match[2]] = float(values[0])
    return {
        layer: (scales.get("k", 1.0), scales.get("v", 1.0)) for layer, scales in sorted(scales_of.items())
    }
