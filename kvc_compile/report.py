"""What became of every attention: compressed, and how, or declined, and why.

`report()` speaks of the last compile, `report(model)` of a model. A model is usually several graphs (prefill, decode,
recompiles); the report has one record per attention, merged over the graphs that hold it.

What is remembered of a compile are names and layouts, never a graph or a model. A record lives as long as its compiled
graph does; of those that are gone the last few are kept, so that a compile that failed can still be asked about.
"""

from __future__ import annotations

import itertools
import logging
import re
import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from kvc_compile import handle
from kvc_compile.difference import Difference, Differences, worst
from kvc_compile.layout import Layout
from kvc_compile.plan import Keep, Plan, SitePlan, bytes_of_pair
from kvc_compile.policy import words_of
from kvc_compile.request import Request
from kvc_compile.sites import Declined, Uncached
from kvc_compile.table import layers_text, mib, ratio, table

log = logging.getLogger("kvc_compile")

TOKENS = 4096  # of the bytes that are shown where nobody asks for a number
KEPT = 64  # records kept of graphs that are gone
ORPHAN = "no parameters"  # the owner of graphs that take none: see `bound.owner_of`


# ---------------------------------------------------------------- what is remembered


@dataclass(eq=False)
class Compile:
    """One compiled graph: what was asked, what was planned, and which models called it.

    places: the module path of each attention of the plan, "" where the graph does not say (see `places_of`).
    """

    request: Request
    plan: Plan
    places: tuple[str, ...] = ()
    owners: set[str] = field(default_factory=set)
    differences: Differences | None = None  # under `verify`
    number: int = field(default_factory=lambda: next(handle.numbers))

    def called(self, owner: str) -> None:
        self.owners.add(owner)


_recent: deque[Compile] = deque(maxlen=KEPT)
_alive: weakref.WeakSet[Compile] = weakref.WeakSet()


def remember(c: Compile) -> Compile:
    _recent.append(c)
    _alive.add(c)
    return c


def remembered() -> list[Compile]:
    """Every compile that is known, oldest first."""
    return sorted(_alive, key=lambda c: c.number)


def places_of(gm: GraphModule, plan: Plan) -> tuple[str, ...]:
    """Where each attention of the plan lies in the model: `model.layers.3.self_attn`. Ask before the rewrite."""
    nodes = {n.name: n for n in gm.graph.nodes}
    names = (e.site.node if isinstance(e, SitePlan) else e.node for e in plan.entries)
    return tuple(_place(nodes.get(name)) for name in names)


def _place(node: Node | None) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values()) if node is not None else []
    path = re.sub(r"(?:\._modules)?\['?(\w+)'?\]", r".\1", str(stack[-1][0])) if stack else ""
    return re.sub(r"^L\.?\w*\.?", "", path)


class DeclinedError(RuntimeError):
    """strict: an attention could not be compressed."""


_warned: set[str] = set()


def warn_declined(plan: Plan, request: Request) -> None:
    """An error under `strict`, else one warning for each reason."""
    stays = [e for e in plan.planned if e.stays]
    lines = [f"attention {d.index} ({d.where}): {d.reason}" for d in plan.declined]
    if request.strict and (lines or stays):
        lines += [f"attention {e.site.index} ({e.site.where}) keeps all of its tokens: {e.stays}" for e in stays]
        raise DeclinedError("not compressed, and strict is set:\n  " + "\n  ".join(lines))
    for e in stays:
        if e.stays not in _warned:
            _warned.add(e.stays)
            log.warning("kvc: the cache of an attention (%s) keeps all of its tokens: %s", e.site.where, e.stays)
    if len(_warned) > 1000:  # reasons name nodes, so there is no end to them
        _warned.clear()
    for d, line in zip(plan.declined, lines, strict=True):
        if d.reason not in _warned:
            _warned.add(d.reason)
            log.warning("kvc leaves an attention uncompressed: %s", line)


def say_read_back(plan: Plan) -> None:
    """One line for each reason why a compressed cache is read back in full."""
    for e in plan.planned:
        if e.site.note and e.site.note not in _warned:
            _warned.add(e.site.note)
            log.warning("kvc reads a compressed cache back in full each step (%s): %s", e.site.where, e.site.note)


def unselected(plan: Plan, request: Request) -> None:
    """Layers that read all, where the spec selects and it cannot be done: an error under `strict`, else one warning for
    each reason."""
    found = [e for e in plan.planned if e.reading and e.reading.declined]
    lines = [f"attention {e.site.index} ({e.site.where}): {e.reading.reason}" for e in found]  # type: ignore[union-attr]
    if lines and request.strict:
        raise DeclinedError("`select` does not apply, and strict is set:\n  " + "\n  ".join(lines))
    for line in lines:
        if line not in _warned:
            _warned.add(line)
            log.warning("kvc reads all of a cache although the spec selects: %s", line)


# ---------------------------------------------------------------- what is reported


@dataclass(frozen=True)
class Seen:
    """An attention in the graphs of one kind.

    kind: how that graph holds the cache ("born", "static", "grown", "fresh": see `sites.CacheTensor`), "" if none is
    known; "eager": not in a graph. graphs: how many graphs agree on all of this.
    """

    kind: str
    status: str
    reason: str
    graphs: int = 1


@dataclass(frozen=True)
class SiteReport:
    """One attention of the model.

    status: "compressed", or "declined" if any of its graphs declines it; `mixed` if others compress it all the same;
    "no cache" if there is none in any graph.
    keys, values: `Layout.key` of what is stored, "" if nothing is. shared: the cache is another attention's and
    counted there. where: the user's source line.
    """

    layer: int
    module: str
    status: str
    reason: str
    pattern: str
    keys: str
    values: str
    shared: bool
    where: str
    seen: tuple[Seen, ...]
    note: str = ""  # why its cache is read back in full in each step, where it is
    keep: Keep | None = None  # which tokens stay, where some do not
    stays: str = ""  # why all tokens stay, where the spec asks for less
    difference: Difference | None = None  # of its output from the untouched graph's, under `verify`
    reads: str = ""  # under `select`: what a decode step reads, or why it reads all

    @property
    def mixed(self) -> bool:
        return {"compressed", "declined"} <= {s.status for s in self.seen}

    @property
    def layout(self) -> str:
        """How the cache is stored, in words; "" if it is not compressed anywhere."""
        if not self.keys:
            return ""
        k, v = words(Layout.parse(self.keys)), words(Layout.parse(self.values))
        said = k if k == v else f"keys {k}; values {v}"
        return said + (f"; {words_of(self.keep.policy)}" if self.keep else "")


@dataclass(frozen=True)
class LayerBytes:
    layer: int
    compressed: int
    dense: int


@dataclass(frozen=True)
class Bytes:
    """Planned bytes of the compressed caches; `uncounted` attentions are declined and of unknown size."""

    tokens: int
    batch: int
    compressed: int
    dense: int
    layers: tuple[LayerBytes, ...]
    uncounted: int = 0


@dataclass(frozen=True)
class Held:
    """Bytes of arenas that are alive now: in all, and by (layer, "keys" or "values")."""

    total: int
    tensors: dict[tuple[int, str], int]


@dataclass(frozen=True)
class Report:
    """What became of every attention of some graphs. note: why there is nothing to say, if so."""

    spec: str
    digest: str
    graphs: int
    sites: tuple[SiteReport, ...]
    owners: tuple[str, ...] = ()
    note: str = ""
    difference: Difference | None = None  # of the model's outputs from the untouched graphs', under `verify`

    @property
    def declined(self) -> tuple[SiteReport, ...]:
        return tuple(s for s in self.sites if s.status == "declined")

    def bytes(self, tokens: int = TOKENS, batch: int = 1) -> Bytes:
        """Bytes of all compressed caches with room for `tokens` tokens of `batch` sequences; of one that evicts, for
        what stays of a prompt of so many. A cache of no fixed length is allocated in steps and holds up to `plan.SLACK`
        tokens more."""
        if tokens < 1 or batch < 1:
            raise ValueError(f"tokens and batch are 1 or more, got {tokens} and {batch}")
        by: dict[int, tuple[int, int]] = {}
        for s in self.sites:
            if s.keys and not s.shared:
                c, d = bytes_of_pair(Layout.parse(s.keys), Layout.parse(s.values), tokens, s.layer, s.keep)
                before = by.get(s.layer, (0, 0))
                by[s.layer] = before[0] + batch * c, before[1] + batch * d
        layers = tuple(LayerBytes(n, c, d) for n, (c, d) in sorted(by.items()))
        compressed, dense = (sum(getattr(x, name) for x in layers) for name in ("compressed", "dense"))
        uncounted = sum(s.status == "declined" and not s.keys for s in self.sites)
        return Bytes(tokens, batch, compressed, dense, layers, uncounted)

    def held(self) -> Held:
        """Bytes of the model's compressed caches that are alive at this moment."""
        by: dict[tuple[int, str], int] = {}
        for owner in self.owners:
            for key, n in handle.held(owner).items():
                by[key] = by.get(key, 0) + n
        return Held(sum(by.values()), dict(sorted(by.items())))

    def to_json(self) -> dict[str, Any]:
        """Plain data. Of a given state of the program it is always the same."""
        planned, held = self.bytes(), self.held()
        sites = [asdict(s) | {"seen": [asdict(x) for x in s.seen]} for s in self.sites]
        for data, s in zip(sites, self.sites, strict=True):
            data |= {"layout": s.layout, "mixed": s.mixed}
        return {
            "version": 1,
            "spec": {"name": self.spec, "digest": self.digest},
            "graphs": self.graphs,
            "note": self.note,
            "sites": sites,
            "difference": asdict(self.difference) if self.difference else None,
            "bytes": asdict(planned) | {"layers": [asdict(x) for x in planned.layers]},
            "held": {"total": held.total, "tensors": [[n, role, size] for (n, role), size in held.tensors.items()]},
        }

    def __str__(self) -> str:
        return self.text()

    def verified(self) -> list[str]:
        """What `verify` found, in lines of text."""
        assert self.difference is not None
        far = [(s.difference, s.layer) for s in self.sites if s.difference and s.difference.calls]
        lines = [f"Verified in {self.difference.calls} calls beside the untouched graphs: outputs differ by at most"]
        lines[0] += f" {self.difference.relative:.1e},"
        if far:
            d, layer = max(far, key=lambda x: (x[0].relative != x[0].relative, x[0].relative))
            lines.append(f"attentions by at most {d.relative:.1e} (layer {layer}), relative to their norm.")
        return lines

    def text(self, tokens: int = TOKENS, batch: int = 1) -> str:
        """A table of at most 100 columns, with bytes for these sizes; layers that are treated alike share a line."""
        if self.note:
            return f"kvc: {self.note}"
        graphs = "1 graph" if self.graphs == 1 else f"{self.graphs} graphs"
        lines = [f"kvc: spec {self.spec} ({self.digest}), {len(self.sites)} attentions in {graphs}", ""]
        rows = []
        for cells, run in itertools.groupby(self.sites, key=_cells):
            rows.append((layers_text([s.layer for s in run]), *cells))
        lines += table([("layers", "status", "seen in", "stored as, or why not"), *rows])
        b = self.bytes(tokens, batch)
        if b.dense:
            saved = f"{mib(b.compressed)} instead of {mib(b.dense)} ({ratio(b.dense, b.compressed)})"
            held = f" Held now: {mib(self.held().total)}." if self.owners else ""
            lines += ["", f"Planned for {tokens} tokens, batch {batch}: {saved}.{held}"]
        if self.difference:
            lines += ["", *self.verified()]
        if b.uncounted:
            lines.append(f"Not counted: {b.uncounted} attentions that are not compressed.")
        return "\n".join(lines)


def _cells(s: SiteReport) -> tuple[str, str, str]:
    """A site's cells in the table, the layer excepted."""
    kinds = dict.fromkeys(x.kind or "other" for x in s.seen)
    said = s.reason + (f"; where compressed: {s.layout}" if s.mixed else "") if s.reason else s.layout
    if s.reads and s.keys:
        said += f"; {s.reads}"
    if s.note and s.keys:
        said += f"; read back in full each step: {s.note}"
    if s.stays and s.keys:
        said += f"; all tokens stay: {s.stays}"
    if s.status == "declined" and s.where:
        said += f" ({s.where})"
    return "mixed" if s.mixed else s.status, ", ".join(kinds), said + (", shared" if s.shared else "")


def words(layout: Layout) -> str:
    """A layout for people: "int4, scale and middle per 32 tokens x 1 channel, first 4 and last 64 tokens exact"."""
    c = layout.codec
    if layout.sketch:
        index = f"{8 * layout.sketch_bytes}-bit hashes" if layout.sketch.startswith("hash") else "an index of channels"
        return f"{words(replace(layout, sketch=''))}, with {index} ({layout.sketch_bytes} bytes a token and head)"
    if c.kind == "raw":
        return f"{layout.dtype} as it is"
    said = "fp8 (e4m3)" if c.kind == "fp" else f"int{c.bits}"
    if c.block != (0, 0):
        unit = [f"{n} {what}{'s' if n > 1 else ''}" for n, what in zip(c.block, ("token", "channel"), strict=True)]
        said += f", {'scale and middle' if c.zero_point else 'scale'} per {unit[0]} x {unit[1]}"
    exact = [f"{end} {n}" for end, n in (("first", layout.sink), ("last", layout.recent)) if n]
    return said + (f", {' and '.join(exact)} tokens exact" if exact else "")


# ---------------------------------------------------------------- from compiles to reports


def report(model: torch.nn.Module | None = None) -> Report:
    """What became of every attention of `model`, or of what was compiled last. Where a model was compiled with several
    specs, the last one counts."""
    if model is None:
        known = remembered()
        if not known:
            return empty("nothing was compiled with backend 'kvc' yet")
        owners = known[-1].owners
    elif isinstance(model, torch.nn.Module):
        parameters = list(model.parameters())
        marks = (getattr(p, "kvc_owner", None) for p in parameters)
        owners = {m for m in marks if m is not None} if parameters else {ORPHAN}
        known = [c for c in remembered() if c.owners & owners]
        if not known:
            return empty("no graph of this model was compiled with backend 'kvc': compile the model and call it first")
    else:
        raise TypeError(f"report takes a torch.nn.Module, got {type(model).__name__}")
    last = known[-1]
    return of([c for c in known if c is last or (c.request == last.request and c.owners & owners)], owners)


def empty(note: str) -> Report:
    return Report("", "", 0, (), (), note)


def of(compiles: Iterable[Compile], owners: Iterable[str] = ()) -> Report:
    """The report of some graphs of one model and request; `owners` are those whose memory it counts."""
    group = list(compiles)
    spec = group[-1].request.spec
    found: dict[tuple, list[Entry]] = {}
    whole = whole_places({p for c in group for p in c.places})
    for c in group:
        places = [whole[p] for p in c.places] or [""] * len(c.plan.entries)
        kinds = {e.site.key.kind for e in c.plan.planned}
        usual = kinds.pop() if len(kinds) == 1 else ""
        ordinal: dict[tuple, int] = {}
        buffers: set[str] = set()
        for e, place in zip(c.plan.entries, places, strict=True):
            # The same attention has the same place in every graph. Where the place names no layer (a layer that is
            # compiled by itself), the cache's name may; else the order of attention has to do.
            layer = None if _number(place) is not None else e.site.layer if isinstance(e, SitePlan) else e.index
            n = ordinal[place, layer] = ordinal.get((place, layer), -1) + 1
            shared = isinstance(e, SitePlan) and e.site.key.buffer in buffers
            if isinstance(e, SitePlan):
                buffers.add(e.site.key.buffer)
            kind = e.site.key.kind if isinstance(e, SitePlan) else usual
            difference = c.differences.sites.get(e.site.index) if c.differences and isinstance(e, SitePlan) else None
            found.setdefault((place, layer, n), []).append(Entry(e, place, shared, kind, difference))
    eager = handle.in_eager_code(owners, since=min(c.number for c in group))
    sites = tuple(_outside(_merge(entries), eager) for entries in found.values())
    note = "" if sites else "no attention was found in what was compiled"
    outputs = worst(c.differences.outputs for c in group if c.differences)
    return Report(spec.name, spec.digest, len(group), sites, tuple(sorted(owners)), note, outputs)


@dataclass(frozen=True)
class Entry:
    """An attention in one graph."""

    plan: SitePlan | Declined
    place: str
    shared: bool
    kind: str
    difference: Difference | None


def whole_places(places: set[str]) -> dict[str, str]:
    """Each place as a graph of the whole model names it: graph breaks make frames that start further inside."""
    found = {}
    for place in places:
        longer = [p for p in places if place and p.endswith(f".{place}")]
        found[place] = (
            max(longer, key=len) if longer and all(max(longer, key=len).endswith(p) for p in longer) else place
        )
    return found


def _number(place: str) -> int | None:
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", place)
    return int(numbers[-1]) if numbers else None


def _merge(entries: list[Entry]) -> SiteReport:
    """One record of one attention from all the graphs that hold it; the newest layout counts."""
    seen: dict[tuple[str, str, str], int] = {}
    for x in entries:
        left = x.plan if isinstance(x.plan, Declined) else None
        status = "no cache" if isinstance(left, Uncached) else "declined" if left else "compressed"
        key = (x.kind, status, left.reason if left else "")
        seen[key] = seen.get(key, 0) + 1
    declined = [x.plan for x in entries if isinstance(x.plan, Declined) and not isinstance(x.plan, Uncached)]
    reasons = dict.fromkeys(d.reason for d in declined)
    stored = [(x.plan, x.shared) for x in entries if isinstance(x.plan, SitePlan)]
    first, place = entries[0].plan, entries[0].place
    layer = stored[0][0].site.layer if stored else _number(place)
    plan = stored[-1][0] if stored else None
    reason = "; ".join(reasons)
    if reasons and plan is not None:
        reason = f"in {len(declined)} of {len(entries)} graphs: {reason}"
    elif not stored and not reasons:
        reason = entries[0].plan.reason  # type: ignore[union-attr]
    return SiteReport(
        layer=layer if layer is not None else first.index if isinstance(first, Declined) else first.site.index,
        module=place,
        status="declined" if reasons else "compressed" if stored else "no cache",
        reason=reason,
        pattern=plan.site.pattern if plan else "",
        keys=plan.key.key if plan else "",
        values=plan.value.key if plan else "",
        shared=stored[-1][1] if stored else False,
        where=(first.where if isinstance(first, Declined) else first.site.where),
        seen=tuple(Seen(*key, graphs=n) for key, n in seen.items()),
        note="; ".join(dict.fromkeys(e.site.note for e, _ in stored if e.site.note)),
        keep=next((e.keep for e, _ in reversed(stored) if e.keep), None),
        stays="; ".join(dict.fromkeys(e.stays for e, _ in stored if e.stays)),
        difference=worst(x.difference for x in entries if x.difference),
        reads=_reads([e for e, _ in stored]),
    )


def _reads(plans: list[SitePlan]) -> str:
    """What an attention reads in graphs of one kind or another: of a decode step where there is one."""
    steps = [e for e in plans if e.reading and (e.reading.selection or e.site.queries == 1)]
    said = [e.reading.words(e.site.layer) for e in steps or plans if e.reading]
    return "; ".join(dict.fromkeys(said))


EAGER = "where it runs in eager code, as Dynamo gave up on a frame or the model is not compiled"


def _outside(s: SiteReport, eager: dict[int, dict[str, None]]) -> SiteReport:
    """The record with what eager code, which no graph knows of, did to the cache."""
    happened = eager.get(s.layer, {}) if s.keys else {}
    if "" in happened:
        s = replace(s, note="; ".join(filter(None, (s.note, EAGER))))
    if why := [f"eager code made a plain tensor of it: {reason}" for reason in happened if reason]:
        seen = (*s.seen, *(Seen("eager", "declined", reason, 0) for reason in why))
        s = replace(s, status="declined", reason="; ".join(filter(None, (s.reason, *why))), seen=seen)
    return s
