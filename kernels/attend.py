"""Attention over a compressed cache and the new tokens: one skeleton for decoding and for chunks of a prompt.

Symbols beyond those of `kernels.codec`:

    q, k_new, v_new   the new tokens [B, query heads or H, n, D]; they stand at the positions L .. L+n-1
    L, T              cached tokens to attend to, and with the new ones: T = L + n. L is positions[0] where positions
                      are given (what the cache holds from there on is about to be replaced), else all it holds
    G                 query heads of one kv head;  query rows r = i * G + g: query i, head g of the group
    BM, BN            rows of a tile; tokens of a tile, which begins at position origin + BN * tile, origin <= 0
    STAGES            tiles in flight
    DK, DV            channels of a key and of a value, rounded up to powers of two
    S                 splits of the sequence; each leaves (o, lse) and `merge` combines them
    k_data, v_data    uint8 [B, row bytes]: the arenas of keys and of values
    mask              [b, h, n, width] by absolute position, bool as uint8 or added; anything if MASK is NO_MASK
    positions         int [n]: where the new tokens will be, if PLACED; else anything
    out               [B, query heads, n, Dv] if DIRECT, else fp32 [S, B * H * n * G, Dv], as `parts` of `merge`
    lse               fp32 [S, B * H * n * G]: log-sum-exp of each part
    scale             what q k^T is multiplied by
    n                 new tokens a sequence, and queries a head
    NK, NV            body tokens that an arena of keys, of values has room for
    K, V              Form: the facts of the layout of keys, of values
    k_row, v_row      bytes from one row of an arena to the next
    q_b, q_h, q_n     strides of q over batch, heads and tokens; so are k_b .. k_n, v_b .. v_n of the new tokens
    k_b, k_h, k_n     strides of k_new
    v_b, v_h, v_n     strides of v_new
    mask_b, mask_h, mask_n, mask_p   strides of the mask
    width             positions that the mask covers
    bounds            int32 [b, h, n, 3], what the mask comes down to (`lowering.bounds`): the first position that a
                      query sees, one past the last, and whether it sees all between them with nothing added; anything
                      if MASK is NO_MASK
    see_b, see_h, see_n   strides of bounds
    MASK              NO_MASK, BOOL_MASK or ADDED_MASK
    CAUSAL            without a mask: whether query i sees positions up to L + i, or all
    PLACED, DIRECT    whether positions are given; whether there is one split, and out is final
    CHUNK             whether there may be tiles of new tokens only
    KIND              MIXED, BODY or NEW
    CLEAR             whether all queries of a program see all tokens of a tile, with nothing added
    ALIGNED           whether the tiles lie on multiples of BN in the body of the values, too
    ELEMENT           the model's dtype
    DOT, PRECISION    dtype of the operands of products, and how exact those of fp32 are
    ORIGIN            where the first tile begins: a position, 0 or less
    FIRST             tokens before the body of both
    sinks             [query heads]: a score without a value for each, if SINKS; else anything
    shown, hidden     cached tokens that are seen, the last ones, if WINDOW; how many that hides. A mask then begins at
                      the first of them
    WINDOW            whether only some are seen: a sliding window
    CAP, SINKS        what scores are capped at, 0 if they are not; whether there are sinks
    parts             fp32 [S, B * H * n * G, D]: what the splits leave in `out`
    D, BS, DC         channels of a value; splits and channels that a program of `merge` takes at a time
    EARLY             whether `merge` may start before what it waits for has ended

    s = capped(q k^T * scale) (+ mask)   m = max s   mass = sum exp(s - m)
    o = sum exp(s - m) v / mass          lse = m + log mass
    out = sum_S exp(lse_S - lse) o_S
    capped(s) = CAP tanh(s / CAP), or s where CAP is 0;  a sink is a score without a value: the first split has it

A tile is of one of three kinds, so that the common ones cost no selection: BODY, all of whose keys and values are
packed; NEW, all of whose tokens are in k_new; and MIXED, read token by token. Packed words are unpacked in registers.
Tiles that all queries of a program see whole, which is most of a long prompt, are not compared with any position, and a
mask that only hides a beginning and an end is not read for them.
Which tiles a split takes follows from the lengths in the arenas: no launch parameter depends on them.
Rows that see nothing are 0; a cache that has faulted, or whose mask shows what it does not hold, gives NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvc_compile.kernels import form
from kvc_compile.kernels.codec import header_pointer, load_body, load_new, load_tokens, load_whole

MIXED, BODY, NEW = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NO_MASK, BOOL_MASK = tl.constexpr(form.NO_MASK), tl.constexpr(form.BOOL_MASK)
ADDED_MASK = tl.constexpr(form.ADDED_MASK)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.constexpr_function
def origin(k, bn):
    """Where the tiles begin: tiles lie on multiples of BN in the body of the keys."""
    return k.sink - -(-k.sink // bn) * bn


@triton.constexpr_function
def aligned(f, k, bn):
    """Whether tiles lie on multiples of BN in the body of f, too."""
    return (f.sink - k.sink) % bn == 0


@triton.jit
def cache_lengths(k_arena, v_arena, h, positions, PLACED: tl.constexpr, K: tl.constexpr, V: tl.constexpr):
    """(cached tokens to attend to, encoded keys and values among them, whether the two caches cannot be attended)."""
    k_head, v_head = header_pointer(k_arena, h), header_pointer(v_arena, h)
    length = tl.load(k_head).to(tl.int32)
    v_length = tl.load(v_head).to(tl.int32)
    fault = (tl.load(k_head + 2) != 0) | (tl.load(v_head + 2) != 0)
    if PLACED:
        start = tl.load(positions).to(tl.int32)
        fault = fault | (start < 0) | (start > length) | (start > v_length)
        length = tl.maximum(tl.minimum(start, tl.minimum(length, v_length)), 0)
    else:
        fault = fault | (length != v_length)
    k_encoded = tl.minimum(tl.load(k_head + 1).to(tl.int32), tl.maximum(length - K.sink, 0))
    v_encoded = tl.minimum(tl.load(v_head + 1).to(tl.int32), tl.maximum(length - V.sink, 0))
    return length, k_encoded, v_encoded, fault


@triton.jit
def sight(
    mask, bounds, b, h, g, i, live, length, total, width, shown, mask_b, mask_h, mask_n, mask_p, see_b, see_h, see_n,
    G: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """What query i of head g of the group sees, for each row: (its row of the mask, the first position, one past the
    last, whether all rows see all between them with nothing added, whether the mask is not one of this cache)."""
    first = tl.zeros_like(i)
    end = tl.zeros_like(i) + total
    mask_rows = mask + b * mask_b + (h * G + g) * mask_h + i.to(tl.int64) * mask_n
    plain = total >= 0
    blind = total < 0
    hidden = 0
    if WINDOW:
        hidden = tl.maximum(length - shown, 0)
        mask_rows -= tl.cast(hidden, tl.int64) * mask_p
        first += hidden
    if MASK != NO_MASK:
        at = bounds + b * see_b + (h * G + g) * see_h + i.to(tl.int64) * see_n
        first += tl.load(at)
        end = tl.load(at + 1) + hidden
        # it covers too little, or shows what the cache does not hold
        blind = (width + hidden < total) | (tl.max(tl.where(live, end, 0), 0) > total)
        end = tl.minimum(end, total)
        plain = tl.min(tl.where(live, tl.load(at + 2), 1), 0) != 0
    elif CAUSAL:
        end = length + i + 1
    return mask_rows, first, end, plain, blind


@triton.jit
def capped(s, CAP: tl.constexpr):
    """CAP tanh(s / CAP), exact to a rounding of CAP; s where CAP is 0."""
    if CAP == 0.0:
        return s
    else:
        return CAP - (2.0 * CAP) / (1.0 + tl.exp2(s * (2.0 * LOG2E / CAP)))


@triton.jit
def with_sink(sink, split, m, mass):
    """(m, mass, what the sum of values is to be multiplied by) with one score more in the first split; it and m in
    powers of 2."""
    top = tl.where(split == 0, tl.maximum(m, sink), m)
    shift = tl.where(top == float("-inf"), 0.0, top)
    decay = tl.exp2(m - shift)
    return top, mass * decay + tl.where(split == 0, tl.exp2(sink - shift), 0.0), decay


@triton.jit
def soft_step(q, k, v, seen, bias, scale, m, mass, acc, CAP: tl.constexpr, CLEAR: tl.constexpr, DOT: tl.constexpr):
    """One tile of online softmax in powers of 2: the new (m, mass, acc), acc not yet divided by mass. CLEAR: all is
    seen and nothing is added."""
    PRECISION: tl.constexpr = "ieee" if DOT.primitive_bitwidth == 32 else "tf32"
    s = tl.dot(q, tl.trans(k.to(DOT)), input_precision=PRECISION)
    if CAP == 0.0:
        s = s * (scale * LOG2E)
    else:
        s = capped(s * scale, CAP) * LOG2E
    if CLEAR:
        top = tl.maximum(m, tl.max(s, 1))
        shift = top
    else:
        s = tl.where(seen, s + bias * LOG2E, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(top == float("-inf"), 0.0, top)  # a row that has seen nothing
    p = tl.exp2(s - shift[:, None])
    decay = tl.exp2(m - shift)
    acc = tl.dot(p.to(DOT), v.to(DOT), acc * decay[:, None], input_precision=PRECISION)
    return top, mass * decay + tl.sum(p, 1), acc


@triton.jit
def tile_step(
    KIND: tl.constexpr, CLEAR: tl.constexpr, p0, q, k_arena, v_arena, k_new, v_new, k_stride, v_stride, mask_rows,
    mask_stride, h, NK, NV, first, end, length, k_encoded, v_encoded, total, scale, m, mass, acc,
    MASK: tl.constexpr, CAP: tl.constexpr, BN: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DOT: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Attend to the BN tokens from position p0 on. CLEAR: all queries see all of them, with nothing added."""
    ALIGNED: tl.constexpr = aligned(V, K, BN)
    ELEMENT: tl.constexpr = k_new.dtype.element_ty
    dk, dv = tl.arange(0, DK), tl.arange(0, DV)
    if KIND == BODY:
        k = load_body(k_arena, h, NK, p0 - K.sink, k_encoded, dk, True, BN, ELEMENT, K)
        v = load_body(v_arena, h, NV, p0 - V.sink, v_encoded, dv, ALIGNED, BN, ELEMENT, V)
    elif KIND == NEW:
        if CLEAR:
            k = load_whole(k_new, k_stride, p0 - length, dk, BN, K)
            v = load_whole(v_new, v_stride, p0 - length, dv, BN, V)
        else:
            k = load_new(k_new, k_stride, p0 - length, total - length, dk, BN, K)
            v = load_new(v_new, v_stride, p0 - length, total - length, dv, BN, V)
    else:
        k = load_tokens(k_arena, k_new, k_stride, h, NK, length, k_encoded, total, p0, dk, True, BN, K)
        v = load_tokens(v_arena, v_new, v_stride, h, NV, length, v_encoded, total, p0, dv, ALIGNED, BN, V)
    p = p0 + tl.arange(0, BN)
    seen = (p[None, :] >= first[:, None]) & (p[None, :] < end[:, None])
    bias = 0.0
    if MASK != NO_MASK and not CLEAR:
        cell = tl.load(mask_rows[:, None] + p.to(tl.int64)[None, :] * mask_stride, mask=seen, other=0)
        if MASK == BOOL_MASK:
            seen = seen & (cell != 0)
        else:
            bias = cell.to(tl.float32)
    return soft_step(q, k, v, seen, bias, scale, m, mass, acc, CAP, CLEAR, DOT)


@triton.jit(
    do_not_specialize=["NK", "NV", "n", "S", "shown", "width", "mask_b", "mask_h", "mask_n", "mask_p"]
    + ["see_b", "see_h", "see_n"]
)
def attend_split(
    q, k_new, v_new, mask, bounds, sinks, positions, out, lse, k_data, v_data, scale, n, S, shown, NK, NV, k_row, v_row,
    width, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_h, mask_n, mask_p, see_b, see_h, see_n,
    G: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, PLACED: tl.constexpr, CHUNK: tl.constexpr,
    DIRECT: tl.constexpr, CAP: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DOT: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr,
):  # fmt: skip
    """Program: (BM query rows, batch row and kv head, split).

    PLACED: positions are given. CHUNK: there may be whole tiles of new tokens. DIRECT: S is 1 and `out`
    [B, query heads, n, Dv] is final; otherwise out is fp32 [S, B * H * n * G, Dv] and lse [S, B * H * n * G].
    SINKS: `sinks` [query heads] are given. WINDOW: only the last `shown` cached tokens are seen.
    """
    ORIGIN: tl.constexpr = origin(K, BN)
    b, h = tl.program_id(1) // K.heads, tl.program_id(1) % K.heads
    b, h = b.to(tl.int64), h.to(tl.int64)
    split = tl.program_id(2)
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    rows = n * G
    live = r < rows
    i, g = tl.minimum(r // G, n - 1), r % G
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
        all_hi = tl.where(plain, all_hi, 0)

    # tiles [b0, b1) are body, [n0, last) new, the others from `start` on mixed; [c0, c1) of the new ones are clear
    start = (tl.maximum(lo, 0) - ORIGIN) // BN
    last = tl.maximum((hi - ORIGIN + BN - 1) // BN, start)
    FIRST: tl.constexpr = K.sink if K.sink > V.sink else V.sink
    packed = (tl.minimum(K.sink + k_encoded, V.sink + v_encoded) - ORIGIN) // BN
    whole0, whole1 = (all_lo - ORIGIN + BN - 1) // BN, tl.maximum(all_hi - ORIGIN, 0) // BN
    b0 = tl.minimum(tl.maximum((FIRST - ORIGIN + BN - 1) // BN, start), last)
    b1 = tl.minimum(tl.maximum(packed, b0), last)
    n0, c0, c1 = last, last, last
    if CHUNK:
        n0 = tl.minimum(tl.maximum((length - ORIGIN + BN - 1) // BN, b1), last)
        c0 = tl.minimum(tl.maximum(whole0, n0), last)
        c1 = tl.minimum(tl.maximum(whole1, c0), last)
    if MASK != NO_MASK:  # under one with holes body tiles read it
        whole0, whole1 = tl.where(plain, whole0, b0), tl.where(plain, whole1, b1)
    b0 = tl.minimum(tl.maximum(whole0, b0), b1)
    b1 = tl.minimum(tl.maximum(whole1, b0), b1)

    q_rows = q + b * q_b + (h * G + g) * q_h + i.to(tl.int64) * q_n
    d = tl.arange(0, DK)
    x = tl.load(q_rows[:, None] + d[None, :], mask=live[:, None] & (d < K.channels)[None, :], other=0.0).to(DOT)
    m = tl.full([BM], float("-inf"), tl.float32)  # times LOG2E
    mass = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DV], tl.float32)

    share = (b1 - b0 + S - 1) // S
    lo_tile = b0 + split * share
    hi_tile = tl.maximum(tl.minimum(lo_tile + share, b1), lo_tile)
    clear = hi_tile
    if MASK != NO_MASK:
        clear = tl.where(plain, hi_tile, lo_tile)
        for tile in tl.range(clear, hi_tile, num_stages=1):
            m, mass, acc = tile_step(
                BODY, False, ORIGIN + tile * BN, x, k_arena, v_arena, k_new, v_new, k_n, v_n, mask_rows, mask_p, h,
                NK, NV, first, end, length, k_encoded, v_encoded, total, scale, m, mass, acc,
                MASK, CAP, BN, DK, DV, DOT, K, V,
            )  # fmt: skip
    for tile in tl.range(lo_tile, clear, num_stages=STAGES):
        m, mass, acc = tile_step(
            BODY, True, ORIGIN + tile * BN, x, k_arena, v_arena, k_new, v_new, k_n, v_n, mask_rows, mask_p, h,
            NK, NV, first, end, length, k_encoded, v_encoded, total, scale, m, mass, acc,
            MASK, CAP, BN, DK, DV, DOT, K, V,
        )  # fmt: skip
    for turn in tl.range(split, b0 - start + n0 - b1, S, num_stages=1):
        tile = tl.where(turn < b0 - start, start + turn, turn - b0 + start + b1)
        m, mass, acc = tile_step(
            MIXED, False, ORIGIN + tile * BN, x, k_arena, v_arena, k_new, v_new, k_n, v_n, mask_rows, mask_p, h,
            NK, NV, first, end, length, k_encoded, v_encoded, total, scale, m, mass, acc,
            MASK, CAP, BN, DK, DV, DOT, K, V,
        )  # fmt: skip
    if CHUNK:
        share = (c1 - c0 + S - 1) // S
        lo_tile = c0 + split * share
        for tile in tl.range(lo_tile, tl.minimum(lo_tile + share, c1), num_stages=STAGES):
            m, mass, acc = tile_step(
                NEW, True, ORIGIN + tile * BN, x, k_arena, v_arena, k_new, v_new, k_n, v_n, mask_rows, mask_p, h,
                NK, NV, first, end, length, k_encoded, v_encoded, total, scale, m, mass, acc,
                MASK, CAP, BN, DK, DV, DOT, K, V,
            )  # fmt: skip
        for turn in tl.range(split, c0 - n0 + last - c1, S, num_stages=1):
            tile = tl.where(turn < c0 - n0, n0 + turn, turn - c0 + n0 + c1)
            m, mass, acc = tile_step(
                NEW, False, ORIGIN + tile * BN, x, k_arena, v_arena, k_new, v_new, k_n, v_n, mask_rows, mask_p, h,
                NK, NV, first, end, length, k_encoded, v_encoded, total, scale, m, mass, acc,
                MASK, CAP, BN, DK, DV, DOT, K, V,
            )  # fmt: skip

    if SINKS:
        m, mass, decay = with_sink(tl.load(sinks + h * G + g).to(tl.float32) * LOG2E, split, m, mass)
        acc *= decay[:, None]
    nothing = mass == 0
    acc = tl.where(nothing[:, None], 0.0, acc / tl.where(nothing, 1.0, mass)[:, None]) + tl.where(
        fault, float("nan"), 0.0
    )
    dv = tl.arange(0, DV)
    real = live[:, None] & (dv < V.channels)[None, :]
    row = tl.program_id(1).to(tl.int64) * rows
    if DIRECT:
        at = out + (row + g * n + i)[:, None] * V.channels + dv[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=real)
    else:
        row += split * tl.num_programs(1).to(tl.int64) * rows + r
        tl.store(out + row[:, None] * V.channels + dv[None, :], acc, mask=real)
        weight = tl.where(nothing, float("-inf"), m / LOG2E + tl.log(tl.where(nothing, 1.0, mass)))
        tl.store(lse + row, tl.where(fault, 0.0, weight), mask=live)


@triton.jit(do_not_specialize=["n", "S"])
def merge(
    parts, lse, out, n, S, G: tl.constexpr, BS: tl.constexpr, D: tl.constexpr, DC: tl.constexpr, EARLY: tl.constexpr
):
    """out = sum_S exp(lse_S - lse) o_S, BS splits at a time. Program: (query row, DC of D channels).

    EARLY: it may start before the kernel that writes the parts has ended, and waits for that.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)  # (batch row and kv head) * n * G + i * G + g
    rows = tl.num_programs(0).to(tl.int64)
    d = tl.program_id(1) * DC + tl.arange(0, DC)
    m = tl.full([1], float("-inf"), tl.float32)
    mass = tl.zeros([1], tl.float32)
    acc = tl.zeros([DC], tl.float32)
    for s0 in range(0, S, BS):
        s = s0 + tl.arange(0, BS)
        at = s * rows + row
        w = tl.load(lse + at, mask=s < S, other=float("-inf"))
        o = tl.load(parts + at[:, None] * D + d[None, :], mask=(s < S)[:, None] & (d < D)[None, :], other=0.0)
        top = tl.maximum(m, tl.max(w, 0))
        shift = tl.where(top == float("-inf"), 0.0, top)
        w = tl.exp2((w - shift) * LOG2E)
        decay = tl.exp2((m - shift) * LOG2E)
        acc = acc * decay + tl.sum(o * w[:, None], 0)
        mass = mass * decay + tl.sum(w, 0)
        m = top
    acc = tl.where(mass == 0, 0.0, acc / tl.where(mass == 0, 1.0, mass))
    bh, r = row // (n * G), row % (n * G)
    at = bh * (n * G) + (r % G) * n + r // G
    tl.store(out + at * D + d, acc.to(out.dtype.element_ty), mask=d < D)
