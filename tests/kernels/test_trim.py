"""Dropping the oldest tokens of a window moves what is stored, and encodes nothing anew."""

from __future__ import annotations

import pytest
import torch

from kvc_compile.kernels import reference

from .caches import filled, keys, layout


@pytest.mark.parametrize("codec", ["int8z.64x1", "int4z.32x1", "int3z.16x1", "int2.1x16", "fp8.1x16", "raw"])
@pytest.mark.parametrize("sink", [0, 4])
def test_trimming_keeps_the_last_tokens(codec, sink):
    form = layout(codec, 2, 16, "float32", sink=sink)
    x = keys(2, 2, 700, 16, "float32")
    data = filled(650, 800, x, form)
    before = reference.read(data, form, 0, 650)
    dropped = reference.trim(data, form, 100)
    assert 650 - dropped >= 100 and dropped > 300
    torch.testing.assert_close(reference.read(data, form, 0, 650 - dropped), before[:, :, dropped:], rtol=0, atol=0)
    reference.append(data, x[:, :, 650:], form)
    after = reference.read(data, form, 0, 700 - dropped)
    torch.testing.assert_close(after[:, :, : 600 - dropped], before[:, :, dropped:600], rtol=0, atol=0)
    assert reference.trim(data, form, 700) == 0
