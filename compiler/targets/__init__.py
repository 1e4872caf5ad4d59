"""The targets of `llmc build`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmc.compiler.targets.base import Target


def target(name: str) -> Target:
    """Return the target called `name`, a key of `request.TARGETS`. Imports only what that target needs."""
    if name == "cpu":
        from llmc.compiler.targets.cpu import CpuTarget

        return CpuTarget()
    from llmc.compiler.targets.tensorrt.target import FLAVORS, TensorRTTarget

    return TensorRTTarget(FLAVORS[name])
