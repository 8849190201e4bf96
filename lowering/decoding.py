"""When the decoding kernel takes a call, and with which tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from kvc_compile.kernels.form import FP8, INT, RAW, Form

MOST_COLUMNS = 32  # query rows of a kv head that the kernel takes
LONGEST_TILE = 128  # tokens
OTHER_COST = 1.25  # of 16 tokens that are not body, in body tiles: measured on an H100
UNBALANCED = 0.03
FULL = 0.9  # of the programs that are aimed at, at least


@dataclass(frozen=True)
class Tiles:
    """Compile-time sizes of `kernels.decode.decode_split`, and the waves of programs that its splits aim at."""

    BM: int
    BT: int
    TP: int
    CK: int
    CV: int
    warps: int
    stages: int
    waves: float = 1

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor runs at a time, if registers limit them: 64k registers, 255 a thread."""
        return 8 // self.warps


def chunk(f: Form) -> int:
    """The widest power of two that divides the channels and the channel groups of scales that belong to a token."""
    width = f.channels & -f.channels
    return min(width, f.c & -f.c) if f.params and f.t == 1 and f.groups > 1 else width


def words(f: Form) -> int:
    """The most tokens that a row group of 16 words of a plane holds."""
    return 16 * f.word // min(b for b in (f.low, f.high) if b) if f.kind == INT else 16


@lru_cache(maxsize=1024)
def tiles(k: Form, v: Form, rows: int, dtype: torch.dtype) -> Tiles | None:
    """The tiles for `rows` query rows a kv head, or None where `kernels.attend` has to do it."""
    packed = [f for f in (k, v) if f.kind == INT]
    if rows > MOST_COLUMNS or dtype not in (torch.float16, torch.bfloat16) or k.sink != v.sink:
        return None
    if any(f.word != 16 for f in packed) or min(chunk(k), chunk(v)) < 16 or (v.params and v.t != 1):
        return None
    if k.params and k.t == 1 and k.groups > 1 and k.channels % k.c:
        return None
    columns = max(8, 1 << (rows - 1).bit_length())
    spans = {words(k), words(v)}
    part, warps, stages, widest = 16, 1, 3, (128, 128)
    if len(spans) == 1:
        aligned = not k.params or k.t == 1 or k.t % (2 * max(spans)) == 0  # no block begins within two row groups
        if k.kind == v.kind == RAW:
            part, warps, stages = 32, 2, 2
        elif aligned and (k.kind == v.kind == FP8 or spans == {32}):
            part, warps = 32, 2
    if max(spans) == 64:  # registers: all unpacked words of a chunk live at a time
        widest = 64, 64
    elif max(spans) > 64:
        widest, stages = (64, 32), 2
    span = 16 if not packed else max(spans)
    tile = part if not packed else min(LONGEST_TILE, span * part // 16)
    if k.params and k.t > 1 and k.t % tile and tile % k.t:
        return None  # blocks of keys would begin at another token in every tile
    if columns > 8 or max(k.channels, v.channels) > 128:
        warps = max(warps, 2)
    waves = 0.5 if packed and max(spans) <= 64 else 1  # more bytes in flight are no faster, and more parts to merge
    return Tiles(columns, tile, part, min(chunk(k), widest[0]), min(chunk(v), widest[1]), warps, stages, waves)


def other_tiles(k: Form, v: Form) -> int:
    """Tiles of 16 tokens that are not body, on average: sinks, and what the rings hold between two flushes."""
    ring = max(f.recent + f.flush // 2 for f in (k, v))
    return -(-k.sink // 16) + ring // 16 + 1


def split_count(t: Tiles, others: int, programs: int, tokens: int, multiprocessors: int) -> int:
    """Splits of the sequence: as many waves of programs as are aimed at, or one a tile if one wave holds them."""
    most, wave = tokens // t.BT + others, multiprocessors * t.resident
    if most * programs <= min(1, 2 * t.waves) * wave:
        return max(1, most)
    count = int(t.waves * wave) // programs
    if count * programs < FULL * t.waves * wave and (count + 1) * programs <= wave:
        count += 1  # of a number as small as this, a part more is much
    return max(1, min(count, most))


def apart(t: Tiles, others: int, splits: int, tokens: int) -> tuple[int, int]:
    """(S1, S2): the splits before S1 take body tiles, those from S2 on the others.

    Some take nothing but the others, so that no program waits for the first bytes of both, where the two kinds can be
    balanced to a few hundredths; else all splits take both.
    """
    work = others * OTHER_COST
    ideal = splits * work / (tokens // t.BT + work)
    few = min(others, math.ceil(ideal), splits - 1)
    balanced = few == others or abs(few - ideal) / splits <= UNBALANCED
    if few < 1 or not balanced:
        return splits, 0
    return splits - few, splits - few
