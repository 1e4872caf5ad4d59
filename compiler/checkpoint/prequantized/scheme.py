"""The quantization scheme that a checkpoint's configuration declares. The tensors are compared with it."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmc.compiler.checkpoint.finding import Finding
from llmc.compiler.checkpoint.prequantized.module import Format
from llmc.compiler.checkpoint.prequantized.patterns import matches


@dataclass(frozen=True)
class DeclaredScheme:
    """The scheme that a configuration declares for one module. A field that it does not declare is None."""

    format: Format
    #: The number of values of a row that share a scale; 0: the whole row.
    group_size: int | None = None
    #: The rows and columns that share a scale.
    block: tuple[int, int] | None = None
    #: Whether the scale of the activations is stored.
    static_input: bool | None = None
    symmetric: bool = True
    #: The activation quantization, "fp8", "fp4" or "int8"; "" if there is none, or none is declared.
    inputs: str = ""


@dataclass(frozen=True)
class DeclaredSchemes:
    """The schemes that a checkpoint's configuration declares."""

    #: The quantization method: "modelopt", "compressed-tensors", "fp8" or "mxfp4".
    method: str
    #: A description of the method and the formats.
    label: str
    #: The program that quantized the checkpoint, with its version; "" if not declared.
    producer: str
    #: (targets, scheme); the first match applies. A class name as a target means every linear layer.
    groups: tuple[tuple[tuple[str, ...], DeclaredScheme], ...]
    #: The exclude list; None if the files have none.
    exclude: tuple[str, ...] | None
    #: The format of the KV cache; "" if not declared.
    kv_cache: str
    #: Contradictions within the configuration.
    findings: tuple[Finding, ...] = field(default=(), compare=False)

    def of(self, module: str) -> DeclaredScheme | None:
        """Return the scheme of a module; None if no target matches. The exclude list is not considered."""
        for targets, scheme in self.groups:
            if matches(module, targets):
                return scheme
        return self.default

    @property
    def default(self) -> DeclaredScheme | None:
        """The scheme of the linear layers that no other target matches."""
        return next((scheme for targets, scheme in self.groups if any(map(_is_class, targets))), None)

    def excludes(self, module: str) -> bool:
        """Return whether the exclude list matches `module`."""
        return matches(module, self.exclude or ())


def _is_class(target: str) -> bool:
    return target[:1].isupper() and target.isidentifier()
