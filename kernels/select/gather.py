"""Single tokens of a compressed cache by their positions: what attention over selected tokens reads."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from kvc_compile.kernels.reference import ENCODED, FP8, Views, decode, views
from kvc_compile.layout import TILE, Layout


def gather(data: Tensor, new: Tensor, length: Tensor | int, index: Tensor, layout: Layout) -> Tensor:
    """The tokens at positions `index` int64 [B, H, C] as values [B, H, C, D] in the model's dtype.

    Those from `length` on are the new ones, new [B, H, n, D]. Positions are 0 .. length+n-1: the caller sees to it.
    """
    v = views(data, layout)
    sink, fresh = index < layout.sink, index >= length
    body = index - layout.sink
    encoded = (body >= 0) & (body < v.header[..., ENCODED].unsqueeze(-1))
    out = _rows(new, index - length)
    if layout.sink:
        out = torch.where((sink & ~fresh).unsqueeze(-1), _rows(v.sink, index), out)
    if layout.recent:
        ring = (body % layout.recent).masked_fill(sink, 0)
        exact = ~(sink | fresh | encoded)
        out = torch.where(exact.unsqueeze(-1), _rows(v.ring, ring), out)
    if v.planes[0].shape[2]:
        stored = (encoded & ~fresh).unsqueeze(-1)
        out = torch.where(stored, decode_tokens(v, layout, body.masked_fill(~encoded, 0)).to(out.dtype), out)
    return out


def decode_tokens(v: Views, layout: Layout, body: Tensor) -> Tensor:
    """The encoded tokens `body`, int64 [B, H, C] body tokens, as values [B, H, C, D]."""
    codes, shift = None, 0
    for words, plane in zip(v.planes, layout.planes, strict=True):
        if not layout.packed:
            codes = _rows(words, body)
            break
        span = layout.plane_tokens(plane)
        row = body // span * TILE + body % TILE
        field = body % span // TILE * plane
        found = _rows(words.flatten(2, 3), row).to(torch.int32) >> field.unsqueeze(-1).to(torch.int32)
        part = (found & (2**plane - 1)) << shift
        codes = part if codes is None else codes | part
        shift += plane
    assert codes is not None
    params = None
    if v.params is not None:
        params = _rows(v.params.flatten(3), body // layout.codec.block[0]).unflatten(3, v.params.shape[3:])
    return decode(codes, params, _token_by_token(layout))


@lru_cache(maxsize=1024)
def _token_by_token(layout: Layout) -> Layout:
    """The layout as one token sees it: the scale of its block is its own."""
    block = layout.codec.block
    return replace(layout, codec=replace(layout.codec, block=(min(1, block[0]), block[1])))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, T, D] at `index` [B, H, C], which is cut to what x has: what is beyond is not used."""
    safe = index.clamp(min=0, max=x.shape[2] - 1).unsqueeze(-1)
    if x.dtype == FP8:  # which nothing gathers
        return x.view(torch.uint8).gather(2, safe.expand(-1, -1, -1, x.shape[3])).view(x.dtype)
    return x.gather(2, safe.expand(-1, -1, -1, x.shape[3]))
