"""Caches that no fused attention reads: they are stored compressed all the same, and read back for the graph as it is.

Whatever the graph computes from a cache (latents that are expanded, scores that are capped, sinks, another layout), it
computes from a tensor with the cache's content. So where the graph only reads the cache, apart from one append, that
tensor may be a temporary: `read(arena)`, to which the graph's own append is applied. The rules of legality:
 1. the cache has one append (`caches`), and the graph returns nothing that may share its memory but the cache itself;
 2. nothing else in the graph may write to it: no in-place operator's target leads back to it other than through
    operators that make new memory, and no operator that the graph cannot see into takes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch._ops import HigherOrderOperator
from torch.fx import Graph, Node

from kvc_compile.passes.alias import Writers, leads_to, memory, name, root
from kvc_compile.passes.attention import PRODUCTS, SOFTMAX
from kvc_compile.passes.caches import (
    ZEROS,
    Buffer,
    Concat,
    Decline,
    check_window,
    kind,
    read_buffer,
    size_of,
)
from kvc_compile.passes.fx import is_call, output, shape, source, value
from kvc_compile.passes.windows import read_window, sliding


class NoCache(Decline):
    """An attention without a cache."""


@dataclass(frozen=True)
class Pair:
    """The caches of the keys and the values of one attention."""

    key: Buffer | Concat
    value: Buffer | Concat


class Readers:
    """The caches of a graph that may be read back, found from the attentions that read them, in order."""

    def __init__(self, graph: Graph, taken: set[Node], ends: set[Node], writers: Writers):
        """taken: cache tensors of fused attentions. ends: the results of all attentions."""
        self.ends = ends
        self.graph, self.taken, self.writers, self.out = graph, taken, writers, output(graph)
        self.visited: set[Node] = set()
        self.pairs: list[Pair] = []  # that are read back
        self.placeholders = list(graph.find_nodes(op="placeholder"))
        self.nodes = {n.name: n for n in graph.nodes}
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.writes: dict[Node, list[Node]] = {}  # new memory -> what is written into it
        for n, written in writers.writes.items():
            for w in written:
                self.writes.setdefault(root(w), []).append(n)

    def pair(self, attention: Node) -> Pair:
        """The caches that `attention` reads and none before it; `Decline` where they may not be read back."""
        found: dict[Node, Buffer | Concat] = {}
        stack = [attention, *after_softmax(attention)]
        last, before = max(self.order[n] for n in stack), set(self.visited)
        seen: list[Node] = []  # by an earlier attention
        while stack:
            n = stack.pop()
            if n in self.visited:
                seen.append(n)
                continue
            self.visited.add(n)
            c = self.cache(n)
            if c is not None:
                if n not in self.taken:
                    found[n] = c
                continue
            stack += n.all_input_nodes
            written = [w for w in self.writes.get(n, ()) if self.order[w] < last]
            stack += (i for w in written for i in w.all_input_nodes)
        if not found and (pair := self.shared(seen)) is not None:
            return pair
        if not found and self.uncached(self.visited - before):
            raise NoCache("it reads no cache")
        if len(found) != 2:
            raise Decline(f"it reads {len(found) or 'no'} cache{'s' if len(found) != 1 else ''} of its own")
        first, second = sorted(found.values(), key=lambda c: self.order[c.append if isinstance(c, Buffer) else c.node])
        if type(first) is not type(second) or kind(first) != kind(second):
            raise Decline("its two caches are of different kinds")
        for c in (first, second):
            self.check(c)
            if isinstance(c, Buffer) and isinstance(attention.target, HigherOrderOperator):
                raise Decline(f"Dynamo cannot hand `{attention.target}` a compressed static cache")
        self.pairs.append(Pair(first, second))
        return self.pairs[-1]

    def uncached(self, nodes: set[Node]) -> bool:
        """Whether what an attention is computed from, back to earlier attentions, holds nothing that may be a cache:
        no tensor of a cache's form that comes from the caller or goes to it, and none that is written to."""
        for n in nodes:
            v = value(n)
            if not isinstance(v, torch.Tensor) or not v.dtype.is_floating_point or v.dim() < 3:
                continue
            given = n.op == "placeholder" and not isinstance(v, torch.nn.Parameter)
            if (v.dim() > 3 and (given or self.out in n.users)) or (given and n in self.written):
                return False
        return True

    @cached_property
    def written(self) -> set[Node]:
        """All memory that the graph may write to."""
        return {m for targets in self.writers.writes.values() for t in targets for m in memory(t)}

    def shared(self, seen: list[Node]) -> Pair | None:
        """The caches of an earlier attention, where nodes that it saw lead back to them, and to no others."""
        caches = {c.node: p for p in self.pairs for c in (p.key, p.value)}
        stack, known, reached = list(seen), set(), {}
        while stack:
            n = stack.pop()
            if n in known or n in self.ends:
                continue
            known.add(n)
            if n in caches:
                reached[n] = caches[n]
            elif self.cache(n) is not None:
                return None
            else:
                stack += n.all_input_nodes
        pairs = list(reached.values())
        return pairs[0] if pairs and all(p is pairs[0] for p in pairs) and len(pairs) == 2 else None

    def cache(self, node: Node) -> Buffer | Concat | None:
        try:
            if is_call(node, torch.cat):
                c = sliding(node)
                return c if c.kept is not None or self.out in node.users else None
            v = value(node)
            buffer = node.op == "placeholder" or is_call(node, *ZEROS)
            if buffer and isinstance(v, torch.Tensor) and v.dim() == 4 and v.dtype.is_floating_point:
                copied = any(is_call(u, "copy_") and u.args[0] is node for u in node.users)
                return read_window(node, self.writers) if copied and node.op == "placeholder" else read_buffer(node)
        except Decline:
            pass
        return None

    def check(self, c: Buffer | Concat) -> None:
        """The rules at the head of this file."""
        what = source(c.node) or c.node.name
        heads, channels = shape(c.node)[1], shape(c.node)[3]  # type: ignore[index]
        if not (isinstance(heads, int) and isinstance(channels, int)) or channels % 4:
            raise Decline(f"{what} has {heads} heads of {channels} channels: fixed numbers, channels by 4, are needed")
        ours = {c.node}
        if isinstance(c, Buffer):
            ours.add(c.append)
        else:
            ours.add(c.returned)
        if isinstance(c, Concat) and c.past is not None:
            check_window(c)
            ours.add(c.past)
            for user in c.past.users:
                if user is not c.node and user not in c.metadata:
                    raise Decline(f"{source(c.past)} is also used by `{name(user)}`")
        for r in self.out.all_input_nodes:
            if r not in ours and leads_to(r, ours):
                raise Decline(f"a view of {what} is returned")
        for n, written in self.writers.writes.items():
            if isinstance(c, Buffer) and n is c.append:
                continue
            if any(leads_to(w, ours) for w in written):
                raise Decline(f"`{name(n)}` may write to {what}")
        if isinstance(c, Concat) and c.past is not None:
            size_of(c.past, self.placeholders)


def after_softmax(attention: Node) -> list[Node]:
    """The matrix products with the values that a softmax leads to; none where `attention` is a whole attention."""
    found, stack = [], [attention] if is_call(attention, *SOFTMAX) else []
    for _ in range(20):
        stack = [u for n in stack for u in n.users]
        found += [n for n in stack if is_call(n, *PRODUCTS)]
        stack = [n for n in stack if not is_call(n, *PRODUCTS) and n.op != "output"]
        if found:
            break
    return found
