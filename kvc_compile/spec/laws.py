"""What cannot be combined: rules between keys, checked on the expanded spec. Each message says what to change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import heads, laws_tokens, ranges, schema
from .errors import Path, nearest, show
from .expand import _KINDS, Data, scoped
from .grammar import Context
from .tensors import tensor_of


def check(spec: Data, ctx: Context, path: Path = ()) -> None:
    """Refuses combinations that cannot work, in the spec and in each of its scopes."""
    names = [name for name in spec.get("layers", {}) if name != "kv_of"]
    ranges.check(names, (*path, "layers"), ctx)
    _kv_of(spec, path, ctx)
    if "heads" in spec:
        heads.check(spec["heads"], (*path, "heads"), ctx)
    for where, fragment in scopes(spec, path):
        own = {key: part for key, part in fragment.items() if fragment is spec or part is not spec.get(key)}
        _codecs(own, where, spec.get("calib", {}), ctx)
        _fragment(fragment, where, ctx)
    _codecs(spec.get("regions", {}), (*path, "regions"), spec.get("calib", {}), ctx)
    regions = (*schema.BUILT_IN_REGIONS, *spec.get("regions", {}), *(["prefix"] if "prefix" in spec else []))
    for i, name in enumerate(spec.get("attend", {}).get("split", [])):
        if name not in regions:
            ctx.fail((*path, "attend", "split", i), "no such region", name, ", ".join(regions), nearest(name, regions))
    for key in ("spec", "inner"):
        if key in spec.get("draft", {}):
            check(spec["draft"][key], ctx, (*path, "draft", key))


def scopes(spec: Data, path: Path = ()) -> Iterator[tuple[Path, Data]]:
    """The base and, laid over it, every scope of an expanded spec: layers, classes of heads, and these in those."""
    yield path, spec
    for scope in ("layers", "heads"):
        for name, fragment in spec.get(scope, {}).items():
            if isinstance(fragment, dict) and name not in heads.RESERVED:
                yield (*path, scope, name), scoped(spec, fragment)
    for name, fragment in spec.get("heads", {}).items():
        for layer in spec.get("layers", {}).values():
            if isinstance(fragment, dict) and name not in heads.RESERVED and isinstance(layer, dict):
                yield (*path, "heads", name), scoped(scoped(spec, layer), fragment)


def _fragment(f: Data, path: Path, ctx: Context) -> None:
    _joint(f, path, ctx)
    _rope(f, path, ctx)
    _ages(f, path, ctx)
    laws_tokens.check(f, path, ctx)
    if "heads" in path:
        laws_tokens.by_class(f, path, ctx)
    for side in ("k", "v"):
        tensor_of(f, side, path, ctx)


def _joint(f: Data, path: Path, ctx: Context) -> None:
    for side in ("k", "v"):
        if "joint" in f.get(side, {}).get("basis", {}):
            where = (*path, side, "basis", "joint")
            ctx.fail(where, "a joint latent holds keys and values", f"under `{side}`", "under `kv`")
        if "kv" in f and {"codec", "basis"} & f.get(side, {}).keys():
            ctx.fail(
                (*path, side),
                "a joint latent (kv.basis.joint) has one codec and basis",
                f"also under `{side}`",
                "both under `kv`",
            )


def _rope(f: Data, path: Path, ctx: Context) -> None:
    """A map across heads, or one folded into the weights, does not commute with the rotary embedding."""
    for side in ("k", "kv"):
        repr_ = f.get(side, {})
        basis = repr_.get("basis", {})
        over = basis.get("over", "head")
        why = "over" if over != "head" else "absorb" if basis.get("absorb") in ("write", "both") else None
        if why and repr_.get("rope", "post") == "post":
            ctx.fail(
                (*path, side, "basis", why),
                "this map does not commute with the rotary embedding",
                f"{why}: {basis[why]} with rope: post",
                f"`rope: pre` or `rope: split(n)` under `{side}`",
            )
    elsewhere = f.get("select", "off") != "off" or "ref" in f.get("k", {})
    if f.get("attend", {}).get("pos") == "cache" and elsewhere and f.get("k", {}).get("rope") != "pre":
        ctx.fail(
            (*path, "attend", "pos"),
            "positions in the cache, with `select` or `ref`, need keys before the rotary embedding",
            "pos: cache",
            "k: {rope: pre}, or pos: original",
        )


def _ages(f: Data, path: Path, ctx: Context) -> None:
    ages = f.get("tokens", {}).get("ages")
    for side in ("k", "v", "kv"):
        codec = f.get(side, {}).get("codec")
        if isinstance(codec, list) and len(codec) != len(ages or []) + 1:
            ctx.fail(
                (*path, side, "codec"),
                "a list of codecs needs one age less in tokens.ages",
                f"{len(codec)} codecs, {len(ages or [])} ages",
                f"{len(codec) - 1} ages",
            )


def _kv_of(spec: Data, path: Path, ctx: Context) -> None:
    owners = spec.get("layers", {}).get("kv_of", [])
    for i, owner in enumerate(owners):
        if owner > i or owners[owner] != owner:
            ctx.fail(
                (*path, "layers", "kv_of", i),
                "a layer uses its own cache, or that of an earlier layer",
                str(owner),
                f"{i}, or an earlier layer that names itself",
            )


def _codecs(data: Any, path: Path, calib: Data, ctx: Context) -> None:
    """Every codec below `data`, wherever representations are described."""
    if isinstance(data, list):
        for i, item in enumerate(data):
            _codecs(item, (*path, i), calib, ctx)
    if not isinstance(data, dict):
        return
    for key, value in data.items():
        if key == "codec":
            listed = isinstance(value, list)
            for i, codec in enumerate(value if listed else [value]):
                _codec(codec, (*path, key, i) if listed else (*path, key), calib, ctx)
        elif key not in ("layers", "heads", "draft", "regions"):  # scopes are seen laid over the base
            _codecs(value, (*path, key), calib, ctx)


def _codec(codec: Data, path: Path, calib: Data, ctx: Context) -> None:
    kinds = sorted(_KINDS & codec.keys())
    if not kinds:
        ctx.fail(path, "says no kind of codec", show(codec), "one of int, fp, levels, lut, vq")
    if "zero" in codec and kinds[0] not in ("int", "levels"):
        ctx.fail((*path, "zero"), f"`{kinds[0]}` has no zero point", allowed="only with int or levels")
    if codec.get("fp") == 16 and "block" in codec:
        ctx.fail((*path, "block"), "fp: 16 is the model's own dtype, without scales", allowed="fp: 8, int, or no block")
    if codec.get("fp") == 8 and codec.get("block", [1])[0] != 1:
        ctx.later((*path, "block"), "fp: 8 with a block over tokens; so far: [1, channels]")
    if "lut" in codec and codec["lut"] not in (*schema.BUILT_IN_LUTS, *calib):
        allowed = (*schema.BUILT_IN_LUTS, *calib)
        ctx.fail(
            (*path, "lut"),
            "no such table",
            codec["lut"],
            ", ".join(allowed) + ", or a name under `calib`",
            nearest(codec["lut"], allowed),
        )
