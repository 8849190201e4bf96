"""How many body tokens each head of each layer keeps: the budget, and how layers and heads share it.

All functions give int64 counts [L, B, H]; those that look at scores take them for all layers, [L, B, H, T]. What heads
and layers hold together is the uniform budget or less, but for the rounding of tables. A row whose budget covers its
body keeps all of it, in every layer and head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvc_compile.policy import Alloc, Budget

from .tokens import Parts, places


@dataclass(frozen=True)
class Share:
    """What an alloc divides. base: int64 [B], the uniform budget of a head; layers, heads: how many; scores:
    [L, B, H, T], -inf outside the body, None where an alloc does not look at them; table: [L, H], shares from a
    file."""

    base: Tensor
    layers: int
    heads: int
    scores: Tensor | None = None
    table: Tensor | None = None

    def same(self, count: Tensor) -> Tensor:
        """int64 [L, B] for each head."""
        return count.unsqueeze(-1).expand(-1, -1, self.heads)

    def need(self) -> Tensor:
        if self.scores is None:
            raise ValueError("this alloc needs the scores of all layers")
        return self.scores


Allot = Callable[[Alloc, Share], Tensor]
ALLOCS: dict[str, Allot] = {}
STATISTICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}


def alloc(name: str) -> Callable[[Allot], Allot]:
    """Registers f(alloc, share) -> int64 [L, B, H]."""

    def register(f: Allot) -> Allot:
        ALLOCS[name] = f
        return f

    return register


def counts(
    budget: Budget,
    how: Alloc,
    p: Parts,
    layers: int,
    heads: int,
    scores: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """int64 [L, B, H], body tokens that each head keeps. scores: [L, B, H, T]; table: [L, H].

    Raises ValueError where an alloc needs scores or a table that are not there.
    """
    size = p.candidates
    if scores is not None:
        scores = torch.where(p.body[None, :, None], scores, -torch.inf)
    if budget.mass is not None:
        if scores is None:
            raise ValueError("a budget of attention mass needs the scores")
        found = _holding(scores, budget.mass)
        cap = size if budget.tokens is None else budget.tokens.of(p.seen)
        found = torch.minimum(found, _rows(cap, size)[:, None])
    elif budget.tokens is None:
        found = size[None, :, None].expand(layers, -1, heads)
    else:
        base = _rows(budget.tokens.of(p.seen), size)
        found = ALLOCS[how.kind](how, Share(base, layers, heads, scores, table))
        found = torch.where((base >= size)[:, None], size[:, None], found)
    return torch.minimum(found, size[:, None])


def _rows(x: Tensor | int, like: Tensor) -> Tensor:
    return torch.full_like(like, x) if isinstance(x, int) else x


def _holding(scores: Tensor, mass: float) -> Tensor:
    """The fewest tokens that hold `mass` of a head's score (ZipVL, He et al. 2024, arXiv:2410.08584)."""
    return (_before(scores) < mass).sum(-1)


def _before(scores: Tensor) -> Tensor:
    """The share of the score that better tokens hold, by place, [.., T]: ascending, inf beyond the body."""
    ordered = scores.sort(-1, descending=True).values
    s = ordered.clamp(min=0)
    total = s.sum(-1, keepdim=True)
    before = (s.cumsum(-1) - s) / torch.where(total > 0, total, 1.0)
    return before.masked_fill(ordered == -torch.inf, torch.inf)


@alloc("uniform")
def uniform(how: Alloc, s: Share) -> Tensor:
    """The same for every layer and head."""
    return s.base[None, :, None].expand(s.layers, -1, s.heads)


@alloc("pyramid")
def pyramid(how: Alloc, s: Share) -> Tensor:
    """Linear over layers, the first `ratio` times the last (PyramidKV, Cai et al. 2024, arXiv:2406.02069, whose beta is
    (ratio + 1) / 2)."""
    steps = torch.arange(s.layers + 1, dtype=torch.float64, device=s.base.device)
    if s.layers == 1:
        return uniform(how, s)
    slope = (how.ratio - 1) / (s.layers - 1)
    upto = steps * how.ratio - slope * steps * (steps - 1) / 2  # of the first layers
    # whole tokens of the first l layers together, so that no token of the sum is lost
    edge = (s.base * s.layers)[None] * (upto / upto[-1])[:, None]
    return s.same((edge + 1e-6).floor().long().diff(dim=0))


@alloc("table")
def by_table(how: Alloc, s: Share) -> Tensor:
    """base - base / beta for every head, and of the rest what the table says (HeadKV, Fu et al. 2024,
    arXiv:2410.19258): base (1 - 1/beta) + round(share (base / beta) L H), the shares of all heads adding up to 1."""
    if s.table is None:
        raise ValueError("this alloc needs its table of shares")
    share = (s.table / s.table.sum()).to(torch.float64).expand(s.layers, s.heads)
    pool = s.base.to(torch.float64) / how.beta
    more = share[:, None] * pool[None, :, None] * (s.layers * s.heads)
    return (s.base - pool.floor().long())[None, :, None] + more.round().long()


@alloc("waterfill")
def waterfill(how: Alloc, s: Share) -> Tensor:
    """One threshold over the heads of a layer (AdaKV, Feng et al. 2024, arXiv:2407.11550), over layers whose heads keep
    equally many (DynamicKV, Zhou et al. 2024, arXiv:2412.14838), or over all heads of the model (KVzip,
    arXiv:2505.23416): the best tokens of all together stay. Every head keeps its own best `floor`, and at most
    `cap`."""
    scores = s.need()
    floor = _rows(how.floor.of(s.base), s.base)
    place = places(scores)
    safe = place < floor[None, :, None, None]
    ranked = torch.where(safe & (scores > -torch.inf), torch.inf, scores)
    if how.cap is not None:
        most = _rows(how.cap.of(s.base), s.base)
        ranked = torch.where(place < most[None, :, None, None], ranked, -torch.inf)
    if how.scope == "head":
        hit = places(ranked.flatten(2)) < (s.base * s.heads)[None, :, None]
        return (hit.unflatten(2, ranked.shape[2:]) & (ranked > -torch.inf)).sum(-1)
    together = ranked.movedim(0, 1).flatten(1)
    hit = places(together) < (s.base * s.heads * s.layers)[:, None]
    hit = hit.unflatten(1, (s.layers, s.heads, -1)).movedim(1, 0) & (ranked > -torch.inf)
    if how.scope == "model":
        return hit.sum(-1)
    return s.same(hit.sum((-1, -2)) // s.heads)


@alloc("mass")
def mass(how: Alloc, s: Share) -> Tensor:
    """One share p of the head-mean score for all layers, each keeping its fewest tokens that hold it, such that all
    together keep the budget (PrefixKV, Wang et al. 2024, arXiv:2412.03409).

    A token stays if better ones of its layer hold less than p: so the tokens with the least such share stay, and no
    search for p is needed.
    """
    held = s.need().masked_fill(s.need() == -torch.inf, 0.0)
    inside = (s.need() > -torch.inf).any(2)
    before = _before(torch.where(inside, held.mean(2), -torch.inf))
    hit = places(-before.movedim(0, 1).flatten(1)) < (s.base * s.layers)[:, None]
    hit = hit.unflatten(1, (s.layers, -1)).movedim(1, 0) & (before < torch.inf)
    return s.same(hit.sum(-1))


@alloc("softmax")
def softmax(how: Alloc, s: Share) -> Tensor:
    """base L softmax(statistic) over layers (D2O, Wan et al. 2024, arXiv:2406.13035)."""
    if how.statistic not in STATISTICS:
        raise ValueError(f"no statistic {how.statistic!r}: one of {', '.join(STATISTICS)}")
    scores = s.need()
    share = STATISTICS[how.statistic](scores, scores > -torch.inf).softmax(0)
    return s.same((s.base * s.layers * share.to(torch.float64) + 1e-6).floor().long())


def _attn_variance(scores: Tensor, inside: Tensor) -> Tensor:
    """[L, B]: minus the variance over tokens of the head-mean score, so that flat layers keep more (D2O)."""
    held = torch.where(inside, scores, 0.0).mean(2)
    inside = inside.any(2)
    size = inside.sum(-1, keepdim=True).clamp(min=1)
    centred = torch.where(inside, held - held.sum(-1, keepdim=True) / size, 0.0)
    return -(centred * centred).sum(-1) / size.squeeze(-1)


STATISTICS["attn_variance"] = _attn_variance
