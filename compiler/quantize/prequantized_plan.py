"""The plan for a pre-quantized checkpoint: every matrix keeps its format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.prequantized.kv_scales import layer_kv_scales
from llmc.compiler.checkpoint.prequantized.layout import QuantizedCheckpoint, read_quantized
from llmc.compiler.quantize.prequantized_form import (
    PrequantizedModule,
    fusion_key,
    joined_format,
    read_module,
)
from llmc.compiler.request import BuildRequest, quantized_cache
from llmc.passes.canonicalize.fuse_linears import FusionPlan
from llmc.passes.quantize.formats import E2M1_MAX, E4M3_MAX, INT8_MAX
from llmc.passes.quantize.plan import InputFactors, Module, QuantPlan
from llmc.runtime.dtypes import BY_NAME
from llmc.runtime.errors import CheckpointError, RequestError, UnsupportedError

# Format of the recipe's KV cache -> largest magnitude / scale. Other formats may have a bias as well.
_KV_RANGES = {"": E4M3_MAX, "FP8": E4M3_MAX, "NVFP4": E4M3_MAX * E2M1_MAX, "INT8": INT8_MAX}
# The tensors override the exclude list, and layers with different scales are not fused.
_HARMLESS = ("exclude", "fused")


@dataclass(frozen=True)
class PrequantizedWeights:
    """A pre-quantized checkpoint, read for one target."""

    checkpoint: QuantizedCheckpoint
    #: The quantized modules by name, in the order of the checkpoint.
    modules: Mapping[str, PrequantizedModule]
    #: Whether the engine's KV cache has scales.
    has_cache_scales: bool = False

    @property
    def largest_kv(self) -> dict[int, tuple[float, float]]:
        """Layer -> (largest magnitude of its keys, of its values) that the checkpoint's KV scales represent.

        Empty for a cache format that llmc does not know.
        """
        largest = _KV_RANGES.get(self._kv_format)
        if largest is None:
            return {}
        scales = layer_kv_scales(self.checkpoint)
        return {layer: (key * largest, value * largest) for layer, (key, value) in scales.items()}

    @property
    def _kv_format(self) -> str:
        """The format of the KV cache that the checkpoint declares; "" if it declares none."""
        schemes = self.checkpoint.schemes
        return schemes.kv_cache if schemes else ""

    @property
    def fusion(self) -> FusionPlan:
        """The keys by which linear layers may be fused."""
        return FusionPlan({name: fusion_key(module) for name, module in self.modules.items()})

    @property
    def notes(self) -> tuple[str, ...]:
        """The settings of the recipe that the engine omits."""
        counts = Counter(module.note for module in self.modules.values() if module.note)
        notes = [f"{note} ({count} modules)" for note, count in counts.items()]
        if self._kv_format and not self.has_cache_scales:
            notes.append(f"the KV cache, {self._kv_format} in the recipe, is not quantized")
        elif self._kv_format not in _KV_RANGES and self.checkpoint.kv_scales:
            notes.append(
                f"the KV cache's scales, {self._kv_format} in the recipe, are not used: they are 1.0"
            )
        return tuple(notes)


@dataclass(frozen=True)
class PrequantizedPlan(QuantPlan):
    """The plan for a pre-quantized checkpoint. `format` is the format of most modules."""

    #: The scheme that the checkpoint declares.
    recipe: str = ""
    #: The program that quantized the checkpoint, with its version; "" if not declared.
    producer: str = ""
    #: As in PrequantizedWeights.
    notes: tuple[str, ...] = field(default=())

    def record(self) -> dict[str, Any]:
        """Return the manifest's record of the quantization."""
        formats = Counter(module.format.name for module in self.modules if module.format)
        return super().record() | {
            "format": self.formats,
            "method": "as the checkpoint has it",
            "recipe": self.recipe,
            "producer": self.producer,
            "formats": dict(formats),
            "notes": list(self.notes),
        }


def read_prequantized(
    checkpoint: Checkpoint, request: BuildRequest, dtype: str
) -> PrequantizedWeights | None:
    """Read the weights of a pre-quantized checkpoint for an engine that computes in `dtype`.

    Returns None if the checkpoint is not quantized.
    Raises RequestError if the request has quantization options, CheckpointError for a contradictory layout,
    UnsupportedError, naming the module, for a layout that engines do not support.
    """
    quantized = read_quantized(checkpoint)
    if not quantized.quantized:
        return None
    label = quantized.schemes.label if quantized.schemes else "undeclared"
    if request.quant:
        raise RequestError(
            f"--quant {request.quant}: the checkpoint is quantized already ({label})",
            "leave --quant out, or quantize the checkpoint that it was made from",
            "quant",
        )
    if request.calibration is not None:
        raise RequestError(
            f"--calibration: the checkpoint is quantized already ({label}) and has its scales",
            "leave --calibration out",
            "calibration",
        )
    for finding in quantized.findings:
        if not finding.warning and finding.kind not in _HARMLESS:
            raise CheckpointError(
                f"{finding.tensor} {finding.what}", f"run `llmc check {checkpoint.path}` for all findings"
            )
    schemes = quantized.schemes
    modules = {
        name: read_module(module, schemes, BY_NAME[dtype].safetensors)
        for name, module in quantized.modules.items()
    }
    return PrequantizedWeights(quantized, modules, quantized_cache(request) is not None)


def make_prequantized_plan(
    stored: PrequantizedWeights,
    matrices: Mapping[str, tuple[int, int]],
    groups: Iterable[Sequence[str]],
    *,
    stored_bits: int,
    other_params: int,
) -> PrequantizedPlan:
    """Return the plan in which every matrix keeps the checkpoint's format.

    matrices: the shapes [out, in] of the graph's linear layers, by module
    groups: the modules of each fused linear layer
    stored_bits: bits per value of the other weights
    other_params: the number of values of the weights that are not in `matrices`

    Raises UnsupportedError for a quantized module that is not in `matrices`.
    """
    if extra := [name for name in stored.modules if name not in matrices]:
        raise UnsupportedError(
            f"module {extra[0]} is quantized, but it is an embedding, a tied lm_head, a matrix of latent "
            "attention, or not in the model",
            "exclude this module when quantizing: llmc reads quantized weights of linear layers only",
        )
    modules = {name: _unquantized_module(stored.checkpoint, name, shape) for name, shape in matrices.items()}
    for group in groups:
        parts = [stored.modules[name] for name in group if name in stored.modules]
        if not parts:
            continue
        fmt = joined_format(parts)
        assert fmt is not None, f"{group} were fused"
        scale = parts[0].pre_quant_scale
        factors = InputFactors(scale.name, scale.dtype, scale.shape) if scale else None
        for name in group:
            modules[name] = Module(name, matrices[name], fmt, "", tuple(group), factors)
    formats = Counter(module.format for module in modules.values() if module.format)
    schemes = stored.checkpoint.schemes
    return PrequantizedPlan(
        formats.most_common(1)[0][0],
        tuple(modules.values()),
        stored_bits,
        other_params,
        recipe=schemes.label if schemes else "undeclared",
        producer=schemes.producer if schemes else "",
        notes=stored.notes,
    )


def _unquantized_module(checkpoint: QuantizedCheckpoint, name: str, shape: tuple[int, int]) -> Module:
    listed = " (in its list of exceptions)" if name in checkpoint.excluded else ""
    return Module(name, shape, None, f"not quantized in the checkpoint{listed}", (name,))
