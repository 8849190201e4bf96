"""Merging: what kept tokens hold afterwards, against each paper's formula."""

from __future__ import annotations

import math

import paper
import pytest
import torch
from test_keep_papers import HEADS, SUM, random_data, run, slots

from kvc_compile.kernels.keep.merging import merge
from kvc_compile.kernels.keep.tokens import Kept, parts
from kvc_compile.policy import Merge, Regions


def spec_of(**merge):
    return {"tokens": {"recent": 5}, "keep": {"budget": 12, "score": SUM, "else": {"merge": merge}}}


def outcome(data, **merge):
    (out,) = run(spec_of(**merge), data)
    return out


def each_head(data, out):
    """(b, h, k, v, kept) of each head of each row: positions among the visible tokens."""
    for b, n in enumerate(data.lengths):
        first = data.visible.shape[1] - n
        _, k, v = data.row(0, b)
        for h in range(HEADS):
            yield b, h, k[h], v[h], [t - first for t in slots(out.kept, b, h)]


def same(out, b, h, want, count):
    k, v = want
    n = len(k)
    torch.testing.assert_close(out.merged.k[b, h, :n], k)
    torch.testing.assert_close(out.merged.v[b, h, :n], v)
    assert out.merged.count[b, h, :n].tolist() == count
    assert not out.merged.k[b, h, n:].any() and not out.merged.count[b, h, n:].any()


def counts(kept, target):
    return [1 + sum(j == t for t in target.values()) for j in kept]


@pytest.mark.parametrize("least", [None, 0.3])
def test_lookm_averaged(least):
    """EMS is this with a threshold: what is like no kept token falls into the zero class."""
    data = random_data(1)
    more = {} if least is None else {"min_cos": least, "zero_class": True}
    out = outcome(data, assign="nearest", weight="mean", **more)
    for b, h, k, v, kept in each_head(data, out):
        target = paper.nearest(k, kept, len(k), -1.0 if least is None else least)
        ones = dict.fromkeys(range(len(k)), 1.0)
        same(out, b, h, paper.merged(k, v, kept, target, ones, ones), counts(kept, target))
        assert int(out.merged.lost[b, h]) == len(k) - len(kept) - len(target)


def test_lookm_pivotal():
    data = random_data(2)
    out = outcome(data, assign="nearest", weight="pivot")
    for b, h, k, v, kept in each_head(data, out):
        target = paper.nearest(k, kept, len(k))
        for x, got in ((k, out.merged.k), (v, out.merged.v)):
            for i, j in enumerate(kept):
                members = [x[j]] + [(x[t] + x[j]) / 2 for t in target if target[t] == j]
                torch.testing.assert_close(got[b, h, i], torch.stack(members).mean(0))


def test_d2o():
    """exp(cosine) against e for the kept token; below the mean of all largest cosines a token is dropped."""
    data = random_data(3)
    out = outcome(data, assign="nearest", weight="exp_cos", min_cos="ema(0.5)")
    for b, h, k, v, kept in each_head(data, out):
        target = paper.nearest(k, kept, len(k))
        cosine = {t: paper.cos(k[t], k[j]) for t, j in target.items()}
        threshold = sum(cosine.values()) / len(cosine)
        assert float(out.merged.threshold[b, h]) == pytest.approx(threshold)
        target = {t: j for t, j in target.items() if cosine[t] >= threshold}
        weights = {t: math.exp(cosine[t]) for t in target}
        same(out, b, h, paper.merged(k, v, kept, target, weights, dict.fromkeys(kept, math.e)), counts(kept, target))


def test_d2o_threshold_runs_along():
    data = random_data(4, lengths=(20, 20))
    p = parts(data.visible, Regions())
    index = torch.arange(16).expand(2, HEADS, -1)
    old = torch.full((2, HEADS), 0.25, dtype=torch.float64)
    kept = Kept(index, torch.full((2, HEADS), 16))
    rule = Merge("nearest", "exp_cos", ema=0.75)
    first = merge(rule, p, data.k[0], data.v[0], kept).threshold
    then = merge(rule, p, data.k[0], data.v[0], kept, threshold=old).threshold
    torch.testing.assert_close(then, 0.75 * first + 0.25 * old)
    everything = Kept(torch.arange(20).expand(2, HEADS, -1), torch.full((2, HEADS), 20))
    assert torch.equal(merge(rule, p, data.k[0], data.v[0], everything, threshold=old).threshold, old)


def test_elastic_cache():
    data = random_data(5)
    out = outcome(data, assign="nearest_pos", weight="mean")
    for b, h, k, v, kept in each_head(data, out):
        target = paper.nearest_position(kept, len(k))
        ones = dict.fromkeys(range(len(k)), 1.0)
        same(out, b, h, paper.merged(k, v, kept, target, ones, ones), counts(kept, target))


def test_kvmerger():
    """Runs of similar neighbours join their best kept token with Gaussian weights; others are dropped."""
    data = random_data(6)
    data.k[0].copy_(0.35 * data.k[0].cumsum(2) + data.k[0])  # neighbours are alike
    (out,) = run(spec_of(assign="adjacent", min_cos=0.75, weight="gauss"), data)
    joined = 0
    for b, h, k, v, kept in each_head(data, out):
        n = len(k)
        score = paper.h2o_scores(*data.row(0, b)[:2])[h]
        target = {}
        for run_ in paper.runs(k, paper.middle(n, 0, 5), 0.75):
            pivots = [t for t in run_ if t in kept]
            if pivots:
                pivot = max(pivots, key=lambda t: (float(score[t]), -t))
                target |= {t: pivot for t in run_ if t not in kept}
        weights = {}
        for j in set(target.values()):
            distance = {t: float((k[t] - k[j]).norm()) for t in target if target[t] == j}
            sigma = sum(distance.values()) / len(distance)
            weights |= {t: math.exp(-(d**2) / (2 * sigma**2)) for t, d in distance.items()}
        joined += len(target)
        same(out, b, h, paper.merged(k, v, kept, target, weights, dict.fromkeys(kept, 1.0)), counts(kept, target))
    assert joined > 20


def test_razor_compensation_token():
    """One more token for all that are dropped, mean key and mean value; it takes one place of the budget."""
    data = random_data(7)
    out = outcome(data, assign="single", weight="mean")
    for b, h, k, v, kept in each_head(data, out):
        assert len(kept) == 5 + 11
        gone = [t for t in range(len(k)) if t not in kept]
        torch.testing.assert_close(out.merged.k[b, h, -1], k[gone].mean(0))
        torch.testing.assert_close(out.merged.v[b, h, -1], v[gone].mean(0))
        assert float(out.merged.count[b, h, -1]) == len(gone)
    whole = random_data(8, lengths=(17, 9))
    out = outcome(whole, assign="single", weight="mean")
    assert out.kept.count.tolist() == [[17] * HEADS, [9] * HEADS] and not out.merged.count[..., -1].any()


def test_merging_twice_by_count_is_merging_once():
    """Tokens that stand for several weigh as many: the order of merging does not matter."""
    data = random_data(9, lengths=(30,))
    k, v = data.k[0], data.v[0]
    p = parts(data.visible, Regions())
    rule = Merge("nearest_pos", "count")
    once = merge(rule, p, k, v, kept_of([2, 14, 27]))
    first = merge(rule, p, k, v, kept_of([2, 8, 14, 21, 27]))
    assert first.count.sum(-1).tolist() == [[30.0] * HEADS]
    # 5 tokens, of which the middle of each pair goes to its neighbour: into the same sets
    again = merge(
        Merge("nearest_pos", "count"),
        parts(torch.ones(1, 5, dtype=torch.bool), Regions()),
        first.k,
        first.v,
        kept_of([0, 2, 4]),
        counts=first.count,
    )
    assert again.count.sum(-1).tolist() == [[30.0] * HEADS]
    total = (again.k * again.count.unsqueeze(-1)).sum(2)
    torch.testing.assert_close(total, k.sum(2))
    torch.testing.assert_close((once.k * once.count.unsqueeze(-1)).sum(2), k.sum(2))


def kept_of(index):
    return Kept(torch.tensor(index).expand(1, HEADS, -1), torch.full((1, HEADS), len(index)))


def test_adjacent_needs_scores():
    data = random_data(1, lengths=(30,))
    with pytest.raises(ValueError, match="scores"):
        merge(Merge("adjacent"), parts(data.visible, Regions()), data.k[0], data.v[0], kept_of([3]))
