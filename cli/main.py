"""The entry point of `llmc`: run one command and turn every outcome into an exit code.

    0    done
    1    error: the input, the machine or the disk; an `error:` and a `hint:` line say what and what to do
    2    wrong usage: an unknown command, a missing argument, or an option whose value cannot be used
    3    a threshold of `llmc verify` is missed
    70   internal error: a bug in llmc (EX_SOFTWARE)
    130  interrupted (128 + SIGINT)
    141  the reader of the output closed it (128 + SIGPIPE)

Modules are imported only when they are needed, because `llmc run` must start fast.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Sequence

from llmc.cli import output, streams
from llmc.cli.errors import (
    ERROR,
    INTERNAL,
    INTERRUPTED,
    OUTPUT_CLOSED,
    exit_code,
    one_line,
    texts_of,
)
from llmc.runtime.errors import LlmcError
from llmc.runtime.out_of_memory import is_out_of_memory

TRACEBACK = "LLMC_TRACEBACK"  # set to 1: tracebacks for every error

_RUN_LIBRARIES = ("numpy", "tokenizers", "jinja2", "typer", "rich", "tomli")
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `llmc` with `argv` (default: the arguments of this process) and return the exit code."""
    streams.plug_closed()
    with contextlib.suppress(AttributeError, OSError):  # text of a model may not fit the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    arguments = list(sys.argv[1:] if argv is None else argv)
    output.start(" ".join(arguments[:1]), "--json" in arguments)
    silenced = contextlib.nullcontext() if _tracebacks() else streams.libraries_silenced(output.note)
    with silenced:
        return _run(arguments)


def _run(arguments: Sequence[str]) -> int:
    try:
        from llmc.cli import app

        code = app.invoke(arguments)
        sys.stdout.flush()  # a full disk or a closed pipe must show here, not when Python shuts down
        return code
    except KeyboardInterrupt as error:
        # CPython records a KeyboardInterrupt that passes through `exec` of a string, as in an import. Under
        # `python -m` the process then ends by SIGINT, even if the exception is caught. The next `exec` or
        # `eval` of a string clears that record.
        eval("None")
        return report(error, INTERRUPTED, "interrupted", "nothing was left half-written")
    except BrokenPipeError as error:
        if _output_is_closed():
            _discard_output()
            return OUTPUT_CLOSED
        return _internal(error)
    except Exception as error:
        if is_out_of_memory(error):
            hint = "end other programs, or take a smaller model or context (--kv-memory, --max-seq-len)"
            return report(error, ERROR, "out of memory", hint, "OutOfMemory")
        if isinstance(error, LlmcError):
            return _llmc_error(error)
        if isinstance(error, ModuleNotFoundError):
            return _missing_library(error)
        return _os_error(error) if isinstance(error, OSError) else _internal(error)


def report(
    error: BaseException, code: int, message: str, hint: str, kind: str = "", argument: str = ""
) -> int:
    """Print the lines `error:` and `hint:`, and the traceback if LLMC_TRACEBACK is set. Return `code`.

    code: the exit code
    kind: the field `kind` of the error with --json, by default the class of `error`
    argument: the refused argument, by its Python name; "" if there is none
    """
    message, hint = one_line(message), one_line(hint or f"{TRACEBACK}=1 shows where it happened")
    output.print_json_error(output.error_record(kind or type(error).__name__, message, hint, code, argument))
    if _tracebacks():
        import traceback

        traceback.print_exception(error)
    with contextlib.suppress(OSError):  # stderr may be closed or full; the exit code still tells
        print(f"error: {message}", file=sys.stderr)
        print(f"hint: {hint}", file=sys.stderr)
    return code


def _llmc_error(error: LlmcError) -> int:
    message, hint = texts_of(error)
    return report(error, exit_code(error), message, hint, argument=error.argument)


def _tracebacks() -> bool:
    return os.environ.get(TRACEBACK, "0") not in ("", "0")


def _internal(error: Exception) -> int:
    what = str(error).strip() or "no message"
    hint = f"this is a bug: rerun with {TRACEBACK}=1 and report the traceback"
    return report(error, INTERNAL, f"internal error: {type(error).__name__}: {what}", hint, "InternalError")


def _missing_library(error: ModuleNotFoundError) -> int:
    from llmc.runtime.installation import install_hint

    name = (error.name or "").partition(".")[0]
    if name in _RUN_LIBRARIES:
        message, hint = f"llmc needs {name}, which is not installed", install_hint()
        return report(error, ERROR, message, hint, "MissingLibrary")
    from llmc.cli.build import LIBRARIES

    if name in LIBRARIES:
        message = f"this command needs {name}, which is not installed"
        return report(error, ERROR, message, install_hint("build"), "MissingLibrary")
    return _internal(error)


def _os_error(error: OSError) -> int:
    message = f"{error.filename or 'cannot write'}: {error.strerror or error}"
    if error.errno in _OUT_OF_SPACE:
        _discard_output()  # stdout may be the file that has no space
        hint = "free some space, or write elsewhere; temporary files go to TMPDIR"
        return report(error, ERROR, message, hint, "OSError")
    return report(error, ERROR, message, "check the path and its permissions", "OSError")


def _output_is_closed() -> bool:
    """Return whether stdout is a closed pipe."""
    import select

    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):
        return False


def _discard_output() -> None:
    """Redirect stdout to the null device. Else its buffer would fail again when Python shuts down."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
