"""llmc: compiles large language models ahead of time into verified bundles, and runs them.

    import llmc

    with llmc.load("model.llmc") as llm:
        print(llm.generate("Once upon a time", max_tokens=40)[0].text)

The names below are imported when they are first used, so that `import llmc` is fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmc.runtime.telemetry import disable_telemetry

__version__ = "0.1.0"

disable_telemetry()  # here, because every process of llmc imports this first
if TYPE_CHECKING:
    from llmc.runtime.engine import RequestOutput as RequestOutput
    from llmc.runtime.errors import BackendError as BackendError
    from llmc.runtime.errors import BundleError as BundleError
    from llmc.runtime.errors import LlmcError as LlmcError
    from llmc.runtime.errors import RequestError as RequestError
    from llmc.runtime.llm import LLM as LLM
    from llmc.runtime.llm import load as load
    from llmc.runtime.sampling import SamplingParams as SamplingParams

_MODULES = {
    "LLM": "llmc.runtime.llm",
    "load": "llmc.runtime.llm",
    "RequestOutput": "llmc.runtime.engine",
    "SamplingParams": "llmc.runtime.sampling",
    "LlmcError": "llmc.runtime.errors",
    "BackendError": "llmc.runtime.errors",
    "BundleError": "llmc.runtime.errors",
    "RequestError": "llmc.runtime.errors",
}
__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'llmc' has no attribute {name!r}")
    from importlib import import_module

    globals()[name] = value = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
