"""Every policy of `keep` against its paper's formula, head by head, on random data, in batches with left padding."""

from __future__ import annotations

from dataclasses import dataclass

import paper
import pytest
import torch

from kvc_compile.kernels.keep.attention import Attention
from kvc_compile.kernels.keep.rule import Outcome, apply
from kvc_compile.kernels.keep.scoring import Chance, gumbel
from kvc_compile.kernels.keep.tokens import Kept
from kvc_compile.policy import regions_of, rules_of
from kvc_compile.spec import Spec

LENGTHS = (97, 64, 41)
HEADS, GROUPS, WIDTH = 3, 2, 8


@dataclass
class Data:
    """Layers of attention over a padded batch."""

    q: list[torch.Tensor]
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    visible: torch.Tensor
    lengths: tuple[int, ...]

    @property
    def attentions(self) -> list[Attention]:
        return [given(q, k, self.visible) for q, k in zip(self.q, self.k)]

    def row(self, layer: int, b: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        first = self.visible.shape[1] - self.lengths[b]
        return tuple(x[layer][b, :, first:] for x in (self.q, self.k, self.v))


def given(q, k, visible):
    """The attention with the log-sum-exp that a model's own would leave."""
    scale = q.shape[-1] ** -0.5
    s = torch.einsum("bhqd,bhtd->bhqt", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    n = k.shape[2]
    sees = torch.ones(n, n, dtype=torch.bool).tril()[n - q.shape[2] :] & visible[:, None, None]
    return Attention(q, k, s.masked_fill(~sees, -torch.inf).logsumexp(-1), visible, scale)


def random_data(seed=0, layers=1, lengths=LENGTHS, heads=HEADS, groups=GROUPS, sharp=3.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    n, b = max(lengths), len(lengths)
    visible = torch.arange(n) >= n - torch.tensor(lengths).unsqueeze(-1)

    def make(h):
        return [torch.randn(b, h, n, WIDTH, generator=g, dtype=torch.float64).to(dtype) for _ in range(layers)]

    q = [x * sharp for x in make(heads * groups)]
    return Data(q, make(heads), make(heads), visible, lengths)


def rule_of(spec):
    full = Spec.load({"kvc": 1, **spec}).expanded()
    (rule,) = rules_of(full["keep"], trained=True)
    return rule, regions_of(full.get("tokens", {}))


def run(spec, data, **more) -> list[Outcome]:
    rule, regions = rule_of(spec)
    return apply(rule, regions, data.attentions, data.v, **more)


def slots(kept: Kept, b: int, h: int) -> list[int]:
    count = int(kept.count[b, h])
    row = kept.index[b, h].tolist()
    assert all(x == -1 for x in row[count:]) and all(x >= 0 for x in row[:count])
    return row[:count]


def same(kept: Kept, data: Data, b: int, want: list[list[int]]) -> None:
    first = data.visible.shape[1] - data.lengths[b]
    for h, expected in enumerate(want):
        assert slots(kept, b, h) == [first + t for t in expected], f"row {b}, head {h}"


SUM = {"attn": {"probe": "all", "reduce": "sum"}}

STEP = {"attn": {"probe": "step", "reduce": "sum"}}
MEAN = {"attn": {**SUM["attn"], "heads": "mean"}}


def last(w, **more):
    return {"attn": {"probe": f"last {w}", "reduce": "sum", **more}}


def scored(n, score, budget, sink=0, recent=0):
    return [paper.by_score(s, n, budget, sink, recent) for s in score]


# Each: a spec, and what the paper's formula keeps of one row, given q, k, v and n.
SIMPLE = {
    "streaming-llm": (
        {"tokens": {"sink": 4, "recent": 20}, "keep": {"budget": 0}},
        lambda q, k, v, n: [paper.streaming_llm(n, 4, 20)] * HEADS,
    ),
    "h2o": (
        {"tokens": {"recent": "10%"}, "keep": {"budget": "10%", "when": ["prefill_end", "append"], "score": SUM}},
        lambda q, k, v, n: scored(n, paper.h2o_scores(q, k), n // 10, recent=n // 10),
    ),
    "scissorhands": (
        {
            "tokens": {"recent": 10},
            "keep": {
                "budget": "20%",
                "score": {"attn": {"probe": "last 30", "reduce": "count_below(1/t)"}, "order": "asc"},
            },
        },
        lambda q, k, v, n: scored(n, paper.scissorhands_scores(q, k, 30), n // 5, recent=10),
    ),
    "snapkv-max": (
        {"tokens": {"recent": 8}, "keep": {"budget": 16, "score": last(8, pool="max 7")}},
        lambda q, k, v, n: scored(n, paper.snapkv_scores(q, k, 8), 16, recent=8),
    ),
    "snapkv-avg": (
        {"tokens": {"recent": 8}, "keep": {"budget": 16, "score": last(8, pool="avg 5")}},
        lambda q, k, v, n: scored(n, paper.snapkv_scores(q, k, 8, "avg", 5), 16, recent=8),
    ),
    "snapkv-even-pool": (
        {"tokens": {"recent": 8}, "keep": {"budget": 16, "score": last(8, pool="avg 4")}},
        lambda q, k, v, n: scored(n, paper.snapkv_scores(q, k, 8, "avg", 4), 16, recent=8),
    ),
    "lagkv": (
        {
            "tokens": {"sink": 3, "recent": 10},
            "keep": {"when": "chunk(10)", "budget": "25%", "score": {"kv": "lag(10)"}},
        },
        lambda q, k, v, n: scored(n, paper.lagkv_scores(k, v, 3, 10), n // 4, 3, 10),
    ),
    "graphkv": (
        {
            "tokens": {"recent": 8},
            "keep": {
                "budget": 16,
                "score": {**last(8, pool="max 7"), "then": {"graph_decay": {"seeds": 5, "lambda": 0.5, "rounds": 1}}},
            },
        },
        lambda q, k, v, n: scored(
            n,
            paper.graphkv_scores(paper.snapkv_scores(q, k, 8), k, paper.middle(n, 0, 8), 5, 0.5),
            16,
            recent=8,
        ),
    ),
    "graphkv-unlike-tokens": (  # of one seed, many are the opposite, and lose nothing
        {"keep": {"budget": 16, "score": {**last(8), "then": {"graph_decay": {"seeds": 1, "lambda": 0.9}}}}},
        lambda q, k, v, n: scored(n, paper.graphkv_scores(paper.h2o_like(q, k, 8), k, range(n), 1, 0.9), 16),
    ),
    "kvcrush": (
        {
            "tokens": {"recent": 8},
            "keep": {
                "budget": 20,
                "score": last(8),
                "diverse": {"share": "25%", "sketch": "headbits", "buckets": "hamming"},
            },
        },
        lambda q, k, v, n: paper.kvcrush(paper.h2o_like(q, k, 8), n, 20, 5, 0, 8),
    ),
    "windowkv": (
        {"tokens": {"recent": 8}, "keep": {"budget": 21, "unit": {"chunk": 8, "reduce": "mean"}, "score": last(8)}},
        lambda q, k, v, n: paper.windowkv(paper.h2o_like(q, k, 8), n, 21, 8, 0, 8),
    ),
    "adakv": (
        {
            "tokens": {"recent": 8},
            "keep": {"budget": 10, "alloc": {"waterfill": "head", "floor": "20%"}, "score": last(8, pool="max 7")},
        },
        lambda q, k, v, n: paper.adakv(paper.snapkv_scores(q, k, 8), n, 10, 2, 0, 8),
    ),
    "knorm": (
        {"keep": {"budget": 12, "score": {"kv": "norm"}}},
        lambda q, k, v, n: scored(n, -k.norm(dim=-1), 12),
    ),
    "keydiff": (
        {"keep": {"budget": 12, "score": {"kv": "diff"}}},
        lambda q, k, v, n: scored(
            n,
            torch.stack([
                torch.tensor([-paper.cos(x, (ks / ks.norm(dim=-1, keepdim=True)).mean(0)) for x in ks]) for ks in k
            ]),
            12,
        ),
    ),
    "prefixkv-score": (
        {"tokens": {"sink": 4, "recent": 1}, "keep": {"budget": "20%", "score": MEAN}},
        lambda q, k, v, n: scored(n, paper.h2o_scores(q, k).mean(0, keepdim=True).expand(HEADS, -1), n // 5, 4, 1),
    ),
    "ems-score": (
        {
            "tokens": {"recent": 8},
            "keep": {
                "budget": 12,
                "score": {
                    "attn": [{"probe": "all", "reduce": "mean"}, {"probe": "last 8", "reduce": "mean"}],
                    "combine": "max",
                },
            },
        },
        lambda q, k, v, n: scored(
            n,
            torch.maximum(paper.zipcache_scores(q, k, range(n)), paper.zipcache_scores(q, k, range(max(0, n - 8), n))),
            12,
            recent=8,
        ),
    ),
    "kvzip-score": (
        {"keep": {"budget": 12, "score": {"attn": {"probe": "all", "reduce": "max", "gqa": "max"}}}},
        lambda q, k, v, n: scored(
            n, torch.stack([a.amax((0, 1)) for a in paper.attention(q, k).chunk(HEADS)]), 12
        ),
    ),
    "fifo": (
        {"tokens": {"sink": 4}, "keep": {"budget": 9, "score": "fifo"}},
        lambda q, k, v, n: [paper.streaming_llm(n, 4, 9)] * HEADS,
    ),
    "locret-protect": (
        {"tokens": {"recent": 3}, "keep": {"budget": 20, "protect": {"newest": 12}, "score": SUM}},
        lambda q, k, v, n: [
            sorted({*range(n - 12, n), *paper.top(s, 20 - 9, range(n - 12))}) for s in paper.h2o_scores(q, k)
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIMPLE)
def test_keeps_what_the_paper_keeps(name):
    spec, expected = SIMPLE[name]
    data = random_data(len(name))
    (out,) = run(spec, data)
    for b, n in enumerate(data.lengths):
        same(out.kept, data, b, expected(*data.row(0, b), n))


@pytest.mark.parametrize("name", ["h2o", "snapkv-max", "snapkv-avg", "adakv", "lagkv", "kvzip-score"])
def test_in_single_precision(name):
    """The scores agree to rounding, so the sets differ in what is as good as tied, if at all."""
    spec, expected = SIMPLE[name]
    data = random_data(7, dtype=torch.float32)
    (out,) = run(spec, data)
    for b, n in enumerate(data.lengths):
        want = expected(*(x.double() for x in data.row(0, b)), n)
        first = data.visible.shape[1] - n
        for h, w in enumerate(want):
            assert len(set(slots(out.kept, b, h)) ^ {first + t for t in w}) <= 2


def per_layer(data, b, f):
    return [f(*data.row(layer, b)) for layer in range(len(data.q))]


def counts_of(outcomes, b):
    return [out.kept.count[b].tolist() for out in outcomes]


def test_adakv_guarantees_each_head_its_floor():
    """A head whose attention is flat would get next to nothing."""
    data = random_data(15)
    data.k[0][:, 0] *= 0.01
    spec = {"tokens": {"recent": 8}, "keep": {"budget": 8, "alloc": {"waterfill": "head"}, "score": last(8)}}
    (without,) = run(spec, data)
    spec["keep"]["alloc"] = {"waterfill": "head", "floor": "50%"}
    (out,) = run(spec, data)
    assert (without.kept.count[:, 0] < 8 + 4).all() and (out.kept.count[:, 0] == 8 + 4).all()
    for b, n in enumerate(data.lengths):
        q, k, _ = data.row(0, b)
        same(out.kept, data, b, paper.adakv(paper.h2o_like(q, k, 8), n, 8, 4, 0, 8))


def test_keyformer():
    data = random_data(1)
    noise = gumbel(torch.rand(len(LENGTHS), HEADS * GROUPS, max(LENGTHS), generator=torch.Generator().manual_seed(1)))
    score = {"attn": {"probe": "all", "reduce": "sum", "weight": {"gumbel": {"tau": [1, 2]}}}}
    spec = {"tokens": {"recent": "15%"}, "keep": {"budget": "35%", "score": score}}
    for progress, tau in ((0.0, 1.0), (0.5, 1.5)):
        (out,) = run(spec, data, chance=Chance(noise=noise, progress=progress))
        for b, n in enumerate(data.lengths):
            q, k, _ = data.row(0, b)
            scores = paper.keyformer_scores(q, k, noise[b, :, -n:].double(), tau)
            same(out.kept, data, b, scored(n, scores, n * 35 // 100, recent=n * 15 // 100))
    with pytest.raises(ValueError, match="noise"):
        run(spec, data)


def test_zipcache_probes():
    """The last 10 % of the queries, and as many others at random; what is not kept is the second set."""
    data = random_data(2)
    chance = torch.rand(len(LENGTHS), max(LENGTHS), generator=torch.Generator().manual_seed(2))
    score = {"attn": {"probe": ["rand 10%", "last 10%"], "reduce": "mean"}}
    demote = {"demote": {"codec": {"int": 2}}}
    spec = {"tokens": {"recent": 10}, "keep": {"budget": "40%", "score": score, "else": demote}}
    (out,) = run(spec, data, chance=Chance(probe=chance))
    for b, n in enumerate(data.lengths):
        newest = list(range(n - n // 10, n))
        others = sorted(range(n - n // 10), key=lambda t: -float(chance[b, chance.shape[1] - n + t]))[: n // 10]
        scores = paper.zipcache_scores(*data.row(0, b)[:2], newest + others)
        want = scored(n, scores, n * 40 // 100, recent=10)
        same(out.kept, data, b, want)
        same(out.demoted, data, b, [sorted(set(range(n)) - set(w)) for w in want])


def test_zipvl_mass():
    data = random_data(3)
    (out,) = run({"keep": {"budget": {"mass": 0.7, "cap": "40%"}, "score": SUM}}, data)
    for b, n in enumerate(data.lengths):
        want = []
        for s in paper.h2o_scores(*data.row(0, b)[:2]):
            held, chosen = 0.0, []
            for t in paper.top(s, 0, []) or sorted(range(n), key=lambda t: (-float(s[t]), t)):
                if held >= 0.7 * float(s.sum()) or len(chosen) == n * 40 // 100:
                    break
                held += float(s[t])
                chosen.append(t)
            want.append(sorted(chosen))
        same(out.kept, data, b, want)


def test_prefixkv_mass():
    data = random_data(4, layers=4)
    for layer, q in enumerate(data.q):
        q *= 0.3 + layer
    spec = {"tokens": {"sink": 4, "recent": 1}, "keep": {"budget": "20%", "score": MEAN, "alloc": {"mass": "layer"}}}
    out = run(spec, data)
    for b, n in enumerate(data.lengths):
        scores = per_layer(data, b, lambda q, k, v: paper.h2o_scores(q, k))
        counts = paper.prefixkv_counts(scores, n, n // 5, 4, 1)
        assert len(set(counts)) > 1 and sum(counts) == 4 * (n // 5)
        for layer, count in enumerate(counts):
            mean = scores[layer].mean(0, keepdim=True).expand(HEADS, -1)
            same(out[layer].kept, data, b, scored(n, mean, count, 4, 1))


@pytest.mark.parametrize("cap", [2, 10])
def test_dynamickv(cap):
    data = random_data(5, layers=3, lengths=(60, 41))
    for layer, q in enumerate(data.q):
        q *= 0.2 + layer
    alloc = {"waterfill": "layer", "cap": f"{cap}x"}
    spec = {"tokens": {"recent": 8}, "keep": {"budget": 6, "alloc": alloc, "score": last(8, pool="avg 7")}}
    out = run(spec, data)
    for b, n in enumerate(data.lengths):
        scores = per_layer(data, b, lambda q, k, v: paper.snapkv_scores(q, k, 8, "avg", 7))
        counts = paper.dynamickv_counts(scores, n, 6, 6 * cap, 0, 8)
        for layer, count in enumerate(counts):
            same(out[layer].kept, data, b, scored(n, scores[layer], count, recent=8))


def test_kvzip_over_the_model():
    data = random_data(6, layers=3, lengths=(50, 31))
    score = {"attn": {"probe": "all", "reduce": "max", "gqa": "max"}}
    out = run({"keep": {"budget": "30%", "alloc": {"waterfill": "model", "floor": 0}, "score": score}}, data)
    for b, n in enumerate(data.lengths):
        scores = per_layer(data, b, lambda q, k, v: [a.amax((0, 1)) for a in paper.attention(q, k).chunk(HEADS)])
        flat = sorted((-float(scores[i][h][t]), i, h, t) for i in range(3) for h in range(HEADS) for t in range(n))
        best = flat[: n * 30 // 100 * HEADS * 3]
        for i in range(3):
            same(out[i].kept, data, b, [sorted(t for _, j, g, t in best if (j, g) == (i, h)) for h in range(HEADS)])


@pytest.mark.parametrize(("layers", "beta"), [(5, 20), (4, 3), (1, 7), (2, 1)])
def test_pyramid(layers, beta):
    data = random_data(7, layers=layers, lengths=(97, 80))
    alloc = {"pyramid": 2 * beta - 1}
    out = run({"tokens": {"recent": 8}, "keep": {"budget": 20, "alloc": alloc, "score": last(8)}}, data)
    want = paper.pyramid_counts(20, layers, beta) if layers > 1 else [20]
    for b in range(2):
        got = [c[0] - 8 for c in counts_of(out, b)]
        assert sum(got) == 20 * layers
        assert all(abs(g - w) <= 1 for g, w in zip(got, want))


def test_headkv_table():
    data = random_data(8, layers=3, lengths=(97, 80))
    share = torch.rand(3, HEADS, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    share /= share.sum()
    alloc = {"table": "t.json", "beta": 1.25}
    out = run({"tokens": {"recent": 8}, "keep": {"budget": 20, "alloc": alloc, "score": last(8)}}, data, table=share)
    assert [[c - 8 for c in row] for row in counts_of(out, 0)] == paper.headkv_counts(share, 20, 1.25)
    with pytest.raises(ValueError, match="table"):
        run({"keep": {"budget": 20, "alloc": alloc, "score": SUM}}, data)


def test_d2o_layers():
    data = random_data(9, layers=3)
    for layer, q in enumerate(data.q):
        q *= 0.1 + layer
    spec = {"tokens": {"recent": 4}, "keep": {"budget": 12, "alloc": {"softmax": "attn_variance"}, "score": SUM}}
    out = run(spec, data)
    for b, n in enumerate(data.lengths):
        scores = per_layer(data, b, lambda q, k, v: paper.h2o_scores(q, k))
        share = paper.softmax([-float(s.mean(0)[: n - 4].var(unbiased=False)) for s in scores])
        for layer, s in enumerate(share):
            count = min(n - 4, int(12 * 3 * s))
            same(out[layer].kept, data, b, scored(n, scores[layer], count, recent=4))


def test_layers_reuse_the_first_of_a_group():
    data = random_data(10, layers=5)
    spec = {
        "tokens": {"recent": 8},
        "keep": {"budget": 16, "unit": {"chunk": 4}, "reuse": "layers(2)", "score": last(8)},
    }
    out = run(spec, data)
    for layer in range(5):
        assert torch.equal(out[layer].kept.index, out[layer // 2 * 2].kept.index)
        for b, n in enumerate(data.lengths):
            s = paper.h2o_like(*data.row(layer // 2 * 2, b)[:2], 8)
            same(out[layer].kept, data, b, paper.windowkv(s, n, 16, 4, 0, 8))


def test_spatten_adds_up_layers():
    data = random_data(11, layers=3)
    spec = {"keep": {"budget": 9, "score": {"attn": {**SUM["attn"], "heads": "sum", "across": "layers"}}}}
    out = run(spec, data)
    for b, n in enumerate(data.lengths):
        total = 0
        for layer, s in enumerate(per_layer(data, b, lambda q, k, v: paper.h2o_scores(q, k).sum(0, keepdim=True))):
            total = total + s
            same(out[layer].kept, data, b, scored(n, total.expand(HEADS, -1), 9))


def test_lookm_keeps_text_before_images():
    data = random_data(12)
    text = torch.rand(data.visible.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    spec = {"tokens": {"recent": 4}, "keep": {"budget": 25, "score": {**SUM, "then": "mask(modality == text)"}}}
    (out,) = run(spec, data, allowed=text)
    for b, n in enumerate(data.lengths):
        scores = paper.h2o_scores(*data.row(0, b)[:2])
        shown = text[b, -n:]
        for h in range(HEADS):
            ranked = sorted(range(n - 4), key=lambda t: (not shown[t], -float(scores[h, t]) if shown[t] else 0, t))
            first = max(LENGTHS) - n
            assert slots(out.kept, b, h) == [first + t for t in sorted(ranked[:25]) + list(range(n - 4, n))]
    with pytest.raises(ValueError, match="modality"):
        run(spec, data)


def test_scope_has_a_budget_for_the_prompt_and_one_for_the_answer():
    data = random_data(13)
    prompt = torch.tensor([50, 40, 41])
    rules = rules_of(
        Spec.load(
            {
                "keep": [
                    {"of": "prompt", "when": "prefill_end", "budget": 20, "score": last(8)},
                    {
                        "of": "generated",
                        "when": "every(15)",
                        "budget": 7,
                        "score": {"attn": {"probe": "step", "reduce": "sum"}},
                    },
                ]
            }
        ).expanded()["keep"]
    )
    regions = regions_of({"recent": 6})
    for rule, window in zip(rules, (8, 1)):
        (out,) = apply(rule, regions, data.attentions, data.v, prompt=prompt)
        for b, n in enumerate(data.lengths):
            own = range(int(prompt[b])) if rule.of == ("prompt", 0) else range(int(prompt[b]), n)
            among = [t for t in own if t < n - 6]
            scores = paper.h2o_like(*data.row(0, b)[:2], window)
            want = [
                sorted((set(range(n)) - set(among)) | set(paper.top(s, rule.budget.tokens.of(n), among)))
                for s in scores
            ]
            same(out.kept, data, b, want)
    with pytest.raises(ValueError, match="prompt"):
        run({"keep": {"of": "prompt", "budget": 3, "score": SUM}}, data)


def test_a_tail_gives_up_its_oldest():
    """PrefixKV and Elastic Cache drop, at each step, the token at a fixed distance from the end."""
    data = random_data(14)
    (out,) = run({"keep": {"when": "append", "of": "tail(25)", "score": "fifo", "budget": 24}}, data)
    for b, n in enumerate(data.lengths):
        same(out.kept, data, b, [[t for t in range(n) if t != n - 25]] * HEADS)
