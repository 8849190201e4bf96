"""Every way in: torch.compile, model.compile, kvc_compile.compile and `generate`, with options in every form."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

import kvc_compile
import kvc_compile.backend as backend
from kvc_compile.handle import CacheHandle
from kvc_compile.report import DeclinedError, report
from kvc_compile.request import OptionError, Request
from kvc_compile.spec import Spec, SpecError
from models import decode, new_cache, prompt, tiny

LOSSLESS = {"kvc": 1}
INT4 = {"bits": 4}


@pytest.fixture
def compiles(monkeypatch) -> list[Request]:
    """The requests that were compiled, in order. Graphs run as rewritten: what is tested is the way to them."""
    seen: list[Request] = []
    original = backend.compile_graph

    def compile_graph(gm, inputs, request):
        seen.append(request)
        return original(gm, inputs, request)

    monkeypatch.setattr(backend, "compile_graph", compile_graph)
    monkeypatch.setattr(backend, "lower", lambda gm, inputs, request, births: gm.forward)
    return seen


@pytest.fixture
def model():
    return tiny("llama", layers=1)


def generate(model, ids, tokens=4, **kwargs):
    """`generate` with the cache it ends with."""
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "return_dict_in_generate": True}
    settings["attention_mask"] = torch.ones_like(ids)
    return model.generate(ids, **(settings | kwargs))


def handles(cache) -> set[bool]:
    """{True}: all of the cache is compressed; {False}: nothing is."""
    return {isinstance(t, CacheHandle) for layer in cache.layers for t in (layer.keys, layer.values)}


def layout(cache) -> str:
    return cache.layers[0].keys.layout_key


# ---------------------------------------------------------------- the doors


def through(door: str, model, options):
    """A model that was sent through a door; the one handed in stays as it is."""
    if door == "wrapper":
        return torch.compile(model, backend="kvc", options=options)
    model = copy.deepcopy(model)
    if door == "module":
        model.compile(backend="kvc", options=options)
        return model
    same = kvc_compile.compile(model, options)
    assert same is model
    return same


DOORS = ("wrapper", "module", "function")


@pytest.mark.parametrize(
    ("door", "kind", "sample"),
    [(door, kind, (i + j) % 2 == 0) for i, door in enumerate(DOORS) for j, kind in enumerate(("dynamic", "static"))],
)
def test_generate_runs_compressed(door, kind, sample, model, compiles):
    ids = prompt()
    kwargs = {"do_sample": sample, "cache_implementation": kind if kind == "static" else None}
    torch.manual_seed(1)
    want = generate(model, ids, **kwargs)
    assert handles(want.past_key_values) == {False}
    compiled = through(door, model, LOSSLESS)
    torch.manual_seed(1)
    got = generate(compiled, ids, **kwargs)
    assert compiles and handles(got.past_key_values) == {True}
    assert torch.equal(got.sequences, want.sequences)
    if sample:
        greedy = generate(model, ids)
        assert not torch.equal(greedy.sequences, want.sequences), "the sampler was asked"


@pytest.mark.parametrize(("door", "kind"), zip(DOORS, ("dynamic", "static", "dynamic")))
def test_a_call_runs_compressed(door, kind, model, compiles):
    ids = prompt()
    want = decode(model, new_cache(model, kind), ids, steps=3)
    cache = new_cache(model, kind)
    torch.testing.assert_close(decode(through(door, model, LOSSLESS), cache, ids, steps=3), want, atol=1e-4, rtol=0)
    assert compiles and handles(cache) == {True}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_sizes_and_numbers_that_may_vary(kind, attention, model, compiles):
    """Under dynamic=True the scale is a symbol: the graph is compiled for its value, and again for another one."""
    model.set_attn_implementation(attention)
    compiled = torch.compile(model, backend="kvc", options=LOSSLESS, dynamic=True)
    for factor in (1, 4):
        model.model.layers[0].self_attn.scaling *= factor
        want = decode(model, new_cache(model, kind, 32), prompt(tokens=9))
        got = decode(compiled, new_cache(model, kind, 32), prompt(tokens=9))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert {(s.status, s.pattern == "read back") for s in report(model).sites} == {("compressed", False)}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_wrapped_model_stays_plain(kind, model, compiles):
    """`torch.compile(model).generate` borrows the model's own `generate`, and gives it back."""
    ids, kwargs = prompt(), {"cache_implementation": kind if kind == "static" else None}
    want = generate(model, ids, **kwargs).sequences
    compiled = torch.compile(model, backend="kvc", options=INT4)
    assert handles(generate(compiled, ids, **kwargs).past_key_values) == {True}
    before = len(compiles)
    plain = generate(model, ids, **kwargs)
    assert handles(plain.past_key_values) == {False} and torch.equal(plain.sequences, want)
    assert len(compiles) == before and model._compiled_call_impl is None
    assert handles(generate(compiled, ids, **kwargs).past_key_values) == {True}, "and it still works"
    assert len(compiles) == before, "a second call compiles nothing"


def test_the_wrapped_model_stays_plain_after_an_error(model, compiles):
    compiled = torch.compile(model, backend="kvc", options=INT4)
    with pytest.raises(ValueError):
        compiled.generate(prompt(), max_new_tokens=-1)
    assert model._compiled_call_impl is None


def test_two_wrappers_of_one_model_keep_apart(model, compiles):
    ids = prompt(tokens=40)
    four, eight = (torch.compile(model, backend="kvc", options={"bits": b}) for b in (4, 8))
    found = [layout(generate(m, ids).past_key_values) for m in (four, eight, four)]
    assert found[0] == found[2] and found[0].startswith("int4") and found[1].startswith("int8")


def test_a_plain_backend_keeps_its_generate(model):
    """The doors are ours alone: another backend's wrapper gets the original method."""
    other = torch.compile(model, backend="eager")
    assert other.generate == model.generate


@pytest.mark.parametrize(("kind", "spec"), [("dynamic", "int8"), ("static", LOSSLESS)])
def test_left_padding(kind, spec, model, compiles):
    """A batch of prompts of different lengths: each row gets the tokens that the untouched model gives the batch."""
    ids = prompt(batch=3, tokens=12)
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 5, 9)):
        ids[row, :pad], mask[row, :pad] = 0, 0
    kwargs = {"attention_mask": mask, "cache_implementation": kind if kind == "static" else None, "tokens": 12}
    want = generate(model, ids, **kwargs).sequences
    out = generate(torch.compile(model, backend="kvc", options=spec), ids, **kwargs)
    assert handles(out.past_key_values) == {True}
    assert torch.equal(out.sequences, want)
    alone = generate(model, ids[2:, 9:], attention_mask=mask[2:, 9:], tokens=12).sequences
    assert torch.equal(out.sequences[2:, 9:], alone), "padding changes nothing for the shortest row"


# ---------------------------------------------------------------- options


def test_options_in_every_form(tmp_path, model, compiles):
    path = tmp_path / "my.yaml"
    path.write_text("kvc: 1\nbits: 4\n")
    spec = Spec.load(INT4)
    forms = [
        INT4,
        str(path),
        path,
        spec,
        Request(spec),
        {"spec": INT4},
        {"spec": str(path)},
        {"spec": spec, "verify": False},
    ]
    ids = prompt(tokens=40)
    for options in forms:
        compiled = torch.compile(model, backend="kvc", options=options)
        assert layout(generate(compiled, ids, 2).past_key_values).startswith("int4"), options
    assert len(compiles) == 2, "equal specs in any spelling share their two graphs"
    assert {r.spec for r in compiles} == {spec}


def test_a_preset_by_name(model, compiles):
    out = generate(torch.compile(model, backend="kvc", options="int8"), prompt(tokens=40))
    assert layout(out.past_key_values).startswith("int8") and {r.spec for r in compiles} == {Spec.load("int8")}


def test_runtime_options_arrive(tmp_path, model, compiles):
    """Beside a spec, or within a dict that is one; both forms are one request."""
    dump = str(tmp_path / "dump")
    inner = {"mode": "max-autotune-no-cudagraphs", "dump": dump, "verify": True, "strict": True, "tune": False}
    torch.compile(model, backend="kvc", options={"spec": INT4, **inner}).generate(prompt(), max_new_tokens=1)
    torch._dynamo.reset()
    torch.compile(model, backend="kvc", options={**INT4, **inner}).generate(prompt(), max_new_tokens=1)
    want = Request(Spec.load(INT4), "max-autotune-no-cudagraphs", dump, True, True, False)
    assert compiles == [want, want]


def test_different_runtime_options_do_not_share(model, compiles):
    for mode in ("default", "max-autotune-no-cudagraphs"):
        torch.compile(model, backend="kvc", options={"spec": INT4, "mode": mode}).generate(prompt(), max_new_tokens=1)
    assert [r.mode for r in compiles] == ["default", "max-autotune-no-cudagraphs"]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"spec": INT4, "mdoe": "default"}, OptionError, "unknown option 'mdoe'.*did you mean 'mode'"),
        ({"spec": INT4, "mode": "fast"}, OptionError, "mode 'fast'.*reduce-overhead"),
        ({"spec": INT4, "strict": 1}, OptionError, "'strict' is 1"),
        ({"spec": INT4, "dump": 3}, OptionError, "'dump' is 3"),
        ({"spec": None}, OptionError, "needs options"),
        ({"bitz": 4}, SpecError, "bitz.*bits"),
        ("kivi-4bits", SpecError, "kivi-4bit"),
        (4, SpecError, "not a spec.*int"),
    ],
)
@pytest.mark.parametrize("door", ["wrapper", "module", "function"])
def test_wrong_options_are_named_at_once(door, options, error, says, model):
    """By torch.compile itself, before any graph is captured."""
    if door == "function":
        spec, runtime = options, {}
        if isinstance(options, dict) and "spec" in options:
            spec, runtime = options["spec"], {k: v for k, v in options.items() if k != "spec"}
        with pytest.raises(error, match=f"(?s){says}"):
            kvc_compile.compile(model, spec, **runtime)
        assert model._compiled_call_impl is None
        return
    with pytest.raises(error, match=f"(?s){says}"):
        through(door, model, options)


def test_no_options_is_an_error(model):
    for kwargs in ({}, {"mode": "reduce-overhead"}):
        compiled = torch.compile(model, backend="kvc", **kwargs)
        with pytest.raises(Exception, match="backend 'kvc' needs options: a spec"), torch.no_grad():
            compiled(prompt())
        torch._dynamo.reset()


def test_kvc_compile_takes_a_module():
    with pytest.raises(OptionError, match="takes a torch.nn.Module, got function"):
        kvc_compile.compile(lambda x: x, INT4)


# ---------------------------------------------------------------- one compile for equal specs, new for a changed file


def test_equal_specs_share_a_compile(model, compiles):
    ids = prompt()
    for options in (INT4, {"kvc": 1, "bits": {"k": 4, "v": 4}}, Spec.load({"bits": 4, "name": "another name"})):
        generate(torch.compile(model, backend="kvc", options=options), ids)
    assert len(compiles) == 2, "one prefill and one decode"
    generate(torch.compile(model, backend="kvc", options={"bits": 8}), ids)
    assert len(compiles) == 4


@pytest.mark.parametrize("form", ["string", "dict"])
def test_a_changed_file_is_read_again(form, tmp_path, model, compiles):
    path = tmp_path / "spec.yaml"
    options = {"string": str(path), "dict": {"spec": path}}[form]
    ids, found = prompt(tokens=40), []
    for bits in (4, 8, 8, 4):
        path.write_text(f"kvc: 1\nbits: {bits}\n")
        found.append(layout(generate(torch.compile(model, backend="kvc", options=options), ids, 2).past_key_values))
    assert [x[:4] for x in found] == ["int4", "int8", "int8", "int4"]
    assert len(compiles) == 4, "and what is back is not compiled again"


def test_a_file_is_read_when_torch_compile_is_called(tmp_path, model, compiles):
    """What happens to the file afterwards is nothing to a compiled model, nor to its recompiles."""
    path = tmp_path / "spec.yaml"
    path.write_text("kvc: 1\nbits: 4\n")
    compiled = torch.compile(model, backend="kvc", options=str(path))
    path.unlink()
    generate(compiled, prompt(), 2)
    generate(compiled, prompt(batch=3), 2)
    assert len(compiles) > 2 and {r.spec for r in compiles} == {Spec.load(INT4)}


def test_options_are_frozen(model, compiles):
    """A dict that the caller changes later changes nothing."""
    options = {"bits": 4}
    compiled = torch.compile(model, backend="kvc", options=options)
    options["bits"] = 8
    generate(compiled, prompt(), 2)
    assert {r.spec for r in compiles} == {Spec.load(INT4)}


def test_the_first_compile_of_a_process(tmp_path):
    """The package is imported by `torch.compile` itself, in the middle of what one of the doors closes."""
    path = tmp_path / "spec.yaml"
    path.write_text("kvc: 1\nbits: 4\n")
    code = f"""
import sys, torch
m = torch.nn.Linear(1, 1)
assert "kvc_compile" not in sys.modules
def options(c):
    found = c.dynamo_ctx.callback
    while hasattr(found, "_torchdynamo_orig_backend"):
        found = found._torchdynamo_orig_backend
    return found.kwargs["options"]
a = torch.compile(m, backend="kvc", options={str(path)!r})
open({str(path)!r}, "w").write("kvc: 1\\nbits: 8\\n")
b = torch.compile(m, backend="kvc", options={str(path)!r})
assert options(a).spec.layer(0, 1).k.codec.bits == 4, options(a)
assert options(b).spec.layer(0, 1).k.codec.bits == 8, options(b)
try:
    torch.compile(m, backend="kvc", options={{"bitz": 4}})
except Exception as e:
    assert "bitz" in str(e)
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- strict


class Strided(torch.nn.Module):
    """Attention over every second position of a cache: no append that is known."""

    def __init__(self):
        super().__init__()
        self.place = torch.nn.Parameter(torch.rand(16, 16))

    def forward(self, x, cache):
        cache[:, :, ::2] = x @ self.place
        return torch.nn.functional.scaled_dot_product_attention(x, cache, cache)


def test_strict_is_an_error():
    """kvc_compile.compile is strict unless told otherwise."""
    model, x = Strided().eval(), torch.rand(1, 2, 5, 16)
    with torch.no_grad():
        want = model(x, torch.zeros(1, 2, 10, 16))
        with pytest.raises(Exception, match=f"(?s){DeclinedError.__name__}.*strict is set"):
            kvc_compile.compile(copy.deepcopy(model), INT4)(x, torch.zeros(1, 2, 10, 16))
        torch._dynamo.reset()
        loose = kvc_compile.compile(model, INT4, strict=False)
        torch.testing.assert_close(loose(x, torch.zeros(1, 2, 10, 16)), want)
    (site,) = report(loose).sites
    assert site.status == "declined" and site.reason


def test_attention_without_a_cache_is_none_that_is_left_uncompressed(compiles, caplog):
    model = tiny("llama", layers=2)
    with torch.no_grad():
        want = model(prompt(), use_cache=False).logits
        got = kvc_compile.compile(model, INT4)(prompt(), use_cache=False).logits
    torch.testing.assert_close(got, want)
    assert [s.status for s in report(model).sites] == ["no cache"] * 2 and not caplog.records
    assert not report(model).declined and "no cache" in str(report(model))


@pytest.mark.parametrize("tokens", [6, 20])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_prompt_longer_than_its_window_is_compressed(kind, tokens, compiles):
    """The prefill attends to the new tokens alone, and the window that it leaves is taken over by the first step."""
    model = tiny("mistral", sliding_window=16)
    want = decode(model, new_cache(model, kind), prompt(tokens=tokens), 14)
    cache = new_cache(model, kind)
    got = decode(kvc_compile.compile(model, LOSSLESS), cache, prompt(tokens=tokens), 14)
    torch.testing.assert_close(got, want)
    assert handles(cache) == {True}


def test_a_model_that_returns_attentions(compiles):
    """No fused attention has the weights: its cache is compressed all the same, which `strict` takes."""
    model, ids = tiny("llama", "eager", layers=1), prompt()
    with torch.no_grad():
        want = model(ids, output_attentions=True).attentions
        out = kvc_compile.compile(model, INT4)(ids, output_attentions=True)
    assert all(isinstance(layer.keys, CacheHandle) for layer in out.past_key_values.layers)
    (site,) = report(model).sites
    assert site.status == "compressed" and "attention weights are used elsewhere" in site.note
    got = out.attentions
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
