"""Caches that are full without a prompt: random codes and scales written straight into arenas.

The content is that of no text, but it is valid, and every byte that attention reads is there. Time does not depend on
the values: the kernels have no branch on them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kvc_compile.handle import CacheHandle, Tag, track
from kvc_compile.kernels import reference
from kvc_compile.kernels.reference import ENCODED, LENGTH
from kvc_compile.layout import Layout

NO_NAN = 0xBF  # as a mask of float8 e4m3: magnitudes below 2
OFFSET = 0.1  # standard deviation of the blocks' middles


def fill(arena: Tensor, layout: Layout, tokens: int) -> None:
    """Make an arena, uint8 [B, row_bytes], a cache of `tokens` tokens whose values are of the order of 1.

    Raises ValueError if it has no room for them.
    """
    encoded = layout.encoded_after(tokens, 0)
    if encoded > layout.capacity_of(arena.shape[1]):
        room = layout.capacity_of(arena.shape[1])
        raise ValueError(f"an arena with room for {room} encoded tokens cannot hold {encoded}, of {tokens} in all")
    v = reference.views(arena, layout)
    for words in v.planes:
        if layout.packed:
            low, high = (0, 256) if words.dtype == torch.uint8 else (-(1 << 15), 1 << 15)
            words.random_(low, high)
        elif layout.codec.kind == "fp":
            words.view(torch.uint8).random_(0, 256).bitwise_and_(NO_NAN)
        else:
            words.normal_()
    if v.params is not None:
        unit = layout.codec.centre if layout.packed else 1.0
        v.params[..., 0].uniform_(0.5 / unit, 1.5 / unit)
        if layout.codec.zero_point:
            v.params[..., 1].normal_(0, OFFSET)
    v.sink.normal_()
    v.ring.normal_()
    v.header.zero_()
    v.header[..., LENGTH] = tokens
    v.header[..., ENCODED] = encoded


def handle(layout: Layout, batch: int, tokens: int, room: int, device: str, tag: Tag) -> CacheHandle:
    """A static cache tensor of a new arena with `tokens` of `room` tokens in it. One graph serves all sizes of it."""
    arena = reference.empty(batch, room, layout, device)
    if not isinstance(arena, FakeTensor):  # compiling ahead: see `warm`
        fill(arena, layout, tokens)
    track(arena, tag)
    return as_static(CacheHandle(arena, layout.key, room, static=True))


def as_static(h: CacheHandle) -> CacheHandle:
    """Its memory stays where it is, as CUDA graphs ask; its sizes may differ from call to call."""
    for t, length in ((h, 2), (h.arena, 1)):
        torch._dynamo.mark_static_address(t)
        torch._dynamo.maybe_mark_dynamic(t, length)
        if t.shape[0] > 1:
            torch._dynamo.maybe_mark_dynamic(t, 0)
    return h


def shell(config: Any, batch: int, tokens: int, room: int, like: Tensor, pairs: list[tuple[Layout, Layout]]) -> Any:
    """A transformers StaticCache in the state after `tokens` tokens whose tensors are of one token: they are to be
    replaced. like: a tensor of the model's dtype on its device."""
    from transformers import StaticCache

    cache: Any = StaticCache(config=config, max_cache_len=room)
    for layer, (k, v) in zip(cache.layers, pairs, strict=True):
        if getattr(layer, "is_sliding", False):
            raise NotImplementedError("a model with sliding windows: `kvc bench` fills caches of fixed length only")
        layer.max_cache_len = 1
        layer.lazy_initialization(
            like.new_empty(batch, k.heads, 1, k.channels), like.new_empty(batch, v.heads, 1, v.channels)
        )
        layer.max_cache_len = room
        layer.cumulative_length.fill_(tokens)
    return cache


def compressed(
    config: Any, pairs: list[tuple[Layout, Layout]], batch: int, tokens: int, room: int, like: Tensor
) -> Any:
    """A StaticCache that holds `tokens` tokens, compressed as `pairs` say."""
    cache = shell(config, batch, tokens, room, like, pairs)
    for i, (layer, (k, v)) in enumerate(zip(cache.layers, pairs, strict=True)):
        device = str(like.device)
        layer.keys = handle(k, batch, tokens, room, device, Tag("bench", i, "keys"))
        layer.values = handle(v, batch, tokens, room, device, Tag("bench", i, "values"))
    return cache


def plain(config: Any, pairs: list[tuple[Layout, Layout]], batch: int, tokens: int, room: int, like: Tensor) -> Any:
    """A StaticCache of the model's dtype that holds `tokens` tokens."""
    cache = shell(config, batch, tokens, room, like, pairs)
    for layer, (k, v) in zip(cache.layers, pairs, strict=True):
        for name, p in (("keys", k), ("values", v)):
            t = like.new_zeros(batch, p.heads, room, p.channels)
            t[:, :, :tokens].normal_()
            torch._dynamo.mark_static_address(t)
            setattr(layer, name, t)
    return cache
