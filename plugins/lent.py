"""What the caller of an engine lends to its plugins for the call, such as kernels or a communicator."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Lent(threading.local, Generic[T]):
    """An object that a thread lends, and the first error of its borrowers.

    TensorRT calls plugins in the thread that runs the engine. It prints their exceptions and continues.
    """

    _lent: T | None = None
    _error: Exception | None = None

    def __init__(self, lacking: str) -> None:
        """lacking: the beginning of the error of a borrower to whom nothing is lent"""
        self._lacking = lacking

    @contextlib.contextmanager
    def lend(self, lent: T) -> Iterator[None]:
        """Lend an object to the plugins of engines that this thread runs in the `with` block.

        The first exception of a plugin is raised again at the end.
        """
        self._lent, self._error = lent, None
        try:
            yield
        finally:
            error = self._error
            self._lent = self._error = None
            if error is not None:
                raise error

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[T]:
        """Use the object. Raises RuntimeError if there is none. Errors in the `with` block are kept."""
        if self._lent is None:
            raise RuntimeError(f"{self._lacking}: run the engine through llmc.runtime")
        try:
            yield self._lent
        except Exception as error:
            self._error = self._error or error
            raise
