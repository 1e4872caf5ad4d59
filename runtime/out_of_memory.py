"""Recognize out-of-memory errors among the exceptions of libraries, which have no common type for them."""

from __future__ import annotations

import errno
import re

from llmc.runtime.errors import LlmcError

# The words of C++, OpenVINO, oneDNN, torch, the dynamic loader, Python and the system.
_WORDS = re.compile(
    r"MemoryError|bad_alloc|bad allocation|can(?:'|no)t alloc|fail(?:ed|ure)? to alloc"
    r"|can(?:'|no)t allocate memory|not enough memory|out of memory|failed to map segment"
    r"|can't start new thread",
    re.IGNORECASE,
)


def says_out_of_memory(text: str) -> bool:
    """Return whether the message of a library is about a lack of memory."""
    return _WORDS.search(text) is not None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error`, or one of its causes, is a lack of memory."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or getattr(cause, "errno", None) == errno.ENOMEM:
            return True
        if not isinstance(cause, LlmcError) and says_out_of_memory(str(cause)):
            return True
        cause = cause.__cause__
    return False
