"""`select`: which stored tokens a query reads, by a cheap index of the keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .amount import Amount, Unbuilt
from .score import call

HASH_BITS = 128


@dataclass(frozen=True)
class Index:
    """What queries are compared with.

    kind: "exact" (the keys), "channels" (some of their channels), "hash" (signs of `bits` projections, random, or
    trained and read from `file`), "mean" and "minmax" (of a unit), "kmeans" (`iters` iterations). center: less the mean
    key.
    """

    kind: str = "exact"
    rank: Amount | None = None
    bits: int = 0
    iters: int = 10
    center: bool = False
    file: str = ""


@dataclass(frozen=True)
class Query:
    """unit: "token", "chunk" (`size` tokens) or "cluster" (`clusters` of the length). budget: tokens that a query reads
    besides the regions, or units of them. at: layers that select, () for all; reuse: the others read the same. pin:
    units that are unlike their landmark and always read."""

    index: Index
    budget: Amount
    units: bool = False
    unit: str = "token"
    size: int = 1
    clusters: Amount | None = None
    gqa: str = "mean"
    at: tuple[int, ...] = ()
    reuse: bool = False
    pin: int = 0


def query_of(data: Any) -> Query | None:
    """From `select:`; None for off. Raises Unbuilt."""
    if data in (None, "off"):
        return None
    for key in ("query", "when", "alloc", "match"):
        if key in data:
            raise Unbuilt(f"select.{key}")
    if data.get("estimator", "topk") != "topk" or data.get("run", "gpu") != "gpu":
        raise Unbuilt("select: estimator, run")
    unit, argument = call(data.get("unit", "token")) if isinstance(data.get("unit", "token"), str) else ("segment", "")
    if unit == "segment":
        raise Unbuilt("select.unit: segment")
    budget = data["budget"]
    units = isinstance(budget, str) and budget.endswith("u")
    return Query(
        index=_index(data["index"]),
        budget=Amount.parse(int(budget[:-1]) if units else budget),
        units=units,
        unit=unit,
        size=int(argument) if unit == "chunk" else 1,
        clusters=Amount.parse(int(argument) if argument.isdigit() else argument) if unit == "cluster" else None,
        gqa=data.get("gqa", "mean"),
        at=tuple(data.get("at", ())),
        reuse=data.get("reuse") == "until_next",
        pin=data.get("pin", {}).get("outliers", 0),
    )


def _index(data: Any) -> Index:
    if data == "exact":
        return Index()
    pool, basis, codec = data.get("pool"), data.get("basis", {}), data.get("codec", {})
    center = data.get("center") == "mean"
    if {"learned", "ann"} & data.keys() or "vq" in codec or data.get("rope", "post") != "post":
        raise Unbuilt("select.index: learned, ann, vq, or keys before the rotary embedding")
    if pool is not None:
        if data.keys() - {"pool", "rope"}:
            raise Unbuilt("select.index: a pool of what is not the keys as they are")
        if isinstance(pool, Mapping):
            return Index("kmeans", iters=pool["centroid"].get("iters", Index.iters))
        return Index(pool)
    if basis.keys() - {"map", "rank", "table"}:
        raise Unbuilt("select.index.basis: this one")
    if codec == {"int": 1} and "table" not in basis:
        kind, rank = basis.get("map", "random"), basis.get("rank", HASH_BITS)
        if not isinstance(rank, int) or not isinstance(kind, str):
            raise Unbuilt("select.index: a hash of other than a number of bits")
        return Index("hash", bits=rank, center=center, file="" if kind == "random" else kind)
    if basis.get("map") == "channels" and not codec and not center:
        rank = basis.get("rank", str(Fraction(1, 16)))
        if isinstance(rank, Mapping):
            raise Unbuilt("select.index.basis.rank: energy, table")
        return Index("channels", Amount.parse(rank), file=basis.get("table", ""))
    raise Unbuilt("select.index: this basis or codec")
