"""Attention of one query a sequence over a list of slots: what `select` chose is read, and nothing else.

The semantics are those of `kernels.select.step.attend`, the symbols those of `kernels.attend` and `kernels.codec`, and:

    slots       int64 [B, kv heads, C]: positions in any order, -1 for none
    C           slots of a head
    p           positions of the BN slots of a tile
    slot_b, slot_h   strides of `slots`
    live        which of them there are

Unlike a tile of `kernels.attend`, one of these has tokens from anywhere: each finds its own word, shift and scale. The
channels of a token lie together, so that loads are whole rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvc_compile.kernels.attend import BOOL_MASK, LOG2E, NO_MASK, cache_lengths, soft_step, with_sink
from kvc_compile.kernels.codec import (
    FP8,
    INT,
    exact_offset,
    fp8_value,
    load_params,
    plane_pointer,
    typed,
    word_rows,
)


@triton.jit
def fields_at(arena, h, N, i, ok, d, BITS: tl.constexpr, BEFORE: tl.constexpr, F: tl.constexpr):
    """One plane's bits of the body tokens i [BN] and channels d [DP], int32 [BN, DP]."""
    words = typed(plane_pointer(arena, h, N, BITS, BEFORE, F), tl.uint8 if F.word == 8 else tl.uint16)
    row, field = word_rows(i, BITS, F)
    live = ok[:, None] & (d < F.channels)[None, :]
    word = tl.load(words + (row * F.channels)[:, None] + d[None, :], mask=live, other=0).to(tl.int32)
    return (word >> (field * BITS)[:, None]) & ((1 << BITS) - 1)


@triton.jit
def body_at(arena, h, N, i, ok, d, DTYPE: tl.constexpr, F: tl.constexpr):
    """The decoded body tokens i [BN], fp32 [BN, DP]; unspecified where not ok."""
    if F.kind == INT:
        code = fields_at(arena, h, N, i, ok, d, F.low, 0, F)
        if F.high > 0:
            code = code | (fields_at(arena, h, N, i, ok, d, F.high, F.low, F) << F.low)
        x = code.to(tl.float32) - F.doubled * 0.5
    else:
        start = plane_pointer(arena, h, N, F.low, 0, F)
        cell = (i * F.channels)[:, None] + d[None, :]
        live = ok[:, None] & (d < F.channels)[None, :]
        if F.kind == FP8:
            x = fp8_value(tl.load(start + cell, mask=live, other=0))
        else:
            x = tl.load(typed(start, DTYPE) + cell, mask=live, other=0.0).to(tl.float32)
    if F.params > 0:
        scale, middle = load_params(arena, h, N, i, d, ok, F)
        x = x * scale
        if F.params == 2:
            x = x + middle
    return x


@triton.jit
def tokens_at(arena, new, stride, h, N, length, encoded, p, live, d, F: tl.constexpr):
    """The tokens at positions p [BN], each anywhere: sink, body, ring, or new from `length` on; fp32 [BN, DP], 0 where
    there is none."""
    DTYPE: tl.constexpr = new.dtype.element_ty
    real = (d < F.channels)[None, :]
    i = p - F.sink
    body = live & (i >= 0) & (i < encoded)
    fresh = live & (p >= length)
    source = new + (p - length).to(tl.int64) * stride
    x = tl.load(source[:, None] + d[None, :], mask=fresh[:, None] & real, other=0.0).to(tl.float32)
    if F.sink + F.recent > 0:
        exact = live & (p < length) & (~body)
        stored = typed(arena, DTYPE) + exact_offset(h, p, F)
        x += tl.load(stored[:, None] + d[None, :], mask=exact[:, None] & real, other=0.0).to(tl.float32)
    y = body_at(arena, h, N, i, body, d, DTYPE, F)
    return tl.where(body[:, None] & real, y, x)


@triton.jit(
    do_not_specialize=["NK", "NV", "C", "S", "shown", "width", "mask_b", "mask_h", "mask_p", "slot_b", "slot_h"]
)
def attend_slots(
    q, k_new, v_new, mask, slots, sinks, positions, out, lse, k_data, v_data, scale, C, S, shown, NK, NV, k_row, v_row,
    width, q_b, q_h, k_b, k_h, v_b, v_h, mask_b, mask_h, mask_p, slot_b, slot_h,
    G: tl.constexpr, MASK: tl.constexpr, PLACED: tl.constexpr, DIRECT: tl.constexpr, CAP: tl.constexpr,
    SINKS: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DOT: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Program: (split of the slots, batch row and kv head). Arguments and results as those of `attend.attend_split`,
    for one query."""
    split = tl.program_id(0)
    b, h = tl.program_id(1) // K.heads, tl.program_id(1) % K.heads
    b, h = b.to(tl.int64), h.to(tl.int64)
    g = tl.arange(0, BM)
    live = g < G
    k_arena, v_arena = k_data + b * k_row, v_data + b * v_row
    k_new += b * k_b + h * k_h
    v_new += b * v_b + h * v_h
    length, k_encoded, v_encoded, fault = cache_lengths(k_arena, v_arena, h, positions, PLACED, K, V)
    total = length + 1
    hidden = 0
    if WINDOW:
        hidden = tl.maximum(length - shown, 0)
    if MASK != NO_MASK:
        fault = fault | (width + hidden < total)
    mask_rows = mask + b * mask_b + (h * G + tl.minimum(g, G - 1)) * mask_h

    dk, dv = tl.arange(0, DK), tl.arange(0, DV)
    at = q + b * q_b + (h * G + g) * q_h
    x = tl.load(at[:, None] + dk[None, :], mask=live[:, None] & (dk < K.channels)[None, :], other=0.0).to(DOT)
    m = tl.full([BM], float("-inf"), tl.float32)  # times LOG2E
    mass = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DV], tl.float32)

    slots += b * slot_b + h * slot_h
    share = ((C + BN - 1) // BN + S - 1) // S * BN
    for start in tl.range(split * share, tl.minimum(split * share + share, C), BN, num_stages=1):
        c = start + tl.arange(0, BN)
        p = tl.load(slots + c, mask=c < C, other=-1).to(tl.int32)
        there = (p >= hidden) & (p < total)
        k = tokens_at(k_arena, k_new, 0, h, NK, length, k_encoded, p, there, dk, K)
        v = tokens_at(v_arena, v_new, 0, h, NV, length, v_encoded, p, there, dv, V)
        seen = live[:, None] & there[None, :]
        bias = tl.zeros([BM, BN], tl.float32)
        if MASK != NO_MASK:
            column = (p - hidden).to(tl.int64) * mask_p
            cell = tl.load(mask_rows[:, None] + column[None, :], mask=seen, other=0)
            if MASK == BOOL_MASK:
                seen = seen & (cell != 0)
            else:
                bias = cell.to(tl.float32)
        m, mass, acc = soft_step(x, k, v, seen, bias, scale, m, mass, acc, CAP, False, DOT)

    if SINKS:
        share_of = tl.load(sinks + h * G + tl.minimum(g, G - 1)).to(tl.float32) * LOG2E
        m, mass, decay = with_sink(share_of, split, m, mass)
        acc *= decay[:, None]
    nothing = mass == 0
    acc = tl.where(nothing[:, None], 0.0, acc / tl.where(nothing, 1.0, mass)[:, None]) + tl.where(
        fault, float("nan"), 0.0
    )
    real = live[:, None] & (dv < V.channels)[None, :]
    row = tl.program_id(1).to(tl.int64) * G + g
    if DIRECT:
        tl.store(out + row[:, None] * V.channels + dv[None, :], acc.to(out.dtype.element_ty), mask=real)
    else:
        row += split * tl.num_programs(1).to(tl.int64) * G
        tl.store(out + row[:, None] * V.channels + dv[None, :], acc, mask=real)
        weight = tl.where(nothing, float("-inf"), m / LOG2E + tl.log(tl.where(nothing, 1.0, mass)))
        tl.store(lse + row, tl.where(fault, 0.0, weight), mask=live)
