"""Sketches of keys that are held beside them and grow with them: a step reads these few bytes instead of the keys.

Of the keys as the model makes them, before they are rounded. The stored form: `kvc_compile.layout`, `sketch`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from kvc_compile.kernels.keep.attention import accumulate_dtype
from kvc_compile.kernels.reference import LENGTH, views
from kvc_compile.layout import Layout

from .index import random_projection


def sketches(x: Tensor, layout: Layout) -> Tensor:
    """What is held of keys x [B, H, n, D]: uint8 [B, H, n, bits / 8], or some channels [B, H, n, R]."""
    what = table(layout, x.device)
    if not layout.sketch.startswith("hash"):
        return x.gather(3, what[None, :, None].expand(x.shape[0], -1, x.shape[2], -1))
    x = x.to(accumulate_dtype(x))
    positive = torch.einsum("bhtd,hdr->bhtr", x, what.to(x.dtype)) >= 0
    return (positive.unflatten(-1, (-1, 8)) * _powers(x.device)).sum(-1, dtype=torch.uint8)


def update(data: Tensor, x: Tensor, layout: Layout) -> None:
    """Hold the sketches of x [B, H, n, D], the newest tokens of an arena."""
    v = views(data, layout)
    assert v.sketch is not None
    last = v.header[0, 0, LENGTH] - x.shape[2]
    at = (torch.arange(x.shape[2], device=x.device) + last).clamp(0, v.sketch.shape[2] - 1)
    v.sketch.index_copy_(2, at, sketches(x, layout).to(v.sketch.dtype))


def compare(q: Tensor, held: Tensor, layout: Layout) -> Tensor:
    """[B, H, G, T]: what an index says of q [B, H, G, D] and each token, from the sketches held [B, H, T, ..]."""
    asked = sketches(q, layout)
    if not layout.sketch.startswith("hash"):
        return torch.einsum("bhgr,bhur->bhgu", asked, held.to(q.dtype))
    different = asked.unsqueeze(3) ^ held.unsqueeze(2)
    return 8 * held.shape[-1] - _counts(q.device)[different.int()].sum(-1).to(q.dtype)


@lru_cache(maxsize=256)
def table(layout: Layout, device: torch.device) -> Tensor:
    """Channels int64 [H, R], or a projection fp32 [H, D, bits]; made once, as a CUDA graph can copy nothing to it."""
    if layout.sketch.startswith("hash"):
        return random_projection(layout.heads, layout.channels, 8 * layout.sketch_bytes).to(device)
    return torch.tensor(layout.sketch_channels, device=device)


@lru_cache(maxsize=16)
def _powers(device: torch.device) -> Tensor:
    return torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=device)


@lru_cache(maxsize=16)
def _counts(device: torch.device) -> Tensor:
    """How many bits of a byte are set."""
    return torch.tensor([i.bit_count() for i in range(256)], dtype=torch.int32, device=device)


def prepare(layout: Layout, device: torch.device) -> None:
    """Make all tables of a layout that holds sketches."""
    if layout.sketch:
        table(layout, device), _powers(device), _counts(device)
