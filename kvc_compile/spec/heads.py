"""Classes of heads: which KV heads a fragment under `heads:` is about, in a model of a given shape. Data only.

heads:
  table: FILE or [[..], ..]      by layer and KV head: names of classes, or scores
  top: {retrieval: 50%}          of scores: the best heads of the whole model are of this class, the others of the
                                 other one; {retrieval: {echo: 1%, induction: 14%}}: by any of several tables
  retrieval: {..}                what differs in the heads of a class
  streaming: {..}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from .artefacts import Place, Rows, rows, shaped
from .errors import Path, nearest
from .grammar import Context

RESERVED = ("table", "top")
Names = tuple[tuple[str, ...], ...]


def classes(data: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes of a checked `heads:`."""
    return tuple(name for name in data if name not in RESERVED)


def check(data: Mapping[str, Any], path: Path, ctx: Context) -> None:
    """Refuses classes that no head can have, as far as the spec itself tells."""
    names, top = classes(data), data.get("top")
    if not names:
        ctx.fail(path, "names no class of heads", "only a table", "retrieval: {..}, streaming: {..}")
    if top is not None:
        (chosen,) = top if len(top) == 1 else (None,)
        if chosen is None or len(names) != 2:
            ctx.fail((*path, "top"), "parts the heads into two classes", f"{len(top)} of {len(names)}", "one of two")
        if chosen not in names:
            ctx.fail((*path, "top"), "no such class", chosen, ", ".join(names), nearest(chosen, names))
    if isinstance(data["table"], list):
        table = rows(data["table"], Place(ctx.file, (*path, "table"), "table"))
        _fits(data, {"": table}, Place(ctx.file, (*path, "table"), "table"))


def resolve(data: Mapping[str, Any], tables: Mapping[str, Rows], heads: Sequence[int], at: Place) -> Names:
    """The class of each KV head, by layers. heads: KV heads of each layer. Raises SpecError."""
    _fits(data, tables, at)
    top = data.get("top")
    if top is None:
        (table,) = tables.values()
        return tuple(tuple(map(str, row)) for row in shaped(table, heads, at))
    (chosen,) = top
    (other,) = (name for name in classes(data) if name != chosen)
    shares = top[chosen] if isinstance(top[chosen], Mapping) else {next(iter(tables)): top[chosen]}
    best = set().union(*(_best(shaped(tables[name], heads, at), share) for name, share in shares.items()))
    return tuple(tuple(chosen if (i, h) in best else other for h in range(n)) for i, n in enumerate(heads))


def _fits(data: Mapping[str, Any], tables: Mapping[str, Rows], at: Place) -> None:
    """Whether these tables are what `top`, or its absence, needs."""
    names, top = classes(data), data.get("top")
    if top is None or not isinstance(next(iter(top.values())), Mapping):
        if len(tables) != 1:
            allowed = "one, or top: {CLASS: {TABLE: 14%}}"
            at.fail("nothing says which table counts", ", ".join(sorted(tables)) or "no table", allowed)
    else:
        for name in next(iter(top.values())):
            if name not in tables:
                at.fail(f"no table {name!r}", ", ".join(sorted(tables)) or "no table", f"a table {name!r}")
    for table in tables.values():
        words = isinstance(table[0][0], str)
        if words and top is not None:
            at.fail("names of classes leave nothing for `top`", "names", "scores, or no `top`")
        if not words and top is None:
            at.fail("scores do not say which heads are of which class", "numbers", "top: {CLASS: 50%}, or names")
        for i, row in enumerate(table if words else ()):
            for h, cell in enumerate(row):
                if cell not in names:
                    close = nearest(cell, names)
                    allowed = ", ".join(names) + (f" (nearest: {close})" if close else "")
                    at.fail(f"layer {i}, head {h}: no such class", repr(cell), allowed)


def _best(table: Rows, share: int | str) -> set[tuple[int, int]]:
    """(layer, head) of the highest scores: a number of heads, or a share of all, rounded; ties go to the first."""
    order = sorted(((-float(x), i, h) for i, row in enumerate(table) for h, x in enumerate(row)))
    count = (
        share if isinstance(share, int) else int(Fraction(share.removesuffix("%")) / 100 * len(order) + Fraction(1, 2))
    )
    return {(i, h) for _, i, h in order[:count]}
