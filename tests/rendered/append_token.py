"""append_token: append tokens to a compressed cache tensor on the device, without the host knowing any length.

For layers 0-31. Rendered from `kernels/append.py` and what it calls, without the branches that the constants below rule
out. Nothing but Triton is needed to run it: `append_token[grid](..., **CONSTANTS, **OPTIONS)`.

Keys: int4z.64x1.h2.d64.bfloat16.s4.r128.f64.w16

               0  header  int64     [2, 4]               length, encoded, fault, 0
              64  sink    bfloat16  [2, 4, 64]           the first tokens
            1088  ring    bfloat16  [2, 128, 64]         the newest tokens
           33856  plane   uint16    [2, N / 64, 16, 64]  4 bits of 4 tokens to a word
    33856 + 64 N  params  fp16      [2, N / 64, 64, 2]   scale, middle of 64 x 1 blocks

    bits  15..12 11..8 7..4 3..0
    token t+48   t+32  t+16 t

Tensors

    data uint8, x bfloat16

Symbols

    data              uint8 [B, row bytes]: an arena for each sequence
    x                 new tokens [B, H, n, D], stored at the positions start .. start+n-1: at positions[0] if PLACED,
                      else at the end
    positions         int [n]: where they go, if PLACED; else anything
    row_stride        bytes from one of its rows to the next
    x_stride_b, x_stride_h, x_stride_n  strides of x
    N                 capacity: body tokens the row has room for
    PLACED            whether positions are given
    GP, CP            channel groups and channels of a group, rounded up to powers of two: a tile is [16, GP, CP]
    d, D, DP          channels of a tile, their number, and that rounded up to a power of two
    F                 Form: the facts of the layout that a kernel is compiled for
    n                 new tokens a sequence
    first, last       body tokens to encode now: those that the ring must give up, first .. last-1
    PIECE             tokens of a plane that one step encodes: whole word groups and whole scale blocks
    BLOCK, STEP       tokens whose scales are found together; tokens that are encoded with them at a time
    WRITE             whether the scales are written, too: with the first plane
    program           batch row and head
    arena             uint8 pointer to one batch row: header | sink | ring | planes | params
    h                 head of the cache (kv head)
    p                 position of a token in the sequence;  i = p - F.sink its place in the body
    t, c              tokens and channels of a scale block; `groups` blocks cover the channels
    SPAN              tokens that one row group of 16 words holds, 16 * (codes per word)
    BITS              bits of a plane
    BEFORE            bits of a code that lie in the planes before it
    dtype             what the arena is read as
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import triton
import triton.language as tl

HEADER = tl.constexpr(4)
TILE = 16  # tokens per packed row group: the smallest tensor-core tile
INT = tl.constexpr(1)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: x + ROUND - ROUND is x rounded half to even, |x| < 2^22


@dataclass(frozen=True, repr=False)
class Form:
    """What a kernel must know of a layout at compile time; passed as one `tl.constexpr`.

    Its repr names the compiled function, so it holds every field and only characters of a symbol.
    """

    kind: int  # RAW, INT or FP8
    heads: int
    channels: int
    item: int  # bytes of the model's dtype
    sink: int
    recent: int
    flush: int
    word: int  # bits
    low: int  # bits of the first plane, of the only one if `high` is 0
    high: int
    t: int  # 0: no params
    c: int
    groups: int
    params: int
    levels: int
    doubled: int  # 2 C, an integer
    divisor: int  # twice what the radius of a block is divided by
    sink_offset: int  # bytes, as all offsets
    ring_offset: int
    body_offset: int

    def __repr__(self) -> str:
        return "F" + "_".join(map(str, astuple(self)))


CONSTANTS = {
    "PLACED": False,
    "GP": 64,
    "CP": 1,
    "DP": 64,
    "F": Form(
        kind=1, heads=2, channels=64, item=2, sink=4, recent=128, flush=64, word=16, low=4, high=0, t=64, c=1,
        groups=64, params=2, levels=16, doubled=15, divisor=15, sink_offset=64, ring_offset=1088, body_offset=33856
    ),
}
OPTIONS = {"num_warps": 4}  # of the launch


@triton.jit
def typed(arena, dtype: tl.constexpr):
    """The arena as a pointer to `dtype`."""
    return arena.to(tl.pointer_type(dtype), bitcast=True)


@triton.jit
def header_pointer(arena, h):
    """The header of one head: int64 length, encoded, fault, 0."""
    return typed(arena, tl.int64) + h * HEADER


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
    keep = tl.maximum(start - F.sink, 0)
    whole = (encoded <= keep) | (keep % F.t == 0)
    first = tl.minimum(encoded, keep)
    over = tl.maximum(start + n - F.sink - first - F.recent, 0)
    last = first + (over + F.flush - 1) // F.flush * F.flush
    fits = (start >= 0) & (start <= length) & whole & (last <= N) & ((fault == 0) | (start == 0))
    return start, first, tl.where(fits, last, first), fits


@triton.constexpr_function
def piece_tokens(bits, f):
    """PIECE of the plane of `bits` bits."""
    return max(f.t, TILE * (f.word // bits) if f.kind == INT.value else TILE)


@triton.jit
def plane_pointer(arena, h, N, BITS: tl.constexpr, BEFORE: tl.constexpr, F: tl.constexpr):
    """The first byte of one head in the plane of BITS bits that follows BEFORE bits of other planes."""
    cells = N.to(tl.int64) * F.channels
    offset = F.body_offset + cells * F.heads * BEFORE // 8 + h * (cells * BITS // 8)
    offset = tl.multiple_of(offset, 16)
    return arena + offset


@triton.jit
def exact_offset(h, p, F: tl.constexpr):
    """Where an unencoded token lies, in elements of the model's dtype from the row's start."""
    slot = (p - F.sink) % F.recent
    sink = F.sink_offset // F.item + (h * F.sink + p) * F.channels
    ring = F.ring_offset // F.item + (h * F.recent + slot) * F.channels
    return tl.where(p < F.sink, sink, ring)


@triton.jit
def incoming(arena, x, stride, h, start, i, channel, live, F: tl.constexpr):
    """The values of body tokens that are about to be encoded, from the ring or from x: fp32."""
    p = i + F.sink
    stored = typed(arena, x.dtype.element_ty) + exact_offset(h, p, F)
    source = tl.where(p < start, stored, x + (p - start).to(tl.int64) * stride)
    return tl.load(source + channel, mask=live, other=0.0).to(tl.float32)


@triton.jit
def half_up(x):
    """The least fp16 number not below x (fp32, x >= 0)."""
    y = x.to(tl.float16)
    up = (y.to(tl.int16, bitcast=True) + 1).to(tl.float16, bitcast=True)
    return tl.where(y.to(tl.float32) < x, up, y)


@triton.jit
def scale_of(low, high, F: tl.constexpr):
    """fp16 scale and middle of blocks that span [low, high] (fp32); symmetric ones have middle 0."""
    middle = ((low + high) * 0.5).to(tl.float16)
    radius = tl.maximum(high - middle.to(tl.float32), middle.to(tl.float32) - low)
    return half_up(tl.div_rn(radius, tl.full(radius.shape, F.divisor * 0.5, tl.float32))), middle


@triton.jit
def params_pointer(arena, h, N, F: tl.constexpr):
    """The first byte of one head's scales (and middles)."""
    tokens = N.to(tl.int64)
    planes = tokens * (F.heads * F.channels * (F.low + F.high)) // 8
    return arena + F.body_offset + planes + h * (tokens // F.t * (F.groups * F.params * 2))


@triton.jit
def store_params(arena, h, N, row, group, live, scale, middle, F: tl.constexpr):
    """Write fp16 scale and middle of the blocks `row` and channel groups `group`."""
    start = params_pointer(arena, h, N, F)
    cell = row * F.groups + group
    pair = scale.to(tl.uint16, bitcast=True).to(tl.int32) | (middle.to(tl.uint16, bitcast=True).to(tl.int32) << 16)
    tl.store(typed(start, tl.int32) + cell, pair, mask=live)


@triton.jit
def measure(arena, x, stride, h, N, start, first, last, block, WRITE: tl.constexpr, GP: tl.constexpr, CP: tl.constexpr,
            F: tl.constexpr):
    """Scale and middle (fp32) of the scale blocks that begin at body token `block`: 16 blocks of one token, or one.

    [16, GP, 1] where t = 1, else [1, GP, 1]; written to the arena if WRITE.
    """
    token = tl.arange(0, 16)[:, None, None]
    group = tl.arange(0, GP)[None, :, None]
    inner = tl.arange(0, CP)[None, None, :]
    channel = group * F.c + inner
    real = (inner < F.c) & (channel < F.channels)
    counts = real | (group >= F.groups)  # groups beyond the last are zeros, not empty
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
    scale, middle = scale_of(low, high, F)
    store_params(arena, h, N, row, group, live, scale, middle, F)
    return scale.to(tl.float32), middle.to(tl.float32)


@triton.jit
def quantise(x, scale, middle, F: tl.constexpr):
    """Codes of x, int32; scale and middle (fp32) broadcast against it. A block of equal values has scale 0."""
    x = x - middle
    x = tl.where(scale > 0, tl.div_rn(x, tl.where(scale > 0, scale, 1.0)), 0.0)
    x = tl.minimum(tl.maximum(x + F.doubled * 0.5, 0.0), F.levels - 1.0)
    return ((x + ROUND) - ROUND).to(tl.int32)


@triton.jit
def word_rows(i, BITS: tl.constexpr, F: tl.constexpr):
    """Word row and field of body token i in a plane: token = group * SPAN + field * 16 + row."""
    SPAN: tl.constexpr = 16 * (F.word // BITS)
    return i // SPAN * 16 + i % 16, i % SPAN // 16


@triton.jit
def encode_words(arena, x, stride, h, N, start, first, last, piece, BITS: tl.constexpr, BEFORE: tl.constexpr,
                 GP: tl.constexpr, CP: tl.constexpr, F: tl.constexpr):
    """Encode what body tokens first .. last-1 have in one piece of a plane of packed words.

    Words at the ends also hold other tokens, whose bits stay: read, replace the fields, write.
    """
    SPAN: tl.constexpr = 16 * (F.word // BITS)
    BLOCK: tl.constexpr = F.t  # 16 tokens with a scale each go together
    PIECE: tl.constexpr = SPAN
    STEP: tl.constexpr = BLOCK
    token = tl.arange(0, 16)[:, None, None]
    group = tl.arange(0, GP)[None, :, None]
    inner = tl.arange(0, CP)[None, None, :]
    channel = group * F.c + inner
    real = (inner < F.c) & (channel < F.channels)
    words = typed(plane_pointer(arena, h, N, BITS, BEFORE, F), tl.uint16)
    lo = tl.maximum(first, piece * PIECE)
    hi = tl.minimum(last, piece * PIECE + PIECE)
    for w in range(lo // SPAN, (hi + SPAN - 1) // SPAN):
        at = words + (w * 16 + token) * F.channels + channel
        word = tl.load(at, mask=real, other=0).to(tl.int32)
        a = tl.maximum(lo, w * SPAN) // STEP
        b = (tl.minimum(hi, w * SPAN + SPAN) + STEP - 1) // STEP
        for s in range(a, b):
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
def encode_piece(arena, x, stride, h, N, start, first, last, piece, BITS: tl.constexpr, BEFORE: tl.constexpr,
                 GP: tl.constexpr, CP: tl.constexpr, F: tl.constexpr):
    """Encode what body tokens first .. last-1 have in piece `piece` of a plane; nothing if they have none there."""
    encode_words(arena, x, stride, h, N, start, first, last, piece, BITS, BEFORE, GP, CP, F)


@triton.jit
def encode_plane(arena, x, stride, h, N, start, first, last, BITS: tl.constexpr, BEFORE: tl.constexpr,
                 GP: tl.constexpr, CP: tl.constexpr, F: tl.constexpr):
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
               F: tl.constexpr):
    """Append one token to one head of one sequence."""
    b, h = program // F.heads, program % F.heads
    arena = data + b.to(tl.int64) * row_stride
    x += b.to(tl.int64) * x_stride_b + h.to(tl.int64) * x_stride_h
    start, first, last, fits = plan(arena, h, positions, 1, N, PLACED, F)
    encode_plane(arena, x, 0, h, N, start, first, last, F.low, 0, GP, CP, F)
    tl.debug_barrier()  # the new token may take the slot of one that was just encoded
    store_tokens(arena, x, 0, h, start, last, 1, tl.arange(0, 1), fits, DP, F)
    store_header(arena, h, start + 1, last, fits)


@triton.jit(do_not_specialize=["N"])
def append_token(data, x, positions, row_stride, x_stride_b, x_stride_h, N,
                 PLACED: tl.constexpr, GP: tl.constexpr, CP: tl.constexpr, DP: tl.constexpr,
                 F: tl.constexpr):
    """One new token a sequence. Program: (batch row and head)."""
    program = tl.program_id(0)
    append_one(data, x, positions, row_stride, x_stride_b, x_stride_h, N, program, PLACED, GP, CP, DP, F)
