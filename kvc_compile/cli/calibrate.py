"""`kvc calibrate MODEL --out FILE`: scores of heads, for `heads:` and `alloc: {table: ..}` of a spec beside FILE."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from kvc_compile.cli.arguments import positive
from kvc_compile.cli.explain import DEMO, DTYPES, ModelError, load

CHOICES = {"razor": ("echo", "induction"), "echo": ("echo",), "induction": ("induction",), "streaming": ("streaming",)}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `calibrate` to the command line; its namespace has `run`."""
    text = (
        "Let a model read random tokens again and again, and score its heads by what they attend to. razor: the echo "
        "and induction heads of RazorAttention; streaming: how much a head's output changes where it sees only the "
        "first and newest tokens (DuoAttention trains gates for that; this does not). The file goes beside a spec: see "
        "`kvc presets razorattention`, duoattention, headkv."
    )
    parser = subparsers.add_parser("calibrate", help="score a model's heads, for a spec's tables", description=text)
    parser.add_argument(
        "model", metavar="MODEL", help=f"a Hugging Face model directory or id on this machine, or {DEMO!r}"
    )
    parser.add_argument("--out", metavar="FILE", required=True, help="where the scores go, a .json")
    parser.add_argument("--score", choices=CHOICES, default="razor", help="what is measured (%(default)s)")
    parser.add_argument("--tokens", metavar="N", type=positive, default=256, help="different tokens (%(default)s)")
    parser.add_argument("--repeats", metavar="N", type=positive, default=4, help="times they are read (%(default)s)")
    parser.add_argument("--text", metavar="FILE", help="with `streaming`: read this instead of random tokens")
    parser.add_argument("--sink", metavar="N", type=positive, default=16, help="of a streaming head (%(default)s)")
    parser.add_argument("--recent", metavar="N", type=positive, default=64, help="of a streaming head (%(default)s)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the random tokens (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="run the model in this dtype (its own)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0: the file is written. 2: it is not; standard error says why."""
    try:
        from kvc_compile.calibrate import CalibrateError
    except ImportError as error:
        print(f"kvc calibrate: {error}; install kvc-compile[hf]", file=sys.stderr)
        return 2
    try:
        data = scored(args)
        from kvc_compile import files

        files.write(Path(args.out), as_file(data))
    except (ModelError, CalibrateError, OSError) as error:
        if args.json:
            print(json.dumps({"ok": False, "error": str(error)}, indent=2))
        print(f"kvc calibrate: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"ok": True, "out": args.out, **data}, indent=2) if args.json else as_text(data, args.out))
    return 0


def scored(args: argparse.Namespace) -> dict[str, Any]:
    """The content of the file: `tables` by name, and `about`, how they came to be."""
    from kvc_compile.calibrate import CalibrateError, Probe, calibrate, repeated

    if Path(args.out).suffix != ".json":
        raise CalibrateError(f"--out {args.out}: a file name that ends in .json is allowed")
    if args.text is not None and args.score != "streaming":
        raise CalibrateError(f"--text: the score {args.score} needs tokens that repeat; streaming reads a text")
    model = load(args.model, args.dtype)
    about: dict[str, Any] = {"model": Path(args.model).name, "score": args.score}
    if args.score == "streaming":
        about |= {"sink": args.sink, "recent": args.recent}
    if args.text is not None:
        ids = tokens_of(args.model, Path(args.text).read_text(encoding="utf-8"), args.tokens * args.repeats)
        about |= {"text": Path(args.text).name, "tokens": len(ids)}
        probe = Probe(ids, 0, args.sink, args.recent)
    else:
        config = model.config.get_text_config(decoder=True)
        special = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
        flat = [i for x in special for i in (x if isinstance(x, list) else [x]) if i is not None]
        ids = repeated(config.vocab_size, args.tokens, args.repeats, args.seed, flat)
        about |= {"tokens": args.tokens, "repeats": args.repeats, "seed": args.seed}
        probe = Probe(ids, args.tokens, args.sink, args.recent)
    return {"about": about, "tables": calibrate(model, probe, CHOICES[args.score], show_progress)}


def tokens_of(model: str, text: str, most: int) -> Any:
    from transformers import AutoTokenizer

    from kvc_compile import demo_model

    if model == DEMO and not Path(model).is_dir():
        tokenizer = AutoTokenizer.from_pretrained(demo_model.folder(), gguf_file=demo_model.GGUF)
    else:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    return tokenizer(text, return_tensors="pt").input_ids[0, :most]


def show_progress(layers: int) -> None:
    if sys.stderr.isatty():
        print(f"\rlayer {layers}", end="\r", file=sys.stderr, flush=True)


def as_file(data: dict[str, Any]) -> str:
    """JSON with a line for each layer."""
    blocks = (
        f"  {json.dumps(name)}: [\n" + ",\n".join(f"   {json.dumps(row)}" for row in table) + "\n  ]"
        for name, table in data["tables"].items()
    )
    return f'{{\n "about": {json.dumps(data["about"])},\n "tables": {{\n' + ",\n".join(blocks) + "\n }\n}\n"


def as_text(data: dict[str, Any], out: str) -> str:
    """The best ten heads by each score."""
    lines = []
    for name, table in data["tables"].items():
        ranked = sorted(((-x, i, h) for i, row in enumerate(table) for h, x in enumerate(row)))
        lines += [f"{name}: the highest of {len(ranked)} KV heads", "", "  layer  head  score", "  " + "-" * 19]
        lines += [f"  {i:5}  {h:4}  {-x:.3f}" for x, i, h in ranked[:10]] + [""]
    return "\n".join([*lines, f"All of them are in {out}."])
