"""Products of a few rows with weights, as a decode step has them: at the speed at which the weights are read.

Symbols:

    x                rows [M, K] of the model's dtype, one after the other
    w0, w1, w2       weights [N0, K], [N1, K], [N2, K]: layers that take the same rows share a launch
    out0, out1, out2 results [M, N0], [M, N1], [M, N2]
    M, K             rows; channels of a row
    N0, N1, N2       outputs of a weight, 0 if there is none; multiples of BN
    BM               rows, rounded up: the columns of a tile
    BN, BK           outputs of a program, the rows of a tile; channels of a step
    STAGES           steps in flight
    EARLY            whether the kernel may start before the one before it has ended, and waits for it itself

As in `kernels.decode` the few rows are columns of a tile, and a program is one warp: what counts is how many bytes of
the weights are in flight. Sums are fp32, rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M"])
def products(
    x, w0, w1, w2, out0, out1, out2, M, N0, N1, N2, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program: BN outputs of one weight, for all rows."""
    tile = tl.program_id(0)
    second, third = tile >= N0 // BN, tile >= (N0 + N1) // BN
    w = tl.where(third, w2, tl.where(second, w1, w0))
    out = tl.where(third, out2, tl.where(second, out1, out0))
    width = tl.where(third, N2, tl.where(second, N1, N0))
    n = (tile - tl.where(third, N0 + N1, tl.where(second, N0, 0)) // BN) * BN + tl.arange(0, BN)
    m, k = tl.arange(0, BM), tl.arange(0, BK)
    live = (m < M)[None, :]
    weights = w + n.to(tl.int64)[:, None] * K + k[None, :]
    rows = x + m[None, :] * K + k[:, None]
    acc = tl.zeros([BN, BM], tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    for at in tl.range(0, K, BK, num_stages=STAGES):
        acc = tl.dot(tl.load(weights + at), tl.load(rows + at, mask=live, other=0.0), acc)
    tl.store(out + m[None, :] * width + n[:, None], acc.to(out.dtype.element_ty), mask=live)
