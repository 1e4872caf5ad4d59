"""Check a checkpoint and summarize it, for `llmc check`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from llmc.compiler.checkpoint.check.magnitude import check_weights
from llmc.compiler.checkpoint.check.values import check_plain, check_scales
from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.finding import Finding
from llmc.compiler.checkpoint.prequantized.layout import QuantizedCheckpoint, read_quantized
from llmc.compiler.checkpoint.prequantized.module import QuantizedModule


@dataclass(frozen=True)
class CheckReport:
    """A summary of a checkpoint, and its findings."""

    path: str
    model_type: str
    #: The declared quantization; "undeclared" if only the tensors show one, "" if there is none.
    quantization: str
    #: The program that quantized the checkpoint, with its version; "" if not declared.
    producer: str
    #: Format -> number of modules.
    formats: dict[str, int]
    #: Quantized modules whose layout is invalid.
    unread: tuple[str, ...]
    #: Unquantized modules that the configuration excludes from quantization.
    excluded: tuple[str, ...]
    #: The number of tensors.
    tensors: int
    #: The size of the tensor data in bytes.
    bytes: int
    #: The number of parameters of the model; scales are not counted.
    parameters: int
    #: Bits per parameter of the whole checkpoint, with its scales and unquantized tensors.
    bits_per_parameter: float
    #: Bits per parameter of the quantized modules alone; 0 if there are none.
    quantized_bits: float
    #: The declared format of the KV cache; "" if there is none.
    kv_cache: str
    #: The number of tensors with scales of the KV cache.
    kv_scales: int
    #: Whether every value was read, rather than a sample of the weights.
    full: bool
    #: Faults first, then warnings.
    findings: tuple[Finding, ...]

    @property
    def faults(self) -> tuple[Finding, ...]:
        """The findings without the warnings."""
        return tuple(finding for finding in self.findings if not finding.warning)


def check_checkpoint(path: Path | str, full: bool = False) -> CheckReport:
    """Check the headers, the configuration, every scale and the weights of a checkpoint directory.

    full: read every weight instead of samples. Memory holds a few megabytes at a time in both cases.

    Raises CheckpointError for files that cannot be read, UnsupportedError for an unknown quantization.
    """
    checkpoint = Checkpoint.open(path)
    quantized = read_quantized(checkpoint)
    scales = check_scales(quantized)
    broken = {finding.tensor for finding in scales}
    values = [*scales, *check_weights(quantized, broken, full), *check_plain(quantized, full)]
    findings = sorted((*quantized.findings, *values), key=lambda finding: finding.warning)
    return _report(checkpoint, quantized, full, findings)


def _report(
    checkpoint: Checkpoint, quantized: QuantizedCheckpoint, full: bool, findings: list[Finding]
) -> CheckReport:
    schemes, modules = quantized.schemes, quantized.modules.values()
    weights = sum(module.shape[0] * module.shape[1] for module in modules)
    stored = sum(module.nbytes - _bias_bytes(module) for module in modules)
    label = schemes.label if schemes else "undeclared" if quantized.quantized else ""
    return CheckReport(
        path=str(checkpoint.path),
        model_type=checkpoint.model_type,
        quantization=label,
        producer=schemes.producer if schemes else "",
        formats=dict(Counter(map(describe, modules)).most_common()),
        unread=quantized.unread,
        excluded=quantized.excluded,
        tensors=len(checkpoint.tensors),
        bytes=checkpoint.total_bytes,
        parameters=quantized.parameters,
        bits_per_parameter=8 * checkpoint.total_bytes / max(1, quantized.parameters),
        quantized_bits=8 * stored / max(1, weights),
        kv_cache=schemes.kv_cache if schemes else "",
        kv_scales=len(quantized.kv_scales),
        full=full,
        findings=tuple(findings),
    )


def describe(module: QuantizedModule) -> str:
    """Return the format and its group or block size: "nvfp4 in groups of 16"."""
    if module.format == "fp8-block":
        return f"{module.format} of {module.block[0]} x {module.block[1]}"
    groups = f" in groups of {module.group_size}" if module.group_size else ""
    return f"{module.format}{groups}"


def _bias_bytes(module: QuantizedModule) -> int:
    return module.tensors["bias"].nbytes if "bias" in module.tensors else 0
