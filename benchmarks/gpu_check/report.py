"""The report of a check: a JSON file and a page of tables."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import ROOT
from .card import Card
from .options import Options, Row

_LIBRARIES = (
    "torch",
    "triton",
    "cuda-python",
    "cuda-bindings",
    "flashinfer-python",
    "flash-attn",
    "tensorrt-rtx",
)
_ALL_FAILURES = 40  # the page lists no more than this


def machine(card: Card, options: Options) -> dict[str, Any]:
    """Return the GPU, the versions and the command, which a reader needs to reproduce the results."""
    import torch
    import triton

    libraries = {"torch": torch.__version__, "triton": triton.__version__}
    for name in _LIBRARIES[2:]:
        try:
            libraries[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "card": asdict(card), "libraries": libraries, "cuda": torch.version.cuda,
        "python": platform.python_version(), "seed": options.seed, "commit": _commit(),
        "command": shlex.join(["python", "benchmarks/gpu_check", *sys.argv[1:]]),
        "date": now.isoformat(timespec="seconds"),
    }  # fmt: skip


def save(result: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write FOLDER/<card>-<date>.json and .md. Return their paths."""
    about = result["machine"]
    card = re.sub(r"[^a-z0-9]+", "-", about["card"]["name"].lower()).strip("-")
    stem = f"{card}-{about['date'][:19].replace(':', '').replace('T', '-')}"
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / f"{stem}.json", folder / f"{stem}.md"
    data.write_text(json.dumps(result, indent=1) + "\n")
    page.write_text(markdown(result))
    return data, page


def markdown(result: dict[str, Any]) -> str:
    """Return the page of tables."""
    about, parts = result["machine"], result["parts"]
    card = about["card"]
    versions = ", ".join(f"{name} {version}" for name, version in about["libraries"].items())
    lines = [
        f"# {card['name']}, {about['date']}",
        "",
        f"    {about['command']}    # seed {about['seed']}, commit {about['commit']}",
        "",
        f"SM{card['sm']}, {card['multiprocessors']} multiprocessors, {card['memory'] / 2**30:.0f} GiB, L2 "
        f"{card['l2'] / 2**20:.0f} MiB; {card['settings']}; CUDA {about['cuda']}, {versions}, Python "
        f"{about['python']}.",
        "",
        *table(["part", "status", "seconds", "results"], map(_part_cells, parts, parts.values())),
        *_failures(parts),
        *_correctness(parts.get("correctness", {}).get("rows", [])),
        *_speed(parts),
        *_others(parts),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _part_cells(name: str, part: dict[str, Any]) -> list[str]:
    counts: dict[str, int] = {}
    for row in part["rows"]:
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    summary = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    return [name, part["status"], f"{part['seconds']:.0f}", summary]


def _failures(parts: dict[str, Any]) -> Iterator[str]:
    failures = [f"{name}: {part['error']}" for name, part in parts.items() if part.get("error")]
    for name, part in parts.items():
        failures += [f"{name}, {r['name']}: {r['error']}" for r in part["rows"] if r["status"] == "failed"]
    if failures:
        yield from ("## Failures", "", *(f"* {_line(text)}" for text in failures[:_ALL_FAILURES]))
        if len(failures) > _ALL_FAILURES:
            yield f"* and {len(failures) - _ALL_FAILURES} more, in the JSON"
        yield ""


def _correctness(rows: list[Row]) -> Iterator[str]:
    """Yield a table with a line for each pair of head shape and dtypes."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "shape" in row:
            groups.setdefault((row["shape"], row["dtypes"]), []).append(row)
    if not groups:
        return
    yield from (
        "## Against the reference",
        "",
        "Largest error / bound of docs/explanation/kernels.md; 1 passes.",
        "",
    )
    cells = []
    for (shape, dtypes), group in groups.items():
        passed = sum(row["status"] == "passed" for row in group)
        worst = max((row["error / bound"] for row in group if "error / bound" in row), default=float("nan"))
        cells.append([shape, dtypes, f"{passed} of {len(group)}", f"{worst:.2f}"])
    yield from table(["heads", "dtypes", "cases passed", "error / bound"], cells)


def ceilings(parts: dict[str, Any]) -> dict[str, float]:
    """Return the best measured rates: "gbps" -> GB/s, and dtype -> TFLOP/s."""
    best: dict[str, float] = {}
    for row in parts.get("ceilings", {}).get("rows", []):
        for name, key in (("gbps", "gbps"), ("tflops", row.get("dtype", ""))):
            if name in row:
                best[key] = max(best.get(key, 0.0), row[name])
    return best


def _speed(parts: dict[str, Any]) -> Iterator[str]:
    """Yield the tables of prefill and decode: llmc with its share of the ceiling, and every measured peer."""
    best = ceilings(parts)
    if best:
        rates = [f"memory {best['gbps']:.0f} GB/s"] if "gbps" in best else []
        rates += [f"matmul {dtype} {best[dtype]:.0f} TFLOP/s" for dtype in ("bf16", "fp16") if dtype in best]
        yield from ("## Ceilings measured", "", ", ".join(rates), "")
    rows = [row for part in parts.values() for row in part["rows"] if "who" in row and "seconds" in row]
    for kind, unit, key in (("prefill", "TFLOP/s", "tflops"), ("decode", "GB/s", "gbps")):
        of_kind = [row for row in rows if row["kind"] == kind]
        if not of_kind:
            continue
        everybody = list(dict.fromkeys(row["who"] for row in of_kind))
        cells = []
        for workload in dict.fromkeys(row["workload"] for row in of_kind):
            by_name = {row["who"]: row for row in of_kind if row["workload"] == workload}
            ours = by_name.get("llmc", {})
            ceiling = best.get("gbps" if kind == "decode" else ours.get("dtype", ""))
            cells.append([
                workload, *(_rate(by_name.get(who), key) for who in everybody),
                f"{ours[key] / ceiling:.0%}" if ours and ceiling else "",
                f"{ours['write_seconds'] * 1e6:.1f}" if "write_seconds" in ours else "",
                str(ours.get("splits", "")),
            ])  # fmt: skip
        header = [kind, *(f"{who}: {unit} (µs)" for who in everybody)]
        yield from (f"## {kind.capitalize()}", "")
        yield from table([*header, "of the ceiling", "write_kv, µs", "splits"], cells)


def _others(parts: dict[str, Any]) -> Iterator[str]:
    """Yield the results that passed or are absent, of parts without a table."""
    lines = [
        f"* {name}, {_line(row['name'])}: {_line(row.get('error') or row['status'])}"
        for name, part in parts.items()
        for row in part["rows"]
        if name != "correctness" and row["status"] in ("passed", "absent") and "who" not in row
    ]
    if lines:
        yield from ("## Other parts", "", *lines, "")


def table(header: list[str], cells: Iterable[list[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    rows = [header, ["---"] * len(header), *cells]
    yield from ("| " + " | ".join(_line(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)
    yield ""


def _rate(row: Row | None, key: str) -> str:
    return f"{row[key]:.0f} ({row['seconds'] * 1e6:.1f})" if row else "-"


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 400 else text[:400] + " ..."


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
