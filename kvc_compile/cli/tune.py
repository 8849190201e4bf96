"""`kvc tune SPEC`: fill the tuning database ahead, show what the kernels' variants took, export it with a spec."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvc_compile import timings
from kvc_compile.cli.arguments import numbers, positive
from kvc_compile.config import ConfigError, attention_shape, read
from kvc_compile.plan import layout_of
from kvc_compile.sites import CacheTensor
from kvc_compile.spec import Spec, SpecError
from kvc_compile.table import table
from kvc_compile.timings import DTYPES, SIZES, Entry

if TYPE_CHECKING:
    from kvc_compile.lowering.tuned import Problem


class TuneError(Exception):
    """What keeps `kvc tune` from its work, in words for the user."""


@dataclass(frozen=True)
class Shape:
    """The attention of a model: all its layers are alike. layers is 0 where it is not known."""

    heads: int
    kv_heads: int
    channels: int
    dtype: str
    layers: int = 0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `tune` to the command line; its namespace has `run`."""
    text = (
        "Time the variants of the attention kernels that a spec needs for decoding, on this machine's GPU, and store "
        "the times, so that no compile has to do so. What is stored already is shown as it is."
    )
    parser = subparsers.add_parser("tune", help="time kernel variants ahead, on this GPU", description=text)
    parser.add_argument("spec", metavar="SPEC", help="a YAML or JSON file, or the name of a preset")
    parser.add_argument("--model", metavar="DIR", help="take the shape of attention from this model's config.json")
    parser.add_argument("--heads", metavar="N", type=positive, help="query heads (32)")
    parser.add_argument("--kv-heads", metavar="N", type=positive, help="heads of keys and values (8)")
    parser.add_argument("--channels", metavar="N", type=positive, help="channels of a head (128)")
    parser.add_argument("--dtype", choices=DTYPES, help="the model's dtype (bfloat16)")
    parser.add_argument("--batch", metavar="N,...", type=numbers, default=(1,), help="sequences (1)")
    parser.add_argument("--tokens", metavar="N,...", type=numbers, default=(4096,), help="room of the cache (4096)")
    parser.add_argument("--seconds", metavar="N", type=positive, default=60, help="at most, for each shape (60)")
    parser.add_argument(
        "--export", metavar="FILE", nargs="?", const="", default=None,
        help="write the times into FILE, or next to the spec, where a compile with that spec finds them",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0: all shapes have times. 1: some have none. 2: no answer; standard error says why."""
    try:
        return tune(args)
    except (SpecError, ConfigError, TuneError) as error:
        if args.json:
            print(json.dumps({"ok": False, "error": str(error)}, indent=2))
        print(f"kvc tune: {error}", file=sys.stderr)
        return 2


def tune(args: argparse.Namespace) -> int:
    spec = Spec.load(args.spec)
    spec.require_implemented()
    target = export_file(args.export, spec)
    shape = shape_of(args)
    device = gpu()
    from kvc_compile.lowering import replay, tuning

    problems = problems_of(spec, shape, args.batch, args.tokens)
    found: dict[Problem, Entry] = {}
    for p in problems:
        try:
            found.update((p, e) for e in tuning.tune([p], device, replay.GraphBench, args.seconds, finish=True))
        except ValueError as error:  # no kernel takes such caches
            raise TuneError(str(error)) from None
    entries = list(dict.fromkeys(found.values()))
    if target is not None:
        export(target, entries)
    if args.json:
        print(json.dumps(as_data(problems, found, target), indent=2))
    else:
        print(as_text(problems, found, target, tuning.words))
    return 0 if len(found) == len(problems) else 1


def gpu() -> Any:
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        raise TuneError(f"{error}: tuning needs torch and Triton") from None
    if not torch.cuda.is_available():
        raise TuneError("found no CUDA device; kernels can be timed only on the GPU that they are to run on")
    return torch.device("cuda", torch.cuda.current_device())


def shape_of(args: argparse.Namespace) -> Shape:
    """The shape of attention by flags, else by the model's config, else that of Llama 3 8B."""
    base = Shape(32, 8, 128, "bfloat16") if args.model is None else shape_of_model(args.model)
    given = {name: getattr(args, name) for name in ("heads", "kv_heads", "channels", "dtype") if getattr(args, name)}
    shape = Shape(**{**base.__dict__, **given})
    if shape.heads % shape.kv_heads:
        raise TuneError(f"{shape.heads} query heads do not share {shape.kv_heads} heads of keys and values evenly")
    return shape


def shape_of_model(folder: str) -> Shape:
    config = read(folder)
    shape, dtype = attention_shape(config), str(getattr(config, "dtype", None)).removeprefix("torch.")
    return Shape(shape.heads, shape.kv_heads, shape.channels, dtype if dtype in DTYPES else "bfloat16", shape.layers)


def problems_of(spec: Spec, shape: Shape, batches: tuple[int, ...], tokens: tuple[int, ...]) -> list[Problem]:
    """One decoding step over each of the spec's layouts, in every combination of batch and tokens."""
    import torch

    from kvc_compile.lowering.tuned import Problem

    cache = CacheTensor("static", "", "", "", shape.kv_heads, shape.channels, shape.dtype)
    if shape.layers:
        layers = [spec.layer(i, shape.layers) for i in range(shape.layers)]
    else:
        layers = [layer for _, layer in spec.scopes()]
    found: dict[Problem, None] = {}
    for layer in layers:
        k, v = layout_of(layer.k, cache, "cuda"), layout_of(layer.v, cache, "cuda")
        for batch in batches:
            for n in tokens:
                room = v.room_of(v.row_bytes(n)) + 1
                p = Problem(k, v, shape.heads // shape.kv_heads, 1, getattr(torch, shape.dtype), batch, room)
                found[p] = None
    return list(found)


def export_file(asked: str | None, spec: Spec) -> Path | None:
    """Where to export, or None. Before the work: what cannot be written should not cost a minute."""
    if asked is None:
        return None
    file = Path(asked) if asked else timings.beside(spec)
    if file is None:
        raise TuneError(f"{spec.name!r} is a preset, next to which nothing is written: --export needs a FILE")
    if file.exists():
        try:
            timings.read(file)
        except (timings.TimingsError, OSError) as error:
            raise TuneError(f"{file} is there and holds no timings, so it is not replaced: {error}") from None
    return file


def export(file: Path, entries: list[Entry]) -> None:
    """Add the entries to those that the file holds, of other GPUs for instance; the same key is replaced."""
    kept = {e.key: e for e in (timings.read(file) if file.exists() else ())}
    timings.write(file, timings.text_of({**kept, **{e.key: e for e in entries}}.values()))


def rows_of(p: Problem, entry: Entry) -> list[dict[str, Any]]:
    """Every candidate that was timed, fastest first, with its gain over the rule's."""
    from kvc_compile.lowering.candidates import best, sizes_of

    times = dict(entry.timings)
    rule = times.get(sizes_of(p.candidates[0]))
    chosen = best(entry.timings, p.candidates)
    rows = []
    for c in sorted(p.candidates, key=lambda c: (c != chosen, times.get(sizes_of(c)) or float("inf"))):
        us = times.get(sizes_of(c), "untried")
        if us != "untried":
            sizes = dict(zip(SIZES[entry.key.kernel], sizes_of(c)))
            gain = rule / us if rule and isinstance(us, float) else None
            rows.append({**sizes, "us": us, "gain": gain, "rule": c == p.candidates[0], "chosen": c == chosen})
    return rows


def as_data(problems: list[Problem], found: dict[Problem, Entry], target: Path | None) -> dict[str, Any]:
    shapes = [
        {"k": p.k.key, "v": p.v.key, "batch": p.batch, "tokens": p.room,
         "cut_short": found[p].cut_short if p in found else None,
         "candidates": rows_of(p, found[p]) if p in found else []}
        for p in problems
    ]  # fmt: skip
    return {"ok": len(found) == len(problems), "shapes": shapes, "exported": None if target is None else str(target)}


def as_text(
    problems: list[Problem], found: dict[Problem, Entry], target: Path | None, words: Callable[[Problem], str]
) -> str:
    lines: list[str] = []
    for p in problems:
        lines += ["", words(p)[0].upper() + words(p)[1:]]
        if p not in found:
            lines.append("  no times: there was no time or memory for any; the usual sizes are used")
            continue
        rows = rows_of(p, found[p])
        names = [name for name in rows[0] if name not in ("us", "gain", "rule", "chosen")]
        cells = [(*names, "microseconds", "gain", "")]
        for r in rows:
            us = "cannot be used" if r["us"] is None else f"{r['us']:.1f}"
            gain = "-" if r["gain"] is None else f"x{r['gain']:.2f}"
            note = ", ".join(word for word in ("chosen", "rule") if r[word])
            cells.append((*(f"{r[name]:g}" for name in names), us, gain, note))
        lines += ["  " + line for line in table(cells)]
        if found[p].cut_short:
            lines.append("  Time ran out before all were tried; `kvc tune` again goes on from here.")
    if target is not None:
        lines += ["", f"Written to {target}."]
    return "\n".join(lines[1:])
