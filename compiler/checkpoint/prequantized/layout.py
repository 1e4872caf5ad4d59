"""Sort the tensors of a checkpoint into quantized modules, unquantized weights, KV scales, and the rest."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from llmc.compiler.checkpoint.checkpoint import CONFIG, Checkpoint
from llmc.compiler.checkpoint.finding import Finding
from llmc.compiler.checkpoint.prequantized.module import (
    KV_NAMES,
    ROLES,
    QuantizedModule,
    Role,
    Stack,
    is_auxiliary,
    stack_role,
)
from llmc.compiler.checkpoint.prequantized.read_config import read_schemes
from llmc.compiler.checkpoint.prequantized.recognize import is_quantized, recognize
from llmc.compiler.checkpoint.prequantized.scheme import DeclaredSchemes
from llmc.compiler.checkpoint.safetensors import TensorRef
from llmc.runtime.dtypes import FLOATS

# Tensors in old checkpoints that models compute now.
_COMPUTED = re.compile(r".*rotary_emb\.inv_freq|.*\.attn\.(masked_)?bias")
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """The tensors of a checkpoint, sorted and compared with its configuration."""

    #: None if the configuration does not declare quantization.
    schemes: DeclaredSchemes | None
    #: Quantized modules with a valid layout, by name.
    modules: Mapping[str, QuantizedModule]
    #: Quantized modules whose layout is invalid.
    unread: tuple[str, ...]
    #: Every unquantized tensor of the model, by name.
    plain: Mapping[str, TensorRef]
    #: The scales of the KV cache, by name.
    kv_scales: Mapping[str, TensorRef]
    #: Modules with an unquantized matrix that the configuration excludes from quantization.
    excluded: tuple[str, ...]
    #: Faults and warnings about the layout.
    findings: tuple[Finding, ...]

    @property
    def quantized(self) -> bool:
        """Whether the configuration declares quantization or a tensor is quantized."""
        return self.schemes is not None or bool(self.modules) or bool(self.unread)

    @property
    def named(self) -> dict[str, QuantizedModule | Stack | TensorRef]:
        """The parameters of the model, by name. A quantized weight is represented by its module."""
        weights = {
            name if module.experts else f"{name}.weight": module.parameter
            for name, module in self.modules.items()
        }
        biases = [module.tensors["bias"] for module in self.modules.values() if "bias" in module.tensors]
        return {**self.plain, **weights, **{ref.name: ref for ref in biases}}

    @property
    def parameters(self) -> int:
        """The number of parameters of the model. Each packed code counts, scales do not."""
        codes = sum(math.prod(module.shape) for module in self.modules.values())
        biases = [module.tensors["bias"] for module in self.modules.values() if "bias" in module.tensors]
        return codes + sum(math.prod(ref.shape) for ref in (*biases, *self.plain.values()))


def read_quantized(checkpoint: Checkpoint) -> QuantizedCheckpoint:
    """Sort a checkpoint's tensors and compare them with its configuration. Reads no weights.

    Raises UnsupportedError for a method that llmc does not read, CheckpointError for damaged files.
    """
    schemes = read_schemes(checkpoint)
    findings = list(schemes.findings) if schemes else []
    parts: defaultdict[str, dict[Role, TensorRef]] = defaultdict(dict)
    others: dict[str, TensorRef] = {}
    kv_scales: dict[str, TensorRef] = {}
    experts: dict[str, int] = {}
    for name, ref in checkpoint.tensors.items():
        module, _, last = name.rpartition(".")
        if (stack := stack_role(ref)) is not None:
            parts[stack[0]][stack[1]] = _as_matrix(ref, stack[1])
            if stack[1] == "weight":
                experts[stack[0]] = ref.shape[0]
        elif last in KV_NAMES:
            kv_scales[name] = ref
        elif (role := ROLES.get(last)) is None or role in parts[module]:
            others[name] = ref
        else:
            parts[module][role] = ref
    modules: dict[str, QuantizedModule] = {}
    plain: dict[str, TensorRef] = {}
    unread: set[str] = set()
    for name, tensors in parts.items():
        if not is_quantized(tensors):
            for role, ref in tensors.items():
                (plain if role in ("weight", "bias") else others)[ref.name] = ref
            continue
        recognized, contradictions = recognize(name, tensors, schemes.of(name) if schemes else None)
        findings += contradictions
        if recognized is not None:
            modules[name] = replace(recognized, experts=experts.get(name, 0))
        else:
            unread.add(name)
    for name, ref in others.items():
        if ref.dtype in FLOATS and name.rpartition(".")[0] not in modules and not is_auxiliary(name):
            plain[name] = ref
        elif not _COMPUTED.fullmatch(name):
            buffer = ref.dtype in ("BOOL", "I64") and not is_auxiliary(name)
            what = f"{ref.dtype} {list(ref.shape)} belongs to no weight"
            findings.append(Finding("unclaimed", name, what, warning=buffer))
    findings += _against_config(schemes, modules, plain, unread)
    findings += _hidden_size(checkpoint, modules) + _fused(modules)
    if schemes and schemes.kv_cache and not kv_scales:
        what = f"says that the KV cache is {schemes.kv_cache}, but no tensor has its scales: 1.0 is used"
        findings.append(Finding("missing", CONFIG, what, warning=True))
    excluded = [name for name in _matrices(plain) if schemes and schemes.excludes(name)]
    return QuantizedCheckpoint(
        schemes, modules, tuple(sorted(unread)), plain, kv_scales, tuple(excluded), tuple(findings)
    )


def _as_matrix(ref: TensorRef, role: Role) -> TensorRef:
    """Return a tensor of a stack of experts as that of one matrix, with the same bytes."""
    rows = ref.shape[0] * ref.shape[1]
    if role == "weight":
        return replace(ref, shape=(rows, ref.shape[2] * ref.shape[3]))
    return replace(ref, shape=(rows, ref.shape[2]), dtype="F8_E8M0")


def _matrices(plain: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """Return the matrices of unquantized modules, by module, without embeddings."""
    matrices = {}
    for name, ref in plain.items():
        module, _, last = name.rpartition(".")
        end = module.rpartition(".")[2]
        if last == "weight" and len(ref.shape) == 2 and "embed" not in end and end not in ("wte", "wpe"):
            matrices[module] = ref
    return matrices


def _against_config(
    schemes: DeclaredSchemes | None,
    modules: Mapping[str, QuantizedModule],
    plain: Mapping[str, TensorRef],
    unread: set[str],
) -> list[Finding]:
    """Compare the declared quantization with that of the tensors, in both directions."""
    if schemes is None:
        if not modules:
            return []
        name, module = next(iter(modules.items()))
        what = f"does not declare quantization, but {name} is {module.format} ({len(modules)} such modules)"
        return [Finding("config", CONFIG, what)]
    if schemes.groups and not modules and not unread:
        return [Finding("config", CONFIG, f"declares {schemes.label}, but no tensor is quantized")]
    findings = []
    for name, module in modules.items():
        weight = module.tensors["weight"].name
        if schemes.excludes(name):
            findings.append(
                Finding("exclude", weight, f"is {module.format}, but the configuration excludes it")
            )
        elif schemes.groups and schemes.of(name) is None:
            findings.append(
                Finding("exclude", weight, f"is {module.format}, but the configuration does not name it")
            )
    ends = {name.rpartition(".")[2] for name in (*modules, *unread)}
    for name, ref in _matrices(plain).items():
        if schemes.excludes(name) or schemes.of(name) is None:
            continue
        end = name.rpartition(".")[2]
        certain = end in ends or (end == "lm_head" and schemes.method == "compressed-tensors")
        if certain or schemes.exclude is not None:
            what = f"is {ref.dtype}, not quantized, and the configuration does not exclude it"
            findings.append(Finding("exclude", ref.name, what, warning=not certain))
    return findings


def _hidden_size(checkpoint: Checkpoint, modules: Mapping[str, QuantizedModule]) -> list[Finding]:
    """Find FP8 weights that were taken for NVFP4: their rows are twice as wide as the hidden size."""
    hidden_size = checkpoint.config.get("hidden_size")
    findings = []
    for name, module in modules.items():
        end = name.rpartition(".")[2]
        reads_hidden = end in (
            "q_proj",
            "k_proj",
            "v_proj",
            "qkv_proj",
            "gate_proj",
            "up_proj",
            "gate_up_proj",
        )
        if (
            module.format == "nvfp4"
            and module.block[1] == 16
            and reads_hidden
            and module.shape[1] == 2 * (hidden_size or 0)
        ):
            weight = module.tensors["weight"]
            what = (
                f"has {module.shape[1]} 4-bit values per row, hidden_size is {hidden_size}: "
                "these are FP8 bytes"
            )
            findings.append(Finding("format", weight.name, what))
    return findings


def _fused(modules: Mapping[str, QuantizedModule]) -> list[Finding]:
    """Warn about linear layers that cannot be fused, because their global or input scales differ."""
    findings = []
    for name in modules:
        parent, _, end = name.rpartition(".")
        for group in _FUSED:
            if end != group[0]:
                continue
            members = [modules[member] for last in group if (member := f"{parent}.{last}") in modules]
            for role in ("global_scale", "inverse_global_scale", "input_scale", "inverse_input_scale"):
                refs = [member.tensors[role] for member in members if role in member.tensors]
                values = {float(ref.read().reshape(-1)[0]) for ref in refs if math.prod(ref.shape) == 1}
                if len(values) > 1:
                    differing = ", ".join(f"{value:.4g}" for value in sorted(values))
                    what = f"differs among {', '.join(group)}: {differing}"
                    findings.append(Finding("fused", refs[0].name, what, warning=True))
    return findings
