"""What blocks of keys cost: KL divergence of SmolLM2's attention weights, keys rounded in one block shape or another.

    python benchmarks/key_blocks.py

768 tokens of Python's documentation; queries from the 128th on; the mean over layers, heads and queries, and the worst
layer. docs/spec.md quotes it where it says what `bits` stands for.
"""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from torch import Tensor

from kvc_compile.demo_model import load

TOKENS, SKIPPED = 768, 128
BLOCKS = ((32, 1), (1, 64), (1, 32), (1, 16))


def reading() -> list[tuple[Tensor, Tensor]]:
    """Queries [Hq, T, D] and keys [H, T, D] of every layer, after the rotary embedding."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    model, tokenizer = load()
    seen = []

    def look(module, q, k, v, *args, **kwargs):
        seen.append((q[0].float(), k[0].float()))
        return sdpa_attention_forward(module, q, k, v, *args, **kwargs)

    AttentionInterface.register("look", look)
    model.set_attn_implementation("look")
    ids = tokenizer(topics["attribute-access"] + topics["compound"], return_tensors="pt").input_ids[:, :TOKENS]
    with torch.no_grad():
        model(ids, use_cache=False)
    return seen


def rounded(k: Tensor, bits: int, tokens: int, channels: int) -> Tensor:
    """Affine codes with one scale and middle for each block."""
    blocks = k.unflatten(1, (-1, tokens)).unflatten(3, (-1, channels))
    low, high = blocks.amin((2, 4), keepdim=True), blocks.amax((2, 4), keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-20)
    return (((blocks - low) / step).round() * step + low).flatten(3).flatten(1, 2)


def divergence(q: Tensor, k: Tensor, other: Tensor) -> float:
    groups, hidden = len(q) // len(k), ~torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
    p, r = (
        (q @ x.repeat_interleave(groups, 0).transpose(1, 2) * q.shape[-1] ** -0.5)
        .masked_fill(hidden, -1e9)
        .log_softmax(-1)
        for x in (k, other)
    )
    return float((p.exp() * (p - r)).sum(-1)[:, SKIPPED:].mean())


def main() -> None:
    layers = reading()
    print("bits  block    mean KL  worst layer")
    for bits in (4, 2):
        for tokens, channels in BLOCKS:
            found = [divergence(q, k, rounded(k, bits, tokens, channels)) for q, k in layers]
            print(f"{bits:4}  [{tokens}, {channels}]".ljust(13), f"{sum(found) / len(found):9.4f}  {max(found):11.4f}")


if __name__ == "__main__":
    main()
