"""Recognition: which attentions read a cache that may change its representation.

The rules of legality, all of them here. An attention is a site if
 1. keys and values each lead, through proved views only, to a cache tensor with one append (`caches`);
 2. K and V pair up: same kind, same positions, same number of tokens, KV heads and head repetition;
 3. query heads are KV heads x repetition, in the order of `repeat_kv`, or there is one KV head;
 4. every use of the cache tensor is its append, a view that ends in an attention, a size, or the graph's output;
    each use that reads comes after the append;
 5. the mask is a tensor over all positions of the cache, or absent where the cache has no empty positions; attention
    over a sliding window is attention over what the caller saw of it before, or all that of but the oldest token, and
    over the new tokens;
    attention over a buffer's first n tokens, n as many as are appended, is attention over the new tokens alone: then
    the positions must start at 0, which a new buffer proves and the graph otherwise asserts;
 6. nothing between the append and the attention writes to what is appended;
 7. gradients are off.
Everything else is `Declined` with the reason, or `Uncached` where no cache is behind it, or, where the cache is only
read, kept compressed and read back for the graph as it is (`readback`).
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, GraphModule, Node

from kvc_compile.passes.alias import Writers, leads_to, name
from kvc_compile.passes.attention import Attention, NotAttention, find_attention
from kvc_compile.passes.caches import (
    SIZES,
    Buffer,
    Concat,
    Decline,
    Span,
    check_window,
    kind,
    read_sizes,
    size_of,
    size_value,
)
from kvc_compile.passes.fx import (
    is_call,
    module_layer,
    order,
    output,
    same,
    shape,
    source,
    tensor_dtype,
    value,
    where,
)
from kvc_compile.passes.operands import trace_operand
from kvc_compile.passes.readback import NoCache, Readers, after_softmax
from kvc_compile.passes.views import Peeled
from kvc_compile.passes.windows import last_tokens
from kvc_compile.sites import CacheTensor, Declined, Site, Uncached


@dataclass(frozen=True)
class Match:
    """A site with the nodes that the rewrite needs; `site` is the record of it. attention: None if it is read back."""

    site: Site
    attention: Attention | None
    key: Buffer | Concat
    value: Buffer | Concat
    paths: tuple[Node, ...] = ()  # the views between the cache tensors and the attention
    alone: bool = False  # attention sees the new tokens only


def recognise(gm: GraphModule) -> list[Match | Declined]:
    """Every attention of a Dynamo graph, in order: matched or declined."""
    found = find_attention(gm.graph)
    inner = {n for a in found if isinstance(a, Attention) for n in (a.node, *a.inner)}
    matches: list[Match | Declined] = []
    writers = Writers(gm.graph)
    for index, a in enumerate(found):
        if isinstance(a, NotAttention):
            matches.append(Declined(index, a.node.name, a.reason, where(a.node)))
            continue
        try:
            m = match(index, a, writers)
            movable(m, writers)
            matches.append(m)
        except Decline as e:
            matches.append(Declined(index, a.node.name, str(e), where(a.node)))
    matches = check_uses(gm.graph, matches, inner)
    taken = {c.node for m in matches if isinstance(m, Match) for c in (m.key, m.value)}
    ends = {e for a in found for e in (after_softmax(a.node) if isinstance(a, NotAttention) else [a.node])}
    readers = Readers(gm.graph, taken, ends, writers)
    matches = [m if isinstance(m, Match) else read_back(m, readers) for m in matches]
    return matches + unread(readers, matches)


def unread(readers: Readers, matches: list[Match | Declined]) -> list[Match | Declined]:
    """Caches that are appended to here while their attention is in another graph: not compressed, and said so."""
    known = {c.node for m in matches if isinstance(m, Match) for c in (m.key, m.value)} | readers.visited
    found: list[Match | Declined] = []
    for n in readers.graph.nodes:
        c = None if n in known else readers.cache(n)
        if c is not None and (isinstance(c, Buffer) or c.past is not None):
            what = source(c.node if isinstance(c, Buffer) else c.past) or n.name  # type: ignore[arg-type]
            reason = f"{what} is appended to in a graph that does not hold its attention (a graph break between them?)"
            found.append(Declined(len(matches) + len(found), n.name, reason, where(n)))
    return found


def read_back(d: Declined, readers: Readers) -> Match | Declined:
    """The caches of an attention that is no site, compressed all the same; else the same reason as before."""
    node = readers.nodes[d.node]
    try:
        pair = readers.pair(node)
    except NoCache as e:
        return Uncached(d.index, d.node, str(e), d.where)
    except Decline as e:
        return replace(d, reason=f"{d.reason}; its cache cannot be read back either: {e}")
    site = Site(
        index=d.index,
        layer=layer_of(d.index, node, pair.key),
        node=d.node,
        pattern="read back",
        query_heads=0,
        scale=0.0,
        mask="",
        key=record(pair.key),
        value=record(pair.value),
        where=d.where,
        note=d.reason,
    )
    return Match(site, None, pair.key, pair.value)


def match(index: int, a: Attention, writers: Writers) -> Match:
    kp, key = trace_operand(a.k, a.pattern == "softmax", writers)
    vp, val = trace_operand(a.v, False, writers)
    pair(a, kp, key, vp, val)
    if kp.window is not None and (a.cap or a.sinks is not None):
        raise Decline("capped scores or sinks in attention over a cache's first tokens")
    layer = layer_of(index, a.node, key)
    site = Site(
        index=index,
        layer=layer,
        node=a.node.name,
        pattern=a.pattern,
        query_heads=int(shape(a.q)[1]),  # type: ignore[index]
        scale=a.scale,
        mask=a.mask.name if a.mask is not None else "causal" if a.causal else "none",
        key=record(key),
        value=record(val),
        where=where(a.node),
        cap=a.cap,
        sinks=a.sinks.name if a.sinks is not None else "",
        queries=fixed(shape(a.q)[2]),  # type: ignore[index]
        window=key.positions is None if isinstance(key, Buffer) else key.kept is not None,
        slots=fixed(shape(key.node)[2]) if isinstance(key, Buffer) else 0,  # type: ignore[index]
    )
    return Match(site, a, key, val, (*kp.path, *vp.path), kp.window is not None)


def pair(a: Attention, kp: Peeled, key: Buffer | Concat, vp: Peeled, val: Buffer | Concat) -> None:
    """Rules 2, 3 and 5."""
    if type(key) is not type(val) or key.node is val.node:
        raise Decline("keys and values are not two caches of the same kind")
    ks, vs, qs = shape(key.node), shape(val.node), shape(a.q)
    kx, vx = shape(key.x), shape(val.x)
    if ks is None or vs is None or qs is None or kx is None or vx is None:
        raise Decline("a shape is not known")
    if not all(isinstance(n, int) for n in (ks[1], ks[3], vs[1], vs[3], qs[1])):
        raise Decline("the number of heads or channels is not fixed")
    if not (same(ks[0], vs[0]) and ks[1] == vs[1] and same(kx[2], vx[2])):
        raise Decline(f"keys {tuple(ks)} and values {tuple(vs)} do not pair up")
    if not (same(qs[0], ks[0]) and same(qs[2], kx[2]) and qs[3] == ks[3]):
        raise Decline(f"queries {tuple(qs)} do not belong to the {tuple(kx)} keys that are appended")
    if kp.groups != vp.groups:
        raise Decline("keys and values are repeated for different numbers of query heads")
    repeated = ks[1] * kp.groups
    for_all = ks[1] == 1 or (a.broadcast_heads and qs[1] % ks[1] == 0)  # one head of keys serves all by broadcasting
    if qs[1] != repeated and not (for_all and kp.groups == 1):
        raise Decline(f"{qs[1]} query heads on {ks[1]} key heads repeated {kp.groups} times")
    dtypes = {value(n).dtype for n in (a.q, key.node, val.node, a.node)}
    if len(dtypes) > 1:
        raise Decline(f"queries, keys, values and output of different dtypes: {sorted(map(str, dtypes))}")
    if any(n is not None and leads_to(n, {key.node, val.node}) for n in (a.q, a.mask, a.sinks)):
        raise Decline("the queries, the mask or the sinks are a view of the cache")
    if ks[3] % 4 or vs[3] % 4:
        raise Decline(f"head dimensions {ks[3]} and {vs[3]}: a multiple of 4 is needed")
    if isinstance(key, Buffer) and isinstance(val, Buffer):
        if key.positions is not val.positions and not (
            isinstance(key.positions, Span) and key.positions == val.positions
        ):
            raise Decline("keys and values are appended at different positions")
        if key.born != val.born:
            raise Decline("keys and values are not two caches of the same kind")
        if (kp.window is None) != (vp.window is None):
            raise Decline("keys and values are cut to different numbers of tokens")
        if key.positions is None and (kp.window is not None or a.causal):
            raise Decline("attention over a part of a window, or as if it began with the first token")
        if kp.window is not None:
            if not (same(size(kp.window), kx[2]) and same(size(vp.window), kx[2])):
                raise Decline(f"attention reads the first {kp.window} tokens of a cache to which {kx[2]} are appended")
            ks = (*ks[:2], kx[2], ks[3])
        elif key.positions is None:
            ks = (*ks[:2], ks[2] - 1 + kx[2], ks[3])
        elif a.mask is None:
            raise Decline("no mask over a static cache: attention reads its empty positions too")
        elif a.causal:
            raise Decline("is_causal and a mask")
    elif kp.window is not None or vp.window is not None:
        raise Decline("attention reads the first tokens of a growing cache only")
    if isinstance(key, Concat) and isinstance(val, Concat):
        if kind(key) != kind(val) or (key.past is None) != (val.past is None):
            raise Decline("keys and values are not two caches of the same kind")
        if (key.kept and last_tokens(key.kept)) != (val.kept and last_tokens(val.kept)):
            raise Decline("keys and values slide by different windows")
        if a.causal and key.past is not None:
            raise Decline("is_causal over a cache with history counts from the first key, not from the last")
    if a.mask is not None:
        ms = shape(a.mask)
        if ms is None or len(ms) > 4 or (same(ms[-1], 1) and not same(ks[2], 1)):
            raise Decline(f"a mask {ms} that does not cover the {ks[2]} positions of the cache one by one")
        m = value(a.mask)
        if not (m.dtype.is_floating_point or m.dtype == torch.bool):
            raise Decline(f"a mask of {m.dtype}")
        if len(ms) == 4 and not (same(ms[1], 1) or same(ms[1], qs[1])):
            raise Decline(f"a mask {tuple(ms)} for {qs[1]} query heads")
        if len(ms) == 3 and not same(ms[0], 1):
            raise Decline(f"a mask {tuple(ms)} of three dimensions")
        # a size that is not 1 is the attention's own, or tracing it would have failed


def fixed(size: object) -> int:
    """A size that is a number, else 0."""
    return size if isinstance(size, int) else 0


def size(x: object) -> object:
    """A size given as a number or as a node."""
    return value(x) if isinstance(x, Node) else x


def layer_of(index: int, attention: Node, key: Buffer | Concat) -> int:
    """The layer: from the cache's own name where it has one, else from the module, else the order of attention."""
    placeholder = key.past if isinstance(key, Concat) else key.node
    if placeholder is not None and placeholder.op == "placeholder":
        numbers = re.findall(r"layers(?:\[|'\]\._modules\[')(\d+)", source(placeholder))
        if numbers:
            return int(numbers[-1])
    found = module_layer(attention)
    return index if found is None else found


def record(c: Buffer | Concat) -> CacheTensor:
    s = shape(c.node)
    assert s is not None
    if isinstance(c, Buffer):
        buffer, append, src = c.node.name, c.append.name, source(c.node)
    else:
        buffer, append, src = c.node.name, c.node.name, source(c.past) if c.past is not None else ""
    fixed = isinstance(c, Buffer) and isinstance(s[2], int)
    slides = c.positions is None if isinstance(c, Buffer) else c.kept is not None
    return CacheTensor(
        kind(c), buffer, src, append, int(s[1]), int(s[3]), tensor_dtype(value(c.node).dtype),
        int(s[2]) if fixed else None, slides,
    )  # fmt: skip


def check_uses(graph: Graph, matches: list[Match | Declined], inner: set[Node]) -> list[Match | Declined]:
    """Rule 4, over the whole graph: a cache tensor has no use that was not accounted for."""
    position, out = order(graph), output(graph)
    changed = True
    while changed:  # declining one reader of a cache declines the others
        changed = False
        known = {m.attention.node for m in matches if isinstance(m, Match) and m.attention}
        spans: dict[Node, set[Node]] = {}
        for m in matches:
            if isinstance(m, Match) and m.attention:
                for c in (m.key, m.value):
                    spans.setdefault(c.node, set()).update(m.paths, m.attention.inner, [m.attention.node])
        for i, m in enumerate(matches):
            if isinstance(m, Declined):
                continue
            try:
                for c in (m.key, m.value):
                    check_cache(c, spans[c.node], position, out, known)
            except Decline as e:
                matches[i] = Declined(m.site.index, m.site.node, str(e), m.site.where)
                changed = True
    return matches


def check_cache(c: Buffer | Concat, span: set[Node], position: dict[Node, int], out: Node, known: set[Node]) -> None:
    what = source(c.node) or c.node.name
    allowed = span | set(c.metadata) | {out}
    roots = [c.node]
    if isinstance(c, Buffer):
        allowed.update((c.append, *c.views))
        if c.append.op == "call_method":  # index_copy_ returns the buffer
            roots.append(c.append)
        if c.positions is None:
            roots += c.views
    elif c.kept is not None:
        allowed.add(c.kept)
        roots.append(c.kept)
    for root in roots:
        for user in root.users:
            if isinstance(c, Concat) and is_call(user, *SIZES):
                if c.past is None:  # the concatenation itself stays in the graph
                    continue
                if all(u in span or u in sizes for sizes in [read_sizes(user)] for n in sizes for u in n.users):
                    continue  # it only says how large a view of the cache is
            if user not in allowed:
                raise Decline(f"{what} is also used by `{getattr(user.target, '__name__', user.target)}`")
            if isinstance(c, Buffer) and user in span and position[user] < position[c.append]:
                raise Decline(f"{what} is read before the new tokens are written to it")
    for view in span - known:
        if any(u not in span and u is not out for u in view.users) and view not in known:
            user = next(u for u in view.users if u not in span and u is not out)
            raise Decline(f"a view of {what} is also used by `{getattr(user.target, '__name__', user.target)}`")
        if out in view.users:
            raise Decline(f"a view of {what} is returned")
    if isinstance(c, Concat) and c.past is not None:
        check_window(c)
        if c.kept is not None:
            size_of(c.past, list(out.graph.find_nodes(op="placeholder")))
        for user in c.past.users:
            if user is not c.node and user not in c.metadata:
                name = getattr(user.target, "__name__", user.target)
                raise Decline(f"{source(c.past)} is also used by `{name}`")
            if user in c.metadata and user.users and is_call(user, "stride", "is_contiguous"):
                raise Decline(f"the strides of {source(c.past)} are used")
    if not (isinstance(c, Buffer) and c.born):
        placeholders = list(out.graph.find_nodes(op="placeholder"))
        for n in (n for m in c.metadata for n in read_sizes(m)):
            left = [u for u in n.users if not (isinstance(value(n), torch.Size) and is_call(u, operator.getitem))]
            if left:
                size_value(n, placeholders)
    if isinstance(c, Concat) and out not in c.returned.users:
        raise Decline(f"{what} is not returned to the caller, so nothing keeps it")


def movable(m: Match, writers: Writers) -> None:
    """Rule 6: the appends may move behind the attention, since nothing in between writes what they read."""
    if m.attention is None:
        return
    ours = [c.append if isinstance(c, Buffer) else c.node for c in (m.key, m.value)]
    read = [m.key.x, m.value.x, *(c.positions for c in (m.key, m.value) if isinstance(c, Buffer))]
    written = next((w for a in ours if (w := writers.between(a, m.attention.node, *read, but=ours))), None)
    if written is not None:
        raise Decline(f"`{name(written)}` writes to what is appended, between the append and the attention")
    a = m.attention
    written = writers.between(min((*a.inner, a.node)), a.node, a.q, a.mask, a.sinks)
    if written is not None:
        raise Decline(f"`{name(written)}` writes to the queries, the mask or the sinks within the attention")


def without_gradients(found: list[Match | Declined], example_inputs: list) -> list[Match | Declined]:
    """Rule 7: a compressed cache has no gradient."""
    if not torch.is_grad_enabled() or not any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs):
        return found
    reason = "gradients are enabled: run the model under torch.no_grad()"
    return [m if isinstance(m, Declined) else Declined(m.site.index, m.site.node, reason, m.site.where) for m in found]
