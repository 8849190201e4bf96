"""A rule of `keep` applied to a model's caches at one moment: scores, counts, kept indices, and the others' fate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvc_compile.policy import Regions, Rule

from .attention import Attention
from .budget import counts
from .fold import State
from .merging import Merged, merge
from .retention import capacity, kept, leader, others
from .scoring import NO_CHANCE, Chance, observe, score
from .tokens import Kept, compact, parts, scope
from .trained import Trained, folded


@dataclass(frozen=True)
class Outcome:
    """Of one layer. kept: the slots that stay; merged: what they hold, if the rule merges; demoted: the other visible
    slots, if it demotes; folded: the state with the others in it, if it folds."""

    kept: Kept
    merged: Merged | None = None
    demoted: Kept | None = None
    folded: State | None = None


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
) -> list[Outcome]:
    """What each layer keeps; layers that share a budget are given together. The layers show the same tokens.

    values: [B, H, T, Dv] of each layer; allowed: bool [B, T], for a score with a condition; table: [L, H], for an alloc
    with one; prompt: int64 [B], visible tokens of the prompt, for rules about it; trained: of each layer, where the
    rule reads trained maps. Raises ValueError for what is missing.
    """
    visible = layers[0].visible
    heads, tokens = layers[0].k.shape[1:3]
    p = parts(visible, regions, scope(rule.of, visible, prompt))
    maps = trained or [Trained()] * len(layers)
    scores: list[Tensor] = []
    for i, (a, v) in enumerate(zip(layers, values, strict=True)):
        if leader(i, rule.reuse) != i:
            scores.append(scores[leader(i, rule.reuse)])
            continue
        before = scores[i - 1] if i else None
        state, learned = observe(rule.score, a, chance), maps[i].scores
        scores.append(score(rule.score, p, a.k, v, state, allowed=allowed, before=before, learned=learned))
    number = counts(rule.budget, rule.alloc, p, len(layers), heads, torch.stack(scores), table)
    most = capacity(rule, regions, tokens, len(layers), heads) if rule.of is None else tokens
    found = []
    for i, (a, v) in enumerate(zip(layers, values, strict=True)):
        mask = kept(rule, p, scores[i], number[leader(i, rule.reuse)])
        stays = compact(mask, most)
        going, own = visible.unsqueeze(1) & ~mask, maps[i]
        merged = merge(rule.merge, p, a.k, v, stays, scores=scores[i], mixer=own.mixer) if rule.merge else None
        state_of = folded(rule.fold, own, a.k, v, going) if rule.fold else None
        found.append(Outcome(stays, merged, others(mask, visible) if rule.demote else None, folded=state_of))
    return found
