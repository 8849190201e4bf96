"""The column pass: which keys a query sees, what is carried through decoding, and what it costs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_keep_papers import GROUPS, HEADS, LENGTHS, given, random_data

from kvc_compile.kernels.keep.attention import Attention, columns, reduced, take
from kvc_compile.kernels.keep.probes import rows
from kvc_compile.kernels.keep.scoring import Chance, gumbel, observe, score, step
from kvc_compile.kernels.keep.tokens import parts
from kvc_compile.policy import Amount, AttentionScore, Probe, Regions, Score, score_of

ALL = (Probe("all"),)


def sdpa_weights(data, scale, mask, cap=None):
    """The attention matrix as a model computes it, [B, Hq, n, n], 0 for queries that see nothing."""
    k = data.k[0].repeat_interleave(GROUPS, 1)
    s = torch.einsum("bhqd,bhtd->bhqt", data.q[0], k) * scale
    s = s if cap is None else cap * torch.tanh(s / cap)
    s = s.masked_fill(~mask, -torch.inf)
    return s.softmax(-1).nan_to_num(0.0), s.logsumexp(-1)


@pytest.mark.parametrize("kind", ["plain", "window", "cap", "mask", "per-head mask"])
def test_columns_are_those_of_the_attention_that_runs(kind):
    data = random_data(1)
    n = max(LENGTHS)
    mask = torch.ones(n, n, dtype=torch.bool).tril() & data.visible[:, None, None] & data.visible[:, None, :, None]
    mask = mask.expand(-1, HEADS * GROUPS, -1, -1)
    given_mask = None
    if kind == "window":
        mask = mask & torch.ones(n, n, dtype=torch.bool).triu(1 - 20)
    if "mask" in kind:
        shape = (len(LENGTHS), HEADS * GROUPS if kind != "mask" else 1, n, n)
        given_mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7
        mask = mask & given_mask
    cap = 2.0 if kind == "cap" else None
    want, lse = sdpa_weights(data, 0.3, mask, cap)
    window = 20 if kind == "window" else None
    a = Attention(data.q[0], data.k[0], lse, data.visible, 0.3, mask=given_mask, window=window, cap=cap)
    for probe, first in ((ALL, 0), ((Probe("last", Amount.parse(30)),), 30)):
        for block in (7, 1000):
            spec = AttentionScore(probe, "sum", gqa="sum")
            got = reduced(spec, columns(spec, a, rows(probe, data.visible, n), block=block))
            torch.testing.assert_close(got, want[:, :, -first:].sum(2).unflatten(1, (HEADS, GROUPS)).sum(2))


@pytest.mark.parametrize("gqa", ["mean", "max", "sum"])
@pytest.mark.parametrize("heads", [None, "mean", "sum"])
def test_heads(gqa, heads):
    data = random_data(2)
    spec = AttentionScore(ALL, "sum", gqa=gqa, heads=heads)
    c = columns(spec, data.attentions[0], rows(ALL, data.visible, max(LENGTHS)))
    want = getattr(c.total, "amax" if gqa == "max" else gqa)(2)
    if heads:
        want = getattr(want, heads)(1, keepdim=True).expand_as(want)
    torch.testing.assert_close(reduced(spec, c), want)


def test_only_some_queries_are_needed():
    """The newest queries suffice for a probe of the last ones, whatever the shape of the rest."""
    data = random_data(3)
    a = data.attentions[0]
    short = dataclasses.replace(a, q=a.q[:, :, -16:], lse=a.lse[:, :, -16:])
    spec = score_of({"attn": {"probe": "last 16", "reduce": "sum"}})
    p = parts(data.visible, Regions())
    x, y = (score(spec, p, a.k, data.v[0], observe(spec, z)) for z in (a, short))
    torch.testing.assert_close(x, y)
    with pytest.raises(ValueError, match="needs 97 queries, 16 are at hand"):
        observe(score_of({"attn": {"probe": "all", "reduce": "sum"}}), short)


def decoded(spec: Score, data, prompt: int, chance=None):
    """The state after a prefill of `prompt` slots, and then one query at a time."""
    a = data.attentions[0]

    def upto(n, queries):
        return Attention(
            a.q[:, :, n - queries : n], a.k[:, :, :n], a.lse[:, :, n - queries : n], a.visible[:, :n], a.scale
        )

    def noise(n):
        return Chance() if chance is None else Chance(noise=chance[..., :n])

    state = observe(spec, upto(prompt, prompt), noise(prompt))
    for n in range(prompt + 1, a.k.shape[2] + 1):
        state = step(spec, state, upto(n, 1), noise(n))
    return state


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "count_below(1/t)", "count_below(0.01)"])
@pytest.mark.parametrize("weight", [None, 2.0])
def test_carried_scores_are_those_of_the_whole_text(reduce, weight):
    data = random_data(4, lengths=(40, 40, 23))
    chance = None
    how = {"attn": {"probe": "all", "reduce": reduce, "gqa": "max"}}
    if weight:
        how["attn"]["weight"] = {"gumbel": {"tau": weight}}
        chance = gumbel(torch.rand(3, HEADS * GROUPS, 40, generator=torch.Generator().manual_seed(4)))
    spec = score_of(how)
    p = parts(data.visible, Regions())
    whole = observe(spec, data.attentions[0], Chance(noise=chance))
    parts_ = decoded(spec, data, 30, chance)
    x, y = (score(spec, p, data.k[0], data.v[0], s) for s in (whole, parts_))
    torch.testing.assert_close(x, y)


def test_a_step_forgets_or_cannot_be_carried():
    data = random_data(5, lengths=(20, 20))
    p = parts(data.visible, Regions())
    newest = score_of({"attn": {"probe": "step", "reduce": "sum"}})
    want = score(newest, p, data.k[0], data.v[0], observe(newest, data.attentions[0]))
    torch.testing.assert_close(score(newest, p, data.k[0], data.v[0], decoded(newest, data, 18)), want)
    for probe in ("last 5", "rand 5"):
        spec = score_of({"attn": {"probe": probe, "reduce": "sum"}})
        with pytest.raises(ValueError, match="cannot be carried"):
            step(
                spec,
                observe(score_of({"attn": {"probe": "all", "reduce": "sum"}}), data.attentions[0]),
                data.attentions[0],
            )


def test_state_after_an_eviction():
    """Kept slots keep their score; a query that sees all slots adds to them in whatever order they are."""
    data = random_data(6, lengths=(20, 20))
    spec = score_of({"attn": {"probe": "all", "reduce": "mean"}})
    (state,) = observe(spec, data.attentions[0])
    index = torch.tensor([[3, 9, 17, -1], [0, 1, 2, 3]])[:, None].expand(-1, HEADS, -1)
    kept = take(state, index)
    assert torch.equal(kept.total[0, :, :, :3], state.total[0][:, :, [3, 9, 17]])
    k = data.k[0].gather(2, index.clamp(min=0)[..., None].expand(-1, -1, -1, data.k[0].shape[-1]))
    visible = index[:, 0] >= 0
    a = dataclasses.replace(given(data.q[0][:, :, -1:], k, visible), causal=False)
    (after,) = step(spec, (kept,), a)
    p = parts(visible, Regions())
    got = score(spec, p, k, k, (after,))
    assert got[0, 0, 3] == -torch.inf and torch.isfinite(got[1]).all()
    assert torch.equal(after.seen[0, 0, 0], kept.seen[0, 0, 0] + torch.tensor([1, 1, 1, 0]))


def test_random_probes():
    visible = torch.arange(50) >= torch.tensor([[0], [20], [49]])
    chance = torch.rand(3, 50, generator=torch.Generator().manual_seed(1))
    found = rows((Probe("last", Amount.parse("10%")), Probe("rand", Amount.parse(7))), visible, 50, chance)
    for b, n in enumerate((50, 30, 1)):
        voters = found.slot[b][found.votes[b]].tolist()
        newest = max(1, n // 10)
        assert len(voters) == len(set(voters)) == min(n, newest + 7)
        assert set(range(50 - newest, 50)) <= set(voters) and min(voters) >= 50 - n
        others = sorted(range(50 - n, 50 - newest), key=lambda t: -float(chance[b, t]))[:7]
        assert sorted(voters)[: len(others)] == sorted(others)
    with pytest.raises(ValueError, match="random"):
        rows((Probe("rand", Amount.parse(3)),), visible, 50)


def test_the_matrix_is_never_formed(monkeypatch):
    """At most a block of rows by all keys exists at a time."""
    data = random_data(7, lengths=(300,))
    seen = []
    real = torch.einsum

    def spy(*args):
        out = real(*args)
        seen.append(out.shape[-2])
        return out

    a = data.attentions[0]
    monkeypatch.setattr(torch, "einsum", spy)
    spec = score_of({"attn": {"probe": "all", "reduce": "sum"}})
    observe(spec, a)
    assert max(seen) == 64 and sum(seen) == 300


def test_half_precision_is_summed_in_single():
    data = random_data(8)
    a = data.attentions[0]
    half = dataclasses.replace(a, q=a.q.bfloat16(), k=a.k.bfloat16())
    spec = score_of({"attn": {"probe": "all", "reduce": "sum"}})
    (state,) = observe(spec, half)
    assert state.total.dtype == torch.float32
    exact = dataclasses.replace(a, q=half.q.double(), k=half.k.double())
    torch.testing.assert_close(state.total.double(), observe(spec, exact)[0].total, atol=1e-4, rtol=1e-4)
