"""What the tests of caches that evict share: what a compiled model's cache holds, what a model's attention saw, and a
model that hides from itself what should be gone."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvc_compile.kernels import reference
from kvc_compile.kernels.keep.slots import positions_of
from kvc_compile.lowering import cpu


def held(layer, new: int = 0) -> list[list[list[int]]]:
    """The positions that a layer of a cache holds, ascending, by row and head; without the `new` last ones."""
    arena, layout = layer.keys.arena, layer.keys.stored
    place = positions_of(reference.views(arena, layout), cpu.length(arena, layout), 0)
    end = cpu.length(arena, layout) + cpu.evicted(arena, layout) - new
    return [[sorted(p for p in head if 0 <= p < end) for head in row] for row in place.tolist()]


@contextmanager
def attending(model, name, function):
    """The model's attention is `function` meanwhile."""
    before = model.config._attn_implementation
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def seen(model, ids, mask=None):
    """[(q, k, v)] of each layer, [B, heads, n, D], as its attention gets them."""
    found = []

    def capture(module, q, k, v, *args, **kwargs):
        found.append((q.clone(), k.clone(), v.clone()))
        return sdpa_attention_forward(module, q, k, v, *args, **kwargs)

    with attending(model, "capture", capture):
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return found


def hiding(gone):
    """An attention that hides gone[layer][row][head], sets of positions, from single queries."""

    def attention(module, q, k, v, mask, *args, scaling=None, **kwargs):
        if q.shape[2] > 1:
            return sdpa_attention_forward(module, q, k, v, mask, *args, scaling=scaling, **kwargs)
        groups = q.shape[1] // k.shape[1]
        s = q @ repeat_kv(k, groups).mT * (scaling or q.shape[-1] ** -0.5)
        if mask is not None:
            m = mask[..., : k.shape[2]]
            s = s.masked_fill(~m, -torch.inf) if m.dtype == torch.bool else s + m
        for b, row in enumerate(gone[module.layer_idx]):
            for h, positions in enumerate(row):
                s[b, h * groups : (h + 1) * groups, :, sorted(positions)] = -torch.inf
        return (s.softmax(-1) @ repeat_kv(v, groups)).transpose(1, 2), None

    return attention
