"""A tile of the body for the decoding kernel: whole, and multiplied as it is packed. Symbols: `kernels.decode`."""

from __future__ import annotations

import triton
import triton.language as tl

from kvc_compile.kernels.attend import LOG2E, NO_MASK, capped
from kvc_compile.kernels.codec import FP8, INT, RAW, params_pointer, plane_pointer, typed
from kvc_compile.kernels.facts import (
    BLANK,
    begins_block,
    biased,
    block_of,
    boost,
    by_token,
    pair_of,
    span,
    surplus_of,
)
from kvc_compile.kernels.unpack import field, shifted


@triton.jit
def load_pairs(start, cell, block, F: tl.constexpr):
    """Scales and middles as they are stored, `cell` behind those of a block: int32 pairs, or fp16 scales alone."""
    if F.params == 2:
        return tl.load((typed(start, tl.int32) + cell) + block * F.groups)
    else:
        return tl.load((typed(start, tl.float16) + cell) + block * F.groups)


@triton.jit
def split_pairs(stored, F: tl.constexpr):
    """(scale, middle) fp16; the middle is 0 where there is none."""
    if F.params == 2:
        scale, middle = pair_of(stored)
    else:
        scale, middle = stored, tl.zeros_like(stored)
    return scale, middle


@triton.jit
def load_plane(
    arena, h, N, tile, c, BITS: tl.constexpr, BEFORE: tl.constexpr, BT: tl.constexpr, TP: tl.constexpr,
    ACROSS: tl.constexpr, ELEMENT: tl.constexpr, ASM: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """The stored words of one plane for a tile and channels c [C]: a tuple of [TP, C].

    ACROSS: of [C, TP] instead.
    """
    SPAN: tl.constexpr = span(BITS, F)
    start = plane_pointer(arena, h, N, BITS, BEFORE, F)
    if F.kind == INT:
        words = typed(start, tl.uint16)
    elif F.kind == FP8:
        words = start
    else:
        words = typed(start, ELEMENT)
    PER: tl.constexpr = SPAN // 16 if SPAN < BT else BT // TP  # parts that one load holds
    r = tl.arange(0, TP)
    # what a thread loads of a tile, and the tile: the first does not change from tile to tile
    cell = r[None, :] * F.channels + c[:, None] if ACROSS else r[:, None] * F.channels + c[None, :]
    out = ()
    for a in tl.static_range((BT // TP) // PER):
        if SPAN > BT:  # the fields of this tile come first
            x = tl.load((words + cell) + tile // (SPAN // BT) * (16 * F.channels))
            x = shifted(x, tile % (SPAN // BT) * (BT // 16 * BITS), ASM)
        else:
            x = tl.load((words + cell) + (tile * (BT // SPAN * 16 * F.channels) + a * TP * F.channels))
        out = out + (x,)
    return out


@triton.jit
def load_high(
    arena, h, N, tile, c, BT: tl.constexpr, TP: tl.constexpr, ACROSS: tl.constexpr, ELEMENT: tl.constexpr,
    ASM: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """`load_plane` of the second plane; nothing where there is none."""
    if F.high > 0:
        return load_plane(arena, h, N, tile, c, F.high, F.low, BT, TP, ACROSS, ELEMENT, ASM, F)
    else:
        return ()


@triton.jit
def part(
    low, high, j: tl.constexpr, BIASED: tl.constexpr, BT: tl.constexpr, TP: tl.constexpr, ASM: tl.constexpr,
    WIDE: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Part j of the loads of one tile: centred codes, or stored numbers, as an operand."""
    if F.kind == INT:
        SPAN: tl.constexpr = span(F.low, F)
        PER: tl.constexpr = SPAN // 16 if SPAN < BT else BT // TP
        x = field(low[j // PER], j % PER, F.low, 1, BIASED, ASM)
        if F.high > 0:
            HIGH: tl.constexpr = span(F.high, F)
            PER_HIGH: tl.constexpr = HIGH // 16 if HIGH < BT else BT // TP
            x += field(high[j // PER_HIGH], j % PER_HIGH, F.high, 1 << F.low, BIASED, ASM)
        return x
    elif F.kind == FP8:
        return low[j].to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        return low[j].to(WIDE)


@triton.jit
def token_index(j: tl.constexpr, BT: tl.constexpr, TP: tl.constexpr):
    """The tokens of part j within the tile, row by row."""
    r = tl.arange(0, TP)
    return r // 16 * (BT // (TP // 16)) + j * 16 + r % 16


@triton.jit
def beside(scores, less, sumq, j: tl.constexpr, BT: tl.constexpr, TP: tl.constexpr, F: tl.constexpr):
    """The scores of part j, of codes alone, with what is beside them: the products of the middles, and less what biased
    codes are too large by."""
    if F.params == 2:
        scores += less[block_of(F, j * 16)]
    if biased(F):
        scores -= surplus_of(F, j, BT, TP) * sumq[block_of(F, j * 16)]
    return scores


@triton.jit
def body_tile(
    tile, k_arena, v_arena, h, NK, NV, mask_rows, mask_p, live, first, end, q, factor, sums, m, mass, sides, acc,
    MASK: tl.constexpr, CAP: tl.constexpr, BT: tl.constexpr, TP: tl.constexpr, CK: tl.constexpr, CV: tl.constexpr,
    BM: tl.constexpr, ASM: tl.constexpr, ELEMENT: tl.constexpr, WIDE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """One whole tile of the body: the new (m, mass, sides, acc). MASK: none, or one that is added."""
    J: tl.constexpr = BT // TP
    KC: tl.constexpr = K.channels // CK
    VC: tl.constexpr = V.channels // CV
    ck, cv = tl.arange(0, CK), tl.arange(0, CV)
    k_low, k_high, v_low, v_high = (), (), (), ()
    i0 = tile * BT
    for a in tl.static_range(KC):
        c = a * CK + ck
        k_low = k_low + (load_plane(k_arena, h, NK, tile, c, K.low, 0, BT, TP, False, ELEMENT, ASM, K),)
        k_high = k_high + (load_high(k_arena, h, NK, tile, c, BT, TP, False, ELEMENT, ASM, K),)
    for a in tl.static_range(VC):
        c = a * CV + cv
        v_low = v_low + (load_plane(v_arena, h, NV, tile, c, V.low, 0, BT, TP, True, ELEMENT, ASM, V),)
        v_high = v_high + (load_high(v_arena, h, NV, tile, c, BT, TP, True, ELEMENT, ASM, V),)
    if K.params > 0:
        k_params = params_pointer(k_arena, h, NK, K)
    if V.params > 0:
        v_params = params_pointer(v_arena, h, NV, V)

    s, less, sumq = (), (), ()
    for j in tl.static_range(J):
        s = s + (tl.zeros([TP, BM], tl.float32),)
        if begins_block(K, j * 16):
            less, sumq = less + (tl.zeros([TP, BM], tl.float32),), sumq + (tl.zeros([TP, BM], tl.float32),)
    for a in tl.static_range(KC):
        scores, new_less, new_sumq, scaled = (), (), (), q[a]
        for j in tl.static_range(J):
            if begins_block(K, j * 16):
                stored = load_pairs(k_params, (a * CK + ck) // K.c, (i0 + j * 16) // K.t, K)
                scale, middle = split_pairs(stored, K)
                scaled = q[a] * scale[:, None]
                # products of equal rows: each thread has what its scores need, and no row is looked for
                if K.params == 2:
                    y = tl.broadcast_to(middle[None, :], [TP, CK])
                    new_less = new_less + (tl.dot(y, q[a], less[block_of(K, j * 16)]),)
                if biased(K):
                    y = tl.full([TP, CK], 1.0, tl.float16)
                    new_sumq = new_sumq + (tl.dot(y, scaled, sumq[block_of(K, j * 16)]),)
            x = part(k_low[a], k_high[a], j, biased(K), BT, TP, ASM, WIDE, K)
            if by_token(K):
                t = token_index(j, BT, TP)
                scale, middle = split_pairs(load_pairs(k_params, t * K.groups + a * CK // K.c, i0, K), K)
                x = s[j] + tl.dot(x, scaled) * scale.to(tl.float32)[:, None]
                if K.params == 2:
                    x += sums[a][None, :] * middle.to(tl.float32)[:, None]
            elif KC == 1 and begins_block(K, 0):
                x = tl.dot(x, scaled, beside(s[j], new_less, new_sumq, j, BT, TP, K))
            else:
                x = tl.dot(x, scaled, s[j])
            scores = scores + (x,)
        s = scores
        if K.params == 2:
            less = new_less
        if biased(K):
            sumq = new_sumq
    scores = ()
    for j in tl.static_range(J):
        t = token_index(j, BT, TP)
        x = s[j]
        if KC > 1 and begins_block(K, 0):
            x = beside(x, less, sumq, j, BT, TP, K)
        x = x * factor[None, :]
        x = capped(x, CAP * LOG2E)
        if MASK != NO_MASK:
            p = i0 + t + K.sink
            cell = tl.load(mask_rows[None, :] + p.to(tl.int64)[:, None] * mask_p, mask=live[None, :], other=0)
            seen = (p[:, None] >= first[None, :]) & (p[:, None] < end[None, :])
            x = tl.where(seen, x + tl.maximum(cell.to(tl.float32), BLANK) * LOG2E, BLANK)
        scores = scores + (x,)
    s = scores

    top = s[0]
    for j in tl.static_range(1, J):
        top = tl.maximum(top, s[j])
    top = tl.maximum(m, tl.max(top, 0))
    decay = tl.exp2(m - top)
    mass = mass * decay[None, :]
    p = ()
    for j in tl.static_range(J):
        y = tl.exp2(s[j] - top[None, :])
        if MASK != NO_MASK:
            y = tl.where(s[j] > BLANK / 2, y, 0.0)
        mass += y
        p = p + (y,)

    new_sides, new_acc, weights = (), (), p
    for a in tl.static_range(VC):
        if by_token(V):
            if a * CV % V.c == 0:  # a new group of channels begins
                weights = ()
                side = sides[a * CV // V.c] * decay[None, :]
                for j in tl.static_range(J):
                    t = token_index(j, BT, TP)
                    scale, middle = split_pairs(load_pairs(v_params, t * V.groups + a * CV // V.c, i0, V), V)
                    if V.params == 2:
                        side += p[j] * middle.to(tl.float32)[:, None]
                    weights = weights + ((p[j] * (scale.to(tl.float32) * boost(V))[:, None]).to(tl.float16),)
                new_sides = new_sides + (side,)
        elif a == 0:
            weights = ()
            for j in tl.static_range(J):
                weights = weights + (p[j].to(WIDE if V.kind == RAW else tl.float16),)
        o = acc[a] * decay[None, :]
        for j in tl.static_range(J):
            o = tl.dot(part(v_low[a], v_high[a], j, False, BT, TP, ASM, WIDE, V), weights[j], o)
        new_acc = new_acc + (o,)
    return top, mass, new_sides, new_acc
