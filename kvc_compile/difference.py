"""How far two tensors are apart, the worst of many: what `verify` collects."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Difference:
    """How far a tensor of the rewritten graph was from the untouched graph's, the worst of some calls.

    relative: ||a - b|| / ||b||; absolute: max |a - b|. Not a number beats all numbers.
    """

    calls: int = 0
    relative: float = 0.0
    absolute: float = 0.0

    def add(self, a: Tensor, b: Tensor) -> None:
        a, b = a.detach().double(), b.detach().double()
        if not a.numel():
            return
        self.calls += 1
        self.relative = worse(self.relative, float((a - b).norm() / b.norm().clamp_min(1e-30)))
        self.absolute = worse(self.absolute, float((a - b).abs().max()))


@dataclass
class Differences:
    """What was found for one graph: by the index of the attention, and for the model's own floating-point outputs."""

    sites: dict[int, Difference] = field(default_factory=dict)
    outputs: Difference = field(default_factory=Difference)


def worse(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def worst(found: Iterable[Difference]) -> Difference | None:
    """The worst of several; None if there are none."""
    total = None
    for d in found:
        total = total or Difference()
        total.calls += d.calls
        total.relative, total.absolute = worse(total.relative, d.relative), worse(total.absolute, d.absolute)
    return total
