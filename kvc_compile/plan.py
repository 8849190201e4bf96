"""From what was found and what the spec asks to how every cache tensor is stored: a pure function, no graph."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kvc_compile.layout import Codec, Layout
from kvc_compile.policy import Policy
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
class Keep:
    """What a cache keeps of a prompt. policy: its key; group: the first of the layers that are looked at together;
    layers: of the model, as far as this graph shows it."""

    policy: str
    group: int
    layers: int


@dataclass(frozen=True)
class SitePlan:
    """The layouts of one attention's cache pair, which tokens stay, and what it reads of them where the spec has
    `select`. stays: why all stay, where the spec asks for less."""

    site: Site
    key: Layout
    value: Layout
    keep: Keep | None = None
    stays: str = ""
    reading: Reading | None = None

    def bytes(self, tokens: int) -> tuple[int, int]:
        """(stored, dense) bytes of one sequence with a prompt of `tokens` tokens, keys and values."""
        return bytes_of_pair(self.key, self.value, tokens, self.site.layer, self.keep)


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
    sites = [s for s in found if isinstance(s, Site)]
    asked = {s.index: spec.layer(s.layer, layers) for s in sites}
    kept = keeps(sites, {i: a.keep for i, a in asked.items()}, existing)
    read = readings(found, spec)
    entries: list[SitePlan | Declined] = []
    for s in found:
        if isinstance(s, Declined):
            entries.append(s)
            continue
        keep, select = kept[s.index], asked[s.index].select
        key, value = (
            existing.get(cache.buffer) or evicting(layout_of(tensor, cache, device), keep, keys)
            for cache, tensor, keys in ((s.key, asked[s.index].k, True), (s.value, asked[s.index].v, False))
        )
        if select and s.key.buffer not in existing and s.pattern != "read back":
            key = replace(key, sketch=select.sketch(s.layer))
        stays = keep if isinstance(keep, str) else ""
        entries.append(SitePlan(s, key, value, None if isinstance(keep, str) else keep, stays, read.get(s.index)))
    return Plan(tuple(entries))


def evicting(layout: Layout, keep: Keep | str, keys: bool) -> Layout:
    """The layout of a cache that evicts. One whose slots are taken over one by one has no tokens that wait."""
    if not isinstance(keep, Keep):
        return layout
    policy = Policy.parse(keep.policy)
    layout = replace(layout, evicts=True, words=policy.words if keys else 0)
    return replace(layout, recent=0, flush=1) if policy.steps else layout


def takes(stored: Layout, policy: Policy) -> bool:
    """Whether a policy can go on with a cache of this layout."""
    one_by_one = stored.recent == 0 and stored.codec.block[0] <= 1
    return stored.evicts and stored.words == policy.words and (one_by_one or not policy.steps)


def keeps(sites: Sequence[Site], asked: Mapping[int, str], existing: Mapping[str, Layout]) -> dict[int, Keep | str]:
    """What each site keeps, or why it keeps all, "" where that is what is asked."""
    uses = Counter(s.key.buffer for s in sites)
    longest = max((s.key.length or 0 for s in sites), default=0)
    out: dict[int, Keep | str] = {}
    for s in sites:
        stored = existing.get(s.key.buffer)
        if not asked[s.index]:
            out[s.index] = ""
        elif s.pattern == "read back":
            out[s.index] = "its attention is not rewritten, so it is not known what matters to it"
        elif s.key.window or (s.key.length is not None and s.key.length < longest):
            out[s.index] = "it is a sliding window"
        elif uses[s.key.buffer] > 1:
            out[s.index] = "several attentions read it"
        elif stored is not None and not takes(stored, Policy.parse(asked[s.index])):
            out[s.index] = "it was made where all tokens stay, or go by another rule"
        else:
            out[s.index] = Keep(asked[s.index], s.layer, 0)
    layers = 1 + max((s.layer for s in sites), default=0)
    for s in sites:
        keep = out[s.index]
        if isinstance(keep, Keep):
            policy = Policy.parse(keep.policy)
            same = [x.layer for x in sites if isinstance(k := out[x.index], Keep) and k.policy == keep.policy]
            leader = s.layer // policy.rule.reuse * policy.rule.reuse
            group = same[0] if policy.joint else leader if leader in same else s.layer
            out[s.index] = replace(keep, group=group, layers=layers)
    return out


def bytes_of_pair(k: Layout, v: Layout, tokens: int, layer: int, keep: Keep | None) -> tuple[int, int]:
    """(stored, dense) bytes of one sequence, keys and values, with a prompt of `tokens` tokens."""
    slots = Policy.parse(keep.policy).slots(tokens, layer, keep.layers) if keep else tokens
    return k.row_bytes(slots) + v.row_bytes(slots), k.dense_bytes(tokens) + v.dense_bytes(tokens)


def bytes_of(plan: Plan, tokens: int, batch: int = 1) -> tuple[int, int]:
    """(compressed, dense) bytes of all planned caches with room for `tokens` tokens."""
    seen = {e.site.key.buffer: e.bytes(tokens) for e in plan.planned}
    return batch * sum(c for c, _ in seen.values()), batch * sum(d for _, d in seen.values())
