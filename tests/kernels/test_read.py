"""Reading a cache back by kernel equals the reference, at every length."""

from __future__ import annotations

import pytest
import torch

from kvc_compile.kernels import reference
from kvc_compile.lowering import launch

from .caches import filled, keys, layout

CODECS = [
    ("int8z.64x1", "float32", 16, 8, 4), ("int4z.32x1", "float16", 64, 16, 4), ("int3z.16x1", "float32", 24, 8, 0),
    ("int2.1x16", "bfloat16", 80, 16, 7), ("int1z.32x8", "float32", 20, 8, 32), ("fp8.1x16", "float16", 16, 8, 4),
    ("raw", "bfloat16", 40, 8, 0),
]  # fmt: skip


@pytest.mark.parametrize("length", [0, 3, 40, 150])
@pytest.mark.parametrize("codec, dtype, channels, word, sink", CODECS)
def test_reading_equals_the_reference(device, codec, dtype, channels, word, sink, length):
    form = layout(codec, 2, channels, dtype, word, sink=sink)
    x = keys(2, 2, 150, channels, dtype)
    data = filled(length, 170, x, form)
    want = reference.read(data, form, 0, 161)
    got = launch.read(data.to(device), 161, form).cpu()
    torch.testing.assert_close(got, want, rtol=torch.finfo(got.dtype).eps if codec != "raw" else 0, atol=1e-6)
    assert not got[:, :, length:].any()
