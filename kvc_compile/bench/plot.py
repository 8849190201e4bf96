"""The results as a picture: time and bytes of a step against the context, and attention's share of the read rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvc_compile.bench.tables import OURS, points


class PlotError(Exception):
    """A plot that cannot be drawn, in words for the user."""


def available() -> Any:
    """matplotlib, or PlotError that says what to install."""
    try:
        import matplotlib
    except ImportError:
        raise PlotError("a plot needs matplotlib: pip install 'kvc-compile[bench]'") from None
    return matplotlib


def draw(results: Mapping[str, Any], file: str) -> None:
    """Write the plot; the file's suffix says the format. Raises PlotError."""
    available()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    steps = results["steps"]
    caches = [c for c in dict.fromkeys(s["cache"] for s in steps) if points(steps, c)]
    for n, cache in enumerate(caches):
        found, colour = points(steps, cache), f"C{n}"
        x = [s["context"] for s in found]
        left.plot(x, [s["seconds"] * 1e3 for s in found], "o-", color=colour, label=cache, markersize=4)
        left.plot(x, [s["predicted_s"] * 1e3 for s in found], ":", color=colour)
        middle.plot(
            x, [(s["cache_bytes"] or 0) / 1e9 or None for s in found], "o-", color=colour, label=cache, markersize=4
        )
    for axes, title, unit in (
        (left, "One decode step (dotted: predicted from bytes)", "ms"),
        (middle, "Cache of one sequence", "GB"),
    ):
        axes.set(title=title, xlabel="context, tokens", ylabel=unit)
        if caches:
            axes.set(xscale="log", yscale="log")
            axes.legend(fontsize=8)
    calls = [c for c in results["attention"] if c["seconds"] and c["format"] in OURS]
    for n, name in enumerate(OURS):
        # by the bytes of the 16-bit cache, so that one shape has one abscissa
        found = sorted((c for c in calls if c["format"] == name), key=lambda c: dense(c))
        if found:
            right.scatter(
                [dense(c) / 1e6 for c in found], [c["of_ceiling"] for c in found], s=12, color=f"C{n}", label=name
            )
    right.set(title="One attention call", xlabel="16-bit cache, MB", ylabel="share of the read rate", ylim=(0, None))
    if calls:
        right.set(xscale="log")
        right.legend(fontsize=8)
    device = results["setup"]["device"]
    figure.suptitle(f"{device}, torch {results['setup'].get('torch')}", fontsize=10)
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise PlotError(f"--plot {file}: {error}") from None


def dense(call: Mapping[str, Any]) -> int:
    return 4 * call["batch"] * call["heads"] * call["context"] * call["channels"]
