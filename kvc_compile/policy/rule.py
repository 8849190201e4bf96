"""A rule of `keep`: how many tokens stay in which head, in what units, and what becomes of the others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .amount import Amount, Unbuilt
from .score import Score, amount_of, call, score_of

ZERO = Amount.parse(0)
FIFO = Score()


@dataclass(frozen=True)
class Regions:
    """Tokens that no rule touches: the first `sink` and the newest `recent`, as amounts of a row's length."""

    sink: Amount = ZERO
    recent: Amount = ZERO


@dataclass(frozen=True)
class Budget:
    """Tokens kept per head besides the regions: `tokens` of the row's length, or the fewest that hold the share `mass`
    of the score and at most `tokens`. None: no limit."""

    tokens: Amount | None = None
    mass: float | None = None


@dataclass(frozen=True)
class Alloc:
    """How a budget is shared by layers and heads, its sum unchanged.

    kind: "uniform"; "pyramid" (`ratio` of the first to the last layer); "table" (in `file`, or `rows` by layer and KV
    head; beta: shares differ in 1/beta of the budget); "waterfill" (one threshold over `scope`, with floor
    and cap as amounts of the budget); "mass" and "softmax" (of `statistic`) over layers.
    """

    kind: str = "uniform"
    ratio: float = 1.0
    beta: float = 1.0
    scope: str = "head"
    floor: Amount = ZERO
    cap: Amount | None = None
    statistic: str = ""
    file: str = ""
    rows: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Diverse:
    """share of the budget that goes to one token of each group of similar ones."""

    share: Amount
    sketch: str = "headbits"
    buckets: str = "hamming"


@dataclass(frozen=True)
class Merge:
    """Tokens that go are merged into tokens that stay.

    assign: "nearest" (cosine of keys), "nearest_pos", "adjacent" (runs of similar neighbours), "single" (one more
    token), "learned" (`slots` more tokens, mixed by the trained maps in `file`). weight: "mean", "pivot", "exp_cos",
    "gauss" or "count". min_cos: below it a token is dropped; ema: instead, a running threshold with this weight of the
    new mean.
    """

    assign: str
    weight: str = "mean"
    min_cos: float | None = None
    ema: float | None = None
    file: str = ""
    slots: int = 0


@dataclass(frozen=True)
class Fold:
    """Tokens that go are folded into a state of `rank` rows a head, by the trained maps in `file`."""

    file: str
    rank: int


@dataclass(frozen=True)
class Rule:
    """of: (region, number), None for all. when: the moments. chunk: tokens that stay or go together, and how their
    score is reduced. newest: tokens that come first within the budget. reuse: layers that keep the same tokens.
    merge, fold, demote: what becomes of the others; dropped with none."""

    budget: Budget = Budget()
    score: Score = FIFO
    when: tuple[str, ...] = ("prefill_end",)
    of: tuple[str, int] | None = None
    chunk: int = 1
    reduce: str = "mean"
    alloc: Alloc = Alloc()
    newest: int = 0
    diverse: Diverse | None = None
    reuse: int = 1
    merge: Merge | None = None
    fold: Fold | None = None
    demote: bool = False

    @property
    def files(self) -> tuple[str, ...]:
        """Of trained heads and maps that this rule needs."""
        named = (self.score.learned, self.merge.file if self.merge else "", self.fold.file if self.fold else "")
        return tuple(file for file in named if file)


def regions_of(tokens: Mapping[str, Any]) -> Regions:
    """From `tokens:`; where keys and values differ, the larger. Raises Unbuilt."""
    recent = tokens.get("recent", 0)
    if isinstance(recent, Mapping):
        recent = max(recent.values())
    sink = tokens.get("sink", 0)
    if isinstance(sink, str) or recent == "generated":
        raise Unbuilt(f"tokens: {sink if isinstance(sink, str) else recent}")
    return Regions(Amount.parse(sink), Amount.parse(recent))


def rules_of(data: Any, trained: bool = False) -> tuple[Rule, ...]:
    """From `keep:`, in order; () for off. trained: whether the caller hands in what the rules' files hold. Raises
    Unbuilt, without it for rules that need such files."""
    if data in (None, "off"):
        return ()
    rules = tuple(map(_rule, data if isinstance(data, list) else [data]))
    if not trained and (files := [file for rule in rules for file in rule.files]):
        raise Unbuilt(f"trained maps: {', '.join(files)}")
    return rules


def _rule(data: Mapping[str, Any]) -> Rule:
    when = data.get("when", "prefill_end")
    unit = data.get("unit", "token")
    other = data.get("else", "drop")
    of, number = call(data["of"]) if "of" in data else ("", "")
    if of == "visual":
        raise Unbuilt("of: visual")
    reuse, layers = call(data.get("reuse", "layers(1)"))
    diverse = data.get("diverse")
    return Rule(
        budget=_budget(data.get("budget", "all")),
        score=score_of(data.get("score")),
        when=tuple(w if isinstance(w, str) else "full" for w in (when if isinstance(when, list) else [when])),
        of=(of, int(number or 0)) if of else None,
        chunk=1 if unit == "token" else unit["chunk"],
        reduce="mean" if unit == "token" else unit.get("reduce", "mean"),
        alloc=_alloc(data.get("alloc", "uniform")),
        newest=data.get("protect", {}).get("newest", 0),
        diverse=None if diverse is None else _diverse(diverse),
        reuse=2 if reuse == "pair" else int(layers),
        merge=_merge(other["merge"]) if "merge" in other else None,
        fold=Fold(other["fold"]["map"], other["fold"]["rank"]) if "fold" in other else None,
        demote="demote" in other,
    )


def _budget(data: Any) -> Budget:
    if data == "all":
        return Budget()
    if isinstance(data, Mapping):
        return Budget(Amount.parse(data["cap"]) if "cap" in data else None, data["mass"])
    if isinstance(data, str) and re.fullmatch(r"[0-9.]+x", data):
        raise Unbuilt(f"budget: {data}")  # of the budget of `select`, which this rule cannot see
    return Budget(Amount.parse(data))


def _alloc(data: Any) -> Alloc:
    if data == "uniform":
        return Alloc()
    if "entropy" in data:
        raise Unbuilt("alloc: entropy")
    for kind, field in (("pyramid", "ratio"), ("softmax", "statistic"), ("table", "file"), ("waterfill", "scope")):
        if kind in data:
            cap = Amount.parse(data["cap"]) if "cap" in data else None
            floor, beta = Amount.parse(data.get("floor", 0)), data.get("beta", 1.0)
            if isinstance(data[kind], list):
                return Alloc(kind, beta=beta, rows=tuple(map(tuple, data[kind])))
            return Alloc(kind, beta=beta, floor=floor, cap=cap, **{field: data[kind]})
    return Alloc("mass")


def _diverse(data: Mapping[str, Any]) -> Diverse:
    found = Diverse(amount_of(data["share"]), data.get("sketch", Diverse.sketch), data.get("buckets", Diverse.buckets))
    if (found.sketch, found.buckets) != (Diverse.sketch, Diverse.buckets):
        raise Unbuilt(f"diverse: {found.sketch}, {found.buckets}")
    return found


def _merge(data: Mapping[str, Any]) -> Merge:
    assign, file = call(data["assign"])
    least = data.get("min_cos")
    ema = float(call(least)[1]) if isinstance(least, str) else None
    least = None if ema is not None else least
    return Merge(assign, data.get("weight", "mean"), least, ema, file, data.get("slots", 0))
