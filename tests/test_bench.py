"""`kvc bench` at toy size: what it fills caches with, what it predicts and shows, what it does when a part fails.

No time is asserted on.
"""

from __future__ import annotations

import builtins
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import StaticCache

from kvc_compile.bench import attention, models, plan, plot, predict, run, synthetic, tables, warm, worker
from kvc_compile.bench.caches import cache_of
from kvc_compile.bench.decode import Bench
from kvc_compile.bench.plan import Job, Point, Settings
from kvc_compile.bench.rows import Call, Ceilings, Failure, Step, from_json, to_json
from kvc_compile.cli import main as cli
from kvc_compile.handle import CacheHandle
from kvc_compile.kernels import reference
from kvc_compile.layout import Codec, Layout
from kvc_compile.request import OptionError
from kvc_compile.spec import Spec
from models import tiny

RATES = Ceilings(1e9, 1e9, 1e9, "a device")
RAW = Codec("raw")
CODECS = [
    RAW,
    Codec("fp", 8),
    Codec("fp", 8, (1, 16), False),
    Codec("int", 8, (1, 16), False),
    Codec("int", 4, (32, 1), True),
    Codec("int", 3, (1, 8), True),
    Codec("int", 2, (64, 1), True),
    Codec("int", 1, (32, 1), True),
]


def layout(codec: Codec, word: int = 8) -> Layout:
    t = max(1, codec.block[0])
    windows = (0, 0, 1) if codec == RAW else (4, max(16, t), t)
    return Layout(codec, 2, 16, "float32", *windows, word)


@pytest.fixture
def folder(tmp_path) -> str:
    """A model's config, as `--model` takes it."""
    tiny("llama", layers=1).config.save_pretrained(tmp_path)
    return str(tmp_path)


# ---------------------------------------------------------------- synthetic caches


@pytest.mark.parametrize("word", [8, 16])
@pytest.mark.parametrize("codec", CODECS, ids=lambda c: f"{c.kind}{c.bits}")
@pytest.mark.parametrize("tokens", [1, 20, 200, 333])
def test_a_filled_cache_is_a_cache(codec: Codec, word: int, tokens: int) -> None:
    """Attention over it is attention over what it reads as; it goes on as any other does."""
    torch.manual_seed(0)
    form = layout(codec, word)
    pair = [reference.empty(2, tokens + 70, form) for _ in range(2)]
    for arena in pair:
        arena.fill_(0xFF)
        synthetic.fill(arena, form, tokens)
    k, v = (reference.read(a, form, 0, tokens) for a in pair)
    assert reference.lengths(reference.views(pair[0], form))[0] == tokens
    assert k.isfinite().all() and 0.1 < k.std() < 3 and k.abs().max() < 10
    q, new = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 2, 1, 16)
    got = reference.attend(q, *pair, new[0], new[1], None, None, True, 0.25, form, form)
    want = F.scaled_dot_product_attention(
        q, torch.cat([k, new[0]], 2), torch.cat([v, new[1]], 2), scale=0.25, enable_gqa=True
    )
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    for _ in range(70):
        reference.append(pair[0], new[0], form)
    assert reference.lengths(reference.views(pair[0], form))[0] == tokens + 70
    assert reference.read(pair[0], form, 0, tokens + 70).isfinite().all()


def test_all_codes_occur() -> None:
    """What is measured is no cache of zeros."""
    for word in (8, 16):
        form = layout(Codec("int", 4, (32, 1), True), word)
        arena = reference.empty(1, 2048, form)
        synthetic.fill(arena, form, 2048)
        codes = reference.unpack_codes(reference.views(arena, form).planes, form)
        counts = torch.bincount(codes.flatten().int(), minlength=16)
        assert counts.min() > 0.7 * counts.max()


def test_a_cache_without_room_is_not_filled() -> None:
    form = layout(CODECS[4])
    with pytest.raises(ValueError, match="encoded tokens cannot hold"):
        synthetic.fill(reference.empty(1, 100, form), form, 300)


@torch.no_grad()
@pytest.mark.parametrize("spec", ["lossless", "kivi-4bit", "kivi-2bit", "fp8", "int8"])
def test_a_model_decodes_on_a_filled_cache(spec: str) -> None:
    """To what it decodes to on a plain cache of the same content."""
    model = tiny("llama")
    pairs = models.layouts(model.config, Spec.load(spec), "cpu")
    like = next(model.parameters())
    cache = synthetic.compressed(model.config, pairs, 2, 100, 128, like)
    same = StaticCache(config=model.config, max_cache_len=128)
    for ours, theirs in zip(cache.layers, same.layers, strict=True):
        assert isinstance(ours.keys, CacheHandle) and ours.keys.shape == (2, 2, 128, 16)
        theirs.lazy_initialization(ours.keys.dense(), ours.values.dense())
        theirs.keys.copy_(ours.keys.dense())
        theirs.values.copy_(ours.values.dense())
        theirs.cumulative_length.fill_(100)
    token = torch.tensor([[5], [7]])
    got = model(input_ids=token, past_key_values=cache).logits
    want = model(input_ids=token, past_key_values=same).logits
    assert got.isfinite().all() and int(cache.layers[0].cumulative_length) == 101
    # eager attention over a handle rounds the newest token as well, where there is no window
    torch.testing.assert_close(got, want, atol=0.05, rtol=0.05)
    empty = model(input_ids=token, past_key_values=StaticCache(config=model.config, max_cache_len=128)).logits
    assert (empty - want).abs().max() > 10 * (got - want).abs().max()


# ---------------------------------------------------------------- predictions


def test_bytes_that_attention_reads() -> None:
    """Counted by hand, and never more than is stored."""
    plain = layout(RAW)
    assert predict.stored_bytes(plain, 100) == 2 * 32 + 2 * 100 * 16 * 4
    four = layout(Codec("int", 4, (32, 1), True))  # 4 sinks, a ring of 32, flushes of 32
    # of 100 tokens 64 are encoded and 36 are not; a block of 32 tokens and a channel has a scale and a middle
    assert four.encoded_after(100, 0) == 64
    assert predict.stored_bytes(four, 100) == 2 * 32 + 2 * 36 * 16 * 4 + 2 * 64 * 16 // 2 + 2 * (64 // 32) * 16 * 2 * 2
    for codec in CODECS:
        form = layout(codec)
        for tokens in (1, 35, 36, 37, 100, 1000):
            assert predict.stored_bytes(form, tokens) <= form.row_bytes(tokens)
    assert predict.cache_read([(plain, four)] * 3, 2, 100) == 6 * (
        predict.stored_bytes(plain, 100) + predict.stored_bytes(four, 100)
    )


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_weights(tied: bool) -> None:
    model = tiny("llama", tie_word_embeddings=tied)
    table = 128 * 64 * 4
    everything = sum(p.nbytes for p in model.parameters())
    assert predict.weights_read(model) == (everything if tied else everything - table)
    body = (everything - (table if tied else 2 * table)) // 4
    assert predict.prefill_flop(model, 10) == 2 * 10 * body + 2 * 128 * 64 + 2 * 100 * 4 * 16 * 2


def test_bytes_of_quantised_weights() -> None:
    config = tiny("llama").config
    plain, quantised = models.build(config, "cpu"), models.build(config, "cpu", "int8")
    linear = [m for m in plain.modules() if isinstance(m, torch.nn.Linear)]
    saved = sum(m.weight.numel() * 3 - m.weight.shape[0] * 4 for m in linear)  # fp32 to int8, a scale for each row
    saved -= sum(models.nbytes(m.weight.zero_point) for m in quantised.modules() if isinstance(m, torch.nn.Linear))
    assert predict.weights_read(plain) - predict.weights_read(quantised) == saved > 0


def test_predictions_are_bytes_over_the_rate_of_the_run() -> None:
    model = tiny("llama")
    cache = cache_of("x", Spec.load("kivi-4bit").expanded(), model.config, "cpu")
    bench = Bench(model, cache, RATES, Settings("cpu"))
    row = bench.predicted(Point("model", 3, 100), 128)
    assert row.read_bytes == predict.weights_read(model) + predict.cache_read(cache.pairs, 3, 100)
    assert row.predicted_s == row.read_bytes / RATES.read
    baseline = cache_of(plan.STATIC, None, model.config, "cpu")
    assert baseline.read_bytes(3, 100, 128) == 3 * 2 * 2 * 2 * 128 * 16 * 4  # it reads all of its room


def test_the_most_that_fits() -> None:
    model = tiny("llama")
    cache = cache_of("x", Spec.load("kivi-2bit").expanded(), model.config, "cpu")
    bench = Bench(model, cache, RATES, Settings("cpu", memory=10_000_000))
    free = 10_000_000 - sum(p.nbytes for p in model.parameters())
    for point in (Point("largest batch", 0, 100), Point("longest context", 3, 0)):
        n = bench.fits(point)
        batch, context = (n, 100) if point.batch == 0 else (3, n)
        assert n > 0 and cache.room_bytes(batch, bench.room(context)) <= free
        batch, context = (n + 1, 100) if point.batch == 0 else (3, n + 1)
        assert cache.room_bytes(batch, bench.room(context)) > free


def test_what_does_not_fit_is_tried_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    cache = cache_of("x", Spec.load("int8").expanded(), model.config, "cpu")
    bench = Bench(model, cache, RATES, Settings("cpu", memory=10_000_000))
    point = Point("largest batch", 0, 100)
    most, tried = bench.fits(point), []

    def decode(p: Point) -> Step:
        tried.append(p.batch)
        if len(tried) < 3:
            raise torch.cuda.OutOfMemoryError("full")
        return Step(p.part, "x", p.batch, p.context, 1.0)

    monkeypatch.setattr(bench, "decode", decode)
    row = bench.measure(point)
    assert row.batch == tried[-1] < tried[1] < tried[0] == most and "did not fit" in row.note
    monkeypatch.setattr(bench, "decode", lambda p: Step(p.part, "x", p.batch, p.context, error="full"))
    assert "nothing from" in bench.measure(point).error


# ---------------------------------------------------------------- the plan of a run


def test_jobs() -> None:
    s = Settings("cuda")
    found = plan.jobs(s, plan.default_specs())
    names = ["2 bits", plan.STATIC, "attention float16", "lossless", "8 bits", plan.QUANTIZED]
    prompts = [f"{name}, prompts" for name in ("4 bits", "2 bits", plan.STATIC, "lossless", "8 bits")]
    assert [j.name for j in found] == ["4 bits", "attention bfloat16", *names, *prompts]
    four, static = found[0].points, found[3].points
    assert len(set(four)) == len(four) and len([p for p in four if p.part == "model"]) == 9
    assert Point("growth", 1, 1 << 20) in four and Point("growth", 1, 4096) not in four  # the model part has it
    assert {p.part for p in static} == {"model"} and {p.part for p in found[-1].points} == {"prefill"}
    assert [Job.from_json(json.loads(json.dumps(j.to_json()))) for j in found] == found
    only = plan.jobs(replace(s, parts=("growth",)), plan.default_specs())
    assert {p.part for j in only for p in j.points} == {"growth"}
    assert [len(warm.split(j)) for j in found] == [2, 1, 2, 9, 1, 2, 2, 0, 1, 1, 0, 1, 1]
    for spec in plan.default_specs():
        spec.require_implemented()


def test_the_mode_is_that_of_all_caches() -> None:
    config = tiny("llama").config
    spec = Spec.load("int8").expanded()
    ours, baseline = cache_of("x", spec, config, "cuda", "max-autotune"), cache_of(plan.STATIC, None, config, "cuda")
    assert ours.mode == ours.options["mode"] == "max-autotune" and baseline.mode == "reduce-overhead"  # type: ignore[attr-defined]
    with pytest.raises(OptionError, match="mode 'fast': allowed are default, reduce-overhead"):
        Settings("cuda", mode="fast")


def test_rows_survive_json() -> None:
    for row in (RATES, Step("model", "x", 1, 2, 0.5), Call("x", 1, 2, 3, 4, 5, "d", "f"), Failure("j", "e")):
        assert from_json(json.loads(json.dumps(to_json(row)))) == row


# ---------------------------------------------------------------- parts that fail


def test_a_point_that_fails_loses_no_other(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    def decode(self: Bench, point: Point) -> Step:
        if point.context == 128:
            raise RuntimeError("no such kernel\nand more")
        return Step(point.part, self.cache.name, point.batch, point.context, 0.5, 2.0, 10, 0.25, 2.0, 100)

    monkeypatch.setattr(Bench, "decode", decode)
    s = plan.quick("cpu", parts=("model",), model=folder, batches=(1,))
    shown = []
    results = run.run(s, (Spec.load("int8"),), lambda *a: shown.append(a))
    steps = {(r["cache"], r["context"]): r for r in results["steps"]}
    assert steps["int8", 64]["seconds"] == 0.5 and steps["int8", 128]["error"] == "RuntimeError: no such kernel"
    assert (plan.STATIC, 64) in steps and results["failures"] == []
    assert results["setup"]["device"].startswith("CPU") and results["ceilings"]["int8"]["read"] > 0
    assert shown[-1][1:] == (5, 5)
    text = tables.text(results)
    assert "no such kernel" in text and "2.00" in text and "and more" not in text


def test_a_job_that_fails_loses_no_other(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    def measure(self: Bench, point: Point) -> Step:
        if self.cache.name == "int8" and point.context == 128:
            raise KeyError("broken")
        return Step(point.part, self.cache.name, point.batch, point.context, 1.0, 1.0)

    monkeypatch.setattr(Bench, "measure", measure)
    s = plan.quick("cpu", parts=("model",), model=folder, batches=(1,))
    results = run.run(s, (Spec.load("int8"),))
    assert [f["job"] for f in results["failures"]] == ["int8"] and "broken" in results["failures"][0]["error"]
    assert [(r["cache"], r["context"]) for r in results["steps"]][:2] == [("int8", 64), (plan.STATIC, 64)]


def test_what_was_measured_is_saved_if_the_run_is_broken_off(
    monkeypatch: pytest.MonkeyPatch, folder: str, tmp_path
) -> None:
    def measure(self: Bench, point: Point) -> Step:
        if self.cache.name == plan.STATIC:
            raise KeyboardInterrupt
        return Step(point.part, self.cache.name, point.batch, point.context, 1.0, 1.0)

    monkeypatch.setattr(Bench, "measure", measure)
    out = tmp_path / "out.json"
    asked = ["bench", "model", "--device", "cpu", "--model", folder, "--spec", "int8", "--out", str(out)]
    assert cli.main(asked) == 130
    assert {r["cache"] for r in json.loads(out.read_text())["steps"]} == {"int8"}


def test_nothing_is_begun_when_time_is_up(folder: str) -> None:
    s = plan.quick("cpu", parts=("model",), model=folder, until=1.0)
    results = run.run(s, (Spec.load("int8"),))
    assert len(results["steps"]) == 9 and all("no time" in r["error"] for r in results["steps"])


def test_attention_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.shapes, "TOY", (("llama3-8b", 1, 64),))
    monkeypatch.setattr(attention.shapes, "FORMATS", ("16", "int4"))
    monkeypatch.setattr(attention, "sdpa", lambda *_: 1 / 0)
    cudnn, sixteen, four = attention.calls(Settings("cpu"), "float32", RATES)
    assert "ZeroDivisionError" in cudnn.error and cudnn.seconds is None
    assert sixteen.best == "16" and sixteen.gain == 1.0
    assert four.best_16bit_s == sixteen.seconds and four.predicted_s == four.stored_bytes / RATES.read
    assert four.of_ceiling == pytest.approx(four.predicted_s / four.seconds)


@pytest.mark.slow
def test_quantised_weights_and_a_compressed_cache(folder: str) -> None:
    s = plan.quick("cpu", parts=("model",), model=folder, contexts=(64,), batches=(1,), weights="int8")
    results = run.run(s, (Spec.load("int8"),))
    found = {r["cache"]: r["error"] for r in results["steps"] if r["cache"] != plan.QUANTIZED}
    assert found == {"int8": "", plan.STATIC: ""} and results["failures"] == []


@pytest.mark.slow
def test_processes(tmp_path, folder: str) -> None:
    """One for each job: what they measure arrives, and how they end."""
    s = plan.quick("cpu", parts=("model",), model=folder, batches=(1,))
    results = run.Results(s, (), lambda *_: None)
    assert results.jobs[-1].cache == plan.QUANTIZED
    results.jobs = [results.jobs[-1], replace(results.jobs[-1], name="lost", cache="no such cache")]
    run.measure(results, ["0"], tmp_path)
    found = results.to_json()
    assert [r["cache"] for r in found["steps"]] == [plan.QUANTIZED]
    assert [f["job"] for f in found["failures"]] == ["lost"] and "no such cache" in found["failures"][0]["error"]
    child = run.Child(tmp_path, "0", {"job": {}}, "dead")
    child.go()
    child.process.wait()
    assert "KeyError" in child.failure().error  # type: ignore[union-attr]


# ---------------------------------------------------------------- what is shown


def results_of(rows: list[Any]) -> dict[str, Any]:
    made = run.Results(Settings("cpu"), (), lambda *_: None)
    for row in rows:
        made.add("a job", row)
    return made.to_json()


def some_rows() -> list[Any]:
    rows: list[Any] = [RATES]
    for cache, slow in (("4 bits", 1), ("lossless", 2), (plan.STATIC, 8)):
        for batch in (1, 8):
            for context in (4096, 32768, 131072):
                t = slow * batch * context / 1e7
                rows.append(
                    Step("model", cache, batch, context, t, batch / t, int(t * 9e8), t * 0.9, 1.1, 10**10, 2 * 10**10)
                )
        rows.append(Step("growth", cache, 1, 1 << 20, slow * 0.1, 10.0 / slow, 10**9, 0.09, 1.1, 10**9, 2 * 10**9))
    rows.append(Step("longest context", "2 bits", 1, 3_214_567, 0.1, 10.0, 10**9, 0.09, 1.1, 63 * 10**9, 79 * 10**9))
    rows.append(Step("prefill", "4 bits", 1, 8192, 0.5, 16384.0, None, 0.4, 1.25, note="x"))
    rows.append(Step("model", plan.STATIC, 32, 131072, error="does not fit"))
    for shape, batch, context in (("llama3-8b", 8, 32768), ("channels 256", 8, 32768)):
        for n, name in enumerate(("cudnn", *tables.OURS)):
            us = 300 / (n + 1)
            row = Call(shape, batch, context, 32, 8, 128, "float16", name, us / 1e6, 10**8, us / 2e6, 0.5)
            rows.append(replace(row, against_128=0.9 if shape != "llama3-8b" else None))
    return rows


def test_tables_read_well() -> None:
    text = tables.text(results_of(some_rows()))
    assert max(map(len, text.splitlines())) <= 100
    for said in (
        "Decode steps",
        "Longest context",
        "3214567",
        "128k",
        "1024k",
        "150.0 16",
        "int2",
        "does not fit",
        "0.90",
    ):
        assert said in text
    growth = text[text.index("Growth") : text.index("Time to the first")]
    assert growth.count("4 bits") == 4, "those at batch 1 of the model part belong to it"
    assert "Not measured" in text and "Not measured" not in tables.text(results_of([RATES]))


def test_plot(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "a.png"):
        plot.draw(results_of(some_rows()), str(tmp_path / name))
        assert (tmp_path / name).stat().st_size > 10_000
    svg = (tmp_path / "a.svg").read_text()
    assert svg.count("<path") > 50
    plot.draw(results_of([RATES]), str(tmp_path / "empty.svg"))
    with pytest.raises(plot.PlotError, match="--plot"):
        plot.draw(results_of([RATES]), str(tmp_path / "no" / "such.svg"))


@pytest.mark.parametrize(
    "package, asked, advice",
    [("matplotlib", ["--plot", "x.svg"], "kvc-compile[bench]"), ("torchao", ["--weights", "int8"], "install torchao")],
)
def test_without_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str, asked: list[str], advice: str
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(run, "run", lambda *_: pytest.fail("nothing is measured in vain"))
    assert cli.main(["bench", "--device", "cpu", *asked]) == 1
    assert advice in capsys.readouterr().err


def test_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    for asked, code, said in (
        (["bench", "modle"], 2, "part 'modle': allowed are attention"),
        (["bench", "--device", "tpu"], 2, "--device tpu"),
        (["bench", "--weights", "int3", "--device", "cpu"], 2, "weights 'int3': allowed are int8"),
        (["bench", "--spec", "nope", "--device", "cpu"], 1, "no such file or preset"),
        (["bench", "--model", "/nowhere", "--device", "cpu"], 1, "config.json"),
    ):
        assert cli.main(asked) == code
        err = capsys.readouterr().err
        assert err.startswith("kvc bench: ") and said in err and "Traceback" not in err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "--contexts", "0"])
    assert "argument --contexts: 1 or more is allowed" in capsys.readouterr().err
    with pytest.raises(OptionError, match=r"contexts are \(0,\)"):
        plan.Settings("cpu", contexts=(0,))


# ---------------------------------------------------------------- with a compiler


@pytest.mark.slow
def test_a_run(folder: str, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    """All parts of a model from the command line, one compressed cache against the baselines."""
    out = tmp_path / "out.json"
    asked = ["model", "capacity", "growth", "prefill", "--device", "cpu", "--model", folder, "--spec", "kivi-4bit"]
    assert (
        cli.main(["bench", *asked, "--batches", "1,2", "--contexts", "64", "--memory", "0.001", "--out", str(out)]) == 0
    )
    results = json.loads(out.read_text())
    steps = [r for r in results["steps"] if r["seconds"]]
    ours = [r for r in steps if r["cache"] == "kivi-4bit"]
    assert {r["part"] for r in ours} == {"model", "growth", "largest batch", "longest context", "prefill"}
    assert all(r["finite"] and r["predicted_s"] > 0 and r["over_predicted"] > 0 for r in steps)
    assert {r["part"] for r in steps if r["cache"] == plan.STATIC} == {"model", "prefill"}
    weights = sum(p.nbytes for p in models.build(models.config_of(folder, "cpu"), "cpu").parameters())
    for r in ours:
        if r["part"] in ("largest batch", "longest context"):
            assert 0.9 * (10**6 - weights) < r["cache_bytes"] <= 10**6 - weights
    assert results["setup"]["torch"] and results["setup"]["specs"][0]["name"] == "kivi-4bit"
    assert "Largest batch that fits" in capsys.readouterr().out


@pytest.mark.slow
def test_what_was_compiled_ahead_is_found(folder: str, tmp_path) -> None:
    """Other processes compile for fake tensors, and the run compiles nothing."""
    from torch._inductor.utils import fresh_cache

    s = plan.quick("cpu", parts=("model",), model=folder, contexts=(64,), batches=(1,))
    with fresh_cache():
        results = run.Results(s, (Spec.load("kivi-4bit"),), lambda *_: None)
        results.jobs = results.jobs[:1]
        (tmp_path / "tasks").mkdir()
        run.compile_ahead(results, ["0"], tmp_path / "tasks")
        assert results.to_json()["failures"] == []
        run.measure(results, ["0"], tmp_path / "tasks")
    found = [(r["cache"], r["error"], r["finite"], r["compiles"]) for r in results.to_json()["steps"]]
    assert found == [("kivi-4bit", "", True, 0)]


@pytest.mark.slow
def test_one_graph_for_all_sizes_of_a_compressed_cache(folder: str) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    s = plan.quick("cpu", parts=("model",), model=folder, contexts=(64, 96, 128), batches=(1, 2, 3))
    job = plan.jobs(s, (Spec.load("kivi-4bit"),))[0]
    rows = [r for r in worker.rows(job) if isinstance(r, Step)]
    assert len(rows) == 9 and not any(r.error for r in rows)
    assert counters["stats"]["unique_graphs"] == 2, "one for a single sequence, one for batches"
