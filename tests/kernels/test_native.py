"""The C++ kernels of the CPU equal the reference: attention to rounding, appends bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvc_compile.kernels import reference
from kvc_compile.lowering import cpu, native

from .caches import blank, error, filled, keys, layout, values
from .test_attend import CASES, TOLERANCE, make_mask

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU machine runs the Triton kernels")
FEW = [c[:3] + c[4:12] for c in CASES if c[10] * c[8] <= native.ROWS and c[4] % 16 == c[5] % 16 == 0]
LAYOUTS = [
    ("int8z.64x1", "float32", 48), ("int8.1x64", "bfloat16", 64), ("int4z.32x1", "float32", 64),
    ("int4z.1x24", "float16", 48), ("int3z.16x1", "float32", 16), ("int2.1x16", "bfloat16", 80),
    ("int1z.32x8", "float32", 32), ("raw", "float16", 16), ("fp8.1x16", "float32", 16),
]  # fmt: skip


@pytest.mark.parametrize("k, v, dtype, dk, dv, batch, heads, groups, cached, n, mask", FEW)
def test_attention_equals_the_reference(k, v, dtype, dk, dv, batch, heads, groups, cached, n, mask):
    kl, vl = layout(k, heads, dk, dtype), layout(v, heads, dv, dtype, sink=2, recent=70)
    kx, vx = keys(batch, heads, cached + n, dk, dtype), values(batch, heads, cached + n, dv, dtype)
    ka, va = filled(cached, cached + n + 40, kx, kl), filled(cached, cached + n + 40, vx, vl)
    q = values(batch, n, heads * groups, dk, dtype).transpose(1, 2)
    window = make_mask(mask, batch, heads * groups, n, cached, q.dtype)
    call = q, ka, va, kx[:, :, cached:], vx[:, :, cached:], window, cached, mask == "causal", dk**-0.5 / 2, kl, vl
    out = native.attend(*call)
    assert out is not None and out.dtype == q.dtype
    assert error(out, reference.attend(*call)) < TOLERANCE[dtype]


@pytest.mark.parametrize("codec, dtype, channels", LAYOUTS)
def test_appends_equal_the_reference_bit_for_bit(codec, dtype, channels):
    form = layout(codec, 2, channels, dtype)
    form = replace(form, recent=form.recent + 5, flush=max(form.flush, 8))
    x = keys(3, 200, 2, channels, dtype).transpose(1, 2)
    x[:, :, 90:120] = 0.0  # blocks of one value
    ours, theirs = blank(3, 200, form), blank(3, 200, form)
    taken = 0
    for i in range(200):
        token = x[:, :, i : i + 1]
        done = native.append(ours, token, i if i % 2 else None, form)
        taken += done
        if not done:
            reference.append(ours, token, form)
        reference.append(theirs, token, form)
        assert torch.equal(ours, theirs), i
    assert taken == 200 or (codec.startswith("fp8") and taken > 150)


def test_every_fp16_number_is_read_and_written():
    """As the middle of a block of equal values: what is stored is the number itself, infinities aside."""
    form = layout("int8z.1x16", 1, 16, "float32", sink=0)
    numbers = torch.arange(-32768, 32768, 7, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    numbers = numbers[numbers.isfinite()]
    halves = numbers[:, None].expand(-1, 16)[None, None]
    data = blank(1, halves.shape[2] + 20, form)
    for i in range(halves.shape[2]):
        assert native.append(data, halves[:, :, i : i + 1], None, form)
    torch.testing.assert_close(reference.read(data, form, 0, halves.shape[2]), halves, rtol=0, atol=0)


def test_what_is_not_a_plain_step_is_left_to_the_reference():
    form = layout("int4z.16x1", 1, 16, "float32")
    x = keys(1, 1, 60, 16, "float32")
    data = filled(50, 64, x, form)
    before = data.clone()
    assert not native.append(data, x[:, :, 50:51], 49, form), "a step back"
    assert not native.append(data, x[:, :, 50:51], 51, form), "a gap"
    assert torch.equal(data, before)
    rest = x[:, :, 50:51], x[:, :, 50:51]
    seen = torch.ones(1, 1, 1, 51, dtype=torch.bool)
    q = values(1, 1, 1, 16, "float32")
    assert native.attend(q, data, data, *rest, seen, 50, False, 1.0, form, form) is not None
    assert native.attend(q, data, data, *rest, seen[..., :50], 50, False, 1.0, form, form) is None, "a short mask"
    wide = torch.ones(1, 1, 1, 52, dtype=torch.bool)
    assert native.attend(q, data, data, *rest, wide, 50, False, 1.0, form, form) is None, "it shows what is not there"
    assert native.attend(q, data, data, *rest, None, 51, True, 1.0, form, form) is None, "beyond the end"
    small = blank(1, 20, replace(form, recent=1, flush=16))
    full = replace(form, recent=1, flush=16)
    taken = 0
    while native.append(small, x[:, :, :1], None, full):
        taken += 1
    with pytest.raises(ValueError, match="with room for"):
        reference.append(small, x[:, :, :1], full)
    assert 20 <= taken < 64


def test_large_caches_take_the_kernels(monkeypatch):
    """The operators call them for decode steps over arenas that are worth it, and give the reference's errors."""
    form = layout("int4z.32x1", 4, 64, "float32")
    x = keys(1, 4, 1001, 64, "float32")
    data = filled(1000, 1040, x, form)
    assert data.nbytes > native.BYTES
    calls = []
    for name in ("attend", "append"):
        original = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *a, name=name, f=original: (calls.append(name), f(*a))[1])
    q = values(1, 8, 1, 64, "float32")
    new = x[:, :, 1000:]
    out = cpu.attend(q, data, data, new, new, None, None, True, 0.1, form, form)
    assert error(out, reference.attend(q, data, data, new, new, None, None, True, 0.1, form, form)) < 1e-5
    cpu.append(data, new, torch.tensor([1000]), form)
    assert calls == ["attend", "append"] and int(reference.views(data, form).header[0, 0, 0]) == 1001
    with pytest.raises(ValueError, match="a mask over 900 positions"):
        cpu.attend(q, data, data, new, new, torch.ones(1, 1, 1, 900).bool(), None, False, 0.1, form, form)
    with pytest.raises(ValueError, match="position 2000"):
        cpu.append(data, new, torch.tensor([2000]), form)
