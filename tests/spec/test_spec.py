"""What a spec means: loading, expansion, defaults, scopes, comparison."""

from __future__ import annotations

import copy
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kvc_compile.spec import (
    CodecSpec,
    LayerSpec,
    NotImplementedInSpec,
    Spec,
    SpecError,
    TensorSpec,
    generate,
    presets,
    schema,
)
from kvc_compile.spec.spec import preset_text

ROWS = yaml.safe_load((Path(__file__).parent / "systems.yaml").read_text())
STORED = {"lossless", "int8", "int4", "kivi-4bit", "kivi-2bit", "fp8", "default"}
SELECT = {"quest", "double-sparsity", "hata", "shadowkv", "tidaldecode", "clusterkv"}
KEEP = {
    "adakv", "dynamickv", "ems", "graphkv", "h2o", "kvcrush", "kvmerger", "pyramidkv", "quantized-pruning", "snapkv",
    "windowkv",
}  # fmt: skip
RUN = STORED | SELECT | KEEP
METHODS = {
    *("streaming-llm", "h2o", "scissorhands", "snapkv", "keyformer", "prefixkv", "windowkv", "dynamickv", "lagkv"),
    *("graphkv", "kvcrush", "scope", "kvmerger", "d2o", "ems", "look-m", "elastic-cache", "tidaldecode", "hata"),
    *("double-sparsity", "clusterkv", "shadowkv", "mikv", "zipcache", "quantized-pruning", "saq", "zipvl"),
    *("duoattention", "razorattention", "headkv", "locret", "less", "lococo", "quest", "pyramidkv", "adakv"),
}
KEY4 = CodecSpec("int", 4, (32, 1), True)
VALUE4 = CodecSpec("int", 4, (1, 32), True)


def reload(spec: Spec) -> Spec:
    return Spec.load(yaml.safe_load(spec.to_yaml()))


def test_importing_needs_no_torch() -> None:
    code = "import sys, kvc_compile.spec as s; s.Spec.load('default').layer(0, 2); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


@pytest.mark.parametrize("name", presets())
def test_preset(name: str) -> None:
    spec = Spec.load(name)
    if name in RUN:
        spec.require_implemented()
    else:
        with pytest.raises(NotImplementedInSpec, match="not implemented yet: "):
            spec.require_implemented()
    assert bool(spec.missing) == (name not in RUN)
    assert spec.name == name and spec.description
    assert reload(spec) == spec
    assert generate.source.parse(spec.to_yaml(), None)  # our reader reads what we write


def test_presets_are_the_promised_ones() -> None:
    assert set(presets()) == STORED | METHODS


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_is_short_and_cites_its_paper(name: str) -> None:
    text = preset_text(name)
    assert len(text.splitlines()) <= 15 and max(map(len, text.splitlines())) <= 120
    comment = " ".join(line.strip("# ") for line in text.splitlines() if line.startswith("#"))
    assert re.search(r"arXiv:\d{4}\.\d{5}", comment) or name == "saq"


# KIVI, the row that says nothing, those that select, and those that evict
RUNS = ("D1", "H5", "C2", "C3", "C5", "A1", "A4", "A7", "A8", "A10", "A11", "B1", "B3", "D11")


@pytest.mark.parametrize("row", ROWS)
def test_every_published_method_is_well_formed(row: str) -> None:
    spec = Spec.load({"kvc": 1, **ROWS[row]})
    assert reload(spec) == spec
    assert Spec.load(spec.expanded()).expanded() == spec.expanded()
    if row in RUNS:
        spec.require_implemented()
        return
    with pytest.raises(NotImplementedInSpec) as error:
        spec.require_implemented()
    assert error.value.paths and all(path in str(error.value) for path in error.value.paths[:12])
    with pytest.raises(NotImplementedInSpec):
        spec.layer(0, 32)


def test_lossless_in_all_spellings() -> None:
    specs = [{}, {"kvc": 1}, {"bits": 16}, {"kv": {"codec": {"fp": 16}}}, {"kvc": 1, "k": {}}, {"keep": False}]
    loaded = [Spec.load(spec) for spec in specs]
    assert {spec.layer(0, 1) for spec in loaded} == {LayerSpec()}
    assert len({spec.digest for spec in loaded[:5]}) == 1
    raw = Spec.load({"bits": 16, "tokens": {"sink": 4, "recent": 64}})
    assert raw.layer(0, 1) == LayerSpec()  # regions say nothing where all is raw


def test_short_form() -> None:
    spec = Spec.load({"bits": 4})
    tokens = schema.SHORT_TOKENS
    assert spec.expanded()["tokens"] == tokens
    value = CodecSpec("int", 4, (1, 64), True)
    assert spec.layer(3, 4) == LayerSpec(
        TensorSpec(KEY4, tokens["sink"], tokens["recent"]["k"], 32),
        TensorSpec(value, tokens["sink"], tokens["recent"]["v"], 1),
    )
    long = {"v": {"codec": {"zero": True, "block": [1, 64], "int": 4}}, "k": {"codec": {"int": 4, "block": [32, 1]}}}
    assert Spec.load({**long, "tokens": tokens}) == spec
    mixed = Spec.load({"bits": {"k": 16, "v": 2}, "tokens": {}}).layer(0, 1)
    assert mixed == LayerSpec(TensorSpec(), TensorSpec(CodecSpec("int", 2, (1, 64), True)))


@pytest.mark.parametrize(
    ("short", "key"),
    [
        ({"rank": 64}, "basis"),
        ({"share": {"layers": 2}}, "ref"),
        ({"share": {"heads": 2}}, "basis"),
    ],
)
def test_short_form_that_is_planned(short: dict, key: str) -> None:
    spec = Spec.load({**short, "bits": 4})
    expanded = spec.expanded()
    assert not schema.SHORT.keys() & expanded.keys()
    assert key in expanded or key in expanded["k"]
    with pytest.raises(NotImplementedInSpec, match=next(iter(short))):
        spec.require_implemented()
    assert reload(spec) == spec


def test_short_forms_combine() -> None:
    spec = Spec.load({"bits": 4, "budget": 2048, "share": {"layers": 2}})
    assert spec.expanded()["keep"]["reuse"] == "layers(2)"


K, V = {"int": 4, "block": [32, 1]}, {"int": 4, "block": [1, 32]}


@pytest.mark.parametrize(
    ("codec", "tokens", "expected"),
    [
        (K, {}, (0, 32, 32)),
        (K, {"recent": 0}, (0, 32, 32)),
        (K, {"recent": 100}, (0, 100, 32)),
        (K, {"flush": 64}, (0, 64, 64)),
        (K, {"sink": 4, "recent": 128, "flush": 128}, (4, 128, 128)),
        (K, {"recent": {"k": 40, "v": 9}, "flush": {"k": 32, "v": 1}}, (0, 40, 32)),
        (V, {}, (0, 0, 1)),
        (V, {"sink": 3}, (3, 0, 1)),
        (V, {"flush": 8}, (0, 8, 8)),
        ({"int": 8}, {"recent": 5}, (0, 5, 1)),
        ({"fp": 8}, {"recent": 5}, (0, 5, 1)),
        ({"fp": 16}, {"recent": 5, "sink": 7}, (0, 0, 1)),
    ],
)
def test_regions(codec: dict, tokens: dict, expected: tuple[int, int, int]) -> None:
    k = Spec.load({"k": {"codec": codec}, "tokens": tokens}).layer(0, 1).k
    assert (k.sink, k.recent, k.flush) == expected


def test_codecs() -> None:
    def codec(data: dict) -> CodecSpec:
        return Spec.load({"k": {"codec": data}}).layer(0, 1).k.codec

    assert codec({"int": 3}) == CodecSpec("int", 3, (1, None), True)
    assert codec({"int": 1, "block": [16, 4], "zero": False}) == CodecSpec("int", 1, (16, 4), False)
    assert codec({"fp": 8}) == CodecSpec("fp", 8, None, False)
    assert codec({"fp": 8, "block": [1, "all"]}) == CodecSpec("fp", 8, (1, None), False)
    assert codec({"int": 4, "block": [32, 1]}).bits_per_element(128) == 5
    assert codec({"int": 4, "block": [32, 1], "zero": False}).bits_per_element(128) == 4.5
    assert codec({"int": 4}).bits_per_element(128) == 4.25
    assert codec({"fp": 8}).bits_per_element(64) == 8
    assert CodecSpec().bits_per_element(64) == 16


@pytest.mark.parametrize(
    "data",
    [
        {"int": 5},
        {"fp": 4},
        {"int": 4, "block": [8, 1]},
        {"int": 4, "block": ["all", 1]},
        {"fp": 8, "block": [32, 1]},
        {"levels": 3},
        [{"int": 4}],
    ],
)
def test_codecs_that_are_planned(data: dict) -> None:
    with pytest.raises(NotImplementedInSpec, match=r"k\.codec"):
        Spec.load({"k": {"codec": data}}).layer(0, 1)


def test_kv_is_refined_by_k_and_v() -> None:
    spec = Spec.load({"kv": {"codec": {"int": 4}}, "k": {"codec": {"block": [32, 1]}}, "v": {"codec": {"fp": 8}}})
    assert spec.layer(0, 1).k.codec == KEY4
    assert spec.layer(0, 1).v.codec == CodecSpec("fp", 8)


def test_scopes() -> None:
    spec = Spec.load(
        {
            "bits": 4,
            "layers": {
                "0,1": {"k": {"codec": {"int": 8}}},
                "4..8 by 2": {"tokens": {"sink": 64}},
                -1: {"bits": 16},
                "-4..-3": {"kv": {"codec": {"fp": 8}}},
            },
        }
    )
    layers = [spec.layer(i, 16) for i in range(16)]
    assert [layer.k.codec.bits for layer in layers] == [8, 8, *[4] * 10, 8, 8, 4, 16]
    assert layers[0].k.codec.block == (32, 1)  # laid over, not replaced
    assert layers[12].k.codec == CodecSpec("fp", 8)  # another kind: replaced
    assert [layer.k.sink for layer in layers] == [4, 4, 4, 4, 64, 4, 64, 4, 64, *[4] * 6, 0]
    assert [scope for scope, _ in spec.scopes()] == ["", "-1", "-4..-3", "0,1", "4..8 by 2"]
    assert reload(spec) == spec
    for i, n in ((16, 16), (-1, 16), (0, 0), (0, 3)):
        with pytest.raises(SpecError, match=f"the model has {n} layers"):
            spec.layer(i, n)
    with pytest.raises(SpecError, match="named twice"):
        spec.layer(0, 10)  # 4..8 by 2 and -4..-3 meet in layer 6
    all_layers = Spec.load({"bits": 4, "layers": {"0..-1": {"bits": 8}}})
    assert {all_layers.layer(i, 5).k.codec.bits for i in range(5)} == {8}


def test_equality_is_by_content(tmp_path: Path) -> None:
    text = "kvc: 1\nbits: 4\nlayers: {'0': {bits: 8}, '1': {bits: 16}}\n"
    paths = [tmp_path / "a.yaml", tmp_path / "b.yml", tmp_path / "c.json"]
    paths[0].write_text(text)
    paths[1].write_text("layers:\n  1: {bits: 16}\n  0: {bits: {v: 8, k: 8}}\nname: other\nbits: 4\nkvc: 1\n")
    paths[2].write_text('{\n\t"kvc": 1,\n\t"bits":4,"layers":{"0":{"bits":8},"1":{"bits":16}}}')
    specs = [Spec.load(path) for path in paths] + [Spec.load(str(paths[0])), Spec.load(yaml.safe_load(text))]
    assert len(set(specs)) == len({spec.digest for spec in specs}) == 1
    assert [spec.name for spec in specs] == ["a", "other", "c", "a", f"spec-{specs[0].digest}"]
    assert Spec.load({"bits": 4}) != specs[0]
    assert pickle.loads(pickle.dumps(specs[0])) == copy.deepcopy(specs[0]) == specs[0]
    assert Spec.load(specs[0]) is specs[0]


def test_expanded_is_a_copy() -> None:
    spec = Spec.load("int4")
    spec.expanded()["k"]["codec"]["int"] = 1
    assert spec.layer(0, 1).k.codec.bits == 4


def test_generated_files_are_up_to_date() -> None:
    hint = "run python -m kvc_compile.spec.generate"
    assert generate.SCHEMA_FILE.read_text(encoding="utf-8") == generate.schema_json(), hint
    assert generate.DOCS_FILE.read_text(encoding="utf-8") == generate.docs(), hint


def test_the_example_of_the_reference_page_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(generate.docs().split("```yaml\n")[1].split("```")[0])
    spec = Spec.load(path)
    assert [spec.layer(i, 4).k.codec.bits for i in range(4)] == [8, 4, 4, 8]


def test_json_schema_accepts_what_the_checker_accepts() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json.loads(generate.schema_json()))
    jsonschema.Draft202012Validator.check_schema(validator.schema)
    for data in [*({"kvc": 1, **row} for row in ROWS.values()), *(Spec.load(name).expanded() for name in presets())]:
        assert not list(validator.iter_errors(data)), data
    for bad in ({}, {"kvc": 1, "bist": 4}, {"kvc": 1, "bits": 5}, {"kvc": 1, "tokens": {"sink": -1}}):
        assert list(validator.iter_errors(bad)), bad
