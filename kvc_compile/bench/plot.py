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
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    steps, calls = results["steps"], [c for c in results["attention"] if c["seconds"] and c["format"] in OURS]
    caches = [c for c in dict.fromkeys(s["cache"] for s in steps) if points(steps, c)]
    panels = (["time", "bytes"] if caches else []) + (["calls"] if calls else [])
    figure = Figure(figsize=(4.4 * max(1, len(panels)), 4.2), layout="constrained")
    axes = dict(zip(panels, figure.subplots(1, max(1, len(panels)), squeeze=False)[0], strict=False))
    for n, cache in enumerate(caches):
        found, colour = points(steps, cache), f"C{n}"
        x, style = [s["context"] for s in found], {"color": colour, "label": cache, "markersize": 4}
        axes["time"].plot(x, [s["seconds"] * 1e3 for s in found], "o-", **style)
        axes["time"].plot(x, [s["predicted_s"] * 1e3 for s in found], ":", color=colour)
        axes["bytes"].plot(x, [(s["cache_bytes"] or 0) / 1e9 or None for s in found], "o-", **style)
    titles = {"time": ("One decode step (dotted: by its bytes)", "ms"), "bytes": ("Cache of one sequence", "GB")}
    for name, (title, unit) in titles.items() if caches else ():
        axes[name].set(title=title, xlabel="context, tokens", ylabel=unit, xscale="log", yscale="log")
        axes[name].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[name].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes[name].yaxis.set_minor_formatter(NullFormatter())
        axes[name].legend(fontsize=8)
    for n, name in enumerate(OURS):
        # by the bytes of the 16-bit cache, so that one shape has one abscissa
        found = sorted((c for c in calls if c["format"] == name), key=dense)
        if found:
            x = [dense(c) / 1e6 for c in found]
            axes["calls"].scatter(x, [c["of_ceiling"] for c in found], s=12, color=f"C{n}", label=name)
    if calls:
        names = {"xlabel": "16-bit cache, MB", "ylabel": "share of the read rate"}
        axes["calls"].set(title="One attention call", **names, xscale="log", ylim=(0, None))
        axes["calls"].legend(fontsize=8)
    device = results["setup"]["device"]
    figure.suptitle(f"{device}, torch {results['setup'].get('torch')}", fontsize=10)
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise PlotError(f"--plot {file}: {error}") from None


def dense(call: Mapping[str, Any]) -> int:
    return 4 * call["batch"] * call["heads"] * call["context"] * call["channels"]
