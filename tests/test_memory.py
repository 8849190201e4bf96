"""The memory is really gone: what is allocated, what is held, what is released, and how often something is compiled.

Allocations are those of the CPU allocator, as torch's profiler records them: nothing inside an operator escapes it.
"""

from __future__ import annotations

import copy
import gc
import os
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import kvc_compile.backend as backend
from kvc_compile import handle
from kvc_compile.handle import CacheHandle
from kvc_compile.layout import Layout
from kvc_compile.lowering import native
from kvc_compile.plan import SLACK
from kvc_compile.report import report
from models import decode, new_cache, prompt, tiny

LOSSLESS = {"kvc": 1}
LONG = 16384
LENGTH = 6000  # valid tokens of the long cache


@pytest.fixture
def no_inductor(monkeypatch):
    """Run the rewritten graphs as they are: the cache's memory is the operators', not Inductor's."""
    monkeypatch.setattr(backend, "lower", lambda gm, inputs, request, births: gm.forward)


@pytest.fixture
def compiles(monkeypatch) -> list:
    seen: list = []
    original = backend.compile_graph
    monkeypatch.setattr(backend, "compile_graph", lambda *args: (seen.append(1), original(*args))[1])
    return seen


@pytest.fixture(autouse=True)
def nothing_held():
    """No test starts with, or leaves, a live arena."""
    gc.collect()
    before = sum(handle.held().values())
    yield
    torch._dynamo.reset()
    gc.collect()
    assert sum(handle.held().values()) <= before


def small(**config):
    return tiny("llama", layers=1, max_position_embeddings=LONG, **config)


def dense_bytes(tokens: int, batch: int = 1, heads: int = 2, channels: int = 16) -> int:
    """One layer's keys at full precision (fp32)."""
    return batch * heads * tokens * channels * 4


class Allocations:
    sizes: list[int]  # of every allocation, in order; frees are negative

    @property
    def largest(self) -> int:
        return max(self.sizes)

    @property
    def peak(self) -> int:
        """The most that was held at once, beyond what was held before."""
        top = now = 0
        for n in self.sizes:
            now += n
            top = max(top, now)
        return top


@contextmanager
def allocations():
    found = Allocations()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        yield found
    found.sizes = [e.nbytes() for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert found.sizes


def tensors() -> dict[int, Tensor]:
    """Every live CPU tensor that owns memory, by storage: an account that knows nothing of handles."""
    gc.collect()
    found = {}
    for o in gc.get_objects():
        if type(o) in (Tensor, torch.nn.Parameter) and o.device.type == "cpu" and o.layout == torch.strided:
            try:
                storage = o.untyped_storage()
                if storage.nbytes() and not torch._is_functional_tensor(o):
                    arena = o.dtype == torch.uint8 and o.dim() == 2
                    if arena or storage.data_ptr() not in found:  # the arena itself, not a view into it
                        found[storage.data_ptr()] = o
            except (RuntimeError, NotImplementedError):
                continue
    return found


def live_bytes() -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors().values())


def live_arenas() -> int:
    """Bytes of live uint8 tensors with the shape of an arena."""
    return sum(t.untyped_storage().nbytes() for t in tensors().values() if t.dtype == torch.uint8 and t.dim() == 2)


def fill(call, cache, ids, chunk=500):
    with torch.no_grad():
        for part in ids.split(chunk, 1):
            out = call(input_ids=part, past_key_values=cache)
    return out.logits[:, -1:].argmax(-1)


# ---------------------------------------------------------------- what is allocated


def test_the_account_sees_a_dense_cache():
    """The test of the test: the untouched model allocates what the tests below forbid."""
    model = small()
    with allocations() as plain:
        decode(model, new_cache(model, "static", LONG), prompt(batch=1), steps=1)
    assert plain.largest >= dense_bytes(LONG)


@pytest.mark.parametrize("spec", ["int8", "int4", "kivi-2bit", "default"])
def test_a_born_cache_is_never_dense(spec, no_inductor):
    """Prefill into a long static cache, and decoding: no tensor of the size of one layer's dense keys, ever."""
    model, ids = small(), prompt(batch=1, tokens=40)
    compiled = torch.compile(model, backend="kvc", options=spec)
    cache = new_cache(model, "static", LONG)
    with allocations() as made:
        decode(compiled, cache, ids, steps=4)
    held = report(model).held().total
    arena = max(t.arena.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert made.largest == arena < dense_bytes(LONG) / 3
    assert made.peak < held + dense_bytes(LONG) / 2


@pytest.mark.parametrize("spec", ["int8", "int4"])
def test_a_born_cache_is_never_dense_through_inductor(spec):
    model, ids = small(), prompt(batch=1, tokens=40)
    compiled = torch.compile(model, backend="kvc", options=spec)
    decode(compiled, new_cache(model, "static", LONG), ids, steps=2)  # the compiler's own memory is not meant
    gc.collect()
    cache = new_cache(model, "static", LONG)
    with allocations() as made:
        decode(compiled, cache, ids, steps=2)
    assert made.largest < dense_bytes(LONG) / 3
    assert made.peak < report(model).held().total + dense_bytes(LONG) / 8, "no copy of the arenas either"


@pytest.fixture
def no_kernels(monkeypatch):
    """Decode steps by the reference."""
    monkeypatch.setattr(native, "BYTES", 1 << 40)


@pytest.mark.parametrize(
    ("spec", "kind", "steps_by"),
    [
        ("int8", "static", "kernels"),
        ("int8", "dynamic", "reference"),
        ("int4", "static", "reference"),
        ("int4", "dynamic", "kernels"),
    ],
)
def test_a_decode_step_has_no_full_size_temporary(spec, kind, steps_by, no_inductor, request):
    """With 6000 tokens in the cache a step's temporaries are bounded by a span of them."""
    if steps_by == "reference":
        request.getfixturevalue("no_kernels")
    model = small()
    compiled = torch.compile(model, backend="kvc", options=spec)
    cache = new_cache(model, kind, LONG)
    token = fill(compiled, cache, prompt(batch=1, tokens=LENGTH))
    with torch.no_grad():
        compiled(input_ids=token, past_key_values=cache)  # compiled here
        with allocations() as made:
            for _ in range(3):
                compiled(input_ids=token, past_key_values=cache)
    assert made.largest < dense_bytes(LENGTH)
    assert made.peak < 2 * dense_bytes(LENGTH), "less than keys and values at full precision"


def test_a_full_decode_would_be_seen(no_inductor, no_kernels, monkeypatch):
    """The test of the test above: with one span over everything it fails."""
    from kvc_compile.kernels import reference

    monkeypatch.setattr(reference, "SPAN", 1 << 20)
    model = small()
    compiled = torch.compile(model, backend="kvc", options="int4")
    cache = new_cache(model, "static", LONG)
    token = fill(compiled, cache, prompt(batch=1, tokens=LENGTH // 3))
    with torch.no_grad():
        compiled(input_ids=token, past_key_values=cache)
        with allocations() as made:
            compiled(input_ids=token, past_key_values=cache)
    assert made.largest > 0.9 * dense_bytes(LENGTH // 3)


# ---------------------------------------------------------------- what is held and released


@pytest.mark.parametrize(
    ("spec", "kind"), [(LOSSLESS, "static"), ("int8", "dynamic"), ("int4", "static"), ("int4", "dynamic")]
)
def test_held_is_what_lives(spec, kind, no_inductor):
    model = tiny("llama")
    compiled = torch.compile(model, backend="kvc", options=spec)
    cache = new_cache(model, kind, 256)
    decode(compiled, cache, prompt(tokens=70), steps=5)
    found = report(model)
    assert found.held().total == live_arenas() > 0
    assert set(found.held().tensors) == {(n, role) for n in range(2) for role in ("keys", "values")}
    second = new_cache(model, kind, 256)
    decode(compiled, second, prompt(tokens=70), steps=5)
    assert found.held().total == live_arenas()
    del cache, second
    gc.collect()
    assert found.held().total == live_arenas() == 0


@pytest.mark.parametrize("spec", [LOSSLESS, "int8", "int4", "kivi-4bit", "kivi-2bit", "default"])
def test_held_is_what_was_planned(spec, no_inductor):
    model = small(head_dim=64)
    compiled = torch.compile(model, backend="kvc", options=spec)
    cache = new_cache(model, "static", 1000)
    decode(compiled, cache, prompt(batch=3), steps=1)
    found = report(model)
    assert found.held().total == pytest.approx(found.bytes(1000, batch=3).compressed, rel=0.02)
    del cache
    gc.collect()
    cache = new_cache(model, "dynamic")
    decode(compiled, cache, prompt(batch=3, tokens=100), steps=1)
    found = report(model)
    assert found.bytes(101, 3).compressed <= found.held().total <= 1.02 * found.bytes(101 + SLACK, 3).compressed


# bits, elements of a block, numbers per block, of keys and of values; exact first tokens; exact last ones of each
STORED = {
    "lossless": ((32, 1, 0), (32, 1, 0), 0, (0, 0)),
    "int8": ((8, 64, 1), (8, 64, 1), 0, (16, 16)),
    "int4": ((4, 32, 2), (4, 64, 2), 4, (32, 16)),
    "kivi-4bit": ((4, 32, 2), (4, 32, 2), 4, (64, 16)),
    "kivi-2bit": ((2, 16, 2), (2, 64, 2), 4, (16, 2)),
}


@pytest.mark.parametrize("spec", STORED)
def test_the_plan_is_the_formula(spec, no_inductor):
    """bits + 16 * numbers / block bits for an element of the body, the model's dtype for the exact tokens."""
    model, tokens, heads, channels = small(head_dim=64), 4096, 2, 64
    decode(torch.compile(model, backend="kvc", options=spec), new_cache(model, "dynamic"), prompt(), steps=0)
    keys, values, sink, recent = STORED[spec]
    want = 0.0
    for (bits, block, numbers), window in zip((keys, values), recent, strict=True):
        exact = sink + window
        want += heads * channels * ((tokens - exact) * (bits + 16 * numbers / block) / 8 + exact * 4)
    assert report(model).bytes(tokens).compressed == pytest.approx(want, rel=0.01)


@pytest.mark.parametrize("spec", [LOSSLESS, "int8"])
def test_a_cache_made_by_the_caller_is_taken_over(spec, no_inductor):
    """Its full-precision storage is released, for every reference to it, before the first step ends."""
    model, ids = small(), prompt(batch=1)
    want = decode(model, new_cache(model, "static", 4096), ids, steps=3)
    compiled = torch.compile(model, backend="kvc", options=spec)
    cache = new_cache(model, "static", 4096)
    cache.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
    alias, before = cache.layers[0].keys, live_bytes()
    assert sum(t.nbytes == dense_bytes(4096) for t in tensors().values()) == 2
    got = decode(compiled, cache, ids, steps=3)
    assert isinstance(alias, CacheHandle) and alias is cache.layers[0].keys
    torch.testing.assert_close(got, want, atol=1e-4 if spec == LOSSLESS else 0.1, rtol=0)
    del want, got
    if spec != LOSSLESS:
        assert not [t for t in tensors().values() if t.nbytes == dense_bytes(4096)]
        assert live_bytes() < before - dense_bytes(4096)
    else:
        assert not [t for t in tensors().values() if t.dim() == 4 and t.nbytes == dense_bytes(4096)]


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_eager_prefill_then_compiled_decode(kind, no_inductor):
    """What an uncompressed prefill left in the cache is encoded, and its storage released."""
    others = tensors()  # of other tests
    model, ids = tiny("llama"), prompt()
    want = decode(model, new_cache(model, kind, 2048), ids, steps=6)
    cache, forced = new_cache(model, kind, 2048), want[:, 12:].argmax(-1)
    decode(model, cache, ids, steps=0)
    size = cache.layers[0].keys.nbytes
    compiled = torch.compile(model, backend="kvc", options=LOSSLESS)
    with torch.no_grad():
        got = [compiled(input_ids=forced[:, i : i + 1], past_key_values=cache).logits for i in range(6)]
    torch.testing.assert_close(torch.cat(got, 1), want[:, 13:], atol=1e-4, rtol=0)
    assert all(isinstance(t, CacheHandle) for layer in cache.layers for t in (layer.keys, layer.values))
    assert not [t for at, t in tensors().items() if at not in others and t.dim() == 4 and t.nbytes >= size]


def test_a_refilled_import_keeps_its_content(no_inductor):
    """Int8: a cache filled by the untouched model reads, once imported, as what it held, to the codec's error."""
    model, ids = tiny("llama"), prompt(tokens=50)
    cache = new_cache(model, "static", 128)
    decode(model, cache, ids, steps=0)
    before = [t.clone() for layer in cache.layers for t in (layer.keys, layer.values)]
    compiled = torch.compile(model, backend="kvc", options="int8")
    with torch.no_grad():
        compiled(input_ids=ids[:, :1], past_key_values=cache)
    after = [t.dense() for layer in cache.layers for t in (layer.keys, layer.values)]
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a[:, :, :50], b[:, :, :50], atol=float(b.abs().max()) / 100, rtol=0)
        assert a[:, :, 50].any() and not a[:, :, 51:].any()


# ---------------------------------------------------------------- caches used again, and side by side


KINDS_OF_CACHE = pytest.mark.parametrize(
    ("kind", "spec"), [("dynamic", LOSSLESS), ("static", "int4"), ("dynamic", "int4")]
)


@KINDS_OF_CACHE
def test_a_reset_cache_is_a_new_one(kind, spec, no_inductor):
    model = tiny("llama", layers=1)
    compiled = torch.compile(model, backend="kvc", options=spec)
    cache, ids = new_cache(model, kind, 128), prompt(tokens=60, seed=1)
    want = decode(compiled, new_cache(model, kind, 128), ids)
    decode(compiled, cache, prompt(tokens=90))
    held = report(model).held().total
    cache.reset()
    torch.testing.assert_close(decode(compiled, cache, ids), want, atol=1e-5, rtol=0)
    assert report(model).held().total <= held


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_other_batch_sizes_and_lengths(kind, no_inductor):
    """One compiled model, caches of any size: each as the untouched model has it."""
    model = tiny("llama", layers=1)
    compiled = torch.compile(model, backend="kvc", options=LOSSLESS)
    for batch, tokens, length in ((2, 13, 64), (3, 20, 64), (1, 7, 64), (2, 100, 256), (2, 13, 64)):
        ids = prompt(batch, tokens)
        want = decode(model, new_cache(model, kind, length), ids, steps=4)
        cache = new_cache(model, kind, length)
        torch.testing.assert_close(decode(compiled, cache, ids, steps=4), want, atol=1e-4, rtol=0)
        assert all(isinstance(t, CacheHandle) for layer in cache.layers for t in (layer.keys, layer.values))
        del cache
    gc.collect()
    assert report(model).held().total == 0


@KINDS_OF_CACHE
def test_two_caches_side_by_side(kind, spec, no_inductor):
    model = tiny("llama", layers=1)
    compiled = torch.compile(model, backend="kvc", options=spec)
    prompts = [prompt(tokens=60, seed=s) for s in (1, 2)]
    want = [decode(compiled, new_cache(model, kind, 128), ids, steps=6) for ids in prompts]
    assert not torch.allclose(want[0], want[1], atol=1e-2)
    caches = [new_cache(model, kind, 128) for _ in prompts]
    logits = [[decode(compiled, c, ids, steps=0)] for c, ids in zip(caches, prompts, strict=True)]
    with torch.no_grad():
        for _ in range(6):
            for cache, mine in zip(caches, logits, strict=True):
                token = mine[-1][:, -1:].argmax(-1)
                mine.append(compiled(input_ids=token, past_key_values=cache).logits)
    for mine, alone in zip(logits, want, strict=True):
        torch.testing.assert_close(torch.cat(mine, 1), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_copy_of_a_cache_goes_its_own_way(kind, no_inductor):
    model = tiny("llama", layers=1)
    compiled = torch.compile(model, backend="kvc", options="int4")
    cache, ids, other = new_cache(model, kind, 128), prompt(tokens=60), prompt(tokens=5, seed=3)
    decode(compiled, cache, ids, steps=0)
    copied = copy.deepcopy(cache)
    want = decode(compiled, cache, other, steps=3)
    gc.collect()  # compiling leaves cycles that hold the arguments of the call it was for
    assert report(model).held().total == live_arenas(), "the copy is counted"
    torch.testing.assert_close(decode(compiled, copied, other, steps=3), want, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["static", None])
def test_many_generations_leak_nothing(kind, no_inductor):
    model, ids = tiny("llama", layers=1), prompt()
    compiled = torch.compile(model, backend="kvc", options="int4")

    def run(times: int) -> tuple[int, int, int]:
        for _ in range(times):
            compiled.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, cache_implementation=kind)
        found = tensors()
        with open("/proc/self/statm") as f:
            resident = int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return sum(handle.held().values()), len(found), resident

    model._cache = None  # `generate` may keep a static cache for the next call
    held, count, resident = run(10)
    after = run(200 if kind is None else 50)
    assert after[0] <= held and after[1] <= count + 2
    assert after[2] < resident + 16 * 2**20
    assert len(handle._live) <= 4


# ---------------------------------------------------------------- one graph


@pytest.mark.parametrize(("spec", "steps"), [(LOSSLESS, 64), pytest.param("int4", 512, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_no_recompile_over_512_steps(kind, spec, steps, compiles, no_inductor):
    """One graph for prefill and one for decode; the growing cache's length is no constant in either."""
    model, ids = tiny("llama", layers=1), prompt()
    compiled = torch.compile(model, backend="kvc", options=spec)
    cache = new_cache(model, kind, 1024)
    decode(compiled, cache, ids, steps=steps)
    assert cache.get_seq_length() == 13 + steps
    assert len(compiles) == 2
    decode(compiled, new_cache(model, kind, 1024), ids, steps=3)
    assert len(compiles) == 2, "nor for a second cache"
    assert Layout.parse(cache.layers[0].keys.layout_key).codec.kind == ("raw" if spec == LOSSLESS else "int")
