"""The entry point of `llmc`: run one command and turn every outcome into an exit code.

    0    done
    1    error: the input, the machine or the disk; an `error:` and a `hint:` line say what and what to do
    2    wrong usage of the command line, in the same two lines
    70   internal error: a bug in llmc (EX_SOFTWARE)
    130  interrupted (128 + SIGINT)
    141  the reader of the output closed it (128 + SIGPIPE)

Nothing is imported here before it is needed: `llmc run` must start fast.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Sequence

from llmc.cli.text import print_error
from llmc.runtime.errors import LlmcError
from llmc.runtime.installation import install_hint

OK, ERROR, USAGE, INTERNAL, INTERRUPTED, OUTPUT_CLOSED = 0, 1, 2, 70, 130, 141
TRACEBACK = "LLMC_TRACEBACK"  # set to 1: tracebacks for every error

_RUN_LIBRARIES = ("numpy", "openvino", "onnxruntime", "tokenizers", "jinja2", "typer", "rich", "tomli")
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `llmc` with `argv` (default: the arguments of this process) and return the exit code."""
    with contextlib.suppress(AttributeError, OSError):  # text of a model may not fit the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        from llmc.cli import app

        code = app.invoke(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # a full disk or a closed pipe must show here, not when Python shuts down
        return code
    except KeyboardInterrupt as error:
        # CPython notes an interrupt that passes through an `exec` of text (as imports do). Under `python -m`
        # it then dies by SIGINT in the end, although this caught it. The next such call clears the note.
        eval("None")
        return report(error, INTERRUPTED, "interrupted", "nothing was left half-written")
    except BrokenPipeError as error:
        if _output_is_closed():
            _discard_output()
            return OUTPUT_CLOSED
        return _internal(error)
    except LlmcError as error:
        from llmc.cli.app import UsageError

        return report(error, USAGE if isinstance(error, UsageError) else ERROR, error.message, error.hint)
    except ModuleNotFoundError as error:
        return _missing_library(error)
    except OSError as error:
        return _os_error(error)
    except MemoryError as error:
        return report(error, ERROR, "out of memory", "end other programs, or take a smaller model or context")
    except Exception as error:
        return _internal(error)


def report(error: BaseException, code: int, message: str, hint: str) -> int:
    """Print the lines `error:` and `hint:`, and the traceback if it is asked for. Return `code`."""
    if os.environ.get(TRACEBACK, "0") not in ("", "0"):
        import traceback

        traceback.print_exception(error)
    print_error(message, hint or f"{TRACEBACK}=1 shows where it happened")
    return code


def _internal(error: Exception) -> int:
    what = str(error).strip() or "no message"
    hint = f"this is a bug: rerun with {TRACEBACK}=1 and report the traceback"
    return report(error, INTERNAL, f"internal error: {type(error).__name__}: {what}", hint)


def _missing_library(error: ModuleNotFoundError) -> int:
    name = (error.name or "").partition(".")[0]
    if name in _RUN_LIBRARIES:
        return report(error, ERROR, f"llmc needs {name}, which is not installed", install_hint())
    from llmc.cli.build import LIBRARIES

    if name in LIBRARIES:
        message = f"this command needs {name}, which is not installed"
        return report(error, ERROR, message, install_hint("build"))
    return _internal(error)


def _os_error(error: OSError) -> int:
    message = f"{error.filename or 'cannot write'}: {error.strerror or error}"
    if error.errno in _OUT_OF_SPACE:
        _discard_output()  # which may be what found no space
        return report(error, ERROR, message, "free some space, or write elsewhere")
    return report(error, ERROR, message, "check the path and its permissions")


def _output_is_closed() -> bool:
    """Return whether the closed pipe is stdout, and not another one."""
    import select

    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):
        return False


def _discard_output() -> None:
    """Redirect stdout to nowhere: its buffer would fail again, with a traceback, when Python shuts down."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main())
