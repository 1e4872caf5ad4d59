"""`llmc check`: check that a checkpoint is what it says it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmc.cli.errors import error_of
from llmc.cli.output import Json, print_json
from llmc.cli.text import count, printable, size, table
from llmc.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from llmc.compiler.checkpoint.check.check import CheckReport


def check(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint's directory.")],
    full: Annotated[
        bool, typer.Option("--full", help="Read every weight, not samples. Scales are always read.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check whether a checkpoint, quantized or not, is what it says it is.

    Its tensors, scales and values are compared with each other and with its configuration files.

    \b
    Examples:
      llmc check model_zoo/llama/tales
    """
    from dataclasses import asdict

    from llmc.compiler.checkpoint.check.check import check_checkpoint
    from llmc.compiler.checkpoint.finding import REMEDIES

    report = check_checkpoint(checkpoint, full)
    error = None
    if report.faults:
        error = CheckpointError(
            f"{checkpoint} has {count(len(report.faults), 'fault')}",
            hint="the findings name the tensors, the remedies say what to do about each kind",
        )
    found = {finding.kind for finding in report.findings}
    remedies = {kind: remedy for kind, remedy in REMEDIES.items() if kind in found}
    if as_json:
        print_json({**asdict(report), "remedies": remedies}, error_of(error) if error else None)
    else:
        print(table(_facts(report)))
        if report.findings:
            rows = [("", "KIND", "TENSOR", "WHAT")]
            rows += [
                ("warning" if finding.warning else "fault", finding.kind, finding.tensor, finding.what)
                for finding in report.findings
            ]
            print(f"\n{printable(table(rows))}")
            print(f"\n{table([('KIND', 'REMEDY'), *remedies.items()])}")
    if error:
        raise error


def _facts(report: CheckReport) -> list[tuple[str, str]]:
    each = f", {report.bits_per_parameter:.2f} bits each"
    if report.unread:
        each = " without those that cannot be read"
    facts = [
        ("checkpoint", f"{report.path} ({report.model_type})"),
        ("size", f"{size(report.bytes)} in {report.tensors:,} tensors"),
        ("parameters", f"{report.parameters:,}{each}"),
    ]
    if not report.quantization:
        facts.append(("quantization", "not quantized"))
    else:
        producer = f", written by {report.producer}" if report.producer else ""
        formats = [f"{number:,} {fmt}" for fmt, number in report.formats.items()]
        if report.unread:
            formats.append(f"{len(report.unread):,} that cannot be read")
        kv = f"{report.kv_cache or 'no format named'}, {report.kv_scales} scales"
        more = f" and {len(report.excluded) - 6} more" if len(report.excluded) > 6 else ""
        bits = f", {report.quantized_bits:.2f} bits a weight" if report.formats else ""
        facts += [
            ("quantization", report.quantization + producer),
            ("modules", (", ".join(formats) or "none") + bits),
            ("excluded", (", ".join(report.excluded[:6]) or "none") + more),
            ("KV cache", kv if report.kv_cache or report.kv_scales else "not quantized"),
        ]
    read = "every value" if report.full else "every scale, samples of the weights; --full reads all"
    facts.append(("read", read))
    warnings = len(report.findings) - len(report.faults)
    facts.append(("result", f"{count(len(report.faults), 'fault')}, {count(warnings, 'warning')}"))
    return [(name, printable(value)) for name, value in facts]
