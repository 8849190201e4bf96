"""What a layer's fragment of a spec says of its tokens, as one value with a name that operators can be given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .amount import Unbuilt
from .rule import Regions, Rule, regions_of, rules_of

JOINT = ("mass", "softmax")  # allocs that look at the scores of all layers


@dataclass(frozen=True)
class Policy:
    """Which tokens stay. rule: what runs at the end of each prompt; regions: what no rule touches."""

    regions: Regions
    rule: Rule

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(key: str) -> Policy:
        """From `key_of`. Raises Unbuilt."""
        data = json.loads(key)
        (rule,) = rules_of(data["keep"])
        return Policy(regions_of(data.get("tokens", {})), rule)

    @property
    def joint(self) -> bool:
        """Whether all layers must be looked at together."""
        r = self.rule
        shared = r.alloc.kind in JOINT or (r.alloc.kind == "waterfill" and r.alloc.scope != "head")
        return shared or any(s.across for s in r.score.attention)


def key_of(fragment: Mapping[str, Any]) -> str:
    """The name of what an expanded fragment says of its tokens, "" if all stay."""
    if fragment.get("keep", "off") == "off":
        return ""
    kept = {key: fragment[key] for key in ("tokens", "keep") if key in fragment}
    return json.dumps(kept, sort_keys=True, separators=(",", ":"))


def unbuilt(fragment: Mapping[str, Any]) -> str:
    """What of `keep` in an expanded fragment does not run in models yet, "" if all of it does."""
    if fragment.get("keep", "off") == "off":
        return ""
    try:
        rules, _ = rules_of(fragment["keep"]), regions_of(fragment.get("tokens", {}))
    except Unbuilt as e:
        return str(e)
    if len(rules) > 1:
        return "several rules"
    (r,) = rules
    if r.when != ("prefill_end",):
        return "when: " + ", ".join(w for w in r.when if w != "prefill_end")
    if r.of is not None:
        return f"of: {r.of[0]}"
    if r.demote:
        return "else: demote"
    if r.alloc.kind == "table":
        return "alloc: table"
    if r.merge is not None and r.merge.assign == "single":
        return "merge: single"
    if r.score.mask is not None:
        return f"score: mask({r.score.mask})"
    if any(s.tau is not None or any(p.kind == "rand" for p in s.probe) for s in r.score.attention):
        return "score: what is random"
    return "attend" if "attend" in fragment else ""
