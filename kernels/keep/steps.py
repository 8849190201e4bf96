"""Eviction while decoding: each new token may push out one of every head, whose slot it takes.

A step works on slots as they lie; where an order of tokens matters, they are sorted by position. Nothing here depends
on the host: the same operations whatever goes, so that a CUDA graph can hold a step. `k`, `v` are views of the arenas
of keys and values (`reference.views`), which hold all slots encoded: a token is in its place from the start.

Of scores that accumulate (H2O), what each slot received so far is the second of its words, as fp32 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvc_compile.kernels import reference
from kvc_compile.kernels.reference import ENCODED, EVICTED, HIDDEN, LENGTH, Views
from kvc_compile.layout import TILE, Layout
from kvc_compile.policy import Policy

from .attention import Columns, over_group
from .budget import counts
from .retention import kept
from .scoring import score
from .slots import SHIFT
from .tokens import parts

TOTAL = 1  # of the words of a slot


@dataclass(frozen=True)
class Slots:
    """The slots of a layer and one more, the new token's. place: int64 [B, H, S], positions, -1 for holes and unused
    ones; shown: bool [B, H, S], those that the newest query sees; total: fp32 [B, H, S], what they received so far."""

    place: Tensor
    shown: Tensor
    total: Tensor


def totals(view: Views) -> Tensor:
    """fp32 [B, H, slots]."""
    assert view.words is not None
    return view.words[:, :, TOTAL].view(torch.float32)


def received(q: Tensor, k: Tensor, sight: Tensor, scale: float, cap: float, sinks: Tensor | None, gqa: str) -> Tensor:
    """What each slot receives from the newest query, fp32 [B, H, S]. q: [B, query heads, 1, D]; k: [B, H, S, D]; sight:
    [B, query heads, 1, S], bool or added."""
    batch, heads, slots, _ = k.shape
    s = torch.matmul(q.float().reshape(batch, heads, -1, q.shape[-1]), k.float().mT) * scale
    if cap:
        s = cap * torch.tanh(s / cap)
    shown = sight.reshape(batch, heads, -1, slots)
    if shown.dtype != torch.bool:
        s, shown = s + shown, shown > HIDDEN
    s = s.masked_fill(~shown, -torch.inf)
    lse = s.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.float().view(1, heads, -1))
    return over_group(torch.where(shown, torch.exp(s - lse.unsqueeze(-1)), 0.0), gqa)


def leaves(policy: Policy, s: Slots, k: Tensor, v: Tensor, seen: Tensor, layer: int, layers: int) -> Tensor:
    """bool [B, H, S]: the slots that do not stay. k, v: [B, H, S, D]; seen: int64 [B], how many tokens a row saw."""
    batch, heads, slots = s.place.shape
    order = s.place.masked_fill(~s.shown, -1).argsort(dim=-1, stable=True)

    def rows(x: Tensor) -> Tensor:  # each head is a row: heads hold different tokens
        at = order if x.dim() == 3 else order.unsqueeze(-1).expand(*order.shape, x.shape[-1])
        return x.gather(2, at).flatten(0, 1).unsqueeze(1)

    visible = rows(s.shown).squeeze(1)
    p = parts(visible, policy.regions, seen=seen.repeat_interleave(heads))
    rule = policy.rule
    one = Columns(rows(s.total).unsqueeze(2), torch.ones_like(s.total[:1, :1, :1]))
    state = tuple(one for _ in rule.score.attention)
    k, v = (rows(x) if rule.score.kv else s.total.new_empty(batch * heads, 1, slots, 1) for x in (k, v))
    ranked = score(rule.score, p, k, v, state)
    number = counts(rule.budget, rule.alloc, p, layers, 1)[layer]
    stays = kept(rule, p, ranked, number).view(batch, heads, slots)
    going = ~stays & visible.view(batch, heads, slots)
    return torch.zeros_like(going).scatter(-1, order, going)


def target(going: Tensor, s: Slots, length: Tensor) -> tuple[Tensor, Tensor]:
    """(the slot of the new token, the slot of the one that goes), int64 [B, H], -1 for none. length: int64 [], slots in
    use. Where several could go, the oldest does.

    The new token takes the slot of the one that goes, or one that nobody sees, or else the next one.
    """
    slots = s.place.shape[-1] - 1
    steps = torch.arange(slots + 1, device=going.device)
    none = torch.iinfo(torch.int64).max
    goes = torch.where(going, s.place, none).argmin(-1).masked_fill(~going.any(-1), -1)
    first = torch.where(~s.shown & (steps < length), steps, none).amin(-1)
    free = torch.minimum(first, length)
    return torch.where(goes == slots, -1, torch.where(goes >= 0, goes, free)), goes


def put(view: Views, layout: Layout, slot: Tensor, x: Tensor) -> None:
    """Store x [B, H, D] at the slots int64 [B, H]; -1: nowhere."""
    own = (slot >= 0).unsqueeze(-1)
    if layout.sink:
        at = slot.clamp(0, layout.sink - 1)[..., None, None].expand(*slot.shape, 1, x.shape[-1])
        there = own & (slot < layout.sink).unsqueeze(-1)
        old = view.sink.gather(2, at)
        view.sink.scatter_(2, at, torch.where(there.unsqueeze(2), x.unsqueeze(2).to(old.dtype), old))
        own = own & ~there
    body = (slot - layout.sink).clamp(min=0)
    codes, params = reference.encode(x.unsqueeze(2), layout)
    if view.params is not None and params is not None:
        at = body[..., None, None, None].expand(*slot.shape, 1, *params.shape[3:])
        old = view.params.gather(2, at)
        view.params.scatter_(2, at, torch.where(own[..., None, None], params, old))
    shift = 0
    for words, bits in zip(view.planes, layout.planes, strict=True):
        if not layout.packed:
            at = body[..., None, None].expand(*slot.shape, 1, x.shape[-1])
            stored, new = words.view(torch.uint8) if words.element_size() == 1 else words, codes
            new = new.view(torch.uint8) if words.element_size() == 1 else new
            stored.scatter_(2, at, torch.where(own.unsqueeze(2), new, stored.gather(2, at)))
            return
        n = layout.codes_per_word(bits)
        row, field = body // (TILE * n) * TILE + body % TILE, body % (TILE * n) // TILE
        rows = words.flatten(2, 3)
        at = row[..., None, None].expand(*slot.shape, 1, x.shape[-1])
        old = rows.gather(2, at)
        place = (field * bits)[..., None, None].to(torch.int32)
        new = (codes.to(torch.int32) >> shift) & (2**bits - 1)
        mixed = (old.to(torch.int32) & ~((2**bits - 1) << place)) | (new << place)
        rows.scatter_(2, at, torch.where(own.unsqueeze(2), mixed.to(old.dtype), old))
        shift += bits


def settle(views: tuple[Views, Views], slot: Tensor, goes: Tensor, s: Slots, position: Tensor, sink: int) -> None:
    """Write headers and words after a step: the new token, at `position`, is in `slot`, and `goes` went. sink: slots
    that are not encoded, of both."""
    words, header = views[0].words, views[0].header
    assert words is not None
    length = header[0, 0, LENGTH].clone()
    after = torch.maximum(length, slot.amax() + 1)
    steps = torch.arange(words.shape[-1], device=words.device)
    shift = words[:, :, SHIFT]
    new = (steps == slot.unsqueeze(-1)).to(torch.int32)
    gone = (steps == goes.unsqueeze(-1)) & (new == 0)
    unused = (steps >= length) & (steps < after) & (new == 0)  # in heads that found room elsewhere
    holes = (gone | unused).to(torch.int32)
    tail = position + 1 - after
    shift.copy_(torch.where(steps >= after, tail.to(torch.int32), shift))
    shift.copy_(torch.where(holes > 0, (-steps - 1).to(torch.int32), shift))
    shift.copy_(torch.where(new > 0, (position - steps).to(torch.int32), shift))
    if words.shape[2] > TOTAL:
        slots = words.shape[-1]
        moved = torch.where(new > 0, s.total[..., -1:], torch.where(holes > 0, 0.0, s.total[..., :slots]))
        words[:, :, TOTAL].copy_(moved.view(torch.int32))
    for view in views:
        view.header[..., LENGTH] = after
        view.header[..., ENCODED] = (after - sink).clamp(min=0)
        view.header[..., EVICTED] = tail
