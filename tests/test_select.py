"""Every index of `select` against its paper's formula, and attention over what is read."""

from __future__ import annotations

import math

import paper
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paper_select import best, pages
from test_keep_papers import GROUPS, HEADS, LENGTHS, WIDTH, random_data

from kvc_compile.kernels.keep.tokens import parts
from kvc_compile.kernels.select.index import build, compare, random_projection
from kvc_compile.kernels.select.selection import attention, capacity, outliers, select, source
from kvc_compile.policy import query_of, regions_of
from kvc_compile.spec import Spec

SCALE = WIDTH**-0.5


def read(select_spec, data, tokens=None, table=None):
    """What the newest query of each row reads: for each row and head, positions among the visible tokens."""
    full = Spec.load({"kvc": 1, "tokens": tokens or {}, "select": select_spec}).expanded()
    spec, regions = query_of(full["select"]), regions_of(full.get("tokens", {}))
    p = parts(data.visible, regions)
    k, n = data.k[0], data.k[0].shape[2]
    sketch = build(spec, k, p, table)
    pinned = outliers(spec, k, sketch, p) if spec.pin else None
    scores = compare(spec, data.q[0][:, :, -1], sketch, p, SCALE)
    kept = select(spec, scores, sketch, p, capacity(spec, regions, n), pinned)
    assert (kept.count <= kept.index.shape[-1]).all()
    out = []
    for b, length in enumerate(data.lengths):
        rows = [kept.index[b, h, : int(kept.count[b, h])].tolist() for h in range(HEADS)]
        assert all(-1 not in row for row in rows)
        out.append([[t - (n - length) for t in row] for row in rows])
    return out, kept


def of_group(q, h):
    return q[h * GROUPS : (h + 1) * GROUPS, -1]


def shared(logits, how):
    """The softmax weights of the query heads of a group, together. logits: [G, units]"""
    weights = (logits * SCALE).softmax(-1)
    return weights.max(0).values if how == "max" else weights.sum(0)


def rows_of(data):
    return [(n, *data.row(0, b)[:2]) for b, n in enumerate(data.lengths)]


@pytest.mark.parametrize("gqa", ["max", "mean", "sum"])
def test_tidaldecode(gqa):
    data = random_data(1)
    got, _ = read({"index": "exact", "unit": "token", "budget": 20, "gqa": gqa}, data)
    for (n, q, k), row in zip(rows_of(data), got):
        for h in range(HEADS):
            assert row[h] == paper.top(shared(of_group(q, h) @ k[h].T, gqa), 20, range(n))


@pytest.mark.parametrize("budget", ["1/16", 9])
def test_double_sparsity(budget):
    data = random_data(2)
    channels = torch.tensor([[0, 3], [5, 1], [2, 7]])
    index = {"basis": {"map": "channels", "table": "ds.json", "rank": "1/4"}}
    got, _ = read({"index": index, "budget": budget}, data, {"sink": 2}, channels)
    for (n, q, k), row in zip(rows_of(data), got):
        for h in range(HEADS):
            c = channels[h]
            score = shared(of_group(q, h)[:, c] @ k[h, 2:, c].T, "mean")  # of those that compete
            score = torch.cat([torch.zeros(2), score])
            count = n // 16 if budget == "1/16" else 9
            assert row[h] == sorted({0, 1, *paper.top(score, count, range(2, n))})
    with pytest.raises(ValueError, match="table"):
        read({"index": index, "budget": 5}, data)


@pytest.mark.parametrize("gqa", ["sum", "max"])
@pytest.mark.parametrize("center", [False, True])
def test_hata(gqa, center):
    data = random_data(3)
    w = random_projection(HEADS, WIDTH, 64, seed=5).double()
    index = {"basis": {"map": "random", "rank": 64}, "codec": {"int": 1}, **({"center": "mean"} if center else {})}
    got, _ = read({"index": index, "budget": "10%", "gqa": gqa}, data, table=w)
    for (n, q, k), row in zip(rows_of(data), got):
        for h in range(HEADS):
            keys = k[h] - k[h].mean(0) if center else k[h]
            codes = keys @ w[h] >= 0
            match = torch.stack([((x @ w[h] >= 0) == codes).sum(-1) for x in of_group(q, h)])
            score = match.sum(0) if gqa == "sum" else match.max(0).values
            assert row[h] == paper.top(score, n // 10, range(n))


@pytest.mark.parametrize("pin", [0, 2])
def test_shadowkv(pin):
    data = random_data(4)
    spec = {"index": {"pool": "mean"}, "unit": "chunk(8)", "budget": 24, "gqa": "max"}
    got, _ = read({**spec, **({"pin": {"outliers": pin}} if pin else {})}, data, {"recent": 5})
    for (n, q, k), row in zip(rows_of(data), got):
        units = pages(n, max(LENGTHS) - n, 8, recent=5)
        for h in range(HEADS):
            landmark = torch.stack([k[h, u].mean(0) for u in units])
            least = [min(paper.cos(k[h, t], landmark[i]) for t in u) for i, u in enumerate(units)]
            out = sorted(range(len(units)), key=lambda i: (least[i], i))[:pin]
            score = shared(of_group(q, h) @ landmark.T, "max")
            rest = [i for i in range(len(units)) if i not in out]
            chosen = best(score[rest], [units[i] for i in rest], 24)
            assert row[h] == sorted({*chosen, *(t for i in out for t in units[i]), *range(n - 5, n)})


def test_quest():
    data = random_data(5)
    got, _ = read({"index": {"pool": "minmax"}, "unit": "chunk(16)", "budget": 32, "gqa": "max"}, data)
    for (n, q, k), row in zip(rows_of(data), got):
        units = pages(n, max(LENGTHS) - n, 16)
        for h in range(HEADS):
            bound = torch.zeros(GROUPS, len(units), dtype=torch.float64)
            for g, x in enumerate(of_group(q, h)):
                for i, u in enumerate(units):
                    low, high = k[h, u].min(0).values, k[h, u].max(0).values
                    bound[g, i] = sum(max(float(x[c] * low[c]), float(x[c] * high[c])) for c in range(WIDTH))
            assert row[h] == sorted(best(shared(bound, "max"), units, 32))


def test_quest_bounds_every_logit_of_a_page():
    data = random_data(6)
    spec = query_of({"index": {"pool": "minmax"}, "unit": "chunk(16)", "budget": 32})
    p = parts(data.visible, regions_of({}))
    sketch = build(spec, data.k[0], p)
    from kvc_compile.kernels.select.index import KINDS

    q = data.q[0][:, :, -1].unflatten(1, (HEADS, GROUPS))
    bound = KINDS["minmax"].compare(q, sketch)
    logits = torch.einsum("bhgd,bhtd->bhgt", q, data.k[0])
    page = bound.gather(-1, sketch.unit.unsqueeze(2).expand_as(logits))
    assert (page >= logits - 1e-9)[data.visible[:, None, None].expand_as(page)].all()


def kmeans(k, clusters, iters):
    n = len(k)
    centroid = [k[i * n // clusters] for i in range(clusters)]
    for step in range(iters + 1):
        member = [max(range(clusters), key=lambda c: (paper.cos(x, centroid[c]), -c)) for x in k]
        if step < iters:
            for c in range(clusters):
                own = [t for t in range(n) if member[t] == c]
                centroid[c] = k[own].mean(0) if own else centroid[c]
    return torch.stack(centroid), member


@pytest.mark.parametrize(("iters", "alike"), [(1, False), (4, False), (3, True)])
def test_clusterkv(iters, alike):
    """alike: all clusters start from equal keys, so that all but one are empty, and keep their centroid."""
    data = random_data(7, lengths=(60, 41))
    if alike:
        data.k[0][:, :, 1::2] = data.k[0][:, :, 1:2]
    spec = {"index": {"pool": {"centroid": {"iters": iters}}}, "unit": "cluster(1/8)", "budget": 17, "gqa": "max"}
    got, _ = read(spec, data, {"sink": 3})
    for (n, q, k), row in zip(rows_of(data), got):
        for h in range(HEADS):
            centroid, member = kmeans(k[h, 3:], n // 8, iters)
            used = sorted(set(member))
            score = shared(of_group(q, h) @ centroid[used].T, "max")
            chosen = []
            for i in sorted(range(len(used)), key=lambda i: (-float(score[i]), i)):
                chosen += [t + 3 for t, c in enumerate(member) if c == used[i]]
            assert row[h] == sorted({0, 1, 2, *chosen[:17]})


def test_a_budget_of_units():
    data = random_data(8)
    got, _ = read({"index": {"pool": "mean"}, "unit": "chunk(8)", "budget": "3u", "gqa": "max"}, data)
    for n, row in zip(data.lengths, got):
        for h in range(HEADS):
            read_pages = {(max(LENGTHS) - n + t) // 8 for t in row[h]}
            assert len(read_pages) == 3


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(
        [
            {"index": "exact"},
            {"index": {"basis": {"map": "random", "rank": 16}, "codec": {"int": 1}}},
            {"index": {"pool": "mean"}, "unit": "chunk(7)"},
            {"index": {"pool": "minmax"}, "unit": "chunk(7)"},
            {"index": {"pool": {"centroid": {"iters": 2}}}, "unit": "cluster(1/5)"},
            {"index": {"pool": {"centroid": {"iters": 2}}}, "unit": "cluster(4)"},
            {"index": {"pool": "mean"}, "unit": "chunk(7)", "pin": {"outliers": 1}},
        ]
    ),
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.one_of(st.integers(0, 50), st.sampled_from(["25%", "1/3"])),
    st.integers(0, 5),
    st.integers(0, 20),
)
def test_every_selection(how, lengths, budget, sink, recent):
    data = random_data(1, lengths=tuple(lengths))
    got, kept = read({**how, "budget": budget}, data, {"sink": sink, "recent": recent})
    for n, row in zip(lengths, got):
        body = len(paper.middle(n, sink, recent))
        tokens = {"25%": n // 4, "1/3": n // 3}.get(budget, budget)
        for positions in row:
            assert positions == sorted(set(positions)) and all(0 <= t < n for t in positions)
            assert set(range(n)) - set(paper.middle(n, sink, recent)) <= set(positions)
            if "pin" not in how:
                assert len(positions) <= n - body + tokens
            if tokens >= body:
                assert positions == list(range(n))
            elif how["index"] == "exact" or "cluster" in how.get("unit", ""):
                assert len(positions) == n - body + tokens
    o, lse = attention(data.q[0][:, :, -1:], data.k[0], data.v[0], kept, SCALE)
    mask = kept.mask(max(lengths)).repeat_interleave(GROUPS, 1).unsqueeze(2)
    want = torch.nn.functional.scaled_dot_product_attention(
        data.q[0][:, :, -1:], data.k[0], data.v[0], mask, scale=SCALE, enable_gqa=True
    )
    empty = ~mask.any(-1, keepdim=True)
    torch.testing.assert_close(o, want.masked_fill(empty, 0))
    assert torch.equal(lse == -torch.inf, empty.squeeze(-1))


def test_bias_of_merged_tokens():
    """A token that stands for n others, with log n added to its logit, weighs as much as n of itself."""
    data = random_data(9, lengths=(12,))
    q, k, v = data.q[0][:, :, -1:], data.k[0][:, :, :3], data.v[0][:, :, :3]
    count = torch.tensor([1.0, 4.0, 2.0]).expand(1, HEADS, -1)
    from kvc_compile.kernels.keep.tokens import compact

    few = compact(torch.ones(1, HEADS, 3, dtype=torch.bool), 3)
    many = [0, 1, 1, 1, 1, 2, 2]
    all_of = compact(torch.ones(1, HEADS, 7, dtype=torch.bool), 7)
    o, lse = attention(q, k, v, few, SCALE, bias=count.log())
    want, want_lse = attention(q, k[:, :, many], v[:, :, many], all_of, SCALE)
    torch.testing.assert_close(o, want)
    torch.testing.assert_close(lse, want_lse)
    assert math.isfinite(float(lse.sum()))


def test_which_layer_selects():
    assert [source(i, (2, 13)) for i in (0, 1, 2, 5, 13, 20)] == [None, None, 2, 2, 13, 13]


def test_an_index_of_another_unit_is_refused():
    data = random_data(1)
    with pytest.raises(ValueError, match="chunk"):
        read({"index": "exact", "unit": "chunk(8)", "budget": 8}, data)


def test_nothing_is_copied_to_the_host():
    from torch._subclasses import FakeTensorMode

    regions = regions_of({"sink": 2})
    for how in (
        {"index": "exact"},
        {"index": {"basis": {"map": "random", "rank": 16}, "codec": {"int": 1}}},
        {"index": {"pool": "minmax"}, "unit": "chunk(8)"},
        {"index": {"pool": "mean"}, "unit": "chunk(8)", "pin": {"outliers": 2}},
        {"index": {"pool": {"centroid": {"iters": 2}}}, "unit": "cluster(1/5)"},
    ):
        spec = query_of({**how, "budget": "25%"})
        with FakeTensorMode(allow_non_fake_inputs=False):
            k, q = torch.empty(2, 3, 40, 8), torch.empty(2, 6, 1, 8)
            p = parts(torch.empty(2, 40, dtype=torch.bool), regions)
            sketch = build(spec, k, p, torch.empty(3, 8, 16) if spec.index.kind == "hash" else None)
            pinned = outliers(spec, k, sketch, p) if spec.pin else None
            scores = compare(spec, q[:, :, 0], sketch, p, 0.3)
            kept = select(spec, scores, sketch, p, capacity(spec, regions, 40), pinned)
            assert attention(q, k, k, kept, 0.3)[0].shape == q.shape
