"""Tokens that go are merged into tokens that stay: which one each joins, and with what weight.

    x'_j = (w_j x_j + sum_i w_i x_i) / (w_j + sum_i w_i)       over the lost tokens i assigned to the kept token j

for keys and values alike, with the weights of the keys. A merged token keeps its slot, and `count` says for how many it
stands, for a bias of log(count).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvc_compile.policy import Merge

from .attention import accumulate_dtype
from .mixing import Mixer, mix
from .tokens import Kept, Parts

BLOCK = 256


@dataclass(frozen=True)
class Merged:
    """k, v: [B, H, C, D] of the kept slots, 0 in holes, in the dtype of the input; count: fp32 [B, H, C]; lost: int64
    [B, H], tokens that no kept one was like, and that are dropped; threshold: fp32 [B, H], to hand on with `ema`.
    With "single" C is one more than was kept: the last is the token that stands for all others, of count 0 if none.
    With "learned" it is `slots` more, of count 1, and 0 where nothing is in them."""

    k: Tensor
    v: Tensor
    count: Tensor
    lost: Tensor
    threshold: Tensor | None = None


@dataclass(frozen=True)
class Pairing:
    """What assignment looks at. unit: [B, H, T, D], normalised keys; kept: the indices; going: bool [B, H, T];
    scores: [B, H, T]; parts; least: the smallest cosine of neighbours that belong together."""

    unit: Tensor
    kept: Kept
    going: Tensor
    scores: Tensor | None
    parts: Parts
    least: float


Assign = Callable[[Pairing], tuple[Tensor, Tensor]]
Weight = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
ASSIGN: dict[str, Assign] = {}
WEIGHT: dict[str, Weight] = {}


def assign(name: str) -> Callable[[Assign], Assign]:
    """Registers f(pairing) -> (target, cosine), [B, H, T]: the place in `kept` that a token joins, -1 for none."""

    def register(f: Assign) -> Assign:
        ASSIGN[name] = f
        return f

    return register


def weight(name: str) -> Callable[[Weight], Weight]:
    """Registers f(cosine, distance, spread, counts, joined) -> weights [B, H, T] of what goes, [B, H, C] of what stays.

    cosine, distance: of a token's key to its target's; spread: mean distance of what joins that target; counts: tokens
    that a token stands for already, all [B, H, T]; joined: fp32 [B, H, C], tokens that join.
    """

    def register(f: Weight) -> Weight:
        WEIGHT[name] = f
        return f

    return register


def merge(
    spec: Merge,
    p: Parts,
    k: Tensor,
    v: Tensor,
    kept: Kept,
    *,
    scores: Tensor | None = None,
    counts: Tensor | None = None,
    threshold: Tensor | None = None,
    mixer: Mixer | None = None,
) -> Merged:
    """The kept tokens with the others merged into them.

    k, v: [B, H, T, D]; kept: of `retain`; scores: [B, H, T], for "adjacent"; counts: fp32 [B, H, T], tokens that each
    stands for already (1 where absent); threshold: fp32 [B, H], of the pass before, with `ema`; mixer: for "learned".
    Raises ValueError for "adjacent" and "learned" without scores, and "learned" without a mixer.
    """
    acc = accumulate_dtype(k)
    tokens = k.shape[2]
    counts = torch.ones(k.shape[:3], dtype=acc, device=k.device) if counts is None else counts.to(acc)
    going = p.visible.unsqueeze(1) & ~kept.mask(tokens)
    own = kept.gather(counts.unsqueeze(-1)).squeeze(-1)
    if spec.assign == "single":
        return _single(k, v, kept, going, counts, own)
    if spec.assign == "learned":
        if mixer is None or scores is None:
            raise ValueError(f"merging needs the scores, and the trained maps of {spec.file!r}")
        more_k, more_v, held = mix(mixer, k, v, going, scores)
        all_k, all_v = (torch.cat([kept.gather(x), more], 2) for x, more in ((k, more_k), (v, more_v)))
        return Merged(all_k, all_v, torch.cat([own, held.to(acc)], -1), torch.zeros_like(kept.count))
    unit = F.normalize(k.to(acc), dim=-1)
    least = -1.0 if spec.min_cos is None else spec.min_cos
    target, cosine = ASSIGN[spec.assign](Pairing(unit, kept, going, scores, p, least))
    if spec.ema is not None:
        threshold = _running(spec.ema, threshold, cosine, going & (target >= 0))
        joins = going & (target >= 0) & (cosine >= threshold.unsqueeze(-1))
    else:
        joins = going & (target >= 0) & (cosine >= least)
    place = target.clamp(min=0)
    joined = _into(place, joins.to(acc), kept)
    key = kept.gather(k.to(acc))
    centre = key.gather(2, place.unsqueeze(-1).expand(-1, -1, -1, key.shape[-1]))
    distance = (k.to(acc) - centre).norm(dim=-1)
    spread = _into(place, joins * distance, kept) / joined.clamp(min=1)
    w, w_own = WEIGHT[spec.weight](cosine, distance, spread.gather(-1, place), counts, joined)
    if spec.weight == "count":
        w_own = own
    w = torch.where(joins, w, 0.0)
    total = w_own + _into(place, w, kept)
    total = torch.where(total > 0, total, 1.0)

    def mixed(x: Tensor) -> Tensor:
        index = place.unsqueeze(-1).expand(*place.shape, x.shape[-1])
        own_x = kept.gather(x.to(acc)) * w_own.unsqueeze(-1)
        return (own_x.scatter_add(2, index, x.to(acc) * w.unsqueeze(-1)) / total.unsqueeze(-1)).to(x.dtype)

    count = own + _into(place, torch.where(joins, counts, 0.0), kept)
    return Merged(mixed(k), mixed(v), count, (going & ~joins).sum(-1), threshold)


def _into(place: Tensor, x: Tensor, kept: Kept) -> Tensor:
    """The sum of x [B, H, T] over what joins each kept token, [B, H, C]."""
    out = torch.zeros(kept.index.shape, dtype=x.dtype, device=x.device)
    return out.scatter_add(-1, place, x)


def _running(share: float, old: Tensor | None, cosine: Tensor, going: Tensor) -> Tensor:
    """D2O's threshold: share * mean cosine of what goes + (1 - share) * the last one (arXiv:2406.13035)."""
    size = going.sum(-1)
    mean = torch.where(going, cosine, 0.0).sum(-1) / size.clamp(min=1)
    if old is None:
        return mean
    return torch.where(size > 0, share * mean + (1 - share) * old, old)


def _single(k: Tensor, v: Tensor, kept: Kept, going: Tensor, counts: Tensor, own: Tensor) -> Merged:
    """One token for all that go: mean key, mean value and their number (RazorAttention, Tang et al. 2024,
    arXiv:2407.15891)."""
    w = torch.where(going, counts, 0.0)
    total = w.sum(-1, keepdim=True)
    share = (w / total.clamp(min=1)).unsqueeze(-1)

    def more(x: Tensor) -> Tensor:
        mean = (x.to(share.dtype) * share).sum(2, keepdim=True)
        return torch.cat([kept.gather(x), mean.to(x.dtype)], 2)

    return Merged(more(k), more(v), torch.cat([own, total], -1), torch.zeros_like(kept.count))


@assign("nearest")
def nearest(p: Pairing) -> tuple[Tensor, Tensor]:
    """The kept key of the largest cosine (LOOK-M, arXiv:2406.18139; EMS, arXiv:2412.08521)."""
    kept = p.kept.gather(p.unit)
    found = []
    for block in p.unit.split(BLOCK, 2):
        cosine = torch.einsum("bhtd,bhcd->bhtc", block, kept)
        found.append(cosine.masked_fill(p.kept.holes.unsqueeze(2), -torch.inf).max(-1))
    target = torch.cat([f.indices for f in found], -1)
    cosine = torch.cat([f.values for f in found], -1)
    return torch.where(cosine > -torch.inf, target, -1), cosine


@assign("nearest_pos")
def nearest_pos(p: Pairing) -> tuple[Tensor, Tensor]:
    """The kept token that is nearest in the sequence, the earlier of two (Elastic Cache, Liu et al. 2024,
    arXiv:2407.18121)."""
    tokens = p.unit.shape[2]
    steps = torch.arange(tokens, device=p.unit.device).expand(p.going.shape).contiguous()
    slots = p.kept.index.masked_fill(p.kept.holes, 4 * tokens).contiguous()
    after = torch.searchsorted(slots, steps).clamp(max=slots.shape[-1] - 1)
    before = (after - 1).clamp(min=0)
    to_after, to_before = ((slots.gather(-1, x) - steps).abs() for x in (after, before))
    target = torch.where(to_before <= to_after, before, after)
    target = torch.where((p.kept.count > 0).unsqueeze(-1), target, -1)
    return target, _cosine(p, target)


@assign("adjacent")
def adjacent(p: Pairing) -> tuple[Tensor, Tensor]:
    """The best kept token of the same run of neighbours, each like the one before it (KVMerger, Wang et al. 2024,
    arXiv:2407.08454). Tokens of the regions take no
    part. The kept set comes first: a run without a kept token is dropped."""
    if p.scores is None:
        raise ValueError("merging adjacent tokens needs their scores")
    near = F.cosine_similarity(p.unit[:, :, 1:], p.unit[:, :, :-1], dim=-1) > p.least
    body = p.parts.body.unsqueeze(1)  # lies together, so that runs of its tokens do not lead through a region
    run = F.pad((~near).long().cumsum(-1), (1, 0))  # of each slot
    place = p.kept.index.clamp(min=0)
    body_kept = body.expand_as(p.scores).gather(-1, place) & ~p.kept.holes
    score = p.scores.gather(-1, place).masked_fill(~body_kept, -torch.inf)
    order = score.argsort(dim=-1, descending=True, stable=True)
    runs = run.gather(-1, place).gather(-1, order).masked_fill(~body_kept.gather(-1, order), -1)
    # the first of each run, in order of score
    by_run = runs.argsort(dim=-1, stable=True)
    slots, choice = runs.gather(-1, by_run).contiguous(), order.gather(-1, by_run)
    found = torch.searchsorted(slots, run.contiguous()).clamp(max=slots.shape[-1] - 1)
    same = slots.gather(-1, found) == run
    target = torch.where(same & body, choice.gather(-1, found), -1)
    # likeness was asked of neighbours; the pivot may be further off
    return target, torch.where(target >= 0, 1.0, -torch.inf).to(p.unit.dtype)


def _cosine(p: Pairing, target: Tensor) -> Tensor:
    kept = p.kept.gather(p.unit)
    index = target.clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, kept.shape[-1])
    return (p.unit * kept.gather(2, index)).sum(-1)


@weight("mean")
def _mean(cosine: Tensor, distance: Tensor, spread: Tensor, counts: Tensor, joined: Tensor) -> tuple[Tensor, Tensor]:
    """All alike."""
    return torch.ones_like(cosine), torch.ones_like(joined)


@weight("count")
def _count(cosine: Tensor, distance: Tensor, spread: Tensor, counts: Tensor, joined: Tensor) -> tuple[Tensor, Tensor]:
    """By the tokens each stands for, so that merging twice is merging once; the kept ones' own are filled in."""
    return counts, torch.ones_like(joined)


@weight("pivot")
def _pivot(cosine: Tensor, distance: Tensor, spread: Tensor, counts: Tensor, joined: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the kept token and of (token + kept) / 2 for each that joins (LOOK-M's pivotal merging)."""
    return torch.full_like(cosine, 0.5), 1 + joined / 2


@weight("exp_cos")
def _exp_cos(cosine: Tensor, distance: Tensor, spread: Tensor, counts: Tensor, joined: Tensor) -> tuple[Tensor, Tensor]:
    """exp(cosine), and e for the kept token itself (D2O)."""
    return cosine.exp(), torch.full_like(joined, math.e)


@weight("gauss")
def _gauss(cosine: Tensor, distance: Tensor, spread: Tensor, counts: Tensor, joined: Tensor) -> tuple[Tensor, Tensor]:
    """exp(-distance^2 / (2 sigma^2)), sigma the mean distance of the set (KVMerger)."""
    sigma = torch.where(spread > 0, spread, 1.0)
    return torch.exp(-(distance**2) / (2 * sigma**2)), torch.ones_like(joined)
