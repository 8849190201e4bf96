"""Run-time checks that the graph itself carries on a GPU, where an operator cannot read its inputs to raise."""

from __future__ import annotations

import torch
from torch import Tensor

from kvc_compile.lowering import ops  # noqa: F401  (defines kvc::length)


def check_positions(positions: Tensor) -> None:
    """Assert on the device that positions [n] are consecutive."""
    if positions.shape[0] > 1:
        step = positions[1:] - positions[:-1]
        torch._assert_async((step == 1).all(), "a compressed cache takes consecutive positions")


def check_not_round(data: Tensor, positions: Tensor, tokens: int, layout: str) -> Tensor:
    """Assert that positions [n] do not begin anew in an arena that is full: the graph may read what is written over
    only later, and an append keeps nothing after it. What is returned was read from the arena."""
    begins_anew = (torch.ops.kvc.length(data, layout) == tokens) & (positions[-1] + 1 < tokens)
    torch._assert_async(~begins_anew, "a full compressed cache is written from an earlier position: empty it first")
    return begins_anew


def check_first(positions: Tensor) -> None:
    """Assert that positions [n] start at 0."""
    torch._assert_async(positions[0] == 0, "attention over the first tokens of a compressed cache that is not empty")
