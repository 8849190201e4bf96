"""Attention of a few queries over a compressed cache: decoding, at the speed of memory.

The semantics and the symbols are those of `kernels.attend`. What differs is the shape of the work:

    columns     query rows are the columns of a tile, BM of them, so that a group of 8 query heads or fewer costs no
                padding:  scores [tokens, BM] = K q^T,  acc [channels, BM] = V^T p^T
    packed      a tile of packed words goes to the tensor core's operand layout as it is; unpacking is one shift, one
                lop3 and one subtraction for two codes (`kernels.unpack`)
    folded      scales and middles never touch the codes:  q' = q * scale of a channel,  p' = p * scale of a token,
                and the middles enter as  q . middle  and  sum of p * middle

Symbols beyond those of `kernels.attend`:

    SPAN        tokens that a row group of 16 words of a plane holds
    BT          tokens of a body tile, which begins at body token BT * tile
    TP, J       tokens of a part of it, one operand of the tensor core; J = BT / TP parts. Part j is field j of words
    CK, CV      channels of a chunk of keys and of values: a power of two that divides D and every channel group
    MIX         tokens of a tile of what is not body: sinks, ring, new tokens, and body tokens next to those
    KC, VC      chunks of the channels of a key and of a value
    GROUPS      channel groups of a value that have a scale each
    BM          query rows, rounded up: the columns of a tile
    S1, S2      the splits before S1 take body tiles, those from S2 on the others
    WIDE        the model's dtype, as an operand
    HALF        dtype of the operands with keys
    ASM         whether there is inline assembly, which the interpreter lacks
    BITS        bits of a plane
    PER         parts that one load of words holds; PER_HIGH for the second plane
    PER_HIGH    parts that one load of words of the second plane holds
    LOW, HIGH   SPAN of the first plane and of the second
    ACROSS      whether channels are the rows of what is loaded: of values
    BIASED      whether codes stay too large by a constant, see `kernels.unpack`
    WEIGHT, j   what a code is multiplied by; the field of a word, or the part of a tile
    SHIFT       bits that a word is shifted by to the right, or if negative to the left
    text        an instruction
    SHRINK      what exact numbers are multiplied by to fit fp16
    OTHER       the scale of tokens that have none

A split takes a share of the body tiles, which are whole and visible to all queries, and every S-th of the MIX tiles.
A mask that only hides a beginning and an end is not read for body tiles; one that adds something is; under one with
holes all tokens are MIX tiles, which is slower.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvc_compile.kernels.attend import ADDED_MASK, LOG2E, NO_MASK, cache_lengths, sight, with_sink
from kvc_compile.kernels.body import body_tile
from kvc_compile.kernels.codec import RAW
from kvc_compile.kernels.facts import BLANK, boost, by_token
from kvc_compile.kernels.mixed import mixed_tile


@triton.jit(
    do_not_specialize=["NK", "NV", "n", "S", "S1", "S2", "shown", "width", "mask_b", "mask_h", "mask_n", "mask_p"]
    + ["see_b", "see_h", "see_n"]
)
def decode_split(
    q, k_new, v_new, mask, bounds, sinks, positions, out, lse, k_data, v_data, scale, n, S, S1, S2, shown, NK, NV,
    k_row, v_row, width, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_h, mask_n, mask_p,
    see_b, see_h, see_n,
    G: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, PLACED: tl.constexpr, DIRECT: tl.constexpr,
    CAP: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr,
    TP: tl.constexpr, MIX: tl.constexpr, CK: tl.constexpr, CV: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
    ASM: tl.constexpr, EARLY: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Program: (split, batch row and kv head). Arguments and results as those of `attend.attend_split`.

    S1, S2: the splits before S1 take body tiles, those from S2 on the others.
    WIDE: the model's dtype, as an operand. STAGES: tiles in flight. ASM: with inline assembly, which the interpreter
    lacks.
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
    # the queries come first: their way from memory is as long as that of the lengths
    q_rows = q + b * q_b + (h * G + g) * q_h + i.to(tl.int64) * q_n
    ck = tl.arange(0, CK)
    y = ()
    for a in tl.static_range(KC):
        y = y + (tl.load(q_rows[None, :] + (a * CK + ck)[:, None], mask=live[None, :], other=0.0),)
    k_arena, v_arena = k_data + b * k_row, v_data + b * v_row
    k_new += b * k_b + h * k_h
    v_new += b * v_b + h * v_h
    length, k_encoded, v_encoded, fault = cache_lengths(k_arena, v_arena, h, positions, PLACED, K, V)
    total = length + n

    mask_rows, first, end, plain, blind = sight(
        mask, bounds, b, h, g, i, live, length, total, width, shown, mask_b, mask_h, mask_n, mask_p,
        see_b, see_h, see_n, G, MASK, CAUSAL, WINDOW,
    )  # fmt: skip
    fault = fault | blind
    # positions [lo, hi) are seen by some query, [all_lo, all_hi) by all of them
    lo, hi = tl.min(tl.where(live, first, total), 0), tl.max(tl.where(live, end, 0), 0)
    all_lo, all_hi = tl.max(tl.where(live, first, 0), 0), tl.min(tl.where(live, end, total), 0)
    if MASK != NO_MASK:
        if MASK == ADDED_MASK:  # body tiles read it
            all_lo, all_hi = tl.where(plain, all_lo, lo), tl.where(plain, all_hi, hi)
        else:
            all_hi = tl.where(plain, all_hi, 0)

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
    x, sums = (), ()
    factor = tl.zeros([BM], tl.float32) + scale * LOG2E
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

    GROUPS: tl.constexpr = V.groups
    m = tl.full([BM], BLANK, tl.float32)
    masses = tl.zeros([TP, BM], tl.float32)  # summed up over tokens at the end
    acc, sides = (), ()
    for _ in tl.static_range(VC):
        acc = acc + (tl.zeros([CV, BM], tl.float32),)
    if by_token(V):
        for _ in tl.static_range(GROUPS):
            sides = sides + (masses,)
    share = (t1 - t0 + S1 - 1) // S1
    lo_tile = tl.minimum(t0 + split * share, t1)
    hi_tile = tl.minimum(lo_tile + share, t1)
    clear = hi_tile
    if MASK == ADDED_MASK:
        clear = tl.where(plain, hi_tile, lo_tile)
        for tile in tl.range(clear, hi_tile, num_stages=1):
            m, masses, sides, acc = body_tile(
                tile, k_arena, v_arena, h, NK, NV, mask_rows, mask_p, live, first, end, x, factor, sums,
                m, masses, sides, acc, MASK, CAP, BT, TP, CK, CV, BM, ASM, ELEMENT, WIDE, K, V,
            )  # fmt: skip
    for tile in tl.range(lo_tile, clear, num_stages=STAGES):
        m, masses, sides, acc = body_tile(
            tile, k_arena, v_arena, h, NK, NV, mask_rows, mask_p, live, first, end, x, factor, sums,
            m, masses, sides, acc, NO_MASK, CAP, BT, TP, CK, CV, BM, ASM, ELEMENT, WIDE, K, V,
        )  # fmt: skip

    mass = tl.sum(masses, 0)
    middles = ()
    if by_token(V):
        for a in tl.static_range(GROUPS):
            middles = middles + (tl.sum(sides[a], 0),)
    turns = tl.where(split < S2, 0, f0 - m0 + m1 - f1)
    for turn in tl.range(tl.maximum(split - S2, 0), turns, S - S2, num_stages=1):
        tile = m0 + turn
        tile = tl.where(tile < f0, tile, tile - f0 + f1)
        m, mass, middles, acc = mixed_tile(
            ORIGIN + tile * MIX, k_arena, v_arena, k_new, v_new, k_n, v_n, mask_rows, mask_p, live, first, end,
            h, NK, NV, length, k_encoded, v_encoded, total, i, x, factor, sums, m, mass, middles, acc,
            MASK, CAUSAL, CAP, WINDOW, MIX, CK, CV, BM, WIDE, ASM, K, V,
        )  # fmt: skip

    if EARLY:  # `merge` may start
        tl.extra.cuda.gdc_launch_dependents()
    decay = 1.0
    if SINKS:
        m, mass, decay = with_sink(tl.load(sinks + h * G + g).to(tl.float32) * LOG2E, split, m, mass)
    nothing = mass == 0
    unit = decay / tl.where(nothing, 1.0, mass)
    bad = tl.where(fault, float("nan"), 0.0)
    cv = tl.arange(0, CV)
    row = tl.program_id(1).to(tl.int64) * rows
    slot = row + split * tl.num_programs(1).to(tl.int64) * rows + r
    for a in tl.static_range(VC):
        o = acc[a] * (1.0 / boost(V))
        if by_token(V) and V.params == 2:
            o += middles[a * CV // V.c][None, :]
        o = tl.where(nothing[None, :], 0.0, o * unit[None, :]) + bad
        c = a * CV + cv
        at = (row + g * n + i) if DIRECT else slot
        at = out + at[:, None] * V.channels + c[None, :]
        tl.store(at, tl.trans(o).to(out.dtype.element_ty), mask=live[:, None])
    if not DIRECT:
        weight = tl.where(nothing, float("-inf"), m / LOG2E + tl.log(tl.where(nothing, 1.0, mass)))
        tl.store(lse + slot, tl.where(fault, 0.0, weight), mask=live)
