"""What a layer's fragment of a spec says of its tokens, as one value with a name that operators can be given."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .amount import Unbuilt
from .rule import Regions, Rule, regions_of, rules_of

JOINT = ("mass", "softmax")  # allocs that look at the scores of all layers


@dataclass(frozen=True)
class Policy:
    """Which tokens stay. rule: what runs at the end of each prompt, and at each step if `steps`; regions: what no rule
    touches."""

    regions: Regions
    rule: Rule

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(key: str) -> Policy:
        """From `key_of`. Raises Unbuilt."""
        data = json.loads(key)
        (rule,) = rules_of(data["keep"])
        return Policy(regions_of(data.get("tokens", {})), rule)

    def slots(self, tokens: int, layer: int = 0, layers: int = 1) -> int:
        """How many of a prompt of `tokens` tokens a head of a layer keeps: what is planned, so where layers or heads
        share a budget, the mean of them."""
        r, sink, recent = self.rule, self.regions.sink.of(tokens), self.regions.recent.of(tokens)
        if r.budget.tokens is None or r.budget.mass is not None:
            return tokens
        base = r.budget.tokens.of(tokens)
        if r.alloc.kind == "pyramid" and base < tokens - sink - recent:
            leader = layer // r.reuse * r.reuse
            base = int(pyramid(base, layers, r.alloc.ratio)[leader])
        return max(1, min(tokens, sink + recent + max(base, r.newest)))

    @property
    def steps(self) -> bool:
        """Whether tokens go while decoding, too."""
        return "append" in self.rule.when

    @property
    def accumulates(self) -> bool:
        """Whether the score of a token is of all queries that saw it, so that it has to be carried along."""
        return self.steps and any(p.kind == "all" for s in self.rule.score.attention for p in s.probe)

    @property
    def words(self) -> int:
        """Numbers kept beside each slot: its position, and what it received."""
        return 2 if self.accumulates else 1

    @property
    def joint(self) -> bool:
        """Whether all layers must be looked at together."""
        r = self.rule
        shared = r.alloc.kind in JOINT or (r.alloc.kind == "waterfill" and r.alloc.scope != "head")
        return shared or any(s.across for s in r.score.attention)


def pyramid(base: int, layers: int, ratio: float) -> list[int]:
    """The counts of layers that have `base` on average, the first `ratio` times the last, on a line between."""
    if layers == 1:
        return [base]
    slope = (ratio - 1) / (layers - 1)
    upto = [i * ratio - slope * i * (i - 1) / 2 for i in range(layers + 1)]  # of the first i layers
    edges = [math.floor(base * layers * x / upto[-1] + 1e-6) for x in upto]
    return [b - a for a, b in itertools.pairwise(edges)]


def words_of(key: str) -> str:
    """A policy for people: "the first 4, the newest 32 and 256 more tokens of each prompt stay"."""
    data = json.loads(key)
    tokens, keep = data.get("tokens", {}), data["keep"]
    sink, recent, budget = tokens.get("sink", 0), tokens.get("recent", 0), keep.get("budget", "all")
    if isinstance(recent, dict):
        recent = max(recent.values())
    if isinstance(budget, dict):
        budget = f"{budget['mass']:.0%} of the attention, as tokens"
    parts = [f"{end} {n}" for end, n in (("the first", sink), ("the newest", recent)) if n not in (0, "0%")]
    parts += [f"{budget} more" if parts else f"{budget}"] if budget != 0 else []
    return f"{', '.join(parts[:-1])}{' and ' if len(parts) > 1 else ''}{parts[-1]} tokens of each prompt stay"


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
    if fragment.get("select", "off") != "off":
        return "together with select"
    if not set(r.when) <= {"prefill_end", "append"}:
        return "when: " + ", ".join(w for w in r.when if w not in ("prefill_end", "append"))
    if "append" in r.when and (what := unbuilt_step(r, fragment)):
        return f"when: append, with {what}"
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


def unbuilt_step(r: Rule, fragment: Mapping[str, Any]) -> str:
    """What of a rule that runs at each step does not run yet."""
    if r.merge is not None or r.demote:
        return "merge or demote"
    if r.alloc.kind not in ("uniform", "pyramid") or r.budget.mass is not None:
        return "a budget that is shared by score"
    if r.chunk > 1 or r.diverse is not None or r.newest or r.reuse > 1:
        return "unit, diverse, protect or reuse"
    if len(r.score.attention) > 1:
        return "several scores"
    for s in r.score.attention:
        if [p.kind for p in s.probe] not in (["all"], ["step"]) or s.reduce not in ("sum", "max"):
            return "a score of other than all queries or the last one, summed or their maximum"
        if s.heads or s.across or (s.reduce == "sum" and s.gqa == "max" and s.probe[0].kind == "all"):
            return "a score over heads or layers, or the maximum of sums over a group"
    codecs = [fragment.get(side, {}).get("codec", {}) for side in ("k", "v")]
    return "blocks over tokens" if any(c.get("block", [1])[0] != 1 for c in codecs if isinstance(c, dict)) else ""
