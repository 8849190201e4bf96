"""Scores of keys and values alone: no query, no attention. One function each, registered by its name in a spec."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import accumulate_dtype
from .tokens import Parts

KvScore = Callable[[Tensor, Tensor, Parts, int], Tensor]
KV_SCORES: dict[str, KvScore] = {}


def kv_score(name: str) -> Callable[[KvScore], KvScore]:
    """Registers f(k [B, H, T, Dk], v [B, H, T, Dv], parts, number) -> fp32 [B, H, T], the higher the better."""

    def register(f: KvScore) -> KvScore:
        KV_SCORES[name] = f
        return f

    return register


@kv_score("norm")
def norm(k: Tensor, v: Tensor, p: Parts, _: int) -> Tensor:
    """Keys of small norm draw much attention: -|k| (Devoto et al. 2024, arXiv:2406.11430)."""
    return -k.to(accumulate_dtype(k)).norm(dim=-1)


@kv_score("diff")
def diff(k: Tensor, v: Tensor, p: Parts, _: int) -> Tensor:
    """Keys unlike the others: -cos(k, mean of the normalised keys) (KeyDiff, Park et al. 2025, arXiv:2504.15364)."""
    unit = F.normalize(k.to(accumulate_dtype(k)), dim=-1)
    shown = p.visible[:, None, :, None].to(unit.dtype)
    anchor = (unit * shown).sum(2, keepdim=True) / shown.sum(2, keepdim=True).clamp(min=1)
    return -F.cosine_similarity(unit, anchor, dim=-1)


@kv_score("lag")
def lag(k: Tensor, v: Tensor, p: Parts, size: int) -> Tensor:
    """LagKV (Liang et al. 2025, arXiv:2504.04704): the spread over channels of a token, normalised by the range of the
    next `size` tokens.

        x' = (x - min_ref) / (max_ref - min_ref)    softmax over the partition of std over channels of x'
        score = (that of k + that of v) / 2

    Partitions of `size` tokens follow the sinks; the result is the place in the partition, over `size`, so that one
    budget takes the same share of each. What has no whole partition after it has score 1: it comes first.
    """
    batch, heads, tokens, _ = k.shape
    count = tokens // size
    if count < 2:
        return torch.ones(batch, heads, tokens, dtype=accumulate_dtype(k), device=k.device)
    first = p.sink.sum(-1, keepdim=True)
    place = p.rank - first  # of a token after the sinks
    steps = torch.arange(tokens, device=k.device).expand(batch, -1)
    inside = p.visible & (place >= 0)
    # slots of the tokens after the sinks, in order; hidden ones follow, and are in no whole partition
    packed = torch.where(inside, steps, steps + tokens).argsort(dim=-1, stable=True)[:, : count * size]
    score = (_spread(k, packed, count, size) + _spread(v, packed, count, size)) / 2
    within = score.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True).to(score.dtype) / size
    whole = (p.length - first.squeeze(-1)).div(size, rounding_mode="floor")  # partitions of the row
    has_next = torch.arange(count, device=k.device) < (whole - 1).unsqueeze(-1)
    within = torch.where(has_next[:, None, :, None], within, 1.0).flatten(2)
    out = torch.ones(batch, heads, tokens, dtype=within.dtype, device=k.device)
    return out.scatter(-1, packed[:, None].expand(-1, heads, -1), within)


def _spread(x: Tensor, packed: Tensor, count: int, size: int) -> Tensor:
    """[B, H, partitions, size]: softmax of the standard deviation over channels, by the next partition's range."""
    index = packed[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    x = x.to(accumulate_dtype(x)).gather(2, index).unflatten(2, (count, size))
    after = torch.cat([x[:, :, 1:], x[:, :, -1:]], 2)  # the last has none, and is not used
    low, high = after.amin(3, keepdim=True), after.amax(3, keepdim=True)
    # a channel that does not vary there says nothing
    x = torch.where(high > low, (x - low) / torch.where(high > low, high - low, 1.0), 0.0)
    return x.std(-1).softmax(-1)
