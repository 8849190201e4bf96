"""Plain text for people: aligned tables, sizes, runs of layers. No torch."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDTH = 100  # columns


def table(rows: Sequence[Sequence[str]], width: int = WIDTH) -> list[str]:
    """Aligned columns under a rule; the last column wraps so that no line is longer than `width`."""
    wide = [min(max(len(r[i]) for r in rows), 30) for i in range(len(rows[0]) - 1)]
    room = max(20, width - sum(wide) - 2 * len(wide))
    lines = []
    for n, row in enumerate(rows):
        columns = [textwrap.wrap(cell, w) or [""] for cell, w in zip(row, [*wide, room], strict=True)]
        for i in range(max(map(len, columns))):
            cells = [c[i] if i < len(c) else "" for c in columns]
            lines.append("  ".join(cell.ljust(w) for cell, w in zip(cells, [*wide, 0], strict=True)).rstrip())
        if n == 0:
            longest = max((len(r[-1]) for r in rows), default=0)
            lines.append("-" * min(width, sum(wide) + 2 * len(wide) + min(room, longest)))
    return lines


def layers_text(layers: Sequence[int]) -> str:
    """0-3, 5: runs of neighbours in one piece."""
    runs: list[list[int]] = []
    for n in layers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def mib(n: int) -> str:
    """Bytes as a size: 12.3 MiB."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} B"


def ratio(a: int, b: int) -> str:
    return f"{a / b:.1f} x" if b else "-"
