"""Attention that tokens receive, column by column: one pass over the voting queries, given their log-sum-exp.

    p[q, t] = exp(s[q, t] - lse[q])     s = scale q k^T, capped if asked, -inf where t is hidden from q

At most `block` rows of p exist at a time. Formulas: H2O (arXiv:2306.14048) and SnapKV (arXiv:2404.14469) sum,
Scissorhands (arXiv:2305.17118) counts what is below a threshold, KVzip (arXiv:2505.23416) takes the maximum, ZipCache
(arXiv:2405.14256) divides by the queries that see a token, Keyformer (arXiv:2403.09054) adds Gumbel noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvc_compile.kernels.reference import HIDDEN
from kvc_compile.policy import AttentionScore

from .probes import Rows

BLOCK = 64


@dataclass(frozen=True)
class Columns:
    """What each token received from the queries so far. total: fp32 [B, H, G, T], G query heads of a KV head; seen:
    fp32 [B, 1, 1, T], voting queries that could see the token. Also the state that decoding carries along."""

    total: Tensor
    seen: Tensor


@dataclass(frozen=True)
class Attention:
    """The attention that runs anyway. q: [B, Hq, Q, D], queries of the newest Q slots; k: [B, H, T, D]; lse: [B, Hq,
    Q], natural logarithm, sinks and masks included, None: it is computed here; visible: bool [B, T].

    mask: bool, broadcast to [B, Hq, Q, T], which further slots a query sees, or floats that are added to the scores
    (HIDDEN or less: not seen); window: slots a query sees, itself included; cap: scores are cap tanh(s / cap); causal:
    False if slots are in no order and a query sees all (decoding); sinks: [Hq], scores that take their share of the
    softmax, where lse is None; whole: a probe may not ask for queries that are not at hand (see `probes.rows`).
    """

    q: Tensor
    k: Tensor
    lse: Tensor | None
    visible: Tensor
    scale: float
    mask: Tensor | None = None
    window: int | None = None
    cap: float | None = None
    causal: bool = True
    sinks: Tensor | None = None
    whole: bool = True


def accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def columns(
    spec: AttentionScore,
    a: Attention,
    rows: Rows,
    *,
    noise: Tensor | None = None,
    progress: float | Tensor = 0.0,
    block: int = BLOCK,
) -> Columns:
    """What the tokens receive from the voting queries.

    noise: [B, Hq, T], Gumbel noise of each token, where the score has a temperature; progress: 0 at the first and 1 at
    the last step of a generation, for that temperature. Raises ValueError without the noise that is asked for.
    """
    if spec.tau is not None and noise is None:
        raise ValueError("a score with Gumbel noise needs the noise of each token")
    acc = accumulate_dtype(a.k)
    batch, heads, tokens, _ = a.k.shape
    groups = a.q.shape[1] // heads
    first = tokens - a.q.shape[2]
    total = torch.zeros(batch, heads, groups, tokens, dtype=acc, device=a.k.device)
    seen = torch.zeros(batch, 1, 1, tokens, dtype=acc, device=a.k.device)
    steps = torch.arange(tokens, device=a.k.device)
    k = a.k.to(acc)
    for start in range(0, rows.slot.shape[1], block):
        slot, votes = rows.slot[:, start : start + block], rows.votes[:, start : start + block]
        row = (slot - first)[:, None, :, None]
        q = a.q.gather(2, row.expand(-1, a.q.shape[1], -1, a.q.shape[3])).to(acc).unflatten(1, (heads, groups))
        s = torch.einsum("bhgpd,bhtd->bhgpt", q, k) * a.scale
        if a.cap:
            s = a.cap * torch.tanh(s / a.cap)
        sees = a.visible[:, None, :] & votes[:, :, None]
        if a.causal:
            sees = sees & (steps <= slot[:, :, None])
        if a.window is not None:
            sees = sees & (steps > slot[:, :, None] - a.window)
        sees = sees[:, None, None]
        if a.mask is not None:
            full = a.mask.expand(batch, -1, a.q.shape[2], tokens)
            full = full.gather(2, row.expand(-1, full.shape[1], -1, tokens))
            full = full.unsqueeze(1) if full.shape[1] == 1 else full.unflatten(1, (heads, groups))
            if full.dtype != torch.bool:
                s, full = s + full.to(acc), full > HIDDEN
            sees = sees & full
        if a.lse is not None:
            lse = a.lse.gather(2, row[..., 0].expand(-1, a.lse.shape[1], -1)).to(acc).unflatten(1, (heads, groups))
        elif spec.tau is None:
            lse = torch.where(sees, s, -torch.inf).logsumexp(-1)
            if a.sinks is not None:
                lse = torch.logaddexp(lse, a.sinks.to(acc).view(1, heads, groups, 1))
        if spec.tau is None:
            p = torch.where(sees, torch.exp(s - lse.unsqueeze(-1)), 0.0)
        else:
            assert noise is not None
            tau = spec.tau[0] + (spec.tau[1] - spec.tau[0]) * progress
            s = (s + noise.to(acc).unflatten(1, (heads, groups)).unsqueeze(3)) / tau
            p = torch.softmax(torch.where(sees, s, -torch.inf), -1)
            p = torch.where(sees, p, 0.0)  # a query that sees nothing gives NaN
        if spec.reduce == "max":
            total = torch.maximum(total, p.amax(3))
        elif spec.reduce == "count_below":
            assert spec.below is not None
            threshold = spec.below.real(sees.sum(-1, keepdim=True).to(acc))
            total = total + (sees & (p < threshold)).to(acc).sum(3)
        else:
            total = total + p.sum(3)
        # what one query head of a masked model does not see, the others may: any of them counts
        seen = seen + sees.flatten(1, 2).any(1)[:, None, None].to(acc).sum(3)
    return Columns(total, seen)


def carry(spec: AttentionScore, old: Columns, new: Columns) -> Columns:
    """The state after further queries: old, with room made for appended slots, and their contribution.

    Exact for probe all and step; `last` and `rand` forget, so they are computed anew from the queries at hand. Raises
    ValueError for them.
    """
    kinds = {p.kind for p in spec.probe}
    if kinds == {"step"}:
        return new
    if kinds != {"all"}:
        raise ValueError(f"a score of probe {', '.join(sorted(kinds))} cannot be carried: compute it from its queries")
    more = new.total.shape[-1] - old.total.shape[-1]
    total = torch.nn.functional.pad(old.total, (0, more))
    seen = torch.nn.functional.pad(old.seen, (0, more))
    total = torch.maximum(total, new.total) if spec.reduce == "max" else total + new.total
    return Columns(total, seen + new.seen)


def take(state: Columns, index: Tensor) -> Columns:
    """The state of the slots `index`, int64 [B, H, C], of which -1 are holes: after an eviction. `seen` becomes
    [B, H, 1, C], as heads keep different tokens."""
    safe = index.clamp(min=0)
    heads, groups = state.total.shape[1:3]
    total = state.total.gather(-1, safe.unsqueeze(2).expand(-1, -1, groups, -1))
    seen = state.seen.expand(-1, heads, -1, -1).gather(-1, safe.unsqueeze(2))
    return Columns(total, seen.masked_fill(index.unsqueeze(2) < 0, 0))


def reduced(spec: AttentionScore, c: Columns, before: Tensor | None = None) -> Tensor:
    """One number for each token and KV head, [B, H, T]: over the queries that saw it, the query heads of a group, the
    heads and, added to `before` [B, H, T], the layers."""
    total = c.total
    if spec.reduce == "mean":
        total = total / c.seen.clamp(min=1)
    out = over_group(total, spec.gqa)
    if spec.heads is not None:
        out = (out.mean if spec.heads == "mean" else out.sum)(1, keepdim=True).expand_as(out)
    return out + before if spec.across and before is not None else out


def over_group(x: Tensor, how: str) -> Tensor:
    """x [B, H, G, T] over the query heads of each group: "mean", "sum" or "max"."""
    return x.amax(2) if how == "max" else x.sum(2) if how == "sum" else x.mean(2)
