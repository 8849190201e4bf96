"""`kvc check` and `kvc presets`, without the rest of the command line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import yaml

from kvc_compile.cli import check as check_command
from kvc_compile.cli import presets as presets_command
from kvc_compile.spec import Spec, presets


def kvc(*words: str) -> int:
    parser = argparse.ArgumentParser("kvc")
    subparsers = parser.add_subparsers(required=True)
    check_command.add_parser(subparsers)
    presets_command.add_parser(subparsers)
    args = parser.parse_args(words)
    return int(args.run(args))


SELECT = {"quest", "double-sparsity", "hata", "shadowkv", "tidaldecode", "clusterkv"}


@pytest.mark.parametrize("name", presets())
def test_check_presets(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    missing = Spec.load(name).missing
    assert kvc("check", name) == bool(missing)
    out, err = capsys.readouterr()
    assert name in out and Spec.load(name).digest in out
    assert all(path in err for path in missing) if missing else not err
    assert max(map(len, out.splitlines())) <= 100
    assert kvc("check", name, "--json") == bool(missing)
    data = json.loads(capsys.readouterr().out)
    assert data["ok"] == (not missing) and data["expanded"] == Spec.load(name).expanded()
    scopes = 0 if missing else len(Spec.load(name).scopes())
    assert data["not_implemented"] == list(missing) and len(data["tensors"]) == 2 * scopes
    assert ("a step reads" in out) == (name in SELECT)
    assert [row["reads"] for row in data["tensors"]].count(None) < 2 * scopes or name not in SELECT


def test_check_shows_scopes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        'kvc: 1\nbits: 4\nlayers: {"0..3": {bits: 8}, "-1": {bits: 16}, "8,9,10,11,12,13,14,15,16,17": {}}\n'
    )
    assert kvc("check", str(path)) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("others", "0..3", "int 8", "32 x 1", "model's dtype", "8,9,10,11,12,13,14,15"))
    assert max(map(len, out.splitlines())) <= 100


def test_check_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("kvc: 1\nbist: 4\n")
    assert kvc("check", str(path)) == 1
    out, err = capsys.readouterr()
    assert not out and "s.yaml:2: bist: unknown key" in err and "bits" in err
    assert kvc("check", "--json", str(path)) == 1
    assert json.loads(capsys.readouterr().out)["error"]["nearest"] == "bits"


def test_check_says_what_bits_became(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("kvc: 1\nbits: 4\nkeep: {when: append, budget: 9, score: {kv: norm}}\n")
    kvc("check", str(path))
    out = capsys.readouterr().out
    assert "k.codec.block: [1, 32] and not [32, 1]" in out and max(map(len, out.splitlines())) <= 100
    kvc("check", str(path), "--json")
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert "replaces single tokens" in note
    path.write_text("kvc: 1\nbits: 4\n")
    kvc("check", str(path), "--json")
    assert json.loads(capsys.readouterr().out)["notes"] == []


def test_check_names_what_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("kvc: 1\nbits: 4\nrank: 25%\n")
    assert kvc("check", str(path)) == 1
    out, err = capsys.readouterr()
    assert "basis" in out and "rank" in err and "not implemented" in err
    assert kvc("check", "--json", str(path)) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["not_implemented"] == ["rank"] and not data["ok"]


def test_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert kvc("presets") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in presets()) and max(map(len, out.splitlines())) <= 100
    assert kvc("presets", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(presets())
    assert all(row["runs"] == (not row["needs"]) == (row["k"] is not None) for row in rows)
    today, later = out.split("These do not run yet")
    assert all((row["name"] in today.split()) == row["runs"] for row in rows)
    assert all(row["name"] in later and row["needs"][0].split(".")[0] in later for row in rows if not row["runs"])
    assert kvc("presets", "int4") == 0
    assert Spec.load(yaml.safe_load(capsys.readouterr().out)) == Spec.load("int4")
    assert kvc("presets", "int4", "--json") == 0
    assert json.loads(capsys.readouterr().out)["k"] == 5
    assert kvc("presets", "int5") == 1
    assert "nearest: int" in capsys.readouterr().err
