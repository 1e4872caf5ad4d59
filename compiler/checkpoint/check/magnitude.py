"""Check the magnitude of dequantized weights, to find scales that are stored as their inverse.

Let c be the root mean square (rms) of a module's codes and r that of its weights, so that its scale is about
r / c. If the codes are multiplied by the inverse scale, the rms is c * c / r instead of r. Linear weights of
language models have an r between 0.001 and 1. The c of codes is between 2.5 (4-bit integers) and hundreds
(FP8; NVFP4 with its global scale counts as up to 2688). So an inverse scale always makes the weights larger.
The weights of a module are reported if their rms is above one of these limits:

    LIMIT    8, which c * c / r exceeds for every r below 0.78 and c of 2.5 or more
    APART    100 times the median of the modules with the same last name (`q_proj` of every layer) that are
             not above LIMIT; if there are fewer than three, of all such modules

Modules below TINY, 1/1000 of that median, get only a warning, because pruned and dead layers exist.

Activations have no stored codes. But the input scale of NVFP4 is amax / 2688, which is above 1 only if amax
is above 2688, while its inverse is nearly always above 1. So if more than half of a checkpoint's NVFP4 input
scales are above 1, one is reported. The input scale of FP8 has the same definition in every format.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from statistics import median

import numpy as np

from llmc.compiler.checkpoint.finding import Finding
from llmc.compiler.checkpoint.prequantized.dequantize import dequantize, iter_rows
from llmc.compiler.checkpoint.prequantized.layout import QuantizedCheckpoint
from llmc.compiler.checkpoint.prequantized.module import QuantizedModule

LIMIT, APART, TINY = 8.0, 100.0, 1e-3
_BLOCK = 1 << 23  # bytes of dequantized weights that are read at a time
_SAMPLE = 1 << 20  # bytes of dequantized weights at each of the three places of a sample


def check_weights(quantized: QuantizedCheckpoint, broken: set[str], full: bool) -> list[Finding]:
    """Check the codes of every module for NaN, and the magnitude of its weights.

    broken: names of tensors that are known to be invalid; their modules are skipped
    full: read every weight instead of samples
    """
    findings: list[Finding] = []
    rms: dict[str, float] = {}
    for name, module in quantized.modules.items():
        if broken & {ref.name for ref in module.tensors.values()}:
            continue
        square, count = 0.0, 0
        for block in iter_rows(module, _BLOCK) if full else _sample(module):
            square += float(np.square(block, dtype=np.float64).sum())
            count += block.size
        if math.isnan(square):
            findings.append(Finding("value", module.tensors["weight"].name, "has codes that are NaN"))
        else:
            rms[name] = math.sqrt(square / count)
    return findings + _magnitudes(quantized, rms) + _inputs(quantized)


def _sample(module: QuantizedModule) -> Iterator[np.ndarray]:
    """Yield rows at the beginning, the middle and the end, with AWQ's `pre_quant_scale` undone."""
    rows, columns = module.shape
    count = max(2, _SAMPLE // (4 * columns))
    starts = {0, max(0, (rows - count) // 2), max(0, rows - count)} if rows > 3 * count else {0}
    for first in sorted(starts):
        yield _effective(
            module, dequantize(module, slice(first, first + (count if len(starts) > 1 else rows)))
        )


def _effective(module: QuantizedModule, weight: np.ndarray) -> np.ndarray:
    """Undo AWQ's `pre_quant_scale`, which moves a factor from the activations to the weights."""
    factor = module.tensors.get("pre_quant_scale")
    return weight if factor is None else weight * factor.read().astype(np.float32)


def _magnitudes(quantized: QuantizedCheckpoint, rms: dict[str, float]) -> list[Finding]:
    by_end: defaultdict[str, list[float]] = defaultdict(list)
    sound = {name: value for name, value in rms.items() if 0 < value <= LIMIT}
    for name, value in sound.items():
        by_end[name.rpartition(".")[2]].append(value)
    findings = []
    for name, value in rms.items():
        weight = quantized.modules[name].tensors["weight"].name
        same_name = by_end[name.rpartition(".")[2]]
        typical = median(same_name if len(same_name) >= 3 else list(sound.values()) or [value])
        if value > LIMIT or value > APART * typical:
            message = f"dequantized, its values are about {value:.3g}"
            message += (
                f" and those of similar modules {typical:.3g}"
                if value > APART * typical
                else ", far too large for a weight"
            )
            findings.append(Finding("magnitude", weight, f"{message}: is its scale stored as the inverse?"))
        elif value < TINY * typical:
            message = (
                "all sampled values are zero"
                if value == 0
                else f"values are about {value:.3g}, those of similar modules {typical:.3g}"
            )
            findings.append(Finding("magnitude", weight, message, warning=True))
    return findings


def _inputs(quantized: QuantizedCheckpoint) -> list[Finding]:
    scales: list[tuple[float, str]] = []
    for module in quantized.modules.values():
        if module.format != "nvfp4":
            continue
        if (ref := module.tensors.get("input_scale")) is not None:
            scales.append((float(ref.read().reshape(-1)[0]), ref.name))
        elif (ref := module.tensors.get("inverse_input_scale")) is not None:
            value = float(ref.read().reshape(-1)[0])
            scales.append((1 / value if value else math.inf, ref.name))
    large = [(value, name) for value, name in scales if value > 1 and math.isfinite(value)]
    if 2 * len(large) <= len(scales):
        return []
    value, name = large[0]
    message = (
        f"implies activations up to {value * 2688:,.0f}, as {len(large)} of {len(scales)} input scales do: "
        "are they stored as the inverse?"
    )
    return [Finding("magnitude", name, message)]
