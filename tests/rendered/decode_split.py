"""decode_split: attention of a few queries over a compressed cache: decoding, at the speed of memory.

For layers 0-31. Rendered from `kernels/decode.py` and what it calls, without the branches that the constants below rule
out. Nothing but Triton is needed to run it: `decode_split[grid](..., **CONSTANTS, **OPTIONS)`.

Keys: int4z.64x1.h2.d64.bfloat16.s4.r128.f64.w16

               0  header  int64     [2, 4]               length, encoded, fault, 0
              64  sink    bfloat16  [2, 4, 64]           the first tokens
            1088  ring    bfloat16  [2, 128, 64]         the newest tokens
           33856  plane   uint16    [2, N / 64, 16, 64]  4 bits of 4 tokens to a word
    33856 + 64 N  params  fp16      [2, N / 64, 64, 2]   scale, middle of 64 x 1 blocks

    bits  15..12 11..8 7..4 3..0
    token t+48   t+32  t+16 t

Values: int4z.1x64.h2.d64.bfloat16.s4.r128.f1.w16

               0  header  int64     [2, 4]               length, encoded, fault, 0
              64  sink    bfloat16  [2, 4, 64]           the first tokens
            1088  ring    bfloat16  [2, 128, 64]         the newest tokens
           33856  plane   uint16    [2, N / 64, 16, 64]  4 bits of 4 tokens to a word
    33856 + 64 N  params  fp16      [2, N, 1, 2]         scale, middle of 1 x 64 blocks

    bits  15..12 11..8 7..4 3..0
    token t+48   t+32  t+16 t

Tensors

    q bfloat16, k_new bfloat16, v_new bfloat16, positions int64, out float32, lse float32, k_data uint8, v_data uint8

Symbols

    q, k_new, v_new   the new tokens [B, query heads or H, n, D]; they stand at the positions L .. L+n-1
    mask              [b, h, n, width] by absolute position, bool as uint8 or added; anything if MASK is NO_MASK
    bounds            int32 [b, h, n, 3]: the first position that a query sees, one past the last, and whether it sees
                      all between them with nothing added; anything if MASK is NO_MASK
    sinks             [query heads]: a score without a value for each, if SINKS; else anything
    positions         int [n]: where the new tokens will be, if PLACED; else anything
    out               [B, query heads, n, Dv] if DIRECT, else fp32 [S, B * H * n * G, Dv], as `parts` of `merge`
    lse               fp32 [S, B * H * n * G]: log-sum-exp of each part
    k_data, v_data    uint8 [B, row bytes]: the arenas of keys and of values
    scale             what q k^T is multiplied by
    n                 new tokens a sequence, and queries a head
    S                 splits of the sequence; each leaves (o, lse) and `merge` combines them
    S1, S2            the splits before S1 take body tiles, those from S2 on the others
    shown, hidden     cached tokens that are seen, the last ones, if WINDOW; how many that hides. A mask then begins at
                      the first of them
    NK, NV            body tokens that an arena of keys, of values has room for
    k_row, v_row      bytes from one row of an arena to the next
    width             positions that the mask covers
    q_b, q_h, q_n     strides of q over batch, heads and tokens; so are k_b .. k_n, v_b .. v_n of the new tokens
    k_b, k_h, k_n     strides of k_new
    v_b, v_h, v_n     strides of v_new
    mask_b, mask_h, mask_n, mask_p  strides of the mask
    see_b, see_h, see_n  strides of bounds
    G                 query heads of one kv head;  query rows r = i * G + g: query i, head g of the group
    MASK              NO_MASK, BOOL_MASK or ADDED_MASK
    CAUSAL            without a mask: whether query i sees positions up to L + i, or all
    PLACED, DIRECT    whether positions are given; whether there is one split, and out is final
    CAP, SINKS        what scores are capped at, 0 if they are not; whether there are sinks
    WINDOW            whether only some are seen: a sliding window
    BM                query rows, rounded up: the columns of a tile
    BT                tokens of a body tile, which begins at body token BT * tile
    TP, J             tokens of a part of it, one operand of the tensor core; J = BT / TP parts. Part j is field j of
                      words
    MIX               tokens of a tile of what is not body: sinks, ring, new tokens, and body tokens next to those
    CK, CV            channels of a chunk of keys and of values: a power of two that divides D and every channel group
    WIDE              the model's dtype, as an operand
    STAGES            tiles in flight
    ASM               whether there is inline assembly, which the interpreter lacks
    EARLY             whether `merge` may start before what it waits for has ended
    K, V              Form: the facts of the layout of keys, of values
    SPAN              tokens that a row group of 16 words of a plane holds
    KC, VC            chunks of the channels of a key and of a value
    GROUPS            channel groups of a value that have a scale each
    BITS              bits of a plane
    PER               parts that one load of words holds; PER_HIGH for the second plane
    PER_HIGH          parts that one load of words of the second plane holds
    LOW, HIGH         SPAN of the first plane and of the second
    ACROSS            whether channels are the rows of what is loaded: of values
    BIASED            whether codes stay too large by a constant, see `kernels.unpack`
    WEIGHT, j         what a code is multiplied by; the field of a word, or the part of a tile
    SHIFT             bits that a word is shifted by to the right, or if negative to the left
    text              an instruction
    SHRINK            what exact numbers are multiplied by to fit fp16
    OTHER             the scale of tokens that have none
    L, T              cached tokens to attend to, and with the new ones: T = L + n. L is positions[0] where positions
                      are given (what the cache holds from there on is about to be replaced), else all it holds
    ELEMENT           the model's dtype
    ORIGIN            where the first tile begins: a position, 0 or less
    parts             fp32 [S, B * H * n * G, D]: what the splits leave in `out`
    D, BS, DC         channels of a value; splits and channels that a program of `merge` takes at a time
    arena             uint8 pointer to one batch row: header | sink | ring | planes | params
    F                 Form: the facts of the layout that a kernel is compiled for
    h                 head of the cache (kv head)
    N                 capacity: body tokens the row has room for
    p                 position of a token in the sequence;  i = p - F.sink its place in the body
    t, c              tokens and channels of a scale block; `groups` blocks cover the channels
    C                 centre of the codes: x^ = (code - C) * scale + middle
    BEFORE            bits of a code that lie in the planes before it
    dtype             what the arena is read as
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import triton
import triton.language as tl

HEADER = tl.constexpr(4)
LOG2E = tl.constexpr(1.4426950408889634)
BLANK = tl.constexpr(-1e+30)  # a score that counts nothing; finite, so that differences of two are no NaN
INT = tl.constexpr(1)
NO_MASK = tl.constexpr(0)
RAW = tl.constexpr(0)


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
    "G": 4,
    "MASK": 0,
    "CAUSAL": True,
    "PLACED": True,
    "DIRECT": False,
    "CAP": 0.0,
    "SINKS": False,
    "WINDOW": False,
    "K": Form(
        kind=1, heads=2, channels=64, item=2, sink=4, recent=128, flush=64, word=16, low=4, high=0, t=64, c=1,
        groups=64, params=2, levels=16, doubled=15, divisor=15, sink_offset=64, ring_offset=1088, body_offset=33856
    ),
    "V": Form(
        kind=1, heads=2, channels=64, item=2, sink=4, recent=128, flush=1, word=16, low=4, high=0, t=1, c=64, groups=1,
        params=2, levels=16, doubled=15, divisor=15, sink_offset=64, ring_offset=1088, body_offset=33856
    ),
    "BM": 8,
    "BT": 64,
    "TP": 16,
    "MIX": 16,
    "CK": 64,
    "CV": 64,
    "STAGES": 3,
    "WIDE": tl.bfloat16,
    "ASM": True,
    "EARLY": True,
}
OPTIONS = {"num_warps": 1}  # of the launch


@triton.jit
def typed(arena, dtype: tl.constexpr):
    """The arena as a pointer to `dtype`."""
    return arena.to(tl.pointer_type(dtype), bitcast=True)


@triton.jit
def header_pointer(arena, h):
    """The header of one head: int64 length, encoded, fault, 0."""
    return typed(arena, tl.int64) + h * HEADER


@triton.jit
def cache_lengths(k_arena, v_arena, h, positions, PLACED: tl.constexpr, K: tl.constexpr, V: tl.constexpr):
    """(cached tokens to attend to, encoded keys and values among them, whether the two caches cannot be attended)."""
    k_head, v_head = header_pointer(k_arena, h), header_pointer(v_arena, h)
    length = tl.load(k_head).to(tl.int32)
    v_length = tl.load(v_head).to(tl.int32)
    fault = (tl.load(k_head + 2) != 0) | (tl.load(v_head + 2) != 0)
    start = tl.load(positions).to(tl.int32)
    fault = fault | (start < 0) | (start > length) | (start > v_length)
    length = tl.maximum(tl.minimum(start, tl.minimum(length, v_length)), 0)
    k_encoded = tl.minimum(tl.load(k_head + 1).to(tl.int32), tl.maximum(length - K.sink, 0))
    v_encoded = tl.minimum(tl.load(v_head + 1).to(tl.int32), tl.maximum(length - V.sink, 0))
    return length, k_encoded, v_encoded, fault


@triton.constexpr_function
def span(bits, f):
    """SPAN of a plane; whole elements lie one after the other."""
    return 16 * (f.word // bits) if f.kind == INT.value else 16


@triton.jit
def plane_pointer(arena, h, N, BITS: tl.constexpr, BEFORE: tl.constexpr, F: tl.constexpr):
    """The first byte of one head in the plane of BITS bits that follows BEFORE bits of other planes."""
    cells = N.to(tl.int64) * F.channels
    offset = F.body_offset + cells * F.heads * BEFORE // 8 + h * (cells * BITS // 8)
    offset = tl.multiple_of(offset, 16)
    return arena + offset


@triton.jit
def load_plane(
    arena, h, N, tile, c, BITS: tl.constexpr, BEFORE: tl.constexpr, BT: tl.constexpr, TP: tl.constexpr,
    ACROSS: tl.constexpr, ELEMENT: tl.constexpr, ASM: tl.constexpr, F: tl.constexpr,
):
    """The stored words of one plane for a tile and channels c [C]: a tuple of [TP, C].

    ACROSS: of [C, TP] instead.
    """
    SPAN: tl.constexpr = span(BITS, F)
    start = plane_pointer(arena, h, N, BITS, BEFORE, F)
    words = typed(start, tl.uint16)
    PER: tl.constexpr = BT // TP  # parts that one load holds
    r = tl.arange(0, TP)
    # what a thread loads of a tile, and the tile: the first does not change from tile to tile
    cell = r[None, :] * F.channels + c[:, None] if ACROSS else r[:, None] * F.channels + c[None, :]
    out = ()
    for a in tl.static_range((BT // TP) // PER):
        x = tl.load((words + cell) + (tile * (BT // SPAN * 16 * F.channels) + a * TP * F.channels))
        out = out + (x,)
    return out


@triton.jit
def load_high(
    arena, h, N, tile, c, BT: tl.constexpr, TP: tl.constexpr, ACROSS: tl.constexpr, ELEMENT: tl.constexpr,
    ASM: tl.constexpr, F: tl.constexpr,
):
    """`load_plane` of the second plane; nothing where there is none."""
    return ()


@triton.jit
def params_pointer(arena, h, N, F: tl.constexpr):
    """The first byte of one head's scales (and middles)."""
    tokens = N.to(tl.int64)
    planes = tokens * (F.heads * F.channels * (F.low + F.high)) // 8
    return arena + F.body_offset + planes + h * (tokens // F.t * (F.groups * F.params * 2))


@triton.constexpr_function
def begins_block(f, at):
    """Whether another block of tokens begins at token `at` of a tile, or with the tile."""
    return f.params > 0 and f.t > 1 and at % f.t == 0


@triton.jit
def load_pairs(start, cell, block, F: tl.constexpr):
    """Scales and middles as they are stored, `cell` behind those of a block: int32 pairs, or fp16 scales alone."""
    return tl.load((typed(start, tl.int32) + cell) + block * F.groups)


@triton.jit
def pair_of(word):
    """The two fp16 numbers of an int32: scale and middle."""
    low = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return low, ((word >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def split_pairs(stored, F: tl.constexpr):
    """(scale, middle) fp16; the middle is 0 where there is none."""
    scale, middle = pair_of(stored)
    return scale, middle


@triton.constexpr_function
def block_of(f, at):
    """Which block of tokens of a tile the token `at` lies in."""
    return at // f.t


@triton.constexpr_function
def place(bits, j):
    """(right shift, f) of field j: the shift of the word, negative to the left, and where the field lies then."""
    at = bits * j
    shift = -2 if at == 0 else 0 if at <= 10 - bits else 6
    return shift, at - shift


@triton.constexpr_function
def shift_of(bits, j):
    return place(bits, j)[0]


@triton.constexpr_function
def shift_asm(shift):
    return f"shr.u32 $0, $1, {shift};" if shift > 0 else f"shl.b32 $0, $1, {-shift};"


@triton.constexpr_function
def half_bits(x):
    """The bits of a positive normal fp16 number; an error unless x is one."""
    e = 0
    while x >= 2.0 ** (e + 1):
        e += 1
    bits = ((e + 15) << 10) + int((x / 2.0**e - 1) * 1024)
    assert x >= 1 and (bits & 1023 | 1024) * 2.0 ** (e - 10) == x
    return bits


@triton.constexpr_function
def surplus(bits, j, weight):
    """What a field holds too much before the subtraction: bias + centre * weight."""
    return weight * 2.0 ** (10 - place(bits, j)[1]) + (2**bits - 1) / 2 * weight


@triton.constexpr_function
def field_asm(bits, j, weight, biased):
    f = place(bits, j)[1]
    mask, top, less = ((2**bits - 1) << f), half_bits(weight * 2.0 ** (10 - f)), half_bits(surplus(bits, j, weight))
    if biased:
        return f"lop3.b32 $0, $1, 0x{mask:04x}{mask:04x}, 0x{top:04x}{top:04x}, 0xea;"
    return (
        f"{{ .reg .b32 a; lop3.b32 $0, $1, 0x{mask:04x}{mask:04x}, 0x{top:04x}{top:04x}, 0xea; "
        f"mov.b32 a, 0x{less:04x}{less:04x}; sub.f16x2 $0, $0, a; }}"
    )


@triton.jit
def field(word, j: tl.constexpr, BITS: tl.constexpr, WEIGHT: tl.constexpr, BIASED: tl.constexpr, ASM: tl.constexpr):
    """The centred codes of field j times WEIGHT, fp16: (code - (2^BITS - 1) / 2) * WEIGHT. word: uint16.

    BIASED: without the subtraction, too large by `surplus`.
    """
    SHIFT: tl.constexpr = shift_of(BITS, j)
    if SHIFT != 0:  # an operation of its own, so that fields with the same shift share it
        word = tl.inline_asm_elementwise(shift_asm(SHIFT), "=r,r", [word], dtype=tl.uint16, is_pure=True, pack=2)
    text: tl.constexpr = field_asm(BITS, j, WEIGHT, BIASED)
    return tl.inline_asm_elementwise(text, "=&r,r", [word], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def part(
    low, high, j: tl.constexpr, BIASED: tl.constexpr, BT: tl.constexpr, TP: tl.constexpr, ASM: tl.constexpr,
    WIDE: tl.constexpr, F: tl.constexpr,
):
    """Part j of the loads of one tile: centred codes, or stored numbers, as an operand."""
    PER: tl.constexpr = BT // TP
    x = field(low[j // PER], j % PER, F.low, 1, BIASED, ASM)
    return x


@triton.constexpr_function
def biased(f):
    """Whether keys stay biased: what that adds to a score follows from the queries, cheaper than to subtract it."""
    return f.params > 0 and f.t >= 64 and f.kind == INT.value and f.low <= 2 and not f.high


@triton.jit
def token_index(j: tl.constexpr, BT: tl.constexpr, TP: tl.constexpr):
    """The tokens of part j within the tile, row by row."""
    r = tl.arange(0, TP)
    return r // 16 * (BT // (TP // 16)) + j * 16 + r % 16


@triton.jit
def capped(s, CAP: tl.constexpr):
    """CAP tanh(s / CAP), exact to a rounding of CAP; s where CAP is 0."""
    return s


@triton.constexpr_function
def boost(f):
    """What p' is multiplied by, so that neither small nor large scales leave the range of fp16: a power of two."""
    return {256: 64.0, 16: 4.0, 8: 2.0}.get(f.levels, 1.0) if f.kind == INT.value and f.params else 1.0


@triton.jit
def body_tile(
    tile, k_arena, v_arena, h, NK, NV, mask_rows, mask_p, live, first, end, q, factor, sums, m, mass, sides, acc,
    MASK: tl.constexpr, CAP: tl.constexpr, BT: tl.constexpr, TP: tl.constexpr, CK: tl.constexpr, CV: tl.constexpr,
    BM: tl.constexpr, ASM: tl.constexpr, ELEMENT: tl.constexpr, WIDE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):
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
    k_params = params_pointer(k_arena, h, NK, K)
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
                y = tl.broadcast_to(middle[None, :], [16, CK])  # a product of equal rows
                new_less = new_less + (tl.dot(y, q[a], less[block_of(K, j * 16)]),)
            x = part(k_low[a], k_high[a], j, biased(K), BT, TP, ASM, WIDE, K)
            x = tl.dot(x, scaled, s[j])
            scores = scores + (x,)
        s = scores
        less = new_less
    scores = ()
    for j in tl.static_range(J):
        t = token_index(j, BT, TP)
        x = s[j] * factor[None, :]
        if begins_block(K, j * 16):
            middle = tl.max(less[block_of(K, j * 16)], 0) * factor
        x += middle[None, :]
        x = capped(x, CAP * LOG2E)
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
        mass += y
        p = p + (y,)

    new_sides, new_acc, weights = (), (), p
    for a in tl.static_range(VC):
        # a new group of channels begins
        weights = ()
        side = sides[a * CV // V.c] * decay[None, :]
        for j in tl.static_range(J):
            t = token_index(j, BT, TP)
            scale, middle = split_pairs(load_pairs(v_params, t * V.groups + a * CV // V.c, i0, V), V)
            side += p[j] * middle.to(tl.float32)[:, None]
            weights = weights + ((p[j] * (scale.to(tl.float32) * boost(V))[:, None]).to(tl.float16),)
        new_sides = new_sides + (side,)
        o = acc[a] * decay[None, :]
        for j in tl.static_range(J):
            o = tl.dot(part(v_low[a], v_high[a], j, False, BT, TP, ASM, WIDE, V), weights[j], o)
        new_acc = new_acc + (o,)
    return top, mass, new_sides, new_acc


@triton.constexpr_function
def shrink_of(element, f):
    """What exact keys are multiplied by to be fp16 operands: those of bfloat16 may be larger than fp16 can hold."""
    return 0.0625 if element == tl.bfloat16 and f.kind != RAW.value else 1.0


@triton.jit
def exact_rows(h, p0, MIX: tl.constexpr, F: tl.constexpr):
    """`codec.exact_offset` of the positions p0 .. p0+MIX-1, with one division for all."""
    r = tl.arange(0, MIX)
    p = p0 + r
    slot = ((p0 - F.sink) % F.recent + F.recent) % F.recent + r
    slot = tl.where(slot >= F.recent, slot - F.recent, slot)
    sink = F.sink_offset // F.item + (h * F.sink + p) * F.channels
    ring = F.ring_offset // F.item + (h * F.recent + slot) * F.channels
    return tl.where(p < F.sink, sink, ring)


@triton.jit
def packed_rows(arena, h, N, i0, body, c, BITS: tl.constexpr, BEFORE: tl.constexpr, MIX: tl.constexpr, F: tl.constexpr):
    """The words of one plane that hold the body tokens i0 .. i0+MIX-1, i0 a multiple of MIX = 16."""
    SPAN: tl.constexpr = span(BITS, F)
    words = typed(plane_pointer(arena, h, N, BITS, BEFORE, F), tl.uint16)
    row = i0 // SPAN * 16 + tl.arange(0, MIX)
    return tl.load(words + (row * F.channels)[:, None] + c[None, :], mask=body[:, None], other=0)


@triton.jit
def load_mixed(
    arena, new, stride, h, N, length, encoded, total, p0, c, MIX: tl.constexpr, F: tl.constexpr,
):
    """What is stored of the tokens at the positions p0 .. p0+MIX-1 and channels c [C]: (x, low, high) of [MIX, C].

    x: the numbers of those that are not encoded, 0 for the others; low and high: the words of the planes of those that
    are, or the numbers again where there is no such plane.
    """
    ELEMENT: tl.constexpr = new.dtype.element_ty
    p = p0 + tl.arange(0, MIX)
    i = p - F.sink
    body = (i >= 0) & (i < encoded)
    stored = typed(arena, ELEMENT) + exact_rows(h, p0, MIX, F)
    source = tl.where(p < length, stored, new + (p - length).to(tl.int64) * stride)
    source = tl.multiple_of(source, 16)
    live = (p >= 0) & (p < total)
    live = live & (~body)
    x = tl.load(source[:, None] + c[None, :], mask=live[:, None], other=0.0)
    low, high = x, x
    low = packed_rows(arena, h, N, p0 - F.sink, body, c, F.low, 0, MIX, F)
    return x, low, high


@triton.jit
def load_token_pairs(arena, h, N, p0, encoded, group, MIX: tl.constexpr, F: tl.constexpr):
    """The scales, and middles, that belong to the tokens from position p0 on, as they are stored: [MIX]."""
    i = p0 - F.sink + tl.arange(0, MIX)
    body = (i >= 0) & (i < encoded)
    start = params_pointer(arena, h, N, F)
    return tl.load(typed(start, tl.int32) + i * F.groups + group, mask=body, other=0)


@triton.jit
def shifted(word, bits, ASM: tl.constexpr):
    """uint16 words, `bits` (0 .. 15, a scalar) to the right; what comes in at the top is arbitrary."""
    amount = tl.full(word.shape, bits, tl.int32)
    return tl.inline_asm_elementwise(
        "shr.u32 $0, $1, $2;", "=r,r,r,r", [word, amount], dtype=tl.uint16, is_pure=True, pack=2
    )


@triton.jit
def operand(
    stored, p0, encoded, MIX: tl.constexpr, WIDE: tl.constexpr, SHRINK: tl.constexpr, ASM: tl.constexpr,
    F: tl.constexpr,
):
    """What `load_mixed` loaded as an operand [MIX, C]: codes, and exact numbers times SHRINK."""
    x = stored[0]
    if x.dtype != tl.float16:
        x = (x.to(tl.float32) * SHRINK).to(tl.float16)
    i0 = p0 - F.sink
    i = i0 + tl.arange(0, MIX)
    body = (i >= 0) & (i < encoded)
    LOW: tl.constexpr = span(F.low, F)
    y = field(shifted(stored[1], i0 % LOW // 16 * F.low, ASM), 0, F.low, 1, False, ASM)
    return x + y * body.to(tl.float16)[:, None]  # a selection: one of the two is 0


@triton.jit
def token_pairs(stored, p0, encoded, OTHER: tl.constexpr, MIX: tl.constexpr, F: tl.constexpr):
    """fp32 scale and middle [MIX] from those; OTHER and 0 for tokens that are not encoded."""
    i = p0 - F.sink + tl.arange(0, MIX)
    body = (i >= 0) & (i < encoded)
    scale, middle = pair_of(stored)
    return tl.where(body, scale.to(tl.float32), OTHER), middle.to(tl.float32)


@triton.jit
def mixed_tile(
    p0, k_arena, v_arena, k_new, v_new, k_stride, v_stride, mask_rows, mask_p, live, first, end, h, NK, NV,
    length, k_encoded, v_encoded, total, i, q, factor, sums, m, mass, sides, acc,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, MIX: tl.constexpr,
    CK: tl.constexpr, CV: tl.constexpr, BM: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr,
):
    """MIX tokens from position p0 on, wherever they lie: the new (m, mass [BM], sides of [BM], acc)."""
    KC: tl.constexpr = K.channels // CK
    VC: tl.constexpr = V.channels // CV
    SHRINK: tl.constexpr = shrink_of(k_new.dtype.element_ty, K)
    ck, cv = tl.arange(0, CK), tl.arange(0, CV)
    p = p0 + tl.arange(0, MIX)
    seen = ((p >= 0) & (p < total))[:, None] & live[None, :]
    k, v, k_pairs, v_pairs = (), (), (), ()
    # a block of keys with a scale covers the tile, so that all of it is encoded, or nothing
    at = p0 + ck * 0
    real = (at + MIX > K.sink) & (at < K.sink + k_encoded)
    for a in tl.static_range(KC):
        c = a * CK + ck
        k = k + (load_mixed(k_arena, k_new, k_stride, h, NK, length, k_encoded, total, p0, c, MIX, K),)
        start = params_pointer(k_arena, h, NK, K)
        where = c // K.c + (p0 - K.sink) // K.t * K.groups
        k_pairs = k_pairs + (tl.load(typed(start, tl.int32) + where, mask=real, other=0),)
    for a in tl.static_range(VC):
        c = a * CV + cv
        v = v + (load_mixed(v_arena, v_new, v_stride, h, NV, length, v_encoded, total, p0, c, MIX, V),)
        v_pairs = v_pairs + (load_token_pairs(v_arena, h, NV, p0, v_encoded, a * CV // V.c, MIX, V),)

    s = tl.zeros([MIX, BM], tl.float32)
    less = tl.zeros([BM], tl.float32)
    for a in tl.static_range(KC):
        x = operand(k[a], p0, k_encoded, MIX, WIDE, SHRINK, ASM, K)
        scale, middle = pair_of(k_pairs[a])
        less += tl.max(tl.dot(tl.broadcast_to(middle[None, :], [16, CK]), q[a]), 0)
        s = tl.dot(x, q[a] * tl.where(real, scale, 1.0 / SHRINK)[:, None], s)
    s = (s + less[None, :]) * factor[None, :]
    s = capped(s, CAP * LOG2E)
    seen = seen & (p[:, None] <= length + i[None, :])
    s = tl.where(seen, s, BLANK)
    top = tl.maximum(m, tl.max(s, 0))
    decay = tl.exp2(m - top)
    y = tl.where(s > BLANK / 2, tl.exp2(s - top[None, :]), 0.0)
    mass = mass * decay + tl.sum(y, 0)
    new_sides, new_acc = (), ()
    weight = y.to(tl.float16)
    for a in tl.static_range(VC):
        scale, middle = token_pairs(v_pairs[a * CV // V.c], p0, v_encoded, 1.0, MIX, V)
        weight = (y * (scale * boost(V))[:, None]).to(tl.float16)
        new_sides = new_sides + (sides[a * CV // V.c] * decay + tl.sum(y * middle[:, None], 0),)
        x = operand(v[a], p0, v_encoded, MIX, WIDE, 1.0, ASM, V)
        new_acc = new_acc + (tl.dot(tl.trans(x), weight, acc[a] * decay[None, :]),)
    return top, mass, new_sides, new_acc


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
):
    """Program: (split, batch row and kv head). Arguments and results as those of `attend.attend_split`.

    S1, S2: the splits before S1 take body tiles, those from S2 on the others.
    WIDE: the model's dtype, as an operand. STAGES: tiles in flight. ASM: with inline assembly, which the interpreter
    lacks.
    """
    ELEMENT: tl.constexpr = k_new.dtype.element_ty
    KC: tl.constexpr = K.channels // CK
    VC: tl.constexpr = V.channels // CV
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

    # positions [lo, hi) are seen by some query, [all_lo, all_hi) by all of them
    first = tl.zeros([BM], tl.int32)
    end = tl.full([BM], 0, tl.int32) + total
    plain = True
    mask_rows = mask + b * mask_b + (h * G + g) * mask_h + i.to(tl.int64) * mask_n
    hidden = 0
    end = length + i + 1
    lo, hi = tl.min(tl.where(live, first, total), 0), tl.max(tl.where(live, end, 0), 0)
    all_lo, all_hi = tl.max(tl.where(live, first, 0), 0), tl.min(tl.where(live, end, total), 0)

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
    largest = tl.zeros([BM], tl.float32)
    for a in tl.static_range(KC):
        largest = tl.maximum(largest, tl.max(tl.abs(y[a].to(tl.float32)), 0))
    # from the bits of fp32: e with 2^e > largest >= 2^(e-1)
    e = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 126, -100)
    shrink = ((127 - e) << 23).to(tl.float32, bitcast=True)
    factor = factor * ((127 + e) << 23).to(tl.float32, bitcast=True)
    for a in tl.static_range(KC):
        x = x + ((y[a].to(tl.float32) * shrink[None, :]).to(tl.float16),)

    GROUPS: tl.constexpr = V.groups
    m = tl.full([BM], BLANK, tl.float32)
    masses = tl.zeros([TP, BM], tl.float32)  # summed up over tokens at the end
    acc, sides = (), ()
    for _ in tl.static_range(VC):
        acc = acc + (tl.zeros([CV, BM], tl.float32),)
    for _ in tl.static_range(GROUPS):
        sides = sides + (masses,)
    share = (t1 - t0 + S1 - 1) // S1
    lo_tile = tl.minimum(t0 + split * share, t1)
    hi_tile = tl.minimum(lo_tile + share, t1)
    clear = hi_tile
    for tile in tl.range(lo_tile, clear, num_stages=STAGES):
        m, masses, sides, acc = body_tile(
            tile, k_arena, v_arena, h, NK, NV, mask_rows, mask_p, live, first, end, x, factor, sums,
            m, masses, sides, acc, NO_MASK, CAP, BT, TP, CK, CV, BM, ASM, ELEMENT, WIDE, K, V,
        )

    mass = tl.sum(masses, 0)
    middles = ()
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
        )

    # `merge` may start
    tl.extra.cuda.gdc_launch_dependents()
    decay = 1.0
    nothing = mass == 0
    unit = decay / tl.where(nothing, 1.0, mass)
    bad = tl.where(fault, float("nan"), 0.0)
    cv = tl.arange(0, CV)
    row = tl.program_id(1).to(tl.int64) * rows
    slot = row + split * tl.num_programs(1).to(tl.int64) * rows + r
    for a in tl.static_range(VC):
        o = acc[a] * (1.0 / boost(V))
        o += middles[a * CV // V.c][None, :]
        o = tl.where(nothing[None, :], 0.0, o * unit[None, :]) + bad
        c = a * CV + cv
        at = slot
        at = out + at[:, None] * V.channels + c[None, :]
        tl.store(at, tl.trans(o).to(out.dtype.element_ty), mask=live[:, None])
    weight = tl.where(nothing, float("-inf"), m / LOG2E + tl.log(tl.where(nothing, 1.0, mass)))
    tl.store(lse + slot, tl.where(fault, 0.0, weight), mask=live)
