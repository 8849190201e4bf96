"""The rewrite of caches that evict: steps go over slots, and a prompt's appends become one `kvc::keep`.

    append; attend of one token       ->  attend(q, K, V, k, v, sight(K, mask, positions)); append at slots(K, ...)
    ... of several, a prompt          ->  attention as it is, over slots where some are stored; keep(K, V, q, k, v, ...)
    cat(past, k) of several           ->  the same, with K' = widen(K)
    cat([], k) of several             ->  the same, with K = empty(...)
    append of one, if another may go  ->  step(K, V, q, k, v, ...)

`keep` stands behind the last attention of the layers that are looked at together: what they append is held in full
precision until then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from kvc_compile.layout import Layout
from kvc_compile.lowering import keeping  # noqa: F401  (defines the operators)
from kvc_compile.passes.caches import Buffer, Concat, born_sizes, kind
from kvc_compile.passes.fx import copy_meta, shape, value
from kvc_compile.passes.recognise import Match
from kvc_compile.plan import SLACK, Keep, SitePlan
from kvc_compile.policy import Policy, capacity, larger

kvc = torch.ops.kvc
Call = Callable[..., Node]  # of `rewrite`: puts an operator where the graph is being written


@dataclass(frozen=True)
class Prompt:
    """A site of several tokens at once. at: what stands in its attention's place."""

    match: Match
    plan: SitePlan
    at: Node

    @property
    def keep(self) -> Keep:
        assert self.plan.keep is not None
        return self.plan.keep

    @property
    def tensors(self) -> tuple[tuple[Buffer | Concat, Layout, str], ...]:
        return (self.match.key, self.plan.key, "keys"), (self.match.value, self.plan.value, "values")


def is_prompt(m: Match, p: SitePlan) -> bool:
    """Whether some of what is appended here may go at once: it is several tokens, or the first one of a cache whose
    scores accumulate."""
    if p.keep is None or m.attention is None:
        return False
    first = kind(m.key) in ("born", "fresh") and Policy.parse(p.keep.policy).steps
    return shape(m.key.x)[2] != 1 or first  # type: ignore[index]


def is_step(m: Match, p: SitePlan) -> bool:
    """Whether one token is appended here, for which another may go."""
    return p.keep is not None and not is_prompt(m, p) and Policy.parse(p.keep.policy).steps


def room(tokens: Any, most: Any, policy: str, layers: int, heads: int) -> Any:
    """Tokens that a new cache must have room for: what is kept of `tokens`, and those that follow up to `most` (None:
    a few)."""
    p = Policy.parse(policy)
    if p.steps and most is not None:
        return capacity(p.rule, p.regions, most, layers, heads)
    kept = capacity(p.rule, p.regions, tokens, layers, heads)
    return kept + (SLACK if most is None else larger(most - tokens, 0))


def call_room(graph: Graph, tokens: Any, most: Any, keep: Keep, heads: int, like: Node) -> Any:
    """`room` of sizes that may be nodes of the graph: a number, or the node that works it out."""
    args = tokens, most, keep.policy, keep.layers, heads
    if not any(isinstance(x, Node) for x in (tokens, most)):
        return room(*args)
    node = graph.call_function(room, args)
    copy_meta(node, like, room(value(tokens), value(most), *args[2:]))
    return node


def tokens_of(graph: Graph, x: Node, like: Node, dim: int = 2) -> Any:
    """A size of x: a number, or a node that says it."""
    n = shape(x)[dim]  # type: ignore[index]
    if isinstance(n, int):
        return n
    node = graph.call_method("size", (x, dim))
    copy_meta(node, like, n)
    return node


def born(graph: Graph, call: Call, c: Buffer, layout: Layout, keep: Keep) -> Node:
    """The arena of a cache that this graph makes, a prompt's: smaller than the cache by what will go."""
    batch, _, most, _ = born_sizes(c.node)
    n = tokens_of(graph, c.x, c.node)
    size = call_room(graph, n, most, keep, layout.heads, c.node)
    return call(kvc.empty.default, c.x, batch, size, layout.key, like=c.node)


def over_slots(graph: Graph, call: Call, m: Match, p: SitePlan, k: Node, positions: Node | None) -> Node:
    """The mask over slots of a site's attention."""
    a = m.attention
    assert a is not None
    q, n = value(a.q), tokens_of(graph, m.key.x, a.node)
    with q.fake_mode:
        fake = torch.empty(
            (*q.shape[:3], 1), dtype=torch.bool if a.mask is None else value(a.mask).dtype, device=q.device
        )
    args = k, a.mask, positions, n, m.site.query_heads, a.causal, p.key.key
    return call(kvc.sight.default, *args, like=a.node, fake=fake)


def new_tokens(c: Buffer | Concat) -> Node:
    """What a prompt brings: all of a cache that was plain until now."""
    return c.returned if isinstance(c, Concat) and kind(c) == "fresh" else c.x


def arena(graph: Graph, call: Call, c: Buffer | Concat, layout: Layout, keep: Keep, old: Node | None, at: Node) -> Node:
    """The arena that a prompt goes to: `old`, a copy of it with room for the prompt, or a new one."""
    if isinstance(c, Buffer):
        assert old is not None
        return old
    n = tokens_of(graph, new_tokens(c), at)
    if old is not None:
        return call(kvc.widen.default, old, n, layout.key, like=at)
    size = call_room(graph, n, None, keep, layout.heads, at)
    batch = tokens_of(graph, c.x, at, 0)
    return call(kvc.empty.default, c.x, batch, size, layout.key, like=at)


def step(call: Call, x: Prompt, k: Node, v: Node, reads: list[Node]) -> Node:
    """`kvc::step` for one token of a layer."""
    a, m, plan = x.match.attention, x.match, x.keep
    assert a is not None
    positions = m.key.positions if isinstance(m.key, Buffer) else None
    layouts = x.plan.key.key, x.plan.value.key
    args = k, v, a.q, m.key.x, m.value.x, a.mask, a.sinks, positions, a.scale, a.cap, *layouts
    return call(kvc.step.default, *args, m.site.layer, plan.layers, plan.policy, reads, like=x.at)


def keep(call: Call, group: list[Prompt], keys: list[Node], values: list[Node], reads: list[Node], like: Node) -> None:
    """One `kvc::keep` for the prompts of some layers, in their order."""
    found = [x.match.attention for x in group]
    attentions = [a for a in found if a is not None]
    first, plan = group[0].match, group[0].keep
    joint = Policy.parse(plan.policy).joint
    call(
        kvc.keep.default,
        keys,
        values,
        [a.q for a in attentions],
        [new_tokens(x.match.key) for x in group],
        [new_tokens(x.match.value) for x in group],
        [a.mask for a in attentions],
        [a.sinks for a in attentions],
        [x.match.key.positions if isinstance(x.match.key, Buffer) else None for x in group],
        [a.causal for a in attentions],
        [a.scale for a in attentions],
        [a.cap for a in attentions],
        " ".join(x.plan.key.key for x in group),
        " ".join(x.plan.value.key for x in group),
        0 if joint else first.site.layer,
        len(group) if joint else plan.layers,
        plan.policy,
        reads,
        like=like,
    )
