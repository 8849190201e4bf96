"""What is dropped is folded into a state of constant size, which queries read as one more region of attention.

LESS (Dong et al. 2024, arXiv:2402.09398), per KV head, over the folded tokens i:

    H = sum psi(k_i)^T v_i     z = sum psi(k_i)       o = phi(q) H / phi(q) z     lse = log(phi(q) z)
    phi(q) = |g(g(q Q1) Q2)|   psi(k) = |u + (u M) s2|, u = |s1| g(g(k K1) K2)    g = gelu

The maps are trained for one model, layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import accumulate_dtype


@dataclass(frozen=True)
class FeatureMaps:
    """Of a layer. q1: [Hq, D, hidden]; q2: [Hq, hidden, R]; k1: [H, D, hidden]; k2: [H, hidden, R]; mix: [H, R, R];
    s1, s2: [H, R]."""

    q1: Tensor
    q2: Tensor
    k1: Tensor
    k2: Tensor
    mix: Tensor
    s1: Tensor
    s2: Tensor


@dataclass(frozen=True)
class State:
    """h: fp32 [B, H, R, Dv]; z: fp32 [B, H, R]."""

    h: Tensor
    z: Tensor


def empty(maps: FeatureMaps, batch: int, v: Tensor) -> State:
    """The state of `batch` sequences before anything is folded; v: any tensor [.., Dv] of the values' kind."""
    heads, rank = maps.s1.shape
    acc = accumulate_dtype(v)
    zero = torch.zeros(batch, heads, rank, dtype=acc, device=v.device)
    return State(torch.zeros(batch, heads, rank, v.shape[-1], dtype=acc, device=v.device), zero)


def of_keys(maps: FeatureMaps, k: Tensor) -> Tensor:
    """psi of k [B, H, T, D], [B, H, T, R]."""
    acc = accumulate_dtype(k)
    k1, k2, mix, s1, s2 = (x.to(acc) for x in (maps.k1, maps.k2, maps.mix, maps.s1, maps.s2))
    u = F.gelu(F.gelu(k.to(acc) @ k1) @ k2) * s1.abs()[:, None]
    return (u + (u @ mix) * s2[:, None]).abs()


def of_queries(maps: FeatureMaps, q: Tensor) -> Tensor:
    """phi of q [B, Hq, n, D], [B, Hq, n, R]."""
    acc = accumulate_dtype(q)
    return F.gelu(F.gelu(q.to(acc) @ maps.q1.to(acc)) @ maps.q2.to(acc)).abs()


def fold(maps: FeatureMaps, state: State, k: Tensor, v: Tensor, going: Tensor) -> State:
    """The state with the tokens `going`, bool [B, H, T], of k, v [B, H, T, D] added."""
    psi = of_keys(maps, k) * going.unsqueeze(-1)
    v = torch.where(going.unsqueeze(-1), v, 0.0)  # what is not there may be anything
    return State(state.h + psi.transpose(-1, -2) @ v.to(psi.dtype), state.z + psi.sum(2))


def read(maps: FeatureMaps, state: State, q: Tensor) -> tuple[Tensor, Tensor]:
    """What q [B, Hq, n, D] reads: (o fp32 [B, Hq, n, Dv], lse fp32 [B, Hq, n]). An empty state gives 0 and -inf."""
    groups = q.shape[1] // state.z.shape[1]
    phi = of_queries(maps, q)
    h, z = (x.repeat_interleave(groups, 1) for x in (state.h, state.z))
    total = (phi @ z.unsqueeze(-1)).squeeze(-1)
    o = (phi @ h) / torch.where(total > 0, total, 1.0).unsqueeze(-1)
    return o, total.log()


def joined(regions: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over several regions from what each gave, (o [.., n, Dv], lse [.., n]): weights are exp(lse). A query
    that no region has anything for gives 0 and -inf."""
    lse = torch.stack([x for _, x in regions]).logsumexp(0)
    some = lse > -torch.inf
    shares = (torch.where(some, torch.exp(x - lse), 0.0).unsqueeze(-1) for _, x in regions)
    return torch.stack([o * share for (o, _), share in zip(regions, shares, strict=True)]).sum(0), lse
