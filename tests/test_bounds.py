"""What a mask comes down to, against a loop over its positions; also as Inductor computes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvc_compile.kernels.reference import HIDDEN
from kvc_compile.lowering.bounds import bounds


def by_loop(mask: Tensor) -> Tensor:
    found = []
    for row in mask.reshape(-1, mask.shape[-1]).tolist():
        seen = [p for p, m in enumerate(row) if (m if isinstance(m, bool) else m > HIDDEN)]
        first, end = (seen[0], seen[-1] + 1) if seen else (0, 0)
        found.append([first, end, int(len(seen) == end - first and all(row[p] in (True, 0.0) for p in seen))])
    return torch.tensor(found, dtype=torch.int32).reshape(*mask.shape[:-1], 3)


def masks(width: int) -> list[Tensor]:
    """Of one mask each row: all, none, a middle, a hole, only the last one; for floats also one that adds something."""
    seen = torch.ones(6, width, dtype=torch.bool)
    seen[1] = False
    seen[2, : width // 3] = seen[2, width // 2 :] = False
    seen[3, width // 2] = False
    seen[4, :-1] = False
    added = torch.zeros(6, width).masked_fill(~seen, torch.finfo(torch.float32).min)
    added[5, width // 3] = -0.5
    return [seen[None, None], added[None, None]]


@pytest.mark.parametrize("width", [3, 70, 5000])
def test_bounds(width: int) -> None:
    for mask in masks(width):
        assert bounds(mask).equal(by_loop(mask))


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bounds_of_a_width_that_varies(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    compiled = torch.compile(bounds, dynamic=True, fullgraph=True)
    for width in (40, 700, 70_000):
        for mask in masks(width):
            assert compiled(mask.to(device)).cpu().equal(by_loop(mask))
