"""Trained scores, folds and mixes against the papers' formulas, token by token, with random maps; and their files."""

from __future__ import annotations

import json
import math
import struct

import pytest
import test_keep_papers
import torch
from test_keep_papers import GROUPS, HEADS, SUM, WIDTH, random_data, rule_of, slots

from kvc_compile import maps
from kvc_compile.kernels.keep import fold as folding
from kvc_compile.kernels.keep.learned import RetainingHead, retaining
from kvc_compile.kernels.keep.mixing import Mixer
from kvc_compile.kernels.keep.trained import Trained
from kvc_compile.kernels.select.selection import attention
from kvc_compile.policy import Unbuilt, rules_of
from kvc_compile.spec import Spec, SpecError

SLOTS, TAPS, HIDDEN = 4, 5, 6


def randn(g, *shape):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def random_maps(rank, g):
    heads = HEADS * GROUPS
    return folding.FeatureMaps(
        randn(g, heads, WIDTH, HIDDEN), randn(g, heads, HIDDEN, rank), randn(g, HEADS, WIDTH, HIDDEN),
        randn(g, HEADS, HIDDEN, rank), randn(g, HEADS, rank, rank), randn(g, HEADS, rank), randn(g, HEADS, rank),
    )  # fmt: skip


def random_mixer(slots, g):
    return Mixer(randn(g, slots, 2 * WIDTH, TAPS), randn(g, slots), torch.tensor([0.4], dtype=torch.float64))


def gelu(x):
    return torch.tensor([float(t) * 0.5 * (1 + math.erf(float(t) / math.sqrt(2))) for t in x], dtype=torch.float64)


# ---------------------------------------------------------------- Locret


@pytest.mark.parametrize(("inputs", "act"), [(("q", "k", "v"), "silu"), (("v", "k"), "gelu")])
def test_locret_scores(inputs, act):
    g = torch.Generator().manual_seed(1)
    data = random_data(1)
    sizes = {"q": HEADS * GROUPS * WIDTH, "k": HEADS * WIDTH, "v": HEADS * WIDTH}
    head = RetainingHead(randn(g, HIDDEN, sum(sizes[x] for x in inputs)), randn(g, HEADS, HIDDEN), inputs, act)
    got = retaining(head, data.q[0], data.k[0], data.v[0])
    given = {"q": data.q[0], "k": data.k[0], "v": data.v[0]}
    for b, t in ((0, 0), (1, 50), (2, 96)):
        x = torch.tensor([float(n) for name in inputs for h in given[name][b] for n in h[t]], dtype=torch.float64)
        up = [sum(w * n for w, n in zip(row, x)) for row in head.up]
        hidden = [u / (1 + math.exp(-u)) if act == "silu" else float(gelu([u])[0]) for u in map(float, up)]
        want = [sum(float(w) * n for w, n in zip(row, hidden)) for row in head.down]
        assert got[b, :, t].tolist() == pytest.approx(want)


def test_locret_keeps_the_best_and_the_newest():
    g, data = torch.Generator().manual_seed(2), random_data(2)
    scores = torch.rand(3, HEADS, 97, generator=g, dtype=torch.float64)
    spec = {
        "tokens": {"recent": 4},
        "keep": {"budget": 20, "protect": {"newest": 9}, "score": {"learned": "l.safetensors"}},
    }
    (out,) = test_keep_papers.run(spec, data, trained=[Trained(scores)])
    for b, n in enumerate(data.lengths):
        for h in range(HEADS):
            row = scores[b, h, 97 - n :]
            stays = set(range(n - 9, n))  # of which the window takes 4
            rest = sorted(set(range(n)) - stays, key=lambda t: -float(row[t]))
            assert slots(out.kept, b, h) == sorted(97 - n + t for t in stays | set(rest[:15]))
    with pytest.raises(ValueError, match=r"l\.safetensors"):
        test_keep_papers.run(spec, data)


# ---------------------------------------------------------------- LESS


def phi(m, x, h):
    return gelu(gelu(x @ m.q1[h]) @ m.q2[h]).abs()


def psi(m, x, h):
    u = m.s1[h].abs() * gelu(gelu(x @ m.k1[h]) @ m.k2[h])
    return (u + (u @ m.mix[h]) * m.s2[h]).abs()


def test_less_reads_what_was_folded():
    """One softmax over the kept tokens' logits and log(phi psi) of the others, which H2O drops."""
    rank, g = 5, torch.Generator().manual_seed(3)
    data, m = random_data(3), random_maps(rank, g)
    spec = {
        "tokens": {"recent": 6},
        "keep": {"budget": 10, "score": SUM, "else": {"fold": {"map": "m.safetensors", "rank": rank}}},
    }
    (out,) = test_keep_papers.run(spec, data, trained=[Trained(maps=m)])
    q = data.q[0][:, :, -2:]
    scale = WIDTH**-0.5
    o, lse = folding.joined([attention(q, data.k[0], data.v[0], out.kept, scale), folding.read(m, out.folded, q)])
    for b, n in enumerate(data.lengths):
        for h in range(HEADS * GROUPS):
            kv = h // GROUPS
            kept = set(slots(out.kept, b, kv))
            assert len(kept) == 16
            for i in range(2):
                k, v = data.k[0][b, kv], data.v[0][b, kv]
                logits = {
                    t: float(q[b, h, i] @ k[t]) * scale
                    if t in kept
                    else math.log(float(phi(m, q[b, h, i], h) @ psi(m, k[t], kv)))
                    for t in range(97 - n, 97)
                }
                total = sum(map(math.exp, logits.values()))
                want = sum(math.exp(x) / total * v[t] for t, x in logits.items())
                torch.testing.assert_close(o[b, h, i], want)
                assert float(lse[b, h, i]) == pytest.approx(math.log(total))
    with pytest.raises(ValueError, match=r"m\.safetensors"):
        test_keep_papers.run(spec, data)


def test_less_folds_in_parts_as_at_once():
    g = torch.Generator().manual_seed(4)
    data, m = random_data(4), random_maps(3, g)
    k, v = data.k[0], data.v[0].clone()
    going = torch.rand(k.shape[:3], generator=g) < 0.5
    v[~going] = math.nan  # what is not folded may be anything
    start = folding.empty(m, 3, v)
    assert folding.read(m, start, data.q[0])[1].isinf().all() and not folding.read(m, start, data.q[0])[0].any()
    once = folding.fold(m, start, k, v, going)
    early = torch.arange(97) < 40
    twice = folding.fold(m, folding.fold(m, start, k, v, going & early), k, v, going & ~early)
    torch.testing.assert_close(once.h, twice.h)
    torch.testing.assert_close(once.z, twice.z)
    none = torch.zeros(1, 1, 2, 3), torch.full((1, 1, 2), -torch.inf)
    o, lse = folding.joined([none, none])
    assert not o.any() and lse.isinf().all()


# ---------------------------------------------------------------- LoCoCo


def test_lococo_mixes_what_goes():
    g = torch.Generator().manual_seed(5)
    data, m = random_data(5, lengths=(60, 41, 17)), random_mixer(SLOTS, g)
    spec = {
        "tokens": {"recent": 6},
        "keep": {"budget": 8, "score": SUM, "else": {"merge": {"assign": "learned(m.safetensors)", "slots": SLOTS}}},
    }
    (out,) = test_keep_papers.run(spec, data, trained=[Trained(mixer=m)])
    share = float(m.share)
    for b, n in enumerate(data.lengths):
        for h in range(HEADS):
            q, k, v = (
                x[b, h if x.shape[1] == HEADS else slice(h * GROUPS, (h + 1) * GROUPS), 60 - n :]
                for x in (data.q[0], data.k[0], data.v[0])
            )
            kept = [t - 60 + n for t in slots(out.kept, b, h)]
            gone = [t for t in range(n) if t not in kept]
            assert len(kept) == 14
            weights = test_keep_papers.paper.attention(q, k[None]).sum(1).mean(0)
            best = sorted(sorted(gone, key=lambda t: (-float(weights[t]), t))[:SLOTS])
            got_k, got_v = out.merged.k[b, h, -SLOTS:], out.merged.v[b, h, -SLOTS:]
            assert torch.equal(out.merged.k[b, h, :14], k[kept]) and out.merged.count[b, h, :14].eq(1).all()
            assert out.merged.count[b, h, -SLOTS:].tolist() == [float(s < len(gone)) for s in range(SLOTS)]
            x = torch.cat([k[gone], v[gone]], -1)
            for s in range(SLOTS):
                if len(gone) <= SLOTS:  # a slot for each
                    want = [float(i == s) for i in range(len(gone))]
                else:
                    line = []
                    for i in range(len(gone)):
                        taps = [d for d in range(TAPS) if 0 <= i + d - TAPS // 2 < len(gone)]
                        line.append(float(m.bias[s]) + sum(float(m.conv[s, :, d] @ x[i + d - TAPS // 2]) for d in taps))
                    soft = torch.tensor(line).softmax(0).tolist()
                    want = [(1 - share) * (t == best[s]) + share * w for t, w in zip(gone, soft)]
                if s < len(gone):
                    torch.testing.assert_close(
                        got_k[s], sum(w * k[t] for w, t in zip(want, gone)), atol=1e-5, rtol=1e-4
                    )
                    torch.testing.assert_close(
                        got_v[s], sum(w * v[t] for w, t in zip(want, gone)), atol=1e-5, rtol=1e-4
                    )
                else:
                    assert not got_k[s].any() and not got_v[s].any()
    with pytest.raises(ValueError, match=r"m\.safetensors"):
        test_keep_papers.run(spec, data)


# ---------------------------------------------------------------- files


def file_of(tensors):
    names = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.int64": "I64"}
    header, body = {}, b""
    for name, x in tensors.items():
        raw = x.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": names[str(x.dtype)],
            "shape": list(x.shape),
            "data_offsets": [len(body), len(body) + len(raw)],
        }
        body += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


SHAPE = maps.Shape(4, 2, 8, 6)
PATH = ("keep", "score", "learned")


def spec_with(tmp_path, tensors):
    (tmp_path / "m.safetensors").write_bytes(file_of(tensors))
    (tmp_path / "s.yaml").write_text("kvc: 1\nkeep: {budget: 8, score: {learned: m.safetensors}}\n")
    return Spec.load(tmp_path / "s.yaml")


def locret(layer, prefix="layers.{}.", dtype=torch.float32, wide=4 * 8 + 2 * 8 + 2 * 6):
    g = torch.Generator().manual_seed(layer)
    up, down = (torch.randn(*shape, generator=g).to(dtype) for shape in ((5, wide), (2, 5)))
    before = prefix.format(layer)
    return {f"{before}fc1.weight": up, f"{before}fc2.weight": down}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["layers.{}.", "model.layers.{}.self_attn."])
def test_maps_by_layer(tmp_path, prefix, dtype):
    tensors = {**locret(1, prefix, dtype), **locret(0, prefix, dtype), "lm_head.weight": torch.zeros(3)}
    spec = spec_with(tmp_path, tensors)
    heads = maps.by_layer(spec, "m.safetensors", [SHAPE] * 2, maps.retaining_head, *PATH)
    for i, head in enumerate(heads):
        want = locret(i, prefix, dtype)
        assert torch.equal(head.up, want[prefix.format(i) + "fc1.weight"]) and head.up.dtype == dtype
        assert torch.equal(head.down, want[prefix.format(i) + "fc2.weight"])


def test_an_activation_that_is_not_known(tmp_path):
    with pytest.raises(SpecError, match="'?xielu'?"):
        spec = spec_with(tmp_path, locret(0))
        maps.by_layer(spec, "m.safetensors", [SHAPE], lambda x: maps.retaining_head(x, act="xielu"), *PATH)


def test_maps_of_every_kind(tmp_path):
    g = torch.Generator().manual_seed(0)
    wanted = {
        "kernel_q_mat1": (4, 8, 7), "kernel_q_mat2": (4, 7, 3), "kernel_k_mat1": (2, 8, 7), "kernel_k_mat2": (2, 7, 3),
        "interaction_k": (2, 3, 3), "scalingD": (1, 2, 1, 3), "scalingD2": (1, 2, 1, 3),
        "conv": (4, 14, 5), "bias": (4,), "normalizer": (1,), "hash": (2, 8, 16),
    }  # fmt: skip
    tensors = {f"layers.0.{name}": torch.randn(*shape, generator=g) for name, shape in wanted.items()}
    tensors["layers.0.channels"] = torch.tensor([[0, 7], [3, 2]])
    spec = spec_with(tmp_path, tensors)

    def read(make):
        return maps.by_layer(spec, "m.safetensors", [SHAPE], make, *PATH)[0]

    less = read(lambda layer: maps.feature_maps(layer, 3))
    assert torch.equal(less.q2, tensors["layers.0.kernel_q_mat2"]) and torch.equal(
        less.mix, tensors["layers.0.interaction_k"]
    )
    assert torch.equal(less.s2, tensors["layers.0.scalingD2"][0, :, 0])
    lococo = read(lambda layer: maps.mixer(layer, 4))
    assert torch.equal(lococo.conv, tensors["layers.0.conv"]) and torch.equal(
        lococo.share, tensors["layers.0.normalizer"]
    )
    assert torch.equal(read(lambda layer: maps.projection(layer, 16)), tensors["layers.0.hash"])
    assert read(maps.channels).tolist() == [[0, 7], [3, 2]]


REFUSED = {
    "a layer without": (locret(0), 2, ["layer 1 of the model needs layers.1.fc1", "none"]),
    "a tensor too few": ({"layers.0.fc1.weight": locret(0)["layers.0.fc1.weight"]}, 1, ["layers.0.fc2", "fc1"]),
    "too many layers": ({**locret(0), **locret(1)}, 1, ["the model has 1 layers", "layer 1"]),
    "another model": (locret(0, wide=59), 1, ["layers.0.fc1", "[5, 59]", "[hidden, 60]"]),
    "not finite": (
        {**locret(0), "layers.0.fc2.weight": torch.full((2, 5), math.nan)},
        1,
        ["layers.0.fc2 is not finite"],
    ),
    "even taps": ({"layers.0.conv": torch.zeros(4, 14, 4)}, 1, ["even number of taps"]),
    "channels beyond": ({"layers.0.channels": torch.tensor([[8], [0]])}, 1, ["layers.0.channels", "0..7"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_maps_that_do_not_fit(tmp_path, name):
    tensors, layers, words = REFUSED[name]
    make = {"even taps": lambda x: maps.mixer(x, 4), "channels beyond": maps.channels}.get(name, maps.retaining_head)
    with pytest.raises(SpecError) as error:
        maps.by_layer(spec_with(tmp_path, tensors), "m.safetensors", [SHAPE] * layers, make, *PATH)
    assert error.value.path == "keep.score.learned" and error.value.file == str(tmp_path / "s.yaml")
    assert "m.safetensors" in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("name", ["locret", "less", "lococo"])
def test_trained_rules_are_read_only_by_those_who_bring_the_maps(name):
    keep = Spec.load(name).expanded()["keep"]
    with pytest.raises(Unbuilt, match=rf"trained maps: {name}\.safetensors"):
        rules_of(keep)
    (rule,) = rules_of(keep, trained=True)
    assert rule.files == (f"{name}.safetensors",)
    (other,) = rules_of(Spec.load("h2o").expanded()["keep"])
    assert other.files == ()


def test_rules_name_their_files():
    (rule, _) = rule_of({"keep": {"budget": 8, "score": {"learned": "a.safetensors", "in": ["k", "v"]}}})
    assert (rule.score.learned, rule.score.inputs, rule.score.fifo) == ("a.safetensors", ("k", "v"), False)
    (rule, _) = rule_of({"keep": {"budget": 8, "else": {"fold": {"map": "b.safetensors", "rank": 8}}}})
    assert (rule.fold.file, rule.fold.rank) == ("b.safetensors", 8)
    (rule, _) = rule_of({"keep": {"budget": 8, "else": {"merge": {"assign": "learned(c.safetensors)", "slots": 9}}}})
    assert (rule.merge.assign, rule.merge.file, rule.merge.slots) == ("learned", "c.safetensors", 9)
    (rule, _) = rule_of({"keep": {"budget": 8, "alloc": {"table": [[1, 2], [0.5, 3]]}}})
    assert rule.alloc.rows == ((1, 2), (0.5, 3)) and rule.alloc.kind == "table"
