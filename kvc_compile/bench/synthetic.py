"""Caches that are full without a prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kvc_compile.handle import CacheHandle, Tag, track
from kvc_compile.kernels import reference
from kvc_compile.layout import Layout
from kvc_compile.lowering.synthetic import fill


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
