"""Caches that evict, in compiled models: what they hold, what decoding makes of it, and what they must not do."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys

import pytest
import torch
from evicted import HeavyHitters, attending, held, hiding, seen

import kvc_compile as kvc
import kvc_compile.backend as backend
from kvc_compile.handle import CacheHandle
from kvc_compile.kernels.keep.attention import Attention
from kvc_compile.kernels.keep.rule import apply
from kvc_compile.lowering import cpu
from kvc_compile.lowering.ops import EvictedError
from kvc_compile.policy import regions_of, rules_of
from kvc_compile.report import DeclinedError
from models import decode, new_cache, prompt, tiny

KINDS = pytest.mark.parametrize("kind", ["dynamic", "static"])
LAYERS, TOKENS, ROOM = 3, 60, 96
SNAPKV = {"attn": {"probe": "last 4", "reduce": "sum", "pool": "max 7"}}
ALL = {"attn": {"probe": "all", "reduce": "sum"}}
RULES = {
    "snapkv": {"budget": 10, "score": SNAPKV},
    "share": {"budget": "25%", "score": ALL},
    "pyramid": {"budget": 10, "alloc": {"pyramid": 9}, "score": SNAPKV},
    "windows": {"budget": "40%", "unit": {"chunk": 8}, "reuse": "layers(2)", "alloc": {"pyramid": 3}, "score": ALL},
    "adakv": {"budget": 10, "alloc": {"waterfill": "head", "floor": "20%"}, "score": SNAPKV},
    "dynamickv": {"budget": 10, "alloc": {"waterfill": "layer", "cap": "10x"}, "score": SNAPKV},
    "kvzip": {"budget": 10, "alloc": {"waterfill": "model"}, "score": {"attn": {**ALL["attn"], "reduce": "max"}}},
    "prefixkv": {"budget": "20%", "alloc": {"mass": "layer"}, "score": {"attn": {**ALL["attn"], "heads": "mean"}}},
    "mass": {"budget": {"mass": 0.5}, "score": ALL},
    "graphkv": {"budget": 10, "score": {**SNAPKV, "then": {"graph_decay": {"seeds": 4}}}},
    "kvcrush": {"budget": 12, "score": SNAPKV, "diverse": {"share": "25%"}},
    "norm": {"budget": 10, "score": {"kv": "norm"}},
    "fifo": {"budget": 10},
    "merged": {"budget": 10, "score": ALL, "else": {"merge": {"assign": "nearest", "weight": "mean", "min_cos": 0.1}}},
}  # fmt: skip
BITS = {"k": {"codec": {"int": 4, "block": [32, 1]}}, "v": {"codec": {"int": 4, "block": [1, 16]}}}


def spec_of(name, tokens=(2, 4), **more):
    sink, recent = tokens
    regions = {"sink": sink, "recent": recent}
    return {"kvc": 1, "name": name, "tokens": regions, "keep": {"when": "prefill_end", **RULES[name]}, **more}


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch):
    monkeypatch.setattr(backend, "lower", lambda gm, inputs, request, births: gm.forward)


@pytest.fixture(scope="module")
def plain():
    return tiny("llama", layers=LAYERS)


def padded():
    """Two rows of TOKENS and TOKENS - 20 tokens."""
    ids = prompt(2, TOKENS)
    ids[1, :20] = 0
    return ids, (ids != 0).long()


def expected(plain, spec, ids, mask):
    """By layer, row and head: the positions that the rule keeps of what the untouched model's attention sees."""
    regions, (rule,) = regions_of(spec["tokens"]), rules_of(spec["keep"])
    visible = mask.bool()
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril() & visible[:, None, None]
    found = seen(plain, ids, mask)
    layers = []
    for q, k, _ in found:
        s = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT) * q.shape[-1] ** -0.5
        layers.append(Attention(q, k, s.masked_fill(~causal, -torch.inf).logsumexp(-1), visible, q.shape[-1] ** -0.5))
    together = rule.alloc.kind == "mass" or (rule.alloc.kind == "waterfill" and rule.alloc.scope != "head")
    step = LAYERS if together else rule.reuse
    out = []
    for i in range(0, LAYERS, step):
        group, values = layers[i : i + step], [v for *_, v in found[i : i + step]]
        out += apply(rule, regions, group, values, place=(i, LAYERS) if step < LAYERS else None)
    return [[[[t for t in head if t >= 0] for head in row] for row in o.kept.index.tolist()] for o in out], out


@pytest.mark.parametrize(("name", "kind"), [(n, ("dynamic", "static")[i % 2]) for i, n in enumerate(RULES)])
def test_holds_what_the_rule_keeps(name, kind, plain):
    """And decodes as a model does that hides from itself, by layer, row and head, what went."""
    spec = spec_of(name)
    ids, mask = padded()
    wanted, outcomes = expected(plain, spec, ids, mask)
    cache, forced = new_cache(plain, kind, ROOM), prompt(2, 3, seed=3)
    compiled = torch.compile(copy.deepcopy(plain), backend="kvc", options={"spec": spec, "strict": True})
    got = steps(compiled, cache, ids, mask, forced)
    assert [held(layer, new=3) for layer in cache.layers] == wanted
    assert wanted[0][0][0] != list(range(TOKENS))
    for layer, o in zip(cache.layers, outcomes, strict=True):
        for handle, x in ((layer.keys, o.merged and o.merged.k), (layer.values, o.merged and o.merged.v)):
            if x is not None:
                stored = cpu.read(handle.arena, x.shape[2], handle.stored)
                assert torch.allclose(stored[0], x[0], atol=1e-5)  # the other row has holes
    if name == "merged":
        return
    everything = set(range(TOKENS))
    gone = [[[everything - set(head) for head in row] for row in layer] for layer in wanted]
    with attending(plain, "hiding", hiding(gone)):
        right = steps(plain, new_cache(plain, kind, ROOM), ids, mask, forced)
    untouched = steps(plain, new_cache(plain, kind, ROOM), ids, mask, forced)
    assert (got - right).abs().max() < 2e-5
    assert (got[:, 1:] - untouched[:, 1:]).abs().max() > 1e-3  # it makes a difference at all


@torch.no_grad()
def steps(call, cache, ids, mask, forced):
    """Logits of the prompt's last token and of the steps that are fed `forced`."""
    out = [call(input_ids=ids, attention_mask=mask, past_key_values=cache).logits[:, -1:]]
    for i in range(forced.shape[1]):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        out.append(call(input_ids=forced[:, i : i + 1].clone(), attention_mask=mask, past_key_values=cache).logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize(("name", "kind"), [("adakv", "static"), ("merged", "dynamic")])
def test_with_four_bits_the_same_tokens_stay(name, kind, plain):
    spec = spec_of(name, **BITS)
    ids, mask = padded()
    wanted, _ = expected(plain, spec, ids, mask)
    cache = new_cache(plain, kind, ROOM)
    compiled = torch.compile(copy.deepcopy(plain), backend="kvc", options=spec)
    got = steps(compiled, cache, ids, mask, prompt(2, 3, seed=3))
    assert [held(layer, new=3) for layer in cache.layers] == wanted
    exact = torch.compile(copy.deepcopy(plain), backend="kvc", options=spec_of(name))
    right = steps(exact, new_cache(plain, kind, ROOM), ids, mask, prompt(2, 3, seed=3))
    assert 0 < (got - right).abs().max() < 0.05
    assert cache.layers[0].keys.stored.codec.bits == 4


@pytest.mark.parametrize(("codec", "kind"), [({}, "dynamic"), (BITS, "static")], ids=["16 bits", "4 bits"])
def test_a_prompt_within_the_budget_loses_nothing(codec, kind, plain):
    """One token, fewer than the window, than regions and budget, or as many as these: what a cache that keeps all makes
    of it, bit for bit."""
    found = []
    for spec in (
        spec_of("snapkv", **codec),
        {"kvc": 1, "tokens": {"sink": 2, "recent": {"k": 32 if codec else 4, "v": 4}}, **codec},
    ):
        model = torch.compile(copy.deepcopy(plain), backend="kvc", options=spec)
        found.append([])
        for tokens in (1, 3, 6, 16):
            cache = new_cache(plain, kind, ROOM)
            found[-1].append(decode(model, cache, prompt(2, tokens), steps=4, forced=prompt(2, 5, seed=3)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@KINDS
def test_the_bytes_go(kind, plain):
    ids, spec = prompt(2, TOKENS), spec_of("snapkv")
    model = copy.deepcopy(plain)
    cache = new_cache(plain, kind, TOKENS + 4)
    with torch.no_grad():
        torch.compile(model, backend="kvc", options=spec)(input_ids=ids, past_key_values=cache)
    arenas = [x.arena for layer in cache.layers for x in (layer.keys, layer.values)]
    assert kvc.report(model).held().total == sum(a.untyped_storage().nbytes() for a in arenas)
    slots = 16 + (4 if kind == "static" else 256)
    for layer in cache.layers:
        for x in (layer.keys, layer.values):
            assert x.stored.room_of(x.arena.shape[1]) == slots
            assert x.shape[2] == (TOKENS if kind == "dynamic" else TOKENS + 4)


@pytest.mark.parametrize(("name", "kind"), [("adakv", "dynamic"), ("share", "static"), ("dynamickv", "dynamic")])
def test_a_second_prompt(name, kind, plain):
    """It attends to what is left, with its own positions, and then gives way itself."""
    spec = spec_of(name)
    ids, more = prompt(2, TOKENS), prompt(2, 20, seed=5)
    wanted, _ = expected(plain, spec, ids, torch.ones_like(ids))
    gone = [[[set(range(TOKENS)) - set(head) for head in row] for row in layer] for layer in wanted]
    with attending(plain, "hiding", hiding(gone)), torch.no_grad():  # one token after the other
        cache = new_cache(plain, kind, ROOM)
        plain(input_ids=ids, past_key_values=cache)
        right = [plain(input_ids=more[:, i : i + 1].clone(), past_key_values=cache).logits for i in range(20)]
    cache = new_cache(plain, kind, ROOM)
    compiled = torch.compile(copy.deepcopy(plain), backend="kvc", options=spec)
    with torch.no_grad():
        compiled(input_ids=ids, past_key_values=cache)
        got = compiled(input_ids=more, past_key_values=cache).logits
        after = compiled(input_ids=more[:, :1].clone(), past_key_values=cache).logits
    assert (got - torch.cat(right, 1)).abs().max() < 2e-5
    assert after.isfinite().all()
    for layer in cache.layers:
        positions = held(layer)[0][0]
        assert positions[-1] == TOKENS + 20
        if name == "dynamickv":  # layers that hold different numbers by now share no budget
            assert set(range(TOKENS, TOKENS + 21)) < set(positions)
        else:
            assert len(positions) < len(wanted[0][0][0]) + 21


@KINDS
def test_what_it_refuses(kind, plain):
    """Reading by position what is gone, and going back to it; a reset begins anew."""
    cache = new_cache(plain, kind, ROOM)
    model = torch.compile(copy.deepcopy(plain), backend="kvc", options=spec_of("snapkv"))
    ids = prompt(2, TOKENS)
    with torch.no_grad():
        first = model(input_ids=ids, past_key_values=cache).logits
        keys = cache.layers[0].keys
        assert isinstance(keys, CacheHandle)
        with pytest.raises(EvictedError, match="44 tokens of this cache were evicted"):
            keys.dense()
        twin = copy.deepcopy(keys)
        assert torch.equal(twin.arena, keys.arena)
        if kind == "dynamic":
            with pytest.raises(ValueError, match="evicted tokens from there on"):
                keys[:, :, :30]
            model(input_ids=ids[:, :1].clone(), past_key_values=cache)
            assert cpu.length(cache.layers[0].keys[:, :, :TOKENS].arena, keys.stored) == 16
        else:
            cache.reset()
            assert torch.equal(model(input_ids=ids, past_key_values=cache).logits, first)


def test_what_stays_although_the_spec_asks_for_less(caplog):
    """Sliding windows are left alone, and said so; strict makes it an error."""
    model = tiny(
        "qwen3", use_sliding_window=True, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    )
    ids = prompt(2, TOKENS)
    with caplog.at_level(logging.WARNING, "kvc_compile"), torch.no_grad():
        cache = new_cache(model, "dynamic")
        torch.compile(model, backend="kvc", options=spec_of("snapkv"))(input_ids=ids, past_key_values=cache)
    assert [x.keys.stored.evicts for x in cache.layers] == [False, True]
    assert "keeps all of its tokens: it is a sliding window" in caplog.text
    assert "it is a sliding window" in str(kvc.report(model))
    with torch.no_grad(), pytest.raises(Exception, match="it is a sliding window") as e:
        torch.compile(model, backend="kvc", options={"spec": spec_of("snapkv"), "strict": True})(
            input_ids=ids, past_key_values=new_cache(model, "dynamic")
        )
    assert isinstance(getattr(e.value, "inner_exception", e.value), DeclinedError)


STEPS = {
    "h2o": ({"budget": "10%", "score": ALL}, {"recent": "10%", "sink": 2}, (2, lambda n: n // 10, lambda n: n // 10)),
    "fifo": ({"budget": 3}, {"recent": 4, "sink": 2}, (2, lambda n: 4, lambda n: 3, False)),
    "window": ({"budget": 0}, {"recent": 7}, (0, lambda n: 7, lambda n: 0, False)),
}
PER_TOKEN = {"kv": {"codec": {"int": 4, "block": [1, 16]}}}


@pytest.mark.parametrize(
    ("name", "kind"), [("h2o", "dynamic"), ("h2o", "static"), ("fifo", "static"), ("window", "dynamic")]
)
def test_each_new_token_pushes_one_out(name, kind, plain):
    """Head by head what a model holds that does it with sets, and its logits; the arena does not grow with it."""
    rule, tokens, regions = STEPS[name]
    spec = {"kvc": 1, "tokens": tokens, "keep": {"when": ["prefill_end", "append"], **rule}}
    ids, forced = prompt(2, 31), prompt(2, 24, seed=3)
    mask = torch.ones_like(ids)
    oracle = HeavyHitters(*regions)
    with attending(plain, "oracle", oracle):
        right = steps(plain, new_cache(plain, "dynamic"), ids, mask, forced)
    cache = new_cache(plain, kind, ROOM)
    got = steps(
        torch.compile(copy.deepcopy(plain), backend="kvc", options={"spec": spec, "strict": True}),
        cache,
        ids,
        mask,
        forced,
    )
    assert [held(layer) for layer in cache.layers] == [oracle.positions(i) for i in range(LAYERS)]
    assert (got - right).abs().max() < 2e-5
    layer = cache.layers[0]
    assert cpu.length(layer.keys.arena, layer.keys.stored) == len(held(layer)[0][0])
    four = new_cache(plain, kind, ROOM)
    steps(torch.compile(copy.deepcopy(plain), backend="kvc", options=spec | PER_TOKEN), four, ids, mask, forced)
    layer = four.layers[0]
    assert held(layer) == oracle.positions(0) or name == "h2o"
    assert layer.keys.stored.codec.bits == 4 and len(held(layer)[0][0]) == len(oracle.positions(0)[0][0])


@pytest.mark.parametrize("steps_too", [False, True])
def test_it_is_written_at_its_end_only(steps_too, plain):
    """Slots say nothing of what was at a position before; what could not be right is an error, for both kinds."""
    spec = spec_of("snapkv")
    if steps_too:
        spec = {"kvc": 1, "tokens": {"sink": 2, "recent": 4}, "keep": {"when": ["prefill_end", "append"], "budget": 6}}
    model = torch.compile(copy.deepcopy(plain), backend="kvc", options=spec)
    cache, one = new_cache(plain, "static", ROOM), prompt(2, 1)
    with torch.no_grad():
        model(input_ids=prompt(2, TOKENS), past_key_values=cache)
        for layer in cache.layers:
            layer.cumulative_length -= 3
        with pytest.raises(RuntimeError, match="before the end of a compressed cache that has evicted"):
            model(input_ids=one, past_key_values=cache)
    cache = new_cache(plain, "dynamic")
    with torch.no_grad():
        model(input_ids=prompt(2, TOKENS), past_key_values=cache)
        for _ in range(8):
            model(input_ids=one.clone(), past_key_values=cache)
        keys = cache.layers[0].keys
        if steps_too:
            with pytest.raises(ValueError, match="evicted tokens from there on"):
                keys[:, :, : TOKENS + 4]
        else:
            assert held(type("Layer", (), {"keys": keys[:, :, : TOKENS + 4]}))[0][0][-4:] == [60, 61, 62, 63]


@KINDS
def test_padding_within_the_budget_is_left_as_it_is(kind, plain):
    """Rows of other lengths, of which all fit: the codes are those of a cache that keeps all."""
    ids = prompt(2, 16)
    ids[1, :9] = 0
    found = []
    for spec in (spec_of("snapkv", **BITS), {"kvc": 1, "tokens": {"sink": 2, "recent": {"k": 32, "v": 4}}, **BITS}):
        model = torch.compile(copy.deepcopy(plain), backend="kvc", options=spec)
        found.append(steps(model, new_cache(plain, kind, ROOM), ids, (ids != 0).long(), prompt(2, 3, seed=3)))
    assert torch.equal(*found)


def test_verify_and_the_dump(plain, tmp_path, caplog):
    """What goes makes a difference, which is no fault of the rewrite; the script of the dump runs."""
    model = torch.compile(
        copy.deepcopy(plain), backend="kvc", options={"spec": spec_of("snapkv"), "verify": True, "dump": str(tmp_path)}
    )
    with caplog.at_level(logging.WARNING, "kvc_compile"):
        cache = new_cache(plain, "dynamic")
        decode(model, cache, prompt(2, TOKENS), steps=20)
        decode(model, copy.deepcopy(cache), prompt(2, 3), steps=2)  # its twin's full cache is not known
    assert not caplog.records
    folders = [f for f in tmp_path.iterdir() if (f / "repro.py").exists()]
    plans = [(f / "plan.json").read_text() for f in folders]
    assert len(folders) == 3 and all('"keep"' in p for p in plans)
    assert "10 more tokens of each prompt stay" in (folders[0] / "index.html").read_text()
    prefill = next(f for f in folders if "torch.ops.kvc.keep" in (f / "1_rewritten.py").read_text())
    done = subprocess.run([sys.executable, "-P", str(prefill / "repro.py"), "--eager"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@KINDS
def test_a_step_takes_the_slots_of_padding(kind, plain):
    """Padding that was stored with a short prompt makes room first: no slot more is used."""
    spec = {"kvc": 1, "tokens": {"sink": 2, "recent": 4}, "keep": {"when": ["prefill_end", "append"], "budget": 3}}
    ids = prompt(2, 9)
    ids[1, :5] = 0
    cache = new_cache(plain, kind, ROOM)
    model = torch.compile(copy.deepcopy(plain), backend="kvc", options=spec)
    got = steps(model, cache, ids, (ids != 0).long(), prompt(2, 12, seed=3))
    keys = cache.layers[0].keys
    assert cpu.length(keys.arena, keys.stored) == 9 and got.isfinite().all()
    assert held(cache.layers[0]) == [[[0, 1, *range(14, 21)]] * 2, [[5, 6, *range(14, 21)]] * 2]
