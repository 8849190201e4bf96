"""Triton building blocks: read and write the tokens of one head of a compressed cache tensor.

The stored form is that of `kvc_compile.layout`, the arithmetic that of `kernels.reference`.
Symbols, here and in the kernels that use these blocks:

    arena      uint8 pointer to one batch row: header | sink | ring | planes | params
    F          Form: the facts of the layout that a kernel is compiled for
    h          head of the cache (kv head)
    N          capacity: body tokens the row has room for
    p          position of a token in the sequence;  i = p - F.sink its place in the body
    d, D, DP   channels of a tile, their number, and that rounded up to a power of two
    t, c       tokens and channels of a scale block; `groups` blocks cover the channels
    C          centre of the codes: x^ = (code - C) * scale + middle
    SPAN       tokens that one row group of 16 words holds, 16 * (codes per word)
    BITS       bits of a plane
    BEFORE     bits of a code that lie in the planes before it
    BN         tokens of a tile
    ALIGNED    whether the tiles lie on multiples of BN in the body
    PART       tokens that a word group has in a tile
    ONE_BLOCK  whether a scale block holds a tile
    data       uint8 [B, row bytes]: an arena for each sequence
    row_stride  bytes from one of its rows to the next
    dtype      what the arena is read as
    DTYPE      the model's dtype, ELEMENT in the kernels of attention

All arithmetic is fp32. Rounding is to nearest even by adding 1.5 * 2^23, division is IEEE: codes and params equal the
reference bit for bit. fp8 goes through integers, so every device and the interpreter run the same code.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvc_compile.kernels import form
from kvc_compile.layout import HEADER_WORDS

RAW, INT, FP8 = tl.constexpr(form.RAW), tl.constexpr(form.INT), tl.constexpr(form.FP8)
HEADER = tl.constexpr(HEADER_WORDS)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: x + ROUND - ROUND is x rounded half to even, |x| < 2^22
FP8_TOP = tl.constexpr(448.0)


# ---------------------------------------------------------------- addresses


@triton.jit
def typed(arena, dtype: tl.constexpr):
    """The arena as a pointer to `dtype`."""
    return arena.to(tl.pointer_type(dtype), bitcast=True)


@triton.jit
def header_pointer(arena, h):
    """The header of one head: int64 length, encoded, fault, 0."""
    return typed(arena, tl.int64) + h * HEADER


@triton.jit
def plane_pointer(arena, h, N, BITS: tl.constexpr, BEFORE: tl.constexpr, F: tl.constexpr):
    """The first byte of one head in the plane of BITS bits that follows BEFORE bits of other planes."""
    cells = N.to(tl.int64) * F.channels
    offset = F.body_offset + cells * F.heads * BEFORE // 8 + h * (cells * BITS // 8)
    if (F.kind == INT) or (F.channels % 16 == 0):
        offset = tl.multiple_of(offset, 16)
    return arena + offset


@triton.jit
def params_pointer(arena, h, N, F: tl.constexpr):
    """The first byte of one head's scales (and middles)."""
    tokens = N.to(tl.int64)
    planes = tokens * (F.heads * F.channels * (F.low + F.high)) // 8
    return arena + F.body_offset + planes + h * (tokens // F.t * (F.groups * F.params * 2))


@triton.jit
def exact_offset(h, p, F: tl.constexpr):
    """Where an unencoded token lies, in elements of the model's dtype from the row's start."""
    slot = (p - F.sink) % (F.recent if F.recent > 0 else 1)
    sink = F.sink_offset // F.item + (h * F.sink + p) * F.channels
    ring = F.ring_offset // F.item + (h * F.recent + slot) * F.channels
    return tl.where(p < F.sink, sink, ring)


@triton.jit
def word_rows(i, BITS: tl.constexpr, F: tl.constexpr):
    """Word row and field of body token i in a plane: token = group * SPAN + field * 16 + row."""
    SPAN: tl.constexpr = 16 * (F.word // BITS)
    return i // SPAN * 16 + i % 16, i % SPAN // 16


# ---------------------------------------------------------------- reading


@triton.jit
def load_fields(
    arena, h, N, i0, encoded, d, BITS: tl.constexpr, BEFORE: tl.constexpr, ALIGNED: tl.constexpr, BN: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    """One plane's bits of the body tokens i0 .. i0+BN-1 and channels d [DP], int32 [BN, DP].

    ALIGNED: i0 is a multiple of BN, so a word is loaded once for all of its tokens in the tile.
    """
    words = typed(plane_pointer(arena, h, N, BITS, BEFORE, F), tl.uint8 if F.word == 8 else tl.uint16)
    real = (d < F.channels)[None, :]
    if ALIGNED:
        SPAN: tl.constexpr = 16 * (F.word // BITS)
        PART: tl.constexpr = SPAN if SPAN < BN else BN  # tokens of a word group in the tile
        r = tl.arange(0, BN // PART * 16)
        token = i0 + r // 16 * PART + r % 16  # the first of those in word row r
        live = ((token >= 0) & (token < encoded))[:, None] & real
        row = i0 // SPAN * 16 + r
        word = tl.load(words + row[:, None] * F.channels + d[None, :], mask=live, other=0).to(tl.int32)
        shift = (i0 % SPAN // 16 + tl.arange(0, PART // 16)) * BITS
        word = tl.reshape(word, [BN // PART, 1, 16, d.shape[0]]) >> shift[None, :, None, None]
        return tl.reshape(word & ((1 << BITS) - 1), [BN, d.shape[0]])
    else:
        i = i0 + tl.arange(0, BN)
        live = ((i >= 0) & (i < encoded))[:, None] & real
        row, field = word_rows(i, BITS, F)
        word = tl.load(words + row[:, None] * F.channels + d[None, :], mask=live, other=0).to(tl.int32)
        return (word >> (field * BITS)[:, None]) & ((1 << BITS) - 1)


@triton.jit
def fp8_value(byte):
    """The fp32 value of e4m3 bits: moved under the exponent of fp16, whose bias is larger by 8."""
    x = byte.to(tl.int32)
    half = (((x & 0x80) << 8) | ((x & 0x7F) << 7)).to(tl.uint16).to(tl.float16, bitcast=True)
    return tl.where((x & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def load_params(arena, h, N, i, d, ok, F: tl.constexpr):
    """Scale and middle (0 if symmetric) of body tokens i [n], fp32 [n, DP]; [n, 1] if a block covers all channels."""
    start = params_pointer(arena, h, N, F)
    if F.groups == 1:
        cell = (i // F.t)[:, None]
        live = ok[:, None]
    else:
        cell = (i // F.t)[:, None] * F.groups + (d // F.c)[None, :]
        live = ok[:, None] & (d < F.channels)[None, :]
    if F.params == 2:
        pair = tl.load(typed(start, tl.int32) + cell, mask=live, other=0)
        scale = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        middle = ((pair >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        scale = tl.load(typed(start, tl.float16) + cell, mask=live, other=0.0).to(tl.float32)
        middle = tl.zeros_like(scale)
    return scale, middle


@triton.jit
def load_body(
    arena, h, N, i0, encoded, d, ALIGNED: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr, F: tl.constexpr
):
    """The decoded body tokens i0 .. i0+BN-1, fp32 [BN, DP]; unspecified outside [0, encoded).

    ALIGNED: i0 is a multiple of BN.
    """
    ONE_BLOCK: tl.constexpr = ALIGNED and (F.t > 0) and (F.t % BN == 0)  # one scale block holds the tile
    i = i0 + tl.arange(0, BN)
    ok = (i >= 0) & (i < encoded)
    live = ok[:, None] & (d < F.channels)[None, :]
    if F.kind == INT:
        code = load_fields(arena, h, N, i0, encoded, d, F.low, 0, ALIGNED, BN, F)
        if F.high > 0:
            high = load_fields(arena, h, N, i0, encoded, d, F.high, F.low, ALIGNED, BN, F)
            code = code | (high << F.low)
        x = code.to(tl.float32) - F.doubled * 0.5
    else:
        start = plane_pointer(arena, h, N, F.low, 0, F)
        cell = i[:, None] * F.channels + d[None, :]
        if F.kind == FP8:
            x = fp8_value(tl.load(start + cell, mask=live, other=0))
        else:
            x = tl.load(typed(start, DTYPE) + cell, mask=live, other=0.0).to(tl.float32)
    if F.params > 0:
        if ONE_BLOCK:
            one = i0 + tl.arange(0, 1)
            scale, middle = load_params(arena, h, N, one, d, (one >= 0) & (one < encoded), F)
        else:
            scale, middle = load_params(arena, h, N, i, d, ok, F)
        x = x * scale
        if F.params == 2:
            x = x + middle
    return x


@triton.jit
def load_new(new, stride, j0, n, d, BN: tl.constexpr, F: tl.constexpr):
    """The new tokens j0 .. j0+BN-1, fp32 [BN, DP]; 0 from n on."""
    j = j0 + tl.arange(0, BN)
    live = (j < n)[:, None] & (d < F.channels)[None, :]
    return tl.load(new + j.to(tl.int64)[:, None] * stride + d[None, :], mask=live, other=0.0).to(tl.float32)


@triton.jit
def load_whole(new, stride, j0, d, BN: tl.constexpr, F: tl.constexpr):
    """The new tokens j0 .. j0+BN-1 [BN, DP], all of which there are, in their own dtype: on their way to a product they
    pass no register."""
    j = j0 + tl.arange(0, BN)
    at = new + j.to(tl.int64)[:, None] * stride + d[None, :]
    if F.channels == d.shape[0]:
        return tl.load(at)
    else:
        return tl.load(at, mask=(d < F.channels)[None, :], other=0.0)


@triton.jit
def load_exact(arena, new, stride, h, length, encoded, total, p0, d, BN: tl.constexpr, F: tl.constexpr):
    """Those of the tokens at positions p0 .. p0+BN-1 that are not encoded: sink, ring, or new from `length` on; fp32
    [BN, DP], 0 for all others."""
    DTYPE: tl.constexpr = new.dtype.element_ty
    p = p0 + tl.arange(0, BN)
    exact = (p >= 0) & (p < total) & ((p < F.sink) | (p >= F.sink + encoded))
    real = (d < F.channels)[None, :]
    stored = typed(arena, DTYPE) + exact_offset(h, p, F)
    if F.channels * F.item % 16 == 0:
        stored = tl.multiple_of(stored, 16)
    x = tl.load(stored[:, None] + d[None, :], mask=(exact & (p < length))[:, None] & real, other=0.0)
    source = new + (p - length).to(tl.int64) * stride
    y = tl.load(source[:, None] + d[None, :], mask=(exact & (p >= length))[:, None] & real, other=0.0)
    return tl.where((p < length)[:, None], x, y).to(tl.float32)


@triton.jit
def load_tokens(
    arena, new, stride, h, N, length, encoded, total, p0, d, ALIGNED: tl.constexpr, BN: tl.constexpr, F: tl.constexpr
):
    """The tokens at any positions p0 .. p0+BN-1: sink, body, ring, or new from `length` on; fp32 [BN, DP].

    0 outside [0, total).
    """
    p = p0 + tl.arange(0, BN)
    body = (p >= F.sink) & (p < F.sink + encoded)
    x = load_exact(arena, new, stride, h, length, encoded, total, p0, d, BN, F)
    y = load_body(arena, h, N, p0 - F.sink, encoded, d, ALIGNED, BN, new.dtype.element_ty, F)
    return tl.where(body[:, None], y, x)


# ---------------------------------------------------------------- encoding


@triton.jit
def half_up(x):
    """The least fp16 number not below x (fp32, x >= 0)."""
    y = x.to(tl.float16)
    up = (y.to(tl.int16, bitcast=True) + 1).to(tl.float16, bitcast=True)
    return tl.where(y.to(tl.float32) < x, up, y)


@triton.jit
def fp8_bits(x):
    """The e4m3 bits of x (fp32), rounded to nearest even and clamped to +-448: int32 0 .. 255."""
    a = tl.minimum(tl.abs(x), FP8_TOP)
    bits = a.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = ((a * 512.0 + ROUND) - ROUND).to(tl.int32)  # below 2^-6 the step is 2^-9
    code = tl.where(a < 0.015625, small, normal)
    code = tl.where(x != x, 0x7F, code)
    return code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)


@triton.jit
def quantise(x, scale, middle, F: tl.constexpr):
    """Codes of x, int32; scale and middle (fp32) broadcast against it. A block of equal values has scale 0."""
    if F.params == 2:
        x = x - middle
    if F.params > 0:
        x = tl.where(scale > 0, tl.div_rn(x, tl.where(scale > 0, scale, 1.0)), 0.0)
    if F.kind == FP8:
        return fp8_bits(x)
    else:
        x = tl.minimum(tl.maximum(x + F.doubled * 0.5, 0.0), F.levels - 1.0)
        return ((x + ROUND) - ROUND).to(tl.int32)


@triton.jit
def scale_of(low, high, F: tl.constexpr):
    """fp16 scale and middle of blocks that span [low, high] (fp32); symmetric ones have middle 0."""
    if F.params == 2:
        middle = ((low + high) * 0.5).to(tl.float16)
        radius = tl.maximum(high - middle.to(tl.float32), middle.to(tl.float32) - low)
    else:
        middle = tl.zeros_like(low).to(tl.float16)
        radius = tl.maximum(tl.abs(low), tl.abs(high))
    return half_up(tl.div_rn(radius, tl.full(radius.shape, F.divisor * 0.5, tl.float32))), middle


@triton.jit
def store_params(arena, h, N, row, group, live, scale, middle, F: tl.constexpr):
    """Write fp16 scale and middle of the blocks `row` and channel groups `group`."""
    start = params_pointer(arena, h, N, F)
    cell = row * F.groups + group
    if F.params == 2:
        pair = scale.to(tl.uint16, bitcast=True).to(tl.int32) | (middle.to(tl.uint16, bitcast=True).to(tl.int32) << 16)
        tl.store(typed(start, tl.int32) + cell, pair, mask=live)
    else:
        tl.store(typed(start, tl.float16) + cell, scale, mask=live)
