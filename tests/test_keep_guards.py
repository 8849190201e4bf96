"""What must hold for every rule of `keep`, whatever the lengths: nothing is lost that the budget allows to stay."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_keep_papers import HEADS, random_data, rule_of

from kvc_compile.kernels.keep.merging import merge
from kvc_compile.kernels.keep.retention import leader
from kvc_compile.kernels.keep.rule import apply
from kvc_compile.kernels.keep.scoring import Chance, gumbel
from kvc_compile.kernels.keep.tokens import parts, scope
from kvc_compile.kernels.select.selection import attention
from kvc_compile.policy import Amount, capacity

FAST = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


def attn(**more):
    return {"attn": {"probe": "all", "reduce": "sum", **more}}


scores = st.sampled_from(
    [
        attn(),
        attn(probe="last 32", pool="max 7"),
        attn(probe="last 5", pool="avg 7", gqa="sum"),
        attn(probe="last 5%", reduce="mean", heads="mean"),
        attn(probe=["last 5", "rand 5"], reduce="mean"),
        attn(probe="all", reduce="count_below(1/t)"),
        attn(weight={"gumbel": {"tau": [1, 2]}}),
        attn(reduce="max", gqa="max"),
        {**attn(), "then": {"graph_decay": {"seeds": 4}}},
        {"kv": "lag(4)"},
        {"kv": "norm"},
        {"kv": "diff"},
        "fifo",
    ]
)
allocs = st.sampled_from(
    [
        "uniform",
        {"pyramid": 9},
        {"waterfill": "head", "floor": "20%"},
        {"waterfill": "layer", "cap": "3x"},
        {"waterfill": "model"},
        {"mass": "layer"},
        {"softmax": "attn_variance"},
    ]
)
budgets = st.one_of(
    st.integers(0, 60), st.sampled_from(["10%", "1/3", "0.25*n", "(n + 3)/2", "100%", {"mass": 0.5, "cap": "40%"}])
)
extras = st.sampled_from(
    [
        {},
        {"unit": {"chunk": 5, "reduce": "mean"}},
        {"unit": {"chunk": 64, "reduce": "max"}},
        {"protect": {"newest": 7}},
        {"diverse": {"share": "25%"}},
        {"reuse": "layers(2)"},
    ]
)
regions = st.fixed_dictionaries(
    {"sink": st.integers(0, 6), "recent": st.one_of(st.integers(0, 40), st.sampled_from(["10%", "50%"]))}
)


@st.composite
def cases(draw):
    keep = {"budget": draw(budgets), "score": draw(scores), **draw(extras)}
    attention = isinstance(keep["score"], dict) and "attn" in keep["score"]
    if isinstance(keep["budget"], dict):
        keep["score"] = keep["score"] if attention else attn()
    else:
        alloc = draw(allocs)
        keep["alloc"] = alloc if attention or not {"mass", "softmax"} & set(alloc) else "uniform"
    lengths = tuple(draw(st.lists(st.integers(1, 45), min_size=1, max_size=3)))
    return {"tokens": draw(regions), "keep": keep}, lengths, draw(st.integers(1, 3)), draw(st.integers(0, 99))


def run(spec, lengths, layers, seed):
    data = random_data(seed, layers, lengths)
    g = torch.Generator().manual_seed(seed)
    uniform = torch.rand(len(lengths), 99, generator=g)
    noise = gumbel(torch.rand(len(lengths), 6, 99, generator=g))
    n = max(lengths)
    chance = Chance(probe=uniform[:, -n:], noise=noise[..., -n:])
    rule, where = rule_of(spec)
    return data, rule, where, apply(rule, where, data.attentions, data.v, chance=chance)


@FAST
@given(cases())
def test_every_rule(case):
    _, lengths, layers, _ = case
    data, rule, where, out = run(*case)
    n = max(lengths)
    most = capacity(rule, where, n, layers, HEADS)
    total = torch.zeros(len(lengths), dtype=torch.long)
    for o in out:
        index, count = o.kept.index, o.kept.count
        assert index.shape == (len(lengths), HEADS, most)
        held = torch.arange(most) < count.unsqueeze(-1)
        assert torch.equal(index >= 0, held)  # holes are at the end
        later = index[..., 1:] > index[..., :-1]
        assert (later | ~held[..., 1:]).all()  # ascending, none twice
        mask = o.kept.mask(n)
        assert torch.equal(mask.sum(-1), count)
        assert not (mask & ~data.visible.unsqueeze(1)).any()  # hidden tokens never
        p = parts(data.visible, where)
        assert (mask | ~(p.sink | p.recent).unsqueeze(1)).all()  # regions always
        total += count.sum(-1)
        for b, length in enumerate(lengths):
            amount = None if rule.budget.tokens is None else rule.budget.tokens.of(length)
            body = int(p.candidates[b])
            if rule.budget.mass is None and amount >= body:
                assert (count[b] == length).all()  # a budget at least the length: nothing is lost
            if rule.alloc.kind == "uniform" and rule.chunk == 1 and rule.budget.mass is None:
                # tokens that come first are those of the body: the newest 7 are partly in the recent region
                newest = body if body < rule.newest else max(0, rule.newest - int(p.recent[b].sum()))
                assert (count[b] == length - body + min(body, max(amount, newest))).all()
    if rule.budget.mass is None and not rule.newest:
        p = parts(data.visible, where)
        budget = torch.tensor([rule.budget.tokens.of(x) for x in lengths])
        fixed = torch.tensor(lengths) - p.candidates
        assert (total <= layers * HEADS * (fixed + torch.minimum(budget, torch.tensor(lengths)))).all()


@FAST
@given(cases())
def test_a_padded_row_keeps_what_it_keeps_alone(case):
    _, lengths, _, seed = case
    data, rule, where, out = run(*case)
    n = max(lengths)
    g = torch.Generator().manual_seed(seed)
    uniform = torch.rand(len(lengths), 99, generator=g)
    noise = gumbel(torch.rand(len(lengths), 6, 99, generator=g))
    for b, length in enumerate(lengths):
        alone = [
            dataclasses.replace(
                a,
                q=a.q[b : b + 1, :, n - length :],
                k=a.k[b : b + 1, :, n - length :],
                lse=a.lse[b : b + 1, :, n - length :],
                visible=a.visible[b : b + 1, n - length :],
            )
            for a in data.attentions
        ]
        chance = Chance(probe=uniform[b : b + 1, 99 - length :], noise=noise[b : b + 1, :, 99 - length :])
        single = apply(rule, where, alone, [v[b : b + 1, :, n - length :] for v in data.v], chance=chance)
        for x, y in zip(out, single):
            assert torch.equal(x.kept.mask(n)[b, :, n - length :], y.kept.mask(length)[0])


@FAST
@given(
    cases(),
    st.sampled_from(["nearest", "nearest_pos", "adjacent", "single"]),
    st.sampled_from(["mean", "pivot", "exp_cos", "gauss", "count"]),
)
def test_merging_accounts_for_every_token(case, assign, weight):
    spec, lengths, layers, seed = case
    least = {} if assign == "single" else {"min_cos": 0.2}
    spec["keep"]["else"] = {"merge": {"assign": assign, "weight": weight, **least}}
    data, _, _, out = run(spec, lengths, layers, seed)
    for o, k in zip(out, data.k):
        merged = o.merged
        assert torch.isfinite(merged.k).all() and torch.isfinite(merged.v).all()
        total = merged.count.sum(-1) + merged.lost
        assert torch.equal(total, torch.tensor(lengths, dtype=total.dtype).unsqueeze(-1).expand_as(total))
        alone = (merged.count == 1)[..., : o.kept.index.shape[-1]].unsqueeze(-1) & ~o.kept.holes.unsqueeze(-1)
        x = merged.k[:, :, : o.kept.index.shape[-1]]
        torch.testing.assert_close(torch.where(alone, x, 0.0), torch.where(alone, o.kept.gather(k), 0.0))


@pytest.mark.parametrize("lengths", [(1,), (1, 1), (5, 1), (31, 32, 33)])
def test_short_prompts_change_nothing(lengths):
    """A prompt within the window, the pool and the budget: attention over what is kept is attention over all."""
    spec = {"tokens": {"recent": 32}, "keep": {"budget": 64, "score": attn(probe="last 32", pool="max 7")}}
    data, _, _, (out,) = run(spec, lengths, 1, 1)
    q = data.q[0][:, :, -1:]
    scale = q.shape[-1] ** -0.5
    o, lse = attention(q, data.k[0], data.v[0], out.kept, scale)
    mask = data.visible[:, None, None]
    want = torch.nn.functional.scaled_dot_product_attention(q, data.k[0], data.v[0], mask, scale=scale, enable_gqa=True)
    torch.testing.assert_close(o, want)
    torch.testing.assert_close(lse, data.attentions[0].lse[:, :, -1:])


def test_ties_go_to_the_earlier_token():
    data = random_data(1, lengths=(12,))
    for x in (*data.q, *data.k):
        x.zero_()
    rule, where = rule_of({"keep": {"budget": 4, "score": attn(probe="last 1")}})
    (out,) = apply(rule, where, data.attentions, data.v)
    assert out.kept.index[0].tolist() == [[0, 1, 2, 3]] * HEADS


def test_nothing_is_copied_to_the_host():
    """Under fake tensors a value cannot be read: all of it traces with shapes alone."""
    from torch._subclasses import FakeTensorMode

    spec = {
        "tokens": {"sink": 2, "recent": "10%"},
        "keep": {
            "budget": "25%",
            "score": {**attn(pool="max 7"), "then": {"graph_decay": {"seeds": 4}}},
            "else": {"merge": {"assign": "nearest", "weight": "mean"}},
        },
    }
    for alloc, more in (
        ("uniform", {}),
        ({"pyramid": 9}, {"unit": {"chunk": 5}}),
        ({"waterfill": "layer", "cap": "3x"}, {"diverse": {"share": "25%"}}),
        ({"mass": "layer"}, {"protect": {"newest": 7}}),
        ({"softmax": "attn_variance"}, {}),
    ):
        rule, where = rule_of({**spec, "keep": {**spec["keep"], "alloc": alloc, **more}})
        with FakeTensorMode(allow_non_fake_inputs=False):
            out = apply(rule, where, *fake_data())
            assert out[0].kept.index.shape[:2] == (2, HEADS)


def fake_data():
    from kvc_compile.kernels.keep.attention import Attention

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype)

    layers = [
        Attention(empty(2, 6, 40, 8), empty(2, 3, 40, 8), empty(2, 6, 40), empty(2, 40, dtype=torch.bool), scale=0.3)
        for _ in range(2)
    ]
    return layers, [empty(2, 3, 40, 8) for _ in range(2)]


@pytest.mark.parametrize(
    ("text", "n", "want"),
    [
        (7, 100, 7),
        ("25%", 7, 1),
        ("12.5%", 16, 2),
        ("1/3", 10, 3),
        ("10x", 6, 60),
        ("0.25*n", 9, 2),
        ("2 + 3*n", 4, 14),
        ("(2 + 3)*n", 4, 20),
        ("n - 9", 4, 0),
        ("n/2/2", 9, 2),
        ("n - 1 - 1", 9, 7),
        ("0.1*n", 10, 1),  # 1.0000000000000002 in floating point elsewhere: exact here
        ("29%", 100, 29),  # 28.999999999999996 in floating point
    ],
)
def test_amounts(text, n, want):
    amount = Amount.parse(text)
    assert amount.of(n) == want
    of_tensor = amount.of(torch.tensor([n, n]))
    assert of_tensor == want if isinstance(of_tensor, int) else of_tensor.tolist() == [want, want]


@pytest.mark.parametrize("text", ["", "n n", "(n", "1 +", "m", "__import__('os')", "2**n"])
def test_amounts_that_are_none(text):
    with pytest.raises(ValueError):
        Amount.parse(text)


def test_scopes_and_leaders():
    visible = torch.arange(10) >= torch.tensor([[0], [4]])
    prompt = torch.tensor([5, 4])
    assert scope(("prompt", 0), visible, prompt).sum(-1).tolist() == [5, 4]
    assert scope(("generated", 0), visible, prompt).sum(-1).tolist() == [5, 2]
    assert scope(("tail", 3), visible).tolist() == [[t >= 7 for t in range(10)]] * 2
    assert scope(None, visible) is None
    assert [leader(i, 3) for i in range(7)] == [0, 0, 0, 3, 3, 3, 6]


def test_merge_gives_back_the_dtype():
    data, rule, where, (out,) = run(
        {"keep": {"budget": 5, "else": {"merge": {"assign": "nearest", "weight": "mean"}}}}, (20,), 1, 1
    )
    p = parts(data.visible, where)
    merged = merge(rule.merge, p, data.k[0].bfloat16(), data.v[0].bfloat16(), out.kept)
    assert merged.k.dtype == merged.v.dtype == torch.bfloat16 and merged.count.dtype == torch.float32
