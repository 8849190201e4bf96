"""Packed words to 16-bit floats, two at a time: what the decoding kernel does instead of `codec.load_fields`.

A field of b bits in a 16-bit word is moved under the exponent of an fp16 number, so that one unit of the code is one
step of the mantissa; then a subtraction leaves the centred code, exactly:

      s eeeee mmmmmmmmmm        lop3  (word & mask) | exponent   = bias + code * weight,  bias = weight * 2^(10-f)
               code at bit f    sub   bias + centre * weight     -> (code - centre) * weight

f is at least 1, since the centre (2^b - 1) / 2 is half of an odd number. A word is shifted only where its field does
not lie at 1 <= f <= 10 - b already: left by 2 for the lowest field, right by 6 for the highest ones. Both halves of a
32-bit register go through the same instructions; what a shift carries from one half into the other is masked away.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
    if ASM:
        SHIFT: tl.constexpr = shift_of(BITS, j)
        if SHIFT != 0:  # an operation of its own, so that fields with the same shift share it
            word = tl.inline_asm_elementwise(shift_asm(SHIFT), "=r,r", [word], dtype=tl.uint16, is_pure=True, pack=2)
        text: tl.constexpr = field_asm(BITS, j, WEIGHT, BIASED)
        return tl.inline_asm_elementwise(text, "=&r,r", [word], dtype=tl.float16, is_pure=True, pack=2)
    else:  # the interpreter has no inline assembly
        code = ((word.to(tl.int32) >> (BITS * j)) & ((1 << BITS) - 1)).to(tl.float32)
        if BIASED:
            return (code * WEIGHT + (surplus(BITS, j, WEIGHT) - ((1 << BITS) - 1) * 0.5 * WEIGHT)).to(tl.float16)
        else:
            return ((code - ((1 << BITS) - 1) * 0.5) * WEIGHT).to(tl.float16)


@triton.jit
def shifted(word, bits, ASM: tl.constexpr):
    """uint16 words, `bits` (0 .. 15, a scalar) to the right; what comes in at the top is arbitrary."""
    if ASM:
        amount = tl.full(word.shape, bits, tl.int32)
        return tl.inline_asm_elementwise(
            "shr.u32 $0, $1, $2;", "=r,r,r,r", [word, amount], dtype=tl.uint16, is_pure=True, pack=2
        )
    else:
        return (word.to(tl.int32) >> bits).to(tl.uint16)
