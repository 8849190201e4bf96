"""Appending by kernel leaves the same bytes as the reference."""

from __future__ import annotations

import random

import pytest
import torch
import triton
import triton.language as tl

from kvc_compile.kernels import reference
from kvc_compile.kernels.codec import fp8_bits, fp8_value, half_up
from kvc_compile.lowering import launch

from .caches import blank, keys, layout

# codec, heads, channels, dtype, word, sink, recent, sizes of the appends
SEQUENCES = [
    ("int8z.64x1", 1, 16, "float32", 8, 4, 0, (1, 3, 150, 1, 1)),
    ("int8.1x16", 2, 16, "float16", 16, 0, 1, (1, 1, 30, 1, 1)),
    ("int4z.64x1", 2, 20, "float16", 16, 4, 0, (3, 90, 1, 60, 1)),
    ("int4z.1x24", 1, 40, "bfloat16", 8, 5, 0, (1, 40, 1, 1, 17, 1)),
    ("int4z.32x8", 1, 20, "float32", 16, 0, 40, (70, 1, 1, 20, 1)),
    ("int4.1x80", 1, 80, "float16", 8, 4, 0, (30, 1, 1, 1)),
    ("int3z.128x1", 1, 16, "float16", 8, 4, 0, (1, 140, 1, 130)),
    ("int3z.1x16", 1, 16, "float32", 16, 1, 0, (40, 1, 1, 100, 1)),
    ("int2z.16x1", 1, 96, "bfloat16", 8, 4, 0, (20, 1, 20, 1)),
    ("int2z.1x16", 2, 16, "float32", 16, 4, 0, (150, 1, 1, 3, 1)),
    ("int1z.32x16", 1, 32, "float16", 8, 0, 64, (100, 1, 70, 1)),
    ("int1.1x16", 1, 16, "float16", 16, 4, 0, (300, 1, 1)),
    ("fp8", 2, 16, "bfloat16", 8, 4, 0, (1, 30, 1, 1)),
    ("fp8.64x1", 1, 16, "float32", 8, 4, 0, (100, 1, 60, 1)),
    ("fp8.1x16", 1, 16, "float16", 8, 4, 0, (30, 1, 1)),
    ("raw", 2, 16, "bfloat16", 8, 4, 0, (1, 30, 1, 1)),
]


@pytest.mark.parametrize("codec, heads, channels, dtype, word, sink, recent, sizes", SEQUENCES)
def test_bytes_equal_the_reference(device, codec, heads, channels, dtype, word, sink, recent, sizes):
    form = layout(codec, heads, channels, dtype, word, sink, recent)
    expected = blank(2, sum(sizes), form)
    data = expected.clone().to(device)
    for n in sizes:
        x = keys(2, heads, n, channels, dtype)
        reference.append(expected, x, form)
        launch.append(data, x.to(device), form, None)
        assert torch.equal(data.cpu(), expected), f"after {n} tokens"


@pytest.mark.parametrize(
    "k, v, channels, dtype, placed",
    [
        ("int4z.64x1", "int4z.1x32", (16, 32), "float16", False),
        ("int4z.64x1", "int4z.1x32", (16, 32), "float16", True),
        ("int3z.16x1", "fp8", (20, 16), "bfloat16", True),
        ("raw", "int2z.1x16", (16, 16), "float32", False),
    ],
)
def test_keys_and_values_in_one_launch(device, k, v, channels, dtype, placed):
    """The bytes of both are those of two appends, from an empty cache to one that has encoded some blocks."""
    forms = [layout(x, 2, d, dtype, 16, 3) for x, d in zip((k, v), channels, strict=True)]
    expected = [blank(2, 200, form) for form in forms]
    data = [x.clone().to(device) for x in expected]
    length = 0
    for before in (0, 1, 60, 80):  # tokens that go first
        for n in (before, 1):
            new = [keys(2, 2, n, d, dtype) for d in channels]
            for x, y, form, d in zip(new, expected, forms, data, strict=True):
                reference.append(y, x, form)
                if n != 1:
                    launch.append(d, x.to(device), form, None)
            if n == 1:
                positions = torch.tensor([length], device=device) if placed else None
                launch.append_pair(*data, *(x.to(device) for x in new), *forms, positions)
            length += n
            assert all(torch.equal(a.cpu(), b) for a, b in zip(data, expected, strict=True)), length


@pytest.mark.parametrize("seed", range(4))
def test_a_random_walk_leaves_the_reference_bytes(device, seed):
    """Appends of random sizes, now and then from a position that the cache already holds."""
    dice = random.Random(seed)
    codec = ("int4z.32x1", "int2z.1x16", "int3z.16x1", "fp8.1x16")[seed]
    form = layout(codec, 1, 16, "float16", (8, 16)[seed % 2], 3, 40)
    expected = blank(1, 300, form)
    data = expected.clone().to(device)
    length = 0
    for _ in range(14):
        n = dice.choice((1, 1, 1, 3, 40))
        start = None
        if length and dice.random() < 0.4:
            _, encoded = reference.lengths(reference.views(expected, form))
            in_ring = dice.randint(min(form.sink + encoded, length), length)
            start = dice.choice((in_ring, dice.randint(0, min(form.sink, length)), length))
        x = keys(1, 1, n, 16, "float16")
        reference.append(expected, x, form, start)
        positions = None if start is None else torch.arange(start, start + n, device=device)
        launch.append(data, x.to(device), form, positions)
        length = (length if start is None else start) + n
        assert torch.equal(data.cpu(), expected), f"{n} tokens at {start}"


def test_a_view_of_a_transposed_tensor(device):
    form = layout("int4z.1x16", 2, 16, "float16")
    expected = blank(2, 40, form)
    data = expected.clone().to(device)
    x = keys(2, 2, 30, 16, "float16").transpose(1, 2).contiguous().transpose(1, 2)
    reference.append(expected, x, form)
    launch.append(data, x.to(device), form, None)
    assert torch.equal(data.cpu(), expected)


@pytest.mark.parametrize("n", (1, 5))
@pytest.mark.parametrize("start", (41, -1, 30), ids=("past the end", "negative", "cuts a block"))
def test_a_misuse_sets_the_fault_word_and_stores_nothing(device, start, n):
    form = layout("int4z.32x1", 1, 16, "float16", recent=31, sink=0)
    data = blank(1, 200, form)
    reference.append(data, keys(1, 1, 40, 16, "float16"), form)
    before, data = data.clone(), data.to(device)
    launch.append(data, keys(1, 1, n, 16, "float16").to(device), form, torch.tensor([start], device=device))
    header = reference.views(data, form).header
    assert header[..., reference.FAULT].all()
    header[..., reference.FAULT] = 0
    assert torch.equal(data.cpu(), before)


@pytest.mark.parametrize("n", (1, 5))
def test_a_full_arena_faults_until_it_starts_over(device, n):
    form = layout("int4z.1x16", 1, 16, "float16", sink=0)
    data = blank(1, 20, form).to(device)
    room = form.capacity_of(data.shape[1]) + form.recent
    fault = reference.views(data, form).header[0, 0]
    launch.append(data, keys(1, 1, room, 16, "float16").to(device), form, None)
    assert fault[reference.FAULT] == 0
    x = keys(1, 1, n, 16, "float16").to(device)
    launch.append(data, x, form, None)
    assert fault.tolist()[:3] == [room, room - form.recent, 1]
    launch.append(data, x, form, torch.tensor([2], device=device))
    assert fault[reference.FAULT] == 1
    launch.append(data, x, form, torch.tensor([0], device=device))
    assert fault.tolist()[:3] == [n, 0, 0]


@triton.jit
def round_trip(x, code, back, up, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    value = tl.load(x + at, mask=live, other=0.0)
    bits = fp8_bits(value)
    tl.store(code + at, bits.to(tl.uint8), mask=live)
    tl.store(back + at, fp8_value(bits.to(tl.uint8)), mask=live)
    tl.store(up + at, half_up(tl.abs(value)), mask=live)


def test_fp8_and_half_up_equal_torch_on_every_fp16_number_and_between(device):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).float()
    x = x[x.isfinite()]
    x = torch.cat([x, x * 1.0009765, torch.nextafter(x, x + 1)])
    x = x[x.abs() < 60000]
    code = torch.empty(x.shape, dtype=torch.uint8, device=device)
    back, up = torch.empty(x.shape, device=device), torch.empty(x.shape, dtype=torch.float16, device=device)
    round_trip[triton.cdiv(x.numel(), 1024 * 16),](x.to(device), code, back, up, x.numel(), BLOCK=1024 * 16)
    expected = x.clamp(-reference.FP8_MAX, reference.FP8_MAX).to(reference.FP8)
    assert torch.equal(code.cpu(), expected.view(torch.uint8))
    assert torch.equal(back.cpu(), expected.float())
    assert torch.equal(up.cpu(), reference.half_up(x.abs()))
