"""What a rule needs of a layer's trained maps, which `kvc_compile.maps` reads from files."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvc_compile.policy import Fold

from .fold import FeatureMaps, State, empty, fold
from .mixing import Mixer


@dataclass(frozen=True)
class Trained:
    """scores: [B, H, T], of a layer's heads, when tokens were appended; maps and state: of a fold, the state None at
    first; mixer: of a learned merge."""

    scores: Tensor | None = None
    maps: FeatureMaps | None = None
    state: State | None = None
    mixer: Mixer | None = None


def folded(spec: Fold, trained: Trained, k: Tensor, v: Tensor, going: Tensor) -> State:
    """The state with the tokens `going`, bool [B, H, T], of k, v [B, H, T, D] in it. Raises ValueError without maps."""
    if trained.maps is None:
        raise ValueError(f"folding needs the trained maps of {spec.file!r}")
    state = empty(trained.maps, len(k), v) if trained.state is None else trained.state
    return fold(trained.maps, state, k, v, going)
