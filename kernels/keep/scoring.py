"""The score of every token: what `score:` of a rule of `keep` says, from attention, keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvc_compile.policy import AttentionScore, Score

from .attention import Attention, Columns, accumulate_dtype, carry, columns, reduced
from .filters import decayed, masked, pooled
from .geometry import KV_SCORES
from .probes import Rows, rows
from .tokens import Parts


@dataclass(frozen=True)
class Chance:
    """What is random, drawn by the caller. probe: [B, T], uniform; noise: [B, Hq, T], Gumbel, one for each token."""

    probe: Tensor | None = None
    noise: Tensor | None = None
    progress: float | Tensor = 0.0


NO_CHANCE = Chance()


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel noise from uniform numbers."""
    u = uniform.clamp(1e-20, 1 - 1e-7)
    return -torch.log(-torch.log(u))


def observe(spec: Score, a: Attention, chance: Chance = NO_CHANCE) -> tuple[Columns, ...]:
    """What each attention score of `spec` takes from these queries: the expensive part, and the state of decoding.

    Raises ValueError where a probe needs queries, or random numbers, that are not there.
    """
    queries = a.q.shape[2]
    found = (rows(s.probe, a.visible, queries, chance.probe, whole=a.whole) for s in spec.attention)
    return tuple(
        columns(s, a, r, noise=chance.noise, progress=chance.progress)
        for s, r in zip(spec.attention, found, strict=True)
    )


def step(spec: Score, old: tuple[Columns, ...], a: Attention, chance: Chance = NO_CHANCE) -> tuple[Columns, ...]:
    """The state after a decoding step: old, and what the new queries `a.q` give to the slots of `a.k`.

    Slots appended since `old` are at the end; with `a.causal` the queries are those of the newest slots, without it
    each sees all that is visible. Raises ValueError for scores whose probes forget (`last`, `rand`): observe those
    anew.
    """
    tokens, queries = a.visible.shape[1], a.q.shape[2]
    slot = torch.arange(tokens - queries, tokens, device=a.k.device).expand(a.k.shape[0], -1)
    votes = a.visible[:, tokens - queries :] if a.causal else torch.ones_like(slot, dtype=torch.bool)
    new = (columns(s, a, Rows(slot, votes), noise=chance.noise, progress=chance.progress) for s in spec.attention)
    return tuple(carry(s, o, n) for s, o, n in zip(spec.attention, old, new, strict=True))


def score(
    spec: Score,
    p: Parts,
    k: Tensor,
    v: Tensor,
    state: tuple[Columns, ...] = (),
    *,
    allowed: Tensor | None = None,
    before: Tensor | None = None,
    learned: Tensor | None = None,
) -> Tensor:
    """fp32 [B, H, T], the higher the better; -inf where a slot is hidden, so that it never comes before a visible one.

    k, v: [B, H, T, D]; state: of `observe` or `step`; allowed: bool [B, T], tokens that meet the score's condition;
    before: [B, H, T], the layer before, for scores across layers; learned: [B, H, T], what trained heads gave each
    token when it was appended. Raises ValueError without `allowed` or `learned` where they are needed.
    """
    if spec.attention:
        several = [_finished(s, c, p, before) for s, c in zip(spec.attention, state, strict=True)]
        stacked = torch.stack(several)
        out = stacked.amax(0) if spec.combine == "max" else stacked.sum(0)
    elif spec.kv is not None:
        name, number = spec.kv
        out = KV_SCORES[name](k, v, p, number)
    elif spec.learned:
        if learned is None:
            raise ValueError(f"the score needs what the trained heads of {spec.learned!r} gave each token")
        out = learned.to(accumulate_dtype(k))
    else:
        out = p.rank.to(accumulate_dtype(k)).unsqueeze(1).expand(-1, k.shape[1], -1)  # fifo: the oldest goes
    if spec.ascending:
        out = -out
    if spec.decay is not None:
        out = decayed(out, k, p.body, spec.decay)
    if spec.mask is not None:
        if allowed is None:
            raise ValueError(f"the score needs to know which tokens meet {spec.mask!r}")
        out = masked(out, allowed)
    return out.masked_fill(~p.visible.unsqueeze(1), -torch.inf)


def _finished(s: AttentionScore, c: Columns, p: Parts, before: Tensor | None) -> Tensor:
    out = reduced(s, c, before)
    return out if s.pool is None else pooled(out, p.body, *s.pool)
