"""Attention of a few queries over a compressed cache: decoding, at the speed of memory.

The semantics and the symbols are those of `kernels.attend`. What differs is the shape of the work:

    columns     query rows are the columns of a tile, BM of them, so that a group of 8 query heads or fewer costs no
                padding:  scores [tokens, BM] = K q^T,  acc [channels, BM] = V^T p^T
    packed      a tile of packed words goes to the tensor core's operand layout as it is; unpacking is one shift, one
                lop3 and one subtraction for two codes (`kernels.unpack`)
    folded      scales and middles never touch the codes:  q' = q * scale of a channel,  p' = p * scale of a token,
                and the middles enter as  q . middle  and  sum of p * middle

    SPAN        tokens that a row group of 16 words of a plane holds
    BT          tokens of a body tile, which begins at body token BT * tile
    TP, J       tokens of a part of it, one operand of the tensor core; J = BT / TP parts. Part j is field j of words
    CK, CV      channels of a chunk of keys and of values: a power of two that divides D and every channel group
    MIX         tokens of a tile of what is not body: sinks, ring, new tokens, and body tokens next to those

A split takes a share of the body tiles, which are whole and visible to all queries, and every S-th of the MIX tiles.
Body tiles read the mask only where it has holes or adds something.

`bounds` int32 [b, h, n, 3] sums up a mask (`lowering.bounds`): the first position that a query sees, one past the last,
and whether it sees all between them with nothing added.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvc_compile.kernels.attend import BOOL_MASK, LOG2E, NO_MASK, cache_lengths
from kvc_compile.kernels.codec import (
    FP8,
    INT,
    RAW,
    exact_offset,
    params_pointer,
    plane_pointer,
    typed,
)
from kvc_compile.kernels.unpack import field, shifted, surplus

BLANK = tl.constexpr(-1.0e30)  # a score that counts nothing; finite, so that differences of two are no NaN


@triton.constexpr_function
def span(bits, f):
    """SPAN of a plane; whole elements lie one after the other."""
    return 16 * (f.word // bits) if f.kind == INT.value else 16


@triton.constexpr_function
def boost(f):
    """What p' is multiplied by, so that neither small nor large scales leave the range of fp16: a power of two."""
    return {256: 64.0, 16: 4.0, 8: 2.0}.get(f.levels, 1.0) if f.kind == INT.value and f.params else 1.0


@triton.constexpr_function
def shrink_of(element, f):
    """What exact keys are multiplied by to be fp16 operands: those of bfloat16 may be larger than fp16 can hold."""
    return 0.0625 if element == tl.bfloat16 and f.kind != RAW.value else 1.0


@triton.constexpr_function
def by_token(f):
    """Whether a scale belongs to one token."""
    return f.params > 0 and f.t == 1


@triton.constexpr_function
def begins_block(f, at):
    """Whether another block of tokens begins at token `at` of a tile, or with the tile."""
    return f.params > 0 and f.t > 1 and at % f.t == 0


@triton.constexpr_function
def block_of(f, at):
    """Which block of tokens of a tile the token `at` lies in."""
    return at // f.t


@triton.constexpr_function
def biased(f):
    """Whether keys stay biased: what that adds to a score follows from the queries, cheaper than to subtract it."""
    return f.params > 0 and f.t >= 64 and f.kind == INT.value and f.low <= 2 and not f.high


@triton.constexpr_function
def surplus_of(f, j, bt, tp):
    """What the codes of part j are too large by."""
    total = 0.0
    for bits, weight in ((f.low, 1), (f.high, 2**f.low)):
        if bits:
            per = span(bits, f) // 16 if span(bits, f) < bt else bt // tp
            total += surplus(bits, j % per, weight)
    return total


@triton.jit
def pair_of(word):
    """The two fp16 numbers of an int32: scale and middle."""
    low = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return low, ((word >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)


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
def body_tile(
    tile, k_arena, v_arena, h, NK, NV, mask_rows, mask_p, live, first, end, q, factor, sums, m, mass, sides, acc,
    MASK: tl.constexpr, BT: tl.constexpr, TP: tl.constexpr, CK: tl.constexpr, CV: tl.constexpr, BM: tl.constexpr,
    ASM: tl.constexpr, ELEMENT: tl.constexpr, WIDE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """One whole tile of the body: the new (m, mass, sides, acc)."""
    J: tl.constexpr = BT // TP
    KC: tl.constexpr = K.channels // CK
    VC: tl.constexpr = V.channels // CV
    ck, cv = tl.arange(0, CK), tl.arange(0, CV)
    k_low, k_high, v_low, v_high = (), (), (), ()
    i0 = tile * BT
    for a in tl.static_range(KC):
        k_low = k_low + (load_plane(k_arena, h, NK, tile, a * CK + ck, K.low, 0, BT, TP, False, ELEMENT, ASM, K),)
        if K.high > 0:
            k_high = k_high + (
                load_plane(k_arena, h, NK, tile, a * CK + ck, K.high, K.low, BT, TP, False, ELEMENT, ASM, K),
            )
        else:
            k_high = k_high + (0,)
    for a in tl.static_range(VC):
        v_low = v_low + (load_plane(v_arena, h, NV, tile, a * CV + cv, V.low, 0, BT, TP, True, ELEMENT, ASM, V),)
        if V.high > 0:
            v_high = v_high + (
                load_plane(v_arena, h, NV, tile, a * CV + cv, V.high, V.low, BT, TP, True, ELEMENT, ASM, V),
            )
        else:
            v_high = v_high + (0,)
    if K.params > 0:
        k_params = params_pointer(k_arena, h, NK, K)
    if V.params > 0:
        v_params = params_pointer(v_arena, h, NV, V)

    s, less, sumq = (), (), ()
    for j in tl.static_range(J):
        s = s + (tl.zeros([TP, BM], tl.float32),)
        if begins_block(K, j * 16):
            less, sumq = less + (tl.zeros([16, BM], tl.float32),), sumq + (tl.zeros([16, BM], tl.float32),)
    for a in tl.static_range(KC):
        scores, new_less, new_sumq, scaled = (), (), (), q[a]
        for j in tl.static_range(J):
            if begins_block(K, j * 16):
                stored = load_pairs(k_params, (a * CK + ck) // K.c, (i0 + j * 16) // K.t, K)
                scale, middle = split_pairs(stored, K)
                scaled = q[a] * scale[:, None]
                if K.params == 2:
                    y = tl.broadcast_to(middle[None, :], [16, CK])  # a product of equal rows
                    new_less = new_less + (tl.dot(y, q[a], less[block_of(K, j * 16)]),)
                if biased(K):
                    y = tl.full([16, CK], 1.0, tl.float16)
                    new_sumq = new_sumq + (tl.dot(y, scaled, sumq[block_of(K, j * 16)]),)
            x = part(k_low[a], k_high[a], j, biased(K), BT, TP, ASM, WIDE, K)
            if by_token(K):
                t = token_index(j, BT, TP)
                scale, middle = split_pairs(load_pairs(k_params, t * K.groups + a * CK // K.c, i0, K), K)
                x = s[j] + tl.dot(x, scaled) * scale.to(tl.float32)[:, None]
                if K.params == 2:
                    x += sums[a][None, :] * middle.to(tl.float32)[:, None]
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
        x = s[j] * factor[None, :]
        if begins_block(K, j * 16):
            if K.params == 2:
                middle = tl.max(less[block_of(K, j * 16)], 0) * factor
            if biased(K):
                extra = tl.max(sumq[block_of(K, j * 16)], 0) * factor
        if begins_block(K, 0):
            if K.params == 2:
                x += middle[None, :]
            if biased(K):
                x -= surplus_of(K, j, BT, TP) * extra[None, :]
        if MASK != NO_MASK:
            p = i0 + t + K.sink
            cell = tl.load(mask_rows[None, :] + p.to(tl.int64)[:, None] * mask_p, mask=live[None, :], other=0)
            seen = (p[:, None] >= first[None, :]) & (p[:, None] < end[None, :])
            if MASK == BOOL_MASK:
                seen = seen & (cell != 0)
            else:
                x += tl.maximum(cell.to(tl.float32), BLANK) * LOG2E
            x = tl.where(seen, x, BLANK)
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
    arena, new, stride, h, N, length, encoded, total, p0, c, MIX: tl.constexpr, WIDE: tl.constexpr, SHRINK: tl.constexpr,
    ASM: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """The tokens at the positions p0 .. p0+MIX-1 as an operand [MIX, C]: codes where they are encoded, else the stored
    or new numbers times SHRINK."""
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
    if F.kind == RAW:
        return x.to(WIDE)
    else:
        if ELEMENT != tl.float16:
            x = (x.to(tl.float32) * SHRINK).to(tl.float16)
        if (p0 + MIX > F.sink) & (p0 < F.sink + encoded):
            i0 = p0 - F.sink
            if F.kind == INT:
                y = field(packed_rows(arena, h, N, i0, body, c, F.low, 0, MIX, ASM, F), 0, F.low, 1, False, ASM)
                if F.high > 0:
                    word = packed_rows(arena, h, N, i0, body, c, F.high, F.low, MIX, ASM, F)
                    y += field(word, 0, F.high, 1 << F.low, False, ASM)
            else:
                start = plane_pointer(arena, h, N, F.low, 0, F)
                byte = tl.load(start + (i * F.channels)[:, None] + c[None, :], mask=body[:, None], other=0)
                y = byte.to(tl.float8e4nv, bitcast=True).to(tl.float16)
                if F.params == 0:
                    y = y * SHRINK
            x += y * body.to(tl.float16)[:, None]  # a selection; one of the two is 0
        return x


@triton.jit
def packed_rows(
    arena, h, N, i0, body, c, BITS: tl.constexpr, BEFORE: tl.constexpr, MIX: tl.constexpr, ASM: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    """The words of one plane that hold the body tokens i0 .. i0+MIX-1, i0 a multiple of MIX = 16, their field lowest."""
    SPAN: tl.constexpr = span(BITS, F)
    words = typed(plane_pointer(arena, h, N, BITS, BEFORE, F), tl.uint16)
    row = i0 // SPAN * 16 + tl.arange(0, MIX)
    word = tl.load(words + (row * F.channels)[:, None] + c[None, :], mask=body[:, None], other=0)
    return shifted(word, i0 % SPAN // 16 * BITS, ASM)


@triton.jit
def load_mixed_pairs(arena, h, N, p0, encoded, group, OTHER: tl.constexpr, MIX: tl.constexpr, F: tl.constexpr):
    """fp32 scale and middle [MIX] of the tokens from position p0 on, where scales belong to a token; OTHER and 0 for
    tokens that are not encoded."""
    i = p0 - F.sink + tl.arange(0, MIX)
    body = (i >= 0) & (i < encoded)
    start = params_pointer(arena, h, N, F)
    if F.params == 2:
        scale, middle = pair_of(tl.load(typed(start, tl.int32) + i * F.groups + group, mask=body, other=0))
        middle = middle.to(tl.float32)
    else:
        scale = tl.load(typed(start, tl.float16) + i * F.groups + group, mask=body, other=0.0)
        middle = tl.zeros([MIX], tl.float32)
    return tl.where(body, scale.to(tl.float32), OTHER), middle


@triton.jit
def mixed_tile(
    p0, k_arena, v_arena, k_new, v_new, k_stride, v_stride, mask_rows, mask_p, live, first, end, h, NK, NV,
    length, k_encoded, v_encoded, total, i, q, factor, sums, m, mass, sides, acc,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, MIX: tl.constexpr, CK: tl.constexpr, CV: tl.constexpr, BM: tl.constexpr,
    WIDE: tl.constexpr, ASM: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """MIX tokens from position p0 on, wherever they lie: the new (m, mass [BM], sides of [BM], acc)."""
    KC: tl.constexpr = K.channels // CK
    VC: tl.constexpr = V.channels // CV
    SHRINK: tl.constexpr = shrink_of(k_new.dtype.element_ty, K)
    ck, cv = tl.arange(0, CK), tl.arange(0, CV)
    k, v = (), ()
    for a in tl.static_range(KC):
        k = k + (
            load_mixed(
                k_arena, k_new, k_stride, h, NK, length, k_encoded, total, p0, a * CK + ck, MIX, WIDE, SHRINK, ASM, K
            ),
        )
    for a in tl.static_range(VC):
        v = v + (
            load_mixed(
                v_arena, v_new, v_stride, h, NV, length, v_encoded, total, p0, a * CV + cv, MIX, WIDE, 1.0, ASM, V
            ),
        )

    s = tl.zeros([MIX, BM], tl.float32)
    if by_token(K):
        for a in tl.static_range(KC):
            if a * CK % K.c == 0:
                scale, middle = load_mixed_pairs(k_arena, h, NK, p0, k_encoded, a * CK // K.c, 1.0 / SHRINK, MIX, K)
            s += tl.dot(k[a], q[a]) * scale[:, None]
            if K.params == 2:
                s += sums[a][None, :] * middle[:, None]
    else:
        less = tl.zeros([BM], tl.float32)
        scaled = q
        if K.params > 0:
            # a block of keys covers the tile, so that all of it is encoded, or nothing
            at = p0 + ck * 0
            real = (at + MIX > K.sink) & (at < K.sink + k_encoded)
            start = params_pointer(k_arena, h, NK, K)
            scaled = ()
            for a in tl.static_range(KC):
                cell = (a * CK + ck) // K.c + (p0 - K.sink) // K.t * K.groups
                if K.params == 2:
                    scale, middle = pair_of(tl.load(typed(start, tl.int32) + cell, mask=real, other=0))
                    less += tl.max(tl.dot(tl.broadcast_to(middle[None, :], [16, CK]), q[a]), 0)
                else:
                    scale = tl.load(typed(start, tl.float16) + cell, mask=real, other=0.0)
                scale = tl.where(real, scale, 1.0 / SHRINK)
                scaled = scaled + (q[a] * scale[:, None],)
        for a in tl.static_range(KC):
            s = tl.dot(k[a], scaled[a], s)
        if K.params > 0:
            s += less[None, :]
        else:
            s = s * (1.0 / SHRINK)
    s = s * factor[None, :]
    p = p0 + tl.arange(0, MIX)
    seen = ((p >= 0) & (p < total))[:, None] & live[None, :]
    if MASK != NO_MASK:
        seen = seen & (p[:, None] >= first[None, :]) & (p[:, None] < end[None, :])
        cell = tl.load(mask_rows[None, :] + p.to(tl.int64)[:, None] * mask_p, mask=seen, other=0)
        if MASK == BOOL_MASK:
            seen = seen & (cell != 0)
        else:
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
                scale, middle = load_mixed_pairs(v_arena, h, NV, p0, v_encoded, a * CV // V.c, 1.0, MIX, V)
                weight = (y * (scale * boost(V))[:, None]).to(tl.float16)
                new_sides = new_sides + (sides[a * CV // V.c] * decay + tl.sum(y * middle[:, None], 0),)
        new_acc = new_acc + (tl.dot(tl.trans(v[a]), weight, acc[a] * decay[None, :]),)
    return top, mass, new_sides, new_acc


@triton.jit(do_not_specialize=["NK", "NV", "n", "S", "width", "mask_b", "mask_h", "mask_n", "mask_p",
                               "see_b", "see_h", "see_n"])  # fmt: skip
def decode_split(
    q, k_new, v_new, mask, bounds, positions, out, lse, k_data, v_data, scale, n, S, NK, NV, k_row, v_row, width,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_h, mask_n, mask_p, see_b, see_h, see_n,
    G: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, PLACED: tl.constexpr, DIRECT: tl.constexpr,
    BM: tl.constexpr, BT: tl.constexpr, TP: tl.constexpr, MIX: tl.constexpr, CK: tl.constexpr, CV: tl.constexpr,
    WIDE: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Program: (split, batch row and kv head). Arguments and results as those of `attend.attend_split`.

    WIDE: the model's dtype, as an operand. STAGES: tiles in flight. ASM: with
    inline assembly, which the interpreter lacks.
    """
    ELEMENT: tl.constexpr = k_new.dtype.element_ty
    KC: tl.constexpr = K.channels // CK
    VC: tl.constexpr = V.channels // CV
    HALF: tl.constexpr = WIDE if K.kind == RAW else tl.float16
    ORIGIN: tl.constexpr = K.sink - (K.sink + 15) // 16 * 16
    split = tl.program_id(0)
    b, h = tl.program_id(1) // K.heads, tl.program_id(1) % K.heads
    b, h = b.to(tl.int64), h.to(tl.int64)
    r = tl.arange(0, BM)
    rows = n * G
    live = r < rows
    i, g = tl.minimum(r // G, n - 1), r % G
    k_arena, v_arena = k_data + b * k_row, v_data + b * v_row
    k_new += b * k_b + h * k_h
    v_new += b * v_b + h * v_h
    length, k_encoded, v_encoded, fault = cache_lengths(k_arena, v_arena, h, positions, PLACED, K, V)
    total = length + n

    # positions [lo, hi) are seen by some query, [all_lo, all_hi) by all of them
    first = tl.zeros([BM], tl.int32)
    end = tl.full([BM], 0, tl.int32) + total
    plain = True
    mask_rows = mask + b * mask_b + (h * G + g) * mask_h + i.to(tl.int64) * mask_n
    if MASK != NO_MASK:
        fault = fault | (width < total)
        at = bounds + b * see_b + (h * G + g) * see_h + i.to(tl.int64) * see_n
        first = tl.load(at)
        end = tl.minimum(tl.load(at + 1), tl.minimum(total, width))
        plain = tl.min(tl.where(live, tl.load(at + 2), 1), 0) != 0
    elif CAUSAL:
        end = length + i + 1
    lo, hi = tl.min(tl.where(live, first, total), 0), tl.max(tl.where(live, end, 0), 0)
    all_lo, all_hi = tl.max(tl.where(live, first, 0), 0), tl.min(tl.where(live, end, total), 0)
    if MASK != NO_MASK:
        all_lo, all_hi = tl.where(plain, all_lo, lo), tl.where(plain, all_hi, hi)

    # whole body tiles [t0, t1), then tiles of MIX tokens: [m0, f0) before them, [f1, m1) behind
    packed = tl.minimum(tl.minimum(k_encoded, v_encoded), all_hi - K.sink)
    t0 = (tl.maximum(all_lo - K.sink, 0) + BT - 1) // BT
    t1 = tl.maximum(packed // BT, t0)
    m0, m1 = (tl.maximum(lo, 0) - ORIGIN) // MIX, tl.maximum(hi - ORIGIN + MIX - 1, 0) // MIX
    f0 = (K.sink + t0 * BT - ORIGIN) // MIX
    f1 = (K.sink + t1 * BT - ORIGIN) // MIX
    if t1 == t0:
        f0, f1 = m0, m0
    m1 = tl.maximum(m1, f1)

    # what is constant in a tile: q as the operand's dtype, exactly, and the factor that makes its product a score
    q_rows = q + b * q_b + (h * G + g) * q_h + i.to(tl.int64) * q_n
    ck = tl.arange(0, CK)
    x, y, sums = (), (), ()
    factor = tl.zeros([BM], tl.float32) + scale * LOG2E
    for a in tl.static_range(KC):
        y = y + (tl.load(q_rows[None, :] + (a * CK + ck)[:, None], mask=live[None, :], other=0.0),)
    if HALF == tl.float16:
        largest = tl.zeros([BM], tl.float32)
        for a in tl.static_range(KC):
            largest = tl.maximum(largest, tl.max(tl.abs(y[a].to(tl.float32)), 0))
        # from the bits of fp32: e with 2^e > largest >= 2^(e-1)
        e = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 126, -100)
        shrink = ((127 - e) << 23).to(tl.float32, bitcast=True)
        factor = factor * ((127 + e) << 23).to(tl.float32, bitcast=True)
        for a in tl.static_range(KC):
            x = x + ((y[a].to(tl.float32) * shrink[None, :]).to(tl.float16),)
    else:
        for a in tl.static_range(KC):
            x = x + (y[a].to(HALF),)
    if by_token(K) and K.params == 2:
        for a in tl.static_range(KC):
            sums = sums + (tl.sum(x[a].to(tl.float32), 0),)

    m = tl.full([BM], BLANK, tl.float32)
    mixed_mass = tl.zeros([BM], tl.float32)
    GROUPS: tl.constexpr = V.groups
    acc, mixed_sides = (), ()
    for a in tl.static_range(VC):
        acc = acc + (tl.zeros([CV, BM], tl.float32),)
    if by_token(V):
        for a in tl.static_range(GROUPS):
            mixed_sides = mixed_sides + (mixed_mass,)
    for turn in tl.range(split, f0 - m0 + m1 - f1, S, num_stages=1):
        tile = m0 + turn
        tile = tl.where(tile < f0, tile, tile - f0 + f1)
        m, mixed_mass, mixed_sides, acc = mixed_tile(
            ORIGIN + tile * MIX, k_arena, v_arena, k_new, v_new, k_n, v_n, mask_rows, mask_p, live, first, end,
            h, NK, NV, length, k_encoded, v_encoded, total, i, x, factor, sums, m, mixed_mass, mixed_sides, acc,
            MASK, CAUSAL, MIX, CK, CV, BM, WIDE, ASM, K, V,
        )  # fmt: skip

    mass = tl.zeros([TP, BM], tl.float32)
    sides = ()
    if by_token(V):
        for a in tl.static_range(GROUPS):
            sides = sides + (mass,)
    before = m
    share = (t1 - t0 + S - 1) // S
    lo_tile = tl.minimum(t0 + split * share, t1)
    hi_tile = tl.minimum(lo_tile + share, t1)
    clear = hi_tile
    if MASK != NO_MASK:
        clear = tl.where(plain, hi_tile, lo_tile)
        for tile in tl.range(clear, hi_tile, num_stages=1):
            m, mass, sides, acc = body_tile(
                tile, k_arena, v_arena, h, NK, NV, mask_rows, mask_p, live, first, end, x, factor, sums,
                m, mass, sides, acc, MASK, BT, TP, CK, CV, BM, ASM, ELEMENT, WIDE, K, V,
            )  # fmt: skip
    for tile in tl.range(lo_tile, clear, num_stages=STAGES):
        m, mass, sides, acc = body_tile(
            tile, k_arena, v_arena, h, NK, NV, mask_rows, mask_p, live, first, end, x, factor, sums,
            m, mass, sides, acc, NO_MASK, BT, TP, CK, CV, BM, ASM, ELEMENT, WIDE, K, V,
        )  # fmt: skip

    decay = tl.exp2(before - m)
    total_mass = mixed_mass * decay + tl.sum(mass, 0)
    nothing = total_mass == 0
    unit = 1.0 / tl.where(nothing, 1.0, total_mass)
    bad = tl.where(fault, float("nan"), 0.0)
    cv = tl.arange(0, CV)
    row = tl.program_id(1).to(tl.int64) * rows
    slot = row + split * tl.num_programs(1).to(tl.int64) * rows + r
    for a in tl.static_range(VC):
        o = acc[a] * (1.0 / boost(V))
        if by_token(V) and V.params == 2:
            o += (mixed_sides[a * CV // V.c] * decay + tl.sum(sides[a * CV // V.c], 0))[None, :]
        o = tl.where(nothing[None, :], 0.0, o * unit[None, :]) + bad
        c = a * CV + cv
        at = (row + g * n + i) if DIRECT else slot
        at = out + at[:, None] * V.channels + c[None, :]
        tl.store(at, tl.trans(o).to(out.dtype.element_ty), mask=live[:, None])
    if not DIRECT:
        weight = tl.where(nothing, float("-inf"), m / LOG2E + tl.log(tl.where(nothing, 1.0, total_mass)))
        tl.store(lse + slot, tl.where(fault, 0.0, weight), mask=live)
