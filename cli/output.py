"""The output of commands: results on stdout, everything else on stderr, filtered by --log-level.

With --json, which all commands but `llmc help` have, a command prints one JSON object (`llmc run`: one per
prompt). All objects have these fields:

    schema_version  the version of the fields; new fields do not change it
    command         the command, such as "build" or "zoo list"
    ok              false if the exit code is not 0
    error           only if `ok` is false: kind, message, hint, argument and exit_code

docs/reference/json.md lists the fields of every command.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer

from llmc.cli import streams

SCHEMA_VERSION = 1
LEVELS = ("error", "warning", "info", "debug")  # each includes those before it
PANEL = "Output"  # the title of a group of options in the help
# Characters that some readers take for the end of a line. JSON escapes them.
_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.", rich_help_panel=PANEL)]


class State:
    """The output settings of the running command, and whether it has printed its error."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Set the values that a command begins with."""
        #: The command, such as "build" or "zoo list".
        self.command = ""
        #: Whether --json was given.
        self.json = False
        #: The --log-level, one of LEVELS.
        self.level = "info"
        #: Whether a JSON object with the command's error has been printed.
        self.error_printed = False


state = State()


def allows(level: str) -> bool:
    """Return whether messages of `level` are printed."""
    return LEVELS.index(level) <= LEVELS.index(state.level)


def start(command: str, as_json: bool) -> None:
    """Reset the state at the start of a command."""
    state.reset()
    state.command, state.json = command, as_json


def note(text: str) -> None:
    """Print a note, which needs no action, unless --log-level is `error`."""
    if allows("warning"):
        print(f"note: {text}", file=sys.stderr)


def print_json(record: Mapping[str, Any], error: Mapping[str, Any] | None = None) -> None:
    """Print an object of the schema as one line.

    record: the fields of the command
    error: the result of `error_record`, if the command fails
    """
    head = {"schema_version": SCHEMA_VERSION, "command": state.command, "ok": error is None}
    state.error_printed = error is not None
    tail = {} if error is None else {"error": error}
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    line = json.dumps({**head, **record, **tail}, ensure_ascii=not utf8)
    print(line.translate(_LINE_ENDS), flush=True)


def error_record(kind: str, message: str, hint: str, exit_code: int, argument: str = "") -> dict[str, Any]:
    """Return the field `error` of a JSON object.

    kind: the class of the error
    argument: the refused argument, by its Python name; "" if there is none
    """
    return {
        "kind": kind,
        "message": message,
        "hint": hint,
        "argument": argument or None,
        "exit_code": exit_code,
    }


def print_json_error(error: Mapping[str, Any]) -> None:
    """Print the JSON object of a failed command if --json was given and no object with its error was printed.

    error: the result of `error_record`
    """
    if state.json and not state.error_printed:
        with contextlib.suppress(OSError, ValueError):  # stdout may be what failed
            print_json({}, error)


def with_output_options(
    function: Callable[..., None], panels: Mapping[str, Sequence[str]] | None = None
) -> Callable[..., None]:
    """Return the command `function` with the additional options --quiet, --verbose and --log-level.

    The lines of each paragraph of its docstring are joined for the help.

    panels: title of a group of options in the help -> their parameters. The titles are set in the annotations
        of `function` itself.
    """
    levels = {
        "quiet": Annotated[
            bool, typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=PANEL)
        ],
        "verbose": Annotated[
            bool,
            typer.Option(
                "--verbose", "-v", help="Print details and messages of libraries.", rich_help_panel=PANEL
            ),
        ],
        "log_level": Annotated[
            typing.Optional[str],  # noqa: UP045  (evaluated by Python 3.10)
            typer.Option(
                metavar="|".join(LEVELS),
                autocompletion=lambda: list(LEVELS),
                help="What goes to stderr: only errors, or also notes, progress, details (default: info).",
                rich_help_panel=PANEL,
            ),
        ],
    }

    @functools.wraps(function)
    def command(*, quiet: bool, verbose: bool, log_level: str | None, **arguments: Any) -> None:
        state.level = _level(quiet, verbose, log_level)
        if state.level == "debug":
            streams.show_libraries()
        function(**arguments)

    hints = typing.get_type_hints(function, include_extras=True)
    signature = inspect.signature(function)
    _set_panels(hints, panels or {})
    parameters = [
        parameter.replace(annotation=hints[name]) for name, parameter in signature.parameters.items()
    ]
    defaults = {"quiet": False, "verbose": False, "log_level": None}
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=defaults[name])
        for name, kind in levels.items()
    ]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {**hints, **levels}
    command.__doc__ = _reflowed(inspect.cleandoc(function.__doc__ or ""))
    return command


def _set_panels(hints: Mapping[str, Any], panels: Mapping[str, Sequence[str]]) -> None:
    """Put options into the groups of the help. `hints` has the annotation of each parameter."""
    for title, names in panels.items():
        for name in names:
            hints[name].__metadata__[0].rich_help_panel = title


def _level(quiet: bool, verbose: bool, log_level: str | None) -> str:
    """Return the level that the three options select. Raises BadParameter if they exclude each other."""
    options = [name for name, on in (("--quiet", quiet), ("--verbose", verbose)) if on]
    options += ["--log-level"] if log_level is not None else []
    if len(options) > 1:
        raise typer.BadParameter(f"{' and '.join(options)} exclude each other")
    if log_level is not None and log_level not in LEVELS:
        raise typer.BadParameter(
            f"{log_level!r} is not one of {', '.join(LEVELS)}", param_hint="'--log-level'"
        )
    return log_level or ("error" if quiet else "debug" if verbose else "info")


def _reflowed(text: str) -> str:
    """Join the lines of each paragraph, because the help keeps line breaks.

    Paragraphs that begin with a backspace are not changed, as in click.
    """
    paragraphs = text.split("\n\n")
    return "\n\n".join(
        paragraph if paragraph.startswith("\b") else " ".join(paragraph.split()) for paragraph in paragraphs
    )
