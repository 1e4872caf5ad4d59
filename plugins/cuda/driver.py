"""Calls of CUDA's driver API, through cuda-python. The import needs no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda.bindings import driver


class CudaError(RuntimeError):
    """A CUDA call failed. The message names the call and has the driver's message."""


def call(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    """Call a function of `cuda.bindings.driver`. Return its result: a tuple if it has several, or None.

    Raises CudaError if the call fails, or if this machine has no NVIDIA driver.
    """
    name = getattr(function, "__name__", str(function))
    try:
        status, *results = function(*arguments)
    except RuntimeError as error:  # cuda-python finds no libcuda, or not this function in it
        raise CudaError(f"{name}: {str(error).splitlines()[0]}") from error
    if status != driver.CUresult.CUDA_SUCCESS:
        words = [text(status)[1] for text in (driver.cuGetErrorName, driver.cuGetErrorString)]
        message = ": ".join(word.decode() for word in words if word)
        raise CudaError(f"{name} failed: {message or f'error {int(status)}'}")
    return tuple(results) if len(results) > 1 else results[0] if results else None
