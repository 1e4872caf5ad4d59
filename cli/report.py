"""`llmc report`: write what is known about a bundle as one HTML page."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmc.cli.benchmark import Benchmark
from llmc.cli.output import Json, print_json
from llmc.cli.text import count, size
from llmc.runtime.errors import RequestError

if TYPE_CHECKING:
    from llmc.runtime.bundle.reader import Bundle

_MAX_BENCH_BYTES = 2**20  # of the file given with --bench
_MAX_FIGURE = 1e15  # larger numbers in that file are refused


def report(
    bundle: Annotated[Path, typer.Argument(metavar="NAME.llmc", help="The bundle to describe.")],
    page: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.html",
            help="The page to write (default: NAME.html in the current directory).",
        ),
    ] = None,
    bench: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Output of `llmc bench --json` to show, one or more lines."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing page.")] = False,
    as_json: Json = False,
) -> None:
    """Write one HTML page about a bundle.

    The page shows what is inside and for which hardware, the verification and the quantization loss, and the
    memory of the KV cache. It needs no network and no scripts.

    \b
    Examples:
      llmc report tales.llmc --force
      llmc report tales.llmc -o tales-report.html --force
    """
    from llmc.cli.report_page import report_page
    from llmc.runtime.bundle.reader import Bundle

    opened = Bundle.open(bundle, verify_hashes=False)
    output = page or Path(f"{opened.name}.html")
    _check_output(output, opened, force)
    text = report_page(opened, read_benchmarks(bench, opened) if bench else ())
    data = text.encode("utf-8")
    _write(output, data)
    if as_json:
        print_json({"bundle": str(opened.path), "path": str(output), "bytes": len(data)})
    else:
        print(f"{output}: {size(len(data))}")


def _check_output(output: Path, bundle: Bundle, force: bool) -> None:
    """Raise RequestError if the page must not be written to `output`."""
    if output.is_dir():
        raise RequestError(f"{output} is a directory", "name a file with `--output`")
    if os.path.lexists(output) and not force:
        raise RequestError(f"{output} exists", "replace it with `--force`, or choose another `--output`")
    if output.resolve().is_relative_to(bundle.path):
        raise RequestError(
            f"{output} is inside the bundle, which holds no other files", "choose another `--output`"
        )


def _write(output: Path, data: bytes) -> None:
    """Write the page atomically: `output` is either complete or not written.

    Raises OSError, with the name `output`.
    """
    draft = output.with_name(f".{output.name}.tmp-{os.getpid()}")
    try:
        with open(draft, "xb") as file:
            file.write(data)
        os.replace(draft, output)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(output)) from error
    finally:
        with contextlib.suppress(OSError):  # it may never have been created
            draft.unlink()


def read_benchmarks(path: Path, bundle: Bundle) -> list[Benchmark]:
    """Return the benchmark results in a file, which has one per line.

    Raises RequestError if the file has no results or is too large, if a line is not a result of
    `llmc bench --json`, or if it was measured on another bundle.
    """
    hint = f"write the file with `llmc bench {bundle.path.name} --json > {path}`"
    with open(path, "rb") as file:
        data = file.read(_MAX_BENCH_BYTES + 1)
    if len(data) > _MAX_BENCH_BYTES:
        raise RequestError(f"{path}: more than {_MAX_BENCH_BYTES} bytes", hint, "bench")
    results = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            results.append(_benchmark(record))
            same = _subject(record) == _expected(bundle)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            message = f"{path}, line {number}: not an object that `llmc bench --json` prints"
            raise RequestError(message, hint, "bench") from error
        if not same:
            message = f"{path}, line {number}: measured on another bundle than {bundle.name}"
            raise RequestError(message, hint, "bench")
    if not results:
        raise RequestError(f"{path} has no results", hint, "bench")
    return results


def _benchmark(record: Any) -> Benchmark:
    """Parse a result. Raises ValueError, KeyError or TypeError for anything else."""
    if record["command"] != "bench" or record["ok"] is not True:
        raise ValueError("not a result")
    concurrency, prompt, new = (
        int(_figure(record[name])) for name in ("concurrency", "prompt_tokens", "new_tokens")
    )
    each = f"{concurrency:,} x " if concurrency > 1 else ""
    machine = record["machine"]
    names = [field.name for field in fields(Benchmark)][2:]
    return Benchmark(
        workload=f"{each}{prompt:,} prompt tokens, {new:,} new ones",
        machine=f"{machine['cpu']}, {count(int(_figure(machine['cores'])), 'logical CPU')}",
        **{name: _figure(record["median"][name]) for name in names},
    )


def _figure(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _MAX_FIGURE:
        raise ValueError("not a figure")
    return float(value)


def _subject(record: Any) -> list[Any]:
    """Return the fields of a result that identify the measured bundle, as `_expected` does."""
    precision = record["precision"]
    return [record["source"], record["engine"], precision["dtype"], precision["kv_dtype"], record["weights"]]


def _expected(bundle: Bundle) -> list[Any]:
    """Return the values that `_subject` returns for a result of `bundle`."""
    from llmc.cli.bench import weight_format

    manifest = bundle.manifest
    precision = manifest.precision
    return [
        manifest.source.name,
        manifest.target.engine,
        precision.dtype,
        precision.kv_dtype,
        weight_format(manifest),
    ]
