"""Attention over chosen slots: single tokens are what a whole read gives, and nothing but them has weight."""

from __future__ import annotations

import pytest
import torch

from kvc_compile.kernels import reference
from kvc_compile.kernels.select import gather, step
from kvc_compile.lowering import slots

from .caches import error, filled, keys, layout, values
from .test_attend import CASES as ALL
from .test_attend import TOLERANCE, make_mask

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")
# codecs, dtypes, sizes and masks of a decode step
CASES = [case for case in ALL if case[10] == 1]


def problem(k, v, dtype, word, dk, dv, batch, heads, groups, cached, mask):
    kl, vl = layout(k, heads, dk, dtype, word), layout(v, heads, dv, dtype, 24 - word, recent=70)
    kx, vx = keys(batch, heads, cached + 1, dk, dtype), values(batch, heads, cached + 1, dv, dtype)
    ka, va = filled(cached, cached + 41, kx, kl), filled(cached, cached + 41, vx, vl)
    q = values(batch, heads * groups, 1, dk, dtype)
    window = make_mask(mask, batch, heads * groups, 1, cached, q.dtype)
    return q, ka, va, kx[:, :, cached:], vx[:, :, cached:], window, kl, vl


def choice(batch, heads, total, room):
    """Some slots of each head, not all as many, the newest among them in some; -1 after them."""
    out = torch.full((batch, heads, room), -1)
    for b in range(batch):
        for h in range(heads):
            count = int(torch.randint(1, min(room, total) + 1, ()))
            out[b, h, :count] = torch.randperm(total)[:count]
    return out


@pytest.mark.parametrize("k, v, dtype, word, dk, dv, batch, heads, groups, cached, n, mask, splits", CASES)
def test_chosen_slots(device, k, v, dtype, word, dk, dv, batch, heads, groups, cached, n, mask, splits):
    q, ka, va, kn, vn, window, kl, vl = problem(k, v, dtype, word, dk, dv, batch, heads, groups, cached, mask)
    total = cached + 1
    index = choice(batch, heads, total, 50)
    whole = torch.cat([reference.read(ka, kl, 0, cached), kn], 2)
    safe = index.clamp(min=0)
    picked = gather.gather(ka, kn, cached, safe, kl)
    assert torch.equal(picked, whole.gather(2, safe.unsqueeze(-1).expand(-1, -1, -1, dk)))

    # what is not chosen is hidden from plain attention
    chosen = torch.zeros(batch, heads, total + 1, dtype=torch.bool).scatter(
        -1, index.masked_fill(index < 0, total), True
    )
    seen = chosen[..., :total].repeat_interleave(groups, 1).unsqueeze(2)
    if window is None:
        hidden = seen
    else:
        part = window[..., :total].expand(batch, heads * groups, -1, -1)
        hidden = part & seen if part.dtype == torch.bool else part.masked_fill(~seen, -torch.inf)
    blind = ~(seen if window is None else seen & (hidden if hidden.dtype == torch.bool else hidden > -1e4)).any(-1)
    sinks = torch.randn(heads * groups) if groups == 2 else None
    cap = 5.0 if heads == 2 else 0.0
    scale = dk**-0.5
    expected = reference.attend(q, ka, va, kn, vn, hidden, None, False, scale, kl, vl, cap, sinks)
    expected = expected.masked_fill(blind.unsqueeze(-1), 0)
    got = step.attend(q, ka, va, kn, vn, index, window, 0, cached, scale, kl, vl, cap, sinks)
    got = got.masked_fill(blind.unsqueeze(-1), 0)
    assert error(got, expected) < 1e-5 if dtype == "float32" else error(got, expected) < TOLERANCE[dtype]

    moved = [x if x is None else x.to(device) for x in (q, ka, va, kn, vn, index, window)]
    for positions in (None, torch.tensor([cached], device=device)):
        sunk = None if sinks is None else sinks.to(device)
        out = slots.attend(*moved, positions, scale, kl, vl, cap, sunk, splits=splits)
        assert out.dtype == q.dtype and out.shape == expected.shape
        assert error(out.masked_fill(blind.unsqueeze(-1).to(device), 0), expected) < TOLERANCE[dtype]


def test_slots_of_a_window(device):
    """A mask begins at the first slot that is seen, and what lies before it is not read."""
    q, ka, va, kn, vn, _, kl, vl = problem("int4z.32x1", "int4z.1x16", "float32", 8, 16, 16, 1, 2, 2, 100, "none")
    index = torch.tensor([[[3, 70, 80, 100], [69, 71, 99, -1]]])
    mask = torch.zeros(1, 1, 1, 31)
    mask[..., 10] = -torch.inf  # slot 80
    moved = [x.to(device) for x in (q, ka, va, kn, vn, index, mask)]
    out = slots.attend(*moved, None, 0.25, kl, vl, shown=30)
    kept = torch.tensor([[[-1, 70, -1, 100], [-1, 71, 99, -1]]])
    expected = step.attend(q, ka, va, kn, vn, kept, None, 0, 100, 0.25, kl, vl)
    assert error(out, expected) < 1e-5


def test_a_cache_that_cannot_be_attended_shows(device):
    q, ka, va, kn, vn, _, kl, vl = problem("int8z.32x1", "int8z.1x16", "float32", 8, 16, 16, 1, 1, 1, 60, "none")
    reference.views(ka, kl).header[..., reference.FAULT] = 1
    moved = [x.to(device) for x in (q, ka, va, kn, vn, torch.tensor([[[0, 1]]]))]
    assert slots.attend(*moved, None, None, 0.25, kl, vl).isnan().all()
    reference.views(ka, kl).header[..., reference.FAULT] = 0
    short = torch.zeros(1, 1, 1, 60, device=device)
    assert slots.attend(*moved, short, None, 0.25, kl, vl).isnan().all()
    assert not slots.attend(*moved, None, None, 0.25, kl, vl).isnan().any()
