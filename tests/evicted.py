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


class HeavyHitters:
    """An attention that keeps, in each head, the first `sink`, the newest recent(n) and, of the others, the budget(n)
    tokens that received most (H2O), of the n that were seen; without `scores` the newest (a window). Written for one
    query at a time after the prompt, with Python sets; rows are not padded."""

    def __init__(self, sink, recent, budget, scores=True):
        self.sink, self.recent, self.budget, self.scores = sink, recent, budget, scores
        self.kept, self.total = {}, {}

    def evict(self, key, n):
        kept = sorted(self.kept[key])
        body = [t for t in kept if t >= self.sink][: max(0, len(kept) - self.sink - self.recent(n))]
        best = sorted(body, key=lambda t: (-(self.total[key][t] if self.scores else t), t))[: self.budget(n)]
        self.kept[key] = (set(kept) - set(body)) | set(best)

    def __call__(self, module, q, k, v, mask, *args, scaling=None, **kwargs):
        batch, queries, n, _ = q.shape
        heads, tokens = k.shape[1], k.shape[2]
        tokens = (
            tokens if mask is None else int((mask[0, 0, -1] > -1).sum() if mask.dtype == torch.bool else 0) or tokens
        )
        out = torch.zeros(*q.shape[:3], v.shape[-1])
        for b in range(batch):
            for h in range(heads):
                key = module.layer_idx, b, h
                if n > 1:
                    self.kept[key], self.total[key], tokens = set(range(n)), dict.fromkeys(range(n), 0.0), n
                else:
                    self.kept[key].add(tokens - 1)
                    self.total[key][tokens - 1] = 0.0
                slots = sorted(self.kept[key])
                for g in range(queries // heads):
                    row = q[b, h * (queries // heads) + g]
                    s = row @ k[b, h, slots].T * (scaling or q.shape[-1] ** -0.5)
                    if n > 1:
                        s = s.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
                    p = s.softmax(-1)
                    out[b, h * (queries // heads) + g] = p @ v[b, h, slots]
                    for t, x in zip(slots, (p.sum(0) / (queries // heads)).tolist(), strict=True):
                        self.total[key][t] += x
                self.evict(key, tokens)
        return out.transpose(1, 2), None

    def positions(self, layer):
        rows = {}
        for (i, b, h), kept in self.kept.items():
            if i == layer:
                rows.setdefault(b, {})[h] = sorted(kept)
        return [[row[h] for h in sorted(row)] for _, row in sorted(rows.items())]
