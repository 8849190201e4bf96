"""Which tokens stay: a rule, its scores and the count of each head give kept indices."""

from __future__ import annotations

import torch
from torch import Tensor

from kvc_compile.policy import Diverse, Rule

from .tokens import Kept, Parts, compact, places


def kept(rule: Rule, p: Parts, scores: Tensor, count: Tensor) -> Tensor:
    """bool [B, H, T]: the regions, and of the body `count`, int64 [B, H], tokens of each head by `scores`, [B, H, T].

    The `newest` tokens of the rule come first, all of them; of chunks, the best that fit stay whole.
    """
    body = p.body.unsqueeze(1)
    ranked = torch.where(body, scores, -torch.inf)
    if rule.newest:
        newest = body & (p.rank >= (p.length - rule.newest).unsqueeze(-1)).unsqueeze(1)
        ranked = torch.where(newest, torch.inf, ranked)
        count = torch.maximum(count, newest.sum(-1))
    if rule.merge is not None and rule.merge.assign == "single":
        # the merged token takes one place, unless nothing is left to merge
        count = torch.where(count < p.candidates.unsqueeze(-1), (count - 1).clamp(min=0), count)
    if rule.chunk > 1:
        chosen = _chunks(rule, p, ranked, count)
    elif rule.diverse is not None:
        chosen = _varied(rule.diverse, p, ranked, count)
    else:
        chosen = places(ranked) < count.unsqueeze(-1)
    return (p.visible & ~p.body).unsqueeze(1) | (body & chosen)


def retain(rule: Rule, p: Parts, scores: Tensor, count: Tensor, capacity: int) -> Kept:
    """`kept` as indices with room for `capacity` slots, see there."""
    return compact(kept(rule, p, scores, count), capacity)


def others(mask: Tensor, visible: Tensor) -> Kept:
    """What does not stay, as indices: the second set of `demote`. mask: bool [B, H, T], of `kept`."""
    return compact(visible.unsqueeze(1) & ~mask, mask.shape[-1])


def leader(layer: int, reuse: int) -> int:
    """The layer whose indices this one uses, where groups of `reuse` layers keep the same tokens."""
    return layer // reuse * reuse


def _chunks(rule: Rule, p: Parts, ranked: Tensor, count: Tensor) -> Tensor:
    """Whole chunks of the body, the best first, until the next does not fit (WindowKV, Zuo et al. 2025,
    arXiv:2503.17922). The last chunk may be short. bool [B, H, T]."""
    batch, heads, tokens = ranked.shape
    number = -(-tokens // rule.chunk)
    place = (p.body.long().cumsum(-1) - 1).clamp(min=0)
    chunk = (place // rule.chunk).unsqueeze(1).expand(-1, heads, -1)
    inside = p.body.unsqueeze(1).expand_as(ranked)
    size = torch.zeros(batch, heads, number, dtype=torch.long, device=ranked.device)
    size = size.scatter_add(-1, chunk, inside.long())
    if rule.reduce == "max":
        total = torch.full(size.shape, -torch.inf, dtype=ranked.dtype, device=ranked.device)
        total = total.scatter_reduce(-1, chunk, ranked, "amax")
    else:
        total = torch.zeros(size.shape, dtype=ranked.dtype, device=ranked.device)
        total = total.scatter_add(-1, chunk, torch.where(inside, ranked, 0.0))
        if rule.reduce == "mean":
            total = total / size.clamp(min=1)
    order = torch.where(size > 0, total, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    fits = size.gather(-1, order).cumsum(-1) <= count.unsqueeze(-1)
    return torch.zeros_like(fits).scatter(-1, order, fits).gather(-1, chunk)


def _varied(spec: Diverse, p: Parts, ranked: Tensor, count: Tensor) -> Tensor:
    """A share of the count for one token of each group of the others (KVCrush, Jha et al. 2025, arXiv:2503.00022).

    The code of a token has a bit for each head: whether it scores above the head's mean. Those that the score does not
    keep are ordered by the Hamming distance of their code to the anchor 0101.., cut into groups of equal size, and the
    best of each group stays. bool [B, H, T]. Anchor, groups and representative are choices: the paper leaves them open.
    """
    heads, tokens = ranked.shape[1:]
    body = p.body.unsqueeze(1)
    groups = spec.share.of(count)
    groups = torch.full_like(count, groups) if isinstance(groups, int) else groups
    important = places(ranked) < (count - groups).unsqueeze(-1)
    mean = torch.where(body, ranked, 0.0).sum(-1, keepdim=True) / p.candidates[:, None, None].clamp(min=1)
    anchor = (torch.arange(heads, device=ranked.device) % 2).bool()[:, None]
    distance = ((ranked > mean) ^ anchor).sum(1, keepdim=True)
    rest = body & ~important
    place = places(torch.where(rest, -distance, -heads - 1))
    size = rest.sum(-1, keepdim=True)
    group = torch.where(rest, place * groups.unsqueeze(-1) // size.clamp(min=1), tokens).clamp(max=tokens)
    # the best of a group: first by score, and then by group, in stable order
    by_score = torch.where(rest, ranked, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    by_group = by_score.gather(-1, group.gather(-1, by_score).argsort(dim=-1, stable=True))
    ordered = group.gather(-1, by_group)
    first = torch.cat([torch.ones_like(ordered[..., :1], dtype=torch.bool), ordered[..., 1:] != ordered[..., :-1]], -1)
    best = torch.zeros_like(important).scatter(-1, by_group, first)
    return important | (best & rest & (group < groups.unsqueeze(-1)))
