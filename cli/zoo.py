"""`llmc zoo`: write small random checkpoints, to try llmc without a download."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from llmc.cli.output import Json, print_json, with_output_options
from llmc.cli.text import size, table

app = typer.Typer(
    help="Small random checkpoints, to try llmc without a download.",
    rich_markup_mode="rich",
    add_completion=False,
)


@app.command("list")
@with_output_options
def list_models(
    as_json: Json = False,
) -> None:
    """List the models that `llmc zoo make` can write."""
    from llmc.compiler.zoo import list_zoo

    entries = list_zoo()
    if as_json:
        print_json({"models": [asdict(entry) for entry in entries]})
        return
    rows = [("NAME", "FAMILY", "PARAMETERS", "WHAT IT HAS")]
    rows += [(e.name, e.model_type, f"{e.parameters:,}", e.description) for e in entries]
    print(table(rows, right=(2,)))


@app.command()
@with_output_options
def make(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name from `llmc zoo list`.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory to write; new or empty.")],
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Random seed of the weights.")] = 0,
    headers_only: Annotated[
        bool, typer.Option("--headers-only", help="Write zeros that take no space, to plan a large model.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint with random weights.

    The same name and seed give the same bytes.

    \b
    Examples:
      llmc zoo make qwen3-tiny qwen3-tiny
      llmc zoo make llama3.1-70b-shape llama-70b --headers-only
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from llmc.compiler import zoo

    path = zoo.make(name, directory, seed, headers_only=headers_only)
    nbytes = sum(file.stat().st_size for file in path.iterdir())
    if as_json:
        print_json({"name": name, "path": str(path), "seed": None if headers_only else seed, "bytes": nbytes})
    else:
        print(f"{path}: {size(nbytes)}{' of zeros' if headers_only else ''}")
