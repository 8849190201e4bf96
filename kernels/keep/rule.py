"""A rule of `keep` applied to a model's caches at one moment: scores, counts, kept indices, and the others' fate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvc_compile.policy import Regions, Rule, capacity

from .attention import Attention, Columns, over_group
from .budget import counts
from .fold import State
from .merging import Merged, merge
from .retention import kept, leader, others
from .scoring import NO_CHANCE, Chance, observe, score
from .tokens import Kept, compact, parts, scope
from .trained import Trained, folded


@dataclass(frozen=True)
class Outcome:
    """Of one layer. kept: the slots that stay; merged: what they hold, if the rule merges; demoted: the other visible
    slots, if it demotes; folded: the state with the others in it, if it folds; total: fp32 [B, H, T], what each slot
    received, where that is carried along."""

    kept: Kept
    merged: Merged | None = None
    demoted: Kept | None = None
    folded: State | None = None
    total: Tensor | None = None


@dataclass(frozen=True)
class Past:
    """What is known of tokens that were stored before. seen: int64 [B], see `tokens.parts`; holes: bool [B, H, T] of
    each layer, slots that hold nothing in some heads; received: fp32 [B, H, T] of each layer, what slots received from
    earlier queries, for a score that accumulates."""

    seen: Tensor
    holes: Sequence[Tensor]
    received: Sequence[Tensor] | None = None


def apply(
    rule: Rule,
    regions: Regions,
    layers: Sequence[Attention],
    values: Sequence[Tensor],
    *,
    chance: Chance = NO_CHANCE,
    allowed: Tensor | None = None,
    table: Tensor | None = None,
    prompt: Tensor | None = None,
    trained: Sequence[Trained] | None = None,
    past: Past | None = None,
    place: tuple[int, int] | None = None,
) -> list[Outcome]:
    """What each layer keeps; layers that share a budget are given together. The layers show the same tokens.

    values: [B, H, T, Dv] of each layer; allowed: bool [B, T], for a score with a condition; table: [L, H], for an alloc
    with one; prompt: int64 [B], visible tokens of the prompt, for rules about it; trained: of each layer, where the
    rule reads trained maps; place: (n, L), the layers given are those from layer n on of L, for an alloc that looks at
    no scores (None: they are all). Raises ValueError for what is missing.
    """
    visible = layers[0].visible
    heads, tokens = layers[0].k.shape[1:3]
    first, total = place or (0, len(layers))
    p = parts(visible, regions, scope(rule.of, visible, prompt), past.seen if past else None)
    maps = trained or [Trained()] * len(layers)
    scores: list[Tensor] = []
    totals: list[Tensor | None] = []
    for i, (a, v) in enumerate(zip(layers, values, strict=True)):
        if leader(i, rule.reuse) != i:
            scores.append(scores[leader(i, rule.reuse)])
            totals.append(totals[leader(i, rule.reuse)])
            continue
        before = scores[i - 1] if i else None
        state = observe(rule.score, a, chance)
        if past is not None and past.received is not None:
            (one,), (spec,) = state, rule.score.attention
            new, old = over_group(one.total, spec.gqa), past.received[i]
            state = (Columns((torch.maximum(new, old) if spec.reduce == "max" else new + old).unsqueeze(2), one.seen),)
        totals.append(None if past is None or past.received is None else state[0].total.squeeze(2))
        own = score(rule.score, p, a.k, v, state, allowed=allowed, before=before, learned=maps[i].scores)
        scores.append(own if past is None else own.masked_fill(past.holes[i], -torch.inf))
    if rule.budget.mass is not None or place is None or total == len(layers):
        number = counts(rule.budget, rule.alloc, p, len(layers), heads, torch.stack(scores), table)
    elif rule.alloc.kind == "waterfill":  # of heads: each layer by itself
        number = torch.cat([counts(rule.budget, rule.alloc, p, 1, heads, s.unsqueeze(0)) for s in scores])
    else:
        number = counts(rule.budget, rule.alloc, p, total, heads, None, table)[first : first + len(layers)]
    most = capacity(rule, regions, tokens, total, heads) if rule.of is None else tokens
    found = []
    for i, (a, v) in enumerate(zip(layers, values, strict=True)):
        mask = kept(rule, p, scores[i], number[leader(i, rule.reuse)])
        stays = compact(mask, most)
        going, own_maps = visible.unsqueeze(1) & ~mask, maps[i]
        merged = merge(rule.merge, p, a.k, v, stays, scores=scores[i], mixer=own_maps.mixer) if rule.merge else None
        state_of = folded(rule.fold, own_maps, a.k, v, going) if rule.fold else None
        found.append(
            Outcome(stays, merged, others(mask, visible) if rule.demote else None, folded=state_of, total=totals[i])
        )
    return found
