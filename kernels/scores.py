"""What an index that a cache holds says of every token: one pass over its few bytes.

The semantics are those of `kernels.select.held.compare`, with the new token's sketch in slot L.

    query       what a query compares: int32 [B, H, G, WORDS], its hash codes, or fp32 [B, H, G, R], some channels
    known       what the cache holds: int32 [B, H, T, WORDS], or the model's dtype [B, H, T, R]
    new         the same of the new token, [B, H, WORDS or R]
    length      int64 []: its slot L
    out         fp32 [B, H, T] of hashes, over the query heads of a group; fp32 [B, H, G, T] of channels
    T, G        slots; query heads of a kv head
    HEADS       kv heads
    WORDS, R    words of a hash; channels of an index
    RP          R rounded up to a power of two
    BT          slots of a program
    HOW         over the query heads of a group: 0 the mean, 1 the sum, 2 the maximum
    ASM         whether there is inline assembly, which the interpreter lacks
    known_b, known_h, known_t   strides of `known`
    p           slots of a tile;  x  their words
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ones(x, ASM: tl.constexpr):
    """How many bits of int32 x are set."""
    if ASM:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    else:
        x = x.to(tl.int64) & 0xFFFFFFFF
        x = x - ((x >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F
        return ((x * 0x01010101) >> 24 & 0xFF).to(tl.int32)


@triton.jit(do_not_specialize=["T", "known_b", "known_h"])
def hash_scores(
    query, known, new, length, out, T, known_b, known_h, known_t, G: tl.constexpr, HEADS: tl.constexpr,
    WORDS: tl.constexpr, BT: tl.constexpr, HOW: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Bits that agree, for BT slots of a head. Program: (tile, batch row and kv head)."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // HEADS, bh % HEADS
    p = tl.program_id(0) * BT + tl.arange(0, BT)
    fresh = p == tl.load(length).to(tl.int32)
    rows = tl.where(fresh, new + bh * WORDS, known + b * known_b + h * known_h + p.to(tl.int64) * known_t)
    x, best = (), tl.full([BT], 0 if HOW < 2 else -1, tl.int32)
    for w in tl.static_range(WORDS):
        x = x + (tl.load(rows + w, mask=p < T, other=0),)
    for g in tl.static_range(G):
        same = tl.full([BT], 32 * WORDS, tl.int32)
        for w in tl.static_range(WORDS):
            same -= ones(x[w] ^ tl.load(query + (bh * G + g) * WORDS + w), ASM)
        best = tl.maximum(best, same) if HOW == 2 else best + same
    score = best.to(tl.float32)
    if HOW == 0:
        score = score / G
    tl.store(out + bh * T + p, score, mask=p < T)


@triton.jit(do_not_specialize=["T", "known_b", "known_h"])
def channel_scores(
    query, known, new, length, out, T, known_b, known_h, known_t, G: tl.constexpr, HEADS: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Products with some channels, for BT slots of a head. Program: (tile, batch row and kv head)."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // HEADS, bh % HEADS
    p = tl.program_id(0) * BT + tl.arange(0, BT)
    r = tl.arange(0, RP)
    fresh = p == tl.load(length).to(tl.int32)
    rows = known + b * known_b + h * known_h + p.to(tl.int64) * known_t
    real = (r < R)[None, :]
    x = tl.load(rows[:, None] + r[None, :], mask=((p < T) & (~fresh))[:, None] & real, other=0.0).to(tl.float32)
    y = tl.load(new + bh * R + r, mask=r < R, other=0.0).to(tl.float32)
    x = tl.where(fresh[:, None], y[None, :], x)
    for g in tl.static_range(G):
        q = tl.load(query + (bh * G + g) * R + r, mask=r < R, other=0.0)
        tl.store(out + (bh * G + g) * T + p, tl.sum(x * q[None, :], 1), mask=p < T)
