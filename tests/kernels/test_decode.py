"""The decoding kernel equals the reference for every pair of codecs, shape and mask, before its output is rounded."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from kvc_compile.kernels import reference
from kvc_compile.kernels.form import form
from kvc_compile.layout import Layout
from kvc_compile.lowering import decoding, launch

from .caches import error, filled, keys, layout, values
from .test_attend import make_mask

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")

# keys, values, dtype, Dk, Dv, kv heads, groups, cached, new, mask, splits, sink
CASES = [
    ("int4z.64x1", "int4z.1x128", "float16", 128, 128, 1, 4, 300, 1, "none", 1, 4),
    ("int4z.32x1", "int4z.1x64", "bfloat16", 128, 128, 1, 4, 400, 1, "bool", 2, 4),
    ("int4z.32x1", "int4z.1x32", "float16", 64, 64, 2, 3, 300, 1, "causal", 2, 4),
    ("int2z.16x1", "int2z.1x64", "float16", 64, 64, 1, 7, 500, 1, "none", 2, 4),
    ("int2z.128x1", "int2z.1x128", "bfloat16", 128, 128, 1, 1, 600, 1, "none", 3, 0),
    ("int8.1x64", "int8.1x64", "float16", 64, 64, 2, 3, 200, 1, "causal", 2, 0),
    ("int8z.64x1", "int8z.1x128", "float16", 128, 128, 1, 4, 300, 1, "bool", 2, 4),
    ("int8z.32x1", "int8z.1x32", "bfloat16", 64, 64, 1, 8, 300, 1, "none", 1, 20),
    ("int3z.32x1", "int3z.1x64", "float16", 64, 64, 1, 2, 600, 1, "none", 2, 4),
    ("int1z.64x1", "int1z.1x32", "float16", 32, 32, 1, 2, 700, 1, "causal", 2, 4),
    ("int8z.64x1", "int4z.1x64", "float16", 64, 64, 1, 4, 300, 1, "none", 2, 4),
    ("int4z.64x1", "int2z.1x64", "bfloat16", 64, 64, 1, 4, 400, 1, "bool", 2, 4),
    ("int2z.32x1", "int8.1x64", "float16", 64, 64, 1, 4, 400, 1, "none", 2, 4),
    ("int3z.64x1", "int1z.1x64", "float16", 64, 64, 1, 4, 600, 1, "none", 2, 4),
    ("int1.64x1", "int3.1x64", "float16", 64, 64, 1, 4, 600, 1, "none", 2, 4),
    ("raw", "raw", "float16", 64, 64, 1, 4, 200, 1, "bool", 2, 0),
    ("raw", "raw", "bfloat16", 128, 64, 1, 4, 200, 1, "none", 2, 0),
    ("raw", "int4z.1x64", "bfloat16", 64, 64, 1, 4, 300, 1, "none", 2, 4),
    ("int4z.64x1", "raw", "bfloat16", 64, 64, 1, 4, 300, 1, "causal", 2, 4),
    ("fp8", "fp8", "float16", 64, 64, 1, 4, 200, 1, "none", 2, 0),
    ("fp8.64x1", "fp8.1x64", "bfloat16", 64, 64, 1, 4, 200, 1, "bool", 2, 4),
    ("fp8.16x1", "fp8.1x64", "float16", 64, 64, 1, 4, 200, 1, "none", 2, 4),
    ("int4z.1x32", "int4z.1x32", "float16", 64, 64, 1, 4, 300, 1, "none", 2, 4),
    ("int4z.32x8", "int4z.1x64", "float16", 64, 64, 1, 4, 300, 1, "none", 2, 4),
    # channels that are no power of two, more of them, and keys wider than values
    ("int4z.64x1", "int4z.1x96", "float16", 96, 96, 1, 2, 300, 1, "none", 2, 4),
    ("int4z.64x1", "int4z.1x80", "bfloat16", 80, 80, 1, 2, 300, 1, "bool", 2, 4),
    ("int4z.64x1", "int4z.1x256", "float16", 256, 256, 1, 2, 200, 1, "none", 2, 4),
    ("int8z.64x1", "int8z.1x128", "bfloat16", 192, 128, 1, 16, 200, 1, "none", 2, 4),
    # more queries, and masks with something to them
    ("int4z.64x1", "int4z.1x64", "float16", 64, 64, 2, 4, 300, 5, "causal", 2, 4),
    ("int4z.64x1", "int4z.1x64", "bfloat16", 64, 64, 1, 2, 300, 7, "bool", 2, 4),
    ("int2z.64x1", "int2z.1x64", "float16", 64, 64, 1, 4, 400, 3, "add_h", 2, 4),
    ("int8z.64x1", "int8z.1x64", "float16", 64, 64, 1, 2, 300, 1, "add_inf", 2, 4),
    ("raw", "raw", "float16", 64, 64, 2, 2, 200, 4, "add", 3, 0),
    ("int4z.64x1", "int4z.1x64", "float16", 64, 64, 1, 4, 300, 1, "padded", 2, 4),
    ("int4z.64x1", "int4z.1x64", "float16", 64, 64, 1, 4, 500, 2, "padded_add", 3, 4),
    # little or nothing in the body
    ("int4z.64x1", "int4z.1x64", "float16", 64, 64, 1, 4, 40, 1, "none", 2, 4),
    ("int4z.64x1", "int4z.1x64", "float16", 64, 64, 1, 4, 2, 1, "bool", 1, 4),
    ("int4z.64x1", "int4z.1x64", "bfloat16", 64, 64, 1, 4, 0, 2, "causal", 1, 4),
]


def window(kind: str, batch: int, heads: int, n: int, cached: int, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask; "padded" hides the beginning of each row, as left padding does, and what a query must not see."""
    if not kind.startswith("padded"):
        return make_mask(kind, batch, heads, n, cached, dtype)
    seen = torch.ones(batch, 1, n, cached + n + 5, dtype=torch.bool).tril(cached)
    for row in range(batch):
        seen[row, ..., : 7 + 70 * row] = False
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype) if kind.endswith("add") else seen


def difference(device, kl, vl, groups, cached, n, mask, splits, tiles=None, batch=2, cap=0.0, shares=False, shown=None):
    """The relative error of the kernel's fp32 output; both caches are filled with fresh random contents."""
    dtype, heads = kl.dtype, kl.heads
    kx, vx = keys(batch, heads, cached + n, kl.channels, dtype), values(batch, heads, cached + n, vl.channels, dtype)
    ka, va = filled(cached, cached + n + 40, kx, kl), filled(cached, cached + n + 40, vx, vl)
    q = values(batch, heads * groups, n, kl.channels, dtype)
    new = kx[:, :, cached:], vx[:, :, cached:]
    sinks = torch.linspace(-2, 6, heads * groups).to(q.dtype) if shares else None
    rest = (None, mask == "causal", kl.channels**-0.5 / 2, kl, vl, cap)
    seen = window(mask, batch, heads * groups, n, cached if shown is None else min(cached, shown), q.dtype)
    expected = exact(q, ka, va, new, seen, rest, sinks, cached if shown is None else shown)
    on_device = [x if x is None else x.to(device) for x in (q, ka, va, *new, seen, sinks)]
    out = torch.full(expected.shape, torch.nan, dtype=torch.float32, device=device)
    launch.attend(*on_device[:6], *rest, on_device[6], shown, splits=splits, tiles=tiles, out=out)
    return error(out, expected)


def exact(q, ka, va, new, seen, rest, sinks=None, shown=1 << 30):
    """Attention in float64 over the last `shown` tokens that the arenas hold, decoded."""
    _, causal, scale, kl, vl, cap = rest
    length = reference.lengths(reference.views(ka, kl))[0]
    first = max(0, length - shown)
    k = torch.cat([decoded(ka, kl, length)[:, :, first:], new[0].double()], 2)
    v = torch.cat([decoded(va, vl, length)[:, :, first:], new[1].double()], 2)
    groups, n, total = q.shape[1] // kl.heads, q.shape[2], k.shape[2]
    s = q.double() @ k.repeat_interleave(groups, 1).transpose(-1, -2) * scale
    if cap:
        s = torch.tanh(s / cap) * cap
    if seen is not None:
        seen = seen[..., :total]
        s = s.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else s + seen.double()
    elif causal:
        s = s.masked_fill(~torch.ones(n, total, dtype=torch.bool, device=s.device).tril(total - n), -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.double()[None, :, None, None].expand(*s.shape[:3], 1)], -1)
    return torch.softmax(s, -1)[..., :total].nan_to_num(0.0) @ v.repeat_interleave(groups, 1)


def decoded(data, layout, length):
    """The tokens of an arena in float64, not rounded to the model's dtype."""
    v = reference.views(data, layout)
    _, encoded = reference.lengths(v)
    exact = reference.read(data, layout, 0, length).double()
    if encoded:
        unit = -(-encoded // layout.unit) * layout.unit
        planes, params = reference.body_slices(v, layout, 0, unit)
        body = reference.decode_body(planes, params, replace(layout, dtype="float32")).double()[:, :, :encoded]
        exact[:, :, layout.sink : layout.sink + encoded] = body
    return exact


def tolerance(*layouts):
    """16-bit operands are rounded as any attention in that dtype rounds them; codes are exact."""
    if any(form.codec.kind == "raw" and form.dtype == "bfloat16" for form in layouts):
        return 4e-3
    return 2e-3 if min(form.codec.bits for form in layouts) < 4 else 1e-3


@pytest.mark.parametrize("k, v, dtype, dk, dv, heads, groups, cached, n, mask, splits, sink", CASES)
def test_decoding_equals_the_reference(device, k, v, dtype, dk, dv, heads, groups, cached, n, mask, splits, sink):
    kl, vl = layout(k, heads, dk, dtype, 16, sink), layout(v, heads, dv, dtype, 16, sink, recent=30)
    assert decoding.tiles(form(kl), form(vl), n * groups, getattr(torch, dtype)) is not None
    assert difference(device, kl, vl, groups, cached, n, mask, splits) < tolerance(kl, vl)


@pytest.mark.parametrize(
    "k, v, groups, cached, n, mask, splits, cap, shares",
    [
        ("int4z.64x1", "int4z.1x64", 4, 300, 1, "none", 1, 3.0, True),
        ("int4z.64x1", "int4z.1x64", 2, 300, 3, "add_h", 3, 0.7, False),
        ("int4z.64x1", "int4z.1x64", 2, 200, 3, "add_h", 3, 0.0, True),
        ("int8.1x64", "int8.1x64", 3, 200, 1, "causal", 2, 0.7, False),
        ("int8.1x64", "int8.1x64", 3, 200, 1, "causal", 2, 3.0, True),
        ("int2z.32x1", "raw", 4, 400, 1, "padded", 2, 0.0, True),
        ("raw", "raw", 4, 0, 1, "none", 1, 0.7, False),
        ("raw", "raw", 4, 0, 1, "none", 1, 3.0, True),
    ],
)
def test_capped_scores_and_sinks(device, k, v, groups, cached, n, mask, splits, cap, shares):
    kl, vl = layout(k, 2, 64, "float16", 16, 4), layout(v, 2, 64, "float16", 16, 4, recent=30)
    assert difference(device, kl, vl, groups, cached, n, mask, splits, cap=cap, shares=shares) < tolerance(kl, vl)


@pytest.mark.parametrize(
    "k, v, groups, n, mask, splits, shown",
    [("int4z.64x1", "int4z.1x64", 4, 1, "none", 3, tokens) for tokens in (0, 1, 33, 295, 400)]
    + [("int4z.64x1", "int2z.1x64", 2, 3, "causal", 2, tokens) for tokens in (2, 299)]
    + [("int8.1x64", "int8.1x64", 3, 1, "bool", 2, tokens) for tokens in (290,)]
    + [("raw", "raw", 2, 2, "padded_add", 1, tokens) for tokens in (100,)],
)
def test_sliding_windows(device, k, v, groups, n, mask, splits, shown):
    """Only the last tokens of the cache are seen, and the mask begins at the first of them."""
    kl, vl = layout(k, 2, 64, "float16", 16, 4), layout(v, 2, 64, "float16", 16, 4, recent=30)
    assert difference(device, kl, vl, groups, 300, n, mask, splits, shown=shown) < tolerance(kl, vl)


def test_every_kind_of_tile_has_a_split():
    for t in (decoding.Tiles(8, tile, 16, 64, 64, 1, 3) for tile in (32, 64, 128)):
        for splits in (1, 2, 3, 8, 33, 132):
            for tokens in (0, 100, 4160, 131072):
                first, last = decoding.apart(t, 7, splits, tokens)
                assert 0 < first <= splits and 0 <= last < splits and last in (0, first)


@pytest.mark.parametrize("splits, first, last", [(9, 9, 0), (9, 8, 8), (12, 5, 5), (12, 10, 3)])
def test_splits_that_take_a_part_of_the_work(device, monkeypatch, splits, first, last):
    """Some splits take body tiles only, or none; whatever is left takes the other tokens."""
    monkeypatch.setattr(decoding, "apart", lambda *_: (first, last))
    kl, vl = layout("int4z.32x1", 1, 64, "float16", 16), layout("int4z.1x64", 1, 64, "float16", 16, recent=30)
    assert difference(device, kl, vl, 4, 700, 1, "bool", splits) < 1e-3


@pytest.mark.parametrize("splits", (1, 3))
@pytest.mark.parametrize("misuse", ("fault", "lengths", "start", "short mask", "mask beyond the end"))
def test_a_misused_cache_gives_nan(device, misuse, splits):
    kl, vl = layout("int4z.32x1", 1, 64, "float16", 16), layout("int4z.1x64", 1, 64, "float16", 16, recent=30)
    kx, vx = keys(1, 1, 101, 64, "float16"), values(1, 1, 101, 64, "float16")
    ka, va = filled(100, 140, kx, kl), filled(100, 140, vx, vl)
    mask = positions = None
    header = reference.views(va, vl).header
    if misuse == "fault":
        header[..., reference.FAULT] = 1
    elif misuse == "lengths":
        header[..., reference.LENGTH] = 99
    elif misuse == "start":
        positions = torch.tensor([101], device=device)
    else:
        width = 100 if misuse == "short mask" else 110
        mask = torch.ones(1, 1, 1, width, dtype=torch.bool, device=device)
    inputs = [x.to(device) for x in (values(1, 4, 1, 64, "float16"), ka, va, kx[:, :, 100:], vx[:, :, 100:])]
    assert launch.attend(*inputs, mask, positions, True, 0.2, kl, vl, splits=splits).isnan().all()


def test_new_tokens_at_any_address(device):
    """Rows of new tokens that do not begin at a multiple of 16 bytes."""
    kl, vl = layout("int4z.32x1", 2, 64, "float16", 16), layout("int4z.1x64", 2, 64, "float16", 16, recent=30)
    kx, vx = keys(1, 2, 201, 64, "float16"), values(1, 2, 201, 64, "float16")
    ka, va = filled(200, 240, kx, kl), filled(200, 240, vx, vl)
    q = values(1, 4, 1, 64, "float16")
    shifted = [torch.nn.functional.pad(x[:, :, 200:], (1, 2)).to(device)[..., 1:-2] for x in (kx, vx)]
    rest = (None, True, 0.2, kl, vl, 0.0)
    out = launch.attend(q.to(device), ka.to(device), va.to(device), *shifted, None, *rest, splits=2)
    assert error(out, exact(q, ka, va, (kx[:, :, 200:], vx[:, :, 200:]), None, rest)) < 1e-3


def takes(k: Layout, v: Layout, rows: int, dtype: torch.dtype) -> bool:
    """Whether attention of so many query rows a kv head goes to this kernel; else it goes to the general one."""
    return decoding.tiles(form(k), form(v), rows, dtype) is not None


def test_what_the_kernel_takes():
    k, v = layout("int4z.32x1", 2, 64, "float16", 16), layout("int4z.1x64", 2, 64, "float16", 16)
    half = torch.float16
    assert takes(k, v, 8, half)
    assert not takes(k, v, 33, half)
    assert not takes(k, v, 8, torch.float32)
    assert not takes(k, replace(v, sink=5), 8, half)
    assert not takes(k, layout("int4z.32x1", 2, 64, "float16", 16), 8, half)  # values by channel
    assert not takes(k, replace(v, word=8), 8, half)
    assert not takes(layout("int4z.48x1", 2, 64, "float16", 16), v, 8, half)  # blocks across tiles


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_random_configurations(device, seed):
    """What is wrong shows as a large error; how exact the kernel is has tests of its own."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    kinds = [f"int{b}{z}" for b in (8, 4, 3, 2, 1) for z in ("z", "")] + ["fp8", "raw"]
    heads, groups, n = dice.randint(1, 2), dice.randint(1, 5), dice.choice((1, 1, 1, 2, 3))
    dk, dv = dice.choice((32, 48, 64, 80, 96)), dice.choice((16, 64))
    dtype, sink, t = dice.choice(("float16", "bfloat16")), dice.choice((0, 1, 4, 16, 20, 37)), dice.choice((16, 32, 64))
    k, v = dice.choice(kinds), dice.choice(kinds)
    k = k if k == "raw" else f"{k}.1x{dk}" if dice.random() < 0.3 else f"{k}.{t}x{dice.choice((1, 8))}"
    v = v if v == "raw" else f"{v}.1x{dice.choice((dv, 16))}"
    kl, vl = layout(k, heads, dk, dtype, 16, sink), layout(v, heads, dv, dtype, 16, sink)
    kl = replace(kl, recent=kl.flush + dice.randint(0, 40))
    vl = replace(vl, recent=dice.choice((1, 5, 16, 33, 60)))
    assert takes(kl, vl, n * groups, getattr(torch, dtype)) or min(dk & -dk, dv) < 16
    cached = dice.randint(90, 300)
    mask = dice.choice(("none", "causal", "bool", "bool_h", "add", "add_inf", "padded", "padded_add"))
    splits = dice.choice((1, 2, 3, 9, None))
    found = difference(device, kl, vl, groups, cached, n, mask, splits, batch=dice.randint(1, 2))
    assert found < 5e-3, (kl.key, vl.key, n, groups, cached, mask, splits)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", (8, 4, 2))
@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
@pytest.mark.parametrize("kind", ("uniform", "peaked", "outliers"))
def test_accuracy_at_every_length(bits, dtype, kind, record_property):
    """64 to 131072 tokens in few and many splits, against float64 on the same cache.

    Uniform attention over zero-mean values is the hard case: the output nearly cancels, and sums are long.
    """
    heads, d, worst = 2, 128, {}
    for length in (64, 4096, 131072):
        kl = layout(f"int{bits}z.64x1", heads, d, dtype, 16)
        vl = layout(f"int{bits}z.1x128", heads, d, dtype, 16)
        kx = torch.randn(1, heads, length + 1, d, device="cuda") + 3 * torch.linspace(-1, 1, d, device="cuda")
        if kind == "outliers":
            kx[..., ::32] = 1000 + 30 * kx[..., ::32]
        kx = kx.to(getattr(torch, dtype))
        kx, kn = kx[:, :, :-1].contiguous(), kx[:, :, -1:].contiguous()
        vx = torch.randn(1, heads, length, d, device="cuda").to(kx.dtype)
        ka, va = reference.empty(1, length, kl, "cuda"), reference.empty(1, length, vl, "cuda")
        launch.append(ka, kx, kl, None)
        launch.append(va, vx, vl, None)
        q, vn = (torch.randn(1, h, 1, d, device="cuda").to(kx.dtype) for h in (4 * heads, heads))
        scale = d**-0.5 * (4 if kind == "peaked" else 1 / 8)
        expected = exact(q, ka, va, (kn, vn), None, (None, True, scale, kl, vl, 0.0))
        for splits in (1, 2, 8, 64, None):
            out = torch.empty(expected.shape, dtype=torch.float32, device="cuda")
            launch.attend(q, ka, va, kn, vn, None, None, True, scale, kl, vl, splits=splits, out=out)
            worst[f"{length}/{splits}"] = error(out, expected)
    record_property("relative_error", worst)
    print(f"{bits} bits, {dtype}, {kind}: {max(worst.values()):.2e}")
    assert max(worst.values()) < (2e-3 if bits == 2 else 1e-3), worst
