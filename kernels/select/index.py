"""Indexes: cheap representations of the keys that a query is compared with. One pair of functions each.

    build    the sketch of the stored keys, once for a cache: [B, H, U, R], U units
    compare  a query with the sketch: [B, H, G, U], the higher the better

Units are tokens (U = T), pages of `size` slots, or clusters; `unit` says of which each slot is part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvc_compile.kernels.keep.attention import accumulate_dtype, over_group
from kvc_compile.kernels.keep.tokens import Parts
from kvc_compile.policy import Query


@dataclass(frozen=True)
class Sketch:
    """data: [B, H, U, R], or two of them (minimum and maximum); unit: int64 [B, H, T], of each slot, U where it has
    none; size: int64 [B, H, U], body tokens of each unit; centre: [B, H, 1, D], what was subtracted from the keys;
    map: channels [H, R] or a projection [H, D, R]."""

    data: tuple[Tensor, ...]
    unit: Tensor
    size: Tensor
    centre: Tensor | None = None
    map: Tensor | None = None


@dataclass(frozen=True)
class Kind:
    """logits: whether what is compared are attention logits, which heads can share only as softmax weights."""

    build: Callable[[Query, Tensor, Parts, Tensor | None], Sketch]
    compare: Callable[[Tensor, Sketch], Tensor]
    unit: str
    logits: bool = True


def build(spec: Query, k: Tensor, p: Parts, table: Tensor | None = None) -> Sketch:
    """The sketch of k [B, H, T, D]. table: int64 [H, R], channels, or [H, D, bits], a trained or random projection.

    Raises ValueError where the index needs a table that is not there, or another unit.
    """
    kind = KINDS[spec.index.kind]
    if spec.unit not in ("token", kind.unit):
        raise ValueError(f"the index {spec.index.kind} is of a {kind.unit}, not of a {spec.unit}")
    return kind.build(spec, k.to(accumulate_dtype(k)), p, table)


def compare(spec: Query, q: Tensor, sketch: Sketch, p: Parts, scale: float) -> Tensor:
    """[B, H, U], the units in the order in which q [B, Hq, D] wants them; -inf for those without body tokens.

    Heads of a group agree by `gqa` on softmax weights (ShadowKV, Sun et al. 2024, arXiv:2410.21465) where the index
    gives logits, normalised over the units that compete, and on the numbers themselves where it does not.
    """
    kind = KINDS[spec.index.kind]
    heads = sketch.unit.shape[1]
    return agreed(spec, kind.compare(q.to(accumulate_dtype(q)).unflatten(1, (heads, -1)), sketch), sketch, scale)


def agreed(spec: Query, x: Tensor, sketch: Sketch, scale: float) -> Tensor:
    """`compare`, from what each query head [B, H, G, U] says."""
    kind = KINDS[spec.index.kind]
    valid = (sketch.size > 0).unsqueeze(2)
    x = torch.where(valid, x, -torch.inf)
    if not kind.logits:
        out = over_group(x, spec.gqa)
    elif x.shape[2] == 1:
        out = x.squeeze(2)
    else:  # in logarithms, where small weights stay apart
        x = (x * scale).log_softmax(-1)
        out = x.amax(2) if spec.gqa == "max" else x.logsumexp(2)
    return torch.where(sketch.size > 0, out, -torch.inf)


def random_projection(heads: int, channels: int, bits: int, seed: int = 0) -> Tensor:
    """fp32 [heads, channels, bits], Gaussian: the hash of random hyperplanes."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(heads, channels, bits, generator=g)


def token_units(k: Tensor, p: Parts) -> tuple[Tensor, Tensor]:
    """`Sketch.unit` and `size` of units that are tokens. k: [B, H, T, ..]"""
    batch, heads, tokens = k.shape[:3]
    steps = torch.arange(tokens, device=k.device).expand(batch, heads, -1)
    return steps, p.body.long().unsqueeze(1).expand(-1, heads, -1)


def _centred(spec: Query, k: Tensor, p: Parts) -> tuple[Tensor, Tensor | None]:
    if not spec.index.center:
        return k, None
    shown = p.visible[:, None, :, None].to(k.dtype)
    centre = (k * shown).sum(2, keepdim=True) / shown.sum(2, keepdim=True).clamp(min=1)
    return k - centre, centre


def _exact(spec: Query, k: Tensor, p: Parts, table: Tensor | None) -> Sketch:
    """The keys themselves (TidalDecode, Yang et al. 2024, arXiv:2410.05076)."""
    return Sketch((k,), *token_units(k, p))


def _dot(q: Tensor, s: Sketch) -> Tensor:
    return torch.einsum("bhgd,bhud->bhgu", q, s.data[0])


def _channels(spec: Query, k: Tensor, p: Parts, table: Tensor | None) -> Sketch:
    """The channels of the largest |q k| on calibration texts (Double Sparsity, Yang et al. 2024, arXiv:2408.07092)."""
    if table is None:
        raise ValueError("an index of channels needs their table")
    chosen = table.expand(k.shape[1], -1)[None, :, None].expand(k.shape[0], -1, k.shape[2], -1)
    return Sketch((k.gather(3, chosen),), *token_units(k, p), map=table.expand(k.shape[1], -1))


def _dot_channels(q: Tensor, s: Sketch) -> Tensor:
    assert s.map is not None
    chosen = s.map[None, :, None].expand(*q.shape[:3], -1)
    return torch.einsum("bhgr,bhur->bhgu", q.gather(3, chosen), s.data[0])


def _hash(spec: Query, k: Tensor, p: Parts, table: Tensor | None) -> Sketch:
    """Signs of projections, as -1 and 1 (HATA, Gong et al. 2025, arXiv:2506.02572; random: Charikar 2002)."""
    if table is None:
        table = random_projection(k.shape[1], k.shape[3], spec.index.bits).to(k.device)
    table = table.to(k.dtype).expand(k.shape[1], -1, -1)
    centred, centre = _centred(spec, k, p)
    return Sketch((_signs(torch.einsum("bhtd,hdr->bhtr", centred, table)),), *token_units(k, p), centre, table)


def _signs(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def _matches(q: Tensor, s: Sketch) -> Tensor:
    """bits - popcount(code of q xor code of k)."""
    assert s.map is not None
    code = _signs(torch.einsum("bhgd,hdr->bhgr", q, s.map))
    return (torch.einsum("bhgr,bhur->bhgu", code, s.data[0]) + code.shape[-1]) / 2


def _pages(spec: Query, k: Tensor, p: Parts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and body mask by pages of `size` slots, [B, H, U, size, ..], the unit of each slot and tokens per unit."""
    batch, heads, tokens = k.shape[:3]
    more = -tokens % spec.size
    body = F.pad(p.body, (0, more)).unflatten(1, (-1, spec.size))[:, None].expand(-1, heads, -1, -1)
    paged = F.pad(k, (0, 0, 0, more)).unflatten(2, (-1, spec.size))
    unit = torch.arange(tokens, device=k.device).div(spec.size, rounding_mode="floor").expand(batch, heads, -1)
    return paged, body, unit, body.sum(-1)


def _mean(spec: Query, k: Tensor, p: Parts, table: Tensor | None) -> Sketch:
    """The mean key of a page, its landmark (ShadowKV)."""
    paged, body, unit, size = _pages(spec, k, p)
    total = torch.where(body.unsqueeze(-1), paged, 0.0).sum(3)
    return Sketch((total / size.clamp(min=1).unsqueeze(-1),), unit, size)


def _minmax(spec: Query, k: Tensor, p: Parts, table: Tensor | None) -> Sketch:
    """The least and the largest value of each channel of a page (Quest, Tang et al. 2024, arXiv:2406.10774)."""
    paged, body, unit, size = _pages(spec, k, p)
    inside, some = body.unsqueeze(-1), (size > 0).unsqueeze(-1)
    low = torch.where(inside, paged, torch.inf).amin(3)
    high = torch.where(inside, paged, -torch.inf).amax(3)
    return Sketch((torch.where(some, low, 0.0), torch.where(some, high, 0.0)), unit, size)


def _bound(q: Tensor, s: Sketch) -> Tensor:
    """The largest logit that a page could have: sum over channels of max(q low, q high)."""
    low, high = s.data
    up, down = q.clamp(min=0), q.clamp(max=0)
    return torch.einsum("bhgd,bhud->bhgu", up, high) + torch.einsum("bhgd,bhud->bhgu", down, low)


def _kmeans(spec: Query, k: Tensor, p: Parts, table: Tensor | None) -> Sketch:
    """Spherical k-means of the body with a fixed number of iterations, from evenly spaced tokens (ClusterKV, Liu et al.
    2024, arXiv:2412.03213; the start is a choice). Centroids are means of keys, compared by cosine."""
    assert spec.clusters is not None
    batch, heads, tokens, channels = k.shape
    number = max(1, min(tokens, spec.clusters.of(tokens)))
    wanted = spec.clusters.of(p.length)
    wanted = torch.full_like(p.length, wanted) if isinstance(wanted, int) else wanted
    wanted = torch.minimum(wanted.clamp(min=1, max=number), p.candidates)
    steps = torch.arange(number, device=k.device)
    order = torch.where(p.body, 0, 1).argsort(dim=-1, stable=True)  # slots of the body, then the others
    start = (steps * p.candidates.unsqueeze(-1)).div(wanted.clamp(min=1).unsqueeze(-1), rounding_mode="floor")
    first = order.gather(-1, start.clamp(max=tokens - 1))
    centroid = k.gather(2, first[:, None, :, None].expand(-1, heads, -1, channels))
    used = (steps < wanted.unsqueeze(-1))[:, None, None]
    unit = F.normalize(k, dim=-1)
    body = p.body.unsqueeze(1).expand(-1, heads, -1)

    def nearest() -> Tensor:
        cosine = torch.einsum("bhtd,bhud->bhtu", unit, F.normalize(centroid, dim=-1))
        found = cosine.masked_fill(~used, -torch.inf).argmax(-1)
        return torch.where(body, found, number)

    def per_cluster(x: Tensor) -> Tensor:
        out = x.new_zeros(batch, heads, number + 1, x.shape[-1])
        return out.scatter_add(2, member.unsqueeze(-1).expand_as(x), x)[:, :, :number]

    member = nearest()
    for _ in range(spec.index.iters):
        size = per_cluster(torch.ones_like(k[..., :1]))
        centroid = torch.where(size > 0, per_cluster(k) / size.clamp(min=1), centroid)
        member = nearest()
    return Sketch((centroid,), member, per_cluster(torch.ones_like(k[..., :1])).squeeze(-1).long())


KINDS = {
    "exact": Kind(_exact, _dot, "token"),
    "channels": Kind(_channels, _dot_channels, "token"),
    "hash": Kind(_hash, _matches, "token", logits=False),
    "mean": Kind(_mean, _dot, "chunk"),
    "minmax": Kind(_minmax, _bound, "chunk"),
    "kmeans": Kind(_kmeans, _dot, "cluster"),
}
