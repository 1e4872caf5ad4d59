"""The findings of `llmc check`. docs/reference/check-findings.md explains every kind."""

from __future__ import annotations

from dataclasses import dataclass

# Kind -> what to do about it. These are the rows of docs/reference/check-findings.md.
REMEDIES = {
    "config": "take both configuration files and the weights from one version of the checkpoint",
    "format": "correct quant_algo or the module's entry; if the bytes are wrong, export again",
    "missing": (
        "export again: a shard may have been dropped. For a missing scale of the KV cache llmc uses 1.0"
    ),
    "shape": "correct group_size if the tensors are as intended, else export again",
    "dtype": "export again with the format's dtype",
    "value": (
        "calibrate and export again. If an unquantized weight has NaN, download it again or look at the "
        "original"
    ),
    "magnitude": "store the scale the way the format has it",
    "exclude": "correct exclude_modules, ignore or modules_to_not_convert",
    "unclaimed": "rename or remove it",
    "fused": "nothing, results are right; export with shared scales for fused kernels",
}


@dataclass(frozen=True)
class Finding:
    """A fault or a warning about one tensor, module or file."""

    #: A key of REMEDIES.
    kind: str
    #: The name of the tensor, the module or the file.
    tensor: str
    #: The fact, to be printed after `tensor`.
    what: str
    #: Whether the tensor is suspicious but usable.
    warning: bool = False
