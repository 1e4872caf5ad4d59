"""The machine's description and the tables on stdout."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

from rounds import CLEAN
from workload import METRICS, median


def machine() -> dict[str, Any]:
    """Return the machine and software versions that the numbers depend on (Linux)."""
    cpu: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        cpu.setdefault(key.strip(), value.strip())
    wanted = (
        "avx2",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
        "amx_tile",
        "amx_bf16",
        "amx_int8",
    )
    flags = set(cpu.get("flags", "").split())
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "cpu_family_model": f"{cpu.get('cpu family', '?')}/{cpu.get('model', '?')}",
        "flags": [flag for flag in wanted if flag in flags],
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": platform.release(),
        "transparent_hugepage": huge.read_text().strip() if huge.exists() else "",
        "load_average": os.getloadavg(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def heading(result: dict[str, Any]) -> str:
    """Return the description of the machine, the tools and their failures."""
    m = result["machine"]
    lines = [
        f"{result['checkpoint']}, {result['threads']} threads, {result['rounds']} rounds, {m['date']}",
        f"{m['cpu']} ({m['cpu_family_model']}), {m['cores']} cores, {m['memory_gb']} GB",
        " ".join(m["flags"]),
    ]
    for tool, record in result["tools"].items():
        named = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
        described = ", ".join(f"{key} {value}" for key, value in record.get("describe", {}).items())
        lines.append(f"{tool}: {named}; {described}")
        if "imported_by_llmc_run" in record:
            heavy = ", ".join(record["imported_by_llmc_run"]) or "nothing"
            lines.append(f"llmc run imports, of the large packages: {heavy}")
    lines += [f"{tool}: ABSENT: {reason}" for tool, reason in result["absent"].items()]
    lines += [f"{tool}: FAILED: {reason}" for tool, reason in result["failures"].items()]
    return "\n".join(lines)


def table(result: dict[str, Any]) -> str:
    """Return the table of medians, with the median ratio to the reference of the same round in brackets.

    `!` marks a median with a disturbed sample: other processes used more than a tenth of the machine.
    """
    tools = list(result["tools"] | result["samples"])
    rows = [["", *tools]]
    for metric, (name, unit, _) in METRICS.items():
        if not any(metric in samples for samples in result["samples"].values()):
            continue
        row = [f"{name}, {unit}"]
        for tool in tools:
            samples = result["samples"].get(tool, {}).get(metric, [])
            row.append(_cell(samples, result["ratios"].get(tool, {}).get(metric)))
        rows.append(row)
    records = [result["tools"].get(tool, {}) for tool in tools]
    rows.append(
        [
            "tokens as the reference's",
            *(f"{f['same_tokens']}/{f['tokens']}" if "tokens" in f else "-" for f in records),
        ]
    )
    if any("overhead_outside_the_engine_call" in f for f in records):
        shares = [f.get("overhead_outside_the_engine_call") for f in records]
        rows.append(["outside the engine call", *("" if s is None else f"{s:.1%}" for s in shares)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def _cell(samples: list[dict[str, Any]], ratio: float | None) -> str:
    if not samples:
        return "-"
    value = median([s["value"] for s in samples])
    text = f"{value:.3g}" if value < 100 else f"{value:.0f}"
    if ratio is not None:
        text += f" ({ratio:.2f}x)"
    return text + ("!" if any(s.get("foreign", 0.0) > CLEAN for s in samples) else " ")
