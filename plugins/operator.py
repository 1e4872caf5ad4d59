"""The custom operators in engines, by their names in the domain `llmc`."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any

from llmc.plugins.collectives import spec as collectives
from llmc.plugins.experts import spec as experts
from llmc.plugins.grouped_top_k import spec as grouped_top_k
from llmc.plugins.head_linear import spec as head_linear
from llmc.plugins.paged_attention import spec as paged_attention
from llmc.plugins.round_fp4 import spec as round_fp4

DOMAIN = "llmc"


@dataclass(frozen=True)
class Operator:
    """An operator with the ABI that this llmc builds and runs."""

    #: The name without the domain.
    name: str
    #: The version of the operator's inputs, outputs and attributes.
    abi: int
    #: The module whose `function()` returns the body. A name, because the runtime must not import onnx_ir.
    #: "": the operator has no body.
    module: str = ""
    #: The number of inputs that every node has. 0: all nodes have the same inputs.
    required: int = 0

    @property
    def full_name(self) -> str:
        """The name in a manifest, such as "llmc.PagedAttention"."""
        return f"{DOMAIN}.{self.name}"

    def body(self, form: Mapping[str, bool] = MappingProxyType({}), *, optional: bool = False) -> Any:
        """Return the operator as a function of standard ONNX operators, an `onnx_ir.Function`.

        form: arguments of `function`, of attention only
        optional: whether the nodes have the optional inputs
        """
        function = import_module(self.module).function
        return function(optional, **form) if self.required else function()


# The order is that of the bodies in an ONNX file.
OPERATORS: Mapping[str, Operator] = {
    operator.name: operator
    for operator in (
        Operator(round_fp4.NAME, round_fp4.ABI_VERSION, "llmc.plugins.round_fp4.body"),
        Operator(
            paged_attention.NAME,
            paged_attention.ABI_VERSION,
            "llmc.plugins.paged_attention.body",
            paged_attention.SINKS,
        ),
        Operator(experts.NAME, experts.ABI_VERSION, "llmc.plugins.experts.body", experts.REQUIRED),
        Operator(head_linear.NAME, head_linear.ABI_VERSION, "llmc.plugins.head_linear.body"),
        Operator(grouped_top_k.NAME, grouped_top_k.ABI_VERSION, "llmc.plugins.grouped_top_k.body"),
        *(Operator(name, collectives.ABI_VERSION) for name in collectives.OF_RANKS),
    )
}


def bodies_for(
    names: Iterable[str],
    optional: Container[str] = (),
    forms: Mapping[str, Mapping[str, bool]] = MappingProxyType({}),
) -> list[Any]:
    """Return the bodies, `onnx_ir.Function`, of the custom operators among `names`.

    optional: the operators whose nodes have their optional inputs
    forms: operator -> `form` of `Operator.body`
    """
    used = set(names)
    operators = (operator for operator in OPERATORS.values() if operator.name in used and operator.module)
    return [
        operator.body(forms.get(operator.name, {}), optional=operator.name in optional)
        for operator in operators
    ]


def unsupported(needed: Iterable[tuple[str, int]]) -> list[str]:
    """Return a sentence for each operator (full name, ABI) that this llmc lacks."""
    known = sorted((operator.full_name, operator.abi) for operator in OPERATORS.values())
    here = ", ".join(f"{name} at ABI {abi}" for name, abi in known)
    return [
        f"the engine needs operator {name} at ABI {abi}, this llmc has {here}"
        for name, abi in needed
        if (name, abi) not in known
    ]
