"""What a layer's `select` says with all that it depends on: one canonical text, the form in which operators take it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from .query import Query, query_of
from .rule import Regions, regions_of


@dataclass(frozen=True)
class Selection:
    """Which tokens a query reads: the best by an index, and the regions.

    key: canonical JSON of `select:`, of what of `tokens:` it depends on, and of the table of an index of channels.
    """

    key: str

    @staticmethod
    def of(select: Mapping[str, Any], tokens: Mapping[str, Any], channels: Sequence[Sequence[int]] = ()) -> Selection:
        """From `select:` and `tokens:` of an expanded spec. channels: [kv heads, R], of an index of channels.

        Raises Unbuilt for what has no reference semantics.
        """
        regions = {name: tokens[name] for name in ("sink", "recent") if tokens.get(name)}
        made = {"select": dict(select), "tokens": regions, "channels": [list(row) for row in channels]}
        return Selection.parse(json.dumps({k: v for k, v in made.items() if v}, separators=(",", ":"), sort_keys=True))

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(key: str) -> Selection:
        made = Selection(key)
        made.query, made.regions  # noqa: B018  (raise now what there is to raise)
        return made

    @cached_property
    def _data(self) -> dict[str, Any]:
        return json.loads(self.key)

    @cached_property
    def query(self) -> Query:
        found = query_of(self._data["select"])
        if found is None:
            raise ValueError("select: off selects nothing")
        return found

    @cached_property
    def regions(self) -> Regions:
        return regions_of(self._data.get("tokens", {}))

    @cached_property
    def channels(self) -> tuple[tuple[int, ...], ...]:
        return tuple(map(tuple, self._data.get("channels", ())))

    def sketch(self, layer: int) -> str:
        """What a cache holds beside its keys so that a layer can select, as `Layout.sketch` spells it; "" if the index
        is computed when it is read, from the keys."""
        q = self.query
        if q.at and layer not in q.at:
            return ""
        if q.index.kind == "hash" and not q.index.center and q.index.bits % 8 == 0:
            return f"hash{q.index.bits}"
        if q.index.kind == "channels":
            return "channels" + ";".join(",".join(map(str, row)) for row in self.channels)
        return ""

    @cached_property
    def words(self) -> str:
        """For people: "2048 tokens, by pages of 16 (minmax)"."""
        q, data = self.query, self._data["select"]
        number = str(data["budget"]).removesuffix("u")
        what = {"chunk": f"pages of {q.size}", "cluster": "clusters"}.get(q.unit, "tokens")
        index = {
            "exact": "exact scores", "channels": "some channels of the keys", "hash": f"{q.index.bits}-bit hashes",
            "mean": "mean keys", "minmax": "bounds on their scores", "kmeans": "their centroids",
        }[q.index.kind]  # fmt: skip
        if q.unit == "token":
            return f"{number} tokens by {index}"
        return f"{number} {what} by {index}" if q.units else f"{number} tokens in {what} by {index}"
