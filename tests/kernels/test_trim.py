"""Dropping the oldest tokens of a window moves what is stored, and encodes nothing anew."""

from __future__ import annotations

import pytest
import torch

from kvc_compile.kernels import reference
from kvc_compile.plan import Slide

from .caches import filled, keys, layout


@pytest.mark.parametrize("codec", ["int8z.64x1", "int4z.32x1", "int3z.16x1", "int2.1x16", "fp8.1x16", "raw"])
@pytest.mark.parametrize("sink", [0, 4])
def test_trimming_keeps_the_last_tokens(codec, sink):
    form = layout(codec, 2, 16, "float32", sink=sink)
    x = keys(2, 2, 700, 16, "float32")
    data = filled(650, 800, x, form)
    before = reference.read(data, form, 0, 650)
    dropped = Slide.of(form, form).forgotten(650, 100)
    assert 650 - dropped >= 100 and dropped > 300
    reference.trim(data, form, dropped)
    torch.testing.assert_close(reference.read(data, form, 0, 650 - dropped), before[:, :, dropped:], rtol=0, atol=0)
    reference.append(data, x[:, :, 650:], form)
    after = reference.read(data, form, 0, 700 - dropped)
    torch.testing.assert_close(after[:, :, : 600 - dropped], before[:, :, dropped:600], rtol=0, atol=0)
    for wrong in (700, -form.unit, *([form.unit - 1] if form.unit > 1 else [])):
        with pytest.raises(ValueError, match="cannot be forgotten"):
            reference.trim(data, form, wrong)


CODECS = ["int8z.64x1", "int4z.32x1", "int3z.16x1", "int2.1x16", "int1z.128x1", "fp8.1x16", "raw"]


@pytest.mark.parametrize("k", CODECS)
@pytest.mark.parametrize("v", CODECS)
def test_keys_and_values_forget_the_same_tokens(k, v):
    """However different their units, sinks and rings are: as many as both can, and not much less than they could."""
    pair = layout(k, 1, 16, "float32", 16, 4), layout(v, 1, 16, "float32", 16, 20, recent=70)
    slide = Slide.of(*pair)
    for total in (1, 80, 300, 700, 1500):
        for window in (16, 200):
            drop = slide.forgotten(total, window)
            assert total - drop >= min(total, window)
            assert total - drop < max(window, slide.least) + slide.unit
            assert drop + slide.room(window, 1) >= total or total > slide.room(window, 1)
            for form in pair:
                assert drop % form.unit == 0
                assert drop <= max(0, form.encoded_after(total, 0) - form.sink)
