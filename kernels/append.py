"""Append tokens to a compressed cache tensor on the device, without the host knowing any length.

Symbols beyond those of `kernels.codec`:

    x                new tokens [B, H, n, D], stored at the positions start .. start+n-1: at positions[0] if PLACED,
                     else at the end
    x_stride_b, x_stride_h, x_stride_n   strides of x
    n                new tokens a sequence
    positions        int [n]: where they go, if PLACED; else anything
    PLACED           whether positions are given
    first, last      body tokens to encode now: those that the ring must give up, first .. last-1
    GP, CP           channel groups and channels of a group, rounded up to powers of two: a tile is [16, GP, CP]
    PIECE            tokens of a plane that one step encodes: whole word groups and whole scale blocks
    LOW, HIGH        PIECE of the first plane and of the second
    BLOCK, STEP      tokens whose scales are found together; tokens that are encoded with them at a time
    WRITE            whether the scales are written, too: with the first plane
    TOKENS           new tokens of a program
    program          batch row and head
    k_data, v_data   uint8 [B, row bytes]: the arenas of keys and of values, if one launch is for both
    k_new, v_new     new tokens [B, H, 1, D] of both
    k_row, v_row     bytes from one row of an arena to the next
    k_b, k_h, v_b, v_h   strides of k_new and v_new
    NK, NV           body tokens that the arenas have room for
    GK, CK, GV, CV   GP and CP of keys and of values;  DK, DV likewise DP
    DK, DV           channels of a key and of a value, rounded up to powers of two
    K, V             Form: the facts of the layout of keys, of values

    last = first + flush * ceil(max(0, total - sink - first - recent) / flush)

A token leaves the ring before another takes its slot. One new token is one launch, or one for keys and values: a
program owns a head, and barriers keep that order. More are three: encode, store, commit; each reads the header, only
the last writes it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvc_compile.kernels.codec import (
    FP8,
    INT,
    exact_offset,
    header_pointer,
    plane_pointer,
    quantise,
    scale_of,
    store_params,
    typed,
    word_rows,
)
from kvc_compile.kernels.form import Form
from kvc_compile.layout import TILE


@triton.constexpr_function
def piece_tokens(bits, f):
    """PIECE of the plane of `bits` bits."""
    return max(f.t, TILE * (f.word // bits) if f.kind == INT.value else TILE)


def pieces(f: Form, tokens: int) -> int:
    """The most pieces that `tokens` new tokens can make a plane encode, wherever the cache ends."""
    most = -(-tokens // f.flush) * f.flush
    return max((most - 1) // piece_tokens(b, f) + 2 for b in (f.low, f.high) if b)


@triton.jit
def plan(arena, h, positions, n, N, PLACED: tl.constexpr, F: tl.constexpr):
    """(start, first, last, fits): where n tokens go, what is encoded for them, and whether they can be appended.

    Going back is possible while what remains is whole: into the ring, the sink, or between two scale blocks.
    """
    head = header_pointer(arena, h)
    length = tl.load(head).to(tl.int32)
    encoded = tl.load(head + 1).to(tl.int32)
    fault = tl.load(head + 2).to(tl.int32)
    start = length
    if PLACED:
        start = tl.load(positions).to(tl.int32)
    keep = tl.maximum(start - F.sink, 0)
    whole = (encoded <= keep) | (keep % (F.t if F.t > 0 else 1) == 0)
    first = tl.minimum(encoded, keep)
    over = tl.maximum(start + n - F.sink - first - F.recent, 0)
    last = first + (over + F.flush - 1) // F.flush * F.flush
    fits = (start >= 0) & (start <= length) & whole & (last <= N) & ((fault == 0) | (start == 0))
    return start, first, tl.where(fits, last, first), fits


@triton.jit
def incoming(arena, x, stride, h, start, i, channel, live, F: tl.constexpr):
    """The values of body tokens that are about to be encoded, from the ring or from x: fp32."""
    p = i + F.sink
    stored = typed(arena, x.dtype.element_ty) + exact_offset(h, p, F)
    source = tl.where(p < start, stored, x + (p - start).to(tl.int64) * stride)
    return tl.load(source + channel, mask=live, other=0.0).to(tl.float32)


@triton.jit
def measure(arena, x, stride, h, N, start, first, last, block, WRITE: tl.constexpr, GP: tl.constexpr, CP: tl.constexpr,
            F: tl.constexpr):  # fmt: skip
    """Scale and middle (fp32) of the scale blocks that begin at body token `block`: 16 blocks of one token, or one.

    [16, GP, 1] where t = 1, else [1, GP, 1]; written to the arena if WRITE.
    """
    token = tl.arange(0, 16)[:, None, None]
    group = tl.arange(0, GP)[None, :, None]
    inner = tl.arange(0, CP)[None, None, :]
    channel = group * F.c + inner
    real = (inner < F.c) & (channel < F.channels)
    counts = real | (group >= F.groups)  # groups beyond the last are zeros, not empty
    if F.t > 1:
        low = tl.full([1, GP, 1], float("inf"), tl.float32)
        high = tl.full([1, GP, 1], float("-inf"), tl.float32)
        for k in range(F.t // 16):
            i = block + k * 16 + token
            y = incoming(arena, x, stride, h, start, i, channel, real & (i >= first) & (i < last), F)
            y_low = tl.min(tl.where(counts, y, float("inf")), 2, keep_dims=True)
            y_high = tl.max(tl.where(counts, y, float("-inf")), 2, keep_dims=True)
            low = tl.minimum(low, tl.min(y_low, 0, keep_dims=True))
            high = tl.maximum(high, tl.max(y_high, 0, keep_dims=True))
        row = block // F.t + tl.arange(0, 1)[:, None, None]
        live = (row * F.t >= first) & (row * F.t < last) & (group < F.groups)
    else:
        row = block + token
        here = (row >= first) & (row < last)
        y = incoming(arena, x, stride, h, start, row, channel, real & here, F)
        low = tl.min(tl.where(counts, y, float("inf")), 2, keep_dims=True)
        high = tl.max(tl.where(counts, y, float("-inf")), 2, keep_dims=True)
        live = here & (group < F.groups)
    scale, middle = scale_of(low, high, F)
    if WRITE:
        store_params(arena, h, N, row, group, live, scale, middle, F)
    return scale.to(tl.float32), middle.to(tl.float32)


@triton.jit
def encode_words(arena, x, stride, h, N, start, first, last, piece, BITS: tl.constexpr, BEFORE: tl.constexpr,
                 GP: tl.constexpr, CP: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """Encode what body tokens first .. last-1 have in one piece of a plane of packed words.

    Words at the ends also hold other tokens, whose bits stay: read, replace the fields, write.
    """
    SPAN: tl.constexpr = 16 * (F.word // BITS)
    BLOCK: tl.constexpr = F.t if F.t > 16 else 16  # 16 tokens with a scale each go together
    PIECE: tl.constexpr = BLOCK if BLOCK > SPAN else SPAN
    STEP: tl.constexpr = SPAN if BLOCK > SPAN else BLOCK
    token = tl.arange(0, 16)[:, None, None]
    group = tl.arange(0, GP)[None, :, None]
    inner = tl.arange(0, CP)[None, None, :]
    channel = group * F.c + inner
    real = (inner < F.c) & (channel < F.channels)
    words = typed(plane_pointer(arena, h, N, BITS, BEFORE, F), tl.uint8 if F.word == 8 else tl.uint16)
    lo = tl.maximum(first, piece * PIECE)
    hi = tl.minimum(last, piece * PIECE + PIECE)
    if BLOCK > SPAN:
        scale, middle = measure(arena, x, stride, h, N, start, first, last, piece * PIECE, BEFORE == 0, GP, CP, F)
    for w in range(lo // SPAN, (hi + SPAN - 1) // SPAN):
        at = words + (w * 16 + token) * F.channels + channel
        word = tl.load(at, mask=real, other=0).to(tl.int32)
        a = tl.maximum(lo, w * SPAN) // STEP
        b = (tl.minimum(hi, w * SPAN + SPAN) + STEP - 1) // STEP
        for s in range(a, b):
            if BLOCK <= SPAN:
                scale, middle = measure(arena, x, stride, h, N, start, first, last, s * STEP, BEFORE == 0, GP, CP, F)
            for k in range(STEP // 16):
                i = s * STEP + k * 16 + token
                live = real & (i >= first) & (i < last)
                code = quantise(incoming(arena, x, stride, h, start, i, channel, live, F), scale, middle, F)
                _, field = word_rows(s * STEP + k * 16, BITS, F)
                shift = field * BITS
                bits = ((code >> BEFORE) & ((1 << BITS) - 1)) << shift
                word = tl.where(live, (word & ~(((1 << BITS) - 1) << shift)) | bits, word)
        tl.store(at, word.to(words.dtype.element_ty), mask=real)


@triton.jit
def encode_elements(arena, x, stride, h, N, start, first, last, piece, GP: tl.constexpr, CP: tl.constexpr,
                    F: tl.constexpr):  # fmt: skip
    """Encode what body tokens first .. last-1 have in one piece of whole elements: fp8 or the model's dtype."""
    PIECE: tl.constexpr = F.t if F.t > 16 else 16
    token = tl.arange(0, 16)[:, None, None]
    group = tl.arange(0, GP)[None, :, None]
    inner = tl.arange(0, CP)[None, None, :]
    channel = group * F.c + inner
    real = (inner < F.c) & (channel < F.channels)
    plane = plane_pointer(arena, h, N, F.low, 0, F)
    scale = tl.full([1, 1, 1], 1.0, tl.float32)
    middle = tl.full([1, 1, 1], 0.0, tl.float32)
    if F.params > 0:
        scale, middle = measure(arena, x, stride, h, N, start, first, last, piece * PIECE, True, GP, CP, F)
    for k in range(PIECE // 16):
        i = piece * PIECE + k * 16 + token
        live = real & (i >= first) & (i < last)
        y = incoming(arena, x, stride, h, start, i, channel, live, F)
        if F.kind == FP8:
            tl.store(plane + i * F.channels + channel, quantise(y, scale, middle, F).to(tl.uint8), mask=live)
        else:
            at = typed(plane, x.dtype.element_ty) + i * F.channels + channel
            tl.store(at, y.to(x.dtype.element_ty), mask=live)


@triton.jit
def encode_piece(arena, x, stride, h, N, start, first, last, piece, BITS: tl.constexpr, BEFORE: tl.constexpr,
                 GP: tl.constexpr, CP: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """Encode what body tokens first .. last-1 have in piece `piece` of a plane; nothing if they have none there."""
    if F.kind == INT:
        encode_words(arena, x, stride, h, N, start, first, last, piece, BITS, BEFORE, GP, CP, F)
    else:
        encode_elements(arena, x, stride, h, N, start, first, last, piece, GP, CP, F)


@triton.jit
def encode_plane(arena, x, stride, h, N, start, first, last, BITS: tl.constexpr, BEFORE: tl.constexpr,
                 GP: tl.constexpr, CP: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """Encode body tokens first .. last-1 in one plane, piece after piece."""
    PIECE: tl.constexpr = piece_tokens(BITS, F)
    for piece in range(first // PIECE, (last + PIECE - 1) // PIECE):
        encode_piece(arena, x, stride, h, N, start, first, last, piece, BITS, BEFORE, GP, CP, F)


@triton.jit
def store_tokens(arena, x, stride, h, start, last, n, j, fits, DP: tl.constexpr, F: tl.constexpr):
    """Store those of the new tokens j [m] that are not encoded, in the sink or the ring."""
    d = tl.arange(0, DP)
    p = start + j
    exact = (j < tl.where(fits, n, 0)) & ((p < F.sink) | (p >= F.sink + last))
    live = exact[:, None] & (d < F.channels)[None, :]
    y = tl.load(x + j.to(tl.int64)[:, None] * stride + d[None, :], mask=live, other=0.0)
    at = typed(arena, x.dtype.element_ty) + exact_offset(h, p, F)
    tl.store(at[:, None] + d[None, :], y, mask=live)


@triton.jit
def store_header(arena, h, length, encoded, fits):
    """The new length and encoded count of one head, or the fault that stopped it."""
    head = header_pointer(arena, h)
    tl.debug_barrier()  # every warp has read the old one
    tl.store(head, length.to(tl.int64), mask=fits)
    tl.store(head + 1, encoded.to(tl.int64), mask=fits)
    tl.store(head + 2, tl.where(fits, 0, 1).to(tl.int64))


@triton.jit
def append_one(data, x, positions, row_stride, x_stride_b, x_stride_h, N, program,
               PLACED: tl.constexpr, GP: tl.constexpr, CP: tl.constexpr, DP: tl.constexpr,
               F: tl.constexpr):  # fmt: skip
    """Append one token to one head of one sequence."""
    b, h = program // F.heads, program % F.heads
    arena = data + b.to(tl.int64) * row_stride
    x += b.to(tl.int64) * x_stride_b + h.to(tl.int64) * x_stride_h
    start, first, last, fits = plan(arena, h, positions, 1, N, PLACED, F)
    encode_plane(arena, x, 0, h, N, start, first, last, F.low, 0, GP, CP, F)
    if F.high > 0:
        encode_plane(arena, x, 0, h, N, start, first, last, F.high, F.low, GP, CP, F)
    tl.debug_barrier()  # the new token may take the slot of one that was just encoded
    store_tokens(arena, x, 0, h, start, last, 1, tl.arange(0, 1), fits, DP, F)
    store_header(arena, h, start + 1, last, fits)


@triton.jit(do_not_specialize=["N"])
def append_token(data, x, positions, row_stride, x_stride_b, x_stride_h, N,
                 PLACED: tl.constexpr, GP: tl.constexpr, CP: tl.constexpr, DP: tl.constexpr,
                 F: tl.constexpr):  # fmt: skip
    """One new token a sequence. Program: (batch row and head)."""
    program = tl.program_id(0)
    append_one(data, x, positions, row_stride, x_stride_b, x_stride_h, N, program, PLACED, GP, CP, DP, F)


@triton.jit(do_not_specialize=["NK", "NV"])
def append_pair(k_data, v_data, k_new, v_new, positions, k_row, v_row, k_b, k_h, v_b, v_h, NK, NV,
                PLACED: tl.constexpr, GK: tl.constexpr, CK: tl.constexpr, DK: tl.constexpr, GV: tl.constexpr,
                CV: tl.constexpr, DV: tl.constexpr, K: tl.constexpr, V: tl.constexpr):  # fmt: skip
    """One new key and value a sequence. Program: (batch row and head, keys or values)."""
    program = tl.program_id(0)
    if tl.program_id(1) == 0:
        append_one(k_data, k_new, positions, k_row, k_b, k_h, NK, program, PLACED, GK, CK, DK, K)
    else:
        append_one(v_data, v_new, positions, v_row, v_b, v_h, NV, program, PLACED, GV, CV, DV, V)


@triton.jit(do_not_specialize=["N", "n"])
def append_encode(data, x, positions, row_stride, x_stride_b, x_stride_h, x_stride_n, N, n,
                  PLACED: tl.constexpr, GP: tl.constexpr, CP: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """First of three: encode what leaves the ring. Program: (piece of every plane, batch row and head)."""
    b, h = tl.program_id(1) // F.heads, tl.program_id(1) % F.heads
    arena = data + b.to(tl.int64) * row_stride
    x += b.to(tl.int64) * x_stride_b + h.to(tl.int64) * x_stride_h
    start, first, last, _ = plan(arena, h, positions, n, N, PLACED, F)
    LOW: tl.constexpr = piece_tokens(F.low, F)
    piece = first // LOW + tl.program_id(0)
    if piece * LOW < last:
        encode_piece(arena, x, x_stride_n, h, N, start, first, last, piece, F.low, 0, GP, CP, F)
    if F.high > 0:
        HIGH: tl.constexpr = piece_tokens(F.high, F)
        piece = first // HIGH + tl.program_id(0)
        if piece * HIGH < last:
            encode_piece(arena, x, x_stride_n, h, N, start, first, last, piece, F.high, F.low, GP, CP, F)


@triton.jit(do_not_specialize=["N", "n"])
def append_store(data, x, positions, row_stride, x_stride_b, x_stride_h, x_stride_n, N, n,
                 PLACED: tl.constexpr, TOKENS: tl.constexpr, DP: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """Second of three: sink and ring. Program: (TOKENS new tokens, batch row and head)."""
    b, h = tl.program_id(1) // F.heads, tl.program_id(1) % F.heads
    arena = data + b.to(tl.int64) * row_stride
    x += b.to(tl.int64) * x_stride_b + h.to(tl.int64) * x_stride_h
    start, _, last, fits = plan(arena, h, positions, n, N, PLACED, F)
    j = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    store_tokens(arena, x, x_stride_n, h, start, last, n, j, fits, DP, F)


@triton.jit(do_not_specialize=["N", "n"])
def append_commit(data, positions, row_stride, N, n, PLACED: tl.constexpr, F: tl.constexpr):
    """Third of three: the header. Program: (batch row, head)."""
    b, h = tl.program_id(0) // F.heads, tl.program_id(0) % F.heads
    arena = data + b.to(tl.int64) * row_stride
    start, _, last, fits = plan(arena, h, positions, n, N, PLACED, F)
    store_header(arena, h, start + n, last, fits)
