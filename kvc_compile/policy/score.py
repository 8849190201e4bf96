"""What makes a token worth keeping: the one parametric attention score, scores of keys and values, post-filters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .amount import Amount, Unbuilt

KV_SCORES = ("norm", "diff", "lag")


@dataclass(frozen=True)
class Probe:
    """Which queries vote. kind: "all", "last" and "rand" (`amount` of the tokens), "step" (the newest query)."""

    kind: str
    amount: Amount | None = None


@dataclass(frozen=True)
class AttentionScore:
    """pool(gqa(reduce over probe of weight(exp(s - lse)))), then over heads and layers.

    below: of `count_below`, the threshold as an amount of the keys that a query sees. tau: first and last temperature
    of Gumbel noise, None without. pool: ("max" or "avg", tokens). heads: None, "mean" or "sum". across: over layers.
    """

    probe: tuple[Probe, ...]
    reduce: str
    below: Amount | None = None
    tau: tuple[float, float] | None = None
    pool: tuple[str, int] | None = None
    gqa: str = "mean"
    heads: str | None = None
    across: bool = False


@dataclass(frozen=True)
class GraphDecay:
    """seeds best tokens lower what is like them by `strength`, `rounds` times."""

    seeds: int = 64
    strength: float = 0.5
    rounds: int = 1


@dataclass(frozen=True)
class Score:
    """attention: several are combined by `combine` ("max" or "sum"). kv: (name, number) of a score of keys and values.
    learned: the file of trained heads, and inputs, what they look at. With none, the newest token is the best (fifo).
    ascending: the lowest stay. mask: a condition that tokens must
    meet; decay: GraphKV's filter. Filters come after the order."""

    attention: tuple[AttentionScore, ...] = ()
    combine: str = "sum"
    kv: tuple[str, int] | None = None
    learned: str = ""
    inputs: tuple[str, ...] = ("q", "k", "v")
    ascending: bool = False
    mask: str | None = None
    decay: GraphDecay | None = None

    def votes(self, tokens: int) -> int:
        """How many of the newest of `tokens` queries can vote at most."""
        probes = [p for s in self.attention for p in s.probe]
        if any(p.kind not in ("last", "step") for p in probes):
            return tokens
        return max([1, *(min(tokens, p.amount.of(tokens)) for p in probes if p.amount is not None)])

    @property
    def fifo(self) -> bool:
        return not self.attention and self.kv is None and not self.learned


def score_of(data: Any) -> Score:
    """From `score:` of an expanded spec; nothing said is fifo. Raises Unbuilt."""
    if data is None or data == "fifo":
        return Score()
    if not isinstance(data, Mapping):
        raise Unbuilt(f"score: {data}")
    if "." not in data.get("learned", "."):
        raise Unbuilt(f"score.learned: {data['learned']}, a name")
    attention = data.get("attn", [])
    then = data.get("then")
    mask = decay = None
    if isinstance(then, str):
        mask = call(then)[1]
    elif then is not None:
        d = then["graph_decay"]
        default = GraphDecay()
        decay = GraphDecay(
            d.get("seeds", default.seeds), d.get("lambda", default.strength), d.get("rounds", default.rounds)
        )
    return Score(
        attention=tuple(map(_attention, attention if isinstance(attention, list) else [attention])),
        combine=data.get("combine", "sum"),
        kv=_kv(data["kv"]) if "kv" in data else None,
        learned=data.get("learned", ""),
        inputs=tuple(data.get("in", Score.inputs)),
        ascending=data.get("order") == "asc",
        mask=mask,
        decay=decay,
    )


def call(text: str) -> tuple[str, str]:
    """`last 32`, `lag(128)`, `all` as (head, argument), the argument "" where there is none."""
    match = re.fullmatch(r"(\w+)(?:\s*\((.*)\)|\s+(.*))?", text, re.ASCII)
    if match is None:
        raise ValueError(f"not of the form f(x): {text!r}")
    return match[1], match[2] or match[3] or ""


def amount_of(text: str) -> Amount:
    return Amount.parse(int(text) if text.isdigit() else text)


def _probe(text: str) -> Probe:
    kind, argument = call(text)
    if kind not in ("all", "step", "last", "rand"):
        raise Unbuilt(f"probe: {text}")
    return Probe(kind, amount_of(argument) if argument else None)


def _attention(data: Mapping[str, Any]) -> AttentionScore:
    probes = data["probe"] if isinstance(data["probe"], list) else [data["probe"]]
    reduce, argument = call(data["reduce"])
    tau = data["weight"]["gumbel"]["tau"] if "weight" in data else None
    pool = call(data["pool"]) if "pool" in data else None
    return AttentionScore(
        probe=tuple(map(_probe, probes)),
        reduce=reduce,
        below=Amount.parse(argument) if not _float(argument) else Amount.parse(float(argument)) if argument else None,
        tau=None if tau is None else (tau[0], tau[1]) if isinstance(tau, list) else (tau, tau),
        pool=None if pool is None else (pool[0], int(pool[1])),
        gqa=data.get("gqa", "mean"),
        heads=data.get("heads"),
        across="across" in data,
    )


def _float(text: str) -> bool:
    return re.fullmatch(r"[0-9.eE+-]*", text, re.ASCII) is not None


def _kv(text: str) -> tuple[str, int]:
    name, argument = call(text)
    if name not in KV_SCORES:
        raise Unbuilt(f"score: {text}")
    return name, int(argument or 0)
