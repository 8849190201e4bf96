"""The rewrite: attention over a cache and the append to it become `kvc::attend` and `kvc::append` on arenas.

Per site, with k and v the new tokens:

    static    append; attend                 ->  o = attend(q, K, V, k, v, ...); append(K, k); append(V, v)
    alone     append; attend first n         ->  o = sdpa(q, k, v, ...); append(K, k); append(V, v)
    born      zeros; append; attend          ->  K = empty(...); as above; K returned
    grown     cat(past, k); attend           ->  as above with n = 1; else K' = extend(K, k), returned
    fresh     cat([], k); attend             ->  attention as it was; K = encode(cat), returned
    read back append or cat; anything        ->  t = read(K); append or cat to t, and all that follows, as it was;
                                                 append(K, k)

Caches that evict are rewritten likewise, see `passes.evict`.

A compressed cache that is no site's is passed as plain values: a copy, or if the graph writes to it, it is plain from
then on.

Attention comes before the append because the new tokens are attended as they are, before any rounding. A handle
placeholder becomes its arena: the graph that is lowered holds plain tensors only, and the runtime (`kvc_compile.bound`)
takes handles apart and puts them together.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from kvc_compile.handle import CacheHandle
from kvc_compile.layout import Layout
from kvc_compile.lowering import checks
from kvc_compile.lowering.bounds import bounds
from kvc_compile.passes import evict
from kvc_compile.passes.alias import Writers, leads_to
from kvc_compile.passes.caches import (
    SIZES,
    Buffer,
    Concat,
    Span,
    born_sizes,
    consecutive,
    kind,
    read_sizes,
    size_of,
    size_value,
)
from kvc_compile.passes.fx import copy_meta, erase_unused, is_call, output, shape, value, writes
from kvc_compile.passes.recognise import Match
from kvc_compile.passes.selecting import Selecting
from kvc_compile.passes.windows import last_tokens
from kvc_compile.plan import SLACK, Keep, Plan, SitePlan, Slide

SITE = "kvc_site"  # in the meta of a node that stands in an attention's place: the attention's index
kvc = torch.ops.kvc  # defined by `lowering.ops`, which the handle imports


@dataclass(frozen=True)
class Input:
    """A placeholder that the lowered graph takes as an arena. static: a buffer of fixed length; start: the placeholder
    whose first element is the first position that is written, if there is one."""

    index: int
    layout: str
    layer: int
    role: str
    static: bool
    start: int | None = None
    pushed: int = 0  # tokens that push as many out of a window that is full
    slide: Slide | None = None  # of such a window


@dataclass(frozen=True)
class Output:
    """An output of the original graph that becomes a handle.

    arena: index of the arena among the lowered outputs, or `~i` for the arena of input i, extended in place; for that
    of a static input, the output is that input itself.
    tokens: the handle's tokens, or `~i`: lowered output i holds them.
    add_to: input whose handle's tokens are added to these, or None.
    """

    index: int
    arena: int
    layout: str
    layer: int
    role: str
    static: bool
    tokens: int
    add_to: int | None = None
    appended: int | None = None  # of a sliding window: the tokens appended to the arena, or `~i`
    past: int | None = None  # of a sliding window: the input that they were appended to
    slide: Slide | None = None  # of a sliding window
    keep: str = ""  # of a cache that evicts: its policy's key


@dataclass(frozen=True)
class Rewritten:
    """What the runtime must know about a rewritten graph."""

    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    results: int  # outputs of the original graph
    dense: tuple[tuple[int, bool], ...] = ()  # handles passed as plain values, and whether they stay plain
    evicts: bool = False  # it asks the device how many tokens are held

    @property
    def births(self) -> bool:
        return any(o.arena >= 0 for o in self.outputs)


def rewrite(gm: GraphModule, matches: list[Match], plan: Plan) -> Rewritten:
    """Rewrite the matched sites of `gm` in place, as planned."""
    graph = gm.graph
    plans = {e.site.index: e for e in plan.planned}
    work = _Rewrite(graph)
    for m in matches:
        work.site(m, plans[m.site.index])
    work.finish()
    graph.lint()
    gm.recompile()
    policies = {e.site.layer: e.keep.policy for e in plan.planned if e.keep}
    outputs = tuple(replace(o, keep=policies.get(o.layer, "")) for o in work.outputs)
    return Rewritten(tuple(work.inputs), outputs, work.results, tuple(work.dense), bool(work.prompts))


class _Rewrite:
    def __init__(self, graph: Graph):
        self.graph = graph
        self.placeholders = list(graph.find_nodes(op="placeholder"))
        self.writers = Writers(graph)
        self.out = output(graph)
        self.returned: list[Any] = list(self.out.args[0])  # type: ignore[arg-type]
        self.results = len(self.returned)
        self.inputs: list[Input] = []
        self.outputs: list[Output] = []
        self.dense: list[tuple[int, bool]] = []
        self.dead: list[Node] = []
        self.arenas: dict[Node, Node] = {}  # cache tensor -> arena
        self.last_read: dict[Node, Node] = {}
        self.reads: dict[Node, list[Node]] = {}  # cache tensor -> operators that read its arena
        self.bounds: dict[Node, Node] = {}  # mask -> what it comes down to
        self.checked: set[Node] = set()  # positions
        self.appends: dict[Node, tuple[Buffer | Concat, Layout, Match]] = {}
        self.slides: dict[int, Slide] = {}  # by attention
        self.positions: dict[Node, Node] = {}  # append to a slice -> the positions that it writes to
        self.prompts: dict[int, list[evict.Prompt]] = {}  # by group, see `plan.Keep`
        self.steps: list[evict.Prompt] = []
        self.selecting = Selecting(graph)

    def call(self, op: Any, *args: Any, like: Node, fake: Any = None) -> Node:
        node = self.graph.call_function(op, args)
        copy_meta(node, like, fake)
        return node

    def replace(self, old: Node, new: Any) -> None:
        """Everywhere, the outputs that are being collected included."""
        old.replace_all_uses_with(new)
        self.returned = [new if r is old else r for r in self.returned]

    # ------------------------------------------------------------ one site

    def site(self, m: Match, p: SitePlan) -> None:
        m = replace(m, key=self.placed(m.key), value=self.placed(m.value))
        self.slides[m.site.index] = Slide.of(p.key, p.value)
        prompt = evict.is_prompt(m, p)
        self.selecting.prepare(p, value(m.key.x).device)
        if isinstance(m.key, Concat) and m.site.key.kind == "fresh":
            if prompt:
                self.prompt(m, p, m.attention.node)  # type: ignore[union-attr]
                return
            for c, layout, role in ((m.key, p.key, "keys"), (m.value, p.value, "values")):
                self.encode(c, layout, role, m)  # type: ignore[arg-type]
            return
        a = m.attention
        if a is None:
            for c, layout, role in ((m.key, p.key, "keys"), (m.value, p.value, "values")):
                self.read_back(c, layout, role, m)
            return
        k = self.arena(m.key, p.key, "keys", m, p.keep if prompt else None)
        v = self.arena(m.value, p.value, "values", m, p.keep if prompt else None)
        positions = m.key.positions if isinstance(m.key, Buffer) else None
        with self.graph.inserting_before(a.node):
            if m.alone:
                if m.site.key.kind != "born":
                    self.call(checks.check_first, positions, like=a.node)
                sdpa = torch._C._nn.scaled_dot_product_attention
                new = self.call(sdpa, a.q, m.key.x, m.value.x, like=a.node, fake=value(a.node))
                new.kwargs = {
                    "attn_mask": a.mask,
                    "is_causal": a.causal,
                    "scale": a.scale,
                    "enable_gqa": shape(a.q)[1] != shape(m.key.x)[1],  # type: ignore[index]
                }
                self.rest(m, p, new)
                return
            layouts = p.key.key, p.value.key
            mask, causal = a.mask, a.causal
            self.check(a.q, m.key)
            if p.key.evicts and m.site.key.kind != "born":
                mask, causal = evict.over_slots(self.graph, self.call, m, p, k, positions), False
                if positions is not None:
                    positions = self.call(
                        kvc.slots.default, k, positions, p.key.key, like=a.node, fake=value(positions)
                    )
            args: tuple[Any, ...] = (a.q, k, v, m.key.x, m.value.x, mask, positions, causal, a.scale, *layouts)
            rest = {"cap": a.cap or None, "sinks": a.sinks, "shown": self.shown(m.key)}
            rest = {name: x for name, x in rest.items() if x is not None}
            some = self.selecting.attend(p, a.node, args[:5], a.mask, positions, a.scale, rest)
            if not some and mask is not None and value(a.q).is_cuda:
                if mask not in self.bounds:
                    self.bounds[mask] = self.call(bounds, mask, like=a.node)
                args += (self.bounds[mask],)
            new = some or self.call(kvc.attend.default, *args, like=a.node, fake=value(a.node))
            new.kwargs = rest
        if not (prompt or evict.is_step(m, p)) and isinstance(m.key, Buffer) and isinstance(m.value, Buffer):
            m = replace(m, key=replace(m.key, positions=positions), value=replace(m.value, positions=positions))
        self.rest(m, p, new)

    def shown(self, c: Buffer | Concat) -> Any:
        """How many cached tokens attention sees, if not all: a sliding window's arena holds some more."""
        if isinstance(c, Concat):
            return None if c.kept is None else size_of(c.past, self.placeholders)  # type: ignore[arg-type]
        return None if c.positions is not None else shape(c.node)[2] - 1  # type: ignore[index]

    def check(self, q: Node, key: Buffer | Concat) -> None:
        """Assert on a GPU what an operator there cannot raise. What a mask shows is checked by the kernels."""
        if not isinstance(key, Buffer) or key.positions is None or not value(q).is_cuda:
            return
        one = key.consecutive or shape(key.x)[2] == 1  # type: ignore[index]
        if one or key.positions in self.checked:
            return
        self.checked.add(key.positions)
        self.call(checks.check_positions, key.positions, like=q)

    def placed(self, c: Buffer | Concat) -> Buffer | Concat:
        """A buffer whose positions are a node."""
        if not isinstance(c, Buffer) or not isinstance(c.positions, Span):
            return c
        if c.append not in self.positions:
            x, n = value(c.x), shape(c.x)[2]  # type: ignore[index]
            with x.fake_mode:
                fake = torch.empty(n, dtype=torch.int64, device=x.device)
            with self.graph.inserting_before(c.append):
                size = n
                if not isinstance(n, int):
                    size = self.graph.call_method("size", (c.x, 2))
                    copy_meta(size, c.append, n)
                steps = self.graph.call_function(torch.arange, (size,), {"device": x.device})
                copy_meta(steps, c.append, fake)
                args = operator.add, steps, c.positions.first
                self.positions[c.append] = self.call(*args, like=c.append, fake=fake)
        return replace(c, positions=self.positions[c.append])

    def rest(self, m: Match, p: SitePlan, new: Node) -> None:
        """Put `new` in the attention's place and remember the appends that follow it."""
        a = m.attention
        assert a is not None
        self.replace(a.node, new)
        new.meta[SITE] = m.site.index
        self.dead += [a.node]
        prompt, step = evict.is_prompt(m, p), evict.is_step(m, p)
        for c, layout in ((m.key, p.key), (m.value, p.value)):
            self.last_read[c.node] = new
            if not m.alone:
                self.reads.setdefault(c.node, []).append(new)
            if not (prompt or step):
                self.appends[c.node] = (c, layout, m)
        if prompt:
            self.prompt(m, p, new)
        if step:
            self.steps.append(evict.Prompt(m, p, new))
        self.dead += [*a.inner, *m.paths]

    def prompt(self, m: Match, p: SitePlan, at: Node) -> None:
        """Remember a prompt of which some will go, behind `at`, which stands in its attention's place."""
        assert p.keep is not None
        self.prompts.setdefault(p.keep.group, []).append(evict.Prompt(m, p, at))

    def read_back(self, c: Buffer | Concat, layout: Layout, role: str, m: Match) -> None:
        """Put a temporary with the cache's content in its place, for all that read it."""
        if c.node in self.arenas:
            return
        out, cache = self.out, c.node if isinstance(c, Buffer) else c.past
        assert cache is not None
        tokens = None if kind(c) == "born" else size_of(cache, self.placeholders)
        arena = self.arena(c, layout, role, m)
        if kind(c) == "born":
            reads = []
        else:
            users = [u for u in cache.users if u is not out]
            with self.graph.inserting_before(min(users, key=list(self.graph.nodes).index)):
                dense = plain_value(value(cache))
                last = isinstance(c, Buffer) or c.kept is not None
                t = self.call(kvc.read.default, arena, tokens, layout.key, last, like=c.node, fake=dense)
            for u in users:
                u.replace_input_with(cache, t)
            reads = [t]
        if isinstance(c, Buffer):
            with self.graph.inserting_before(c.append):
                if kind(c) == "static" and c.positions is not None:
                    reads.append(
                        self.call(checks.check_not_round, arena, c.positions, tokens, layout.key, like=c.append)
                    )
            with self.graph.inserting_after(c.append):
                self.call(kvc.append.default, arena, c.x, c.positions, layout.key, reads, like=c.append)
        else:
            self.appends[c.node], self.last_read[c.node], self.reads[c.node] = (c, layout, m), c.node, reads

    def arena(self, c: Buffer | Concat, layout: Layout, role: str, m: Match, keep: Keep | None = None) -> Node:
        if c.node in self.arenas:
            return self.arenas[c.node]
        if isinstance(c, Buffer) and c.born:
            batch, _, tokens, _ = born_sizes(c.node)
            with self.graph.inserting_before(c.append):
                if keep is not None:
                    arena = evict.born(self.graph, self.call, c, layout, keep)
                else:
                    arena = self.call(kvc.empty.default, c.x, batch, tokens, layout.key, like=c.node)
            for i, r in enumerate(self.returned[: self.results]):
                if r is c.node or r is c.append:
                    self.returned[i] = arena
                    self.outputs.append(Output(i, i, layout.key, m.site.layer, role, True, self.number(tokens)))
            self.dead.append(c.node)
        else:
            arena = c.past if isinstance(c, Concat) else c.node  # type: ignore[assignment]
            assert arena is not None
            index = self.placeholders.index(arena)
            start, pushed = None, 0
            if isinstance(c, Buffer) and c.positions is not None:
                start = first_position(c.positions, c.append, self.placeholders, self.writers)
            elif isinstance(c, Buffer):
                pushed = shape(c.x)[2]  # type: ignore[index]
            static, slide = isinstance(c, Buffer), self.slides[m.site.index] if pushed else None
            self.inputs.append(Input(index, layout.key, m.site.layer, role, static, start, pushed, slide))
            if m.attention is not None:
                self.sizes(c.metadata)
            if isinstance(c, Buffer):
                for i, r in enumerate(self.returned[: self.results]):
                    if r is c.node or r is c.append:  # the caller's own tensor
                        self.returned[i] = None
                        self.outputs.append(Output(i, ~index, layout.key, m.site.layer, role, True, 0))
        self.arenas[c.node] = arena
        return arena

    def encode(self, c: Concat, layout: Layout, role: str, m: Match) -> None:
        content = c.returned
        with self.graph.inserting_after(content):
            n = shape(content)[2]  # type: ignore[index]
            tokens: Any = n
            if not isinstance(n, int):
                tokens = self.graph.call_method("size", (content, 2))
                copy_meta(tokens, content, n)
        anchor = tokens if isinstance(tokens, Node) else content
        with self.graph.inserting_after(anchor):
            room: Any = n + SLACK if isinstance(n, int) else self.graph.call_function(operator.add, (tokens, SLACK))
            if isinstance(room, Node):
                copy_meta(room, c.node, n + SLACK)
        with self.graph.inserting_after(room if isinstance(room, Node) else anchor):
            arena = self.call(kvc.encode.default, content, room, layout.key, like=c.node)
        self.encoded(c, arena, tokens, layout, role, m)

    def encoded(self, c: Concat, arena: Node, tokens: Any, layout: Layout, role: str, m: Match) -> None:
        """The outputs that are a cache which was plain until now."""
        content = c.returned
        for i, r in enumerate(self.returned[: self.results]):
            if r is content:
                self.returned[i] = arena
                length = self.number(tokens)
                appended = length if c.kept else None
                slide = self.slides[m.site.index] if c.kept else None
                new = Output(i, i, layout.key, m.site.layer, role, False, length, None, appended, None, slide)
                self.outputs.append(new)

    def number(self, tokens: Any) -> int:
        """A token count as `Output.tokens`: itself, or `~i` for an output that is added for it."""
        if isinstance(tokens, int):
            return tokens
        self.returned.append(tokens)
        return ~(len(self.returned) - 1)

    def sizes(self, metadata: tuple[Node, ...]) -> None:
        """Reads of a handle's sizes become constants or the graph's own symbols."""
        for n in (n for m in metadata for n in read_sizes(m)):
            if n.users:
                self.replace(n, size_value(n, self.placeholders))
            self.graph.erase_node(n)

    # ------------------------------------------------------------ the end of the graph

    def finish(self) -> None:
        behind: dict[Node, Node] = {}  # a last read -> the append that was put there last: keys come before values
        for group in self.prompts.values():
            self.keep(group)
        for x in self.steps:
            k, v = (self.arenas[c.node] for c, _, _ in x.tensors)
            with self.graph.inserting_after(x.at):
                evict.step(self.call, x, k, v, [x.at])
            for c, layout, role in x.tensors:
                self.appended(c, self.arenas[c.node], layout, x.match, role)
        for cache, (c, layout, m) in self.appends.items():
            arena = self.arenas[cache]
            role = "keys" if c is m.key else "values"
            reads = self.reads.get(cache, [])
            last = self.last_read[cache]
            with self.graph.inserting_after(behind.get(last, last)):
                if isinstance(c, Buffer):
                    new = self.call(kvc.append.default, arena, c.x, c.positions, layout.key, reads, like=c.append)
                elif shape(c.x)[2] == 1:  # type: ignore[index]
                    new = self.call(kvc.append.default, arena, c.x, None, layout.key, reads, like=c.node)
                else:
                    new = arena = self.call(kvc.extend.default, arena, c.x, layout.key, like=c.node)
            behind[last] = new
            self.appended(c, arena, layout, m, role)
        self.out.args = (tuple(self.returned),)
        for n in [n for n in self.dead if n.meta.get("kvc_erase")]:
            n.replace_all_uses_with(n.args[0])  # type: ignore[arg-type]
            self.graph.erase_node(n)
        erase_unused(self.graph, [n for n in self.dead if not n._erased])
        for i in self.inputs:
            convert_placeholder(self.placeholders[i.index], i)
        written = [w for n in self.graph.nodes for w in writes(n)]
        for index, p in enumerate(self.placeholders):
            if isinstance(value(p), CacheHandle):
                self.dense.append((index, any(leads_to(w, {p}) for w in written)))
                p.meta["example_value"] = plain_value(value(p))
                p.meta.pop("tensor_dict", None)
                p.meta.pop("grapharg", None)

    def appended(self, c: Buffer | Concat, arena: Node, layout: Layout, m: Match, role: str) -> None:
        """What was the append is dead, and the cache that it returned is the arena."""
        if isinstance(c, Buffer):
            self.dead = [c.append, *self.dead, *c.views]
            for n in (c.append, *c.views):
                n.meta["kvc_erase"] = bool(writes(n))
        else:
            self.grown(c, arena, layout, m, role)
            sizes = [n for u in c.node.users if is_call(u, *SIZES) for n in read_sizes(u)]
            self.dead += [*sizes, c.returned, c.node]

    def keep(self, group: list[evict.Prompt]) -> None:
        """Put what some layers keep of their prompts behind the last of their attentions."""
        order = {n: i for i, n in enumerate(self.graph.nodes)}
        last = max((x.at for x in group), key=order.__getitem__)
        stored: dict[str, list[Node]] = {"keys": [], "values": []}
        reads: list[Node] = []
        with self.graph.inserting_before(last.next):
            for x in group:
                for c, layout, role in x.tensors:
                    found = evict.arena(self.graph, self.call, c, layout, x.keep, self.arenas.get(c.node), last)
                    stored[role].append(found)
                    reads += self.reads.get(c.node, [])
            evict.keep(self.call, group, stored["keys"], stored["values"], list(dict.fromkeys(reads)), last)
            sizes = [evict.tokens_of(self.graph, evict.new_tokens(x.match.key), last) for x in group]
        for i, x in enumerate(group):
            for c, layout, role in x.tensors:
                if isinstance(c, Concat) and kind(c) == "fresh":
                    self.encoded(c, stored[role][i], sizes[i], layout, role, x.match)
                else:
                    self.appended(c, stored[role][i], layout, x.match, role)

    def slid(self, i: int, c: Concat, arena: Node, past: int, layout: Layout, m: Match, role: str) -> None:
        """Output i is a sliding window: the last tokens of an arena that holds some more."""
        appended, kept = shape(c.x)[2], shape(c.returned)[2]  # type: ignore[index]
        with self.graph.inserting_before(self.out):
            n: Any = appended
            if not isinstance(n, int):
                n = self.graph.call_method("size", (c.x, 2))
                copy_meta(n, c.node, appended)
            if not isinstance(kept, int):
                total: Any = self.graph.call_function(operator.add, (size_of(c.past, self.placeholders), n))  # type: ignore[arg-type]
                copy_meta(total, c.node, shape(c.node)[2])  # type: ignore[index]
                size = self.graph.call_function(torch.sym_min, (total, last_tokens(c.returned)))
                copy_meta(size, c.node, kept)
                kept = size
        sizes = self.number(kept), self.number(n)
        self.returned[i] = None if arena is c.past else arena
        place = ~past if arena is c.past else i
        slide = self.slides[m.site.index]
        new = Output(i, place, layout.key, m.site.layer, role, False, sizes[0], None, sizes[1], past, slide)
        self.outputs.append(new)

    def grown(self, c: Concat, arena: Node, layout: Layout, m: Match, role: str) -> None:
        past = self.placeholders.index(c.past)  # type: ignore[arg-type]
        n: Any = shape(c.x)[2]  # type: ignore[index]
        for i, r in enumerate(self.returned[: self.results]):
            if r is not c.returned:
                continue
            if c.kept is not None:
                self.slid(i, c, arena, past, layout, m, role)
                continue
            if arena is c.past:
                self.returned[i] = None
                self.outputs.append(Output(i, ~past, layout.key, m.site.layer, role, False, 1, past))
                continue
            self.returned[i] = arena
            if not isinstance(n, int):
                with self.graph.inserting_before(self.out):
                    n = self.graph.call_method("size", (c.x, 2))
                    copy_meta(n, c.node, shape(c.x)[2])  # type: ignore[index]
            self.outputs.append(Output(i, i, layout.key, m.site.layer, role, False, self.number(n), past))


def first_position(positions: Node, append: Node, placeholders: list[Node], writers: Writers) -> int | None:
    """The index of the placeholder whose first element is, before the graph runs, the first position that `append`
    writes to: `positions`, or the scalar of `arange(n) + scalar`."""
    n: Any = positions
    read = append
    if consecutive(positions):
        n = next(a for a in positions.args if not is_call(a, torch.arange))
        read = positions
    while is_call(n, "to"):
        n = n.args[0]
    if n not in placeholders or not isinstance(value(n), torch.Tensor) or writers.between(placeholders[0], read, n):
        return None
    return placeholders.index(n)


def plain_value(handle: torch.Tensor) -> torch.Tensor:
    """A fake tensor of the same shape that is no handle."""
    if not isinstance(handle, CacheHandle):
        return handle
    with handle.arena.fake_mode:  # type: ignore[attr-defined]
        return torch.empty(handle.shape, dtype=handle.dtype, device=handle.device)


def convert_placeholder(node: Node, i: Input) -> None:
    """The placeholder's value in the lowered graph: the arena."""
    old = value(node)
    layout = Layout.parse(i.layout)
    if isinstance(old, CacheHandle) and not i.pushed:
        arena = old.arena
    else:
        mode = old.arena.fake_mode if isinstance(old, CacheHandle) else old.fake_mode  # type: ignore[attr-defined]
        tokens = int(old.shape[2])
        size = layout.row_bytes(i.slide.room(tokens, i.pushed) if i.slide else tokens)
        with mode:
            arena = torch.empty(old.shape[0], size, dtype=torch.uint8, device=old.device)
    node.meta["example_value"] = arena
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    node.meta.pop("grapharg", None)
