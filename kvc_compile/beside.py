"""`verify: true`: in its first calls a rewritten graph runs beside the graph as Dynamo gave it, which has caches of
its own in full precision, and what the two make of every attention is compared.

The untouched graph's caches live on the arenas that stand for them, as an attribute, and go with them. Where an arena
has none (a cache that was copied, or compressed before), it starts from the content of the compressed cache.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kvc_compile.difference import Difference, Differences
from kvc_compile.handle import CacheHandle
from kvc_compile.lowering import cpu
from kvc_compile.passes.alias import memory
from kvc_compile.passes.fx import duplicate, output, writes
from kvc_compile.passes.rewrite import SITE, Rewritten
from kvc_compile.plan import Plan, SitePlan

log = logging.getLogger("kvc_compile")

CALLS = 16  # of each graph
LOSSLESS = {torch.float32: 1e-3, torch.float64: 1e-3}  # relative difference above which a site that stores all is wrong
LOSSLESS_HALF = 3e-2


class Beside:
    """The untouched graph of a rewritten one. `found` fills as it is called."""

    def __init__(self, gm: GraphModule, plan: Plan):
        """`gm`: the graph before the rewrite; it is copied."""
        self.gm = duplicate(gm)
        self.plans = {e.site.index: e for e in plan.planned}
        self.found = Differences({i: Difference() for i in self.plans})
        self.calls = 0
        self.written = _written(self.gm)
        self.rewritten = Rewritten((), (), 0)
        named = {n.name: n for n in self.gm.graph.nodes}
        _return_also(self.gm, [named[e.site.node] for e in self.plans.values()])

    def compare_with(self, gm: GraphModule, rewritten: Rewritten) -> None:
        """Make the rewritten graph return what its attentions give, too."""
        self.rewritten = rewritten
        at = {n.meta[SITE]: n for n in gm.graph.nodes if SITE in n.meta}
        named = {n.name: n for n in gm.graph.nodes}
        _return_also(gm, [at[i] if i in at else named[e.site.node] for i, e in self.plans.items()])

    @property
    def done(self) -> bool:
        return self.calls >= CALLS

    @torch.no_grad()
    def run(self, args: Sequence[Any]) -> tuple[list[Any], list[Any]] | None:
        """(the untouched graph's inputs, its outputs), before the rewritten graph runs; None where a cache that it
        would start from has evicted tokens."""
        caches = {i.index for i in self.rewritten.inputs} | {i for i, _ in self.rewritten.dense}
        mine = list(args)
        for i, x in enumerate(args):
            if isinstance(x, CacheHandle):
                kept = getattr(x.arena, "kvc_beside", None)
                if kept is None and x.stored.evicts and cpu.evicted(x.arena, x.stored):
                    return None
                mine[i] = x.dense() if kept is None else kept
            elif isinstance(x, Tensor) and (i in caches or i in self.written):
                mine[i] = x.clone()
        return mine, list(self.gm(*mine))

    def compare(self, args: Sequence[Any], outs: Sequence[Any], results: Sequence[Any], untouched: tuple) -> None:
        """args: what the rewritten graph was called with, its caches handles by now; outs: what the lowered graph
        returned; results: what the caller gets; untouched: what `run` gave."""
        mine, wanted = untouched
        self.calls += 1
        count = len(self.plans)
        for i, a, b in zip(self.plans, outs[len(outs) - count :], wanted[len(wanted) - count :], strict=True):
            self.found.sites[i].add(a, b)
            self.warn(self.plans[i])
        for a, b in zip(results, wanted, strict=False):
            if isinstance(a, Tensor) and not isinstance(a, CacheHandle) and a.is_floating_point():
                self.found.outputs.add(a, b)
        self.keep(args, mine)
        self.keep(results, wanted)

    def keep(self, ours: Sequence[Any], wanted: Sequence[Any]) -> None:
        """The untouched graph's caches for the next call."""
        for a, b in zip(ours, wanted, strict=False):
            if isinstance(a, CacheHandle):
                a.arena.kvc_beside = None if self.done else b  # type: ignore[attr-defined]

    def warn(self, plan: SitePlan) -> None:
        """A cache that is stored as it is, and read whole, must not make a difference."""
        if (
            plan.key.evicts
            or (plan.reading and plan.reading.selection)
            or any(x.codec.kind != "raw" for x in (plan.key, plan.value))
        ):
            return
        found = self.found.sites[plan.site.index].relative
        if not found <= LOSSLESS.get(getattr(torch, plan.key.dtype), LOSSLESS_HALF):
            log.warning(
                "kvc verify: attention %s (layer %s, %s) keeps its cache as it is, yet is %.1e from the model's",
                plan.site.index, plan.site.layer, plan.site.where, found,
            )  # fmt: skip


def _written(gm: GraphModule) -> set[int]:
    """Inputs that the graph may write to."""
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    targets = {m for n in gm.graph.nodes for w in writes(n) for m in memory(w)}
    return {i for i, p in enumerate(inputs) if p in targets}


def _return_also(gm: GraphModule, nodes: list[Node]) -> None:
    out = output(gm.graph)
    out.args = ((*out.args[0], *nodes),)  # type: ignore[misc]
    gm.recompile()
