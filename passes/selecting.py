"""`select`: attention over a cache becomes a choice of slots, and attention over these alone.

    attend(q, K, V, k, v, ...)   ->   s = select(q, K, k, ...); attend_selected(q, K, V, k, v, s, ...)

Where a layer reads what an earlier one selected, its `s` is that one's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from kvc_compile.lowering import selecting
from kvc_compile.passes.fx import copy_meta, value
from kvc_compile.plan import SitePlan

kvc = torch.ops.kvc  # defined by `lowering.selecting`


class Selecting:
    """What layers selected so far in a graph that is being rewritten."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.slots: dict[int, Node] = {}  # by the attention that selects

    def prepare(self, p: SitePlan, device: torch.device) -> None:
        """What the operators of a site need on its device, its appends included."""
        selecting.prepare(p.reading.selection if p.reading else "", p.key, device)

    def attend(
        self, p: SitePlan, like: Node, operands: tuple[Any, ...], mask: Any, positions: Any, scale: float,
        rest: dict[str, Any],
    ) -> Node | None:  # fmt: skip
        """What stands in the place of attention `like`, at the place of insertion; None if it reads all.

        operands: q, the arenas of keys and values, the new keys and values; rest: cap, sinks, shown, where they are.
        """
        r = p.reading
        if r is None or not r.selection:
            return None
        q, k, _, k_new, _ = operands
        if r.source not in self.slots:
            assert r.source == p.site.index, "the plan selects before it reads"
            self.slots[r.source] = self.select(p, like, (q, k, k_new, mask, positions, scale), rest)
        args = *operands, self.slots[r.source], mask, positions, scale, p.key.key, p.value.key, r.selection
        new = self.graph.call_function(kvc.attend_selected.default, args, rest)
        copy_meta(new, like, value(like))
        return new

    def select(self, p: SitePlan, like: Node, args: tuple[Any, ...], rest: dict[str, Any]) -> Node:
        assert p.reading is not None
        selection = p.reading.selection
        shown = {name: n for name, n in rest.items() if name == "shown"}
        node = self.graph.call_function(kvc.select.default, (*args, p.key.key, selection), shown)
        copy_meta(node, like)
        return node
