"""Caches that no fused attention reads: stored compressed all the same, and right."""

from __future__ import annotations

import pytest
import torch
from tiny_zoo import build
from torch import nn

import kvc_compile.backend as backend
from kvc_compile.bound import settle
from kvc_compile.handle import CacheHandle
from kvc_compile.layout import Codec, Layout
from kvc_compile.passes.rewrite import Input
from kvc_compile.plan import SLACK
from kvc_compile.report import report
from models import decode, new_cache, prompt, tiny

LOSSLESS = {"kvc": 1}


@pytest.fixture(autouse=True)
def no_inductor(monkeypatch, request):
    if "through Inductor" not in request.node.name:
        monkeypatch.setattr(backend, "lower", lambda gm, inputs, request, births: gm.forward)
    yield
    torch._dynamo.reset()


def compressed(cache) -> bool:
    return all(isinstance(t, CacheHandle) for layer in cache.layers for t in (layer.keys, layer.values))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("deepseek_v3", "static"),
        ("deepseek_v3", "dynamic"),
        ("diffllama", "static"),
        ("deepseek_v32", "static"),
        ("xglm", "dynamic"),
    ],
)
def test_attention_of_any_form(name, kind):
    """Latents that are expanded, two attentions on one cache, an indexer, three dimensions; scores used twice are
    below."""
    model = build(name, "eager" if name == "xglm" else "sdpa")
    ids = prompt(batch=2, tokens=12)
    forced = prompt(batch=2, tokens=8, seed=2)
    want = decode(model, new_cache(model, kind, 32), ids, forced=forced)
    cache = new_cache(model, kind, 32)
    got = decode(torch.compile(model, backend="kvc", options=LOSSLESS), cache, ids, forced=forced)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert compressed(cache)
    found = report(model)
    assert {s.status for s in found.sites} == {"compressed"} and "read back" in {s.pattern for s in found.sites}
    assert "read back" in found.text()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, id=f"{name}, {kind} through Inductor")
        for name, kind in (
            ("granite_swa", "static"),
            ("granite_swa", "dynamic"),
            ("gemma2", "dynamic"),
            ("gpt_oss", "static"),
        )
    ],
)
def test_what_stands_around_it_is_compiled_too(name, kind):
    """The checks and reads of a cache that is read back; capped scores, sinks and windows, which are not."""
    model, ids = build(name, "eager"), prompt(batch=2, tokens=12)
    want = decode(model, new_cache(model, kind, 32), ids, steps=6)
    cache = new_cache(model, kind, 32)
    got = decode(torch.compile(model, backend="kvc", options=LOSSLESS), cache, ids, steps=6)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert compressed(cache)
    assert ("read back" in {s.pattern for s in report(model).sites}) == (name == "granite_swa")


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_flex_attention(kind):
    """Its dynamic caches are read back. A static one stays as it is, and the report says so."""
    model, ids = tiny("llama", layers=2), prompt(tokens=20)
    model.set_attn_implementation("flex_attention")
    want = decode(model, new_cache(model, kind, 64), ids, steps=3)
    cache = new_cache(model, kind, 64)
    got = decode(torch.compile(model, backend="kvc", options=LOSSLESS), cache, ids, steps=3)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert compressed(cache) == (kind == "dynamic")
    found = report(model)
    assert {s.status for s in found.sites} == {"compressed" if kind == "dynamic" else "declined"}
    assert ("a compressed static cache" in " ".join(found.text().split())) == (kind == "static")


# ---------------------------------------------------------------- sliding windows


# keys and values with other blocks, rings and packing
UNLIKE = {"kvc": 1, "k": {"codec": {"int": 4, "block": [128, 1]}}, "v": {"codec": {"int": 8, "block": [1, "all"]}}}


def sliding(window: int = 16, **config):
    return tiny("mistral", layers=1, sliding_window=window, **config)


@pytest.mark.parametrize(
    ("tokens", "kind"),
    [
        (5, "static"),
        (16, "dynamic"),
        (40, "static"),
        (40, "dynamic"),
        pytest.param(40, "dynamic", id="through Inductor"),
    ],
)
def test_a_window_slides(kind, tokens):
    """Filled by the prompt, or later; for so long that old tokens are dropped."""
    model, ids = sliding(), prompt(tokens=tokens)
    steps = SLACK + 150
    forced = prompt(tokens=steps, seed=2)
    want = decode(model, new_cache(model, kind, 1024), ids, steps=steps, forced=forced)
    cache = new_cache(model, kind, 1024)
    got = decode(torch.compile(model, backend="kvc", options=LOSSLESS), cache, ids, steps=steps, forced=forced)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert compressed(cache) and "read back" not in {s.pattern for s in report(model).sites}
    k = cache.layers[0].keys
    assert k.arena.shape[1] <= k.stored.row_bytes(16 + 2 * SLACK + k.stored.unit), "what left the window is dropped"


@pytest.mark.parametrize(
    ("spec", "kind"), [("int8", "static"), ("int4", "dynamic"), ("kivi-2bit", "static"), (UNLIKE, "dynamic")]
)
def test_a_window_of_codes_does_not_wear_out(spec, kind):
    """Dropping old tokens encodes nothing anew: the error after many steps is that of the first ones."""
    model, ids = sliding(window=40), prompt(tokens=60)
    steps = 3 * SLACK
    forced = prompt(tokens=steps, seed=2)
    want = decode(model, new_cache(model, kind, 1024), ids, steps=steps, forced=forced)[:, 60:]
    cache = new_cache(model, kind, 1024)
    got = decode(torch.compile(model, backend="kvc", options=spec), cache, ids, steps=steps, forced=forced)[:, 60:]
    error = (got - want).abs().mean((0, 2))
    assert compressed(cache)
    assert float(error[-100:].mean()) < 2 * float(error[50:150].mean())
    assert float((got - want).abs().mean()) < float(want.std()) / 10


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_chunks_into_a_window(kind):
    model, cache_length = sliding(), 256
    compiled = torch.compile(model, backend="kvc", options=LOSSLESS)
    plain, ours = new_cache(model, kind, cache_length), new_cache(model, kind, cache_length)
    with torch.no_grad():
        for i, n in enumerate((9, 7, 3, 1, 1, 20, 5, 1)):
            ids = prompt(tokens=n, seed=i)
            want = model(input_ids=ids, past_key_values=plain).logits
            got = compiled(input_ids=ids, past_key_values=ours).logits
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


# ---------------------------------------------------------------- written otherwise


class Scaled(nn.Module):
    """Appends to a cache, or halves it in place."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 16))

    def forward(self, x, cache, positions, halve: bool):
        if halve:
            cache.mul_(0.5)
            return cache.sum()
        cache.index_copy_(2, positions, x @ self.w)
        mask = torch.arange(32) <= positions[:, None]
        return nn.functional.scaled_dot_product_attention(x, cache, cache * 2, attn_mask=mask)


@torch.no_grad()
def test_a_cache_that_is_written_otherwise_becomes_plain():
    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(1, 2, 3, 16)
    compiled = torch.compile(model, backend="kvc", options=LOSSLESS)
    plain, ours = torch.zeros(1, 2, 32, 16), torch.zeros(1, 2, 32, 16)
    for step, halve in enumerate((False, True, False)):
        positions = torch.arange(3) + 3 * step
        torch.testing.assert_close(compiled(x, ours, positions, halve), model(x, plain, positions, halve))
        content = ours.dense() if isinstance(ours, CacheHandle) else ours
        torch.testing.assert_close(content, plain)


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True])
def test_a_view_of_a_larger_tensor_is_left_alone(shared):
    """A handle in its place would no longer be a part of that tensor. The attention is the graph's only output."""

    def step(q, k, v, keys, values, positions):
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        mask = torch.arange(32) <= positions[:, None]
        return nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)

    compiled = torch.compile(step, backend="kvc", options=LOSSLESS)
    both, alone = torch.zeros(2, 1, 2, 32, 16), [torch.zeros(1, 2, 32, 16) for _ in "kv"]
    caches = [both[0], both[1]] if shared else alone
    plain = [torch.zeros(1, 2, 32, 16) for _ in "kv"]
    for i in range(3):
        x = [torch.randn(1, 2, 2, 16) for _ in "qkv"]
        positions = torch.arange(2) + 2 * i
        torch.testing.assert_close(compiled(*x, *caches, positions), step(*x, *plain, positions))
    if shared:
        torch.testing.assert_close(both, torch.stack(plain))
    else:
        assert all(isinstance(c, CacheHandle) for c in caches)


def test_a_window_that_has_moved_on_refuses_its_middle_each_time():
    layout = Layout(Codec("raw"), 2, 16, "float32")
    window = CacheHandle(torch.zeros(1, layout.row_bytes(64), dtype=torch.uint8), layout.key, 8, True)
    window.arena.kvc_total = 11
    at = Input(0, layout.key, 0, "keys", True, start=1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="window that has moved on"):
            settle(window, at, [window, torch.tensor([3])])
    settle(window, at, [window, torch.tensor([0])])
    assert not hasattr(window.arena, "kvc_total")
