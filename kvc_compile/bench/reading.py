"""The kernel that only reads. GPU only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvc_compile.bench.clock import call_seconds


@triton.jit
def _xor(a, b):
    return a ^ b


@triton.jit
def _read_only(x, out, BLOCK: tl.constexpr, TURNS: tl.constexpr, UNROLL: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * (BLOCK * TURNS) + tl.arange(0, BLOCK)
    a = tl.zeros([BLOCK], tl.int32)
    for i in tl.range(0, TURNS, UNROLL):
        for j in tl.static_range(UNROLL):
            a = a ^ tl.load(x + at + (i + j) * BLOCK)
    tl.store(out + tl.program_id(0), tl.reduce(a, 0, _xor))


def rate(nbytes: int) -> float:
    n = nbytes // 4
    x = torch.randint(-(2**31), 2**31 - 1, (n,), dtype=torch.int32, device="cuda")
    best = float("inf")
    for block, turns, unroll, warps in ((1024, 16, 4, 4), (2048, 32, 8, 4), (4096, 32, 4, 8), (1024, 64, 8, 4)):
        out = torch.empty(n // (block * turns), dtype=torch.int32, device="cuda")
        args = {"BLOCK": block, "TURNS": turns, "UNROLL": unroll, "num_warps": warps}
        best = min(best, call_seconds([lambda o=out, a=args: _read_only[(len(o),)](x, o, **a)], "cuda"))  # type: ignore[misc]
    return 4 * n / best
