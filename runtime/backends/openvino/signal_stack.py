"""Keeps the alternate signal stack of a thread when OpenVINO loads its CPU plugin.

Python handles signals on this stack if the thread has one. The plugin of each core sets one of its own, and
puts the stack of before back when it is freed. If cores are freed in another order than they were made, the
thread is left with a stack whose memory is gone, and the next signal, such as Ctrl-C, kills the process
without a word (OpenVINO 2026.4.1).
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator


class Stack(ctypes.Structure):
    """stack_t of Linux, see sigaltstack(2)."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Give the calling thread the alternate signal stack that it has now back after the block."""
    if sys.platform != "linux":
        yield
        return
    system, stack = ctypes.CDLL(None), Stack()
    known = system.sigaltstack(None, ctypes.byref(stack)) == 0
    try:
        yield
    finally:
        if known:
            # It fails for a stack that is too small now that the process may use AMX. Then the new one stays.
            system.sigaltstack(ctypes.byref(stack), None)
