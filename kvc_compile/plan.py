"""From what was found and what the spec asks to how every cache tensor is stored: a pure function, no graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvc_compile.layout import Codec, Layout
from kvc_compile.reading import Reading, readings
from kvc_compile.sites import CacheTensor, Declined, Site, Uncached
from kvc_compile.spec import Spec, TensorSpec

WORD = {"cpu": 8, "cuda": 16}  # bits of a packing word: what the device unpacks fastest
SLACK = 256  # tokens by which a cache of no fixed length grows at a time


@dataclass(frozen=True)
class Slide:
    """How the arenas of a sliding window's keys and values forget tokens that fell out of it: both the same ones, since
    attention goes over both by one position; in units of both, so that nothing is encoded anew.

    unit: tokens that are forgotten at a time, or a multiple of it. least: tokens that stay: what is exact in either.
    """

    unit: int
    least: int

    @staticmethod
    def of(k: Layout, v: Layout) -> Slide:
        return Slide(math.lcm(k.unit, v.unit), max(2 * x.sink + x.recent for x in (k, v)))

    def room(self, window: int, pushed: int) -> int:
        """Tokens that an arena has room for, if `pushed` are appended at a time: many steps before it must forget. One
        number, as a graph is compiled for it."""
        return max(window, self.least) + max(pushed, SLACK) + SLACK + self.unit

    def forgotten(self, total: int, window: int) -> int:
        """How many of `total` tokens can be forgotten where the last `window` of them are seen."""
        return max(0, total - max(window, self.least)) // self.unit * self.unit


@dataclass(frozen=True)
class SitePlan:
    """The layouts of one attention's cache pair, and what it reads of them where the spec has `select`."""

    site: Site
    key: Layout
    value: Layout
    reading: Reading | None = None


@dataclass(frozen=True)
class Plan:
    """Every attention of a graph, in order: planned, declined, or without a cache."""

    entries: tuple[SitePlan | Declined, ...]

    @property
    def planned(self) -> tuple[SitePlan, ...]:
        return tuple(e for e in self.entries if isinstance(e, SitePlan))

    @property
    def declined(self) -> tuple[Declined, ...]:
        return tuple(e for e in self.entries if isinstance(e, Declined) and not isinstance(e, Uncached))


def layout_of(tensor: TensorSpec, cache: CacheTensor, device: str) -> Layout:
    """The layout that a tensor's spec gives a cache tensor; `SpecError` where they do not fit."""
    c = tensor.codec
    if c.kind == "raw":
        return Layout(Codec("raw"), cache.heads, cache.channels, cache.dtype, word=WORD[device])
    block = (0, 0)
    if c.block is not None:
        t, channels = c.block
        block = (t, min(channels, cache.channels) if channels else cache.channels)
    zero = c.zero_point and c.kind == "int" and block != (0, 0)
    codec = Codec(c.kind, c.bits, block, zero)
    return Layout(
        codec, cache.heads, cache.channels, cache.dtype, tensor.sink, tensor.recent, tensor.flush, WORD[device]
    )


def make_plan(
    found: Sequence[Site | Declined], spec: Spec, device: str, existing: dict[str, Layout] | None = None
) -> Plan:
    """Plan every site. `existing` names buffers that are compressed already: they keep their layout."""
    existing = existing or {}
    layers = 1 + max((s.layer for s in found if isinstance(s, Site)), default=0)
    read = readings(found, spec)
    entries: list[SitePlan | Declined] = []
    for s in found:
        if isinstance(s, Declined):
            entries.append(s)
            continue
        asked = spec.layer(s.layer, layers)
        key = existing.get(s.key.buffer) or layout_of(asked.k, s.key, device)
        if asked.select and s.key.buffer not in existing and s.pattern != "read back":
            key = replace(key, sketch=asked.select.sketch(s.layer))
        value = existing.get(s.value.buffer) or layout_of(asked.v, s.value, device)
        entries.append(SitePlan(s, key, value, read.get(s.index)))
    return Plan(tuple(entries))


def bytes_of(plan: Plan, tokens: int, batch: int = 1) -> tuple[int, int]:
    """(compressed, dense) bytes of all planned caches with room for `tokens` tokens."""
    seen: dict[str, tuple[int, int]] = {}
    for e in plan.planned:
        for cache, layout in ((e.site.key, e.key), (e.site.value, e.value)):
            seen[cache.buffer] = (batch * layout.row_bytes(tokens), batch * layout.dense_bytes(tokens))
    return sum(c for c, _ in seen.values()), sum(d for _, d in seen.values())
