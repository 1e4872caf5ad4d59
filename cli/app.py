"""The commands of `llmc`: register them, and call the one that a command line names.

A command has the name of its function and of its module in this package. Only the modules that a command line
needs are imported: all of them take 25 ms, and `llmc run` must start fast.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Annotated, Any

import typer

from llmc import __version__
from llmc.cli import output
from llmc.cli.errors import UsageError

_EPILOG = """\b
Exit codes:
  0    done
  1    error; the lines `error:` and `hint:` on stderr say what and what to do
  2    wrong usage, or an option whose value cannot be used
  3    a threshold of `llmc verify` is missed
  70   internal error, a bug in llmc
  130  interrupted
  141  the output was closed

\b
Environment:
  LLMC_TRACEBACK=1  show Python tracebacks of errors
  NO_COLOR=1        no colours

\b
Examples:
  llmc build model_zoo/llama/tales -o tales.llmc
  llmc run tales.llmc "Once upon a time"
  llmc help build
"""
# Groups of options in the help: command -> title -> parameters.
_PANELS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "build": {
        "Engine": ("target", "engine", "dtype", "kv_dtype", "sm", "max_seq_len"),
        "Ranks": ("tp", "pp", "rank_memory"),
        "Quantization": ("quant", "exclude", "calibration", "calibration_method", "rounding"),
    },
    "run": {
        "Sampling": (
            "max_tokens", "greedy", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed",
            "stop",
        ),
        "Engine": ("threads", "kv_memory", "fast"),
    },
    "verify": {
        "Thresholds": ("min_top1", "max_kl", "max_perplexity_increase"),
    },
}  # fmt: skip
_COMPLETE = "_LLMC_COMPLETE"  # set by the completion scripts of shells

COMMANDS = ("build", "run", "inspect", "report", "verify", "check", "bench", "doctor")

# click's UsageError. Typer exports only this subclass, and new versions of Typer bundle their own click.
_ClickUsageError: Any = typer.BadParameter.__bases__[0]


def invoke(argv: Sequence[str]) -> int:
    """Run the command that `argv` names and return its exit code.

    Raises UsageError for a wrong command line, and any error of the command.
    """
    needed = argv[:1] if argv and argv[0] in COMMANDS and _COMPLETE not in os.environ else COMMANDS
    command = typer.main.get_command(application(needed))
    if _COMPLETE in os.environ:
        command.main(list(argv), prog_name="llmc")  # prints completions and exits
    output.start(_name_of(command, argv), "--json" in argv)
    try:
        with command.make_context("llmc", list(argv)) as context:
            command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    except _ClickUsageError as error:
        raise _usage_error(error) from error
    return 0


def _name_of(command: Any, argv: Sequence[str]) -> str:
    """Return the command that `argv` names: ["zoo", "list", "--json"] -> "zoo list"."""
    names = []
    for word in argv:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            break
        names.append(word)
    return " ".join(names)


def _usage_error(error: Any) -> UsageError:
    """Return llmc's error for click's UsageError."""
    message = " ".join(error.format_message().split()).rstrip(".")
    where = error.ctx.command_path if error.ctx else "llmc"
    hint = f"see `{where} --help`"
    if "unexpected extra argument" in message:
        hint += "; an argument with spaces needs quotes"
    option = str(getattr(error, "param_hint", None) or "").strip("'").removeprefix("--").replace("-", "_")
    name = getattr(getattr(error, "param", None), "name", None) or option
    return UsageError(message[:1].lower() + message[1:], hint, name)


def application(commands: Sequence[str] = COMMANDS) -> typer.Typer:
    """Return llmc as a Typer application with `commands`, `zoo` if they are all, and `help`."""
    app = typer.Typer(
        name="llmc",
        help="Compiles a language model ahead of time into a verified bundle, and runs it.",
        epilog=_EPILOG,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name in commands:
        function = getattr(import_module(f"llmc.cli.{name}"), name)
        app.command(name)(output.with_output_options(function, _PANELS.get(name)))
    if commands == COMMANDS:
        app.add_typer(import_module("llmc.cli.zoo").app, name="zoo")
    app.command("help")(_show_help)
    app.callback(invoke_without_command=True)(_main)
    return app


def _show_help(
    context: typer.Context,
    command: Annotated[
        list[str] | None, typer.Argument(metavar="COMMAND", help="A command.", show_default=False)
    ] = None,
) -> None:
    """Show the help of llmc or of a command.

    \b
    Examples:
      llmc help run
      llmc help zoo make
    """
    target: Any = context.find_root().command
    parent: Any = context.find_root()
    for word in command or ():
        below = getattr(target, "commands", {})
        if word not in below:
            raise UsageError(f"no such command '{' '.join(command or ())}'", "see `llmc --help`")
        target = below[word]
        parent = type(context)(target, info_name=word, parent=parent)
    print(target.get_help(parent))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"llmc {__version__}")
        raise typer.Exit


def _main(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
