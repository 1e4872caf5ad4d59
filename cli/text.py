"""Format sizes and tables as plain text, without colour, independent of the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def size(nbytes: int) -> str:
    """Return a number of bytes as text: 1536 -> "1.5 KiB"."""
    value = float(nbytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1000:
            return f"{nbytes} {unit}" if unit == "bytes" else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:,.3g} TiB" if value < 1000 else f"{value:,.0f} TiB"


def count(number: int, noun: str) -> str:
    """Return a number with its noun: (1, "fault") -> "1 fault", (2000, "fault") -> "2,000 faults"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """Return `text` with control characters escaped, but not newlines: names of files may contain them."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def table(rows: Sequence[Sequence[str]], indent: str = "", right: Sequence[int] = ()) -> str:
    """Return `rows` as a table with two blanks between columns.

    indent: text before each row
    right: indices of the columns that are right-aligned
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)
