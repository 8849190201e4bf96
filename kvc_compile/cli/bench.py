"""`kvc bench`: attention calls and whole models against baselines and against the device's ceilings."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from kvc_compile import files
from kvc_compile.bench.plan import PARTS
from kvc_compile.cli.arguments import numbers


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = (
        "Measure what a compressed cache is worth: one attention call against PyTorch's, decode steps of a whole model "
        "against Hugging Face's caches, the largest batch and the longest context that fit, growth with the context, "
        "the time to the first token. Each figure of ours stands next to what its bytes predict. On a CPU everything "
        "is of toy size."
    )
    p = subparsers.add_parser("bench", help="measure it on this machine", description=text)
    p.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    p.add_argument("--spec", action="append", metavar="SPEC", help="a preset or a file; may be repeated")
    p.add_argument("--model", metavar="DIR", help="a folder with a config.json (default: the shape of Llama-3-8B)")
    p.add_argument("--contexts", metavar="N,N", type=numbers, help="of the model part (default: 4096,32768,131072)")
    p.add_argument("--batches", metavar="N,N", type=numbers, help="of the model part (default: 1,8,32)")
    p.add_argument("--mode", metavar="MODE", help="of torch.compile, for all caches alike (default: reduce-overhead)")
    p.add_argument("--weights", metavar="int8", help="quantise the model's, for all caches alike; needs torchao")
    p.add_argument("--linear", action="store_true", help="the option `linear: true`, for compressed caches")
    p.add_argument("--memory", metavar="GB", type=float, help="use no more than this (default: all of the device)")
    p.add_argument("--minutes", metavar="N", type=float, help="begin nothing after as many minutes")
    p.add_argument("--out", metavar="FILE.json", help="write all results as JSON")
    p.add_argument("--plot", metavar="FILE.svg", help="draw them; needs kvc-compile[bench]")
    p.add_argument("--quick", action="store_true", help="fewer and smaller measurements")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    p.add_argument("--json", action="store_true", help="print JSON, no tables")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """1 if a job failed. What could not be measured for want of memory or time is no failure."""
    from kvc_compile.bench import models, plot
    from kvc_compile.bench.plan import default_specs
    from kvc_compile.bench.run import run as measure
    from kvc_compile.bench.tables import text
    from kvc_compile.spec import Spec

    specs = tuple(Spec.load(s) for s in args.spec) if args.spec else default_specs()  # errors before anything slow
    for spec in specs:
        spec.require_implemented()
    if args.plot:
        plot.available()
    wanted = settings(args)
    models.config_of(wanted.model, wanted.device)
    if wanted.weights:
        models.torchao()

    def save(results: dict[str, Any]) -> None:
        if args.out:
            files.write(Path(args.out), json.dumps(results, indent=1) + "\n")

    with progress() as show:
        results = measure(wanted, specs, show, save)
    print(json.dumps(results, indent=1) if args.json else text(results), end="\n" if args.json else "")
    if args.plot:
        plot.draw(results, args.plot)
    return 1 if results["failures"] else 0


def settings(args: argparse.Namespace) -> Any:
    import torch

    from kvc_compile.bench.plan import Settings, quick
    from kvc_compile.request import OptionError

    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise OptionError("--device cuda: torch sees no GPU here")
    if device != "cpu" and not device.startswith("cuda"):
        raise OptionError(f"--device {device}: auto, cpu, cuda and cuda:N are allowed")
    asked: dict[str, Any] = {"model": args.model, "mode": args.mode, "weights": args.weights, "linear": args.linear}
    if args.parts:
        asked["parts"] = tuple(args.parts)
    for name in ("contexts", "batches"):
        if getattr(args, name):
            asked[name] = getattr(args, name)
    if args.memory is not None:
        asked["memory"] = int(args.memory * 1e9)
    if args.minutes is not None:
        asked["until"] = time.time() + 60 * args.minutes
    return quick(device, **asked) if args.quick or device == "cpu" else Settings(device, **asked)


class progress:
    """A line on standard error that says what is going on."""

    def __enter__(self) -> Any:
        from importlib.util import find_spec

        self.bar: Any = None
        if find_spec("rich") is None:
            return lambda what, done, total: None
        import rich.progress
        from rich.console import Console

        columns = rich.progress.Progress.get_default_columns()
        self.bar = rich.progress.Progress(*columns, console=Console(stderr=True), transient=True)
        self.bar.start()
        task = self.bar.add_task("starting", total=1)

        def show(what: str, done: int, total: int) -> None:
            self.bar.update(task, description=what, completed=done, total=max(total, 1))

        return show

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        sys.stderr.flush()
