"""The quantization plan: the format of each linear layer, or the reason why it has none.

Linear layers that read the same input are fused (passes/canonicalize/fuse_linears.py). They share a decision
and, in formats that have one, the global scale.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from llmc.passes.quantize.formats import Format, get_format
from llmc.passes.quantize.matrix import QuantizedMatrix
from llmc.runtime.errors import BuildError, RequestError

# A step reads only a few rows of the embedding, and most of the quantization loss comes from the last matrix.
# ModelOpt, compressed-tensors' recipes and llama.cpp also leave them wider.
HEADS = ("lm_head", "*.lm_head")
ALWAYS_EXCLUDED = (*HEADS, "embed_tokens", "*.embed_tokens")
_LARGEST_GROUP, _SMALLEST_GROUP = 128, 16  # activations that share an int8 scale
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class InputFactors:
    """A tensor of the checkpoint that a layer's input is multiplied by."""

    #: The name of the tensor in the checkpoint.
    name: str
    #: The dtype, by its safetensors name.
    dtype: str
    #: The shape of the tensor.
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Module:
    """One matrix [out, in] of the model."""

    #: The name in the checkpoint, without ".weight".
    name: str
    #: The shape [out, in].
    shape: tuple[int, int]
    #: None: the matrix is not quantized.
    format: Format | None
    #: Why it is not quantized; "" if it is.
    reason: str
    #: The modules of its fused layer, itself among them.
    group: tuple[str, ...]
    #: The factors [in] of a pre-quantized checkpoint.
    pre_quant_scale: InputFactors | None = None
    #: Whether the matrix shares its weight with the embedding. The embedding stays in the file, so that
    #: quantizing the matrix adds bytes.
    tied: bool = False

    @property
    def params(self) -> int:
        """Number of parameters that only this matrix holds."""
        return 0 if self.tied else math.prod(self.shape)


@dataclass(frozen=True)
class QuantPlan:
    """The decision for every matrix, frozen and printable."""

    #: The requested format, or the most frequent format of a pre-quantized checkpoint.
    format: Format
    #: Every matrix, in the order of the model.
    modules: tuple[Module, ...]
    #: Bits of a parameter that is not quantized.
    stored_bits: int
    #: Number of parameters outside the matrices.
    other_params: int

    def quantized(self) -> dict[str, Module]:
        """Return the quantized modules by name."""
        return {module.name: module for module in self.modules if module.format}

    def groups(self) -> list[tuple[Module, ...]]:
        """Return the quantized modules in groups of fused layers. Each group has one global scale."""
        by_name = self.quantized()
        seen = dict.fromkeys(module.group for module in by_name.values())
        return [tuple(by_name[name] for name in group) for group in seen]

    def matrices(self) -> list[QuantizedMatrix]:
        """Return the quantized matrices in the order of the graph."""
        matrices = []
        for group in self.groups():
            names, rows = tuple(m.name for m in group), tuple(m.shape[0] for m in group)
            assert group[0].format is not None
            matrices.append(QuantizedMatrix(names, rows, group[0].shape[1], group[0].format))
        return matrices

    @property
    def params(self) -> int:
        """Number of parameters of the model."""
        return sum(module.params for module in self.modules) + self.other_params

    @property
    def bytes_before(self) -> int:
        """Bytes of the model before quantization."""
        return self.params * self.stored_bits // 8

    @property
    def bytes_after(self) -> int:
        """Bytes of the model after quantization. Scales are included, shared ones once."""
        saved = 0
        for group in self.groups():
            fused = (sum(module.shape[0] for module in group), group[0].shape[1])
            assert group[0].format is not None
            before = sum(module.params for module in group) * self.stored_bits // 8
            saved += before - group[0].format.nbytes(fused)
        return self.bytes_before - saved

    @property
    def formats(self) -> str:
        """The names of the formats, the one of most modules first."""
        counts = Counter(module.format.name for module in self.modules if module.format)
        return " and ".join(name for name, _ in counts.most_common())

    @property
    def bits_per_parameter(self) -> float:
        """Bits per parameter of the whole model after quantization."""
        return 8 * self.bytes_after / self.params

    @property
    def activation_group(self) -> int:
        """Number of activations that share an int8 scale with `llmc run --fast`. 0: `--fast` is not possible.

        The group is as large as the blocks of all int8 and int4 weights allow. A scale per row sets no limit.
        OpenVINO quantizes nothing in groups that do not divide a block or are smaller than its 16 lanes.
        docs/explanation/performance.md lists the group sizes that were tried.
        """
        if self.format.smoothed:
            return 0  # its activations are int8 already
        formats = {module.format for module in self.modules if module.format}
        integer = [fmt for fmt in formats if fmt.element in ("int8", "int4") and not fmt.activations]
        group = math.gcd(_LARGEST_GROUP, *(max(0, fmt.block) for fmt in integer)) if integer else 0
        return group if group >= _SMALLEST_GROUP else 0

    def record(self) -> dict[str, Any]:
        """Return the summary of the plan for the manifest.

        "activations": the element types that layers quantize their inputs to, if any.
        """
        kept = {module.name: module.reason for module in self.modules if not module.format}
        formats = [module.format for module in self.modules if module.format]
        return {
            "format": self.format.name,
            "activations": sorted({fmt.activations for fmt in formats if fmt.activations}),
            "activation_group": self.activation_group,
            "modules": len(self.quantized()),
            "kept": kept,
            "bits_per_parameter": round(self.bits_per_parameter, 3),
        }


def make_plan(
    matrices: Mapping[str, tuple[int, int]],
    format: str,
    exclude: Sequence[str] = (),
    recipe_exclude: Sequence[str] = (),
    *,
    groups: Iterable[Sequence[str]] | None = None,
    scales: str | None = None,
    stored_bits: int = 16,
    other_params: int = 0,
    head: str | None = None,
    tied: Sequence[str] = (),
) -> QuantPlan:
    """Decide the format of each matrix.

    matrices: module name in the checkpoint (without ".weight") -> [out, in].
    exclude: the user's shell patterns (fnmatch, case-sensitive) of whole module names to leave unquantized.
    recipe_exclude: the patterns of the family's recipe.
    groups: the fused modules. The default is q, k and v, and gate and up, by their names. A module that is
    left unquantized keeps its whole group unquantized.
    scales: the dtype of weight_scale ("F16", "BF16" or "F32"), where the format allows a choice.
    stored_bits, other_params: as in QuantPlan.
    head: the format of lm_head. None: not quantized.
    tied: the modules that share their weight with the embedding.
    Raises RequestError for an unknown format, for a user's pattern that matches nothing, and if nothing is
    left to quantize. Raises BuildError for a recipe's pattern that matches nothing, and ValueError for groups
    that overlap or whose modules differ in their input size.
    """
    fmt = get_format(format)
    if scales is not None and fmt.float_scales:
        fmt = fmt.with_scales(scales)
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in matrices):
            raise RequestError(
                f"--exclude {pattern} matches no matrix of the model", _nearest(pattern, matrices), "exclude"
            )
    for pattern in recipe_exclude:
        if not any(fnmatchcase(name, pattern) for name in matrices):
            raise BuildError(
                f"the recipe excludes {pattern} from quantization, which matches no matrix of the model",
                "the recipe is for another version of this architecture; file an issue",
            )
    sources = (("--exclude ", exclude), ("recipe: ", recipe_exclude), ("default: ", ALWAYS_EXCLUDED))
    reasons = {name: _why_not(name, shape, fmt, sources) for name, shape in matrices.items()}
    modules = []
    member_of = _member_of(matrices, fused_groups(matrices) if groups is None else groups)
    for name, shape in matrices.items():
        group = member_of[name]
        reason = reasons[name]
        if not reason:
            kept = next((other for other in group if reasons[other]), None)
            reason = f"fused with {kept.rpartition('.')[2]}: {reasons[kept]}" if kept else ""
        chosen = None if reason else fmt
        if head and reason.startswith("default: ") and any(fnmatchcase(name, pattern) for pattern in HEADS):
            chosen = get_format(head)
            reason = chosen.why_not(shape)
        modules.append(Module(name, shape, None if reason else chosen, reason, group, tied=name in tied))
    if all(module.format is not fmt for module in modules):
        first = modules[0].name + ": " + modules[0].reason if modules else "it has no matrices"
        raise RequestError(
            f"{fmt.name} quantizes nothing of this model ({first})",
            "exclude less, or build without --quant",
            "quant",
        )
    return QuantPlan(fmt, tuple(modules), stored_bits, other_params)


def fused_groups(matrices: Mapping[str, tuple[int, int]]) -> list[tuple[str, ...]]:
    """Return the groups of fused modules, found by Hugging Face's names and equal input sizes."""
    groups = []
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in matrices):
        for siblings in _SIBLINGS:
            names = [f"{parent}.{sibling}" if parent else sibling for sibling in siblings]
            group = tuple(name for name in names if name in matrices)
            if len(group) > 1 and len({matrices[name][1] for name in group}) == 1:
                groups.append(group)
    return groups


def _member_of(
    matrices: Mapping[str, tuple[int, int]], groups: Iterable[Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    members: dict[str, tuple[str, ...]] = {name: (name,) for name in matrices}
    for group in groups:
        for name in group:
            if members.get(name) != (name,) or matrices[name][1] != matrices[group[0]][1]:
                raise ValueError(f"{name} is unknown, in two groups, or has another input than {group[0]}")
            members[name] = tuple(group)
    return members


def _why_not(
    name: str, shape: tuple[int, int], fmt: Format, sources: Iterable[tuple[str, Sequence[str]]]
) -> str:
    for origin, patterns in sources:
        for pattern in patterns:
            if fnmatchcase(name, pattern):
                return origin + pattern
    return fmt.why_not(shape)


def _nearest(pattern: str, names: Iterable[str]) -> str:
    """Return a hint with the patterns that the user may have meant."""
    for wider in (f"*.{pattern}", f"{pattern}.*", f"*{pattern}*"):
        if any(fnmatchcase(name, wider) for name in names):
            return f"a pattern is of the whole name of a module: did you mean {wider!r}?"
    # Offer one pattern for all layers, and the last parts of names.
    candidates = {re.sub(r"\.\d+\.", ".*.", name) for name in names}
    ends = {f"*.{name.rpartition('.')[2]}" for name in names if "." in name}
    near = get_close_matches(pattern, sorted(candidates | ends), n=3, cutoff=0.5)
    near = near or sorted(ends | {name for name in names if "." not in name})
    return f"near: {', '.join(near)}"
