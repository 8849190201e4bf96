"""The composition law: what cannot work is refused when a spec is read, and what can is not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kvc_compile.spec import Spec, SpecError, presets
from kvc_compile.spec.spec import preset_text

ATTN = {"attn": {"probe": "last 32", "reduce": "sum"}}
GROUPED = {"codec": {"int": 4, "block": [32, 1]}}
MERGE = {"assign": "nearest", "weight": "mean"}
POOLED = {"index": {"pool": "mean"}, "unit": "chunk(8)", "budget": 64}


def kept(**more: Any) -> dict[str, Any]:
    return {"keep": {"budget": 64, "score": ATTN, **more}}


# Each: what is added to a legal spec, and where that is refused.
ILLEGAL = {
    "append in blocks": ({**kept(when="append"), "k": GROUPED}, "keep.when"),
    "append in blocks of one moment": ({**kept(when=["prefill_end", "append"]), "v": GROUPED}, "keep.when"),
    "append in blocks of an age": (
        {
            **kept(when="append"),
            "tokens": {"recent": 32, "ages": [64]},
            "kv": {"codec": [{"int": 8, "block": [1, 64]}, {"int": 4, "block": [32, 1]}]},
        },
        "keep.when",
    ),
    "append in blocks of a latent": (
        {**kept(when="append"), "kv": {"rope": "pre", "basis": {"map": "a.json", "joint": "kv"}, **GROUPED}},
        "keep.when",
    ),
    "merge in blocks": (
        {**kept(when="append", score="fifo", **{"else": {"merge": MERGE}}), "k": GROUPED},
        "keep.when",
    ),
    "demote in blocks": (
        kept(when="append", **{"else": {"demote": {"codec": {"int": 2, "block": [32, 1]}}}}),
        "keep.else.demote.codec.block",
    ),
    "ref without reuse": ({**kept(), "k": {"ref": {"layer": -1}}}, "keep"),
    "ref with another reuse": ({**kept(reuse="layers(3)"), "k": {"ref": {"layer": "pair"}}}, "keep.reuse"),
    "group with another reuse": ({**kept(reuse="pair"), "v": {"ref": {"layer": "group(4)"}}}, "keep.reuse"),
    "basis over layers with another reuse": (
        {**kept(reuse="layers(2)"), "v": {"basis": {"map": "svd", "over": "layers(4)"}}},
        "keep.reuse",
    ),
    "ref with budgets by head": (
        {**kept(reuse="pair", alloc={"waterfill": "model"}), "k": {"ref": {"layer": "pair"}}},
        "keep.alloc",
    ),
    "positions of a compacted cache": ({**kept(), "attend": {"pos": "cache"}}, "keep.budget"),
    "positions with select": ({"attend": {"pos": "cache"}, "select": {"index": "exact", "budget": 9}}, "attend.pos"),
    "joint latent with two codecs": (
        {"kv": {"rope": "pre", "basis": {"map": "a.json", "joint": "kv"}}, "v": {"codec": {"int": 4}}},
        "v",
    ),
    "mass of a score without one": (kept(budget={"mass": 0.9}, score={"kv": "norm"}), "keep.budget.mass"),
    "mass of a reversed score": (kept(budget={"mass": 0.9}, score={**ATTN, "order": "asc"}), "keep.budget.mass"),
    "mass with an alloc": (kept(budget={"mass": 0.9}, alloc={"pyramid": 3}), "keep.alloc"),
    "alloc by mass without attention": (kept(score="fifo", alloc={"mass": "layer"}), "keep.alloc.mass"),
    "alloc by an unknown statistic": (kept(alloc={"softmax": "attn_varience"}), "keep.alloc.softmax"),
    "a floor without waterfill": (kept(alloc={"pyramid": 3, "floor": 4}), "keep.alloc.floor"),
    "beta without a table": (kept(alloc={"waterfill": "head", "beta": 1.2}), "keep.alloc.beta"),
    "variety of chunks": (kept(unit={"chunk": 8}, diverse={"share": "25%"}), "keep.diverse"),
    "the same score as none": (kept(score="same"), "keep.score"),
    "a zero class of nothing": (
        kept(**{"else": {"merge": {**MERGE, "zero_class": True}}}),
        "keep.else.merge.zero_class",
    ),
    "a threshold for one token": (
        kept(**{"else": {"merge": {"assign": "single", "min_cos": 0.5}}}),
        "keep.else.merge.min_cos",
    ),
    "a running threshold of positions": (
        kept(**{"else": {"merge": {"assign": "nearest_pos", "min_cos": "ema(0.5)"}}}),
        "keep.else.merge.min_cos",
    ),
    "slots of no map": (kept(**{"else": {"merge": {**MERGE, "slots": 4}}}), "keep.else.merge.slots"),
    "a trained mix of no size": (kept(**{"else": {"merge": {"assign": "learned(m.safetensors)"}}}), "keep.else.merge"),
    "a trained mix with a threshold": (
        kept(**{"else": {"merge": {"assign": "learned(m.safetensors)", "slots": 4, "min_cos": 0.5}}}),
        "keep.else.merge.min_cos",
    ),
    "two rules about the same tokens": (
        {"keep": [{"of": "prompt", "budget": 9}, {"of": "prompt", "budget": 3}]},
        "keep[1].of",
    ),
    "chunks by single tokens": ({"select": {"index": "exact", "unit": "chunk(8)", "budget": 9}}, "select.unit"),
    "clusters without centroids": ({"select": {**POOLED, "unit": "cluster(1/80)"}}, "select.unit"),
    "centroids without clusters": (
        {"select": {"index": {"pool": {"centroid": {"iters": 2}}}, "unit": "token", "budget": 9}},
        "select.unit",
    ),
    "pages of one token": ({"select": {**POOLED, "unit": "token"}}, "select.unit"),
    "reuse of nothing": ({"select": {"index": "exact", "budget": 9, "reuse": "until_next"}}, "select.reuse"),
    "outliers of no page": ({"select": {"index": "exact", "budget": 9, "pin": {"outliers": 3}}}, "select.pin"),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_what_cannot_work_is_refused(name: str, tmp_path: Path) -> None:
    data, path = ILLEGAL[name]
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump({"kvc": 1, **data}, sort_keys=False))
    with pytest.raises(SpecError) as error:
        Spec.load(file)
    e = error.value
    assert (e.path, e.file) == (path, str(file)) and e.line
    assert e.found and e.allowed and e.message  # what was there, and what to change


REPAIRS = {
    "append in blocks": {"keep": {"when": "every(32)"}},
    "merge in blocks": {"keep": {"when": "every(32)"}},
    "demote in blocks": {"keep": {"when": "every(32)"}},
    "ref without reuse": {"keep": {"reuse": "pair"}},
    "ref with another reuse": {"keep": {"reuse": "layers(2)"}},
    "group with another reuse": {"keep": {"reuse": "layers(4)"}},
    "basis over layers with another reuse": {"keep": {"reuse": "layers(8)"}},
    "ref with budgets by head": {"keep": {"alloc": {"waterfill": "layer"}}},
    "positions of a compacted cache": {"k": {"rope": "pre"}},
    "mass of a score without one": {"keep": {"score": ATTN}},
    "mass with an alloc": {"keep": {"alloc": "uniform"}},
    "alloc by an unknown statistic": {"keep": {"alloc": {"softmax": "attn_variance"}}},
    "variety of chunks": {"keep": {"unit": "token"}},
    "a zero class of nothing": {"keep": {"else": {"merge": {**MERGE, "zero_class": True, "min_cos": 0.6}}}},
    "chunks by single tokens": {"select": {"index": {"pool": "minmax"}}},
    "pages of one token": {"select": {"unit": "chunk(16)"}},
    "reuse of nothing": {"select": {"at": [2, 13]}},
    "outliers of no page": {"select": POOLED},
}


@pytest.mark.parametrize("name", REPAIRS)
def test_doing_what_the_error_says_helps(name: str) -> None:
    data = copy.deepcopy(ILLEGAL[name][0])
    for key, change in REPAIRS[name].items():
        data[key] = {**data.get(key, {}), **change}
    Spec.load(data)


def test_the_oldest_may_leave_blocks() -> None:
    """A window, and a queue: no token inside a block is replaced."""
    Spec.load({**kept(when="append", budget=0), "k": GROUPED, "attend": {"pos": "cache"}})
    Spec.load({**kept(when="append", score="fifo"), "k": GROUPED})


def test_scopes_are_checked_too() -> None:
    for scope, name in (("layers", "0..3"), ("heads", "streaming")):
        inner: dict[str, Any] = {"table": "t.json"} if scope == "heads" else {}
        inner[name] = {"keep": {"budget": 9, "when": "append", "score": ATTN}}
        with pytest.raises(SpecError) as error:
            Spec.load({"k": GROUPED, scope: inner})
        assert error.value.path.startswith(scope) and error.value.path.endswith("keep.when")
        Spec.load({scope: inner})


OWN_CODECS = {"quantized-pruning", "zipcache", "zipvl"}  # `bits` would say the same key twice
SINGLE = {"d2o", "h2o", "keyformer", "less", "mikv"}  # single tokens make place for others


@pytest.mark.parametrize("name", [name for name in presets() if name not in OWN_CODECS])
def test_every_method_takes_bits(name: str) -> None:
    data = yaml.safe_load(preset_text(name))
    if not {"keep", "select", "heads"} & data.keys():
        pytest.skip("a codec already")
    spec = Spec.load({**data, "bits": 4})
    full = spec.expanded()
    single = name in SINGLE
    assert full["k"]["codec"] == {"int": 4, "block": [1, 32] if single else [32, 1]}
    assert full["v"]["codec"] == {"int": 4, "block": [1, 64]}
    assert len(spec.origin.notes) == single
    for note in spec.origin.notes:
        assert "replaces single tokens" in note and note.startswith("k.codec.block: [1, 32] and not [32, 1]")
    assert not Spec.load({**data, "bits": {"k": 16, "v": 4}}).origin.notes


def test_a_scope_whose_rule_replaces_tokens_has_blocks_of_its_own() -> None:
    often = {"keep": {"budget": 9, "when": "append", "score": ATTN}}
    for scope in ({"layers": {"0": often}}, {"heads": {"table": [["a", "b"]], "a": often, "b": {}}}):
        full = Spec.load({"bits": {"k": 4, "v": 2}, **scope}).expanded()
        inner = full.get("layers", {}).get("0") or full["heads"]["a"]
        assert full["k"]["codec"]["block"] == [32, 1] and inner["k"]["codec"] == {"int": 4, "block": [1, 32]}
        assert inner["v"]["codec"] == full["v"]["codec"] == {"int": 2, "block": [1, 64]}
    # what the scope says itself holds
    own = {"layers": {"0": {**often, "bits": 8}}}
    assert Spec.load({"bits": 4, **own}).expanded()["layers"]["0"]["k"]["codec"] == {"int": 8, "block": [1, 32]}
    with pytest.raises(SpecError, match="single tokens"):
        Spec.load({"bits": 4, "layers": {"0": {**often, "k": GROUPED}}})
    assert "k" not in Spec.load({"bits": 4, **often, "layers": {"0": often}}).expanded()["layers"]["0"]
    # and a rule that is off where the base replaces tokens changes no blocks
    assert "k" not in Spec.load({"bits": 4, **often, "layers": {"0": {"keep": "off"}}}).expanded()["layers"]["0"]


def test_a_window_of_keep_may_be_smaller_than_a_block() -> None:
    """It is about which tokens stay; without a rule it is about what is exact, and has to fit."""
    Spec.load({"bits": 4, "tokens": {"recent": 8}, **kept()})
    with pytest.raises(SpecError, match="must fit"):
        Spec.load({"bits": 4, "tokens": {"recent": 8}})


CODECS: Any = st.sampled_from([{}, {"int": 4, "block": [32, 1]}, {"int": 2, "block": [1, 32]}, {"fp": 8}])


@st.composite
def legal(draw: Any) -> dict[str, Any]:
    """A spec of parts that get along: blocks over tokens only where no single token is replaced."""
    spec: dict[str, Any] = {}
    for side in ("k", "v"):
        codec = draw(CODECS)
        if codec:
            spec[side] = {"codec": codec}
    blocks = any(spec.get(side, {}).get("codec", {}).get("block", [1])[0] != 1 for side in ("k", "v"))
    when = draw(st.sampled_from(["prefill_end", "every(32)", "chunk(512)", {"full": {"slack": "50%"}}, "append"]))
    score = draw(st.sampled_from([ATTN, {"kv": "norm"}, "fifo", {**ATTN, "order": "asc"}]))
    other = draw(
        st.sampled_from(
            [
                "drop",
                {"merge": MERGE},
                {"merge": {"assign": "single"}},
                {"demote": {"codec": {"int": 2, "block": [1, 32]}}},
            ]
        )
    )
    if draw(st.booleans()):
        if when == "append" and blocks:
            when = "every(64)"
        rule = {"when": when, "score": score, "budget": draw(st.sampled_from([0, 64, "25%"])), "else": other}
        if score == ATTN:
            rule["alloc"] = draw(st.sampled_from(["uniform", {"waterfill": "head", "floor": "20%"}, {"mass": "layer"}]))
        spec["keep"] = rule
    if draw(st.booleans()):
        spec["select"] = draw(st.sampled_from([POOLED, {"index": "exact", "budget": "10%"}]))
    return spec


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(legal())
def test_legal_combinations_parse(spec: dict[str, Any]) -> None:
    loaded = Spec.load(spec)
    assert Spec.load(yaml.safe_load(loaded.to_yaml())) == loaded


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(legal(), st.sampled_from(sorted(ILLEGAL)))
def test_no_company_makes_an_illegal_part_legal(spec: dict[str, Any], name: str) -> None:
    data, _ = ILLEGAL[name]
    company = {key: part for key, part in spec.items() if "kv" not in data or key not in ("k", "v")}  # they refine it
    with pytest.raises(SpecError) as error:
        Spec.load({**company, **data})
    assert error.value.allowed
