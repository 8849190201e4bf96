"""What a decode step reads of each layer's cache, where the spec has `select`: a pure function of sites and spec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvc_compile.policy import Selection
from kvc_compile.sites import Declined, Site
from kvc_compile.spec import Spec, SpecError


@dataclass(frozen=True)
class Reading:
    """What the queries of one attention read.

    selection: `Selection.key`, "" where they read all. source: the index of the attention whose positions are read, its
    own where it selects itself; layer: that one's layer. reason: why all is read; declined: although the spec says that
    some be read.
    """

    selection: str = ""
    source: int = -1
    layer: int = -1
    reason: str = ""
    declined: bool = False

    def words(self, layer: int) -> str:
        """For people, of a layer: what a step reads, or why it reads all."""
        if not self.selection:
            return f"all is read: {self.reason}"
        chosen = Selection.parse(self.selection).words
        return f"a step reads {chosen}" + (f", those of layer {self.layer}" if self.layer != layer else "")


def readings(found: Sequence[Site | Declined], spec: Spec) -> dict[int, Reading]:
    """By the index of an attention; empty where no layer of the spec selects."""
    sites = [s for s in found if isinstance(s, Site)]
    layers = 1 + max((s.layer for s in sites), default=0)
    asked = {s.layer: spec.layer(s.layer, layers).select for s in sites}
    if not any(asked.values()):
        return {}
    out: dict[int, Reading] = {}
    for s in sites:
        check(s, asked[s.layer], spec)
        out[s.index] = _reading(s, asked[s.layer], sites, layers)
    return out


def check(s: Site, asked: Selection | None, spec: Spec) -> None:
    """Raises SpecError where a table of channels is not of these keys."""
    rows = asked.channels if asked else ()
    heads, channels = s.key.heads, s.key.channels
    if rows and (len(rows) != heads or max(map(max, rows)) >= channels):
        raise SpecError(
            f"layer {s.layer} has {heads} KV heads of {channels} channels",
            file=spec.origin.file,
            path="select.index.basis.table",
            found=f"a table of {len(rows)} heads, with channels up to {max(map(max, rows))}",
            allowed=f"{heads} heads, channels 0..{channels - 1}",
        )


def _reading(s: Site, asked: Selection | None, sites: list[Site], layers: int) -> Reading:
    if asked is None:
        return Reading(reason="select: off")
    query = asked.query
    if s.queries != 1:
        return Reading(reason="a prompt is attended in full")
    if s.pattern == "read back":
        return Reading(reason="its cache is read back in full", declined=True)
    if s.key.kind == "fresh":
        return Reading(reason="nothing is stored before its first token")
    if not query.at or s.layer in query.at:
        return Reading(asked.key, s.index, s.layer)
    if not query.reuse:
        return Reading(reason=f"select.at: {list(query.at)}")
    layer = max((at for at in query.at if at <= s.layer), default=None)
    if layer is None:
        return Reading(reason=f"it comes before the first layer that selects, {query.at[0]}")
    source = next((x for x in sites if x.layer == layer), None)
    if source is None:
        return Reading(reason=f"layer {layer}, which selects for it, lies in another graph", declined=True)
    if why := _unlike(s, source):
        return Reading(reason=f"layer {layer}, which selects for it, {why}", declined=True)
    return Reading(asked.key, source.index, layer)


def _unlike(s: Site, source: Site) -> str:
    """Why the positions of the cache of `source` are not those of the cache of `s`; "" if they are."""
    if source.index > s.index:
        return "is computed after it"
    if source.pattern == "read back":
        return "has a cache that is read back in full"
    if source.key.heads != s.key.heads:
        return f"has {source.key.heads} KV heads, not {s.key.heads}"
    if source.key.kind != s.key.kind:
        return "has a cache of another kind"
    if source.window or s.window or source.slots != s.slots:
        return "has a cache of another length, so the two are not of the same tokens"
    return ""
