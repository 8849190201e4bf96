"""Arenas that are full without a prompt: random codes and scales.

The content is that of no text, but it is valid, and every byte that attention reads is there. Time does not depend on
the values: the kernels have no branch on them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvc_compile.kernels.reference import ENCODED, LENGTH, views
from kvc_compile.layout import Layout

NO_NAN = 0xBF  # as a mask of float8 e4m3: magnitudes below 2
OFFSET = 0.1  # standard deviation of the blocks' middles


def fill(arena: Tensor, layout: Layout, tokens: int, dice: torch.Generator | None = None) -> None:
    """Make an arena, uint8 [B, row_bytes], a cache of `tokens` tokens whose values are of the order of 1.

    dice: the device's own generator unless given. Raises ValueError if it has no room for them.
    """
    encoded = layout.encoded_after(tokens, 0)
    if encoded > layout.capacity_of(arena.shape[1]):
        room = layout.capacity_of(arena.shape[1])
        raise ValueError(f"an arena with room for {room} encoded tokens cannot hold {encoded}, of {tokens} in all")
    v = views(arena, layout)
    for words in v.planes:
        if layout.packed:
            low, high = (0, 256) if words.dtype == torch.uint8 else (-(1 << 15), 1 << 15)
            words.random_(low, high, generator=dice)
        elif layout.codec.kind == "fp":
            words.view(torch.uint8).random_(0, 256, generator=dice).bitwise_and_(NO_NAN)
        else:
            words.normal_(generator=dice)
    if v.params is not None:
        unit = layout.codec.centre if layout.packed else 1.0
        v.params[..., 0].uniform_(0.5 / unit, 1.5 / unit, generator=dice)
        if layout.codec.zero_point:
            v.params[..., 1].normal_(0, OFFSET, generator=dice)
    v.sink.normal_(generator=dice)
    v.ring.normal_(generator=dice)
    v.header.zero_()
    v.header[..., LENGTH] = tokens
    v.header[..., ENCODED] = encoded
