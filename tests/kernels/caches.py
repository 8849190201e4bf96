"""Layouts and fresh random contents for the kernel tests."""

from __future__ import annotations

import torch
from torch import Tensor

from kvc_compile.kernels import reference
from kvc_compile.layout import Codec, Layout


def layout(codec: str, heads: int, channels: int, dtype: str, word: int = 8, sink: int = 4, recent: int = 0) -> Layout:
    """A layout from a short name such as "int4z.64x1", "fp8", "raw": flushes of a block, a ring of one and a bit."""
    kind, _, block = codec.partition(".")
    t, c = (int(n) for n in block.split("x")) if block else (0, 0)
    bits = {"raw": 16, "fp8": 8, "fp8z": 8}.get(kind) or int(kind[3])
    parsed = Codec({"r": "raw", "f": "fp", "i": "int"}[kind[0]], bits, (t, c), kind.endswith("z"))
    return Layout(parsed, heads, channels, dtype, sink, recent or max(t, 13), max(t, 1), word)


def blank(batch: int, tokens: int, layout: Layout) -> Tensor:
    """An empty arena whose unused bytes are 0xff: NaN in every float type."""
    data = torch.full((batch, layout.row_bytes(tokens)), 0xFF, dtype=torch.uint8)
    reference.views(data, layout).header.zero_()
    return data


def keys(batch: int, heads: int, n: int, channels: int, dtype: str) -> Tensor:
    """Keys as models have them: an offset for every channel, and a few channels that stand out."""
    x = torch.randn(batch, heads, n, channels) + 3 * torch.linspace(-1, 1, channels)
    x[..., channels // 3] *= 8
    return x.to(getattr(torch, dtype))


def values(batch: int, heads: int, n: int, channels: int, dtype: str) -> Tensor:
    return torch.randn(batch, heads, n, channels).to(getattr(torch, dtype))


def filled(tokens: int, room: int, x: Tensor, layout: Layout) -> Tensor:
    """An arena with the first `tokens` of x [B, H, T, D], appended in three steps."""
    data = blank(x.shape[0], room, layout)
    for first, last in ((0, tokens // 2), (tokens // 2, tokens - 1), (tokens - 1, tokens)):
        if 0 <= first < last:
            reference.append(data, x[:, :, first:last], layout)
    return data


def error(out: Tensor, expected: Tensor) -> float:
    """Relative error in the Frobenius norm, in float64."""
    out, expected = out.double().cpu(), expected.double().cpu()
    return float((out - expected).norm() / expected.norm())
