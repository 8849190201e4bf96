"""`select` in real models: a decode step reads what the paper says, and sees nothing else."""

from __future__ import annotations

import copy
import functools
import json
import math
import pydoc_data.topics
import sys
from dataclasses import replace

import paper_select
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import kvc_compile.backend as backend
from kvc_compile.dump import plan_data, readme
from kvc_compile.kernels.reference import views
from kvc_compile.kernels.select.index import random_projection
from kvc_compile.layout import Codec, Layout
from kvc_compile.lowering import cpu, ops
from kvc_compile.plan import Plan, make_plan
from kvc_compile.policy import Selection
from kvc_compile.reading import readings
from kvc_compile.report import DeclinedError, report, unselected
from kvc_compile.request import Request
from kvc_compile.sites import CacheTensor, Site
from kvc_compile.spec import Spec, SpecError
from kvc_compile.spec.spec import preset_text
from models import decode, new_cache, prompt, tiny

kvc = torch.ops.kvc
PRESETS = ("quest", "double-sparsity", "hata", "shadowkv", "tidaldecode", "clusterkv")


# ---------------------------------------------------------------- what a compiled model selected


class Choices:
    """Runs the rewritten graphs as they are, without Inductor, and writes down what every layer selects and reads."""

    def __init__(self, monkeypatch):
        self.asked: list[dict] = []  # calls of select: q, k (as stored, and the new one), seen, the result
        self.appended: dict[int, list[torch.Tensor]] = {}  # keys, of each layer whose index is held
        self.read: list[torch.Tensor] = []  # slots that attention reads, in the order of layers that select
        monkeypatch.setattr(backend, "lower", lambda gm, inputs, request, births: Recorder(gm, self).run)


class Recorder(torch.fx.Interpreter):
    def __init__(self, gm, choices):
        super().__init__(gm)
        self.choices = choices

    def run(self, *args):
        self.appends = self.selects = 0  # of keys whose index is held, in this call: one for each such layer
        return super().run(*args)

    def call_function(self, target, args, kwargs):
        out = super().call_function(target, args, kwargs)
        if target is kvc.select.default:
            q, data, new, mask, positions, scale, layout, selection = args
            length = cpu.length(data, Layout.parse(layout)) if positions is None else int(positions)
            k = torch.cat([self.keys(data, length, layout), new], 2)
            asked = {"q": q[:, :, 0], "k": k, "scale": scale, "mask": mask, "out": out, "selection": selection}
            self.choices.asked.append(asked)
        if target is kvc.attend_selected.default:
            self.choices.read.append(args[5])
        for op, layout, x in ((kvc.append, 3, 1), (kvc.encode, 2, 0), (kvc.extend, 2, 1)):
            if target is op.default and Layout.parse(args[layout]).sketch:
                self.choices.appended.setdefault(self.appends, []).append(args[x].clone())
                self.appends += 1
        return out

    def keys(self, data, length, layout):
        """As an index knows them: as they were appended where it is held, as they are stored where it is not."""
        if not Layout.parse(layout).sketch:
            return ops.read(data, length, layout, False)
        self.selects += 1
        found = torch.cat(self.choices.appended[self.selects - 1], 2)
        assert found.shape[2] == length
        return found


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
        for module in other.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = "masked"
        return other

    yield make
    AttentionInterface._global_mapping.pop("masked", None)
    ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop("masked", None)


# ---------------------------------------------------------------- every preset

LAYERS = ("quest", "double-sparsity", "hata", "shadowkv", "clusterkv", "tidaldecode", "tidaldecode")  # the last reuses
SMALLER = {
    "quest": {"budget": 32},
    "shadowkv": {"budget": 24, "pin": {"outliers": 2}},
    "clusterkv": {"budget": 20},
    "tidaldecode": {"budget": 9, "at": [5]},
    "hata": {"budget": "8%"},
}


def every_preset(tmp_path, bits, heads, width, changes):
    """A spec with a preset in each layer, and the channels of each layer and head."""
    rank, generator = max(1, width // 16), torch.Generator().manual_seed(7)
    draw = [[torch.randperm(width, generator=generator)[:rank].tolist() for _ in range(heads)] for _ in LAYERS]
    (tmp_path / "channels.json").write_text(json.dumps(draw))
    scopes = {}
    for layer, name in enumerate(LAYERS):
        preset = yaml.safe_load(preset_text(name).replace(".safetensors", ".json"))
        scopes[str(layer)] = {"select": preset["select"] | changes.get(name, {})}
        tokens = preset.get("tokens", {})
        if "recent" in tokens:
            tokens["recent"] = 32
        if tokens or bits:
            scopes[str(layer)]["tokens"] = tokens or {"sink": 4, "recent": {"k": 64, "v": 32}}
    path = tmp_path / "every.json"
    path.write_text(json.dumps({"kvc": 1, "layers": scopes} | ({"bits": bits} if bits else {})))
    return path, draw


def check(model, path, draw, choices, steps, first=lambda row: 0):
    """What every layer selected is what the paper of its preset selects."""
    spec = Spec.load(path)
    choosing = [layer for layer in range(len(LAYERS)) if layer != 6]
    assert len(choices.asked) == steps * len(choosing) and len(choices.read) == steps * len(LAYERS)
    for i, asked in enumerate(choices.asked):
        layer = choosing[i % len(choosing)]
        said = json.loads(spec.layer(layer, len(LAYERS)).select.key)
        for b, got in enumerate(rows(asked["out"])):
            start = first(b)
            k = asked["k"][b, :, start:]
            want = expected(LAYERS[layer], asked["q"][b], k, asked["scale"], said, start, draw[layer])
            assert [[t - start for t in head] for head in got] == want, (LAYERS[layer], b)
            assert all(len(head) < k.shape[1] for head in got)  # some are left out
    held = [bool(Layout.parse(keys).sketch) for keys, _ in layouts(model).values()]
    assert held == [name in ("double-sparsity", "hata") for name in LAYERS]
    said = [s.reads for s in report(model).sites]
    assert all(line.startswith("a step reads ") for line in said)
    assert "by bounds on their scores" in said[0] and said[6] == said[5] + ", those of layer 5"
    for tidal, reused in zip(choices.read[5::7], choices.read[6::7], strict=True):
        assert reused is tidal


def layouts(model):
    return {s.layer: (s.keys, s.values) for s in report(model).sites}


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_every_preset_in_a_tiny_model(kind, bits, tmp_path, monkeypatch, masked):
    model, steps = tiny("llama", layers=len(LAYERS)), 3
    path, draw = every_preset(tmp_path, bits, 2, 16, SMALLER)
    choices = Choices(monkeypatch)
    ids = prompt(2, 200)
    compiled = torch.compile(model, backend="kvc", options={"spec": str(path), "strict": True})
    got = decode(compiled, new_cache(model, kind, 256), ids, steps)
    check(model, path, draw, choices, steps)
    plain = masked(model, Masked(layouts(model), choices.read, range(len(LAYERS))))
    want = decode(plain, new_cache(model, "dynamic"), ids, steps, forced=got[:, 199:].argmax(-1))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "bits"), [("static", 4), ("dynamic", None)])
def test_every_preset_in_smollm2(kind, bits, smollm2, tmp_path, monkeypatch, masked):
    """Its first layers, on 1024 tokens of Python's documentation."""
    whole, tokenizer = smollm2
    model, steps = first_layers(whole, len(LAYERS)), 2
    ids = tokenizer(text(), return_tensors="pt").input_ids[:, :1024]
    changes = {"quest": {"budget": 256}, "shadowkv": {"budget": 256}, "clusterkv": {"budget": 128}}
    path, draw = every_preset(tmp_path, bits, 3, 64, changes | {"tidaldecode": {"at": [5]}})
    choices = Choices(monkeypatch)
    compiled = torch.compile(model, backend="kvc", options={"spec": str(path), "strict": True})
    call = functools.partial(compiled, logits_to_keep=1)
    got = decode(call, new_cache(model, kind, 1100), ids, steps)
    check(model, path, draw, choices, steps)
    plain = masked(model, Masked(layouts(model), choices.read, range(len(LAYERS))))
    call = functools.partial(plain, logits_to_keep=1)
    want = decode(call, new_cache(model, "dynamic"), ids, steps, forced=got.argmax(-1))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def first_layers(model, count):
    few = copy.copy(model)
    few._modules = dict(model._modules)
    few.model = copy.copy(model.model)
    few.model._modules = dict(model.model._modules)
    few.model.layers = model.model.layers[:count]
    few.config = few.model.config = copy.deepcopy(model.config)
    few.config.num_hidden_layers = count
    return few


def text():
    return "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))[:8000]


# ---------------------------------------------------------------- padding, masks, short prompts


def test_left_padding(tmp_path, monkeypatch, masked):
    """Rows of different lengths: each reads what its own tokens say, and nothing of the padding."""
    model, steps, lengths = tiny("llama", layers=len(LAYERS)), 2, (200, 171)
    path, draw = every_preset(tmp_path, None, 2, 16, SMALLER)
    choices = Choices(monkeypatch)
    ids = prompt(2, 200)
    seen = torch.stack([torch.arange(200) >= 200 - n for n in lengths]).long()
    compiled = torch.compile(model, backend="kvc", options={"spec": str(path), "strict": True})
    got = decode(padded(compiled, seen), new_cache(model, "static", 256), ids, steps)
    check(model, path, draw, choices, steps, first=lambda row: 200 - lengths[row])
    plain = masked(model, Masked(layouts(model), choices.read, range(len(LAYERS))))
    forced = got[:, 199:].argmax(-1)
    want = decode(padded(plain, seen), new_cache(model, "dynamic"), ids, steps, forced=forced)
    torch.testing.assert_close(got[:, 199:], want[:, 199:], rtol=1e-4, atol=1e-4)


def padded(call, seen):
    """`call` with the mask and the positions of left-padded rows."""
    step = [seen]

    def run(input_ids, past_key_values, use_cache):
        n = input_ids.shape[1]
        if n == 1:
            step[0] = torch.cat([step[0], torch.ones_like(step[0][:, :1])], 1)
        places = (step[0].cumsum(-1) - 1).clamp(min=0)[:, -n:]
        given = {"attention_mask": step[0], "position_ids": places}
        return call(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache, **given)

    return run


ALL = {"index": {"basis": {"map": "random", "rank": 32}, "codec": {"int": 1}}, "budget": 600}
FEW = {"index": "exact", "budget": 6}
MODELS: dict[str, dict] = {
    "llama": {},
    "gemma2": {"attention": "eager", "sliding_window": 9, "attn_logit_softcapping": 0.5},
    "gpt_oss": {"attention": "eager", "sliding_window": 9, "num_local_experts": 2, "num_experts_per_tok": 1},
}


@pytest.mark.parametrize(("family", "tokens"), [("llama", 1), ("llama", 50), ("gemma2", 30), ("gpt_oss", 50)])
def test_a_budget_that_covers_all_changes_nothing(family, tokens, monkeypatch):
    monkeypatch.setattr(backend, "lower", lambda gm, inputs, request, births: gm.forward)
    model = tiny(family, **MODELS[family])
    ids = prompt(2, tokens)
    outs = []
    for select in ("off", ALL):
        torch._dynamo.reset()
        spec = {"kvc": 1, "bits": 4, "tokens": {"recent": 32}, "select": select}
        compiled = torch.compile(model, backend="kvc", options={"spec": spec, "strict": True})
        outs.append(decode(compiled, new_cache(model, "static", 60), ids, 4))
    assert torch.equal(*outs)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_windows_caps_and_sinks(family, kind, monkeypatch, masked):
    """What a window hides is never selected; caps and sinks are those of the model."""
    model, steps = tiny(family, **MODELS[family]), 3
    ids = prompt(2, 30)
    choices = Choices(monkeypatch)
    compiled = torch.compile(model, backend="kvc", options={"kvc": 1, "select": FEW})
    got = decode(compiled, new_cache(model, kind, 40), ids, steps)
    assert len(choices.read) == 2 * steps
    moved = []
    for i, index in enumerate(choices.read):  # the arena of a window begins later: the newest token is always the last
        last = choices.asked[i]["k"].shape[2] - 1
        assert (index <= last).all() and (index >= 0).sum(-1).eq(6).all()
        moved.append(torch.where(index < 0, -1, index - last))
    plain = masked(model, FromTheEnd(layouts(model), moved, range(2)))
    want = decode(plain, new_cache(model, kind, 40), ids, steps, forced=got[:, 29:].argmax(-1))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


class FromTheEnd(Masked):
    """`Masked`, by distances from the newest token."""

    def __call__(self, module, query, key, value, attention_mask, scaling, **kwargs):
        eager = sys.modules[type(module).__module__].eager_attention_forward
        if query.shape[2] == 1:
            distance = next(self.reads)
            seen = attention_mask > -1e4
            last = (torch.arange(key.shape[2]) * seen[0, 0, 0]).max()
            slots = torch.where(distance < -key.shape[2], key.shape[2], distance + last)
            chosen = torch.zeros(*key.shape[:2], key.shape[2] + 1, dtype=torch.bool).scatter_(-1, slots, True)
            chosen = chosen[..., :-1].repeat_interleave(query.shape[1] // key.shape[1], 1).unsqueeze(2)
            assert (seen | ~chosen).all()  # nothing that is hidden is selected
            attention_mask = attention_mask.expand_as(chosen).masked_fill(~chosen, -torch.inf)
        return eager(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


# ---------------------------------------------------------------- layers that read what another one selected


def site(layer, index=None, queries=1, kind="static", heads=2, window=False, slots=64, pattern="sdpa"):
    tensor = CacheTensor(kind, f"k{layer}", "", "", heads, 16, "float32")
    index = layer if index is None else index
    given = {"queries": queries, "window": window, "slots": slots}
    return Site(index, layer, f"attn{layer}", pattern, 4, 0.25, "m", tensor, tensor, "model.py:1", **given)


REUSE = {"kvc": 1, "select": {"index": "exact", "budget": 8, "at": [1, 4], "reuse": "until_next"}}


def test_which_layers_read_what():
    found = readings([site(i) for i in range(6)], Spec.load(REUSE))
    assert [(found[i].source, bool(found[i].selection)) for i in range(6)] == [
        (-1, False), (1, True), (1, True), (1, True), (4, True), (4, True),
    ]  # fmt: skip
    assert not any(r.declined for r in found.values()) and "before the first layer" in found[0].reason
    only = {name: x for name, x in REUSE["select"].items() if name != "reuse"}
    found = readings([site(i) for i in range(6)], Spec.load({"kvc": 1, "select": only}))
    assert [i for i in range(6) if found[i].selection] == [1, 4]


@pytest.mark.parametrize(
    ("sites", "why"),
    [
        ([site(2), site(5)], "another graph"),
        ([site(1, heads=4), site(2)], "4 KV heads"),
        ([site(1, window=True), site(2)], "another length"),
        ([site(1, slots=16), site(2)], "another length"),
        ([site(1, kind="grown"), site(2)], "another kind"),
        ([site(1, index=7), site(2)], "computed after it"),
        ([site(1, pattern="read back"), site(2)], "read back"),
    ],
)
def test_layers_that_cannot_read_what_another_selected(sites, why):
    """They read all, and say so: a warning, and under strict an error."""
    spec = Spec.load(REUSE)
    last = readings(sites, spec)[2]
    assert last.declined and not last.selection and why in last.reason
    plan: Plan = make_plan(sites, spec, "cpu")
    with pytest.raises(DeclinedError, match=why):
        unselected(plan, Request.of({"spec": REUSE, "strict": True}))
    unselected(plan, Request.of({"spec": REUSE}))


def test_prompts_and_layers_that_are_off_read_all():
    spec = Spec.load({"kvc": 1, "select": {"index": "exact", "budget": 8}, "layers": {"0": {"select": "off"}}})
    found = readings([site(0), site(1, queries=5), site(2, queries=0), site(3, kind="fresh"), site(4)], spec)
    assert [bool(found[i].selection) for i in range(5)] == [False, False, False, False, True]
    assert not any(r.declined for r in found.values())
    assert readings([site(0)], Spec.load({"kvc": 1})) == {}
    plan = make_plan([site(0), site(4)], spec, "cpu")
    reads = [entry["reads"] for entry in plan_data(plan, Request.of(spec))["sites"]]
    assert reads[0]["reason"] == "select: off" and json.loads(reads[1]["selection"])["select"]["budget"] == 8
    assert "| all is read: select: off |" in readme("id", plan, Request.of(spec)).replace("float32 as it is; ", "")


# ---------------------------------------------------------------- the operators


def test_one_graph_for_all_steps_of_a_growing_cache():
    """Through Inductor: a budget that grows with the cache, whose slots are as many as a symbol says."""
    torch._dynamo.utils.counters.clear()
    model, ids = tiny("llama"), prompt(2, 40)
    select = {**ALL, "budget": "20%", "gqa": "sum"}
    compiled = torch.compile(model, backend="kvc", options={"kvc": 1, "select": select})
    decode(compiled, new_cache(model, "dynamic"), ids, 6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    decode(compiled, new_cache(model, "dynamic"), prompt(2, 40, seed=1), 3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(
        [
            {"index": "exact"},
            {"index": {"basis": {"map": "random", "rank": 16}, "codec": {"int": 1}}, "gqa": "max"},
            {"index": {"pool": "mean"}, "unit": "chunk(4)", "pin": {"outliers": 1}},
            {"index": {"pool": "minmax"}, "unit": "chunk(8)", "gqa": "sum"},
            {"index": {"pool": {"centroid": {"iters": 2}}}, "unit": "cluster(1/5)"},
        ]
    ),
    st.sampled_from([{"bits": 8}, {"bits": 2}, {"kv": {"codec": {"fp": 8}}}, {"bits": {"k": 3, "v": 4}}, {}]),
    st.one_of(st.integers(1, 30), st.sampled_from(["25%", "1/3"])),
    st.integers(1, 150),
    st.sampled_from([None, "bool", "added", "window"]),
    st.integers(0, 3),
)
def test_any_selection_of_any_cache(how, codec, budget, length, mask, hide):
    """What is selected is seen, and no more than is allowed; the operators do what their shapes and schemas say."""
    tokens = {"sink": 2, "recent": 32}
    spec = Spec.load({"kvc": 1, **codec, "tokens": tokens, "select": {**how, "budget": budget}})
    plan = make_plan([site(0)], spec, "cpu").planned[0]
    selection, layout = plan.reading.selection, plan.key
    k, v, new = (torch.randn(2, 2, n, 16) for n in (length, length, 1))
    arenas = [ops.encode(x, length + 40, y.key) for x, y in ((k, plan.key), (v, plan.value))]
    q, shown, total = torch.randn(2, 4, 1, 16), None, length + 1
    seen = torch.ones(2, total, dtype=torch.bool)
    seen[1, : min(hide, length)] = False
    if mask == "window":
        shown = max(1, length - 5)
        seen[:, : length - shown] = False
    given = seen[:, None, None, length - shown if shown else 0 :] if mask else None
    if mask in ("added", "window"):
        given = torch.zeros(given.shape).masked_fill(~given, torch.finfo(torch.float32).min)
    if mask is None:
        seen[:] = True
    args = q, arenas[0], new, given, None, 0.25, layout.key, selection, shown
    index = kvc.select(*args)
    torch.library.opcheck(kvc.select.default, args, test_utils=("test_schema", "test_faketensor"))
    s = Selection.parse(selection)
    for b, row in enumerate(rows(index)):
        n = int(seen[b].sum())
        body = max(0, n - 34)
        for head in row:
            assert head == sorted(set(head)) and all(seen[b, t] for t in head)
            pages = s.query.pin * s.query.size
            assert min(n, 34) <= len(head) <= n - body + s.query.budget.of(n) + pages or s.query.budget.of(0) >= total
    args = q, *arenas, new, new, index, given, None, 0.25, layout.key, plan.value.key, selection, 0.0, None, shown
    out = kvc.attend_selected(*args)
    torch.library.opcheck(kvc.attend_selected.default, args, test_utils=("test_schema", "test_faketensor"))
    keys, values = (
        torch.cat([ops.read(a, length, y.key, False), new], 2) for a, y in zip(arenas, (layout, plan.value))
    )
    chosen = torch.zeros(2, 2, total + 1, dtype=torch.bool).scatter_(-1, index.masked_fill(index < 0, total), True)
    chosen = chosen[..., :-1].repeat_interleave(2, 1).unsqueeze(2) & seen[:, None, None]
    want = torch.nn.functional.scaled_dot_product_attention(q, keys, values, chosen, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sketch", ["hash16", "channels3,1;0,7"])
@pytest.mark.parametrize("codec", [Codec("raw"), Codec("int", 4, (16, 1), True)])
def test_sketches_go_where_their_tokens_go(codec, sketch):
    """Whatever becomes of an arena, the sketches are those of the keys that were appended."""
    exact = {"sink": 2, "recent": 16, "flush": 16} if codec.params else {}
    layout = Layout(codec, 2, 8, "float32", **exact, sketch=sketch)
    x = torch.randn(2, 2, 200, 8)

    def same(data, first, last):
        v = views(data, layout)
        assert int(v.header[0, 0, 0]) == last - first
        w = random_projection(2, 8, 16)
        for h in range(2):
            keys = x[:, h, first:last]
            if sketch == "hash16":
                bits = (keys @ w[h] >= 0).long().reshape(2, -1, 2, 8)
                want = (bits * 2 ** torch.arange(8)).sum(-1).to(torch.uint8)
            else:
                want = keys[..., [(3, 1), (0, 7)][h]]
            assert torch.equal(v.sketch[:, h, : last - first], want)

    data = ops.encode(x[:, :, :90], 96, layout.key)
    same(data, 0, 90)
    for t in range(90, 93):
        ops.append(data, x[:, :, t : t + 1], torch.tensor([t]), layout.key, [])
    data = ops.extend(data, x[:, :, 93:130], layout.key)
    same(data, 0, 130)
    data = cpu.grow(data, 230, layout)
    ops.append(data, x[:, :, 100:140], torch.arange(100, 140), layout.key, [])  # back to an earlier position
    same(data, 0, 140)
    assert data.shape[1] == layout.row_bytes(230)  # what is planned
    cpu.trim(data, layout, 32)
    same(data, 32, 140)
    ops.append_pair(data, data.clone(), *(x[:, :, 140:141],) * 2, None, layout.key, replace(layout, sketch="").key, [])
    same(data, 32, 141)


def test_a_table_of_channels_that_is_not_of_the_model(tmp_path):
    data = {"kvc": 1, "select": {"index": {"basis": {"map": "channels", "table": "t.json"}}, "budget": 5}}
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(data))
    with pytest.raises(SpecError, match="no such file"):
        make_plan([site(0)], Spec.load(path), "cpu")
    for table, why in (
        ([[[1]], [[1]]], "2 layers"),
        ([[[1]]], "a table of 1 heads"),
        ([[[1], [16]]], "channels up to 16"),
        ([[[1], [2, 3]]], "as many"),
        ([], "0 layers"),
        (3, "no table"),
    ):
        (tmp_path / "t.json").write_text(json.dumps(table))
        with pytest.raises(SpecError, match=why):
            make_plan([site(0)], Spec.load(path), "cpu")
    (tmp_path / "t.json").write_text("[[[1], [15]]]")
    assert make_plan([site(0)], Spec.load(path), "cpu").planned[0].key.sketch == "channels1;15"
    with pytest.raises(SpecError, match="not in a folder"):
        make_plan([site(0)], Spec.load(data), "cpu")
    save_file({"channels": torch.tensor([[[1], [15]]])}, tmp_path / "t.safetensors")
    path.write_text(json.dumps(data).replace(".json", ".safetensors"))
    assert make_plan([site(0)], Spec.load(path), "cpu").planned[0].key.sketch == "channels1;15"
