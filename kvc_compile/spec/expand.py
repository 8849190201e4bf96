"""The short form written out, and scopes laid over what they refine. Plain data in, plain data out."""

from __future__ import annotations

import copy
from typing import Any

from . import schema
from .errors import Path, show_path
from .grammar import Context
from .heads import RESERVED
from .rules import replaces, rules_of

Data = dict[str, Any]
_KINDS = frozenset(("int", "fp", "levels", "lut", "vq"))


def merge(base: Any, over: Any) -> Any:
    """`over` laid over `base`, key by key; parts are shared, not copied. A codec of another kind replaces it whole."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    if _KINDS & over.keys() and _KINDS & base.keys() != _KINDS & over.keys():
        return over
    return {**base, **{key: merge(base[key], over[key]) if key in base else over[key] for key in over}}


def scoped(base: Data, fragment: Data) -> Data:
    """What holds inside a scope (`layers:`, `heads:`) of an expanded spec."""
    return merge({key: base[key] for key in schema.FRAGMENT_KEYS if key in base}, fragment)


def expand(spec: Data, ctx: Context) -> Data:
    """The full form of a checked spec: no bits, budget, rank or share; `kv` split into k and v."""
    return _spec({"kvc": schema.VERSION, **spec}, (), ctx)


def _spec(spec: Data, path: Path, ctx: Context) -> Data:
    single = _single(spec)
    out = _fragment(spec, path, ctx, single, base=True)
    for scope in ("layers", "heads"):
        for name, item in out.get(scope, {}).items():
            if isinstance(item, dict) and name not in RESERVED:
                inner = _single(item) if "keep" in item else single
                if inner and not single and "bits" in spec and not {"bits", "k", "kv"} & item.keys():
                    item = {**item, "bits": spec["bits"]}  # in other blocks than the base's
                out[scope][name] = _fragment(item, (*path, scope, name), ctx, inner, base=False)
    if "draft" in out:
        draft = out["draft"]
        draft["spec"] = _spec(draft["spec"], (*path, "draft", "spec"), ctx)
        if "inner" in draft:
            draft["inner"] = _spec(draft["inner"], (*path, "draft", "inner"), ctx)
    return out


def _single(fragment: Data) -> bool:
    """Whether single tokens are replaced at every step, so that keys cannot lie in blocks of tokens."""
    return any(map(replaces, rules_of(fragment.get("keep"))))


def _fragment(fragment: Data, path: Path, ctx: Context, single: bool, base: bool) -> Data:
    out = copy.deepcopy({key: value for key, value in fragment.items() if key not in schema.SHORT})
    if "kv" in out and "joint" not in out["kv"].get("basis", {}):
        both = out.pop("kv")
        for side in ("k", "v"):
            out[side] = copy.deepcopy(merge(both, out.get(side, {})))
    _bits(fragment, out, path, ctx, single)
    _rank_and_share(fragment, out, path, ctx)
    if "budget" in fragment:
        _put(out, "keep", _snapkv(fragment), "budget", path, ctx)
    if base and "tokens" not in out:
        if any(bits != 16 for bits in _sides(fragment.get("bits", 16)).values()):
            out["tokens"] = dict(schema.SHORT_TOKENS)
        elif "budget" in fragment:
            out["tokens"] = dict(schema.SHORT_PROBE)
    for key, value in out.get("tokens", {}).items():
        if isinstance(value, dict) and value["k"] == value["v"]:
            out["tokens"][key] = value["k"]
    return _tidy(out) if base else out


def _sides(value: Any) -> Data:
    return value if isinstance(value, dict) else {"k": value, "v": value}


def _bits(fragment: Data, out: Data, path: Path, ctx: Context, single: bool) -> None:
    if "bits" not in fragment:
        return
    for side, bits in _sides(fragment["bits"]).items():
        block = schema.SHORT_SINGLE if single and side == "k" else schema.SHORT_BLOCKS[side]
        codec = {"fp": 16} if bits == 16 else {"int": bits, "block": list(block)}
        if block is schema.SHORT_SINGLE and bits != 16:
            where = show_path((*path, "k", "codec", "block"))
            blocks = f"{block} and not {schema.SHORT_BLOCKS['k']}"
            why = "`keep` replaces single tokens at every step"
            ctx.notes.append(f"{where}: {blocks}, as {why}. Keys lose more by it: see docs/spec.md")
        _put(out.setdefault(side, {}), "codec", codec, "bits", (*path, side), ctx)


def _rank_and_share(fragment: Data, out: Data, path: Path, ctx: Context) -> None:
    share = fragment.get("share", {})
    for side in ("k", "v"):
        where = (*path, side)
        if "rank" in fragment:
            basis = {"map": "svd", "rank": fragment["rank"], "over": "head", "fit": "calib"}
            _put(out.setdefault(side, {}), "basis", basis, "rank", where, ctx)
        if "heads" in share:
            heads = share["heads"]
            basis = {"map": "svd", "rank": f"1/{heads}", "over": f"heads({heads})", "fit": "calib"}
            _put(out.setdefault(side, {}), "basis", basis, "share.heads", where, ctx)
            if side == "k":  # a map across heads does not commute with the rotary embedding
                out[side].setdefault("rope", "pre")
        if "layers" in share:
            ref = {"layer": f"group({share['layers']})", "via": "copy"}
            _put(out.setdefault(side, {}), "ref", ref, "share.layers", where, ctx)


def _snapkv(fragment: Data) -> Data:
    keep: Data = {
        "when": "prefill_end",
        "budget": fragment["budget"],
        "score": {"attn": {"probe": "last 32", "reduce": "sum", "pool": "max 7"}},
    }
    if "layers" in fragment.get("share", {}):  # layers that share a cache keep the same tokens
        keep["reuse"] = f"layers({fragment['share']['layers']})"
    return keep


def _put(target: Data, key: str, value: Any, short: str, path: Path, ctx: Context) -> None:
    if key in target:
        ctx.fail((*path, key), f"`{short}` is short for this key", "both", f"`{short}`, or `{key}`, not both")
    target[key] = value


def _tidy(spec: Data) -> Data:
    """One spelling for what says the same, so that content can be compared."""
    for side in ("k", "v"):
        codec = spec.get(side, {}).get("codec")
        if codec == {"fp": 16}:
            del spec[side]["codec"]
        elif isinstance(codec, dict) and "int" in codec:
            codec.setdefault("block", [1, "all"])
            if codec.get("zero") is True:
                del codec["zero"]
        if side in spec and not spec[side]:
            del spec[side]
    tokens = spec.get("tokens", {})
    spec["tokens"] = {key: value for key, value in tokens.items() if value not in (0, {"k": 0, "v": 0})}
    if not spec["tokens"]:
        del spec["tokens"]
    return spec
