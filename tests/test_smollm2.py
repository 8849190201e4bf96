"""On a real model: the lossless spec writes the same text, and compressed caches hold the bytes that were planned."""

from __future__ import annotations

import gc

import pytest
import torch

import kvc_compile.backend as backend
from kvc_compile.handle import CacheHandle, held
from kvc_compile.report import report

PROMPT = "Explain in a few sentences why the sky is blue and why sunsets are red."


@pytest.fixture
def no_inductor(monkeypatch):
    monkeypatch.setattr(backend, "lower", lambda gm, inputs, request, births: gm.forward)


@pytest.mark.parametrize("kind", ["static", None])
def test_lossless_text_is_identical(smollm2, kind, no_inductor):
    model, tokenizer = smollm2
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    settings = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "cache_implementation": kind}
    want = model.generate(ids, **settings)
    compiled = torch.compile(model, backend="kvc", options={"kvc": 1})
    got = compiled.generate(ids, **settings, return_dict_in_generate=True)
    assert torch.equal(got.sequences, want)
    assert all(isinstance(layer.keys, CacheHandle) for layer in got.past_key_values.layers)


def test_bytes_held_are_the_bytes_planned(smollm2, no_inductor):
    model, tokenizer = smollm2
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    compiled = torch.compile(model, backend="kvc", options="kivi-4bit")
    gc.collect()
    before = sum(held().values())
    out = compiled.generate(
        ids, max_new_tokens=8, do_sample=False, cache_implementation="static", return_dict_in_generate=True
    )
    tokens = out.past_key_values.layers[0].keys.shape[2]
    planned = report(model).bytes(tokens, 1)
    assert sum(held().values()) - before == planned.compressed
    assert planned.dense == 30 * 2 * 3 * 64 * tokens * 4
