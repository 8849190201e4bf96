"""How many slots a rule ever needs: numbers, or symbols of a graph (which have operators of their own for this)."""

from __future__ import annotations

from typing import Any

from .rule import Regions, Rule


def capacity(
    rule: Rule, regions: Regions, tokens: Any, layers: int = 1, heads: int = 1, most: int | None = None
) -> Any:
    """Slots that a head never exceeds, for rows of at most `tokens` tokens (a number, or a symbol of a graph): static,
    and sufficient for every alloc; at least 1. most: the largest count of a table."""
    budget, how = rule.budget, rule.alloc
    if budget.tokens is None or not all(a.monotone for a in (budget.tokens, regions.sink, regions.recent)):
        return tokens
    base = budget.tokens.most(tokens)
    sharing = {"uniform": 1, "table": 1, "mass": layers, "softmax": layers, "pyramid": 2}
    count = base * sharing.get(how.kind, heads if how.scope == "head" else layers * heads)
    if how.kind == "waterfill" and how.cap is not None:
        count = smaller(count, larger(how.cap.most(base), how.floor.most(base)))
    if how.kind == "pyramid":
        count += 1  # rounding
    if how.kind == "table":
        count = tokens if most is None else most
    count = larger(larger(count, rule.newest), base)
    kept = regions.sink.most(tokens) + regions.recent.most(tokens) + count
    return larger(1, smaller(tokens, kept))


def larger(a: Any, b: Any) -> Any:
    return _symbolic(a, b, "__sym_max__") if hasattr(a, "node") or hasattr(b, "node") else max(a, b)


def smaller(a: Any, b: Any) -> Any:
    return _symbolic(a, b, "__sym_min__") if hasattr(a, "node") or hasattr(b, "node") else min(a, b)


def _symbolic(a: Any, b: Any, how: str) -> Any:
    return getattr(a, how)(b) if hasattr(a, how) else getattr(b, how)(a)
