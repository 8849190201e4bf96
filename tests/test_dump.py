"""The dump: complete, deterministic, free of anything of this machine, and free of charge where it is off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvc_compile import Spec, backend, dump, files
from kvc_compile.passes import fx

FILES = [
    "0_captured.py",
    "1_rewritten.py",
    "README.md",
    "index.html",
    "plan.json",
    "repro.py",
    "rewrite.diff",
    "sites.json",
    "spec.yaml",
]
TOKENS, WIDTH = 12, 16


class Tiny(torch.nn.Module):
    """One attention over a static cache, 2 query heads on 1 key head."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(4 * WIDTH, 2 * WIDTH) * 0.1)

    def forward(self, x, keys, values, positions, mask):
        q, k, v = torch.nn.functional.linear(x, self.w).split([2 * WIDTH, WIDTH, WIDTH], -1)
        q, k, v = (t.unflatten(-1, (-1, WIDTH)).transpose(1, 2) for t in (q, k, v))
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        o = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
        return o.transpose(1, 2).flatten(2)


def run(folder: str | None, spec=None) -> None:
    """A prefill of 3 tokens and a step."""
    torch.manual_seed(0)
    model = Tiny()
    model.compile(backend=backend.kvc, options={"spec": spec or {"bits": 4}, "dump": folder}, dynamic=False)
    keys, values = torch.zeros(1, 1, TOKENS, WIDTH), torch.zeros(1, 1, TOKENS, WIDTH)
    with torch.no_grad():
        for positions in (torch.arange(3), torch.tensor([3])):
            mask = torch.arange(TOKENS) <= positions[:, None]
            model(torch.randn(1, len(positions), 2 * WIDTH), keys, values, positions, mask[None, None])


@pytest.fixture
def unlowered(monkeypatch):
    monkeypatch.setattr(backend, "lower", lambda gm, *args, **kwargs: gm.forward)


@pytest.fixture
def folders(tmp_path, unlowered) -> list[Path]:
    run(str(tmp_path))
    return sorted(tmp_path.iterdir())


def test_complete(folders):
    assert len(folders) == 2, "prefill and step"
    for folder in folders:
        assert sorted(os.listdir(folder)) == FILES, "and no temporary file left"
        captured, rewritten = ((folder / name).read_text() for name in FILES[:2])
        assert "scaled_dot_product_attention" in captured and "test_dump.py:" in captured
        assert "torch.ops.kvc.attend" in rewritten and "l_keys_.index_copy_(" not in rewritten
        assert "+++ 1_rewritten.py" in (folder / "rewrite.diff").read_text()
        sites, plan = (json.loads((folder / name).read_text()) for name in ("sites.json", "plan.json"))
        assert [s["status"] for s in sites] == ["compressed"] and sites[0]["where"].startswith("tests/test_dump.py:")
        assert plan["sites"][0]["keys"]["words"].startswith("int4")
        assert Spec.load(folder / "spec.yaml") == Spec.load({"bits": 4})
        before, after = plan["bytes"]["dense"], plan["bytes"]["compressed"]
        assert f"| {before} -> {after} |" in (folder / "README.md").read_text()


def test_two_processes_agree(tmp_path):
    script = "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import test_dump as t;"
    script += "t.backend.lower = lambda gm, *a, **k: gm.forward; t.run(sys.argv[2])"
    texts = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        subprocess.run(
            [sys.executable, "-P", "-c", script, str(Path(__file__).parent), str(folder)],
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=tmp_path,
        )
        texts.append({str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()})
    assert len(texts[0]) == 2 * len(FILES) and texts[0] == texts[1]
    for name, text in texts[0].items():
        for place in (str(tmp_path), str(Path(__file__).parent.parent), sys.prefix, os.path.expanduser("~") + "/"):
            assert place.encode() not in text, (name, place)


def test_free_where_it_is_off(monkeypatch, unlowered):
    monkeypatch.setattr(torch._logging._internal.trace_log, "handlers", [])  # pytest listens to every logger
    monkeypatch.setattr(dump, "text_of", lambda gm: pytest.fail("a graph is printed"))
    run(None)


def test_what_happened_before_a_failure_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "rewrite", lambda *args: 1 / 0)
    with pytest.raises(Exception, match="division by zero"):
        run(str(tmp_path))
    (folder,) = tmp_path.iterdir()
    assert sorted(os.listdir(folder)) == [f for f in FILES if f not in ("1_rewritten.py", "rewrite.diff")]


def test_whole_files_or_none(tmp_path, monkeypatch):
    path = tmp_path / "a" / "file.txt"
    files.write(path, "old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write(path, "new")
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file.txt"]


def test_nothing_of_this_machine(monkeypatch):
    class Graph:
        def print_readable(self, **_):
            file = "# File: /home/someone/site packages/pkg/mod.py:12 in f, code: x = f()"
            return f"{file}\n<function f at 0x7f00deadbeef>  \n"

    assert dump.text_of(Graph()) == "# File: pkg/mod.py:12 in f, code: x = f()\n<function f at 0x...>\n"


def test_artifacts_reach_the_trace(tmp_path, monkeypatch, unlowered):
    seen = {}
    known = torch._logging.trace_structured

    def trace(kind, metadata_fn=dict, *, payload_fn=lambda: None, **kwargs):
        name = metadata_fn().get("name", "") if kind == "artifact" else ""
        if name.startswith("kvc/"):
            seen[name] = payload_fn()
        return known(kind, metadata_fn, payload_fn=payload_fn, **kwargs)

    monkeypatch.setattr(torch._logging, "trace_structured", trace)
    run(str(tmp_path))
    written = {f"kvc/{p.parent.name}/{p.name}": p.read_text() for p in tmp_path.rglob("*.*") if p.is_file()}
    assert seen == written


@pytest.mark.parametrize("args", [["--eager"], ["--eager", "--lossless"]])
def test_repro_runs(folders, args):
    for folder in folders[: 1 if "--lossless" in args else 2]:
        done = subprocess.run(
            [sys.executable, "-P", str(folder / "repro.py"), *args], capture_output=True, text=True, cwd=folder
        )
        assert done.returncode == 0, done.stderr
        gap = float(done.stdout.split("largest relative difference ")[1].split()[0])
        assert gap < (1e-5 if "--lossless" in args else 0.2), done.stdout
        assert "uncompressed" not in done.stderr, "the rebuilt graph is recognised as the first one was"


def test_repro_has_the_positions_and_masks_of_the_run(folders):
    texts = [(f / "repro.py").read_text() for f in folders]
    step = next(t for t in texts if "torch.full((1,), 3, dtype=torch.int64" in t)
    assert "torch.bool, 'cpu', 4, 0)" in step and ", 3, 'int4z." in step, "a handle of 3 tokens, a mask of 4"
    prefill = next(t for t in texts if t is not step)
    assert "torch.bool, 'cpu', [1, 2, 3], 0)" in prefill


def test_every_attribute_of_the_graph_is_named_or_warned_of():
    from kvc_compile.repro import import_of, prefixes, repro

    assert import_of("f", fx.value) == "from kvc_compile.passes.fx import value as f"
    assert import_of("f", lambda: 0) is None and import_of("f", 3) is None
    assert prefixes("m", torch.tensor([[True, False, True]])) is None, "no prefix"
    assert prefixes("mask", torch.tensor([[0.0, 0.0, -1e9]])) == 2
    assert prefixes("weight", torch.tensor([[0.0, 0.0, -1e9]])) is None

    captured = (
        "class G:\n    a = torch._C._log_api_usage_once('python.nn_module');  a = None\n    b = torch.sym_sum([1, s])\n"
    )
    text = repro("id", captured, torch.fx.symbolic_trace(torch.nn.Identity()), [torch.ones(2)], {})
    assert "_log_api" not in text and "b = sum([1, s])" in text, "what Dynamo cannot read back"
