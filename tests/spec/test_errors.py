"""A refused spec says where, what was found, what is allowed, and what was probably meant."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from kvc_compile.spec import NotImplementedInSpec, Spec, SpecError


def refused(tmp_path: Path, text: str | bytes, name: str = "s.yaml") -> SpecError:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SpecError) as error:
        Spec.load(path)
    assert error.value.file == str(path) and str(path) in str(error.value)
    assert str(error.value).replace("\n", "").isprintable()
    return error.value


@pytest.mark.parametrize(
    ("text", "path", "line", "nearest"),
    [
        ("kvc: 1\nk:\n  codec: {int: 12}\n", "k.codec.int", 3, "8"),
        ("kvc: 1\nk:\n  codc: {int: 4}\n", "k.codc", 3, "codec"),
        ("kvc: 1\ntokens:\n  sink: 4\n  recnt: 64\n", "tokens.recnt", 4, "recent"),
        ("kvc: 1\nbits: 5\n", "bits", 2, "4"),
        ("kvc: 1\nbits: true\n", "bits", 2, None),
        ("kvc: 1\nbits: 4.0\n", "bits", 2, None),
        ("kvc: 1\nbits: '4'\n", "bits", 2, None),
        ("kvc: 2\n", "kvc", 1, "1"),
        ("bits: 4\n", "", 1, None),
        ("kvc: 1\nbits: 4\n\nbits: 8\n", "bits", 4, None),
        ('kvc: 1\nlayers:\n  "0,1": {bits: 4}\n  "1..2": {bits: 8}\n', 'layers."1..2"', 4, None),
        ('kvc: 1\nlayers:\n  "3..1": {bits: 8}\n', 'layers."3..1"', 3, "1..3"),
        ("kvc: 1\nlayers:\n  first: {bits: 8}\n", "layers.first", 3, None),
        ('kvc: 1\nlayers:\n  "0,1":\n    k: {codec: {int: 99}}\n', 'layers."0,1".k.codec.int', 4, "8"),
        ("kvc: 1\nkeep:\n - {when: apend, budget: 5}\n", "keep[0].when", 3, "append"),
        ("kvc: 1\nkeep: {budget: 101%}\n", "keep.budget", 2, None),
        ("kvc: 1\nkeep: {budget: 3/2}\n", "keep.budget", 2, None),
        ("kvc: 1\nkeep: {budget: 0.25*m}\n", "keep.budget", 2, None),
        ("kvc: 1\nkeep: {budget: (((n}\n", "keep.budget", 2, None),
        ("kvc: 1\nkeep: {when: chunk(0), budget: 5}\n", "keep.when", 2, "1"),
        ("kvc: 1\nkeep: {when: chunk(1, 2), budget: 5}\n", "keep.when", 2, None),
        ("kvc: 1\nk: {codec: {int: 4, fp: 8}}\n", "k.codec.fp", 2, None),
        ("kvc: 1\nk: {codec: {block: [32, 1]}}\n", "k.codec", 2, None),
        ("kvc: 1\nk: {codec: {int: 4, block: [32]}}\n", "k.codec.block", 2, None),
        ("kvc: 1\nk: {codec: {int: 4, block: [0, 1]}}\n", "k.codec.block[0]", 2, "1"),
        ("kvc: 1\nk: {codec: {fp: 16, block: [1, 1]}}\n", "k.codec.block", 2, None),
        ("kvc: 1\nk: {codec: {fp: 8, zero: false}}\n", "k.codec.zero", 2, None),
        ("kvc: 1\nbits: 4\nk: {codec: {int: 8}}\n", "k.codec", 3, None),
        ("kvc: 1\nkv: {codec: {int: 4, block: [32, 1]}}\ntokens: {recent: 16}\n", "tokens.recent", 3, "32"),
        ("kvc: 1\nkv: {codec: {int: 4, block: [32, 1]}}\ntokens: {flush: 33}\n", "tokens.flush", 3, "64"),
        ("kvc: 1\nbits: 4\nlayers: {'3': {tokens: {recent: 8}}}\n", 'layers."3".tokens.recent', 3, "32"),
        ("kvc: 1\nk: null\n", "k", 2, None),
        ("- kvc: 1\n", "", 1, None),
    ],
)
def test_where_and_what(tmp_path: Path, text: str, path: str, line: int, nearest: str | None) -> None:
    error = refused(tmp_path, text)
    assert (error.path, error.line) == (path, line)
    if nearest:
        assert error.nearest == nearest and nearest in str(error)
    assert error.found or error.message == "given twice" or error.allowed
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.path == error.path


def test_reads_well(tmp_path: Path) -> None:
    error = refused(tmp_path, "kvc: 1\nk:\n  codec: {int: 12}\n")
    file = tmp_path / "s.yaml"
    assert str(error) == (
        f"{file}:3: k.codec.int: out of range\n  found:   12\n  allowed: 1, 2, 3, 4, 5, 6, 7, 8\n  nearest: 8"
    )


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"keep": {"when": "append", "budget": 9}, "k": {"codec": {"int": 4, "block": [32, 1]}}}, "keep.when"),
        ({"keep": {"when": "prefill_end", "budget": 9}, "k": {"ref": {"layer": -1}}}, "keep"),
        ({"keep": {"budget": 9}, "v": {"basis": {"map": "svd", "over": "layers(4)"}}}, "keep"),
        (
            {"keep": {"budget": 9, "reuse": "pair", "alloc": {"waterfill": "head"}}, "v": {"ref": {"layer": "pair"}}},
            "keep.alloc",
        ),
        ({"keep": [{"of": "prompt", "budget": 9}, {"of": "visual", "budget": 9}]}, "keep[1].of"),
        ({"kv": {"basis": {"map": "a.json", "joint": "kv"}}, "k": {"codec": {"int": 4}}}, "k"),
        ({"k": {"basis": {"map": "a.json", "joint": "kv"}}}, "k.basis.joint"),
        ({"k": {"basis": {"map": "svd", "over": "layer"}}}, "k.basis.over"),
        ({"k": {"basis": {"map": "svd", "absorb": "both"}}}, "k.basis.absorb"),
        ({"attend": {"pos": "cache"}, "select": {"index": "exact", "budget": 9}}, "attend.pos"),
        ({"attend": {"split": ["recent", "prefx"]}}, "attend.split[1]"),
        ({"kv": {"codec": [{"int": 8}, {"int": 4}]}}, "k.codec"),
        ({"kv": {"codec": {"lut": "nuq3"}}}, "k.codec.lut"),
        ({"layers": {"kv_of": [0, 0, 1]}}, "layers.kv_of[2]"),
        ({"draft": {"gamma": 4, "spec": {"k": {"basis": {"map": "svd", "over": "layer"}}}}}, "draft.spec.k.basis.over"),
        ({"layers": {"3": {"k": {"basis": {"map": "svd", "over": "layer"}}}}}, 'layers."3".k.basis.over'),
    ],
)
def test_composition_law(spec: dict, path: str) -> None:
    with pytest.raises(SpecError) as error:
        Spec.load(spec)
    assert error.value.path == path
    assert error.value.allowed  # says what to change


@pytest.mark.parametrize("x", ["int5", "defualt", "no/such.yaml", "", "a\0b", "x" * 5000, 5, None, b"int4", ["int4"]])
def test_not_a_spec(x: object) -> None:
    with pytest.raises(SpecError) as error:
        Spec.load(x)  # type: ignore[arg-type]
    if x == "defualt":
        assert error.value.nearest == "default"


def test_the_working_folder_does_not_hide_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "int4").write_text("kvc: 1")
    monkeypatch.chdir(tmp_path)
    assert Spec.load("int4").layer(0, 1).k.codec.bits == 4


def with_map(file: str) -> str:
    return f"kvc: 1\nv: {{basis: {{map: '{file}'}}}}\n"


@pytest.mark.parametrize(
    "file",
    [
        "/etc/a.json",
        "../a.json",
        "a/../../a.json",
        "./a.json",
        "C:\\a.json",
        "C:a.json",
        "a\\b.json",
        "//h/a.json",
        "https://h/a.json",
        "file:a.json",
        "~/a.json",
        "a.exe",
        "a.pkl",
        "a.json/",
        ".hidden.json",
        "a\u00e9.json",
        "a b.json",
        "$HOME/a.json",
        "a.json\\n",
        "a" * 300 + ".json",
    ],
)
def test_artefacts_stay_in_the_folder(tmp_path: Path, file: str) -> None:
    assert refused(tmp_path, with_map(file)).path == "v.basis.map"


def test_artefacts_behind_links(tmp_path: Path) -> None:
    home = tmp_path / "spec"
    home.mkdir()
    (tmp_path / "out.json").write_text("{}")
    (home / "in.json").write_text("{}")
    os.symlink(tmp_path / "out.json", home / "out.json")
    os.symlink(tmp_path, home / "up")
    os.symlink(home / "in.json", home / "link.json")
    os.symlink(home / "loop.json", home / "loop.json")
    for file in ("out.json", "up/out.json", "up/absent.json"):
        assert "outside" in refused(home, with_map(file)).message
    for file in ("in.json", "link.json", "absent.json", "sub/absent.safetensors"):
        (home / "s.yaml").write_text(with_map(file))
        Spec.load(home / "s.yaml")


def test_pickles_are_refused_by_name() -> None:
    with pytest.raises(NotImplementedInSpec, match=r"less\.pt is a pickle.*safetensors"):
        Spec.load({"v": {"basis": {"map": "less.pt"}}}).require_implemented()
