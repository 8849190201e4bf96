#!/usr/bin/env python3
"""Makes docs/architectures.md: what becomes of the cache of every decoder-only language model of transformers.

    python docs/architectures.py                                # all of them; about an hour on two cores
    python docs/architectures.py llama gemma2 --out -           # some, to standard output
    python docs/architectures.py --json rows.jsonl --resume     # goes on where an earlier run with this file ended

A tiny random model runs untouched and compiled with the lossless spec, prefill and decode steps, fed the same tokens;
all logits are compared. The rewritten graphs run as they are, since what is looked at is the rewrite; --inductor
compiles them, too. The table in docs/ has the sdpa modes with it and the eager modes without:

    python docs/architectures.py --inductor --modes static-sdpa,dynamic-sdpa --json rows.jsonl --out -
    python docs/architectures.py --json rows.jsonl --resume
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
import transformers
from tiny_zoo import TOKENS, WINDOW, architectures, build, new_cache, supports_sdpa

import kvc_compile.backend as backend
from kvc_compile.handle import CacheHandle
from kvc_compile.report import remembered, report

OUT = Path(__file__).with_suffix(".md")
MODES = ("static-sdpa", "dynamic-sdpa", "static-eager", "dynamic-eager")
LOSSLESS = {"kvc": 1}
BATCH, PROMPT, STEPS = 2, 12, 8
READ_BACK = "read back"  # `Site.pattern` of an attention that reads its compressed cache in full
LIMIT = 1e-4  # of the difference of two logits
TIMEOUT = 180  # seconds for one architecture in one mode

Row = dict[str, Any]

# ---------------------------------------------------------------- one architecture in one mode


def measure(name: str, mode: str) -> Row:
    """What happened, as plain data; `status` says how to read it:

    ok, wrong (logits differ), error (the compiled model raises): transformers itself runs the model.
    not run: it does not. no sdpa: its class has no such attention. torch: torch.compile fails without this backend too.
    """
    kind, attention = mode.split("-")
    if attention == "sdpa" and not supports_sdpa(name):
        return {"status": "no sdpa"}
    try:
        model = build(name, attention)
        want, _ = run(copy.deepcopy(model), model, kind)
    except Exception as e:
        return {"status": "not run", **said(e)}
    untouched = copy.deepcopy(model)
    try:
        got, cache = run(torch.compile(model, backend="kvc", options=LOSSLESS), model, kind)
    except Exception as e:
        return control(untouched, kind, want) or {"status": "error", **said(e)}
    difference = distance(got, want)
    fate = {"difference": difference, **attentions(model), **caches(cache)}
    if difference <= LIMIT:
        return {"status": "ok", **fate}
    return control(untouched, kind, want) or {"status": "wrong", **fate}


@torch.no_grad()
def run(call: Callable[..., Any], model: torch.nn.Module, kind: str) -> tuple[torch.Tensor, Any]:
    """Logits of a prefill and of decode steps that are fed random tokens, and the cache that they leave."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(TOKENS.start, TOKENS.stop, (BATCH, PROMPT + STEPS), generator=generator)
    cache, logits = new_cache(model, kind), []
    for part in ids.split([PROMPT] + [1] * STEPS, 1):
        out = call(input_ids=part.clone(), past_key_values=cache, use_cache=True)
        logits.append(out.logits)
        if cache is None:
            cache = out.past_key_values
    return torch.cat(logits, 1), cache


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().nan_to_num(float("inf")).max())


def control(model: torch.nn.Module, kind: str, want: torch.Tensor) -> Row | None:
    """Not our doing: torch.compile fails or differs in the same way with a backend that changes nothing."""
    try:
        got, _ = run(torch.compile(model, backend="eager"), model, kind)
    except Exception as e:
        return {"status": "torch", **said(e)}
    d = distance(got, want)
    return {"status": "torch", "error": f"logits differ by {d:.1e}", "place": ""} if d > LIMIT else None


def attentions(model: torch.nn.Module) -> Row:
    """The report in numbers. An attention is `partly` compressed if some of its graphs decline it."""
    r = report(model)
    reasons = Counter(re.sub(r"^in \d+ of \d+ graphs: ", "", s.reason) for s in r.sites if s.reason)
    return {
        "layers": len(r.sites),
        "compressed": sum(s.status == "compressed" for s in r.sites),
        "partly": sum(s.mixed for s in r.sites),
        "read_back": sum(s.pattern == READ_BACK and s.status == "compressed" for s in r.sites),
        "graphs": r.graphs,
        "reasons": dict(reasons),
        "notes": sorted({p.site.note for c in remembered() for p in c.plan.planned if p.site.note}),
    }


def caches(cache: Any) -> dict[str, int]:
    """Layers of the cache that hold keys, and those of them that hold handles at the end, whatever the report says."""
    pairs = [(layer.keys, layer.values) for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return {"cached": len(pairs), "held": sum(all(isinstance(t, CacheHandle) for t in pair) for pair in pairs)}


def said(e: BaseException) -> Row:
    """An exception on one line, and the innermost line of this package that it passed."""
    inner = getattr(e, "inner_exception", None) or e
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    frames = [f for x in (e, inner) for f in traceback.extract_tb(x.__traceback__) if "/kvc_compile/" in f.filename]
    place = f"{frames[-1].filename.split('/kvc_compile/')[-1]}:{frames[-1].lineno}" if frames else ""
    return {"error": f"{type(inner).__name__}: {' '.join(lines[:3])[:300]}", "place": place}


# ---------------------------------------------------------------- all of them


def measure_all(names: Iterable[str], modes: Iterable[str], log: Path, jobs: int, inductor: bool) -> None:
    """A process for each row, so that a crash or a hang costs that row only. Rows that `log` has already are kept."""
    known = {(r["name"], r["mode"]) for r in read(log)}
    todo = [(n, m) for n in names for m in modes if (n, m) not in known][::-1]
    running: dict[Connection, Running] = {}
    with log.open("a") as f:
        while todo or running:
            while todo and len(running) < jobs:
                started = Running(*todo.pop(), inductor)
                running[started.pipe] = started
            for pipe in wait(list(running), timeout=1):
                row = running.pop(pipe).end()  # type: ignore[call-overload]
                print(json.dumps(row), file=f, flush=True)
                print(" ".join(f"{k}={v}" for k, v in row.items()), file=sys.stderr, flush=True)
            for late in [r for r in running.values() if time.monotonic() > r.deadline]:
                late.process.kill()  # its pipe ends, then


class Running:
    """A process that measures one row."""

    def __init__(self, name: str, mode: str, inductor: bool):
        self.name, self.mode, self.inductor = name, mode, inductor
        context = multiprocessing.get_context("fork")  # torch and transformers are imported already
        self.pipe, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=work, args=(theirs, name, mode, inductor))
        self.deadline = time.monotonic() + TIMEOUT
        self.process.start()
        theirs.close()

    def end(self) -> Row:
        try:
            row = self.pipe.recv()
        except EOFError:
            self.process.join()
            late = f"no end after {TIMEOUT} s" if time.monotonic() > self.deadline else ""
            row = {"status": "error", "error": late or f"it ended with code {self.process.exitcode}", "place": ""}
        self.process.kill()
        self.process.join()
        return {"name": self.name, "mode": self.mode, "inductor": self.inductor, **row}


def work(pipe: Any, name: str, mode: str, inductor: bool) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    if not inductor:
        backend.lower = lambda gm, inputs, request, births: gm.forward  # type: ignore[assignment]
    pipe.send(measure(name, mode))


def read(log: Path) -> list[Row]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


# ---------------------------------------------------------------- the page


def page(rows: list[Row], modes: list[str]) -> str:
    reasons = Reasons()
    lines = table(rows, modes, reasons)
    return (
        "\n".join(
            [
                HEAD.format(**facts(), through=through(rows, modes)),
                *summary(rows, modes),
                "",
                LEGEND,
                *lines,
                "",
                *reasons.text(),
            ]
        )
        + "\n"
    )


HEAD = """# Decoder-only language models of transformers

Made by `python docs/architectures.py` with kvc_compile {kvc}, torch {torch}, transformers {transformers}.

Tiny random models in float32 (one layer of each kind, windows of {window} tokens) run untouched and compiled with the
lossless spec `{{kvc: 1}}`: a prefill of {prompt} tokens and {steps} decode steps, batch {batch}, both fed the same
random tokens. All logits are compared; they are wrong if two differ by more than {limit:g}. A mode is the kind of
cache and the kind of attention. {through}
"""

LEGEND = """*all compressed*: every cache of the model is held compressed at the end, and no graph made one dense.
*not run*: transformers itself does not run the model with this cache. *not us*: torch.compile fails with a backend that
changes nothing, too.

In the table, `a of b`: of b attention layers, a are compressed in every graph. *read*: compressed caches are read in
full for the model's own attention. *+n in part*: n more are compressed in some graphs and dense in others. *-*: the
class has no sdpa attention. Empty: not measured. *difference*: the largest of two logits, over all modes. Small
numbers: reasons, below the table.
"""


def through(rows: list[Row], modes: list[str]) -> str:
    """Which modes were compiled to the end."""
    with_it = [m for m in modes if all(r["inductor"] for r in rows if r["mode"] == m)]
    if with_it == modes:
        return "All graphs run through Inductor."
    if not with_it:
        return "The rewritten graphs run without Inductor: what is looked at is the rewrite."
    return f"The graphs of {' and '.join(with_it)} run through Inductor, the others as they are rewritten."


def facts() -> dict[str, Any]:
    return {
        "kvc": importlib.metadata.version("kvc_compile"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "window": WINDOW,
        "prompt": PROMPT,
        "steps": STEPS,
        "batch": BATCH,
        "limit": LIMIT,
    }


class Reasons:
    """Numbers reasons as they come; those that differ in numbers of layers and nodes only are one."""

    def __init__(self) -> None:
        self.users: dict[str, dict[str, None]] = {}

    def mark(self, reason: str, name: str) -> str:
        general = re.sub(r"(?<=layers\[)\d+", "i", reason)
        general = re.sub(r"(?<=[a-z_0-9])_\d+\b| at 0x[0-9a-f]+", "", general)
        self.users.setdefault(general, {})[name] = None
        return str(list(self.users).index(general) + 1)

    def text(self) -> list[str]:
        return [f"{i}. {reason} ({', '.join(users)})" for i, (reason, users) in enumerate(self.users.items(), 1)]


EXTENTS = {"all": "all compressed", "some": "some", "none": "none", "wrong": "wrong", "error": "errors"}


def summary(rows: list[Row], modes: list[str]) -> list[str]:
    titles = ["mode", "models run", *EXTENTS.values(), "not run", "not us"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for mode in modes:
        kinds = Counter(extent(r) for r in rows if r["mode"] == mode)
        counts = [kinds[k] for k in EXTENTS]
        lines.append(f"| {mode} | {' | '.join(map(str, [sum(counts), *counts, kinds['not run'], kinds['torch']]))} |")
    return lines


def extent(r: Row) -> str:
    """How many of a model's caches are compressed, where it ran right: all, some or none; else the row's status."""
    if r["status"] != "ok":
        return r["status"]
    if r["cached"] and r["held"] == r["cached"] and not r["partly"]:
        return "all"
    return "some" if r["held"] or r["compressed"] or r["partly"] else "none"


def table(rows: list[Row], modes: list[str], reasons: Reasons) -> list[str]:
    lines = [f"| architecture | {' | '.join(modes)} | difference |", f"|---{'|---' * len(modes)}|---|"]
    by = {(r["name"], r["mode"]): r for r in rows}
    for name in sorted({r["name"] for r in rows}):
        found = [by.get((name, mode)) for mode in modes]
        differences = [r["difference"] for r in found if r and "difference" in r]
        worst = f"{max(differences):.0e}" if differences else ""
        lines.append(f"| {name} | {' | '.join(cell(r, reasons) for r in found)} | {worst} |")
    return lines


def cell(r: Row | None, reasons: Reasons) -> str:
    if r is None or r["status"] == "no sdpa":
        return "-" if r else ""
    if r["status"] in FAILURES:
        return FAILURES[r["status"]] + small(reasons.mark(r["error"], r["name"]))
    said = f"{r['compressed']} of {r['layers']}"
    said += ", read" if r["read_back"] else ""
    said += f", +{r['partly']} in part" if r["partly"] else ""
    said = f"**wrong** {said}" if r["status"] == "wrong" else said
    marks = [reasons.mark(x, r["name"]) for x in [*r["reasons"], *unseen(r)]]
    return said + small(", ".join(dict.fromkeys(marks)))


FAILURES = {"error": "**error**", "not run": "not run", "torch": "not us"}


def small(marks: str) -> str:
    return f" <sup>{marks}</sup>" if marks else ""


def unseen(r: Row) -> list[str]:
    """What the report does not say of a cache that is not held compressed."""
    if r["layers"] < r["cached"]:
        return ["a cache is read by nothing that is recognised as attention"]
    if r["compressed"] == r["layers"] and r["held"] < r["cached"]:
        return ["the cache of an attention that is reported as compressed is not held compressed"]
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types; all if none is given")
    parser.add_argument("--modes", default=",".join(MODES), help="cache and attention (default: %(default)s)")
    parser.add_argument("--out", default=str(OUT), help="the Markdown file, or - for standard output")
    parser.add_argument("--json", type=Path, help="JSON lines, one for each row, written as they come")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the JSON file has")
    parser.add_argument("--inductor", action="store_true", help="compile what is rewritten, too: much slower")
    args = parser.parse_args()
    modes = args.modes.split(",")
    names = args.names or architectures()
    if unknown := sorted(set(names) - set(architectures())) + sorted(set(modes) - set(MODES)):
        parser.error(f"unknown: {', '.join(unknown)}")
    with tempfile.TemporaryDirectory() as folder:
        log = args.json or Path(folder, "rows.jsonl")
        if not args.resume:
            log.unlink(missing_ok=True)
        measure_all(names, modes, log, args.jobs, args.inductor)
        rows = [r for r in read(log) if r["name"] in names and r["mode"] in modes]
    text = page(rows, modes)
    if args.out == "-":
        print(text, end="")
    else:
        Path(args.out).write_text(text)


if __name__ == "__main__":
    main()
