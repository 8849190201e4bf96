"""A hand-written model whose cache is a pair of buffers in each attention module, in the style of gpt-fast."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kvc_compile.backend as backend
from kvc_compile.handle import CacheHandle
from kvc_compile.report import report

HEADS, KV, DIM, LENGTH = 4, 2, 16, 128


class KVCache(nn.Module):
    def __init__(self, batch: int, write: str):
        super().__init__()
        self.write = write
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(batch, KV, LENGTH, DIM))

    def update(self, input_pos, k, v):
        k_out, v_out = self.k_cache, self.v_cache
        if self.write == "setitem":
            k_out[:, :, input_pos] = k
            v_out[:, :, input_pos] = v
        elif self.write == "slice":
            k_out[:, :, input_pos : input_pos + k.shape[2]] = k
            v_out[:, :, input_pos : input_pos + v.shape[2]] = v
        elif self.write == "narrow":
            k_out.narrow(2, input_pos, k.shape[2]).copy_(k)
            v_out.narrow(2, input_pos, v.shape[2]).copy_(v)
        else:
            k_out.index_copy_(2, input_pos, k)
            v_out.index_copy_(2, input_pos, v)
        return k_out, v_out


class Attention(nn.Module):
    def __init__(self, batch: int, write: str, gqa: str):
        super().__init__()
        self.gqa = gqa
        self.wqkv = nn.Linear(HEADS * DIM, (HEADS + 2 * KV) * DIM, bias=False)
        self.wo = nn.Linear(HEADS * DIM, HEADS * DIM, bias=False)
        self.kv_cache = KVCache(batch, write)

    def forward(self, x, mask, input_pos):
        b, n, _ = x.shape
        q, k, v = self.wqkv(x).split([HEADS * DIM, KV * DIM, KV * DIM], dim=-1)
        q, k, v = (t.view(b, n, -1, DIM).transpose(1, 2) for t in (q, k, v))
        k, v = self.kv_cache.update(input_pos, k, v)
        if self.gqa == "enable_gqa":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, enable_gqa=True)
        else:
            k = k.repeat_interleave(HEADS // KV, dim=1)
            v = v.repeat_interleave(HEADS // KV, dim=1)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
        return self.wo(y.transpose(1, 2).contiguous().view(b, n, -1))


class Transformer(nn.Module):
    def __init__(self, batch: int = 2, write: str = "setitem", gqa: str = "repeat_interleave", layers: int = 2):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, HEADS * DIM)
        self.position = nn.Embedding(LENGTH, HEADS * DIM)
        self.layers = nn.ModuleList(Attention(batch, write, gqa) for _ in range(layers))
        self.norms = nn.ModuleList(nn.RMSNorm(HEADS * DIM) for _ in range(layers))
        self.output = nn.Linear(HEADS * DIM, 64, bias=False)
        self.register_buffer("causal_mask", torch.tril(torch.ones(LENGTH, LENGTH, dtype=torch.bool)))

    def forward(self, idx, input_pos):
        """input_pos: the positions of idx [n]; the first of them as a number where the cache is written by slices."""
        positions = input_pos
        if isinstance(input_pos, int):
            positions = torch.arange(input_pos, input_pos + idx.shape[1])
        mask = self.causal_mask[None, None, positions]
        x = self.embedding(idx) + self.position(positions)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x), mask, input_pos)
        return self.output(x)


@pytest.fixture
def no_inductor(monkeypatch):
    monkeypatch.setattr(backend, "lower", lambda gm, inputs, request, births: gm.forward)


def tokens(n: int, seed: int = 0):
    return torch.randint(0, 64, (2, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(call, ids, prompt: int, chunk: int = 0):
    """Logits of a prefill (in chunks, if asked) and of the rest of `ids` one by one."""
    cuts = [*range(0, prompt, chunk or prompt), *range(prompt, ids.shape[1] + 1)]
    parts = [call(ids[:, a:b], torch.arange(a, b)) for a, b in zip(cuts, cuts[1:], strict=False)]
    return torch.cat(parts, 1)


@torch.no_grad()
def run_from(call, ids, prompt: int):
    """As `run`, with the first position as a number."""
    cuts = [0, *range(prompt, ids.shape[1] + 1)]
    return torch.cat([call(ids[:, a:b], a) for a, b in zip(cuts, cuts[1:], strict=False)], 1)


def caches(model):
    return [t for layer in model.layers for t in (layer.kv_cache.k_cache, layer.kv_cache.v_cache)]


@pytest.mark.parametrize("gqa", ["repeat_interleave", "enable_gqa"])
@pytest.mark.parametrize("write", ["setitem", "index_copy_"])
@pytest.mark.parametrize("spec", [{"kvc": 1}, "int4"])
def test_prefill_and_decode(spec, write, gqa, no_inductor):
    model, ids = Transformer(write=write, gqa=gqa).eval(), tokens(70)
    want = run(copy.deepcopy(model), ids, 50)
    got = run(torch.compile(model, backend="kvc", options=spec, fullgraph=True), ids, 50)
    torch.testing.assert_close(got, want, atol=1e-4 if spec == {"kvc": 1} else 0.1, rtol=0)
    if spec == "int4":
        assert not torch.equal(got, want)
    assert all(isinstance(t, CacheHandle) for t in caches(model))
    assert [s.status for s in report(model).sites] == ["compressed"] * 2


@pytest.mark.parametrize("write", ["slice", "narrow"])
@pytest.mark.parametrize("spec", [{"kvc": 1}, "int4"])
def test_writes_to_slices(spec, write, no_inductor):
    """Positions are numbers, for all of which there is one graph."""
    model, ids = Transformer(write=write).eval(), tokens(70)
    want = run_from(copy.deepcopy(model), ids, 50)
    got = run_from(torch.compile(model, backend="kvc", options=spec, fullgraph=True), ids, 50)
    torch.testing.assert_close(got, want, atol=1e-4 if spec == {"kvc": 1} else 0.1, rtol=0)
    assert all(isinstance(t, CacheHandle) for t in caches(model))
    assert [s.status for s in report(model).sites] == ["compressed"] * 2 and report(model).graphs <= 3


def test_slices_through_inductor():
    model, ids = Transformer(write="slice", layers=1).eval(), tokens(56)
    want = run_from(copy.deepcopy(model), ids, 50)
    got = run_from(torch.compile(model, backend="kvc", options={"kvc": 1}, fullgraph=True), ids, 50)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("spec", [{"kvc": 1}, "int4"])
def test_through_inductor(spec):
    model, ids = Transformer(layers=1).eval(), tokens(60)
    want = run(copy.deepcopy(model), ids, 50)
    compiled = torch.compile(model, backend="kvc", options=spec, fullgraph=True)
    torch.testing.assert_close(run(compiled, ids, 50), want, atol=1e-4 if spec == {"kvc": 1} else 0.1, rtol=0)


def test_the_buffers_become_handles_and_free_their_storage(no_inductor):
    model = Transformer().eval()
    size = caches(model)[0].nbytes
    alias = model.layers[0].kv_cache.k_cache
    run(torch.compile(model, backend="kvc", options="int4"), tokens(8), 6)
    gc.collect()
    assert alias is model.layers[0].kv_cache.k_cache and isinstance(alias, CacheHandle)
    assert not [o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == alias.shape and o.nbytes == size]
    names = {n for n, _ in model.named_buffers()}
    assert "layers.0.kv_cache.k_cache" in names, "still the module's buffers"
    held = report(model).held().total
    assert held == sum(t.arena.untyped_storage().nbytes() for t in caches(model)) < 4 * size


@pytest.mark.parametrize("spec", [{"kvc": 1}, "int4"])
def test_a_second_prompt_from_position_0(spec, no_inductor):
    """Shorter than the first: what is left of that is not seen."""
    model = Transformer().eval()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="kvc", options=spec)
    run(compiled, tokens(90), 80)
    fresh = torch.compile(copy.deepcopy(plain), backend="kvc", options=spec)
    want, got = run(fresh, tokens(60, 1), 50), run(compiled, tokens(60, 1), 50)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    if spec == {"kvc": 1}:
        torch.testing.assert_close(got, run(plain, tokens(60, 1), 50), atol=1e-4, rtol=0)


def test_chunked_prefill(no_inductor):
    model = Transformer().eval()
    want = run(copy.deepcopy(model), tokens(70), 64)
    got = run(torch.compile(model, backend="kvc", options={"kvc": 1}), tokens(70), 64, chunk=16)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_eager_prefill_then_compiled_decode(no_inductor):
    """The filled buffers are taken over with what they hold."""
    model, ids = Transformer().eval(), tokens(60)
    want = run(copy.deepcopy(model), ids, 50)
    with torch.no_grad():
        model(ids[:, :50], torch.arange(50))
        compiled = torch.compile(model, backend="kvc", options={"kvc": 1})
        got = torch.cat([compiled(ids[:, i : i + 1], torch.tensor([i])) for i in range(50, 60)], 1)
    torch.testing.assert_close(got, want[:, 50:], atol=1e-4, rtol=0)


def test_a_gap_is_an_error(no_inductor):
    model = Transformer().eval()
    compiled = torch.compile(model, backend="kvc", options="int4")
    run(compiled, tokens(12), 10)
    with (
        pytest.raises(ValueError, match="position 20 of a .*cache of 12|at position 20 .* holds 12|from position 20"),
        torch.no_grad(),
    ):
        compiled(tokens(1), torch.tensor([20]))
