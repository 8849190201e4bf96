"""Ways of generating that real programs take, each against the untouched model: the same tokens, and all compressed."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from transformers import CompileConfig, PreTrainedTokenizerFast, pipeline

import kvc_compile.backend as backend
from kvc_compile.handle import CacheHandle
from kvc_compile.report import report
from models import new_cache, prompt, tiny

LOSSLESS = {"kvc": 1}
KINDS = pytest.mark.parametrize("kind", [None, "static"])


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch):
    monkeypatch.setattr(backend, "lower", lambda gm, inputs, request, births: gm.forward)


@pytest.fixture(scope="module")
def plain():
    return tiny("llama", layers=2)


@pytest.fixture
def compiled(plain):
    model = copy.deepcopy(plain)
    model.compile(backend="kvc", options=LOSSLESS)
    return model


def generate(model, ids, tokens=6, **kwargs):
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(ids, **({**settings, "attention_mask": torch.ones_like(ids)} | kwargs))


def all_compressed(cache) -> bool:
    return all(isinstance(t, CacheHandle) for layer in cache.layers for t in (layer.keys, layer.values))


def same(found, plain, ids, **kwargs) -> None:
    assert torch.equal(found.sequences, generate(plain, ids, **kwargs).sequences)
    assert all_compressed(found.past_key_values)


@KINDS
def test_a_compiled_forward_put_in_place(kind, plain):
    model = copy.deepcopy(plain)
    model.forward = torch.compile(model.forward, backend="kvc", options=LOSSLESS)
    same(generate(model, prompt(), cache_implementation=kind), plain, prompt(), cache_implementation=kind)


def on_every_device(**settings) -> CompileConfig:
    """transformers compiles decoding by itself on accelerators only, unless told so."""
    config = CompileConfig(**settings)
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize("door", ["forward", "module"])
def test_decoding_that_transformers_compiles_stays_ours(door, plain, compiled):
    model = compiled
    if door == "forward":
        model = copy.deepcopy(plain)
        model.forward = torch.compile(model.forward, backend="kvc", options=LOSSLESS)
    found = generate(model, prompt(), cache_implementation="static", compile_config=on_every_device())
    same(found, plain, prompt(), cache_implementation="static")


@pytest.mark.parametrize(
    ("options", "settings"),
    [(LOSSLESS, {}), ("int8", {"mode": None}), ({"spec": LOSSLESS, "strict": True}, {"mode": "default"})],
    ids=str,
)
def test_compile_config(options, settings, plain):
    config = on_every_device(backend="kvc", options=options, **settings)
    found = generate(copy.deepcopy(plain), prompt(), cache_implementation="static", compile_config=config)
    same(found, plain, prompt(), cache_implementation="static")


@KINDS
def test_a_prompt_in_chunks(kind, plain, compiled):
    settings = {"cache_implementation": kind, "prefill_chunk_size": 5}
    same(generate(compiled, prompt(), **settings), plain, prompt(), **settings)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_turns_of_a_chat_on_one_cache(kind, plain, compiled):
    said = []
    for model in (plain, compiled):
        cache, text = new_cache(model, kind, 128), prompt()
        for turn in range(3):
            text = generate(model, text, 4, past_key_values=cache).sequences
            text = torch.cat([text, prompt(tokens=5, seed=turn)], 1)
        said.append(text)
    assert torch.equal(*said)
    assert all_compressed(cache)


@KINDS
def test_inference_mode_and_then_no_grad(kind, plain, compiled):
    with torch.inference_mode():
        found = generate(compiled, prompt(), cache_implementation=kind)
    same(found, plain, prompt(), cache_implementation=kind)
    same(generate(compiled, prompt(), cache_implementation=kind), plain, prompt(), cache_implementation=kind)


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float16, None), (torch.bfloat16, "static")])
def test_half_precision(dtype, kind, plain, compiled):
    ids, plain = prompt(), copy.deepcopy(plain).to(dtype)
    same(generate(compiled.to(dtype), ids, cache_implementation=kind), plain, ids, cache_implementation=kind)


def test_threads(plain, compiled):
    """Four at a time, on two models with different specs and kinds of caches."""
    other = copy.deepcopy(plain)
    other.compile(backend="kvc", options="int8")
    found: list = []

    def work(model, kind):
        for _ in range(2):
            found.append((kind, generate(model, prompt(), cache_implementation=kind)))

    work_of = [(compiled, None), (compiled, None), (other, "static"), (other, "static")]
    threads = [threading.Thread(target=work, args=x) for x in work_of]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 8
    for kind, f in found:
        same(f, plain, prompt(), cache_implementation=kind)
    bits = [{s.keys for s in report(m).sites} for m in (compiled, other)]
    assert len(bits[0] | bits[1]) == 2, "each with its own spec"


def test_pipeline(plain):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")

    def write(model):
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
        settings = {"max_new_tokens": 6, "do_sample": False}
        return pipe("w5 w9 w77", **settings), pipe(["w5 w9 w77 w12", "w8 w9"], batch_size=2, **settings)

    model = torch.compile(copy.deepcopy(plain), backend="kvc", options=LOSSLESS)
    assert write(model) == write(plain)
    assert [s.status for s in report(model).sites] == ["compressed"] * 2
