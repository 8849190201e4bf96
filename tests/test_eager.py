"""Frames that Dynamo gave up on: what runs in eager code appends to compressed caches too, and says so."""

from __future__ import annotations

import copy
import gc
import logging

import pytest
import torch

import kvc_compile.backend as backend
from kvc_compile import handle
from kvc_compile.handle import CacheHandle, Tag, held, track
from kvc_compile.layout import Codec, Layout
from kvc_compile.lowering import cpu, ops
from kvc_compile.report import report
from models import decode, new_cache, prompt, tiny

LAYOUTS = {
    "raw": Layout(Codec("raw"), 2, 16, "float32"),
    "int4": Layout(Codec("int", 4, (32, 1), True), 2, 16, "float32", sink=4, recent=40, flush=32),
    "int8": Layout(Codec("int", 8, (1, 16)), 2, 16, "float32", recent=16),
    "int3, nothing exact": Layout(Codec("int", 3, (1, 16), True), 2, 16, "float32"),
    "fp8": Layout(Codec("fp", 8, (1, 16)), 2, 16, "float32", sink=2),
}
STEP = {"raw": 0, "int4": 1 / 15, "int8": 1 / 255, "int3, nothing exact": 1 / 7, "fp8": 1 / 14}  # of a block's range
N = 100
LOSSLESS = {"kvc": 1}
ERROR = {"lossless": 1e-5, "int8": 0.02, "kivi-4bit": 0.25, "kivi-2bit": 1.0}  # over logits of the tiny model


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    """Warnings that are given once are given anew."""
    monkeypatch.setattr(handle, "_said", set())


@pytest.fixture
def no_inductor(monkeypatch):
    monkeypatch.setattr(backend, "lower", lambda gm, inputs, request, births: gm.forward)


def content(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 2, tokens, 16, generator=torch.Generator().manual_seed(seed))


def make(name: str, tokens: int = N, **kind) -> CacheHandle:
    layout = LAYOUTS[name]
    arena = ops.encode(content(tokens), tokens, layout.key)
    return CacheHandle(arena, layout.key, tokens, **({"static": False} | kind))


def in_graph(name: str, *parts: torch.Tensor) -> torch.Tensor:
    """What a graph's appends to the same cache make of it: in place, to an arena with room for all."""
    layout = LAYOUTS[name]
    total = N + sum(x.shape[2] for x in parts)
    arena = ops.encode(content(N), total, layout.key)
    for x in parts:
        ops.append(arena, x, None, layout.key, [])
    return ops.read(arena, total, layout.key, False)


def all_compressed(cache) -> bool:
    return all(isinstance(t, CacheHandle) for layer in cache.layers for t in (layer.keys, layer.values))


# ---------------------------------------------------------------- the operation


@pytest.mark.parametrize("n", [1, 5, 33, 200])
@pytest.mark.parametrize("dim", [2, -2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_cat_appends_as_a_graph_does(name, dim, n):
    past, x = make(name), content(n, seed=1)
    before, bytes_before = past.dense(), past.arena.clone()
    got = torch.cat([past, x], dim)
    assert type(got) is CacheHandle and got.shape == (2, 2, N + n, 16) and not got.static and not got.window
    torch.testing.assert_close(got.dense(), in_graph(name, x), atol=0, rtol=0)
    span = 1.01 * STEP[name] * float(x.max() - x.min())
    torch.testing.assert_close(got.dense()[:, :, N:], x, atol=span, rtol=0)
    assert torch.equal(past.arena, bytes_before) and torch.equal(past, before) and past.shape[2] == N


@pytest.mark.parametrize("name", LAYOUTS)
def test_step_by_step(name):
    """Many tokens: the same as in place, and never more memory than a graph takes."""
    layout, h = LAYOUTS[name], make(name)
    steps = content(150, seed=1).split(1, 2)
    for i, x in enumerate(steps):
        h = torch.cat([h, x], -2)
        assert h.arena.shape[1] <= layout.row_bytes(N + i + 2)
        assert layout.body_tokens(h.shape[2] + 1) <= layout.capacity_of(h.arena.shape[1]), "one more fits in place"
    torch.testing.assert_close(h.dense(), in_graph(name, *steps), atol=0, rtol=0)


def test_nothing_lost():
    x = content(7, seed=1)
    assert torch.equal(torch.cat([make("raw"), x], 2), torch.cat([content(N), x], 2))


def test_no_tokens():
    h = make("int4")
    got = torch.cat([h, content(0)], 2)
    assert isinstance(got, CacheHandle) and torch.equal(got, h.dense()) and got.arena is not h.arena


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_past_that_was_extended_in_place_meanwhile(name):
    """A graph appended to the arena for another handle: here its first tokens are continued in another way."""
    h, x = make(name), content(3, seed=1)
    arena = cpu.grow(h.arena, N + 8, h.stored)
    ops.append(arena, content(5, seed=2), None, h.layout_key, [])
    h = handle.growing(arena, h.layout_key, N)
    handle.growing(arena, h.layout_key, N + 5)  # who holds the same arena now
    want = handle.crop(CacheHandle(arena.clone(), h.layout_key, N + 5, False), N).dense()
    got = torch.cat([h, x], 2)
    assert cpu.length(arena, h.stored) == N + 5
    torch.testing.assert_close(got[:, :, :N], want, atol=1e-6, rtol=0)
    span = 1.01 * STEP[name] * float(x.max() - x.min())
    torch.testing.assert_close(got[:, :, N:], x, atol=span, rtol=0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_comes_after(name):
    """The result is a cache like any other: copied, cropped, reordered, appended to again."""
    x, y = content(40, seed=1), content(2, seed=2)
    h = torch.cat([make(name), x], 2)
    want = h.dense()
    other = copy.deepcopy(h)
    assert torch.equal(torch.cat([other, y], 2).dense()[:, :, : N + 40 - 64], want[:, :, : N + 40 - 64])
    assert torch.equal(h, want) and torch.equal(other, want)
    short = h[..., :-30, :]
    assert type(short) is CacheHandle and short.shape[2] == N + 10
    step = 2.02 * STEP[name] * float(want.max() - want.min())  # what is encoded again may lose as much again
    torch.testing.assert_close(short.dense(), want[:, :, : N + 10], atol=step, rtol=0)
    again = torch.cat([short, y], 2)
    assert type(again) is CacheHandle
    torch.testing.assert_close(again[:, :, -2:], y, atol=step, rtol=0)
    torch.testing.assert_close(again[:, :, :-2], want[:, :, : N + 10], atol=step, rtol=0)
    assert torch.equal(h.index_select(0, torch.tensor([1, 1])).dense(), want[[1, 1]])


def test_memory_is_counted():
    h = make("int4")
    track(h.arena, Tag("test", 3, "keys"))
    longer = torch.cat([h, content(1)], 2)
    sizes = [t.arena.untyped_storage().nbytes() for t in (h, longer)]
    assert held("test") == {(3, "keys"): sum(sizes)}
    del h
    gc.collect()
    assert held("test") == {(3, "keys"): sizes[1]}


PLAIN = {
    "a window": (lambda: [make("int4", window=True), content(1)], 2, "the cache is a sliding window"),
    "a static cache": (lambda: [make("int4", static=True), content(1)], 2, "the cache is one of fixed length"),
    "three": (lambda: [make("int4"), content(1), content(1)], 2, "it joins 3 tensors"),
    "one": (lambda: [make("int4")], 2, "it joins 1 tensors"),
    "batch": (lambda: [make("int4"), content(N)], 0, "it joins along dimension 0, not along the tokens"),
    "channels": (lambda: [make("int4"), content(N)], -1, "it joins along dimension -1, not along the tokens"),
    "behind": (lambda: [content(1), make("int4")], 2, "the cache is not the first of what it joins"),
    "two caches": (lambda: [make("int4"), make("int4")], 2, "what it appends is no plain tensor of tokens"),
    "half": (lambda: [make("int4"), content(1).half()], 2, "it appends torch.float16 to torch.float32"),
    "nothing": (lambda: [make("int4"), torch.tensor([])], 2, "what it appends is no plain tensor of tokens"),
}


@pytest.mark.parametrize("what", PLAIN)
def test_any_other_cat_is_plain_and_says_so_once(what, caplog):
    tensors, dim, why = PLAIN[what][0](), *PLAIN[what][1:]
    want = torch.cat([t.dense() if isinstance(t, CacheHandle) else t for t in tensors], dim)
    with caplog.at_level(logging.WARNING, "kvc_compile"):
        got = [torch.cat(tensors, dim) for _ in range(2)]
    assert type(got[0]) is torch.Tensor and torch.equal(got[0], want) and got[0].dtype == want.dtype
    (record,) = caplog.records
    assert "eager code made a plain tensor of a compressed cache by `cat`" in record.message
    assert why in record.message


def test_gradients_pass_through_what_is_plain():
    x = content(1).requires_grad_()
    torch.cat([make("int4"), x], 2).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("shape", [(3, 2, 1, 16), (1, 2, 1, 16), (2, 1, 1, 16), (2, 2, 1, 8), (2, 1, 16)])
def test_shapes_that_do_not_fit_are_torchs_error(shape, caplog):
    with pytest.raises(RuntimeError, match="Sizes of tensors must match|same number of dimensions"):
        torch.cat([make("int4"), torch.zeros(shape)], 2)
    assert not caplog.records


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_cat_that_is_traced_is_plain(compiler, caplog):
    """Nothing is known of an arena's content then, and a graph that Dynamo holds is not eager code."""
    h, x = make("int4"), content(3, seed=1)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "kvc_compile"):
        got = torch.compile(lambda h, x: torch.cat([h, x], -2) + 1, backend=compiler)(h, x)
    torch.testing.assert_close(got, torch.cat([h.dense(), x], 2) + 1)
    assert not [r for r in caplog.records if r.name == "kvc_compile"]


# ---------------------------------------------------------------- models


def tensors(cache) -> list:
    return [t for layer in cache.layers for t in (layer.keys, layer.values)]


@pytest.mark.parametrize(
    ("spec", "kind"),
    [("lossless", "dynamic"), ("int8", "static"), ("kivi-4bit", "dynamic"), ("kivi-2bit", "static")],
)
def test_steps_in_eager_code_between_compiled_ones(spec, kind, no_inductor):
    """A cache goes from graphs to eager code and back, in both by single tokens and in chunks."""
    model, ids, forced = tiny("llama"), prompt(tokens=60), prompt(tokens=40, seed=3)
    compiled = torch.compile(model, backend="kvc", options=spec)
    plain, ours = new_cache(model, kind, 160), new_cache(model, kind, 160)
    want, got = [decode(model, plain, ids, steps=0)], [decode(compiled, ours, ids, steps=0)]
    parts = [*forced[:, :5].split(1, 1), forced[:, 5:12], *forced[:, 12:17].split(1, 1), forced[:, 17:]]
    for i, part in enumerate(parts):
        want.append(decode(model, plain, part, steps=0))
        got.append(decode(model if i in (2, 3, 5, 6, 8, 9, 10) else compiled, ours, part, steps=0))
        assert all_compressed(ours)
    assert float((torch.cat(got, 1) - torch.cat(want, 1)).abs().max()) <= ERROR[spec]
    # on the lossless one nothing is lost, and the codec's error is that of a cache that never left the graphs
    other = new_cache(model, kind, 160)
    decode(compiled, other, torch.cat([ids, forced], 1), steps=0)
    far = max(float((a.dense() - b.dense()).abs().max()) for a, b in zip(tensors(ours), tensors(other), strict=True))
    assert far <= ERROR[spec]


@pytest.fixture
def gives_up():
    with torch._dynamo.config.patch(recompile_limit=1):
        yield


def generate(model, ids, n=12, **kwargs):
    settings = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings, **kwargs)


@pytest.mark.parametrize("spec", ["lossless", "kivi-4bit"])
def test_a_frame_at_its_recompile_limit(spec, gives_up, no_inductor, caplog):
    plain, ids = tiny("llama"), prompt()
    model = copy.deepcopy(plain)
    model.compile(backend="kvc", options=LOSSLESS if spec == "lossless" else spec)
    with caplog.at_level(logging.WARNING, "kvc_compile"):
        out = generate(model, ids)
    assert all_compressed(out.past_key_values)
    assert [t.shape[2] for t in tensors(out.past_key_values)] == [13 + 11] * 4
    if spec == "lossless":
        assert torch.equal(out.sequences, generate(plain, ids).sequences)
    found = report(model)
    assert found.graphs == 1, "the prefill; decode steps ran in eager code"
    assert [s.status for s in found.sites] == ["compressed"] * 2
    assert all("in eager code, as Dynamo gave up on a frame" in s.note for s in found.sites)
    assert "read back in full each step" in " ".join(str(found).split())
    gc.collect()
    assert found.held().total == sum(t.arena.untyped_storage().nbytes() for t in tensors(out.past_key_values))
    (record,) = [r for r in caplog.records if "eager" in r.message]
    assert "The cache stays compressed, but attention to it is not" in record.message
    assert "torch._dynamo.config.recompile_limit (it is 1)" in record.message


def test_assisted_decoding_at_the_recompile_limit(gives_up, no_inductor):
    """Caches are cropped and appended to in turns, all in eager code."""
    plain, draft, ids = tiny("llama"), tiny("llama", layers=1), prompt(batch=1)
    model = copy.deepcopy(plain)
    model.compile(backend="kvc", options=LOSSLESS)
    out = generate(model, ids, assistant_model=draft)
    assert torch.equal(out.sequences, generate(plain, ids).sequences)
    assert all_compressed(out.past_key_values)


def test_beams_at_the_recompile_limit(gives_up, no_inductor):
    plain, ids = tiny("llama"), prompt()
    model = copy.deepcopy(plain)
    model.compile(backend="kvc", options=LOSSLESS)
    out = generate(model, ids, num_beams=3)
    assert torch.equal(out.sequences, generate(plain, ids, num_beams=3).sequences)
    assert all_compressed(out.past_key_values)


def test_inference_mode(gives_up, no_inductor):
    plain, ids = tiny("llama"), prompt()
    model = copy.deepcopy(plain)
    model.compile(backend="kvc", options=LOSSLESS)
    with torch.inference_mode():
        out = generate(model, ids)
    assert torch.equal(out.sequences, generate(plain, ids).sequences) and all_compressed(out.past_key_values)


def test_a_window_becomes_plain_and_the_report_says_so(gives_up, no_inductor, caplog):
    plain, ids = tiny("mistral", sliding_window=16), prompt()
    model = copy.deepcopy(plain)
    model.compile(backend="kvc", options=LOSSLESS)
    with caplog.at_level(logging.WARNING, "kvc_compile"):
        out = generate(model, ids)
    assert torch.equal(out.sequences, generate(plain, ids).sequences)
    assert not any(isinstance(t, CacheHandle) for t in tensors(out.past_key_values))
    found = report(model)
    for s in found.sites:
        assert s.status == "declined" and s.mixed
        assert s.reason == "eager code made a plain tensor of it: the cache is a sliding window"
    assert found.declined == found.sites and "mixed" in str(found) and found.held().total == 0
    assert found.to_json()["sites"][0]["seen"][-1]["kind"] == "eager"
    assert len([r for r in caplog.records if "eager" in r.message]) == 1


def test_a_static_cache(gives_up, no_inductor):
    plain, ids = tiny("llama"), prompt()
    model = copy.deepcopy(plain)
    model.compile(backend="kvc", options=LOSSLESS)
    out = generate(model, ids, cache_implementation="static")
    assert torch.equal(out.sequences, generate(plain, ids, cache_implementation="static").sequences)
    assert all_compressed(out.past_key_values)
    assert [s.status for s in report(model).sites] == ["compressed"] * 2
    assert all("in eager code" in s.note for s in report(model).sites)


def test_the_report_is_of_the_last_spec(no_inductor):
    """What happened to caches of another spec, or of another model, is not told."""
    model = tiny("llama")
    other = copy.deepcopy(model)
    model.compile(backend="kvc", options=LOSSLESS)
    other.compile(backend="kvc", options=LOSSLESS)
    cache = new_cache(model, "dynamic")
    decode(model, cache, prompt(), steps=2)
    decode(other, new_cache(model, "dynamic"), prompt(), steps=2)
    with torch.compiler.set_stance("force_eager"):
        decode(model, cache, prompt(tokens=1), steps=2)
    assert all(s.note for s in report(model).sites) and not any(s.note for s in report(other).sites)
    torch._dynamo.reset()
    model.compile(backend="kvc", options="int8")
    decode(model, new_cache(model, "dynamic"), prompt(), steps=2)
    assert [(s.status, s.note) for s in report(model).sites] == [("compressed", "")] * 2
