"""What cannot be combined among `keep`, `select` and what they touch. Each message says what to change.

`keep` and `select` act on stored tokens, so they meet the codec where blocks span tokens, layers that share a cache
where their tokens must be the same, and positions where the stored ones no longer lie as they did.
"""

from __future__ import annotations

import itertools

from kvc_compile.policy import unbuilt

from .errors import Path, nearest
from .expand import Data
from .grammar import Context
from .rules import moments, replaces, rules_of

STATISTICS = ("attn_variance",)  # of a layer's scores, for `alloc: {softmax: ..}`


def check(f: Data, path: Path, ctx: Context) -> None:
    """Refuses what cannot work in an expanded fragment."""
    keep = f.get("keep", "off")
    rules = rules_of(keep)
    for i, rule in enumerate(rules):
        where = (*path, "keep", i) if isinstance(keep, list) else (*path, "keep")
        _shared_layers(rule, f, where, ctx)
        _in_blocks(rule, f, where, ctx)
        _demoted(rule, where, ctx)
        _positions(rule, f, where, ctx)
        _budget(rule, where, ctx)
        _merge(rule, where, ctx)
    _disjoint(rules, path, ctx)
    if what := unbuilt(f):
        ctx.later((*path, "keep"), what)
    if "keep" not in f and isinstance(f.get("tokens", {}).get("recent"), str):
        ctx.later((*path, "tokens", "recent"), f["tokens"]["recent"])
    if f.get("select", "off") != "off":
        _select(f["select"], (*path, "select"), ctx)


def by_class(f: Data, path: Path, ctx: Context) -> None:
    """Heads of a class lie elsewhere in each layer, so nothing can be shared with the heads of another."""
    for side in ("k", "v", "kv"):
        repr_ = f.get(side, {})
        over = repr_.get("basis", {}).get("over", "head")
        if over != "head" or "joint" in repr_.get("basis", {}):
            found = over if over != "head" else "a joint latent"
            ctx.fail((*path, side, "basis"), "this map mixes heads of several classes", str(found), "over: head")
        if "ref" in repr_:
            where = (*path, side, "ref")
            ctx.fail(
                where, "the other layer has other heads in this class", "a class of heads", "no `ref`, or no `heads`"
            )
    keep = f.get("keep", "off")
    for i, rule in enumerate(rules_of(keep)):
        where = (*path, "keep", i) if isinstance(keep, list) else (*path, "keep")
        if "reuse" in rule:
            ctx.fail((*where, "reuse"), "the other layers have other heads in this class", rule["reuse"], "no `reuse`")
        alloc = rule.get("alloc", "uniform")
        if alloc != "uniform" and alloc.get("waterfill") != "head":
            ctx.fail(
                (*where, "alloc"),
                "layers cannot share a budget: they have other heads in this class",
                next(iter(alloc)),
                "uniform, or waterfill: head",
            )
    if isinstance(f.get("select"), dict) and "reuse" in f["select"]:
        where = (*path, "select", "reuse")
        ctx.fail(where, "the other layers have other heads in this class", f["select"]["reuse"], "no `reuse`")


def _shared_layers(rule: Data, f: Data, path: Path, ctx: Context) -> None:
    """Layers whose stores depend on each other keep the same tokens, and equally many per head."""
    shared, size = _shared(f)
    if shared is None:
        return
    if "reuse" not in rule:
        ctx.fail(
            path,
            f"layers joined by `{shared}` must keep the same tokens",
            "no `reuse`",
            "reuse: pair, or reuse: layers(n)",
        )
    group = 2 if rule["reuse"] == "pair" else _number(rule["reuse"])
    if size and group % size:
        ctx.fail(
            (*path, "reuse"),
            f"`{shared}` joins groups of {size} layers, which must keep the same tokens",
            rule["reuse"],
            f"layers({size}), or a multiple of it",
            f"layers({size})",
        )
    alloc = rule.get("alloc")
    if isinstance(alloc, dict) and alloc.get("waterfill") in ("head", "model"):
        ctx.fail(
            (*path, "alloc"),
            f"layers joined by `{shared}` must keep equally many tokens per head",
            f"waterfill: {alloc['waterfill']}",
            "waterfill: layer, or uniform",
        )


def _shared(f: Data) -> tuple[str | None, int]:
    """The key that joins layers, and how many of them, 0 if it does not say."""
    for side in ("k", "v", "kv"):
        layer = f.get(side, {}).get("ref", {}).get("layer")
        if layer is not None:
            size = 2 if layer == "pair" else _number(layer) if str(layer).startswith("group") else 0
            return f"{side}.ref", size
        over = str(f.get(side, {}).get("basis", {}).get("over", ""))
        if over.startswith("layers("):
            return f"{side}.basis.over", _number(over)
    return None, 0


def _number(call: str) -> int:
    return int(call.split("(")[1].rstrip(")"))


def _in_blocks(rule: Data, f: Data, path: Path, ctx: Context) -> None:
    """A single slot inside a block over tokens cannot be overwritten, nor merged into while others stay encoded."""
    merges = "merge" in rule.get("else", "drop")
    if not replaces(rule):
        return
    for side in ("k", "v", "kv"):
        codec = f.get(side, {}).get("codec", {})
        for one in codec if isinstance(codec, list) else [codec]:
            tokens = one.get("block", [1, "all"])[0]
            if tokens != 1:
                ctx.fail(
                    (*path, "when"),
                    f"blocks of {side} span {tokens} tokens, so single tokens cannot be "
                    + ("merged into" if merges else "replaced"),
                    "append",
                    f"every(n), or {side}.codec.block: [1, c]",
                )


def _demoted(rule: Data, path: Path, ctx: Context) -> None:
    """Tokens that are demoted one at a time do not fill a block over tokens."""
    other = rule.get("else", "drop")
    demote = other.get("demote", {}) if isinstance(other, dict) else {}
    codec = demote.get("codec", {})
    for one in codec if isinstance(codec, list) else [codec]:
        tokens = one.get("block", [1, "all"])[0]
        if tokens != 1 and "append" in moments(rule):
            ctx.fail(
                (*path, "else", "demote", "codec", "block"),
                f"tokens are demoted one at a time, and a block spans {tokens} of them",
                f"when: append, with a block of {tokens} tokens",
                "[1, c], or when: every(n)",
            )


def _positions(rule: Data, f: Data, path: Path, ctx: Context) -> None:
    """Where tokens leave from the middle, those after them move in the cache, each by another distance."""
    if f.get("attend", {}).get("pos") != "cache" or f.get("k", {}).get("rope") == "pre":
        return
    if rule.get("budget") != 0 and rule.get("score", "fifo") != "fifo":
        ctx.fail(
            (*path, "budget"),
            "positions in the cache, with tokens that leave from its middle, need keys before the rotary embedding",
            "attend.pos: cache",
            "k: {rope: pre}, attend: {pos: original}, or a budget of 0",
        )


def _budget(rule: Data, path: Path, ctx: Context) -> None:
    budget, alloc, score = rule.get("budget"), rule.get("alloc", "uniform"), rule.get("score", "fifo")
    attention = isinstance(score, dict) and "attn" in score
    if score == "same":
        ctx.fail((*path, "score"), "there is no score before this one", "same", "fifo, or a mapping with attn or kv")
    if isinstance(budget, dict) and "mass" in budget:
        if not attention or score.get("order") == "asc":
            ctx.fail(
                (*path, "budget", "mass"),
                "only scores of attention have a mass",
                "a score without attn, or of order asc",
                "score: {attn: ..}, or a budget in tokens",
            )
        if alloc != "uniform":
            ctx.fail(
                (*path, "alloc"),
                "the mass decides how many tokens each head keeps",
                next(iter(alloc)),
                "uniform, or a budget in tokens",
            )
    for kind in ("mass", "softmax"):
        if isinstance(alloc, dict) and kind in alloc and not attention:
            ctx.fail((*path, "alloc", kind), "needs a score of attention", "a score without attn", "score: {attn: ..}")
    if isinstance(alloc, dict) and alloc.get("softmax", STATISTICS[0]) not in STATISTICS:
        name = alloc["softmax"]
        ctx.fail(
            (*path, "alloc", "softmax"), "no such statistic", name, ", ".join(STATISTICS), nearest(name, STATISTICS)
        )
    for key, needs in (("floor", "waterfill"), ("cap", "waterfill"), ("beta", "table")):
        if isinstance(alloc, dict) and key in alloc and needs not in alloc:
            ctx.fail((*path, "alloc", key), f"only with `{needs}`", next(iter(alloc)), f"{needs}, or no `{key}`")
    if rule.get("unit", "token") != "token" and "diverse" in rule:
        ctx.fail((*path, "diverse"), "picks single tokens", "with a unit of chunks", "unit: token, or no `diverse`")


def _merge(rule: Data, path: Path, ctx: Context) -> None:
    other = rule.get("else", "drop")
    merge = other.get("merge") if isinstance(other, dict) else None
    if merge is None:
        return
    where = (*path, "else", "merge")
    assign, least = merge["assign"], merge.get("min_cos")
    if merge.get("zero_class") and least is None:
        ctx.fail((*where, "zero_class"), "nothing says which tokens fall into it", "no `min_cos`", "min_cos: 0.6")
    if assign == "single" and least is not None:
        ctx.fail((*where, "min_cos"), "one token takes all the others", "assign: single", "nearest, or no `min_cos`")
    if isinstance(least, str) and assign != "nearest":
        ctx.fail((*where, "min_cos"), "a running mean is of the nearest tokens", f"assign: {assign}", "nearest")
    learned = assign.startswith("learned")
    if "slots" in merge and not learned:
        ctx.fail(
            (*where, "slots"), "only with a learned assignment", f"assign: {assign}", "learned(FILE), or no `slots`"
        )
    if learned and "slots" not in merge:
        ctx.fail(where, "a trained mix has a fixed number of slots", "no `slots`", "slots: 64, as it was trained")
    for key in ("min_cos", "weight"):
        if learned and key in merge:
            ctx.fail((*where, key), "the trained maps decide what becomes of a token", str(merge[key]), f"no `{key}`")


def _disjoint(rules: list[Data], path: Path, ctx: Context) -> None:
    named = [(i, rule["of"]) for i, rule in enumerate(rules) if "of" in rule]
    for (_, a), (j, b) in itertools.combinations(named, 2):
        kinds = {a.split("(")[0], b.split("(")[0]}
        if len(kinds) == 1 or kinds == {"visual", "prompt"} or kinds == {"tail", "generated"}:
            ctx.fail(
                (*path, "keep", j, "of"),
                "two rules may not be about the same tokens",
                f"{a} and {b}",
                "regions that do not overlap, such as prompt and generated",
            )


def _select(query: Data, path: Path, ctx: Context) -> None:
    index, unit = query["index"], query.get("unit", "token")
    kind = unit.split("(")[0] if isinstance(unit, str) else "segment"
    pool = index.get("pool") if isinstance(index, dict) else None
    if (kind == "cluster") != isinstance(pool, dict):
        ctx.fail(
            (*path, "unit"),
            "clusters and their centroids belong together",
            f"{kind} with " + ("centroids" if isinstance(pool, dict) else "an index without centroids"),
            "unit: cluster(n) with index: {pool: {centroid: ..}}",
        )
    learned = isinstance(index, dict) and ("learned" in index or "ann" in index)
    if kind in ("chunk", "segment") and pool is None and not learned:
        ctx.fail(
            (*path, "unit"),
            f"an index of single tokens does not say which {kind} to read",
            kind,
            "unit: token, or index: {pool: mean} or {pool: minmax}",
        )
    if kind == "token" and pool is not None:
        ctx.fail((*path, "unit"), f"a {pool} is of several tokens", "token", "chunk(n)", "chunk(16)")
    if "reuse" in query and "at" not in query:
        ctx.fail((*path, "reuse"), "nothing says which layers select", "no `at`", "at: [2, 13], or no `reuse`")
    if "pin" in query and pool != "mean":
        ctx.fail((*path, "pin"), "outliers are unlike the mean of their chunk", "another index", "index: {pool: mean}")
