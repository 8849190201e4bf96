"""Slots of a cache that evicts: which position each holds, and what of a mask over positions a query sees of them.

Everything here is in static shapes and without host synchronisation. `view` is `reference.views` of the keys' arena.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvc_compile.kernels.reference import EVICTED, LENGTH, Views

SHIFT = 0  # of the words of a slot: position - slot


def first_slot(view: Views, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """(slot, position), int64 [], of the next token: the end of the cache, or `start`, the position that it gets. At
    position 0 the cache begins anew."""
    length, evicted = view.header[0, 0, LENGTH], view.header[0, 0, EVICTED]
    if start is None:
        return length, length + evicted
    return torch.where(start == 0, 0, start - evicted), start


def positions_of(view: Views, length: int, n: int) -> Tensor:
    """The positions of the `length` slots that are held and of n more, int64 [B, H, length + n]; -1 for holes."""
    return positions(view, None, n)[..., : length + n]


def positions(view: Views, start: Tensor | None, n: int) -> Tensor:
    """The position of each slot once n tokens were appended from `start` on, int64 [B, H, slots + n]; -1 for holes and
    for slots that hold nothing."""
    assert view.words is not None
    slot, position = first_slot(view, start)
    shift = view.words[:, :, SHIFT].long()
    steps = torch.arange(shift.shape[2] + n, device=shift.device)
    place = steps + torch.nn.functional.pad(shift, (0, n))
    place = torch.where(steps >= slot, steps + (position - slot), place)
    return place.masked_fill(steps >= slot + n, -1)


def sight(
    view: Views, mask: Tensor | None, start: Tensor | None, n: int, query_heads: int, causal: bool = False
) -> Tensor:
    """A mask [b, h, n, W] over positions (bool, or added; None: all are seen) as one over slots, [B, query heads, n,
    slots + n], for attention with n tokens about to be appended. causal: queries see nothing after themselves."""
    place = positions(view, start, n)
    newest = first_slot(view, start)[1] + n
    return seen(place, mask, newest, n, query_heads, causal)


def seen(place: Tensor, mask: Tensor | None, end: Tensor | int, n: int, query_heads: int, causal: bool) -> Tensor:
    """`sight` for slots at the positions place, int64 [B, H, S], and the queries of the n positions before `end`."""
    batch, heads, slots = place.shape
    groups = query_heads // heads
    held = (place >= 0).unsqueeze(2)
    if causal:
        of_query = end - n + torch.arange(n, device=place.device)
        held = held & (place.unsqueeze(2) <= of_query.unsqueeze(-1))
    if mask is None:
        return held.expand(batch, heads, n, slots).repeat_interleave(groups, 1)
    width = mask.shape[-1]
    held = (held & (place < width).unsqueeze(2)).expand(batch, heads, n, slots).repeat_interleave(groups, 1)
    index = place.clamp(0, width - 1).unsqueeze(2).expand(batch, heads, n, slots)
    if mask.shape[1] == 1:
        shown = mask.expand(batch, heads, n, width).gather(-1, index).repeat_interleave(groups, 1)
    else:
        shown = mask.expand(batch, query_heads, n, width).gather(-1, index.repeat_interleave(groups, 1))
    if mask.dtype == torch.bool:
        return shown & held
    return shown.masked_fill(~held, torch.finfo(mask.dtype).min)
