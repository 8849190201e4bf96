"""What a query reads: the best units of an index, as slots; and attention over them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvc_compile.kernels.keep.attention import accumulate_dtype
from kvc_compile.kernels.keep.tokens import Kept, Parts, compact, places
from kvc_compile.policy import Query, Regions

from .index import Sketch


def chosen(spec: Query, scores: Tensor, sketch: Sketch, p: Parts, pinned: Tensor | None = None) -> Tensor:
    """bool [B, H, T]: the regions, and body tokens of the best units. scores: [B, H, U], of `compare`; pinned: bool
    [B, H, U], units that are read besides.

    Tokens of the best units are taken, unit by unit, until the budget: of pages whole ones only, as paged caches read
    them; the last cluster is cut (ClusterKV). A budget of units takes as many.
    """
    valid = sketch.size > 0
    if pinned is not None:
        scores = scores.masked_fill(pinned, -torch.inf)
        valid = valid & ~pinned
    place = places(torch.where(valid, scores, -torch.inf))
    order = place.argsort(-1)
    size = torch.where(valid, sketch.size, 0)
    upto = size.gather(-1, order).cumsum(-1).gather(-1, place)  # tokens of a unit and of all better ones
    none = torch.zeros_like(upto[..., :1])

    def of_slot(x: Tensor) -> Tensor:
        return torch.cat([x, none.to(x.dtype)], -1).gather(-1, sketch.unit)

    if spec.units:
        taken = of_slot(valid & (place < spec.budget.of(0)))
    else:
        budget = spec.budget.of(p.length)
        budget = torch.full_like(p.length, budget) if isinstance(budget, int) else budget
        if spec.unit == "cluster":
            taken = of_slot(valid) & (_within(sketch, of_slot(upto - size), p) < budget[:, None, None])
        else:
            taken = of_slot(valid & (upto <= budget[:, None, None]))
    if pinned is not None:
        taken = taken | of_slot(pinned)
    return (p.visible & ~p.body).unsqueeze(1) | (p.body.unsqueeze(1) & taken)


def select(spec: Query, scores: Tensor, sketch: Sketch, p: Parts, capacity: int, pinned: Tensor | None = None) -> Kept:
    """`chosen` as indices with room for `capacity` slots, see there."""
    return compact(chosen(spec, scores, sketch, p, pinned), capacity)


def capacity(spec: Query, regions: Regions, tokens: int) -> int:
    """Slots that a query never exceeds, for rows of at most `tokens` tokens: static."""
    if spec.units and spec.unit == "cluster":
        return tokens
    read = spec.budget.of(tokens) * (spec.size if spec.units else 1) + spec.pin * spec.size
    if not (spec.budget.monotone and regions.sink.monotone and regions.recent.monotone):
        return tokens
    return max(1, min(tokens, regions.sink.of(tokens) + regions.recent.of(tokens) + read))


def outliers(spec: Query, k: Tensor, sketch: Sketch, p: Parts) -> Tensor:
    """bool [B, H, U]: the `pin` pages with the key least like their landmark (ShadowKV, arXiv:2410.21465)."""
    unit = sketch.unit.clamp(max=sketch.size.shape[-1] - 1)
    landmark = sketch.data[0].gather(2, unit.unsqueeze(-1).expand(-1, -1, -1, k.shape[-1]))
    cosine = F.cosine_similarity(k.to(accumulate_dtype(k)), landmark, dim=-1)
    cosine = torch.where(p.body.unsqueeze(1), cosine, torch.inf)
    least = torch.full(sketch.size.shape, torch.inf, dtype=cosine.dtype, device=k.device)
    least = least.scatter_reduce(-1, unit, cosine, "amin")
    return (places(-least) < spec.pin) & (sketch.size > 0)


def source(layer: int, at: tuple[int, ...]) -> int | None:
    """The layer whose selection this one reads with `reuse: until_next`; None before the first that selects."""
    return max((s for s in at if s <= layer), default=None)


def attention(
    q: Tensor, k: Tensor, v: Tensor, read: Kept, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, Hq, n, D] over the slots `read` of k, v [B, H, T, D]: (o [B, Hq, n, Dv] in the dtype of v, lse
    fp32 [B, Hq, n]). bias: [B, H, T], added to the logits, such as log(count). A query that reads nothing gives 0."""
    acc = accumulate_dtype(k)
    heads = k.shape[1]
    grouped = q.to(acc).unflatten(1, (heads, -1))
    s = torch.einsum("bhgnd,bhcd->bhgnc", grouped, read.gather(k).to(acc)) * scale
    if bias is not None:
        s = s + read.gather(bias.to(acc).unsqueeze(-1)).squeeze(-1)[:, :, None, None]
    s = s.masked_fill(read.holes[:, :, None, None], -torch.inf)
    lse = s.logsumexp(-1)
    weights = torch.exp(s - lse.unsqueeze(-1)).masked_fill(read.holes[:, :, None, None], 0.0)
    o = torch.einsum("bhgnc,bhcd->bhgnd", weights, read.gather(v).to(acc))
    return o.flatten(1, 2).to(v.dtype), lse.flatten(1, 2)


def _within(sketch: Sketch, before: Tensor, p: Parts) -> Tensor:
    """Tokens that come before each slot: those of better units, and earlier ones of its own. [B, H, T]"""
    units = sketch.size.shape[-1]
    order = sketch.unit.argsort(dim=-1, stable=True)
    first = torch.zeros_like(sketch.size).scatter_add(
        -1, sketch.unit.clamp(max=units - 1), (sketch.unit < units).long()
    )
    start = first.cumsum(-1) - first
    steps = torch.arange(sketch.unit.shape[-1], device=order.device).expand_as(order)
    place = torch.empty_like(order).scatter(-1, order, steps)
    return before + place - start.gather(-1, sketch.unit.clamp(max=units - 1))
