"""Rules of a class of heads, applied to the heads of that class alone: DuoAttention (Xiao et al. 2024,
arXiv:2410.10819), RazorAttention (Tang et al. 2024, arXiv:2407.15891)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from kvc_compile.policy import HeadGroup

from .attention import Attention
from .rule import Outcome, apply


def of_heads(a: Attention, heads: Sequence[int]) -> Attention:
    """The attention of some KV heads, and of the query heads that read them."""
    groups = a.q.shape[1] // a.k.shape[1]
    reading = [h * groups + g for h in heads for g in range(groups)]
    mask = a.mask
    if mask is not None and mask.dim() == 4 and mask.shape[1] != 1:
        mask = mask[:, reading]
    lse, sinks = a.lse if a.lse is None else a.lse[:, reading], a.sinks if a.sinks is None else a.sinks[reading]
    return replace(a, q=a.q[:, reading], k=a.k[:, list(heads)], lse=lse, mask=mask, sinks=sinks)


def apply_to(groups: Sequence[HeadGroup], a: Attention, v: Tensor, when: str, **more: Any) -> list[list[Outcome]]:
    """What each group of a layer's heads keeps at the moment `when`: for each of its rules of that moment, in order, as
    `apply` gives it for these heads; no rule, and the heads keep all. v: [B, H, T, Dv]; more: as `apply` takes it.

    Layers do not share budgets here, as the heads of a class are others in each.
    """
    found: list[list[Outcome]] = []
    for g in groups:
        mine, values = of_heads(a, g.heads), v[:, list(g.heads)]
        rules = [rule for rule in g.rules if when in rule.when]
        found.append([apply(rule, g.regions, [mine], [values], **more)[0] for rule in rules])
    return found
