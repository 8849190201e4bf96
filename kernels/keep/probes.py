"""Which queries vote: rows of the attention matrix, gathered with static shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvc_compile.policy import Probe


@dataclass(frozen=True)
class Rows:
    """slot: int64 [B, P], of each voting query; votes: bool [B, P], False for what fills up."""

    slot: Tensor
    votes: Tensor


def rows(
    probe: tuple[Probe, ...], visible: Tensor, queries: int, random: Tensor | None = None, *, whole: bool = True
) -> Rows:
    """The union of the probes. visible: bool [B, T]; queries: how many of the newest slots have a query at hand;
    random: [B, T], uniform numbers that decide which queries `rand` takes: of those that no other probe takes; whole:
    all queries that a probe asks for must be at hand, or else those that are vote.

    Hidden queries never vote. A share of a short prompt is at least one query. Raises ValueError where a probe needs
    queries, or numbers, that are not there.
    """
    tokens = visible.shape[1]
    length = visible.sum(-1)
    rank = visible.long().cumsum(-1) - 1
    first = visible.shape[1] - queries
    steps = torch.arange(tokens, device=visible.device)
    found, taken = [], torch.zeros_like(visible)
    for p in sorted(probe, key=lambda p: p.kind == "rand"):
        if p.kind == "rand":
            if random is None:
                raise ValueError("probe rand needs random numbers")
            eligible = visible & ~taken
            wanted = torch.minimum(_amount(p, length), eligible.sum(-1))
            cap = min(tokens, int(_most(p, tokens)))
            order = torch.where(eligible, random, -1.0).argsort(dim=-1, descending=True, stable=True)[:, :cap]
            votes = torch.arange(cap, device=visible.device) < wanted.unsqueeze(-1)
            needed = tokens
        else:
            needed = {"all": tokens, "step": 1}.get(p.kind) or min(tokens, int(_most(p, tokens)))
            needed = needed if whole else min(needed, queries)
            order = steps[tokens - needed :].expand(visible.shape[0], needed)
            within = rank >= (length - (_amount(p, length) if p.kind == "last" else needed)).unsqueeze(-1)
            within = within & (steps >= tokens - needed)
            votes = (visible & within & ~taken)[:, tokens - needed :]
            taken = taken | (visible & within)
        if needed > queries:
            raise ValueError(f"probe {p.kind} needs {needed} queries, {queries} are at hand")
        found.append((order, votes))
    slot = torch.cat([order for order, _ in found], 1)
    return Rows(slot.clamp(min=first), torch.cat([votes for _, votes in found], 1))


def _amount(p: Probe, length: Tensor) -> Tensor:
    assert p.amount is not None
    n = p.amount.of(length)
    return torch.full_like(length, n) if isinstance(n, int) else n.clamp(min=1)


def _most(p: Probe, tokens: int) -> int:
    assert p.amount is not None
    return max(1, p.amount.of(tokens))
