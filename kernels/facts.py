"""What follows from a layout for the decoding kernel, at compile time. Symbols: `kernels.decode`."""

from __future__ import annotations

import triton
import triton.language as tl

from kvc_compile.kernels.codec import INT, RAW
from kvc_compile.kernels.unpack import surplus

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
