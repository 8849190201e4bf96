"""What an index that is held says of every slot: the kernels and the reference."""

from __future__ import annotations

import pytest
import torch

from kvc_compile.kernels.reference import views
from kvc_compile.kernels.select import held
from kvc_compile.layout import Codec, Layout
from kvc_compile.lowering import ops, scores


@pytest.mark.parametrize("gqa", ["mean", "sum", "max"])
@pytest.mark.parametrize("sketch", ["hash32", "hash128", "channels3,1,5;0,7,2", "channels4;6"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_of_a_held_index(device, dtype, sketch, gqa):
    layout = Layout(Codec("raw"), 2, 8, dtype, word=16, sketch=sketch)
    x, new = (
        torch.randn(2, 2, 300, 8, dtype=getattr(torch, dtype)),
        torch.randn(2, 2, 1, 8, dtype=getattr(torch, dtype)),
    )
    data = ops.encode(x, 310, layout.key)
    q = torch.randn(2, 6, 8, dtype=x.dtype)
    at = 290  # what the arena holds from there on is about to be replaced
    known = views(data, layout).sketch.clone()
    known[:, :, at : at + 1] = held.sketches(new, layout)
    want = held.compare(q.float().unflatten(1, (2, 3)), known, layout)
    if sketch.startswith("hash"):
        want = (want.amax(2) if gqa == "max" else want.sum(2) if gqa == "sum" else want.mean(2)).unsqueeze(2)
        by_hand = held.sketches(q.float().unflatten(1, (2, 3)), layout)[1, 1, 2].tolist()
        bits = sum((a ^ b).bit_count() for a, b in zip(by_hand, known[1, 1, 7].tolist()))
        one = held.compare(q.float().unflatten(1, (2, 3)), known, layout)[1, 1, 2, 7]
        assert one == 8 * len(by_hand) - bits
    got = scores.of(q.to(device), data.to(device), new.to(device), torch.tensor(at, device=device), layout, gqa)
    assert got.shape == (*want.shape[:3], 311)
    torch.testing.assert_close(got[..., :300].cpu(), want[..., :300], rtol=1e-5, atol=1e-5)
