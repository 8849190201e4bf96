"""`kvc demo`: a real model with its full cache and with compressed ones, side by side."""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvc_compile.config import attention_shape

PRESETS = "int8,kivi-4bit,kivi-2bit"
TOPIC = "with"  # of pydoc: the passage that the default prompt asks about
QUESTION = "In two sentences: what is a context manager in Python, and what is the with statement for?"
FULL = "uncompressed"


@dataclass(frozen=True)
class Size:
    """How long all is. text: (tokens of context, tokens scored) of the perplexity."""

    answer: int
    text: tuple[int, int]


NORMAL, QUICK = Size(56, (640, 64)), Size(32, (384, 32))


@dataclass(frozen=True)
class Row:
    """One way to hold the cache. planned, held: bytes; kl, top1: against the uncompressed row, over the scored text;
    seconds: of the answer, prompt included, once compiled; total: of everything, compilation included."""

    cache: str
    text: str
    planned: int
    held: int
    of_dtype: float
    of_16bit: float
    perplexity: float
    kl: float
    top1: float
    seconds: float
    total: float


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = (
        "Run SmolLM2-135M-Instruct with its full cache and with compressed ones: what it answers, what the cache "
        "takes, and what compression costs in perplexity. Some minutes on two CPU cores, most of them compiling."
    )
    p = subparsers.add_parser("demo", help="a real model with compressed caches, side by side", description=text)
    p.add_argument(
        "--presets", metavar="A,B", help=f"presets or spec files (default: {PRESETS}; with --quick kivi-4bit)"
    )
    p.add_argument("--prompt", metavar="TEXT", help="what to ask (default: on a page of Python's documentation)")
    p.add_argument("--tokens", metavar="N", type=int, help=f"longest answer (default: {NORMAL.answer})")
    p.add_argument("--quick", action="store_true", help="one preset and short texts: one to two minutes")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    p.add_argument("--dump", metavar="DIR", help="write each preset's graphs, before and after, to DIR/PRESET")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from kvc_compile import demo_model
    from kvc_compile.request import OptionError
    from kvc_compile.spec import Spec

    size = QUICK if args.quick else NORMAL
    if args.tokens is not None:
        if args.tokens < 1:
            raise OptionError(f"--tokens is {args.tokens}: 1 or more is allowed")
        size = Size(args.tokens, size.text)
    names = (args.presets or ("kivi-4bit" if args.quick else PRESETS)).split(",")
    specs = [Spec.load(name) for name in names]  # errors before anything slow
    for spec in specs:
        spec.require_implemented()
    demo_model.folder()
    import torch

    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise OptionError("--device cuda: torch sees no GPU here")
    if device != "cpu" and not device.startswith("cuda"):
        raise OptionError(f"--device {device}: auto, cpu and cuda are allowed")
    setup, rows = compare(specs, size, device, args.prompt, args.dump)
    if args.json:
        print(json.dumps({"setup": setup, "rows": [asdict(r) for r in rows]}, indent=2))
    else:
        show(setup, rows)
    return 0


def compare(
    specs: list[Any], size: Size, device: str, prompt: str | None, dump: str | None
) -> tuple[dict[str, Any], list[Row]]:
    """Measure the uncompressed model and one compiled copy of it for each spec."""
    import rich.progress
    import torch
    from rich.console import Console

    import kvc_compile
    from kvc_compile import demo_model

    columns = rich.progress.Progress.get_default_columns()
    with rich.progress.Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        steps = (len(specs) + 1) * (size.answer + size.text[1])
        task = progress.add_task("loading the model", total=steps + len(specs) + 1)

        def step() -> None:
            progress.advance(task)

        model, tokenizer = demo_model.load(device)
        step()
        runner = Runner(model, tokenizer, size, prompt or passage(tokenizer, size))
        progress.update(task, description=FULL)
        rows = [runner.measure(model, FULL, step)]
        for n, spec in enumerate(specs, 1):
            progress.update(task, description=f"{spec.name}: compiling", completed=1 + n * steps // (len(specs) + 1))
            # what Hugging Face's generate does for the uncompressed row on a GPU by itself
            runtime: dict[str, Any] = {"mode": "default" if device == "cpu" else "reduce-overhead"}
            if dump:
                runtime["dump"] = str(Path(dump) / spec.name)
            compiled = kvc_compile.compile(copy.deepcopy(model), spec, **runtime)
            rows.append(runner.measure(compiled, spec.name, step))
            del compiled
            torch._dynamo.reset()
    shape = attention_shape(model.config)
    setup = {
        "model": demo_model.NAME,
        "device": torch.cuda.get_device_name() if device != "cpu" else f"CPU, {torch.get_num_threads()} threads",
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": shape.layers,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.channels,
        "cache_tokens": runner.room,
        "prompt_tokens": runner.prompt.shape[1],
        "scored_after": size.text[0],
        "scored": size.text[1],
        "torch": torch.__version__,
        "question": prompt or QUESTION,
    }
    return setup, rows


def passage(tokenizer: Any, size: Size) -> str:
    """A question on the beginning of a topic; as many tokens, template included, as the perplexity's context has, so
    that both texts run through the same compiled graph."""
    from pydoc_data.topics import topics

    body = tokenizer(topics[TOPIC], add_special_tokens=False).input_ids
    room = size.text[0]
    for _ in range(8):  # tokens at the seams may merge
        said = f"{tokenizer.decode(body[:room])}\n\n{QUESTION}"
        excess = len(templated(tokenizer, said)) - size.text[0]
        if excess == 0:
            break
        room -= excess
    return said


def templated(tokenizer: Any, prompt: str) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    return tokenizer(text, add_special_tokens=False).input_ids


class Runner:
    """The texts of the demo, and what the uncompressed model made of them."""

    def __init__(self, model: Any, tokenizer: Any, size: Size, prompt: str):
        import torch

        from kvc_compile import quality

        self.tokenizer, self.size = tokenizer, size
        context, scored = size.text
        start = quality.WINDOWS[0]
        text = quality.topic_tokens(tokenizer)[start : start + context + scored + 1]
        self.text = torch.tensor([text], device=model.device)
        self.prompt = torch.tensor([templated(tokenizer, prompt)], device=model.device)
        longest = max(context + scored, self.prompt.shape[1] + size.answer)
        self.room = -(-(longest + 1) // 128) * 128
        self.full: torch.Tensor | None = None

    def measure(self, model: Any, name: str, step: Callable[[], None]) -> Row:
        """One row. The text comes first: the answer then runs on graphs that are compiled."""
        from transformers import StaticCache

        from kvc_compile import quality, report

        def new_cache() -> Any:
            return StaticCache(config=model.config, max_cache_len=self.room)

        began = time.perf_counter()
        context = self.size.text[0]
        logits = quality.generate(model, self.text[:, :-1], context, new_cache(), step)
        if self.full is None:
            self.full = logits
        score = quality.score(logits, self.full, self.text[0, context + 1 :])
        cache, timed = new_cache(), time.perf_counter()
        text = self.answer(model, cache, step)
        seconds = time.perf_counter() - timed
        dense = dense_bytes(model, self.room)
        planned = dense if name == FULL else report(model).bytes(self.room).compressed
        return Row(
            cache=name,
            text=text,
            planned=planned,
            held=quality.stored_bytes(cache),
            of_dtype=planned / dense,
            of_16bit=planned / dense * model.dtype.itemsize / 2,
            perplexity=math.exp(score.nll),
            kl=score.kl,
            top1=score.top1,
            seconds=seconds,
            total=time.perf_counter() - began,
        )

    def answer(self, model: Any, cache: Any, step: Callable[[], None]) -> str:
        import torch

        def count(_: Any, scores: Any) -> Any:
            step()
            return scores

        with torch.no_grad():
            out = model.generate(
                self.prompt,
                attention_mask=torch.ones_like(self.prompt),
                past_key_values=cache,
                max_new_tokens=self.size.answer,
                do_sample=False,
                logits_processor=[count],
            )
        return self.tokenizer.decode(out[0, self.prompt.shape[1] :], skip_special_tokens=True).strip()


def dense_bytes(model: Any, tokens: int) -> int:
    shape = attention_shape(model.config)
    return 2 * shape.layers * shape.kv_heads * tokens * shape.channels * model.dtype.itemsize


# ---------------------------------------------------------------- for people


def show(setup: dict[str, Any], rows: list[Row]) -> None:
    from rich.console import Console

    console = Console(highlight=False, width=min(100, Console().width) if sys.stdout.isatty() else 100)
    s = setup
    console.print(
        f"[bold]{s['model']}[/], {s['layers']} layers, {s['kv_heads']} KV heads of {s['head_dim']}, {s['dtype']}, "
        f"{s['device']}, torch {s['torch']}",
        soft_wrap=False,
    )
    console.print(measures(setup, rows))
    console.print(
        f"Planned and held: bytes of the cache with room for {s['cache_tokens']} tokens, scales and exact recent "
        f"tokens included. Of fp32: planned, against the uncompressed cache in the model's own dtype, {s['dtype']}; of "
        f"16-bit: against one of 16-bit numbers. Perplexity, KL, top-1: {s['scored']} tokens of Python's documentation "
        f"after {s['scored_after']}, read through the cache. Answer: seconds for the answer to {s['prompt_tokens']} "
        "tokens, once compiled (the uncompressed row is not compiled); in all: compilation and perplexity included.",
        style="dim",
    )
    console.print()
    console.print(answers(setup, rows))


def measures(setup: dict[str, Any], rows: list[Row]) -> Any:
    from rich import box
    from rich.table import Table

    dtype = setup["dtype"].replace("float32", "fp32")
    same = dtype in ("float16", "bfloat16")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("cache", no_wrap=True)
    ratios = ["of 16-bit"] if same else [f"of {dtype}", "of 16-bit"]
    for head in ("planned", "held", *ratios, "perplexity", "KL", "top-1", "answer", "in all"):
        table.add_column(head, justify="right", no_wrap=True)
    for r in rows:
        shares = [f"{r.of_16bit:.3f}"] if same else [f"{r.of_dtype:.3f}", f"{r.of_16bit:.3f}"]
        measured = (f"{r.perplexity:.3f}", f"{r.kl:.4f}", f"{r.top1:.3f}", f"{r.seconds:.1f} s", f"{r.total:.0f} s")
        table.add_row(r.cache, f"{r.planned / 1e6:.1f} MB", f"{r.held / 1e6:.1f} MB", *shares, *measured)
    return table


def answers(setup: dict[str, Any], rows: list[Row]) -> Any:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=True)
    table.add_column("cache", no_wrap=True)
    table.add_column(escape(setup["question"]), overflow="fold")
    for r in rows:
        table.add_row(r.cache, escape(" ".join(r.text.split())))
    return table
