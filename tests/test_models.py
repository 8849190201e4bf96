"""The lossless spec changes no logit: every supported family, attention and cache, prefill and decoding."""

from __future__ import annotations

import pytest
import torch

import kvc_compile.backend as backend
from kvc_compile.handle import CacheHandle
from kvc_compile.report import report
from models import FAMILIES, decode, new_cache, prompt, tiny

LOSSLESS = {"kvc": 1}


@pytest.fixture
def no_inductor(monkeypatch):
    """Run the rewritten graphs as they are: what is tested is the rewrite."""
    monkeypatch.setattr(backend, "lower", lambda gm, inputs, request, births: gm.forward)


KINDS, ATTENTIONS = ("static", "dynamic"), ("sdpa", "eager")
FORMS = [
    (family, attention, kind)
    for n, family in enumerate(FAMILIES)
    for i, attention in enumerate(ATTENTIONS)
    for j, kind in enumerate(KINDS)
    if family == "llama" or (n + i + j) % 2  # two of four: each kind of attention and of cache
]


@pytest.mark.parametrize(("family", "attention", "kind"), FORMS)
def test_lossless(family, attention, kind, device, no_inductor):
    model, ids = tiny(family, attention, device), prompt(device=device)
    want = decode(model, new_cache(model, kind), ids)
    compiled = torch.compile(model, backend="kvc", options=LOSSLESS)
    cache = new_cache(model, kind)
    torch.testing.assert_close(decode(compiled, cache, ids), want, atol=1e-4, rtol=0)
    assert all(isinstance(t, CacheHandle) for layer in cache.layers for t in (layer.keys, layer.values))
    assert not [s for s in report(model).sites if s.status != "compressed"]


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_lossless_through_inductor(attention, kind, device):
    model, ids = tiny("llama", attention, device), prompt(device=device)
    want = decode(model, new_cache(model, kind), ids)
    compiled = torch.compile(model, backend="kvc", options=LOSSLESS)
    for _ in range(2):  # the second cache runs through the same graphs
        torch.testing.assert_close(decode(compiled, new_cache(model, kind), ids), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, device, no_inductor):
    model, ids = tiny("llama", device=device, dtype=dtype), prompt(device=device)
    want = decode(model, new_cache(model, "static"), ids)
    compiled = torch.compile(model, backend="kvc", options=LOSSLESS)
    forced = want[:, ids.shape[1] - 1 :].argmax(-1)
    got = decode(compiled, new_cache(model, "static"), ids, forced=forced)
    torch.testing.assert_close(got, want, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("spec", "kind"),
    [("int8", "static"), ("int4", "static"), ("int4", "dynamic"), ("kivi-2bit", "dynamic"), ("default", "static")],
)
def test_compressed_equals_the_dequantised_cache(spec, kind, device, no_inductor):
    """Each step's logits are those of the untouched model on the dequantised content of the compressed cache."""
    model, ids = tiny("llama", device=device), prompt(tokens=150, device=device)
    compiled = torch.compile(model, backend="kvc", options=spec)
    cache = new_cache(model, kind, 256)
    with torch.no_grad():
        token = compiled(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        for step in range(40):
            plain = new_cache(model, "dynamic")
            length = ids.shape[1] + step
            for i, layer in enumerate(cache.layers):
                plain.update(layer.keys.dense()[:, :, :length], layer.values.dense()[:, :, :length], i)
            want = model(input_ids=token, past_key_values=plain).logits
            got = compiled(input_ids=token, past_key_values=cache).logits
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
            token = got.argmax(-1)


@pytest.mark.parametrize(("spec", "kind"), [(LOSSLESS, "dynamic"), ("int4", "static"), ("int4", "dynamic")])
def test_chunked_prefill(spec, kind, device, no_inductor):
    """A prompt in chunks gives what the whole prompt gives, up to the codec."""
    model, ids = tiny("llama", device=device), prompt(tokens=90, device=device)
    want = decode(model, new_cache(model, kind, 128), ids, steps=4)
    compiled = torch.compile(model, backend="kvc", options=spec)
    cache, forced = new_cache(model, kind, 128), want[:, 89:].argmax(-1)
    got = []
    with torch.no_grad():
        for chunk in ids.split([50, 1, 17, 22], 1):
            got.append(compiled(input_ids=chunk, past_key_values=cache).logits)
        for i in range(4):
            got.append(compiled(input_ids=forced[:, i : i + 1], past_key_values=cache).logits)
    error = (torch.cat(got, 1) - want).abs().max()
    assert error < (1e-4 if spec == LOSSLESS else 0.2)
