"""The kernel of linear layers of a few rows equals their product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kvc_compile.lowering import products


@pytest.mark.parametrize(
    "rows, widths, channels", [(1, (32,), 256), (3, (48, 16), 128), (8, (16, 32, 64), 64), (16, (32, 16), 576)]
)
def test_the_kernel_equals_the_product(rows, widths, channels, device):
    dtype = torch.float16 if device.type == "cpu" else torch.bfloat16  # the interpreter computes bf16 wrongly
    x = torch.randn(rows, 1, channels, device=device).to(dtype)
    weights = [torch.randn(n, channels, device=device).to(dtype) for n in widths]
    for out, w in zip(products.launch(x, weights), weights, strict=True):
        exact = F.linear(x.double(), w.double())
        assert out.shape == exact.shape and out.dtype == dtype
        assert (out.double() - exact).norm() <= 4e-3 * exact.norm()
