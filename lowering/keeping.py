"""The operators of caches that evict (`policy.Policy`): what stays of a prompt, and steps over the slots that are left.

    kvc::keep     tokens of a prompt appended in place, and the cache reduced to what its policy keeps
    kvc::step     one token appended in place, which may push out another
    kvc::slots    the slots that positions are
    kvc::sight    a mask over positions as one over slots
    kvc::widen    a copy of an arena with more room

`keep` scores with the attention of the prompt's own queries, from the exact new tokens and the stored older ones, at
the end of the call; what it keeps is encoded once, and older tokens anew. It asks the device how many tokens are held,
so it is no part of a CUDA graph. Where nothing goes, it appends and no more: the codes are those of a cache without it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvc_compile.kernels import reference
from kvc_compile.kernels.keep import steps
from kvc_compile.kernels.keep.attention import Attention
from kvc_compile.kernels.keep.rule import Outcome, Past, apply
from kvc_compile.kernels.keep.slots import SHIFT, first_slot, positions_of, seen
from kvc_compile.kernels.keep.slots import positions as slot_positions
from kvc_compile.kernels.keep.slots import sight as slot_sight
from kvc_compile.kernels.reference import EVICTED, HIDDEN, LENGTH
from kvc_compile.layout import Layout
from kvc_compile.lowering import cpu, ops
from kvc_compile.policy import Policy

log = logging.getLogger("kvc_compile")
NOT_AT_END = (
    "a token is written before the end of a compressed cache that has evicted tokens: append at its end, or empty it "
    "first (cache.reset())"
)
UNSAFE = (torch._C.Tag.cudagraph_unsafe,) if hasattr(torch._C.Tag, "cudagraph_unsafe") else ()


@ops.operator()
def slots(k_data: Tensor, positions: Tensor, layout: str) -> Tensor:
    """The slots of the positions int64 [n], consecutive and at the cache's end (or 0, where it begins anew)."""
    view = reference.views(k_data, Layout.parse(layout))
    check_end(view, positions[0], anew=positions.shape[0] > 1)  # what follows is `keep`, which empties it
    return positions + (first_slot(view, positions[0])[0] - positions[0])


def check_end(view: reference.Views, start: Tensor, anew: bool) -> None:
    """Raise, on a GPU at some later time, where a token is not appended at the end of a cache that has evicted some:
    its slots say nothing of what was there before. anew: it may begin anew, at position 0."""
    length, evicted = view.header[0, 0, LENGTH], view.header[0, 0, EVICTED]
    fine = (evicted == 0) | (start == length + evicted)
    torch._assert_async(fine | (start == 0) if anew else fine, NOT_AT_END)


@ops.shapes(slots)
def _(k_data, positions, layout):
    return torch.empty_like(positions)


@ops.operator()
def sight(
    k_data: Tensor, mask: Tensor | None, positions: Tensor | None, n: int, query_heads: int, causal: bool, layout: str
) -> Tensor:
    """`kernels.keep.slots.sight` of a mask of up to four dimensions, for n tokens about to be appended."""
    view = reference.views(k_data, Layout.parse(layout))
    start = None if positions is None else positions[0]
    return slot_sight(view, whole_mask(mask, n), start, n, query_heads, causal)


@ops.shapes(sight)
def _(k_data, mask, positions, n, query_heads, causal, layout):
    width = Layout.parse(layout).room_of(k_data.shape[1]) + n
    dtype = torch.bool if mask is None else mask.dtype
    return k_data.new_empty((k_data.shape[0], query_heads, n, width), dtype=dtype)


def whole_mask(mask: Tensor | None, n: int) -> Tensor | None:
    """A mask as attention may have it, [b, h, n, W]."""
    if mask is None:
        return None
    return mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape)).expand(-1, -1, n, -1)


@ops.operator()
def widen(data: Tensor, tokens: int, layout: str) -> Tensor:
    """A copy of the arena with room for `tokens` tokens more."""
    parsed = Layout.parse(layout)
    return cpu.resize(data, ops.extended_bytes(data.shape[1], tokens, parsed), parsed)


@ops.shapes(widen)
def _(data, tokens, layout):
    return data.new_empty((data.shape[0], ops.extended_bytes(data.shape[1], tokens, Layout.parse(layout))))


def keep(
    k_data: Sequence[Tensor],
    v_data: Sequence[Tensor],
    q: Sequence[Tensor],
    k_new: Sequence[Tensor],
    v_new: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    sinks: Sequence[Tensor | None],
    at: Sequence[Tensor | None],
    causal: Sequence[bool],
    scales: Sequence[float],
    caps: Sequence[float],
    k_layouts: str,
    v_layouts: str,
    first: int,
    total: int,
    policy: str,
    after: Sequence[Tensor],
) -> None:
    """Append k_new, v_new [B, H, m, D] to the caches of the layers `first` .. of `total`, and keep what `policy` says.

    q: [B, query heads, n, D], the queries of the newest n tokens; at: the positions of the new tokens, int64 [m];
    causal: a query sees no later token, where there is no mask;
    k_layouts, v_layouts: one key for each layer, with spaces between; after: as of `kvc::append`.
    """
    k_parsed, v_parsed = ([*map(Layout.parse, keys.split())] for keys in (k_layouts, v_layouts))
    turns = []
    for i, positions in enumerate(at):
        mask, start = whole_mask(masks[i], q[i].shape[2]), None if positions is None else int(positions[0])
        sees = mask, sinks[i], causal[i], scales[i], caps[i]
        turns.append(Turn(q[i], k_data[i], v_data[i], k_new[i], v_new[i], *sees, k_parsed[i], v_parsed[i], start))
    keep_turns(turns, (first, total), Policy.parse(policy))


keep = ops.operator(mutates=("k_data", "v_data"), tags=UNSAFE)(keep)


@ops.shapes(keep)
def _(k_data, v_data, q, k_new, v_new, masks, sinks, at, causal, scales, caps, k_layouts, v_layouts, first, total,
      policy, after):  # fmt: skip
    return None


@ops.operator(mutates=("k_data", "v_data"))
def step(
    k_data: Tensor,
    v_data: Tensor,
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    at: Tensor | None,
    scale: float,
    cap: float,
    k_layout: str,
    v_layout: str,
    layer: int,
    layers: int,
    policy: str,
    after: Sequence[Tensor],
) -> None:
    """Append one token, k_new, v_new [B, H, 1, D], in the place of one that `policy` gives up for it, if it does; see
    `keep` for the rest. It asks the device nothing."""
    p, k_parsed, v_parsed = Policy.parse(policy), Layout.parse(k_layout), Layout.parse(v_layout)
    k_view, v_view = reference.views(k_data, k_parsed), reference.views(v_data, v_parsed)
    start = None if at is None else at[0]
    assert k_view.words is not None
    if start is not None:
        check_end(k_view, start, anew=True)
        for part in (k_view.header, v_view.header, k_view.words):
            part.mul_((start != 0).to(part.dtype))
    length, position = first_slot(k_view, start)
    room = k_parsed.room_of(k_data.shape[1])
    batch, heads = k_new.shape[:2]
    mask = whole_mask(mask, 1)
    place = torch.cat([slot_positions(k_view, start, 0), position.expand(batch, heads, 1)], -1)
    sight = seen(place, mask, position + 1, 1, q.shape[1], False)
    shown = (sight if sight.dtype == torch.bool else sight > HIDDEN).unflatten(1, (heads, -1)).any(2).squeeze(2)
    k = torch.cat([ops.values(k_data, room, k_parsed), k_new], 2)
    v = torch.cat([ops.values(v_data, room, v_parsed), v_new], 2)
    total = torch.zeros(place.shape, dtype=torch.float32, device=q.device)
    for s in p.rule.score.attention:
        total = steps.received(q, k, sight, scale, cap, sinks, s.gqa)
        if p.accumulates:
            old = torch.nn.functional.pad(steps.totals(k_view), (0, 1))
            total = torch.maximum(total, old) if s.reduce == "max" else total + old
    slots_ = steps.Slots(place, shown, total)
    going = steps.leaves(p, slots_, k, v, seen_by(mask, position + 1, batch, q.device), layer, layers)
    slot, goes = steps.target(going, slots_, length)
    steps.put(k_view, k_parsed, slot, k_new.squeeze(2))
    steps.put(v_view, v_parsed, slot, v_new.squeeze(2))
    steps.settle((k_view, v_view), slot, goes, slots_, position, k_parsed.sink)


@ops.shapes(step)
def _(k_data, v_data, q, k_new, v_new, mask, sinks, at, scale, cap, k_layout, v_layout, layer, layers, policy, after):
    return None


@dataclass(frozen=True)
class Turn:
    """One layer's part in a prompt; see `keep`. start: the position of the first new token, None: the cache's end."""

    q: Tensor
    k_data: Tensor
    v_data: Tensor
    k_new: Tensor
    v_new: Tensor
    mask: Tensor | None
    sinks: Tensor | None
    causal: bool
    scale: float
    cap: float
    k_layout: Layout
    v_layout: Layout
    start: int | None


@dataclass(frozen=True)
class Content:
    """A layer's cache with the prompt: k, v [B, H, T, D] in the model's dtype; place: int64 [B, H, T], the position of
    each slot, -1 for holes; slot, end: the first new token's slot, and the position after the last one's."""

    k: Tensor
    v: Tensor
    place: Tensor
    slot: int
    end: int


def keep_turns(turns: Sequence[Turn], place: tuple[int, int], policy: Policy) -> None:
    """`keep` on what it is called with, one `Turn` a layer."""
    contents = [arrive(t) for t in turns]
    layers = [attention_of(t, c, policy) for t, c in zip(turns, contents, strict=True)]
    if any(not torch.equal(a.visible, layers[0].visible) for a in layers):
        say("kvc: layers that share what stays hold, or see, different tokens: all of this prompt stays")
        for t in turns:
            append(t)
        return
    values, holes = [c.v for c in contents], [c.place < 0 for c in contents]
    received = [before(t, c) for t, c in zip(turns, contents, strict=True)] if policy.accumulates else None
    seen = seen_by(turns[0].mask, contents[0].end, layers[0].visible.shape[0], layers[0].k.device)
    past = Past(seen, holes, received)
    outcomes = apply(policy.rule, policy.regions, layers, values, past=past, place=place)
    for i, o in enumerate(outcomes):
        settle(turns[i], contents[i], o, layers[i].visible.unsqueeze(1) & ~holes[i])


@functools.cache
def say(text: str) -> None:
    """A warning, once."""
    log.warning(text)


def arrive(t: Turn) -> Content:
    """What is stored of a layer, and the new tokens. A start at 0 empties the cache; one before its end forgets what
    was there."""
    start_at(t.k_data, t.k_layout, t.start)
    start_at(t.v_data, t.v_layout, t.start)
    view = reference.views(t.k_data, t.k_layout)
    slot, evicted = reference.lengths(view)[0], int(view.header[0, 0, EVICTED])
    m = t.k_new.shape[2]
    k, v, place = t.k_new, t.v_new, positions_of(view, slot, m)
    if slot:
        k = torch.cat([ops.values(t.k_data, slot, t.k_layout), k], 2)
        v = torch.cat([ops.values(t.v_data, slot, t.v_layout), v], 2)
    return Content(k, v, place, slot, slot + evicted + m)


def before(t: Turn, c: Content) -> Tensor:
    """What each slot received before this prompt, fp32 [B, H, T]."""
    found = steps.totals(reference.views(t.k_data, t.k_layout))[..., : c.slot]
    return torch.nn.functional.pad(found, (0, c.k.shape[2] - c.slot))


def seen_by(mask: Tensor | None, end: Tensor | int, batch: int, device: torch.device) -> Tensor:
    """How many of the positions before `end` the newest query of each row sees, int64 [B]."""
    if mask is None:
        return torch.zeros(batch, dtype=torch.int64, device=device) + end
    newest = mask[:, :, -1]
    shown = (newest if newest.dtype == torch.bool else newest > HIDDEN).any(1)
    inside = torch.arange(mask.shape[-1], device=device) < end
    return (shown & inside).sum(-1).expand(batch)


def start_at(data: Tensor, layout: Layout, start: int | None) -> None:
    """Make the arena end before position `start`. Raises ValueError where it cannot."""
    view = reference.views(data, layout)
    length, evicted = reference.lengths(view)[0], int(view.header[0, 0, EVICTED])
    if start is None or start == length + evicted:
        return
    if start == 0:
        view.header.zero_()
        if view.words is not None:
            view.words.zero_()
        return
    slot = start - evicted  # of which those before must hold what was appended before `start`, and no others
    if slot > length:
        raise ValueError(f"tokens are appended at position {start} of a compressed cache that holds {length + evicted}")
    place = None if view.words is None else positions_of(view, length, 0)
    if slot < 0 or (place is not None and bool((place[..., :slot] >= start).any() | (place[..., slot:] < start).any())):
        raise ValueError(
            f"tokens are appended at position {start} of a cache that has evicted tokens from there on: begin anew, at "
            "position 0"
        )
    reference.rewind(data, layout, slot)


def attention_of(t: Turn, c: Content, policy: Policy) -> Attention:
    """The prompt's attention, for scores: of the queries that may vote."""
    n, tokens = t.q.shape[2], c.k.shape[2]
    older = c.slot > 0
    newest = sees(t, c, t.q[:, :, -1:], older)
    hidden = c.place < 0
    visible = ~hidden.all(1)
    if newest is not None:
        shown = newest if newest.dtype == torch.bool else newest > HIDDEN
        visible = visible & shown.any(1).squeeze(1)
    q, last = t.q, policy.rule.score.votes(tokens)
    if last < n and bool(visible[:, -last:].all()):
        q = q[:, :, -last:]
    mask = sees(t, c, q, older)
    causal = t.causal and t.mask is None and not older
    return Attention(q, c.k, None, visible, t.scale, mask, cap=t.cap or None, causal=causal, sinks=t.sinks, whole=False)


def sees(t: Turn, c: Content, q: Tensor, older: bool) -> Tensor | None:
    """A mask [b, h, Q, T] over slots for the newest queries q, None where all are seen but for causality."""
    n = q.shape[2]
    mask = None if t.mask is None else t.mask[:, :, t.mask.shape[2] - n :]
    if older:
        return seen(c.place, mask, c.end, n, q.shape[1], t.causal)
    return mask if mask is None else mask[..., : c.k.shape[2]].expand(c.k.shape[0], -1, -1, -1)


def append(t: Turn) -> None:
    ops.store(t.k_data, t.k_new, None, t.k_layout)
    ops.store(t.v_data, t.v_new, None, t.v_layout)


def settle(t: Turn, c: Content, o: Outcome, there: Tensor) -> None:
    """Store what stays of the slots `there`, bool [B, H, T], that the newest query sees."""
    if o.merged is None and bool((o.kept.count >= there.sum(-1)).all()):
        append(t)
        if o.total is not None:
            steps.totals(reference.views(t.k_data, t.k_layout))[..., : c.k.shape[2]] = o.total
        return
    slots = int(o.kept.count.max())
    index, holes = o.kept.index[..., :slots], o.kept.holes[..., :slots]
    place = c.place.gather(-1, index.clamp(min=0)).masked_fill(holes, -1)
    filled = torch.where(holes, (o.kept.count - 1).clamp(min=0).unsqueeze(-1), torch.arange(slots, device=index.device))
    keys, values = (o.merged.k, o.merged.v) if o.merged else (o.kept.gather(c.k), o.kept.gather(c.v))
    for data, layout, x in ((t.k_data, t.k_layout, keys), (t.v_data, t.v_layout, values)):
        # a hole holds what the slot before it does: it must not widen the range of a block
        stays = x.gather(2, filled.unsqueeze(-1).expand(*filled.shape, x.shape[-1]))
        refill(data, layout, stays, place, c.end)
    if o.total is not None:
        total = o.total.gather(-1, index.clamp(min=0)).masked_fill(holes, 0)
        steps.totals(reference.views(t.k_data, t.k_layout))[..., :slots] = total


def refill(data: Tensor, layout: Layout, x: Tensor, place: Tensor, end: int) -> None:
    """Make the arena hold x [B, H, S, D], tokens of the positions place [B, H, S] of the `end` that were appended."""
    slots = x.shape[2]
    view = reference.views(data, layout)
    view.header.zero_()
    ops.store(data, x, None, layout)
    view.header[..., EVICTED] = end - slots
    if view.words is not None:
        shift = view.words[:, :, SHIFT]
        shift[..., slots:] = end - slots
        shift[..., :slots] = place - torch.arange(slots, device=place.device)
