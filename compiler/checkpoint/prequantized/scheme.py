"""The quantization scheme that a checkpoint declares. The tensors decide, and are compared with it."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmc.compiler.checkpoint.finding import Finding
from llmc.compiler.checkpoint.prequantized.module import Format
from llmc.compiler.checkpoint.prequantized.patterns import matches


@dataclass(frozen=True)
class DeclaredScheme:
    """What a configuration declares for one module. None: it does not say.

    group_size: values of a row that share a scale; 0: the whole row
    block: rows and columns that share a scale
    inputs: the activation quantization, "fp8", "fp4" or "int8"; "": none, or not declared
    """

    format: Format
    group_size: int | None = None
    block: tuple[int, int] | None = None
    static_input: bool | None = None
    symmetric: bool = True
    inputs: str = ""


@dataclass(frozen=True)
class DeclaredSchemes:
    """groups: (targets, claim), the first match counts; a target that is a class name is for every module.

    exclude: None when the files have no such list. kv_cache: "" when they name no format for it.
    """

    method: str
    label: str
    producer: str
    groups: tuple[tuple[tuple[str, ...], DeclaredScheme], ...]
    exclude: tuple[str, ...] | None
    kv_cache: str
    findings: tuple[Finding, ...] = field(default=(), compare=False)

    def of(self, module: str) -> DeclaredScheme | None:
        """The claim for a module that is not excluded; None if the files do not name it."""
        for targets, scheme in self.groups:
            if matches(module, targets):
                return scheme
        return self.default

    @property
    def default(self) -> DeclaredScheme | None:
        """The claim for every linear layer that no other target names."""
        return next((scheme for targets, scheme in self.groups if any(map(_is_class, targets))), None)

    def excludes(self, module: str) -> bool:
        return matches(module, self.exclude or ())


def _is_class(target: str) -> bool:
    return target[:1].isupper() and target.isidentifier()
