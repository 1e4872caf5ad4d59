"""The start of the command `llmc`. An interrupt while its modules are imported ends it without a word."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from typing import NoReturn


def script() -> NoReturn:
    """Run `llmc` with the arguments of this process and end the process with the exit code.

    Python would free everything first. After a build that takes two seconds: torch leaves many objects.
    """
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules are imported
    from llmc.cli.main import main

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    atexit._run_exitfuncs()  # workers end, temporary files are removed
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
