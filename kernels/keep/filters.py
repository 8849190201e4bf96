"""What is applied to a score before tokens are taken by it: pooling over neighbours, and post-filters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvc_compile.policy import GraphDecay

from .attention import accumulate_dtype
from .tokens import BELOW, places


def pooled(scores: Tensor, body: Tensor, kind: str, size: int) -> Tensor:
    """Over `size` neighbours of each token (SnapKV, Li et al. 2024, arXiv:2404.14469): "max", or "avg" over `size`
    whatever is there. scores: [B, H, T]; body: bool [B, T]: only candidates lend score, as the window does not in the
    paper's code."""
    inside = body.unsqueeze(1)
    before, after = size // 2, size - 1 - size // 2
    if kind == "max":
        x = F.pad(torch.where(inside, scores, -torch.inf), (before, after), value=-torch.inf)
        return torch.where(inside, x.unfold(-1, size, 1).amax(-1), scores)
    x = F.pad(torch.where(inside, scores, 0.0), (before, after))
    return torch.where(inside, x.unfold(-1, size, 1).sum(-1) / size, scores)


def masked(scores: Tensor, allowed: Tensor) -> Tensor:
    """Tokens that are not `allowed`, bool [B, T], come after all others (LOOK-M, Wan et al. 2024, arXiv:2406.18139)."""
    return scores.masked_fill(~allowed.unsqueeze(1), BELOW)


def decayed(scores: Tensor, k: Tensor, body: Tensor, spec: GraphDecay) -> Tensor:
    """Tokens like better ones lose score, so that what stays is varied (GraphKV, Li et al. 2025, arXiv:2509.00388).

    Each round, the best `seeds` candidates send a decay to all others: s_j *= 1 - strength * max(0, max_i cos(k_i,
    k_j)). The paper's exact decay is not public; this takes the most similar seed of each token. scores: [B, H, T];
    k: [B, H, T, D]; body: bool [B, T].
    """
    unit = F.normalize(k.to(accumulate_dtype(k)), dim=-1)
    inside = body.unsqueeze(1)
    seeds = min(spec.seeds, scores.shape[-1])
    for _ in range(spec.rounds):
        candidates = torch.where(inside, scores, -torch.inf)
        order = candidates.argsort(dim=-1, descending=True, stable=True)[..., :seeds]
        chosen = unit.gather(2, order.unsqueeze(-1).expand(-1, -1, -1, unit.shape[-1]))
        similar = torch.einsum("bhtd,bhsd->bhts", unit, chosen)
        valid = candidates.gather(-1, order) > -torch.inf
        nearest = similar.masked_fill(~valid.unsqueeze(2), 0.0).amax(-1).clamp(min=0)
        is_seed = inside & (places(candidates) < seeds)
        scores = torch.where(inside & ~is_seed, scores * (1 - spec.strength * nearest), scores)
    return scores
