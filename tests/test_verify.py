"""`verify: true`: the untouched graph runs beside the rewritten one, and what differs is reported by attention."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import kvc_compile.backend as backend
from kvc_compile.beside import CALLS
from kvc_compile.handle import CacheHandle
from kvc_compile.lowering import cpu
from kvc_compile.report import report
from models import decode, new_cache, prompt, tiny

LOSSLESS = {"kvc": 1}
KINDS = pytest.mark.parametrize("kind", ["static", "dynamic"])


@pytest.fixture
def without_inductor(monkeypatch):
    monkeypatch.setattr(backend, "lower", lambda gm, inputs, request, births: gm.forward)


def verified(model, spec, kind, tokens=60, steps=4):
    """(logits, cache, report) of a run under `verify`."""
    model = copy.deepcopy(model)
    compiled = torch.compile(model, backend="kvc", options={"spec": spec, "verify": True})
    cache = new_cache(model, kind, 128)
    logits = decode(compiled, cache, prompt(tokens=tokens), steps)
    return logits, cache, report(model)


@KINDS
def test_a_cache_that_is_stored_as_it_is_makes_no_difference(kind, without_inductor, caplog):
    model = tiny("llama")
    logits, cache, found = verified(model, LOSSLESS, kind)
    torch.testing.assert_close(logits, decode(model, new_cache(model, kind, 128), prompt(tokens=60), 4))
    assert all(isinstance(layer.keys, CacheHandle) for layer in cache.layers)
    assert [s.difference.calls for s in found.sites] == [5, 5] and found.difference.calls == 5
    assert all(s.difference.relative < 1e-5 for s in found.sites) and found.difference.relative < 1e-5
    assert "Verified in 5 calls" in str(found) and not caplog.records


@KINDS
def test_quantisation_is_measured_against_a_cache_in_full_precision(kind, without_inductor):
    """Fed the same tokens, the untouched model's logits are those that the untouched graphs gave beside."""
    model = tiny("llama")
    far = []
    for spec in ("int8", "int4", "kivi-2bit"):
        logits, _, found = verified(model, spec, kind, steps=1)
        want = decode(model, new_cache(model, kind, 128), prompt(tokens=60), 1)
        far.append(found.difference.relative)
        assert far[-1] == pytest.approx(float((logits - want)[:, -1].norm() / want[:, -1].norm()), rel=0.01)
        assert all(s.difference.relative > 1e-4 for s in found.sites)
    assert far == sorted(far) and far[0] > 0
    assert found.to_json()["sites"][0]["difference"]["calls"] == 2


@KINDS
def test_a_window(kind, without_inductor):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "mistral", **sizes, num_key_value_heads=2, head_dim=16, sliding_window=16, vocab_size=128
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    _, _, found = verified(model, LOSSLESS, kind, tokens=10, steps=12)
    assert found.difference.calls == 13 and found.difference.relative < 1e-5
    assert all(s.difference.relative < 1e-5 for s in found.sites)


def test_a_wrong_attention_is_found(without_inductor, monkeypatch, caplog):
    attend = cpu.attend
    monkeypatch.setattr(cpu, "attend", lambda *args: attend(*args) * 1.5)
    _, _, found = verified(tiny("llama"), LOSSLESS, "dynamic")
    assert all(s.difference.relative == pytest.approx(0.5, abs=0.4) for s in found.sites)
    assert "keeps its cache as it is" in caplog.text and "layer 0" in caplog.text


@KINDS
def test_it_ends(kind, without_inductor):
    """After some calls only the compressed cache is left, and nothing is compared."""
    _, cache, found = verified(tiny("llama", layers=1), "int8", kind, steps=CALLS + 4)
    assert found.sites[0].difference.calls == 1 + CALLS
    assert getattr(cache.layers[0].keys.arena, "kvc_beside", None) is None


def test_a_reset_cache_begins_anew(without_inductor):
    model = tiny("llama", layers=1)
    compiled = torch.compile(model, backend="kvc", options={"spec": LOSSLESS, "verify": True})
    cache = new_cache(model, "static", 64)
    for seed in range(2):
        decode(compiled, cache, prompt(seed=seed), 2)
        cache.reset()
    assert report(model).difference.relative < 1e-5


def test_through_inductor():
    _, _, found = verified(tiny("llama", layers=1), LOSSLESS, "dynamic", tokens=9, steps=2)
    assert found.difference.calls == 3 and found.difference.relative < 1e-4
