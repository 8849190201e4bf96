"""Scores of heads: against their formulas, on heads that are made for them, and on SmolLM2."""

from __future__ import annotations

import json
import math

import pytest
import torch

from kvc_compile.calibrate import CalibrateError, Probe, calibrate, measured, repeated
from kvc_compile.cli import main as cli
from kvc_compile.spec import Spec
from kvc_compile.spec.spec import preset_text
from models import tiny

ALL = ("echo", "induction", "streaming")


def weights(q, k, scale, sees):
    s = (q @ k.T * scale).masked_fill(~sees, -math.inf)
    return s.softmax(-1)


@pytest.mark.parametrize("mask", [None, "bool", "added"])
def test_scores_are_their_formulas(mask):
    """Query by query, for 150 tokens of which each comes every 40, two heads of two query heads each."""
    g = torch.Generator().manual_seed(0)
    n, period, sink, recent, scale = 150, 40, 3, 9, 0.7
    q, k, v = (torch.randn(h, n, 5, generator=g) for h in (4, 2, 2))
    sees = torch.ones(n, n, dtype=torch.bool).tril()
    if mask is not None:
        sees = sees & (torch.rand(n, n, generator=g) > 0.2) | torch.eye(n, dtype=torch.bool)
    given = {None: None, "bool": sees, "added": torch.zeros(n, n).masked_fill(~sees, -torch.inf)}[mask]
    probe = Probe(torch.zeros(n, dtype=torch.long), period, sink, recent)
    got = measured(probe, ALL, q, k, v, scale, given)
    for h in range(2):
        echo, induction, top, bottom = [], [], 0.0, 0.0
        for head in (2 * h, 2 * h + 1):
            p = weights(q[head], k[h], scale, sees)
            at = [0.0, 0.0]
            for i in range(period, n):
                for j in range(1, i // period + 1):
                    at[0] += float(p[i, i - j * period])
                    at[1] += float(p[i, i - j * period + 1])
            echo.append(at[0] / (n - period))
            induction.append(at[1] / (n - period))
            for i in range(n):
                near = torch.tensor([t < sink or t > i - recent for t in range(n)])
                if not (sees[i] & ~near).any():
                    continue
                left = torch.where(near, p[i], 0.0)
                whole = p[i] @ v[h]
                top += float(((left / left.sum()) @ v[h] - whole).square().sum())
                bottom += float(whole.square().sum())
        assert float(got["echo"][h]) == pytest.approx(max(echo), rel=1e-4)
        assert float(got["induction"][h]) == pytest.approx(max(induction), rel=1e-4)
        assert float(got["streaming"][h]) == pytest.approx(top / bottom, rel=1e-3)


def test_heads_that_are_made_for_it():
    """One looks at copies of its token, one at what came after them, one at the newest token."""
    period, n = 20, 60
    code = torch.eye(period).repeat(3, 1)  # of the token at each place
    after = torch.cat([torch.zeros(1, period), code[:-1]])  # keys that say what came before
    place = torch.eye(n)
    k = torch.stack([torch.cat([x, torch.zeros(n, n)], 1) for x in (code, after)] + [torch.cat([0 * code, place], 1)])
    q = torch.stack([torch.cat([code, torch.zeros(n, n)], 1)] * 2 + [torch.cat([0 * code, place], 1)])
    q[0, range(n), range(-n, 0)] = -1.0  # an echo is not of the token itself
    k[0, :, period:] = place
    v = torch.randn(3, n, 8, generator=torch.Generator().manual_seed(0))
    found = measured(Probe(torch.zeros(n, dtype=torch.long), period, 1, 5), ALL, q, k, v, 30.0)
    assert [round(float(x), 3) for x in found["echo"]] == [1, 0, 0]
    assert [round(float(x), 3) for x in found["induction"]] == [0, 1, 0]
    assert float(found["streaming"][2]) < 1e-6 and float(found["streaming"][:2].min()) > 0.5


def test_random_tokens():
    ids = repeated(50, 20, 3, seed=1, without=(0, 7))
    assert len(ids) == 60 and torch.equal(ids[:20], ids[40:]) and len(set(ids.tolist())) == 20
    assert not {0, 7} & set(ids.tolist()) and not torch.equal(ids, repeated(50, 20, 3, seed=2, without=(0, 7)))
    with pytest.raises(CalibrateError, match="49 different tokens of a vocabulary of 48"):
        repeated(50, 49, 2, 0, (0, 7))


def test_a_model_is_left_as_it_was():
    model = tiny("llama")
    ids = repeated(128, 40, 3, seed=0)
    want = model(ids[None]).logits
    seen = []
    found = calibrate(model, Probe(ids, 40), ALL, seen.append)
    assert seen == [1, 2] and model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids[None]).logits, want)
    assert found.keys() == set(ALL) and all(len(t) == 2 and len(t[0]) == 2 for t in found.values())
    window = calibrate(tiny("mistral", sliding_window=30), Probe(ids, 40), ["induction"])["induction"]
    assert window == [[0.0, 0.0]] * 2, "who sees 30 tokens sees no copy"


@pytest.mark.parametrize(
    ("model", "probe", "says"),
    [
        ("gemma2", Probe(repeated(128, 40, 3, 0), 40), "softcap"),
        ("bloom", Probe(repeated(128, 40, 3, 0), 40), "in 0 of 2 layers"),
        ("llama", Probe(repeated(128, 120, 10, 0), 120), "1200 tokens; the model takes 1024"),
        ("llama", Probe(repeated(128, 40, 3, 0), 0), "tokens that repeat"),
        ("llama", Probe(repeated(128, 40, 2, 0), 40), "80 tokens hides nothing behind 16 first and 64"),
    ],
)
def test_what_gives_no_scores(model, probe, says):
    with pytest.raises(CalibrateError, match=says):
        calibrate(tiny(model, "sdpa" if model == "llama" else "eager"), probe, ALL)


@pytest.mark.slow
def test_heads_of_smollm2(smollm2):
    """The same few heads echo and induce, whatever the tokens and however many."""
    model, _ = smollm2
    best = []
    for seed, tokens in ((0, 80), (1, 60)):
        probe = Probe(repeated(49152, tokens, 3, seed, (0, 1, 2)), tokens)
        found = calibrate(model, probe, ("echo", "induction"))
        ranked = {
            name: sorted(((-x, (i, h)) for i, row in enumerate(table) for h, x in enumerate(row)))
            for name, table in found.items()
        }
        assert [-ranked[name][0][0] > 0.5 for name in ranked] == [True, True]
        assert all(-x[45][0] < 0.05 for x in ranked.values()), "half of the heads do nothing of the kind"
        best.append({name: {head for _, head in x[:2]} for name, x in ranked.items()})
    assert best[0] == best[1] and not best[0]["echo"] & best[0]["induction"]


def test_the_command_makes_what_a_preset_reads(tmp_path, capsys):
    tiny("llama", layers=3).save_pretrained(tmp_path / "model")
    out = tmp_path / "heads.json"
    asked = ["calibrate", str(tmp_path / "model"), "--tokens", "30", "--repeats", "3"]
    assert cli.main([*asked, "--out", str(out)]) == 0
    assert "induction: the highest of 6 KV heads" in capsys.readouterr().out
    assert json.loads(out.read_text())["about"] == {
        "model": "model", "score": "razor", "tokens": 30, "repeats": 3, "seed": 0,
    }  # fmt: skip
    (tmp_path / "razor.yaml").write_text(preset_text("razorattention"))
    classes = Spec.load(tmp_path / "razor.yaml").head_classes((2, 2, 2))
    assert sum(row.count("retrieval") for row in classes) == 1  # 14 % of 6, and none of 1 %
    once = out.read_text()
    assert cli.main([*asked, "--out", str(out), "--json"]) == 0 and out.read_text() == once
    assert json.loads(capsys.readouterr().out)["tables"].keys() == {"echo", "induction"}
    assert cli.main([*asked, "--out", str(out), "--score", "streaming", "--recent", "9"]) == 0
    (tmp_path / "duo.yaml").write_text(preset_text("duoattention"))
    classes = Spec.load(tmp_path / "duo.yaml").head_classes((2, 2, 2))
    assert sum(row.count("retrieval") for row in classes) == 3


def test_the_command_refuses(tmp_path, capsys):
    tiny("llama").save_pretrained(tmp_path)
    for more, says in (
        (["--out", "x.txt"], "ends in .json"),
        (["--out", "x.json", "--text", "a.txt"], "needs tokens that repeat"),
        (["--out", "x.json", "--tokens", "500"], "500 different tokens"),
        (["--out", str(tmp_path / "config.json" / "x.json"), "--tokens", "30"], "config.json"),
    ):
        assert cli.main(["calibrate", str(tmp_path), *more]) == 2
        err = capsys.readouterr().err
        assert err.startswith("kvc calibrate: ") and says in err
