"""Sets of tokens: those that can be seen, the regions of a row, an order, and kept indices.

A row of the batch shows some of its slots (`visible`); left padding hides the first ones. Everything is about the rank
of a token among the visible ones of its row, so a padded row keeps what it would keep alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvc_compile.policy import Regions

BELOW = torch.finfo(torch.float32).min  # below every score, above the -inf of what must not be kept


@dataclass(frozen=True)
class Parts:
    """The visible tokens of each row. rank: int64 [B, T], among the visible ones; length: int64 [B]; visible, sink,
    recent, body: bool [B, T], the last three disjoint and together `visible`; seen: int64 [B], of how many tokens they
    are what is left, and shares are meant."""

    visible: Tensor
    rank: Tensor
    length: Tensor
    sink: Tensor
    recent: Tensor
    body: Tensor
    seen: Tensor

    @property
    def candidates(self) -> Tensor:
        """int64 [B]: how many tokens of each row are in its body."""
        return self.body.sum(-1)


def parts(visible: Tensor, regions: Regions, scope: Tensor | None = None, seen: Tensor | None = None) -> Parts:
    """The regions of each row. visible: bool [B, T]; scope: bool [B, T], tokens outside it are in no body, and recent;
    seen: int64 [B], tokens of each row before any went, None: none did.

    A row no longer than both regions has no body: all of it stays.
    """
    rank, length = visible.long().cumsum(-1) - 1, visible.sum(-1)
    seen = length if seen is None else seen
    first, last = regions.sink.of(seen), regions.recent.of(seen)
    sink = visible & (rank < _column(first))
    recent = visible & ~sink & (rank >= (length - last).unsqueeze(-1))
    if scope is not None:
        recent = recent | (visible & ~sink & ~scope)
    return Parts(visible, rank, length, sink, recent, visible & ~sink & ~recent, seen)


def scope(of: tuple[str, int] | None, visible: Tensor, prompt: Tensor | None = None) -> Tensor | None:
    """The tokens that a rule is about, bool [B, T], None for all. prompt: int64 [B], visible tokens of the prompt.

    Raises ValueError for "prompt" and "generated" without `prompt`.
    """
    if of is None:
        return None
    kind, number = of
    rank, length = visible.long().cumsum(-1) - 1, visible.sum(-1)
    if kind == "tail":
        return visible & (rank >= (length - number).unsqueeze(-1))
    if prompt is None:
        raise ValueError(f"a rule of the {kind} needs the prompt's length")
    inside = rank < prompt.unsqueeze(-1)
    return visible & (inside if kind == "prompt" else ~inside)


def places(priority: Tensor) -> Tensor:
    """int64, the place of each element of the last axis by descending priority; ties go to the earlier one."""
    order = priority.argsort(dim=-1, descending=True, stable=True)
    steps = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, steps)


@dataclass(frozen=True)
class Kept:
    """Slots that stay, in each head. index: int64 [B, H, C], ascending, -1 after the first `count` (a hole);
    count: int64 [B, H]. C is static."""

    index: Tensor
    count: Tensor

    @property
    def holes(self) -> Tensor:
        return self.index < 0

    def gather(self, x: Tensor) -> Tensor:
        """What x [B, H, T, D] holds at the kept slots, [B, H, C, D]; 0 in holes."""
        index = self.index.clamp(min=0).unsqueeze(-1).expand(*self.index.shape, x.shape[-1])
        return x.gather(2, index).masked_fill(self.holes.unsqueeze(-1), 0)

    def mask(self, tokens: int) -> Tensor:
        """bool [B, H, tokens]: whether a slot is kept."""
        spare = self.index.masked_fill(self.holes, tokens)  # holes mark one slot more, which is cut off
        out = spare.new_zeros(*spare.shape[:2], tokens + 1, dtype=torch.bool)
        return out.scatter(-1, spare, True)[..., :tokens]


def compact(mask: Tensor, capacity: int) -> Kept:
    """The slots of a mask, bool [B, H, T], in ascending order; those beyond `capacity` are lost."""
    tokens = mask.shape[-1]
    steps = torch.arange(tokens, device=mask.device)
    index = torch.where(mask, steps, tokens).sort(-1).values[..., :capacity]
    return Kept(index.masked_fill(index == tokens, -1), mask.sum(-1).clamp(max=capacity))


def _column(x: Tensor | int) -> Tensor | int:
    return x if isinstance(x, int) else x.unsqueeze(-1)
