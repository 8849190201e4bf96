"""A handle in eager code: reads give the dequantised content, appends append, all else is a clear error."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch

import kvc_compile.backend as backend
from kvc_compile.handle import CacheHandle, held
from kvc_compile.kernels import reference
from kvc_compile.layout import Codec, Layout
from kvc_compile.lowering import ops
from models import decode, new_cache, prompt, tiny

LAYOUTS = {
    "raw": Layout(Codec("raw"), 2, 16, "float32"),
    "int4": Layout(Codec("int", 4, (32, 1), True), 2, 16, "float32", sink=4, recent=40, flush=32),
    "int8": Layout(Codec("int", 8, (1, 16)), 2, 16, "float32", recent=16),
}
N, ROOM = 100, 128


def make(name: str = "int4", static: bool = True, tokens: int = N) -> CacheHandle:
    layout = LAYOUTS[name]
    torch.manual_seed(0)
    arena = ops.encode(torch.randn(2, 2, tokens, 16), ROOM, layout.key)
    return CacheHandle(arena, layout.key, ROOM if static else tokens, static)


@pytest.fixture(params=LAYOUTS)
def handle(request) -> CacheHandle:
    return make(request.param)


# ---------------------------------------------------------------- reads

READS = {
    "add": lambda x: x + 1,
    "radd": lambda x: 2 * x,
    "cat": lambda x: torch.cat([x, x], 2),
    "cat_plain": lambda x: torch.cat([torch.zeros(2, 2, 3, 16), x], 2),
    "index_select": lambda x: x.index_select(0, torch.tensor([1, 0, 1])),
    "index": lambda x: x[torch.tensor([1, 0])],
    "slice": lambda x: x[:, :, 5:50],
    "last": lambda x: x[..., -1, :],
    "crop": lambda x: x[..., :-3, :],
    "double": lambda x: x.to(torch.float64),
    "half": lambda x: x.half(),
    "transpose": lambda x: x.transpose(1, 2).reshape(2, -1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 0),
    "sum": lambda x: x.sum((0, 3)),
    "stack": lambda x: torch.stack([x, x]),
    "matmul": lambda x: x @ x.transpose(2, 3),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "into": lambda x: torch.empty(x.shape).copy_(x),
    "tolist": lambda x: torch.tensor(x.tolist()),
}


ROWS = ("index_select", "index", "repeat_interleave")  # whole sequences stay compressed


@pytest.mark.parametrize("read", READS)
def test_a_read_is_of_the_dequantised_content(read, handle):
    dense, before = handle.dense(), handle.arena.clone()
    got = READS[read](handle)
    assert type(got) is (CacheHandle if read in ROWS else torch.Tensor)
    got = got.dense() if read in ROWS else got
    torch.testing.assert_close(got, READS[read](dense), atol=0, rtol=0)
    assert dense[:, :, :N].any() and not dense[:, :, N:].any()
    assert torch.equal(handle.arena, before)


def test_equal_and_properties(handle):
    assert torch.equal(handle, handle.dense()) and torch.allclose(handle, handle.dense())
    assert handle.shape == (2, 2, ROOM, 16) and handle.dtype == torch.float32 and handle.device.type == "cpu"
    assert not handle.requires_grad and handle.dim() == 4 and handle.numel() == 2 * 2 * ROOM * 16


def test_a_dense_copy_is_a_copy(handle):
    """Writing to what was read does not reach the cache."""
    before = handle.arena.clone()
    for copied in (handle.dense(), handle[:, :, :4], handle.transpose(1, 2)):
        copied.fill_(7)
    assert torch.equal(handle.arena, before)


def test_it_prints(handle):
    for text in (repr(handle), str(handle), f"{handle}", repr([handle])):
        assert "CacheHandle((2, 2, 128, 16), torch.float32" in text


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize("how", [torch.clone, copy.copy, copy.deepcopy, torch.detach])
def test_copies_stay_compressed(how, handle):
    copied = how(handle)
    assert isinstance(copied, CacheHandle) and copied.layout_key == handle.layout_key and copied.static == handle.static
    assert torch.equal(copied, handle.dense())
    shared = copied.arena.data_ptr() == handle.arena.data_ptr()
    assert shared == (how in (copy.copy, torch.detach))
    copied.zero_()
    assert bool(handle.dense().any()) != shared


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_copied_cache_is_independent(kind, monkeypatch):
    monkeypatch.setattr(backend, "lower", lambda gm, inputs, request, births: gm.forward)
    model = tiny("llama", layers=1)
    compiled = torch.compile(model, backend="kvc", options="int4")
    cache = new_cache(model, kind, ROOM)
    decode(compiled, cache, prompt(tokens=60), steps=0)
    gc.collect()
    before, total = cache.layers[0].keys.dense(), sum(held().values())
    copied = copy.deepcopy(cache)
    size = sum(t.arena.nbytes for layer in copied.layers for t in (layer.keys, layer.values))
    assert sum(held().values()) == total + size, "the copy is counted"
    decode(compiled, copied, prompt(tokens=5, seed=1), steps=2)
    assert torch.equal(cache.layers[0].keys, before)
    assert copied.get_seq_length() == 67 and cache.get_seq_length() == 60
    copied.reset()
    assert torch.equal(cache.layers[0].keys, before)


def test_reordering_a_batch(handle):
    """What beam search does: rows chosen by index."""
    order = torch.tensor([1, 1])
    chosen = handle.index_select(0, order)
    assert isinstance(chosen, CacheHandle) and torch.equal(chosen, handle.dense().index_select(0, order))


def test_copy_from_another_handle():
    a, b = make(), make()
    b.zero_()
    assert not b.dense().any()
    b.copy_(a)
    assert torch.equal(b, a.dense()) and b.arena.data_ptr() != a.arena.data_ptr()


@pytest.mark.parametrize("save", ["pickle", "torch"])
def test_saving_keeps_the_compressed_content(save, handle):
    file = io.BytesIO()
    (pickle if save == "pickle" else torch).__dict__["dump" if save == "pickle" else "save"](handle, file)
    assert file.tell() < 2 * handle.arena.nbytes + 10_000
    file.seek(0)
    loaded = pickle.load(file) if save == "pickle" else torch.load(file, weights_only=False)
    assert isinstance(loaded, CacheHandle) and torch.equal(loaded, handle.dense())
    before = handle.arena.clone()
    loaded.zero_()
    assert torch.equal(handle.arena, before)


# ---------------------------------------------------------------- writes


def test_zero_empties_it(handle):
    assert handle.zero_() is handle
    assert not handle.dense().any() and reference.lengths(reference.views(handle.arena, handle.stored)) == (0, 0)
    x = torch.randn(2, 2, 1, 16)
    handle.index_copy_(2, torch.tensor([0]), x)
    torch.testing.assert_close(handle[:, :, :1], x, atol=0.03, rtol=0)


def test_fill_with_zero_empties_it(handle):
    handle.fill_(0)
    assert not handle.dense().any()


WRITES = {
    "add_": lambda x: x.add_(1),
    "mul_": lambda x: x.mul_(2),
    "iadd": lambda x: x.__iadd__(1),
    "fill_": lambda x: x.fill_(3.0),
    "copy_plain": lambda x: x.copy_(torch.zeros(2, 2, ROOM, 16)),
    "masked_fill_": lambda x: x.masked_fill_(torch.ones(2, 2, ROOM, 16, dtype=torch.bool), 0),
    "index_copy_0": lambda x: x.index_copy_(0, torch.tensor([0]), torch.zeros(1, 2, ROOM, 16)),
    "index_add_": lambda x: x.index_add_(2, torch.tensor([0]), torch.zeros(2, 2, 1, 16)),
    "index_put_rows": lambda x: x.__setitem__(torch.tensor([0]), torch.zeros(1, 2, ROOM, 16)),
    "accumulate": lambda x: torch.ops.aten.index_put_(
        x, (None, None, torch.tensor([N])), torch.zeros(2, 2, 1, 16), accumulate=True
    ),
    "scatter_": lambda x: x.scatter_(2, torch.zeros(2, 2, 1, 16, dtype=torch.int64), 1.0),
    "clamp_": lambda x: x.clamp_(0, 1),
    "out": lambda x: torch.add(torch.zeros(2, 2, ROOM, 16), 1, out=x),
    "normal_": lambda x: x.normal_(),
}


@pytest.mark.parametrize("write", WRITES)
def test_other_writes_are_errors(write, handle):
    before = handle.arena.clone()
    with pytest.raises(NotImplementedError, match="writes to a compressed cache, which takes appends at its end"):
        WRITES[write](handle)
    assert torch.equal(handle.arena, before)


SLICE_WRITES = {
    "setitem_slice": lambda x: x.__setitem__((slice(None), slice(None), slice(3, 4)), torch.ones(2, 2, 1, 16)),
    "setitem_int": lambda x: x.__setitem__(0, torch.ones(2, ROOM, 16)),
    "setitem_scalar": lambda x: x.__setitem__((Ellipsis, slice(0, 2), slice(None)), 0.0),
}


@pytest.mark.parametrize("write", SLICE_WRITES)
def test_writes_by_slice_are_errors(write, handle):
    """`x[..., 3:4, :] = y` writes to a view, and a read's result is no view: it must not vanish."""
    before = handle.arena.clone()
    with pytest.raises(NotImplementedError, match="compressed cache"):
        SLICE_WRITES[write](handle)
    assert torch.equal(handle.arena, before)


@pytest.mark.parametrize("how", ["index_copy_", "index_copy_-2", "setitem", "setitem_slice"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_appending(name, how):
    handle, x = make(name), torch.randn(2, 2, 5, 16)
    want, positions = handle.dense(), torch.arange(N, N + 5)
    if how == "setitem":
        handle[:, :, positions] = x
    elif how == "setitem_slice":
        handle[:, :, N : N + 5] = x
    else:
        assert handle.index_copy_(-2 if how.endswith("2") and "-" in how else 2, positions, x) is handle
    got = handle.dense()
    twin = make(name)
    ops.append(twin.arena, x, positions, twin.layout_key, [])
    assert torch.equal(got, twin.dense()) and not got[:, :, N + 5 :].any()
    tolerance = 0 if name == "raw" else 0.3 if name == "int4" else 0.03
    torch.testing.assert_close(got[:, :, N : N + 5], x, atol=tolerance, rtol=0)
    torch.testing.assert_close(got[:, :, :N], want[:, :, :N], atol=2 * tolerance, rtol=0)


@pytest.mark.parametrize("start", [0, 3, 37, 70, 99])
@pytest.mark.parametrize("name", LAYOUTS)
def test_rewinding_keeps_the_prefix(name, start):
    handle, x = make(name), torch.randn(2, 2, 2, 16)
    want = handle.dense()[:, :, :start]
    handle.index_copy_(2, torch.arange(start, start + 2), x)
    got = handle.dense()
    tolerance = 0 if name == "raw" else 0.3 if name == "int4" else 0.03
    torch.testing.assert_close(got[:, :, :start], want, atol=tolerance / 2, rtol=0)
    torch.testing.assert_close(got[:, :, start : start + 2], x, atol=tolerance, rtol=0)
    assert not got[:, :, start + 2 :].any()


@pytest.mark.parametrize(
    ("positions", "says"),
    [([N, N + 2], "consecutive"), ([N + 1, N], "consecutive"), ([N, N], "consecutive"), ([N + 1, N + 2], "holds 100")],
)
def test_positions_that_are_no_append(positions, says, handle):
    before = handle.arena.clone()
    with pytest.raises(ValueError, match=says):
        handle.index_copy_(2, torch.tensor(positions), torch.randn(2, 2, 2, 16))
    assert torch.equal(handle.arena, before)


def test_branching_a_growing_cache_is_an_error(monkeypatch):
    """The same past continued twice: the arena was extended in place, and the second use would see the first's."""
    monkeypatch.setattr(backend, "lower", lambda gm, inputs, request, births: gm.forward)
    model, ids = tiny("llama", layers=1), prompt()
    compiled = torch.compile(model, backend="kvc", options="int4")
    cache = new_cache(model, "dynamic")
    decode(compiled, cache, ids, steps=2)
    old = copy.copy(cache.layers[0])  # the same tensors
    with torch.no_grad():
        compiled(input_ids=ids[:, :1], past_key_values=cache)
        cache.layers[0] = old
        with pytest.raises(RuntimeError, match="of 15 tokens was already extended to 16; copy.deepcopy the cache"):
            compiled(input_ids=ids[:, :1], past_key_values=cache)


# ---------------------------------------------------------------- operators


def samples(op: str, name: str):
    layout, key = LAYOUTS[name], LAYOUTS[name].key
    arena, x = make(name).arena, torch.randn(2, 2, 1, 16)
    if op == "empty":
        return (x, 2, ROOM, key)
    if op == "encode":
        return (torch.randn(2, 2, 50, 16), ROOM, key)
    if op == "append":
        return (arena, x, torch.tensor([N]), key, [x])
    if op == "extend":
        return (arena, torch.randn(2, 2, 7, 16), key)
    if op == "read":
        return (arena, ROOM, key, False)
    if op == "length":
        return (arena, key)
    assert op == "attend" and layout
    mask = torch.zeros(2, 1, 1, ROOM, dtype=torch.bool)
    mask[..., : N + 1] = True
    return (
        torch.randn(2, 4, 1, 16),
        arena,
        arena.clone(),
        x,
        x.clone(),
        mask,
        torch.tensor([N]),
        False,
        0.25,
        key,
        key,
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["raw", "int4"])
@pytest.mark.parametrize("op", ["empty", "encode", "append", "extend", "read", "length", "attend"])
def test_opcheck(op, name, dynamic):
    tests = ["test_schema", "test_faketensor"]
    tests += ["test_aot_dispatch_dynamic"] if dynamic else ["test_aot_dispatch_static"]
    torch.library.opcheck(getattr(torch.ops.kvc, op).default, samples(op, name), test_utils=tests)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("op", ["encode", "extend"])
def test_fake_sizes_are_the_real_ones(op, name):
    args = samples(op, name)
    real = getattr(torch.ops.kvc, op)(*args)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = getattr(torch.ops.kvc, op)(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
    assert fake.shape == real.shape and fake.dtype == real.dtype and fake.stride() == real.stride()
