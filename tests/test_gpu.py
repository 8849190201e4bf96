"""On a GPU: generation takes no way around the compiled call, and CUDA graphs replay."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_zoo import build
from torch._dynamo.utils import counters

from kvc_compile.handle import CacheHandle
from models import decode, new_cache, prompt, tiny

pytestmark = pytest.mark.gpu


def greedy(model, ids, **kwargs):
    return model.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False, **kwargs)


@pytest.mark.parametrize("kind", ["static", None])
@pytest.mark.parametrize("door", ["module", "wrapper"])
def test_generate_runs_compressed(door, kind):
    """`generate` with a static cache compiles decoding by itself on a GPU, around any `model.compile`."""
    model, ids = tiny("llama", device="cuda"), prompt(device="cuda")
    want = greedy(model, ids, cache_implementation=kind)
    if door == "module":
        compiled = copy.deepcopy(model)
        compiled.compile(backend="kvc", options={"kvc": 1})
    else:
        compiled = torch.compile(model, backend="kvc", options={"kvc": 1})
    out = greedy(compiled, ids, cache_implementation=kind, return_dict_in_generate=True)
    assert torch.equal(out.sequences, want)
    assert all(isinstance(layer.keys, CacheHandle) for layer in out.past_key_values.layers)


@pytest.mark.parametrize("spec", ["lossless", "int4", "int8"])
def test_cuda_graphs_replay(spec):
    """No graph is skipped, none is recorded again, for a second cache too."""
    model, ids = tiny("llama", device="cuda", dtype=torch.bfloat16), prompt(tokens=100, device="cuda")
    plain = torch.compile(copy.deepcopy(model), backend="kvc", options={"spec": spec})
    graphed = torch.compile(model, backend="kvc", options={"spec": spec, "mode": "reduce-overhead"})
    counters.clear()
    for _ in range(2):
        want = decode(plain, new_cache(model, "static", 256), ids, steps=40)
        forced = want[:, 99:].argmax(-1)
        got = decode_cloned(graphed, new_cache(model, "static", 256), ids, forced)
        torch.testing.assert_close(got, want[:, -40:], atol=0.05, rtol=0.05)
    assert counters["inductor"]["cudagraph_skips"] == 0, dict(counters["inductor"])


@torch.no_grad()
def decode_cloned(call, cache, ids, forced):
    """As `decode`, each result copied out of the graph's memory before the next replay; the decode steps only."""
    torch.compiler.cudagraph_mark_step_begin()
    call(input_ids=ids, past_key_values=cache)
    logits = []
    for i in range(forced.shape[1] - 1):
        torch.compiler.cudagraph_mark_step_begin()
        logits.append(call(input_ids=forced[:, i : i + 1].clone(), past_key_values=cache).logits.clone())
    return torch.cat(logits, 1)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_window_slides(kind, mode):
    """A sliding window is read back; the arena drops what leaves it, between replays of a CUDA graph too."""
    model, ids = tiny("mistral", layers=1, sliding_window=16, device="cuda"), prompt(tokens=13, device="cuda")
    steps = 330
    forced = prompt(tokens=steps, seed=2, device="cuda")
    want = decode(model, new_cache(model, kind, 512), ids, steps=steps, forced=forced)
    compiled = torch.compile(model, backend="kvc", options={"spec": {"kvc": 1}, "mode": mode})
    cache = new_cache(model, kind, 512)
    got = [compiled(input_ids=ids, past_key_values=cache).logits.clone()]
    for i in range(steps):
        torch.compiler.cudagraph_mark_step_begin()
        got.append(compiled(input_ids=forced[:, i : i + 1].clone(), past_key_values=cache).logits.clone())
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-3, rtol=1e-3)
    assert cache.layers[0].keys.arena.shape[1] < 2 * 2 * 16 * 4 * 800


@torch.no_grad()
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "granite_swa"])
def test_attention_of_any_form(name, kind, mode):
    """Capped scores, sinks, windows; what stands around a cache that is read back, its checks too, is recorded."""
    model, ids = build(name, "eager").to("cuda"), prompt(tokens=12, device="cuda")
    want = decode(model, new_cache(model, kind, 32), ids, steps=6)
    compiled = torch.compile(model, backend="kvc", options={"spec": {"kvc": 1}, "mode": mode})
    cache, forced = new_cache(model, kind, 32), want[:, 11:].argmax(-1)
    got = [compiled(input_ids=ids, past_key_values=cache).logits.clone()]
    for i in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        got.append(compiled(input_ids=forced[:, i : i + 1].clone(), past_key_values=cache).logits.clone())
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-3, rtol=1e-3)
    assert all(isinstance(layer.keys, CacheHandle) for layer in cache.layers)


@torch.no_grad()
def test_the_first_use_tunes_and_the_next_does_not(monkeypatch, tmp_path):
    """A compile times the variants of the kernel for a layout that is new; what it chooses computes the same."""
    from kvc_compile.lowering import replay, tuned

    monkeypatch.setenv("KVC_TUNING_DIR", str(tmp_path))
    model, ids = tiny("llama", device="cuda", dtype=torch.bfloat16), prompt(tokens=100, device="cuda")

    def logits():
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="kvc", options={"spec": "int4"})
        return decode(compiled, new_cache(model, "static", 1024), ids, steps=40)

    for f in (tuned.database, tuned.chosen):
        f.cache_clear()
    try:
        want = logits()  # KVC_TUNE=0 here
        assert not list(tmp_path.rglob("*.json"))
        monkeypatch.delenv("KVC_TUNE")
        held = torch.cuda.memory_allocated()
        torch.testing.assert_close(logits(), want, atol=0.05, rtol=0.05)
        assert torch.cuda.memory_allocated() < held + (64 << 20)  # the scratch caches are gone
        (entry,) = [e for family in tuned.database().families.values() for e in family]
        assert list(tmp_path.rglob("*.json")) and entry.timings[0][1] is not None and not entry.cut_short
        monkeypatch.setattr(replay, "GraphBench", None)  # it is not asked again, by another process either
        for f in (tuned.database, tuned.chosen):
            f.cache_clear()
        torch.testing.assert_close(logits(), want, atol=0.05, rtol=0.05)
    finally:
        for f in (tuned.database, tuned.chosen):
            f.cache_clear()
