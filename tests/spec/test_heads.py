"""Classes of heads: tables in the spec or beside it, resolved for a model; what does not fit is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvc_compile.policy import groups_of
from kvc_compile.spec import Spec, SpecError

STREAMS = {"tokens": {"sink": 4, "recent": 8}, "keep": {"budget": 0, "when": ["prefill_end", "append"]}}
CLASSES = {"whole": {"keep": "off"}, "streams": STREAMS}
NAMES = [["whole", "streams"], ["streams", "streams"], ["streams", "whole"]]
SCORES = [[0.9, 0.1], [0.5, 0.2], [0.9, 0.3]]
SEVERAL = {"echo": SCORES, "induction": [[0, 0], [1, 0], [0, 0]]}


def tensors(**named: Any) -> bytes:
    """A safetensors file of lists of lists, fp32."""
    header: dict[str, Any] = {"__metadata__": {"made": "by a test"}}
    body = b""
    for name, table in named.items():
        flat = [x for row in table for x in row]
        raw = struct.pack(f"<{len(flat)}f", *flat)
        shape = [len(table), len(table[0])]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


FILES = {
    "names.json": json.dumps(NAMES),
    "scores.json": json.dumps(SCORES),
    "several.json": json.dumps(
        {"about": {"model": "x"}, "tables": {"echo": SCORES, "induction": [[0, 0], [1, 0], [0, 0]]}}
    ),
    "gates.tsv": "0.9\t0.1\n0.5 0.2\n\n0.9\t0.3\n",
    "one.safetensors": tensors(gates=SCORES),
    "several.safetensors": tensors(**SEVERAL),
}


def spec(folder: Path, table: Any, top: Any = None, **classes: Any) -> Spec:
    for name, text in FILES.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    data = {"kvc": 1, "heads": {"table": table, **({} if top is None else {"top": top}), **(classes or CLASSES)}}
    (folder / "s.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(data))))
    return Spec.load(folder / "s.yaml")


def whole(found: tuple[tuple[str, ...], ...]) -> set[tuple[int, int]]:
    return {(i, h) for i, row in enumerate(found) for h, name in enumerate(row) if name == "whole"}


@pytest.mark.parametrize(
    ("table", "top", "want"),
    [
        (NAMES, None, {(0, 0), (2, 1)}),
        ("names.json", None, {(0, 0), (2, 1)}),
        (SCORES, {"whole": 3}, {(0, 0), (2, 0), (1, 0)}),
        ("scores.json", {"whole": 1}, {(0, 0)}),  # of equals the first
        ("gates.tsv", {"whole": "50%"}, {(0, 0), (2, 0), (1, 0)}),
        ("one.safetensors", {"streams": "33%"}, {(1, 0), (0, 1), (1, 1), (2, 1)}),
        ("one.safetensors", {"whole": "8%"}, set()),  # 0.48 heads
        ("several.json", {"whole": {"echo": 2, "induction": "17%"}}, {(0, 0), (2, 0), (1, 0)}),
        ("several.safetensors", {"whole": {"induction": 1}}, {(1, 0)}),
    ],
    ids=str,
)
def test_classes(tmp_path: Path, table: Any, top: Any, want: set[tuple[int, int]]) -> None:
    found = spec(tmp_path, table, top).head_classes((2, 2, 2))
    assert whole(found) == want
    assert {name for row in found for name in row} <= CLASSES.keys() and [len(row) for row in found] == [2, 2, 2]


def test_layers_with_other_numbers_of_heads(tmp_path: Path) -> None:
    table = [["whole"], ["streams", "whole"]]
    assert spec(tmp_path, table).head_classes((1, 2)) == (("whole",), ("streams", "whole"))


REFUSED = {
    "no such class": (([["whole", "stream"]], None), "heads.table", ["layer 0, head 1", "nearest: streams"]),
    "scores alone": ((SCORES, None), "heads.table", ["top: {CLASS: 50%}"]),
    "names and top": ((NAMES, {"whole": 3}), "heads.table", ["`top`"]),
    "a mixture": (([["whole", 0.5]], None), "heads.table", ["layer 0, head 1", "0.5"]),
    "top of another class": ((SCORES, {"hole": 3}), "heads.top", ["hole", "whole"]),
    "top of both": ((SCORES, {"whole": 3, "streams": 1}), "heads.top", ["two classes"]),
    "too many layers": ((NAMES + NAMES, None), "heads.table", ["3 layers with 2 KV heads", "6 rows", "3 rows"]),
    "too few heads": (([["whole", "whole"]] * 2 + [["whole"]], None), "heads.table", ["layer 2 has 2", "1 entries"]),
    "too few heads in a file": (("short.json", None), "heads.table", ["short.json: layer 1 has 2 KV heads"]),
    "no file": (("none.json", None), "heads.table", ["no such file"]),
    "not a number": (("nan.json", {"whole": 1}), "heads.table", ["layer 0, head 1", "finite"]),
    "not a table": (("map.json", {"whole": 1}), "heads.table", ["holds no tables", '{"tables"']),
    "not JSON": (("text.json", None), "heads.table", ["text.json: cannot be read"]),
    "endless": (("big.json", {"whole": 1}), "heads.table", ["big.json: cannot be read"]),
    "no such tensor": (("several.safetensors", {"whole": {"echoes": 1}}), "heads.table", ["'echoes'", "echo, ind"]),
    "which tensor": (("several.safetensors", {"whole": 1}), "heads.table", ["which table", "echo, induction"]),
    "three axes": (("deep.safetensors", {"whole": 1}), "heads.table", ["[1, 2, 1]", "[layers, KV heads]"]),
    "beyond the file": (("cut.safetensors", {"whole": 1}), "heads.table", ["does not fit the file"]),
    "another size": (("odd.safetensors", {"whole": 1}), "heads.table", ["does not fit the file"]),
    "no safetensors": (("text.safetensors", {"whole": 1}), "heads.table", ["not a safetensors file"]),
}  # fmt: skip
DEEP = json.dumps({"a": {"dtype": "F32", "shape": [1, 2, 1], "data_offsets": [0, 8]}}).encode()
ODD = {
    "short.json": json.dumps([["whole", "whole"], ["whole"], ["whole", "whole"]]).encode(),
    "nan.json": b"[[1, NaN]]",
    "map.json": b'{"heads": [[1, 2]]}',
    "text.json": b"whole",
    "big.json": b"[[1" + b"0" * 400 + b"]]",
    "deep.safetensors": struct.pack("<Q", len(DEEP)) + DEEP + bytes(8),
    "odd.safetensors": tensors(gates=SCORES).replace(b'"F32"', b'"F16"'),
    "cut.safetensors": tensors(gates=SCORES)[:-1],
    "text.safetensors": b"whole and streams",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(tmp_path: Path, name: str) -> None:
    (table, top), path, words = REFUSED[name]
    for file, raw in ODD.items():
        (tmp_path / file).write_bytes(raw)
    with pytest.raises(SpecError) as error:
        spec(tmp_path, table, top).head_classes((2, 2, 2))
    assert error.value.path == path and error.value.file == str(tmp_path / "s.yaml")
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_table_alone_names_no_class() -> None:
    with pytest.raises(SpecError, match="names no class"):
        Spec.load({"kvc": 1, "heads": {"table": NAMES}})


def test_a_file_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = spec(tmp_path, "names.json")
    monkeypatch.setattr("kvc_compile.spec.artefacts.MAX_TABLE", 10)
    with pytest.raises(SpecError, match="too large"):
        found.head_classes((2, 2, 2))


@pytest.mark.parametrize(
    ("dtype", "raw"),
    [
        ("F64", struct.pack("<2d", 0.5, 2)),
        ("F16", struct.pack("<2e", 0.5, 2)),
        ("BF16", struct.pack("<f", 0.5)[2:] + struct.pack("<f", 2)[2:]),
        ("I64", struct.pack("<2q", 0, 2)),
        ("U8", b"\0\2"),
        ("BOOL", b"\0\1"),
    ],
)
def test_numbers_of_any_kind(tmp_path: Path, dtype: str, raw: bytes) -> None:
    text = json.dumps({"a": {"dtype": dtype, "shape": [1, 2], "data_offsets": [0, len(raw)]}}).encode()
    (tmp_path / "t.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + raw)
    (tmp_path / "t.yaml").write_text("kvc: 1\nkeep: {budget: 8, alloc: {table: t.safetensors}}\n")
    ((first, second),) = Spec.load(tmp_path / "t.yaml").table("t.safetensors", (2,), "keep")
    assert (first, second) == ({"F": 0.5, "B": 0.5}.get(dtype[0], 0) * (dtype != "BOOL"), 1 if dtype == "BOOL" else 2)


def test_a_mapping_has_no_folder() -> None:
    found = Spec.load({"kvc": 1, "heads": {"table": "a.json", **CLASSES}})
    with pytest.raises(SpecError, match="no folder"):
        found.head_classes((2,))


def test_a_folder_is_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec(tmp_path, "names.json")
    monkeypatch.chdir(tmp_path)
    found = Spec.load("s.yaml")
    monkeypatch.chdir(tmp_path.parent)
    assert whole(found.head_classes((2, 2, 2))) == {(0, 0), (2, 1)}


def test_a_spec_is_its_files_too(tmp_path: Path) -> None:
    """A compile with the same spec and another table is another compile."""
    one = spec(tmp_path, "names.json")
    assert spec(tmp_path, "names.json") == one and one.artefacts
    (tmp_path / "names.json").write_text(json.dumps(NAMES[::-1]))
    with pytest.raises(SpecError, match="has changed"):
        one.head_classes((2, 2, 2))
    two = Spec.load(tmp_path / "s.yaml")
    assert two != one and two.digest != one.digest and two.content == one.content
    assert whole(two.head_classes((2, 2, 2))) == {(2, 0), (0, 1)}


def test_a_class_is_laid_over_its_layer() -> None:
    data = {"kvc": 1, "tokens": {"recent": 2}, "layers": {"1": {"tokens": {"sink": 3, "recent": 5}}}}
    found = Spec.load(
        {**data, "heads": {"table": NAMES, "whole": {"keep": "off"}, "streams": {"tokens": {"recent": 8}}}}
    )
    assert found.fragment(0, 3)["tokens"] == {"recent": 2}
    assert found.fragment(1, 3, "whole")["tokens"] == {"sink": 3, "recent": 5}
    assert found.fragment(1, 3, "streams")["tokens"] == {"sink": 3, "recent": 8}


def test_groups_of_a_layer() -> None:
    found = Spec.load({"kvc": 1, "heads": {"table": [["streams", "whole", "streams"]], **CLASSES}})
    (classes,) = found.head_classes((3,))
    groups = groups_of(classes, lambda name: found.fragment(0, 1, name))
    assert [(g.name, g.heads, len(g.rules)) for g in groups] == [("streams", (0, 2), 1), ("whole", (1,), 0)]
    assert groups[0].regions.recent.of(100) == 8 and groups[0].rules[0].budget.tokens.of(100) == 0
    assert groups_of(("", ""), lambda name: found.fragment(0, 1))[0].heads == (0, 1)


SHARED = {
    "ref": ({"k": {"ref": {"layer": -1}}}, "k.ref"),
    "over heads": ({"v": {"basis": {"map": "svd", "over": "heads(2)"}}}, "v.basis"),
    "over layers": ({"v": {"basis": {"map": "svd", "over": "layers(2)"}}}, "v.basis"),
    "keep.reuse": ({"keep": {"budget": 4, "reuse": "layers(2)"}}, "keep.reuse"),
    "keep.alloc": ({"keep": {"budget": 4, "alloc": {"pyramid": 3}}}, "keep.alloc"),
    "select.reuse": ({"select": {"index": "exact", "budget": 4, "at": [0], "reuse": "until_next"}}, "select.reuse"),
}


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("where", ["base", "class", "layer"])
def test_classes_share_nothing(name: str, where: str) -> None:
    """Legal without classes of heads, and refused with them, wherever it stands."""
    part, path = SHARED[name]
    base: dict[str, Any] = {"base": part, "layer": {"layers": {"0": part}}, "class": {}}[where]
    Spec.load({"kvc": 1, **base})
    other = {} if where == "class" else {"tokens": {"recent": 4}}
    heads = {"table": NAMES, "whole": part if where == "class" else {}, "streams": other}
    with pytest.raises(SpecError) as error:
        Spec.load({"kvc": 1, **base, "heads": heads})
    assert error.value.path.startswith("heads.") and error.value.path.endswith(path)


def test_numbers_by_head(tmp_path: Path) -> None:
    """`alloc.table` reads the same files."""
    found = spec(tmp_path, NAMES)
    inline = Spec.load({"kvc": 1, "keep": {"budget": 8, "alloc": {"table": SCORES}}})
    path = ("keep", "alloc", "table")
    assert inline.table(inline.expanded()["keep"]["alloc"]["table"], (2, 2, 2), *path) == tuple(map(tuple, SCORES))
    with pytest.raises(SpecError, match="2 layers with 2 KV heads"):
        inline.table(SCORES, (2, 2), *path)
    with pytest.raises(SpecError, match="no such file"):  # the spec did not name it
        found.table("scores.json", (2, 2, 2), *path)
    (tmp_path / "t.yaml").write_text("kvc: 1\nkeep: {budget: 8, alloc: {table: scores.json}}\n")
    assert Spec.load(tmp_path / "t.yaml").table("scores.json", (2, 2, 2), *path) == tuple(map(tuple, SCORES))
    (tmp_path / "t.yaml").write_text("kvc: 1\nkeep: {budget: 8, alloc: {table: names.json}}\n")
    with pytest.raises(SpecError, match="names where numbers"):
        Spec.load(tmp_path / "t.yaml").table("names.json", (2, 2, 2), *path)
