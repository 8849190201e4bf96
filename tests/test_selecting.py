"""`select` in real models: what a decode step reads is what the paper says, and the model sees that and nothing else."""

from __future__ import annotations

import copy
import json
import math
import pydoc_data.topics
import sys

import paper_select
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from models import decode, new_cache, prompt, tiny
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import kvc_compile.backend as backend
from kvc_compile.kernels.select.index import random_projection
from kvc_compile.layout import Layout
from kvc_compile.lowering import cpu, ops
from kvc_compile.policy import Selection
from kvc_compile.report import DeclinedError, report
from kvc_compile.spec import Spec, SpecError
from kvc_compile.spec.spec import preset_text

kvc = torch.ops.kvc
PRESETS = ("quest", "double-sparsity", "hata", "shadowkv", "tidaldecode", "clusterkv")


# ---------------------------------------------------------------- what a compiled model selected


class Choices:
    """Runs the rewritten graphs as they are, without Inductor, and writes down what every layer selects and reads."""

    def __init__(self, monkeypatch):
        self.asked: list[dict] = []  # calls of select: q, k (as stored, and the new one), seen, the result
        self.read: list[torch.Tensor] = []  # slots that attention reads, in the order of layers that select
        monkeypatch.setattr(backend, "lower", lambda gm, inputs, request, births: Recorder(gm, self).run)


class Recorder(torch.fx.Interpreter):
    def __init__(self, gm, choices):
        super().__init__(gm)
        self.choices = choices

    def call_function(self, target, args, kwargs):
        out = super().call_function(target, args, kwargs)
        if target is kvc.select.default:
            q, data, new, mask, positions, scale, layout, selection = args
            length = cpu.length(data, Layout.parse(layout)) if positions is None else int(positions)
            k = torch.cat([ops.read(data, length, layout, False), new], 2)
            asked = {"q": q[:, :, 0], "k": k, "scale": scale, "out": out, "selection": selection}
            self.choices.asked.append(asked)
        if target is kvc.attend_selected.default:
            self.choices.read.append(args[5])
        return out


def rows(index):
    """int64 [B, H, C] as lists."""
    return [[[t for t in head if t >= 0] for head in row] for row in index.tolist()]


def expected(name, q, k, scale, spec, first, layer_channels):
    """What the paper of a preset reads for one row; spec: its `select` and `tokens` as they are expanded."""
    select, tokens = spec["select"], spec.get("tokens", {})
    n, budget = k.shape[1], select["budget"]
    if isinstance(budget, str):
        top, _, bottom = budget.rstrip("%").partition("/")
        budget = n * int(top) // int(bottom) if bottom else math.floor(n * float(top) / 100 + 1e-9)
    recent = tokens.get("recent", 0)
    where = {
        "first": first,
        "sink": tokens.get("sink", 0),
        "recent": max(recent.values()) if isinstance(recent, dict) else recent,
    }
    if name == "quest":
        return paper_select.quest(q, k, scale, budget, 16, **where)
    if name == "double-sparsity":
        return paper_select.double_sparsity(q, k, scale, budget, layer_channels, **where)
    if name == "hata":
        return paper_select.hata(q, k, scale, budget, random_projection(k.shape[0], k.shape[2], 128), **where)
    if name == "shadowkv":
        return paper_select.shadowkv(q, k, scale, budget, 8, select["pin"]["outliers"], **where)
    if name == "tidaldecode":
        return paper_select.tidaldecode(q, k, scale, budget, **where)
    return paper_select.clusterkv(q, k, scale, budget, 80, select["index"]["pool"]["centroid"]["iters"], **where)


# ---------------------------------------------------------------- a plain model that sees what was selected


class Masked:
    """A model's own eager attention, from which what was not selected is hidden, over a cache that rounds as ours does.

    layouts: those of keys and values, by layer; reads: the slots of each attention of a decode step, in order.
    """

    def __init__(self, layouts, reads, selecting):
        self.layouts, self.reads, self.selecting = layouts, iter(reads), selecting
        self.arenas: dict[tuple[int, str], torch.Tensor] = {}

    def __call__(self, module, query, key, value, attention_mask, scaling, **kwargs):
        eager = sys.modules[type(module).__module__].eager_attention_forward
        layer, n, total = module.layer_idx, query.shape[2], key.shape[2]
        stored = [self.stored(layer, role, x, n) for role, x in (("k", key), ("v", value))]
        if n == 1 and layer in self.selecting and total > 1:
            chosen = torch.zeros(*key.shape[:2], total + 1, dtype=torch.bool)
            index = next(self.reads)
            chosen.scatter_(-1, index.masked_fill(index < 0, total), True)
            chosen = chosen[..., :total].repeat_interleave(query.shape[1] // key.shape[1], 1).unsqueeze(2)
            hidden = torch.zeros(chosen.shape).masked_fill(~chosen, -torch.inf)
            attention_mask = hidden if attention_mask is None else attention_mask + hidden
        return eager(module, query, *stored, attention_mask, scaling=scaling, **kwargs)

    def stored(self, layer, role, x, n):
        """x [B, H, T, D] with its older tokens as they are stored; the newest n are exact."""
        layout = Layout.parse(self.layouts[layer][role == "v"])
        past = x.shape[2] - n
        if (layer, role) not in self.arenas:
            self.arenas[layer, role] = ops.encode(x[:, :, :past], 4096, layout.key)
        data = self.arenas[layer, role]
        out = torch.cat([cpu.read(data, past, layout), x[:, :, past:]], 2)
        cpu.append(data, x[:, :, past:].contiguous(), None, layout)
        return out


@pytest.fixture
def masked(monkeypatch):
    """`masked(model, Masked)`: a copy of the model that attends by it."""

    def make(model, attention):
        AttentionInterface.register("masked", attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register("masked", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        other = copy.deepcopy(model)
        other.set_attn_implementation("masked")
        return other

    yield make
    AttentionInterface._global_mapping.pop("masked", None)
    ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop("masked", None)


# ---------------------------------------------------------------- every preset


def spec_file(tmp_path, name, bits, heads, width, layers, **changes):
    """The preset as a file, with other numbers, and the channels of each head and layer."""
    data = yaml.safe_load(preset_text(name))
    data["select"] |= changes
    if bits:
        data["bits"] = bits
    generator = torch.Generator().manual_seed(7)
    rank = max(1, width // 16)
    draw = [[torch.randperm(width, generator=generator)[:rank].tolist() for _ in range(heads)] for _ in range(layers)]
    if name == "double-sparsity":
        data["select"]["index"]["basis"]["table"] = "channels.json"
        (tmp_path / "channels.json").write_text(json.dumps(draw))
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data))
    return path, draw


def check(name, model, path, draw, choices, steps, first=lambda row: 0):
    """What was selected is what the paper selects; which layers did. Returns the layers that select or reuse."""
    spec = Spec.load(path)
    layers = model.config.num_hidden_layers
    full = [json.loads(spec.content) | {"layers": {}} for _ in range(layers)]
    selecting = [i for i in range(layers) if spec.layer(i, layers).select]
    choosing = selecting
    if name == "tidaldecode":
        at = full[0]["select"]["at"]
        choosing = [i for i in at if i < layers]
        selecting = [i for i in range(layers) if i >= at[0]]
    assert len(choices.asked) == steps * len(choosing) and len(choices.read) == steps * len(selecting)
    for i, asked in enumerate(choices.asked):
        layer = choosing[i % len(choosing)]
        for b, got in enumerate(rows(asked["out"])):
            start = first(b)
            k = asked["k"][b, :, start:]
            want = expected(name, asked["q"][b], k, asked["scale"], full[layer], start, draw[layer])
            assert [[t - start for t in head] for head in got] == want, (name, layer, b)
            assert all(len(head) < k.shape[1] for head in got)  # some are left out
    return selecting


def layouts(model):
    return {s.layer: (s.keys, s.values) for s in report(model).sites}


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_in_a_tiny_model(name, kind, bits, tmp_path, monkeypatch, masked):
    layers, steps = (4, 3)
    model = tiny("llama", layers=layers, num_key_value_heads=2)
    smaller = {"quest": {"budget": 32}, "shadowkv": {"budget": 24, "pin": {"outliers": 2}}, "clusterkv": {"budget": 20}}
    smaller |= {"tidaldecode": {"budget": 9, "at": [1, 3]}, "hata": {"budget": "8%"}}
    path, draw = spec_file(tmp_path, name, bits, 2, 16, layers, **smaller.get(name, {}))
    if name == "tidaldecode":
        path.write_text(path.read_text().replace("0,1", "0"))
    if name == "clusterkv":
        path.write_text(path.read_text().replace("320", "32"))
    choices = Choices(monkeypatch)
    ids = prompt(2, 200)
    compiled = torch.compile(model, backend="kvc", options={"spec": str(path), "strict": True})
    got = decode(compiled, new_cache(model, kind, 256), ids, steps)
    selecting = check(name, model, path, draw, choices, steps)
    plain = masked(model, Masked(layouts(model), choices.read, selecting))
    want = decode(plain, new_cache(model, "dynamic"), ids, steps, forced=got[:, 199:].argmax(-1))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
