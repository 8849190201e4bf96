"""Scores of trained heads: computed once, when a token is appended, and never again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import accumulate_dtype


@dataclass(frozen=True)
class RetainingHead:
    """A layer's head of Locret (Huang et al. 2024, arXiv:2410.01805): down(silu(up(inputs))), without biases.

    up: [hidden, W], W the numbers of a token's inputs, one after the other, heads before channels; down: [H, hidden];
    inputs: of "q", "k", "v", in the order of `up`.
    """

    up: Tensor
    down: Tensor
    inputs: tuple[str, ...] = ("q", "k", "v")


def retaining(head: RetainingHead, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """fp32 [B, H, T], the higher the better. q: [B, Hq, T, D]; k: [B, H, T, D], both before the rotary embedding;
    v: [B, H, T, Dv]."""
    given = {"q": q, "k": k, "v": v}
    acc = accumulate_dtype(k)
    x = torch.cat([given[name].to(acc).transpose(1, 2).flatten(2) for name in head.inputs], -1)
    hidden = F.silu(x @ head.up.to(acc).T)
    return (hidden @ head.down.to(acc).T).transpose(1, 2)
