"""Turn errors of model code and of torch into one sentence that names the module."""

from __future__ import annotations

from types import TracebackType

from torch import nn

from llmc.runtime.errors import UnsupportedError

HINT = "set LLMC_TRACEBACK=1 to see where; `llmc zoo list` shows the families that are known to work"
_TOKENS = "its code depends on the number of tokens"
_VALUES = "its code depends on the values of tensors"
_REASONS = {  # a part of torch's message -> the reason in a user's words
    "specialized it to be a constant": _TOKENS,
    "Constraints violated": _TOKENS,
    "data-dependent": _VALUES,
    "DataDependentOutput": _VALUES,
    "No ONNX function found": "it has an operator without an ONNX equivalent",
    "No decompositions registered": "it has an operator without an ONNX equivalent",
}


def reason(error: BaseException) -> str:
    """Return the reason why model code failed, translated from torch's message if it is known."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    words = " ".join(f"{type(exception).__name__}: {exception}" for exception in causes)
    for pattern, meaning in _REASONS.items():
        if pattern in words:
            return meaning
    if any(type(exception).__module__.partition(".")[0] == "torch" for exception in causes):
        return "torch cannot record what its code does"
    lines = str(causes[-1]).strip().splitlines()
    return lines[0] if lines else type(causes[-1]).__name__


def untraceable(model: nn.Module, error: BaseException) -> UnsupportedError:
    """Return the error for a model whose trace failed with `error`."""
    names = {module: name for name, module in model.named_modules()}
    module = _innermost(error, names)
    kind = type(module or model).__name__
    where = f"module {names[module]} ({kind})" if module is not None and names[module] else kind
    return UnsupportedError(f"llmc cannot trace {where}: {reason(error)}", HINT)


def _innermost(error: BaseException, names: dict[nn.Module, str]) -> nn.Module | None:
    """Return the innermost module whose code was running when `error` or its first cause was raised.

    names: the modules of the model
    """
    innermost = None
    cause: BaseException | None = error
    while cause is not None:
        frame: TracebackType | None = cause.__traceback__
        inner = None
        while frame is not None:
            running = frame.tb_frame.f_locals.get("self")
            if isinstance(running, nn.Module) and running in names:
                inner = running
            frame = frame.tb_next
        innermost = inner or innermost
        cause = cause.__cause__
    return innermost


def unlike(name: str, module: nn.Module) -> UnsupportedError:
    """Return the error for a module whose code fails when llmc compares it with an operator."""
    where = f"module {name} ({type(module).__name__})"
    return UnsupportedError(
        f"{where} has the name of a layer that llmc knows, but takes other inputs",
        HINT,
    )
