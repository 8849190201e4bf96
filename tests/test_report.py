"""The report: one record per attention, over all graphs of a model."""

from __future__ import annotations

import copy
import gc
import json
import logging
import weakref

import pytest
import torch

from kvc_compile import backend, handle, report
from kvc_compile.layout import Codec, Layout
from kvc_compile.plan import Plan, SitePlan, bytes_of
from kvc_compile.report import KEPT, Compile, DeclinedError, of, remember, remembered, warn_declined, words
from kvc_compile.request import Request
from kvc_compile.sites import CacheTensor, Declined, Site
from kvc_compile.table import layers_text, mib, table

INT4 = Layout(Codec("int", 4, (32, 1), True), 2, 16, "float32", sink=4, recent=64, flush=32)


def site(layer: int, kind: str = "born", index: int | None = None, buffer: str = "") -> SitePlan:
    cache = [CacheTensor(kind, f"{buffer or layer}{role}", "", "a", 2, 16, "float32") for role in "kv"]
    found = Site(
        layer if index is None else index, layer, f"n{layer}", "sdpa", 4, 0.25, "causal", *cache, where="m.py:1 in f"
    )
    return SitePlan(found, INT4, INT4)


def declined(index: int, reason: str = "a reason") -> Declined:
    return Declined(index, f"n{index}", reason, "m.py:1 in f")


def compiled(*entries, places=None, owners=("test",), spec=None) -> Compile:
    places = tuple(f"model.layers.{i}.attn" for i in range(len(entries))) if places is None else places
    return Compile(Request.of(spec or {"bits": 4}), Plan(entries), places, set(owners))


@pytest.fixture
def tiny():
    """A random Llama of two layers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def unlowered(monkeypatch):
    monkeypatch.setattr(backend, "lower", lambda gm, *args, **kwargs: gm.forward)


def generate(model, n: int = 3, **kwargs):
    ids = torch.arange(5)[None]
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=n, do_sample=False, return_dict_in_generate=True, **kwargs)


def test_of_a_model(tiny, unlowered):
    assert "call it first" in str(report(tiny)) and not report(tiny).sites
    tiny.compile(backend=backend.kvc, options={"bits": 4})
    out = generate(tiny)
    found = report(tiny)
    assert [(s.layer, s.status, s.pattern) for s in found.sites] == [
        (0, "compressed", "sdpa"),
        (1, "compressed", "sdpa"),
    ]
    assert [s.module for s in found.sites] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert {x.kind for x in found.sites[0].seen} == {"fresh", "grown"}, "prefill and decode are one record"
    assert "sdpa_attention.py:" in found.sites[0].where
    assert report().sites == found.sites

    layers = out.past_key_values.layers
    walked = sum(t.arena.untyped_storage().nbytes() for layer in layers for t in (layer.keys, layer.values))
    assert found.held().total == walked == sum(found.held().tensors.values()) > 0
    assert set(found.held().tensors) == {(n, role) for n in (0, 1) for role in ("keys", "values")}
    del out, layers
    gc.collect()
    assert found.held().total == 0


def test_two_models_share_graphs_but_not_memory(tiny, unlowered):
    other = copy.deepcopy(tiny)
    for m in (tiny, other):
        m.compile(backend=backend.kvc, options={"bits": 4})
    one = generate(tiny)
    assert not report(other).sites
    two = generate(other, 4)
    assert report(other).sites == report(tiny).sites
    assert 0 < report(tiny).held().total < sum(handle.held().values())
    size = sum(x.arena.untyped_storage().nbytes() for c in one.past_key_values.layers for x in (c.keys, c.values))
    assert report(tiny).held().total == size
    del two


def test_a_graph_that_is_all_declined_belongs_to_its_model(tiny, unlowered):
    tiny.compile(backend=backend.kvc, options={"bits": 4})
    tiny(torch.arange(5)[None])  # with gradients
    found = report(tiny)
    assert [s.status for s in found.sites] == ["declined", "declined"]
    assert "torch.no_grad" in found.sites[0].reason and "torch.no_grad" in str(found)
    assert found.bytes(100).uncounted == 2 and found.bytes(100).dense == 0


def test_strict_failure_can_be_asked_about(tiny, unlowered):
    tiny.compile(backend=backend.kvc, options={"spec": {"bits": 4}, "strict": True})
    with pytest.raises(Exception, match=f"(?s){DeclinedError.__name__}.*strict is set"):
        tiny(torch.arange(5)[None])
    assert [s.status for s in report(tiny).sites] == ["declined", "declined"]


def test_the_last_spec_counts(tiny, unlowered):
    tiny.compile(backend=backend.kvc, options={"bits": 4})
    generate(tiny)
    torch._dynamo.reset()
    tiny.compile(backend=backend.kvc, options={"bits": 8})
    generate(tiny)
    assert report(tiny).sites[0].keys.startswith("int8") and report(tiny).digest == report().digest
    assert report(tiny).graphs == report().graphs == 2, "prefill and decode, those of the old spec excepted"


def test_thirty_layers_are_thirty_rows_and_one_line():
    prefill = compiled(*(site(n) for n in range(30)))
    decode = compiled(*(site(n, "static") for n in range(30)))
    found = of([prefill, decode])
    assert [s.layer for s in found.sites] == list(range(30))
    assert [x.kind for x in found.sites[7].seen] == ["born", "static"]
    lines = str(found).splitlines()
    assert sum(line.startswith("0-29") for line in lines) == 1 and len(lines) < 10
    assert max(map(len, lines)) <= 100


def test_mixed_is_visible():
    found = of([compiled(site(0), site(1)), compiled(declined(0), site(1, "static"))])
    first, second = found.sites
    assert first.mixed and first.status == "declined" and "1 of 2 graphs: a reason" in first.reason and first.keys
    assert not second.mixed and second.status == "compressed"
    assert [(x.kind, x.status) for x in first.seen] == [("born", "compressed"), ("static", "declined")]
    assert "mixed" in str(found) and found.declined == (first,)


def test_one_layer_per_graph():
    """A model whose layers are compiled one by one: each graph has one attention, number 0, and no path of layers."""
    found = of([compiled(site(n, kind, index=0), places=("",)) for kind in ("born", "static") for n in range(3)])
    assert [s.layer for s in found.sites] == [0, 1, 2]


def test_bytes_are_those_of_the_plan():
    c = compiled(site(0), site(1))
    found = of([c]).bytes(1000, 3)
    assert (found.compressed, found.dense) == bytes_of(c.plan, 1000, 3)
    assert found.compressed == 3 * 4 * INT4.row_bytes(1000) == sum(x.compressed for x in found.layers)
    assert [x.layer for x in found.layers] == [0, 1] and found.layers[0].dense == 3 * 2 * INT4.dense_bytes(1000)
    with pytest.raises(ValueError, match="1 or more"):
        of([c]).bytes(0)


def test_a_shared_cache_is_counted_once():
    c = compiled(site(0), site(0, index=1, buffer="0"), places=("model.layers.0.attn", "model.layers.1.attn"))
    found = of([c])
    assert [s.shared for s in found.sites] == [False, True]
    assert found.bytes(500).compressed == bytes_of(c.plan, 500)[0]


def test_json_is_plain_and_stable():
    one, two = (of([compiled(site(0), declined(1))]).to_json() for _ in range(2))
    assert json.loads(json.dumps(one)) == one == two
    assert [s["status"] for s in one["sites"]] == ["compressed", "declined"]


def test_memory_is_bounded():
    alive = [remember(compiled(site(0))) for _ in range(KEPT + 5)]
    assert set(alive) <= set(remembered()), "a compile whose graph lives is never forgotten"
    del alive
    gc.collect()
    for _ in range(3 * KEPT):
        remember(compiled(site(0)))
    gc.collect()
    assert len([c for c in remembered() if "test" in c.owners]) <= KEPT


def test_nothing_keeps_a_model_alive():
    class Attend(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(4, 4))

        def forward(self, x):
            x = x @ self.w
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    model = Attend()
    model.compile(backend=backend.kvc, options={"bits": 4})
    model(torch.ones(1, 1, 2, 4))
    found, gone = report(model), weakref.ref(model)
    assert found.sites
    del model
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


def test_a_decline_is_warned_of_once(caplog):
    plan = Plan((declined(0, "a reason that no other test has"),))
    request = Request.of({"bits": 4})
    with caplog.at_level(logging.WARNING, "kvc_compile"):
        warn_declined(plan, request)
        warn_declined(plan, request)
    assert len(caplog.records) == 1


def test_not_a_model():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got str"):
        report("model")


def test_words():
    assert words(INT4) == "int4, scale and middle per 32 tokens x 1 channel, first 4 and last 64 tokens exact"
    assert words(Layout(Codec("raw"), 2, 16, "bfloat16")) == "bfloat16 as it is"
    assert words(Layout(Codec("fp", 8), 2, 16, "float32", recent=8)) == "fp8 (e4m3), last 8 tokens exact"


def test_text():
    assert layers_text([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert [mib(n) for n in (5, 2048, 3 << 20)] == ["5 B", "2.0 KiB", "3.0 MiB"]
    lines = table([("a", "b"), ("x", "word " * 40)])
    assert max(map(len, lines)) <= 100 and len(lines) == 5
