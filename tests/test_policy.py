"""Presets and published methods as parameters of the reference semantics: what is read, and what is not built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from test_keep_papers import HEADS, random_data
from test_learned import random_maps, random_mixer

from kvc_compile.kernels.keep.rule import apply
from kvc_compile.kernels.keep.scoring import Chance, gumbel
from kvc_compile.kernels.keep.tokens import parts
from kvc_compile.kernels.keep.trained import Trained
from kvc_compile.kernels.select.index import build, compare
from kvc_compile.kernels.select.selection import capacity, outliers, select
from kvc_compile.policy import Unbuilt, query_of, regions_of, rules_of
from kvc_compile.spec import Spec, presets
from kvc_compile.spec.laws import scopes

ROWS = yaml.safe_load((Path(__file__).parent / "spec" / "systems.yaml").read_text())
UNBUILT_ROWS = {"A12", "A16", "C4", "C6", "C7", "C9", "C10", "C11", "D6", "D7", "E9"}


def fragments(spec: Spec):
    return [fragment for _, fragment in scopes(spec.expanded())]


def read(fragment):
    return (
        regions_of(fragment.get("tokens", {})),
        rules_of(fragment.get("keep"), trained=True),
        query_of(fragment.get("select")),
    )


def trained(rule, data, layer, g):
    """Random maps for what a rule reads from a file."""
    like = {"generator": g, "dtype": torch.float64}
    scores = torch.rand(data.k[layer].shape[:3], **like) if rule.score.learned else None
    slots = rule.merge.slots if rule.merge else 0
    return Trained(
        scores, random_maps(rule.fold.rank, g) if rule.fold else None, None, random_mixer(slots, g) if slots else None
    )


@pytest.mark.parametrize("name", presets())
def test_a_preset_acts_on_a_padded_batch(name):
    """Each rule and each selection of each scope, at a length that leaves tokens out of most of them."""
    spec = Spec.load(name)
    lengths = (160, 111)
    g = torch.Generator().manual_seed(1)
    data = random_data(1, layers=2, lengths=lengths)
    chance = Chance(probe=torch.rand(2, 160, generator=g), noise=gumbel(torch.rand(2, 6, 160, generator=g)))
    text = torch.rand(2, 160, generator=g) < 0.5
    table = torch.rand(2, HEADS, generator=g, dtype=torch.float64)
    for regions, rules, query in map(read, fragments(spec)):
        p = parts(data.visible, regions)
        for rule in rules:
            out = apply(
                *(rule, regions, data.attentions, data.v),
                chance=chance,
                allowed=text,
                table=table,
                prompt=torch.tensor([100, 90]),
                trained=[trained(rule, data, layer, g) for layer in range(2)],
            )
            for o in out:
                mask = o.kept.mask(160)
                assert (mask | ~(p.sink | p.recent).unsqueeze(1)).all() and not (mask & ~data.visible[:, None]).any()
                assert (o.folded is None) == (rule.fold is None)
                if rule.demote:
                    assert torch.equal(mask ^ o.demoted.mask(160), data.visible.unsqueeze(1).expand_as(mask))
        if query is not None:
            channels = torch.arange(HEADS).unsqueeze(-1) if query.index.kind == "channels" else None
            sketch = build(query, data.k[0], p, channels)
            scores = compare(query, data.q[0][:, :, -1], sketch, p, 0.3)
            pinned = outliers(query, data.k[0], sketch, p) if query.pin else None
            kept = select(query, scores, sketch, p, capacity(query, regions, 160), pinned)
            assert (kept.count > 0).all() and (kept.count <= torch.tensor(lengths).unsqueeze(-1)).all()


@pytest.mark.parametrize("row", ROWS)
def test_every_published_method_is_read_or_refused_by_name(row):
    def read_all():
        return list(map(read, fragments(Spec.load({"kvc": 1, **ROWS[row]}))))

    if row in UNBUILT_ROWS:
        with pytest.raises(Unbuilt, match=r"\w+: .|select\."):
            read_all()
    else:
        read_all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["snapkv", "h2o", "adakv", "d2o", "kvcrush", "windowkv", "zipvl", "lagkv"])
def test_dynamo_traces_a_rule_whole(name):
    """No graph break: nothing depends on a value."""
    _, rules, _ = read(fragments(Spec.load(name))[0])
    regions = regions_of({"recent": 8})
    data = random_data(1, layers=2, lengths=(90, 61), dtype=torch.float32)
    chance = Chance(probe=torch.rand(2, 90, generator=torch.Generator().manual_seed(1)))

    def run(attentions, values):
        return [o.kept.index for o in apply(rules[0], regions, attentions, values, chance=chance)]

    want = run(data.attentions, data.v)
    got = torch.compile(run, backend="eager", fullgraph=True)(data.attentions, data.v)
    assert all(torch.equal(x, y) for x, y in zip(got, want))
