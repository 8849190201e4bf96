"""The sizes of the general attention kernel, `kernels.attend`."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Blocks:
    """Compile-time sizes of `kernels.attend.attend_split`, and the waves of programs that its splits aim at."""

    BM: int
    BN: int
    warps: int
    stages: int = 2
    waves: float = 4


def blocks(rows: int, channels: int, item: int, packed: bool) -> Blocks:
    """The sizes for `rows` query rows a kv head: what fits the registers. item: bytes of the queries' dtype; packed:
    whether keys or values are stored in another one."""
    wide = channels > 128
    if item == 4:
        return Blocks(16, 16 if wide else 32, 8)
    if rows > 64 and not wide:  # a prompt; measured on an H100
        return Blocks(128, 64, 8, 3) if packed else Blocks(64, 64, 4, 3)
    bm = min(max(16, 1 << (rows - 1).bit_length()), 64)
    return Blocks(bm, 32 if wide or bm == 16 else 64, 4 if bm < 64 else 8)


def fitted(b: Blocks, keys: int, values: int, item: int, shared: int) -> Blocks:
    """With no more tiles in flight than `shared` bytes, what a program can have of a multiprocessor's memory, hold.
    keys, values: channels of their tiles; item: bytes of an element."""
    while b.stages > 1 and shared_bytes(b, keys, values, item) > shared:
        b = replace(b, stages=b.stages - 1)
    return b


def shared_bytes(b: Blocks, keys: int, values: int, item: int) -> int:
    """Of the queries and of the tiles in flight, as Triton lays out new tokens."""
    return item * (b.BM * keys + b.stages * b.BN * (keys + values))


def split_count(b: Blocks, programs: int, tokens: int, multiprocessors: int) -> int:
    """Splits of the sequence: enough programs for the device, and at least two tiles for each of them."""
    return max(1, min(int(b.waves * multiprocessors) // programs, tokens // (2 * b.BN)))
