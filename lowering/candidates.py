"""The variants of the attention kernels that are worth a trial, the rule's own first.

What a kernel can be compiled with follows from the layout (`fits`); what is tried is the rule's choice and what differs
from it in one or two sizes. Only these are ever run, whatever a file of timings says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, replace
from functools import lru_cache

import torch

from kvc_compile.kernels.form import INT, RAW, Form
from kvc_compile.lowering import decoding, general
from kvc_compile.lowering.decoding import LONGEST_TILE, Tiles, chunk
from kvc_compile.lowering.general import Blocks, blocks

Sizes = Tiles | Blocks
MOST = 12  # variants that are compiled
SHARES = (1.0, 0.5, 2.0)  # waves of programs, times those of the rule


@lru_cache(maxsize=256)
def candidates(k: Form, v: Form, rows: int, dtype: torch.dtype) -> tuple[Sizes, ...]:
    """What may be run for `rows` query rows a kv head, in a total order: all variants with the rule's waves, the rule
    itself first, then all of them with other waves."""
    rule = decoding.tiles(k, v, rows, dtype)
    first: Sequence[Sizes]
    if rule is not None:
        first = tiles_of(rule, k, v)
    else:
        packed = k.kind != RAW or v.kind != RAW
        first = blocks_of(blocks(rows, max(k.channels, v.channels), dtype.itemsize, packed), rows)
    return tuple(replace(c, waves=c.waves * share) for share in SHARES for c in first)


def rows_bucket(rows: int) -> int:
    """Rows rounded up to a power of two: no tile has another number, or fewer than 8."""
    return max(8, 1 << (rows - 1).bit_length())


def split_count(sizes: Sizes, k: Form, v: Form, batch: int, rows: int, room: int, multiprocessors: int) -> int:
    """Into how many parts the sequence is divided."""
    programs = batch * k.heads
    if isinstance(sizes, Tiles):
        return decoding.split_count(sizes, decoding.other_tiles(k, v), programs, room, multiprocessors)
    return general.split_count(sizes, programs * -(-rows // sizes.BM), room, multiprocessors)


def tiles_of(rule: Tiles, k: Form, v: Form) -> list[Tiles]:
    """Variants of the decoding kernel."""
    long, short = {"TP": 32, "BT": 2 * max(spans(k, v)), "warps": 2}, {"TP": 16, "warps": 1}
    return varied(
        rule,
        [
            {"warps": rule.warps * 2},
            {"stages": rule.stages - 1},
            {"stages": rule.stages + 1},
            long if rule.TP == 16 else {**short, "BT": rule.BT // 2},
            {**long, "stages": 2} if rule.TP == 16 else {**short, "BT": rule.BT},
            {"BT": rule.BT // 2},
            {"BT": rule.BT * 2},
            {"CK": rule.CK // 2, "CV": rule.CV // 2},
            {"CK": rule.CK * 2, "CV": rule.CV * 2},
            {"CV": rule.CV // 2},
            {"CK": rule.CK // 2},
            {"CK": rule.CK * 2},
            {"warps": rule.warps * 2, "stages": 2},
            {"warps": rule.warps * 2, "BT": rule.BT * 2},
            {"warps": rule.warps // 2},
        ],
        lambda t: fits(t, k, v),
    )


def blocks_of(rule: Blocks, rows: int) -> list[Blocks]:
    """Variants of the general kernel."""
    most = max(rule.BM, min(128, 1 << (rows - 1).bit_length()))
    other = 12 - rule.warps  # 4 for 8, 8 for 4
    return varied(
        rule,
        [
            {"warps": other},
            {"BN": rule.BN * 2},
            {"BN": rule.BN // 2},
            {"BM": rule.BM * 2},
            {"BM": rule.BM // 2},
            {"BM": rule.BM // 2, "warps": other},
            {"BN": rule.BN * 2, "warps": other},
            {"BN": rule.BN // 2, "warps": other},
            {"stages": 5 - rule.stages},
        ],
        lambda b: 16 <= b.BM <= most and 16 <= b.BN <= 128,
    )


def varied(rule, changes, fit):
    """The rule and its variants that fit, each once, `MOST` at most."""
    return list(dict.fromkeys([rule, *(c for change in changes if fit(c := replace(rule, **change)))]))[:MOST]


def spans(k: Form, v: Form) -> set[int]:
    """Tokens that a row group of 16 words holds, of every plane."""
    return {16 * f.word // bits if f.kind == INT else 16 for f in (k, v) for bits in (f.low, f.high) if bits}


def fits(t: Tiles, k: Form, v: Form) -> bool:
    """Whether the decoding kernel is right with these sizes for caches that it takes (`decoding.tiles`).

    A part of 16 tokens is field j of one row group, of any span. One of 32 is that of two neighbouring groups: the tile
    must be just these two, and no block of keys may begin in it.
    """
    blocked = k.params > 0 and k.t > 1
    return (
        t.warps in (1, 2, 4)
        and 2 <= t.stages <= 4
        and t.TP <= t.BT <= LONGEST_TILE
        and (t.TP == 16 or spans(k, v) == {t.BT // 2})
        and not (blocked and k.t % t.BT and (t.TP > 16 or t.BT % k.t))
        and min(t.CK, t.CV) >= 16
        and chunk(k) % t.CK == 0
        and chunk(v) % t.CV == 0
    )


def sizes_of(c: Sizes) -> tuple[float, ...]:
    """As `timings` stores them."""
    return astuple(c)


def best(timings: Sequence[tuple[tuple[float, ...], float | None]], among: Sequence[Sizes]) -> Sizes | None:
    """The fastest of the candidates by stored timings, the first of those that are equal; None if none was timed."""
    times = dict(timings)
    timed = [(us, i) for i, c in enumerate(among) if (us := times.get(sizes_of(c))) is not None]
    return among[min(timed)[1]] if timed else None
