"""Read a compressed cache tensor back as plain values; the host need not know its length.

Symbols beyond those of `kernels.codec`:

    out       the model's dtype [B, H, tokens, D]: the values that are asked for
    tokens    how many those are
    LAST      whether they are the last ones that the cache holds, or the first
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvc_compile.kernels.codec import header_pointer, load_tokens


@triton.jit(do_not_specialize=["N", "tokens"])
def read_tokens(
    data, out, row_stride, N, tokens, LAST: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr, F: tl.constexpr
):
    """out [B, H, tokens, D]: the first values, or the last ones if LAST and there are more; zeros from the length on.

    Program: (BN tokens, batch row and head).
    """
    b, h = tl.program_id(1) // F.heads, tl.program_id(1) % F.heads
    arena = data + b.to(tl.int64) * row_stride
    head = header_pointer(arena, h)
    length, encoded = tl.load(head).to(tl.int32), tl.load(head + 1).to(tl.int32)
    d = tl.arange(0, DP)
    skip = 0
    if LAST:
        skip = tl.maximum(length - tokens, 0)
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    p0 = tl.program_id(0) * BN + skip
    x = load_tokens(arena, out, 0, h, N, length, encoded, length, p0, d, (F.sink % BN == 0) and not LAST, BN, F)
    p = j + skip
    x = tl.where((p < length)[:, None], x, 0.0)
    at = out + (tl.program_id(1).to(tl.int64) * tokens + j)[:, None] * F.channels + d[None, :]
    tl.store(at, x.to(out.dtype.element_ty), mask=(j < tokens)[:, None] & (d < F.channels)[None, :])
