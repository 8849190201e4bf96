"""Attention by kernel equals the reference, for every codec, mask and shape, and at every length."""

from __future__ import annotations

import random

import pytest
import torch

from kvc_compile.kernels import reference
from kvc_compile.lowering import launch
from kvc_compile.lowering.general import Blocks

from .caches import error, filled, keys, layout, values

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # masks of -3e38, in the interpreter
TOLERANCE = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}


def make_mask(kind: str, batch: int, heads: int, n: int, length: int, dtype: torch.dtype) -> torch.Tensor | None:
    """A random mask [b, h, n, W] that is wider than the cache and hides what lies beyond it."""
    total = length + n
    if kind in ("none", "causal"):
        return None
    shape = (1 if "1b" in kind else batch, heads if "h" in kind else 1, n, total + 3)
    seen = torch.rand(shape) > 0.4
    seen[..., total:] = False
    if kind.startswith("bool"):
        return seen
    hidden = -torch.inf if "inf" in kind else torch.finfo(dtype).min
    return torch.where(seen, torch.randn(shape), hidden).to(dtype)


# keys, values, dtype, word, Dk, Dv, batch, kv heads, groups, cached, new, mask, splits
CASES = [
    # decode
    ("int8z.64x1", "int8z.1x16", "float16", 8, 16, 16, 2, 2, 1, 150, 1, "none", 1),
    ("int4z.64x1", "int4z.1x64", "float16", 16, 64, 64, 1, 2, 4, 200, 1, "causal", 3),
    ("int4z.64x1", "int2z.1x128", "bfloat16", 8, 128, 128, 1, 1, 7, 200, 1, "bool", 2),
    ("int3z.32x1", "int3z.1x24", "float32", 16, 40, 40, 2, 1, 2, 140, 1, "add_inf", 2),
    ("int2z.16x1", "int1z.1x32", "float32", 16, 32, 32, 1, 1, 3, 300, 1, "bool_h", 4),
    ("int1z.64x1", "int4.1x16", "float32", 8, 16, 16, 1, 2, 1, 170, 1, "add_h", 2),
    ("int4.64x1", "int8.1x80", "float16", 8, 80, 80, 1, 1, 2, 150, 1, "none", 2),
    ("int4z.32x8", "int4z.32x16", "float32", 16, 24, 40, 1, 2, 2, 130, 1, "causal", 2),
    ("fp8", "fp8", "bfloat16", 8, 64, 64, 2, 1, 2, 100, 1, "none", 2),
    ("fp8.64x1", "fp8.1x96", "float32", 8, 96, 96, 1, 1, 2, 150, 1, "bool", 2),
    ("raw", "raw", "float16", 8, 80, 64, 1, 2, 2, 100, 1, "add", 3),
    ("raw", "int4z.1x64", "float32", 8, 16, 64, 1, 1, 20, 100, 1, "causal", 2),
    ("int8z.128x1", "raw", "float16", 16, 256, 256, 1, 1, 2, 300, 1, "causal", 2),
    # chunks
    ("int8z.64x1", "int4z.1x16", "float32", 8, 16, 16, 1, 1, 2, 150, 33, "causal", 2),
    ("int4z.64x1", "int8z.1x32", "bfloat16", 16, 32, 32, 2, 1, 1, 140, 20, "bool_1b", 1),
    ("int2z.64x1", "int2z.1x16", "float16", 8, 16, 16, 1, 2, 3, 150, 70, "causal", 1),
    ("int3z.16x1", "int1.1x16", "float32", 8, 16, 16, 1, 1, 5, 90, 9, "add_h", 2),
    ("fp8", "raw", "float16", 8, 16, 32, 1, 1, 1, 70, 65, "none", 2),
    ("fp8.1x16", "int3.1x16", "float32", 16, 16, 16, 1, 2, 1, 100, 5, "bool_h", 2),
    ("raw", "raw", "bfloat16", 8, 16, 16, 1, 1, 2, 60, 70, "add_1b", 2),
    # an empty cache, one that is all sink, one with nothing encoded
    ("int4z.64x1", "int4z.1x16", "float32", 8, 16, 16, 1, 1, 2, 0, 70, "causal", 2),
    ("int4z.64x1", "int4z.1x16", "float16", 8, 16, 16, 1, 2, 2, 0, 1, "none", 2),
    ("int4z.64x1", "int4z.1x16", "float32", 8, 16, 16, 1, 2, 2, 3, 2, "causal", 2),
    ("int4z.64x1", "int4z.64x1", "float32", 8, 16, 16, 1, 2, 2, 40, 1, "bool", 2),
]


@pytest.mark.parametrize("k, v, dtype, word, dk, dv, batch, heads, groups, cached, n, mask, splits", CASES)
def test_attention_equals_the_reference(
    device, k, v, dtype, word, dk, dv, batch, heads, groups, cached, n, mask, splits
):
    kl, vl = layout(k, heads, dk, dtype, word), layout(v, heads, dv, dtype, 24 - word, recent=70)
    kx, vx = keys(batch, heads, cached + n, dk, dtype), values(batch, heads, cached + n, dv, dtype)
    ka, va = filled(cached, cached + n + 40, kx, kl), filled(cached, cached + n + 40, vx, vl)
    q = values(batch, heads * groups, n, dk, dtype)
    new = kx[:, :, cached:], vx[:, :, cached:]
    window = make_mask(mask, batch, heads * groups, n, cached, q.dtype)
    rest = (None, mask == "causal", dk**-0.5 / 2, kl, vl)
    expected = reference.attend(q, ka, va, *new, window, *rest)
    on_device = [x if x is None else x.to(device) for x in (q, ka, va, *new, window)]
    out = launch.attend(*on_device, *rest, splits=splits)
    assert out.dtype == q.dtype and out.shape == expected.shape
    assert error(out, expected) < TOLERANCE[dtype]


def pair(cached: int, n: int, sink: int = 4, v_sink: int = 4):
    """A cache of `cached` tokens in float32, queries for n more, and the layouts."""
    kl, vl = layout("int8z.32x1", 1, 16, "float32", sink=sink), layout("int4z.1x16", 1, 16, "float32", sink=v_sink)
    kx, vx = keys(2, 1, cached + n, 16, "float32"), values(2, 1, cached + n, 16, "float32")
    arenas = filled(cached, cached + n + 40, kx, kl), filled(cached, cached + n + 40, vx, vl)
    return values(2, 2, n, 16, "float32"), *arenas, kx[:, :, cached:], vx[:, :, cached:], kl, vl


@pytest.mark.parametrize("start", (100, 90, 50, 4, 2, 0))
def test_positions_before_the_end_hide_what_follows_them(device, start):
    q, ka, va, kn, vn, kl, vl = pair(100, 3)
    expected = reference.attend(q, ka, va, kn, vn, None, start, True, 0.2, kl, vl)
    positions = torch.arange(start, start + 3, device=device)
    inputs = [x.to(device) for x in (q, ka, va, kn, vn)]
    out = launch.attend(*inputs, None, positions, True, 0.2, kl, vl, splits=2)
    assert error(out, expected) < 1e-5


@pytest.mark.parametrize("cached, n, splits", ((110, 2, 3), (110, 40, 1), (0, 5, 2)))
@pytest.mark.parametrize("cap, shares, shown", ((0.3, False, None), (0.0, True, 7), (0.6, True, 80), (0.0, False, 0)))
@pytest.mark.parametrize("masked", (False, True))
def test_capped_scores_sinks_and_windows(device, cached, n, splits, cap, shares, shown, masked):
    """Against attention written out over the decoded cache; a share of the softmax has no value, and only the last
    tokens are seen."""
    q, ka, va, kn, vn, kl, vl = pair(cached, n)
    shares = torch.tensor([-1.0, 2.0]) if shares else None
    first = 0 if shown is None else max(0, cached - shown)
    k, v = (
        torch.cat([reference.read(a, form, first, cached), x], 2).repeat_interleave(2, 1)
        for a, x, form in ((ka, kn, kl), (va, vn, vl))
    )
    total = cached - first + n
    s = q @ k.transpose(-1, -2) * 0.2
    s = torch.tanh(s / cap) * cap if cap else s
    seen = torch.ones(n, total, dtype=torch.bool).tril(total - n)[None, None]
    if masked:
        seen = seen & (torch.rand(2, 1, n, total) > 0.3)
        seen[..., -n:] |= torch.eye(n, dtype=torch.bool)
    s = s.masked_fill(~seen, -torch.inf)
    if shares is not None:
        s = torch.cat([s, shares[None, :, None, None].expand(2, -1, n, 1)], -1)
    expected = torch.softmax(s, -1)[..., :total] @ v
    call = [seen if masked else None, None, not masked, 0.2, kl, vl, cap, shares, shown]
    assert error(reference.attend(q, ka, va, kn, vn, *call), expected) < 1e-5
    inputs = [x.to(device) for x in (q, ka, va, kn, vn)]
    call = [x.to(device) if isinstance(x, torch.Tensor) else x for x in call]
    assert error(launch.attend(*inputs, *call, splits=splits), expected) < 1e-5


def prompt_mask(kind: str, n: int, length: int) -> torch.Tensor | None:
    """As models make them for new tokens behind `length` cached ones: two sequences, the second padded on the left."""
    p, i = torch.arange(length + n + 5), torch.arange(n)
    seen = (p <= length + i[:, None]).repeat(2, 1, 1, 1)
    seen[1, ..., : (length + n) // 3] = False
    if "window" in kind:
        seen &= p > length + i[:, None] - 40
    if "hole" in kind:
        seen[0, ..., 20:23] = False
    if not kind.startswith("added"):
        return seen
    added = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    return added - 0.01 * p if "slope" in kind else added


MASKS = ("none", "causal", "seen", "seen window", "seen hole", "added", "added window", "added slope")
SMALL, LARGE = Blocks(32, 16, 4, 3), Blocks(128, 64, 8, 3)
PROMPTS = [
    *((SMALL, 90, 50, 3, mask) for mask in MASKS),
    *((LARGE, 0, 150, 1, mask) for mask in MASKS),
    *((SMALL, 0, 100, 1, mask) for mask in ("causal", "seen", "added slope")),
    *((LARGE, 130, 70, 3, mask) for mask in ("causal", "seen window")),
]


@pytest.mark.parametrize("tiles, cached, n, splits, mask", PROMPTS)
def test_prompts(device, cached, n, splits, mask, tiles):
    """Long ones, whose tiles are mostly seen by all queries or by none, with and without a history."""
    q, ka, va, kn, vn, kl, vl = pair(cached, n, sink=5, v_sink=2)
    window = None if mask in ("none", "causal") else prompt_mask(mask, n, cached)
    rest = (None, mask == "causal", 0.3, kl, vl)
    expected = reference.attend(q, ka, va, kn, vn, window, *rest)
    inputs = [x if x is None else x.to(device) for x in (q, ka, va, kn, vn, window)]
    out = launch.attend(*inputs, *rest, splits=splits, tiles=tiles)
    assert error(out, expected) < 1e-5


@pytest.mark.parametrize("cached, n, shown", ((80, 60, 45), (80, 60, 0), (40, 60, 40)))
@pytest.mark.parametrize("mask", ("none", "causal", "seen", "added slope"))
def test_prompts_over_a_window(device, cached, n, shown, mask):
    q, ka, va, kn, vn, kl, vl = pair(cached, n)
    window = None if mask in ("none", "causal") else prompt_mask(mask, n, shown)
    rest = (None, mask == "causal", 0.3, kl, vl, 0.0, None, shown)
    expected = reference.attend(q, ka, va, kn, vn, window, *rest)
    inputs = [x if x is None else x.to(device) for x in (q, ka, va, kn, vn, window)]
    out = launch.attend(*inputs, *rest, tiles=Blocks(32, 16, 4))
    assert error(out, expected) < 1e-5


@pytest.mark.parametrize("sinks", ((0, 0), (7, 7), (4, 0), (0, 37)))
def test_any_sinks(device, sinks):
    q, ka, va, kn, vn, kl, vl = pair(110, 2, *sinks)
    expected = reference.attend(q, ka, va, kn, vn, None, None, True, 0.2, kl, vl)
    inputs = [x.to(device) for x in (q, ka, va, kn, vn)]
    assert error(launch.attend(*inputs, None, None, True, 0.2, kl, vl, splits=3), expected) < 1e-5


@pytest.mark.parametrize("splits", (1, 3))
def test_rows_that_see_nothing_are_zero(device, splits):
    q, ka, va, kn, vn, kl, vl = pair(60, 2)
    seen = torch.rand(2, 1, 2, 62) > 0.5
    seen[0, 0, 1] = False
    expected = reference.attend(q, ka, va, kn, vn, seen, None, False, 0.2, kl, vl)
    inputs = [x.to(device) for x in (q, ka, va, kn, vn, seen)]
    out = launch.attend(*inputs, None, False, 0.2, kl, vl, splits=splits)
    assert error(out, expected) < 1e-5
    assert not out[0, :, 1].any()


@pytest.mark.parametrize("splits", (1, 3))
@pytest.mark.parametrize("misuse", ("fault", "lengths", "start", "narrow mask", "mask"))
def test_a_misused_cache_gives_nan(device, misuse, splits):
    q, ka, va, kn, vn, kl, vl = pair(60, 1)
    mask = positions = None
    header = reference.views(va, vl).header
    if misuse == "fault":
        header[..., reference.FAULT] = 1
    elif misuse == "lengths":
        header[..., reference.LENGTH] = 59
    elif misuse == "start":
        positions = torch.tensor([61], device=device)
    else:  # it shows one token more than there are, or does not say whether the last one is seen
        width = 62 if misuse == "mask" else 60
        mask = torch.ones(1, 1, 1, width, dtype=torch.bool, device=device)
    inputs = [x.to(device) for x in (q, ka, va, kn, vn)]
    assert launch.attend(*inputs, mask, positions, True, 0.2, kl, vl, splits=splits).isnan().all()


def test_strided_inputs(device):
    q, ka, va, kn, vn, kl, vl = pair(60, 4)
    expected = reference.attend(q, ka, va, kn, vn, None, None, True, 0.2, kl, vl)
    q, kn, vn = (x.to(device).transpose(1, 2).contiguous().transpose(1, 2) for x in (q, kn, vn))
    out = launch.attend(q, ka.to(device), va.to(device), kn, vn, None, None, True, 0.2, kl, vl, splits=2)
    assert error(out, expected) < 1e-5


def test_decoding_step_by_step(device):
    """Attend, then append, as a model does: the kernels' own cache serves every step."""
    kl, vl = layout("int4z.16x1", 1, 16, "float32"), layout("int2z.1x16", 1, 16, "float32", 16)
    kx, vx = keys(1, 1, 60, 16, "float32"), values(1, 1, 60, 16, "float32")
    expected_k, expected_v = filled(0, 60, kx, kl), filled(0, 60, vx, vl)
    ka, va = expected_k.clone().to(device), expected_v.clone().to(device)
    at = 0
    for n in (37, 1, 1, 1, 5, 1, 1):
        q = values(1, 2, n, 16, "float32")
        kn, vn = kx[:, :, at : at + n], vx[:, :, at : at + n]
        expected = reference.attend(q, expected_k, expected_v, kn, vn, None, None, True, 0.2, kl, vl)
        reference.append(expected_k, kn, kl)
        reference.append(expected_v, vn, vl)
        q, kn, vn = (x.to(device) for x in (q, kn, vn))
        out = launch.attend(q, ka, va, kn, vn, None, None, True, 0.2, kl, vl)
        launch.append(ka, kn, kl, None)
        launch.append(va, vn, vl, None)
        at += n
        assert error(out, expected) < 1e-5, f"at {at}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_random_configurations(device, seed):
    dice = random.Random(seed)
    torch.manual_seed(seed)
    t = dice.choice((16, 32, 64, 128))
    kinds = [f"int{b}{z}" for b in (8, 4, 3, 2, 1) for z in ("z", "")] + ["fp8"]
    heads, groups, batch = dice.randint(1, 2), dice.randint(1, 5), dice.randint(1, 2)
    dk, dv = dice.choice((16, 32, 48, 64)), dice.choice((16, 32, 48, 64))
    dtype, sink = dice.choice(("float32", "float16", "bfloat16")), dice.randint(0, 9)
    k = f"{dice.choice(kinds)}.{t}x{dice.choice((1, 1, 16, dk))}"
    v = f"{dice.choice(kinds)}.{dice.choice((1, 1, 16))}x{dice.choice((dv, 16, 24))}"
    kl, vl = (
        layout(k, heads, dk, dtype, dice.choice((8, 16)), sink, t + dice.randint(0, 40)),
        layout(v, heads, dv, dtype, dice.choice((8, 16)), sink, dice.randint(16, 60)),
    )
    cached, n = dice.randint(0, 250), dice.choice((1, 1, 3, 20))
    kx, vx = keys(batch, heads, cached + n, dk, dtype), values(batch, heads, cached + n, dv, dtype)
    ka, va = filled(cached, cached + n, kx, kl), filled(cached, cached + n, vx, vl)
    q = values(batch, heads * groups, n, dk, dtype)
    kind = dice.choice(("none", "causal", "bool", "bool_h", "add", "add_1b"))
    window = make_mask(kind, batch, heads * groups, n, cached, q.dtype)
    new = kx[:, :, cached:], vx[:, :, cached:]
    rest = (None, kind == "causal", dk**-0.5, kl, vl)
    expected = reference.attend(q, ka, va, *new, window, *rest)
    on_device = [x if x is None else x.to(device) for x in (q, ka, va, *new, window)]
    out = launch.attend(*on_device, *rest, splits=dice.choice((None, 1, 2, 5)))
    assert error(out, expected) < TOLERANCE[dtype], (k, v, kind, cached, n)
    for data, x, form in ((ka, new[0], kl), (va, new[1], vl)):
        data, expected = data.to(device, copy=True), data
        launch.append(data, x.to(device), form, None)
        reference.append(expected, x, form)
        assert torch.equal(data.cpu(), expected), form.key
