"""Check the attention kernels on this machine's NVIDIA GPU (`make gpu-check`). See docs/gpu/README.md."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def use_this_checkout() -> None:
    """Make `import llmc` find the packages of this checkout, whether or not llmc is installed.

    The packages are at the top level of the checkout, so its root serves as the package `llmc`.
    """
    package = ModuleType("llmc")
    package.__path__ = [str(ROOT)]
    package.__spec__ = importlib.util.spec_from_loader("llmc", None, is_package=True)
    sys.modules["llmc"] = package
