"""The results for people: tables of at most 100 columns. No torch."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvc_compile.table import WIDTH, table

TITLES = {
    "model": "Decode steps",
    "largest batch": "Largest batch that fits",
    "longest context": "Longest context that fits",
    "growth": "Growth with the context, one sequence",
    "prefill": "Time to the first token",
}
OURS = ("16", "fp8", "int8", "int4", "int4 g128", "int2", "int2 g128")


def text(results: Mapping[str, Any]) -> str:
    """All tables, and what failed."""
    parts = [heading(results)]
    for dtype in dict.fromkeys(c["dtype"] for c in results["attention"]):
        parts.append(attention([c for c in results["attention"] if c["dtype"] == dtype], dtype))
    steps = growth_rows(results["steps"])
    for part, title in TITLES.items():
        found = [s for s in steps if s["part"] == part]
        if found:
            parts.append("\n".join([title, "", *table_of(part, found)]))
    broken = failures(results)
    if broken:
        parts.append("\n".join(["Not measured", "", *broken]))
    return "\n\n".join(parts) + "\n"


def growth_rows(steps: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The steps, those of the model part at batch 1 a second time as growth, where growth was measured."""
    if not any(s["part"] == "growth" for s in steps):
        return list(steps)
    again = [{**s, "part": "growth"} for s in steps if s["part"] == "model" and s["batch"] == 1 and s["seconds"]]
    found = [*(s for s in steps if s["part"] == "growth"), *again]
    caches = list(dict.fromkeys(s["cache"] for s in steps))
    found.sort(key=lambda s: (caches.index(s["cache"]), s["context"]))
    return [*(s for s in steps if s["part"] != "growth"), *found]


def heading(results: Mapping[str, Any]) -> str:
    s = results["setup"]
    versions = ", ".join(f"{n} {s[n]}" for n in ("torch", "triton", "transformers") if s.get(n))
    lines = [f"{s['device'] or s['devices'][0]}; {versions}; commit {str(s['commit'])[:12]}"]
    tune = "tuning on" if s["tune"] else "tuning off"
    rates = [c["read"] for c in results["ceilings"].values()]
    if rates:
        found = f"reads {rate(min(rates))} to {rate(max(rates))}"
        lines.append(f"Ceilings of this run: {found}; {tune}; {s['seconds']:.0f} s in all")
    return "\n".join(part for line in lines for part in textwrap.wrap(line, WIDTH))


def rate(per_second: float) -> str:
    return f"{per_second / 1e12:.2f} TB/s" if per_second >= 1e11 else f"{per_second / 1e9:.1f} GB/s"


def attention(calls: Sequence[Mapping[str, Any]], dtype: str) -> str:
    """Two grids, of the gains and of the shares of the read rate, and a third for those at the same bytes."""
    shapes = dict.fromkeys((c["shape"], c["batch"], c["context"]) for c in calls)
    shown = [f for f in OURS if any(c["format"] == f and c["seconds"] for c in calls)]
    head = ["shape", "best 16-bit", *shown]
    rows, shares, apart = [], [], []
    for shape in shapes:
        of = {c["format"]: c for c in calls if (c["shape"], c["batch"], c["context"]) == shape}
        sixteen = [c for c in of.values() if c["format"] not in OURS[1:] and c["seconds"]]
        best = min(sixteen, key=lambda c: c["seconds"]) if sixteen else None
        name = f"{shape[0]} {shape[1]}x{tokens(shape[2])}"
        cells = [f"{best['seconds'] * 1e6:.1f} {best['format']}" if best else "-"]
        share = [f"{best['of_ceiling']:.2f}" if best else "-"]
        for f in shown:
            c = of.get(f)
            if not c or not c["seconds"]:
                cells.append("-")
                share.append("-")
                continue
            cells.append(f"x{best['seconds'] / c['seconds']:.2f}" if best else "-")
            share.append(f"{c['of_ceiling']:.2f}")
            if c["against_128"]:
                apart.append((shape[0], f, c["against_128"]))
        rows.append([name, *cells])
        shares.append([name, *share])
    lines = [
        f"One attention call, {dtype}: microseconds of the best at 16 bits, PyTorch's or ours; gains over it",
        "",
        *grid([head, *rows]),
        "",
        "The same: share of the read rate",
        "",
        *grid([head, *shares]),
    ]
    if apart:
        names = list(dict.fromkeys(n for n, _, _ in apart))
        ratios = {(n, f): x for n, f, x in apart}
        body = [[n, *(f"{ratios[n, f]:.2f}" if (n, f) in ratios else "-" for f in shown)] for n in names]
        lines += ["", "Share of the read rate against 128 channels at the same bytes", "", *grid([["", *shown], *body])]
    return "\n".join(lines)


def table_of(part: str, steps: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ["cache", "batch", "context", "ms", "tokens/s", "predicted ms", "ratio", "cache", "peak"]
    rows = []
    for s in steps:
        if not s["seconds"]:
            continue
        rows.append([
            s["cache"], str(s["batch"]), tokens(s["context"]), ms(s["seconds"]), f"{s['tokens_per_s']:.4g}",
            ms(s["predicted_s"]), f"{s['over_predicted']:.2f}" if s["over_predicted"] else "-",
            size(s["cache_bytes"]), size(s["peak_bytes"]),
        ])  # fmt: skip
    if part == "prefill":
        head[4], head[5] = "prompt tokens/s", "of its FLOP ms"
    lines = grid([head, *rows]) if rows else ["nothing was measured"]
    for s in steps:
        said = [s["note"]] if s["note"] else []
        said += ["CUDA graphs were skipped"] if s["cudagraph_skips"] else []
        said += ["its output is not finite"] if s["finite"] is False else []
        if said and s["seconds"]:
            lines.append(f"  {s['cache']}, {s['batch']}x{tokens(s['context'])}: {'; '.join(said)}")
    return lines


def ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def size(n: int | None) -> str:
    return "-" if n is None else f"{n / 1e9:.2f} GB" if n >= 1e7 else f"{n / 1e3:.0f} kB"


def tokens(n: int) -> str:
    """32k for 32768; what is no multiple of 1024, as it is."""
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)


def grid(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns under a rule, numbers to the right; columns that do not fit go into a second grid."""
    wide = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    last, used = 1, wide[0]
    while last < len(wide) and used + 2 + wide[last] <= WIDTH:
        used += 2 + wide[last]
        last += 1
    lines = []
    for n, row in enumerate(rows):
        cells = [row[0].ljust(wide[0]), *(c.rjust(w) for c, w in zip(row[1:last], wide[1:last], strict=True))]
        lines.append("  ".join(cells).rstrip())
        if n == 0:
            lines.append("-" * used)
    if 1 < last < len(wide):
        lines += ["", *grid([[r[0], *r[last:]] for r in rows])]
    return lines


def failures(results: Mapping[str, Any]) -> list[str]:
    """What has no figure, and why."""
    found: list[Sequence[str]] = [("what", "why")]
    found += [(f["job"], f["error"]) for f in results["failures"]]
    for s in results["steps"]:
        if s["error"]:
            found.append((f"{s['cache']}, {s['part']}, {s['batch']}x{tokens(s['context'])}", s["error"]))
    for c in results["attention"]:
        if c["error"]:
            found.append((f"{c['shape']}, {c['format']}, {c['batch']}x{tokens(c['context'])}", c["error"]))
    return table(found) if len(found) > 1 else []


def points(steps: Iterable[Mapping[str, Any]], cache: str, batch: int = 1) -> list[Mapping[str, Any]]:
    """The decode steps of one cache at one batch, by context: the growth part and what the model part adds to it."""
    found = {
        s["context"]: s
        for s in steps
        if s["cache"] == cache and s["batch"] == batch and s["seconds"] and s["part"] in ("model", "growth")
    }
    return [found[c] for c in sorted(found)]
