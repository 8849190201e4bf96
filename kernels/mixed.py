"""Tokens of any kind for the decoding kernel: sinks, ring, new ones, and those of the body next to them.

Symbols: `kernels.decode`. All loads of a tile come before all that is done with them: what a tile costs is latency.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvc_compile.kernels.attend import BOOL_MASK, LOG2E, NO_MASK, capped
from kvc_compile.kernels.codec import FP8, INT, RAW, exact_offset, params_pointer, plane_pointer, typed
from kvc_compile.kernels.facts import BLANK, boost, by_token, pair_of, shrink_of, span
from kvc_compile.kernels.unpack import field, shifted


@triton.jit
def exact_rows(h, p0, MIX: tl.constexpr, F: tl.constexpr):
    """`codec.exact_offset` of the positions p0 .. p0+MIX-1, with one division for all."""
    r = tl.arange(0, MIX)
    p = p0 + r
    if F.recent >= MIX:
        slot = ((p0 - F.sink) % F.recent + F.recent) % F.recent + r
        slot = tl.where(slot >= F.recent, slot - F.recent, slot)
        sink = F.sink_offset // F.item + (h * F.sink + p) * F.channels
        ring = F.ring_offset // F.item + (h * F.recent + slot) * F.channels
        return tl.where(p < F.sink, sink, ring)
    else:
        return exact_offset(h, p, F)


@triton.jit
def load_mixed(
    arena, new, stride, h, N, length, encoded, total, p0, c, MIX: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """What is stored of the tokens at the positions p0 .. p0+MIX-1 and channels c [C]: (x, low, high) of [MIX, C].

    x: the numbers of those that are not encoded, 0 for the others; low and high: the words of the planes of those that
    are, or the numbers again where there is no such plane.
    """
    ELEMENT: tl.constexpr = new.dtype.element_ty
    p = p0 + tl.arange(0, MIX)
    i = p - F.sink
    body = (i >= 0) & (i < encoded)
    stored = typed(arena, ELEMENT) + exact_rows(h, p0, MIX, F)
    if F.kind == RAW:
        plane = typed(plane_pointer(arena, h, N, F.low, 0, F), ELEMENT)
        stored = tl.where(body, plane + i * F.channels, stored)
    source = tl.where(p < length, stored, new + (p - length).to(tl.int64) * stride)
    if F.channels * F.item % 16 == 0:
        source = tl.multiple_of(source, 16)
    live = (p >= 0) & (p < total)
    if F.kind != RAW:
        live = live & (~body)
    x = tl.load(source[:, None] + c[None, :], mask=live[:, None], other=0.0)
    low, high = x, x
    if F.kind == INT:
        low = packed_rows(arena, h, N, p0 - F.sink, body, c, F.low, 0, MIX, F)
        if F.high > 0:
            high = packed_rows(arena, h, N, p0 - F.sink, body, c, F.high, F.low, MIX, F)
    elif F.kind == FP8:
        start = plane_pointer(arena, h, N, F.low, 0, F)
        low = tl.load(start + (i * F.channels)[:, None] + c[None, :], mask=body[:, None], other=0)
    return x, low, high


@triton.jit
def packed_rows(arena, h, N, i0, body, c, BITS: tl.constexpr, BEFORE: tl.constexpr, MIX: tl.constexpr, F: tl.constexpr):
    """The words of one plane that hold the body tokens i0 .. i0+MIX-1, i0 a multiple of MIX = 16."""
    SPAN: tl.constexpr = span(BITS, F)
    words = typed(plane_pointer(arena, h, N, BITS, BEFORE, F), tl.uint16)
    row = i0 // SPAN * 16 + tl.arange(0, MIX)
    return tl.load(words + (row * F.channels)[:, None] + c[None, :], mask=body[:, None], other=0)


@triton.jit
def operand(
    stored, p0, encoded, MIX: tl.constexpr, WIDE: tl.constexpr, SHRINK: tl.constexpr, ASM: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    """What `load_mixed` loaded as an operand [MIX, C]: codes, and exact numbers times SHRINK."""
    x = stored[0]
    if F.kind == RAW:
        return x.to(WIDE)
    else:
        if x.dtype != tl.float16:
            x = (x.to(tl.float32) * SHRINK).to(tl.float16)
        i0 = p0 - F.sink
        i = i0 + tl.arange(0, MIX)
        body = (i >= 0) & (i < encoded)
        if F.kind == INT:
            LOW: tl.constexpr = span(F.low, F)
            y = field(shifted(stored[1], i0 % LOW // 16 * F.low, ASM), 0, F.low, 1, False, ASM)
            if F.high > 0:
                HIGH: tl.constexpr = span(F.high, F)
                word = shifted(stored[2], i0 % HIGH // 16 * F.high, ASM)
                y += field(word, 0, F.high, 1 << F.low, False, ASM)
        else:
            y = stored[1].to(tl.float8e4nv, bitcast=True).to(tl.float16)
            if F.params == 0:
                y = y * SHRINK
        return x + y * body.to(tl.float16)[:, None]  # a selection: one of the two is 0


@triton.jit
def load_token_pairs(arena, h, N, p0, encoded, group, MIX: tl.constexpr, F: tl.constexpr):
    """The scales, and middles, that belong to the tokens from position p0 on, as they are stored: [MIX]."""
    i = p0 - F.sink + tl.arange(0, MIX)
    body = (i >= 0) & (i < encoded)
    start = params_pointer(arena, h, N, F)
    if F.params == 2:
        return tl.load(typed(start, tl.int32) + i * F.groups + group, mask=body, other=0)
    else:
        return tl.load(typed(start, tl.float16) + i * F.groups + group, mask=body, other=0.0)


@triton.jit
def token_pairs(stored, p0, encoded, OTHER: tl.constexpr, MIX: tl.constexpr, F: tl.constexpr):
    """fp32 scale and middle [MIX] from those; OTHER and 0 for tokens that are not encoded."""
    i = p0 - F.sink + tl.arange(0, MIX)
    body = (i >= 0) & (i < encoded)
    if F.params == 2:
        scale, middle = pair_of(stored)
        return tl.where(body, scale.to(tl.float32), OTHER), middle.to(tl.float32)
    else:
        return tl.where(body, stored.to(tl.float32), OTHER), tl.zeros([MIX], tl.float32)


@triton.jit
def mixed_tile(
    p0, k_arena, v_arena, k_new, v_new, k_stride, v_stride, mask_rows, mask_p, live, first, end, h, NK, NV,
    length, k_encoded, v_encoded, total, i, q, factor, sums, m, mass, sides, acc,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, MIX: tl.constexpr,
    CK: tl.constexpr, CV: tl.constexpr, BM: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr,
):  # fmt: skip
    """MIX tokens from position p0 on, wherever they lie: the new (m, mass [BM], sides of [BM], acc)."""
    KC: tl.constexpr = K.channels // CK
    VC: tl.constexpr = V.channels // CV
    SHRINK: tl.constexpr = shrink_of(k_new.dtype.element_ty, K)
    ck, cv = tl.arange(0, CK), tl.arange(0, CV)
    p = p0 + tl.arange(0, MIX)
    seen = ((p >= 0) & (p < total))[:, None] & live[None, :]
    if MASK != NO_MASK or WINDOW:
        seen = seen & (p[:, None] >= first[None, :]) & (p[:, None] < end[None, :])
    if MASK != NO_MASK:
        cell = tl.load(mask_rows[None, :] + p.to(tl.int64)[:, None] * mask_p, mask=seen, other=0)
    k, v, k_pairs, v_pairs = (), (), (), ()
    # a block of keys with a scale covers the tile, so that all of it is encoded, or nothing
    at = p0 + ck * 0
    real = (at + MIX > K.sink) & (at < K.sink + k_encoded)
    for a in tl.static_range(KC):
        c = a * CK + ck
        k = k + (load_mixed(k_arena, k_new, k_stride, h, NK, length, k_encoded, total, p0, c, MIX, K),)
        if by_token(K):
            k_pairs = k_pairs + (load_token_pairs(k_arena, h, NK, p0, k_encoded, a * CK // K.c, MIX, K),)
        elif K.params > 0:
            start = params_pointer(k_arena, h, NK, K)
            where = c // K.c + (p0 - K.sink) // K.t * K.groups
            if K.params == 2:
                k_pairs = k_pairs + (tl.load(typed(start, tl.int32) + where, mask=real, other=0),)
            else:
                k_pairs = k_pairs + (tl.load(typed(start, tl.float16) + where, mask=real, other=0.0),)
    for a in tl.static_range(VC):
        c = a * CV + cv
        v = v + (load_mixed(v_arena, v_new, v_stride, h, NV, length, v_encoded, total, p0, c, MIX, V),)
        if by_token(V) and a * CV % V.c == 0:
            v_pairs = v_pairs + (load_token_pairs(v_arena, h, NV, p0, v_encoded, a * CV // V.c, MIX, V),)

    s = tl.zeros([MIX, BM], tl.float32)
    less = tl.zeros([BM], tl.float32)
    for a in tl.static_range(KC):
        x = operand(k[a], p0, k_encoded, MIX, WIDE, SHRINK, ASM, K)
        if by_token(K):
            scale, middle = token_pairs(k_pairs[a], p0, k_encoded, 1.0 / SHRINK, MIX, K)
            s += tl.dot(x, q[a]) * scale[:, None]
            if K.params == 2:
                s += sums[a][None, :] * middle[:, None]
        elif K.params > 0:
            if K.params == 2:
                scale, middle = pair_of(k_pairs[a])
                less += tl.max(tl.dot(tl.broadcast_to(middle[None, :], [16, CK]), q[a]), 0)
            else:
                scale = k_pairs[a]
            s = tl.dot(x, q[a] * tl.where(real, scale, 1.0 / SHRINK)[:, None], s)
        else:
            s = tl.dot(x, q[a], s)
    if by_token(K):
        s = s * factor[None, :]
    elif K.params > 0:
        s = (s + less[None, :]) * factor[None, :]
    else:
        s = s * (factor * (1.0 / SHRINK))[None, :]
    s = capped(s, CAP * LOG2E)
    if MASK == BOOL_MASK:
        seen = seen & (cell != 0)
    elif MASK != NO_MASK:
        s += tl.maximum(cell.to(tl.float32), BLANK) * LOG2E
    elif CAUSAL:
        seen = seen & (p[:, None] <= length + i[None, :])
    s = tl.where(seen, s, BLANK)
    top = tl.maximum(m, tl.max(s, 0))
    decay = tl.exp2(m - top)
    y = tl.where(s > BLANK / 2, tl.exp2(s - top[None, :]), 0.0)
    mass = mass * decay + tl.sum(y, 0)
    new_sides, new_acc = (), ()
    weight = y.to(WIDE if V.kind == RAW else tl.float16)
    for a in tl.static_range(VC):
        if by_token(V):
            if a * CV % V.c == 0:
                scale, middle = token_pairs(v_pairs[a * CV // V.c], p0, v_encoded, 1.0, MIX, V)
                weight = (y * (scale * boost(V))[:, None]).to(tl.float16)
                new_sides = new_sides + (sides[a * CV // V.c] * decay + tl.sum(y * middle[:, None], 0),)
        x = operand(v[a], p0, v_encoded, MIX, WIDE, 1.0, ASM, V)
        new_acc = new_acc + (tl.dot(tl.trans(x), weight, acc[a] * decay[None, :]),)
    return top, mass, new_sides, new_acc
