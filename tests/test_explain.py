"""Explaining: what would happen, without its happening."""

from __future__ import annotations

import argparse
import gc
import json

import pytest
import torch

from kvc_compile import SpecError, backend, explain, report
from kvc_compile.cli import explain as command
from kvc_compile.handle import held


def tiny(config_only: bool = False, **more):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": None}
    config = transformers.LlamaConfig(**sizes, **heads, **more)
    return config if config_only else transformers.LlamaForCausalLM(config).eval()


class OwnCache(torch.nn.Module):
    """A model that keeps its cache in a buffer."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.eye(4))
        self.register_buffer("keys", torch.zeros(1, 1, 8, 4))

    def forward(self, x, positions):
        self.keys[:, :, positions] = x @ self.w
        return torch.nn.functional.scaled_dot_product_attention(x, self.keys, self.keys)


def test_nothing_is_changed():
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gc.collect()  # a cache of an earlier test must not be dropped half way through this one
    known = held()
    found = explain(model, {"bits": 4})
    assert [(s.layer, s.status) for s in found.sites] == [(0, "compressed"), (1, "compressed")]
    assert [x.kind for x in found.sites[0].seen] == ["born", "static"]
    assert found.bytes(1000).compressed < found.bytes(1000).dense / 2
    assert held() == known and found.held().total == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(hasattr(p, "kvc_owner") for p in model.parameters()) and model._compiled_call_impl is None
    assert not report(model).sites, "explaining is not compiling"


def test_compiled_code_stays(monkeypatch):
    """A model that is compiled is not compiled again because someone asked about it."""
    lowered = []
    monkeypatch.setattr(backend, "lower", lambda gm, *args, **kwargs: lowered.append(gm) or gm.forward)
    model = tiny()
    model.compile(backend=backend.kvc, options={"bits": 4})
    with torch.no_grad():
        model(torch.arange(5)[None])
        seen = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(type(model).forward.__code__)
        explain(model, {"bits": 2})
        assert len(torch._C._dynamo.eval_frame._debug_get_cache_entry_list(type(model).forward.__code__)) == len(seen)
        model(torch.arange(5)[None])
    assert len(lowered) == 1
    assert report(model).sites[0].keys.startswith("int4")


def test_own_inputs():
    found = explain(tiny(), {"bits": 4}, torch.arange(7)[None])
    assert [x.kind for x in found.sites[0].seen] == ["fresh"]


def test_buffers_are_put_back_and_declines_explained():
    model = OwnCache()
    found = explain(model, {"bits": 4}, torch.ones(1, 1, 2, 4), torch.arange(2))
    assert not model.keys.any()
    assert found.sites[0].status == "declined" and found.sites[0].reason
    assert found.sites[0].where.startswith("tests/test_explain.py:")
    with pytest.raises(TypeError, match="example inputs"):
        explain(model, {"bits": 4})


def test_errors_come_as_they_are():
    with pytest.raises(SpecError, match="layer"):
        explain(tiny(), {"bits": 4, "layers": {"7": {"bits": 8}}})


def test_dump(tmp_path):
    explain(tiny(), {"spec": {"bits": 4}, "dump": str(tmp_path)})
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert "torch.ops.kvc" in (folder / "1_rewritten.py").read_text() and (folder / "rewrite.diff").read_text()


def cli(*args: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["explain", *args])
    return parsed.run(parsed)


def test_command(tmp_path, capsys):
    tiny(config_only=True, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    assert cli(str(tmp_path), "int4", "--tokens", "1000", "--batch", "2") == 0
    text = capsys.readouterr().out
    assert "0-1     compressed" in text and "1000 tokens, batch 2" in text
    assert cli(str(tmp_path), "int4", "--json", "--batch", "2") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ok"] and len(data["sites"]) == 2 and data["bytes"]["batch"] == 2


def test_command_plans_for_a_gpu_that_is_not_there(tmp_path, capsys):
    tiny(config_only=True, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "model")
    args = str(tmp_path / "model"), "kivi-4bit", "--device", "cuda", "--dump", str(tmp_path / "dump")
    assert cli(*args, "--dtype", "bfloat16") == 0 and capsys.readouterr().out
    names = {p.stem for p in (tmp_path / "dump").rglob("kernels/*.py")}
    assert {"decode_split", "merge", "append_pair", "append_encode_values"} <= names
    assert cli(*args, "--dtype", "float32") == 0
    assert "attend_split" in {p.stem for p in (tmp_path / "dump").rglob("kernels/*.py")}, "no fast kernel takes fp32"


def test_command_refuses(tmp_path, capsys):
    assert cli(str(tmp_path), "int5") == 2 and "int5" in capsys.readouterr().err
    assert cli(str(tmp_path / "nothing"), "int4", "--json") == 2
    assert not json.loads(capsys.readouterr().out)["ok"]
