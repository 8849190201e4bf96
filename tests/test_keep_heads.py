"""Retrieval and streaming heads, side by side in a layer, against what their papers say of each head."""

from __future__ import annotations

import pytest
import torch
from test_keep_papers import GROUPS, HEADS, Data, random_data, slots

from kvc_compile.kernels.keep.attention import Attention
from kvc_compile.kernels.keep.heads import apply_to, of_heads
from kvc_compile.kernels.keep.rule import apply
from kvc_compile.policy import HeadGroup, groups_of
from kvc_compile.spec import Spec
from kvc_compile.spec.spec import preset_text

TABLE = "[[retrieval, streaming, retrieval], [streaming, streaming, retrieval]]"
SMALL = {"sink: 64, recent: 256": "sink: 3, recent: 8", "sink: 4, recent: 4000": "sink: 3, recent: 8"}


def groups(name: str, tmp_path) -> list[tuple[HeadGroup, ...]]:
    """A preset with the classes of two layers written in, and smaller regions."""
    text = "".join(line for line in preset_text(name).splitlines(True) if "top:" not in line)
    text = text.replace("heads.json", TABLE)
    for a, b in SMALL.items():
        text = text.replace(a, b)
    (tmp_path / "s.yaml").write_text(text)
    spec = Spec.load(tmp_path / "s.yaml")
    classes = spec.head_classes((HEADS, HEADS))
    return [groups_of(row, lambda c, i=i: spec.fragment(i, 2, c)) for i, row in enumerate(classes)]


def streams(data: Data, b: int) -> list[int]:
    n = data.lengths[b]
    return [97 - n + t for t in range(n) if t < 3 or t >= n - 8]


@pytest.mark.parametrize("when", ["prefill_end", "append"])
def test_duoattention(when, tmp_path):
    data = random_data(1, layers=2)
    for layer, found in enumerate(groups("duoattention", tmp_path)):
        assert [(g.name, g.heads) for g in found] == [
            [("retrieval", (0, 2)), ("streaming", (1,))],
            [("streaming", (0, 1)), ("retrieval", (2,))],
        ][layer]
        outcomes = dict(zip((g.name for g in found), apply_to(found, data.attentions[layer], data.v[layer], when)))
        assert outcomes["retrieval"] == []
        assert apply_to(found, data.attentions[layer], data.v[layer], "decoded") == [[], []]
        (out,) = outcomes["streaming"]
        for b in range(3):
            for h in range(out.kept.index.shape[1]):
                assert slots(out.kept, b, h) == streams(data, b)


def test_razorattention(tmp_path):
    """One token for all that is dropped: their means, and how many they are."""
    data = random_data(2, layers=2)
    for layer, found in enumerate(groups("razorattention", tmp_path)):
        outcomes = apply_to(found, data.attentions[layer], data.v[layer], "prefill_end")
        for g, outs in zip(found, outcomes):
            if g.name == "retrieval":
                assert outs == []
                continue
            (out,) = outs
            for b, n in enumerate(data.lengths):
                for i, h in enumerate(g.heads):
                    assert slots(out.kept, b, i) == streams(data, b)
                    gone = [t for t in range(97 - n, 97) if t not in streams(data, b)]
                    assert float(out.merged.count[b, i, -1]) == len(gone) > 0
                    for x, merged in ((data.k[layer], out.merged.k), (data.v[layer], out.merged.v)):
                        torch.testing.assert_close(merged[b, i, -1], x[b, h, gone].mean(0))


@pytest.mark.parametrize("mask", [None, "shared", "by head"])
def test_some_heads_are_those_heads(mask):
    """A score of attention sees the same queries, keys and masks."""
    data = random_data(3)
    a = data.attentions[0]
    if mask is not None:
        heads = 1 if mask == "shared" else HEADS * GROUPS
        seen = torch.rand(3, heads, 97, 97, generator=torch.Generator().manual_seed(0)) > 0.3
        a = Attention(a.q, a.k, a.lse, a.visible, a.scale, mask=seen)
    spec = Spec.load({"keep": {"budget": 9, "score": {"attn": {"probe": "all", "reduce": "sum"}}}}).expanded()
    ((group),) = groups_of(("",) * HEADS, lambda _: spec)
    (whole,) = apply(group.rules[0], group.regions, [a], data.v)
    for heads in ((0, 2), (1,)):
        (some,) = apply(group.rules[0], group.regions, [of_heads(a, heads)], [data.v[0][:, list(heads)]])
        assert torch.equal(some.kept.index, whole.kept.index[:, list(heads)])
