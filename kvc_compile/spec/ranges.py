"""Ranges of layers: "0,1", "0..3" (0, 1, 2, 3), "16..31 by 2", "-1" (the last layer)."""

from __future__ import annotations

import re

from .errors import Path
from .grammar import Context

_ITEM = re.compile(r"\s*(-?[0-9]+)(?:\.\.(-?[0-9]+)(?: by ([0-9]+))?)?\s*", re.ASCII)


def parse(text: str) -> list[tuple[int, int, int]]:
    """(first, last, step) of each item; the text has passed `schema.RANGE`."""
    items = []
    for part in text.split(","):
        match = _ITEM.fullmatch(part)
        assert match is not None, text
        first = int(match[1])
        items.append((first, int(match[2]) if match[2] else first, int(match[3] or 1)))
    return items


def check(names: list[str], path: Path, ctx: Context) -> None:
    """Refuses ranges that run backwards and layers named twice, as far as the number of layers does not matter."""
    owner: dict[int, str] = {}
    for name in names:
        for first, last, step in parse(name):
            if (first < 0) != (last < 0):
                continue  # such as 4..-1: depends on the number of layers
            if first > last:
                ctx.fail((*path, name), "the range runs backwards", f"{first}..{last}", near=f"{last}..{first}")
            for index in range(first, last + 1, step):
                if index in owner:
                    other = "the same range" if owner[index] == name else f'"{owner[index]}"'
                    ctx.fail((*path, name), f"layer {index} is named twice", f"also in {other}", "each layer once")
                owner[index] = name


def resolve(names: list[str], n_layers: int, path: Path, ctx: Context) -> dict[int, str]:
    """The range that each layer belongs to, for a model of `n_layers` layers; layers in no range are absent."""
    owner: dict[int, str] = {}
    for name in names:
        for first, last, step in parse(name):
            for end in (first, last):
                if not -n_layers <= end < n_layers:
                    ctx.fail(
                        (*path, name),
                        f"the model has {n_layers} layers",
                        f"layer {end}",
                        f"0..{n_layers - 1}, or -{n_layers}..-1 from the end",
                    )
            low, high = first % n_layers, last % n_layers
            if low > high:
                ctx.fail((*path, name), f"the range runs backwards in a model of {n_layers} layers", f"{low}..{high}")
            for index in range(low, high + 1, step):
                if index in owner:
                    ctx.fail(
                        (*path, name),
                        f"layer {index} of {n_layers} is named twice",
                        f'also in "{owner[index]}"',
                        "each layer once",
                    )
                owner[index] = name
    return owner
