"""A decode step under `select`: which slots of a cache one query of each sequence reads, and attention over them.

Slots are positions in the cache: 0 .. L-1 are stored, L is the new token. Whatever length the cache has, shapes are
static, and nothing is copied to the host.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from kvc_compile.kernels.keep.attention import accumulate_dtype
from kvc_compile.kernels.keep.tokens import Kept, compact, parts
from kvc_compile.kernels.reference import HIDDEN
from kvc_compile.layout import Layout
from kvc_compile.policy import Amount, Query, Selection

from . import held
from .gather import gather
from .index import Sketch, agreed, build, compare, random_projection, token_units
from .selection import chosen, outliers


def slots(s: Selection, tokens: int) -> int:
    """How many slots a query reads at most in a cache of at most `tokens` tokens, the new one included. It may be a
    symbol."""
    q = s.query
    amounts = q.budget, s.regions.sink, s.regions.recent
    if (q.units and q.unit == "cluster") or not all(a.monotone for a in amounts):
        return tokens
    most = _of(q.budget, tokens) * (q.size if q.units else 1) + q.pin * q.size
    most = most + _of(s.regions.sink, tokens) + _of(s.regions.recent, tokens)
    return torch.sym_max(1, torch.sym_min(tokens, most))


def _of(amount: Amount, n: int) -> int:
    """`Amount.of` without a guard on a symbolic n."""
    top, bottom = amount.ratio(n)
    return torch.sym_max(0, top // bottom)


def reads_all(q: Query, tokens: int) -> bool:
    """Whether a budget that does not depend on the length covers a cache of so many tokens."""
    return q.budget.of(0) >= tokens and q.budget.monotone and q.unit in ("token", "cluster", "chunk")


def visible(mask: Tensor | None, first: Tensor | int, total: Tensor | int, batch: int, tokens: int, device) -> Tensor:
    """bool [batch, tokens]: the slots that any head of the one query sees, all of them in [first, total). mask: of the
    slots from `first` on, [b, h, 1, W]."""
    steps = torch.arange(tokens, device=device)
    seen = ((steps >= first) & (steps < total)).expand(batch, -1)
    if mask is None:
        return seen
    shown = (mask if mask.dtype == torch.bool else mask > HIDDEN)[:, :, -1].any(1)
    return seen & shown.index_select(-1, (steps - first).clamp(0, mask.shape[-1] - 1))


def select_held(
    s: Selection, q: Tensor, sketches: Tensor, seen: Tensor, scale: float, capacity: int, layout: Layout
) -> Tensor:
    """`select` by the sketches [B, H, T, ..] that a cache holds."""
    x = held.compare(q.to(accumulate_dtype(q)).unflatten(1, (layout.heads, -1)), sketches, layout)
    return select_scored(s, x, seen, scale, capacity)


def select_scored(s: Selection, x: Tensor, seen: Tensor, scale: float, capacity: int) -> Tensor:
    """`select` by what an index of tokens says: x [B, H, G, T], or [B, H, 1, T] where the heads of a group agreed."""
    p = parts(seen, s.regions)
    sketch = Sketch((), *token_units(x[:, :, 0], p))
    scores = agreed(s.query, x, sketch, scale)
    return padded(compact(chosen(s.query, scores, sketch, p), capacity), capacity)


def select(s: Selection, q: Tensor, k: Tensor, seen: Tensor, scale: float, capacity: int) -> Tensor:
    """int64 [B, H, capacity]: the slots that a query q [B, Hq, D] reads, ascending, then -1. k: [B, H, T, D], the keys;
    seen: bool [B, T]. The index is computed from these keys."""
    p = parts(seen, s.regions)
    sketch = build(s.query, k, p, table(s, k))
    pinned = outliers(s.query, k, sketch, p) if s.query.pin else None
    scores = compare(s.query, q, sketch, p, scale)
    return padded(compact(chosen(s.query, scores, sketch, p, pinned), capacity), capacity)


def table(s: Selection, k: Tensor) -> Tensor | None:
    """What an index needs besides the keys [B, H, T, D]: channels [H, R], or a projection [H, D, bits]."""
    return table_of(s, k.shape[1], k.shape[3], k.device)


@lru_cache(maxsize=256)
def table_of(s: Selection, heads: int, channels: int, device: torch.device) -> Tensor | None:
    """`table`, made once: in a CUDA graph there is nothing to copy it from."""
    index = s.query.index
    if index.kind == "channels":
        return torch.tensor(s.channels, device=device)
    if index.kind == "hash":
        return random_projection(heads, channels, index.bits).to(device)
    return None


def padded(kept: Kept, capacity: int) -> Tensor:
    return torch.nn.functional.pad(kept.index, (0, capacity - kept.index.shape[-1]), value=-1)


def attend(
    q: Tensor, k_data: Tensor, v_data: Tensor, k_new: Tensor, v_new: Tensor, index: Tensor, mask: Tensor | None,
    first: Tensor | int, length: Tensor | int, scale: float, k_layout: Layout, v_layout: Layout, cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of q [B, Hq, 1, Dk] over the slots `index` [B, H, C] alone, -1 for none; what the mask hides of them
    has no weight. Other arguments: `visible`, and `kernels.reference.attend`. Returns [B, Hq, 1, Dv] in q's dtype."""
    batch, heads = q.shape[:2]
    groups, holes, safe = heads // index.shape[1], index < 0, index.clamp(min=0)
    k = gather(k_data, k_new, length, safe, k_layout).float()
    v = gather(v_data, v_new, length, safe, v_layout).float()
    s = torch.matmul(q.reshape(batch, -1, groups, q.shape[-1]).float(), k.transpose(-1, -2)) * scale
    if cap:
        s = cap * torch.tanh(s / cap)
    if mask is not None:
        columns = (safe - first).clamp(0, mask.shape[-1] - 1)  # [B, H, C]
        rows = mask[:, :, -1].expand(batch, heads, -1).unflatten(1, (-1, groups))
        cell = rows.gather(-1, columns.unsqueeze(2).expand(-1, -1, groups, -1))
        s = s.masked_fill(~cell, -torch.inf) if mask.dtype == torch.bool else s + cell
    s = s.masked_fill(holes.unsqueeze(2), -torch.inf)
    if sinks is not None:
        share = sinks.float().view(1, -1, groups, 1).expand(batch, -1, -1, -1)
        s = torch.cat([s, share], -1)
    top = s.amax(-1, keepdim=True).clamp_min(torch.finfo(s.dtype).min)
    weight = torch.exp(s - top)
    total = weight.sum(-1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)
    o = torch.matmul(weight[..., : index.shape[-1]], v) / total
    return o.reshape(batch, heads, 1, -1).to(q.dtype)
