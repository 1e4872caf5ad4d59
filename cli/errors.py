"""The exit codes of errors, and their messages with option names instead of Python names."""

from __future__ import annotations

import re
import sys
from typing import Any

from llmc.cli import output
from llmc.cli.text import printable
from llmc.runtime.errors import LlmcError, ThresholdError

OK, ERROR, USAGE, MISSED, INTERNAL, INTERRUPTED, OUTPUT_CLOSED = 0, 1, 2, 3, 70, 130, 141


class UsageError(LlmcError):
    """The command line itself is wrong: an unknown option, a missing argument, a value of the wrong kind."""


def exit_code(error: LlmcError) -> int:
    """Return the exit code of an LlmcError."""
    if isinstance(error, ThresholdError):
        return MISSED
    return USAGE if isinstance(error, UsageError) or error.argument else ERROR


def texts_of(error: LlmcError) -> tuple[str, str]:
    """Return the message and the hint, with option names instead of Python names (--max-tokens)."""
    return _in_options(error.message, error.argument), _in_options(error.hint, error.argument)


def error_of(error: LlmcError) -> dict[str, Any]:
    """Return the field `error` of the JSON object that a command prints before it raises `error`."""
    message, hint = map(one_line, texts_of(error))
    return output.error_record(type(error).__name__, message, hint, exit_code(error), error.argument)


def print_error(error: LlmcError) -> None:
    """Print the lines `error:` and `hint:` for an error after which the command continues."""
    message, hint = map(one_line, texts_of(error))
    print(f"error: {message}\nhint: {hint}", file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """Return `text` as one line with control characters escaped. Names of files may contain them."""
    return printable(" ".join(text.splitlines()))


def _in_options(text: str, argument: str) -> str:
    """Replace the Python name of an argument by its option, in backticks or at the start of the text."""
    if not argument:
        return text
    option = f"--{argument.replace('_', '-')}"
    return re.sub(rf"`{argument}`|\A{argument}(?= (?:is|has|must|needs)\b)", option, text)
