"""`heads`: which KV heads of a layer follow which rules, as retrieval and streaming heads do (DuoAttention, Xiao et al.
2024, arXiv:2410.10819; RazorAttention, Tang et al. 2024, arXiv:2407.15891)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .query import Query, query_of
from .rule import Regions, Rule, regions_of, rules_of


@dataclass(frozen=True)
class HeadGroup:
    """KV heads of a layer with the same rules. name: of their class, "" where the spec has none; heads: ascending."""

    name: str
    heads: tuple[int, ...]
    regions: Regions
    rules: tuple[Rule, ...]
    query: Query | None


def groups_of(classes: Sequence[str], fragment: Callable[[str], Mapping[str, Any]]) -> tuple[HeadGroup, ...]:
    """The groups of a layer, in the order of their first heads. classes: of each KV head of the layer; fragment: what
    holds in a class, as plain data (`Spec.fragment`). Raises Unbuilt."""
    found = []
    for name in dict.fromkeys(classes):
        data = fragment(name)
        heads = tuple(h for h, c in enumerate(classes) if c == name)
        regions = regions_of(data.get("tokens", {}))
        found.append(HeadGroup(name, heads, regions, rules_of(data.get("keep")), query_of(data.get("select"))))
    return tuple(found)
