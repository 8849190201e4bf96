"""Every variant that tuning may choose computes the same: attention over what the cache holds."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from kvc_compile.kernels import reference
from kvc_compile.kernels.form import form
from kvc_compile.lowering import launch, replay, tuned
from kvc_compile.lowering.candidates import SHARES, candidates, fits
from kvc_compile.lowering.decoding import Tiles, tiles
from kvc_compile.lowering.tuning import Unfit

from .caches import error, filled, keys, layout, values
from .test_decode import difference, tolerance

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:All-NaN")

# keys, values, dtype, mask; one of each kind of span, and unequal ones
DECODING = [
    ("int4z.64x1", "int4z.1x64", "float16", "causal"),
    ("int8z.64x1", "int8z.1x64", "float16", "bool"),
    ("int2z.32x1", "int2z.1x64", "float16", "none"),
    ("int4z.128x1", "int4z.1x32", "float16", "add_h"),
    ("int3z.64x1", "int8.1x64", "float16", "none"),
    ("int4z.1x32", "int4z.1x64", "float16", "causal"),
    ("raw", "raw", "float16", "add_h"),
    ("fp8", "int2z.1x64", "float16", "none"),
]


@pytest.mark.parametrize("k, v, dtype, mask", DECODING)
def test_variants_of_the_decoding_kernel(device, k, v, dtype, mask):
    kl, vl = layout(k, 1, 64, dtype, 16), layout(v, 1, 64, dtype, 16, recent=30)
    found = candidates(form(kl), form(vl), 2, getattr(torch, dtype))
    variants = found[: len(found) // len(SHARES)]
    assert isinstance(variants[0], Tiles) and len(variants) > 3
    sizes = {(t.BM, t.BT, t.TP, t.CK, t.CV): t for t in reversed(variants)}  # nothing else matters to the interpreter
    for t in sizes.values():
        assert difference(device, kl, vl, 2, 300, 1, mask, 2, t, batch=1) < tolerance(kl, vl), t


@pytest.mark.parametrize("dtype", ("float32", "float16"))
def test_variants_of_the_general_kernel(device, dtype):
    kl, vl = layout("int4z.32x1", 1, 32, dtype, 8), layout("int4z.1x32", 1, 32, dtype, 8)
    kx, vx, q = keys(1, 1, 240, 32, dtype), values(1, 1, 240, 32, dtype), values(1, 1, 40, 32, dtype)
    ka, va = filled(200, 240, kx, kl), filled(200, 240, vx, vl)
    rest = (kx[:, :, 200:], vx[:, :, 200:], None, None, True, 0.2, kl, vl)
    expected = reference.attend(q.float(), ka, va, *rest)
    found = candidates(form(kl), form(vl), 64, getattr(torch, dtype))
    on_device = [x.to(device) for x in (q, ka, va, *rest[:2])]
    for b in {(b.BM, b.BN): b for b in found}.values():
        out = launch.attend(*on_device, *rest[2:], splits=2, tiles=b)
        assert error(out, expected) < (1e-5 if dtype == "float32" else 3e-3), b


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_bench_refuses_what_differs(monkeypatch):
    """What is timed on a GPU, run on the CPU: scratch caches that every variant attends to alike."""
    gpu = SimpleNamespace(L2_cache_size=1 << 18, multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (64 << 20, 80 << 20))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(replay.GraphBench, "replayed", lambda self, c: 5.0)
    kl, vl = layout("int4z.64x1", 1, 64, "float16", 16), layout("int4z.1x64", 1, 64, "float16", 16, recent=30)
    p = tuned.Problem(kl, vl, 2, 1, torch.float16, 1, 600)
    made = replay.GraphBench(p, torch.device("cpu"))
    assert sum(x.nbytes for pair in made.caches for x in pair) > 4 * gpu.L2_cache_size
    assert len({x.data_ptr() for pair in made.caches for x in pair}) == 2 * len(made.caches) > 4
    assert [made.time(c) for c in p.candidates[:2]] == [5.0, 5.0] and made.expected.norm() > 0
    made.new[0].neg_()  # other queries: as if the variant were wrong
    with pytest.raises(Unfit, match="differs"):
        made.time(p.candidates[1])
    made.new[0].fill_(torch.nan)
    with pytest.raises(Unfit, match="differs"):
        made.time(p.candidates[1])


def test_the_rule_fits():
    """What the rule picks is within what the variants are held to, for every pair of codecs that it takes."""
    kinds = [f"int{b}z" for b in (8, 4, 3, 2, 1)] + ["fp8", "raw"]
    taken = 0
    for k in (f"{kind}.{block}" for kind in kinds for block in ("16x1", "32x1", "64x1", "128x1", "1x64")):
        for v in (f"{kind}.1x64" for kind in kinds):
            kl, vl = (layout(x.partition(".")[0] if x[:3] == "raw" else x, 1, 128, "float16", 16) for x in (k, v))
            for rows in (1, 8, 16, 32):
                t = tiles(form(kl), form(vl), rows, torch.float16)
                taken += t is not None
                assert t is None or fits(t, form(kl), form(vl)), (k, v, rows, t)
    assert taken > 500
