"""What transformers does to a cache between steps: beams are reordered, sequences chosen, repeated, rolled back."""

from __future__ import annotations

import copy

import pytest
import torch

import kvc_compile.backend as backend
from kvc_compile.handle import CacheHandle
from models import decode, new_cache, prompt, tiny

OPERATIONS = {
    "reorder": lambda c: c.reorder_cache(torch.tensor([2, 0, 0])),
    "select": lambda c: c.batch_select_indices(torch.tensor([1, 2])),
    "repeat": lambda c: c.batch_repeat_interleave(2),
    "crop": lambda c: c.crop(-25),
    "crop, a little": lambda c: c.crop(-1),
    "crop, nearly all": lambda c: c.crop(-61),
}
SEQUENCES = {"select": 2, "repeat": 6}


@pytest.fixture(autouse=True)
def no_inductor(monkeypatch):
    monkeypatch.setattr(backend, "lower", lambda gm, inputs, request, births: gm.forward)
    yield
    torch._dynamo.reset()


def tensors(cache) -> list:
    return [t for layer in cache.layers for t in (layer.keys, layer.values)]


# the error of a codec over logits of this model; lossless has none
ERROR = {"lossless": 1e-5, "int8": 0.02, "kivi-4bit": 0.25, "kivi-2bit": 1.0}


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("spec", ERROR)
def test_an_operation_does_to_a_compressed_cache_what_it_does_to_a_plain_one(spec, kind):
    """All operations on copies of one cache: tracing takes longer than what is tested."""
    model, ids = tiny("llama", layers=1), prompt(batch=3, tokens=60)
    compiled = torch.compile(model, backend="kvc", options=spec)
    caches = new_cache(model, kind, 128), new_cache(model, kind, 128)
    forced = prompt(batch=3, tokens=2, seed=3)
    for call, cache in zip((model, compiled), caches):
        decode(call, cache, ids, steps=2, forced=forced)
    # transformers' static cache has no other
    for operation in OPERATIONS if kind == "dynamic" else ["reorder"]:
        plain, ours = copy.deepcopy(caches)
        for cache in (plain, ours):
            OPERATIONS[operation](cache)
        assert all(isinstance(t, CacheHandle) for t in tensors(ours)), f"{operation}: still compressed"
        assert [t.shape for t in tensors(plain)] == [t.shape for t in tensors(ours)], operation
        more = prompt(batch=SEQUENCES.get(operation, 3), tokens=3, seed=5)
        want = decode(model, plain, more, steps=3, forced=more)
        got = decode(compiled, ours, more, steps=3, forced=more)
        assert float((got - want).abs().max()) <= ERROR[spec], operation
        assert all(isinstance(t, CacheHandle) for t in tensors(ours)), operation
    # the operations were on those copies alone
    more = prompt(batch=3, tokens=3, seed=5)
    want, got = (decode(call, cache, more, steps=1) for call, cache in zip((model, compiled), caches))
    assert float((got - want).abs().max()) <= ERROR[spec]
    assert all(isinstance(t, CacheHandle) for t in tensors(caches[1]))


@pytest.mark.parametrize("kind", ["static", None])
def test_beam_search(kind):
    model, ids = tiny("llama"), prompt()
    settings = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "cache_implementation": kind}
    want = model.generate(ids, **settings)
    compiled = torch.compile(model, backend="kvc", options={"kvc": 1})
    out = compiled.generate(ids, return_dict_in_generate=True, **settings)
    assert torch.equal(out.sequences, want)
    assert all(isinstance(t, CacheHandle) for t in tensors(out.past_key_values))


def test_assisted_decoding():
    """The candidates that the model refuses are cropped from its cache."""
    model, draft, ids = tiny("llama"), tiny("llama", layers=1), prompt(batch=1)
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    want = model.generate(ids, **settings)
    compiled = torch.compile(model, backend="kvc", options={"kvc": 1})
    out = compiled.generate(ids, assistant_model=draft, return_dict_in_generate=True, **settings)
    assert torch.equal(out.sequences, want)
    assert all(isinstance(t, CacheHandle) for t in tensors(out.past_key_values))


def test_prompt_lookup_decoding():
    model, ids = tiny("llama"), prompt(batch=1, tokens=8).repeat(1, 4)
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    want = model.generate(ids, **settings)
    compiled = torch.compile(model, backend="kvc", options={"kvc": 1})
    out = compiled.generate(ids, prompt_lookup_num_tokens=4, return_dict_in_generate=True, **settings)
    assert torch.equal(out.sequences, want)
    assert all(isinstance(t, CacheHandle) for t in tensors(out.past_key_values))
