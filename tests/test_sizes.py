"""Attention of every size, against the same attention over the dequantised cache.

Head counts that are no power of two, one KV head, keys and values of different widths, 80 and 96 channels, batches of 1
to 7, and lengths from one token to three windows, in chunks of any size.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kvc_compile.backend as backend
from kvc_compile.handle import CacheHandle
from kvc_compile.report import report

WINDOW = 40  # tokens: more than a block and the recent ones of every spec here
SPECS = (
    {"kvc": 1},
    {"bits": 8},
    {"bits": 4},
    {"bits": {"k": 2, "v": 3}},
    {"kv": {"codec": {"int": 1, "block": [1, "all"]}}},
    {"k": {"codec": {"int": 4, "block": [16, 1]}}, "v": {"codec": {"int": 8, "block": [1, "all"], "zero": False}}},
    {"tokens": {"sink": 1, "recent": {"k": 16, "v": 1}}, "k": {"codec": {"int": 3, "block": [16, 1]}}},
)


@dataclass(frozen=True)
class Case:
    spec: int
    batch: int
    heads: int
    groups: int
    keys: int
    values: int
    chunks: tuple[int, ...]
    static: bool
    spread: str
    dtype: torch.dtype

    def split(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values [B, heads, n, channels]."""
        sizes = [(self.heads * self.groups, self.keys), (self.heads, self.keys), (self.heads, self.values)]
        parts = x.split([h * d for h, d in sizes], 2)
        return [p.unflatten(2, s).transpose(1, 2) for p, s in zip(parts, sizes, strict=True)]


class Attention(nn.Module):
    """Appends to a cache, from position `start` if it is static, and attends over it. x [B, n, all channels] holds
    queries, keys and values."""

    def __init__(self, case: Case):
        super().__init__()
        self.spread, self.case = case.spread, case

    def repeated(self, t: Tensor, groups: int) -> Tensor:
        b, h, n, d = t.shape
        if self.spread == "expand":
            return t[:, :, None].expand(b, h, groups, n, d).reshape(b, h * groups, n, d)
        return t.repeat_interleave(groups, 1) if self.spread != "enable_gqa" else t

    def forward(self, x, mask, start, keys, values):
        q, k, v = self.case.split(x)
        if start is None:
            keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        else:
            pos = torch.arange(x.shape[1]) + start
            keys.index_copy_(2, pos, k)
            values.index_copy_(2, pos, v)
        groups = q.shape[1] // k.shape[1]
        ks, vs = self.repeated(keys, groups), self.repeated(values, groups)
        if self.spread == "by hand":
            s = torch.matmul(q, ks.transpose(2, 3)) * q.shape[-1] ** -0.5 + mask
            out = torch.matmul(s.softmax(-1, dtype=torch.float32).to(q.dtype), vs)
        else:
            out = F.scaled_dot_product_attention(q, ks, vs, mask, enable_gqa=self.spread == "enable_gqa")
        return out, keys, values


@st.composite
def cases(draw) -> Case:
    chunks = draw(st.lists(st.integers(1, WINDOW + 9), min_size=2, max_size=5).filter(lambda c: sum(c) <= 3 * WINDOW))
    return Case(
        spec=draw(st.integers(0, len(SPECS) - 1)),
        batch=draw(st.integers(1, 7)),
        heads=draw(st.sampled_from([1, 2, 3, 5])),
        groups=draw(st.sampled_from([1, 2, 3, 7])),
        keys=draw(st.sampled_from([8, 16, 20, 64, 80, 96])),
        values=draw(st.sampled_from([4, 16, 64, 80, 96])),
        chunks=tuple(chunks),
        static=draw(st.booleans()),
        spread=draw(st.sampled_from(["enable_gqa", "expand", "repeat_interleave", "by hand"])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
    )


def content(t: Tensor, tokens: int) -> Tensor:
    return (t.dense() if isinstance(t, CacheHandle) else t.clone())[:, :, :tokens]


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch):
    monkeypatch.setattr(backend, "lower", lambda gm, inputs, request, births: gm.forward)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases())
def test_attention_is_that_over_the_dequantised_cache(case: Case):
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    call = torch.compile(Attention(case), backend="kvc", options=SPECS[case.spec])
    length, done = sum(case.chunks) + 3, 0
    shapes = [(case.batch, case.heads, length * case.static, d) for d in (case.keys, case.values)]
    caches = [torch.zeros(shape, dtype=case.dtype) for shape in shapes]
    with torch.no_grad():
        for n in case.chunks:
            channels = case.heads * (case.groups * case.keys + case.keys + case.values)
            x = torch.randn(case.batch, n, channels, generator=generator).to(case.dtype)
            shown = torch.arange(length if case.static else done + n) <= torch.arange(done, done + n)[:, None]
            mask = torch.zeros(shown.shape, dtype=case.dtype).masked_fill(~shown, -torch.inf)
            past = [content(t, done) for t in caches]
            out, *caches = call(x, mask, torch.tensor(done) if case.static else None, *caches)
            q, k, v = case.split(x)
            want = F.scaled_dot_product_attention(
                q.double(),
                torch.cat([past[0], k], 2).double(),
                torch.cat([past[1], v], 2).double(),
                mask[:, : done + n].double(),
                enable_gqa=True,
            )
            done += n
            close = 2e-2 if case.dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(out.double(), want, atol=close, rtol=close)
            assert all(isinstance(t, CacheHandle) for t in caches)
    assert {s.status for s in report().sites} == {"compressed"}
    assert not any(s.note for s in report().sites), "fused, not read back"
