"""Tokens that go are mixed into a fixed number of slots by a trained convolution.

LoCoCo (Cai et al. 2024, arXiv:2406.05317), over the tokens that go, in order, in each head:

    W = (1 - n) E + n softmax_t(conv([K; V]))      K' = W K      V' = W V

E takes the best `slots` of them as they are, one a row, in order of position. Where no more than `slots` go, each of
them has a slot of its own, and nothing is mixed (a choice: the paper always has more).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import accumulate_dtype
from .tokens import compact, places


@dataclass(frozen=True)
class Mixer:
    """Of a layer, for all its heads. conv: [slots, Dk + Dv, taps], taps odd; bias: [slots]; share: [1], n above."""

    conv: Tensor
    bias: Tensor
    share: Tensor


def mix(mixer: Mixer, k: Tensor, v: Tensor, going: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k', v' [B, H, slots, D] in the dtypes of k and v, and which slots hold anything, bool [B, H, slots].

    k, v: [B, H, T, D]; going: bool [B, H, T]; scores: [B, H, T].
    """
    acc = accumulate_dtype(k)
    tokens, slots = k.shape[2], mixer.conv.shape[0]
    line = compact(going, tokens)  # those that go, without gaps
    gathered = [line.gather(x).to(acc) for x in (k, v)]
    flat = torch.cat(gathered, -1).flatten(0, 1).transpose(1, 2)
    taps = mixer.conv.shape[2]
    logits = F.conv1d(flat, mixer.conv.to(acc), mixer.bias.to(acc), padding=(taps - 1) // 2)
    logits = logits.unflatten(0, k.shape[:2]).masked_fill(line.holes.unsqueeze(2), -torch.inf)
    some = line.count > 0
    soft = torch.where(some[..., None, None], logits, 0.0).softmax(-1)
    place = line.index.clamp(min=0)
    score = scores.gather(-1, place).masked_fill(line.holes, -torch.inf)
    best = compact((places(score) < slots) & ~line.holes, slots)
    one = F.one_hot(best.index.clamp(min=0), tokens).to(acc) * ~best.holes.unsqueeze(-1)
    if best.index.shape[-1] < slots:  # fewer tokens than slots
        one = F.pad(one, (0, 0, 0, slots - best.index.shape[-1]))
    n = torch.where(line.count > slots, mixer.share.to(acc), 0.0)[..., None, None]
    w = (1 - n) * one + n * soft
    held = torch.arange(slots, device=k.device) < line.count.clamp(max=slots).unsqueeze(-1)
    mixed_k, mixed_v = ((w @ x).to(like.dtype) for x, like in zip(gathered, (k, v)))
    return mixed_k, mixed_v, held
