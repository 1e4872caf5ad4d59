"""Find invalid values: NaN, infinity, and scales that are zero or negative."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llmc.compiler.checkpoint.finding import Finding
from llmc.compiler.checkpoint.prequantized.layout import QuantizedCheckpoint
from llmc.compiler.checkpoint.prequantized.module import Role
from llmc.compiler.checkpoint.safetensors import TensorRef

_BLOCK = 1 << 22  # bytes that are read at a time
_SCALES: tuple[Role, ...] = (
    "weight_scale",
    "global_scale",
    "inverse_global_scale",
    "input_scale",
    "inverse_input_scale",
    "pre_quant_scale",
)


def check_scales(quantized: QuantizedCheckpoint) -> list[Finding]:
    """Return a finding for each scale tensor with invalid values, of modules and the KV cache. Reads all."""
    refs = [
        module.tensors[role]
        for module in quantized.modules.values()
        for role in _SCALES
        if role in module.tensors
    ]
    refs += [ref for name, ref in quantized.kv_scales.items() if not name.endswith("_bias")]
    return [finding for ref in refs if (finding := _bad_values(ref, ref.iter_chunks(_BLOCK), scale=True))]


def check_plain(quantized: QuantizedCheckpoint, full: bool) -> list[Finding]:
    """Return a finding for each unquantized tensor with NaN or infinity.

    full: read every row instead of samples
    """
    biases = [m.tensors["bias"] for m in quantized.modules.values() if "bias" in m.tensors]
    findings = []
    for ref in (*quantized.plain.values(), *biases):
        blocks = ref.iter_chunks(_BLOCK) if full else (ref.read(rows) for rows in sample(ref))
        if finding := _bad_values(ref, blocks, scale=False):
            findings.append(finding)
    return findings


def sample(ref: TensorRef) -> list[slice | None]:
    """Return slices of rows at the beginning, middle and end, about 64 KiB each.

    [None] stands for all rows of a small tensor.
    """
    if not ref.shape or ref.nbytes <= 3 << 16:
        return [None]
    rows = ref.shape[0]
    count = max(2, (1 << 16) * rows // ref.nbytes)
    return [
        slice(first, first + count) for first in (0, (rows - count) // 2, rows - count) if first >= 0
    ] or [None]


def _bad_values(ref: TensorRef, blocks: Iterator[np.ndarray], scale: bool) -> Finding | None:
    counts = {"NaN": 0, "infinite": 0, "zero": 0, "negative": 0}
    total = 0
    for block in blocks:
        if block.dtype.kind in "iub":
            return None
        values = block.astype(np.float32)
        total += values.size
        counts["NaN"] += int(np.isnan(values).sum())
        counts["infinite"] += int(np.isinf(values).sum())
        if scale:
            counts["zero"] += int((values == 0).sum())
            counts["negative"] += int((values < 0).sum())
    bad = [f"{count:,} {what}" for what, count in counts.items() if count]
    return Finding("value", ref.name, f"{' and '.join(bad)} of {total:,} values") if bad else None
