"""The commands of `llmc` and how a command line becomes a call of one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from llmc import __version__
from llmc.cli import bench, build, check, doctor, inspect, run, verify, zoo
from llmc.runtime.errors import LlmcError

_EPILOG = """\b
Exit codes:
  0    done
  1    error; the lines `error:` and `hint:` on stderr say what and what to do
  2    wrong usage
  70   internal error, a bug in llmc
  130  interrupted
  141  the output was closed

\b
Environment:
  LLMC_TRACEBACK=1  show Python tracebacks of errors
  NO_COLOR=1        no colours
"""

app = typer.Typer(
    name="llmc",
    help="Compiles a language model ahead of time into a verified bundle, and runs it.",
    epilog=_EPILOG,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("build")(build.build)
app.command("run")(run.run)
app.command("inspect")(inspect.inspect)
app.command("verify")(verify.verify)
app.command("check")(check.check)
app.command("bench")(bench.bench)
app.add_typer(zoo.app, name="zoo")
app.command("doctor")(doctor.doctor)

# click's UsageError, which Typer exports only by this subclass (new versions carry a click of their own).
_ClickUsageError: Any = typer.BadParameter.__bases__[0]


class UsageError(LlmcError):
    """The command line itself is wrong: an unknown option, a missing argument, a value of the wrong kind."""


def invoke(argv: Sequence[str]) -> int:
    """Run the command that `argv` names and return its exit code.

    Raises UsageError, and what the command raises.
    """
    command = typer.main.get_command(app)
    try:
        with command.make_context("llmc", list(argv)) as context:
            command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    except _ClickUsageError as error:
        raise _usage_error(error) from error
    return 0


def _usage_error(error: Any) -> UsageError:
    message = " ".join(error.format_message().split()).rstrip(".")
    where = error.ctx.command_path if error.ctx else "llmc"
    hint = f"see `{where} --help`"
    if "unexpected extra argument" in message:
        hint += "; an argument with spaces needs quotes"
    return UsageError(message[:1].lower() + message[1:], hint)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"llmc {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
