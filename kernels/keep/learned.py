"""Scores of trained heads: computed once, when a token is appended, and never again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import accumulate_dtype

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}  # by the names of transformers' `hidden_act`


@dataclass(frozen=True)
class RetainingHead:
    """A layer's head of Locret (Huang et al. 2024, arXiv:2410.01805): down(act(up(inputs))), without biases.

    up: [hidden, W], W the numbers of a token's inputs, one after the other, heads before channels; down: [H, hidden];
    inputs: of "q", "k", "v", in the order of `up`; act: of `ACTIVATIONS`, that of the model's own layers.
    """

    up: Tensor
    down: Tensor
    inputs: tuple[str, ...] = ("q", "k", "v")
    act: str = "silu"


def retaining(head: RetainingHead, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """fp32 [B, H, T], the higher the better. q: [B, Hq, T, D]; k: [B, H, T, D], both before the rotary embedding;
    v: [B, H, T, Dv]."""
    given = {"q": q, "k": k, "v": v}
    acc = accumulate_dtype(k)
    x = torch.cat([given[name].to(acc).transpose(1, 2).flatten(2) for name in head.inputs], -1)
    hidden = ACTIVATIONS[head.act](x @ head.up.to(acc).T)
    return (hidden @ head.down.to(acc).T).transpose(1, 2)
