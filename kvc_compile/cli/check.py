"""`kvc check SPEC`: is this spec valid, what does it mean, is all of it implemented? Needs no torch."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from typing import Any

from kvc_compile.spec import CodecSpec, NotImplementedInSpec, Spec, SpecError, TensorSpec

WIDTH = 128  # channels of a head, where bits per number depend on it
LINE = 100  # characters
COLUMNS = ("layers", "tensor", "stored as", "block", "middle", "sink", "recent", "flush", "bits/number")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `check` to the command line; its namespace has `run`."""
    text = "Check a spec: show what it expands to, how each tensor is stored, and what is not implemented."
    parser = subparsers.add_parser("check", help="check a spec and show what it means", description=text)
    parser.add_argument("spec", metavar="SPEC", help="a YAML or JSON file, or the name of a preset")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0: valid and implemented. 1: refused, with the reason on standard error (in the JSON too, with --json)."""
    try:
        spec = Spec.load(args.spec)
    except SpecError as error:
        if args.json:
            print(json.dumps({"ok": False, **failure(error)}, indent=2))
        print(f"kvc check: {error}", file=sys.stderr)
        return 1
    refused = None
    try:
        spec.require_implemented()
    except NotImplementedInSpec as error:
        refused = error
    print(json.dumps(as_data(spec, refused), indent=2) if args.json else as_text(spec, refused))
    if refused:
        print(f"kvc check: {refused}", file=sys.stderr)
    return 1 if refused else 0


def as_data(spec: Spec, refused: NotImplementedInSpec | None) -> dict[str, Any]:
    """The answer of `--json`; bits_per_element is that of encoded tokens, in heads of `head_dim` channels."""
    tensors = [] if refused else [{"layers": scope or "all", **row(side, t)} for scope, side, t in tensors_of(spec)]
    said = {} if refused else reads(spec)
    for data in tensors:
        data["reads"] = said.get(data["layers"])
    return {
        "ok": refused is None,
        "name": spec.name,
        "digest": spec.digest,
        "not_implemented": list(refused.paths) if refused else [],
        "notes": list(spec.origin.notes),
        "head_dim": WIDTH,
        "tensors": tensors,
        "expanded": spec.expanded(),
    }


def as_text(spec: Spec, refused: NotImplementedInSpec | None) -> str:
    lines = [f"{spec.name} ({spec.digest})", "", *("  " + line for line in spec.to_yaml().splitlines()), ""]
    for note in spec.origin.notes:
        lines += [*textwrap.wrap(note, LINE), ""]
    if refused:
        return "\n".join([*lines, "Well formed, but not implemented yet:", *(f"  {path}" for path in refused.paths)])
    rows: list[tuple[str, ...]] = [COLUMNS]
    for scope, side, tensor in tensors_of(spec):
        rows.append((scope if len(scope) <= 24 else scope[:21] + "...", side.upper(), *cells(tensor)))
    lines += table(rows)
    lines += [f"{name}: {text}" for name, text in reads(spec).items()]
    return "\n".join(
        [*lines, "", f"Regions in tokens; bits per number of encoded tokens, in heads of {WIDTH} channels."]
    )


def reads(spec: Spec) -> dict[str, str]:
    """By scope, what a step reads of a cache; empty where nothing selects."""
    scopes = spec.scopes()
    said = {scope or ("others" if len(scopes) > 1 else "all"): layer.select for scope, layer in scopes}
    return (
        {name: f"a step reads {s.words}" if s else "all is read" for name, s in said.items()}
        if any(said.values())
        else {}
    )


def tensors_of(spec: Spec) -> list[tuple[str, str, TensorSpec]]:
    scopes = spec.scopes()
    base = "others" if len(scopes) > 1 else "all"
    return [(scope or base, side, getattr(layer, side)) for scope, layer in scopes for side in ("k", "v")]


def cells(tensor: TensorSpec) -> tuple[str, ...]:
    codec = tensor.codec
    bits = f"{codec.bits_per_element(WIDTH):.4g}"
    if codec.kind == "raw":
        return ("model's dtype", "-", "-", "-", "-", "-", bits)
    block = "-" if codec.block is None else f"{codec.block[0]} x {codec.block[1] or 'all'}"
    middle = "-" if codec.block is None else "yes" if codec.zero_point else "no"
    return (stored_as(codec), block, middle, *map(str, (tensor.sink, tensor.recent, tensor.flush)), bits)


def stored_as(codec: CodecSpec) -> str:
    return {"raw": "model's dtype", "int": f"int {codec.bits}", "fp": "float8 e4m3"}[codec.kind]


def row(side: str, tensor: TensorSpec) -> dict[str, Any]:
    codec = tensor.codec
    return {
        "tensor": side,
        "kind": codec.kind,
        "bits": codec.bits,
        "block": None if codec.block is None else [codec.block[0], codec.block[1] or "all"],
        "zero_point": codec.zero_point,
        "sink": tensor.sink,
        "recent": tensor.recent,
        "flush": tensor.flush,
        "bits_per_element": codec.bits_per_element(WIDTH),
    }


def failure(error: SpecError) -> dict[str, Any]:
    keys = ("message", "file", "line", "path", "found", "allowed", "nearest")
    return {"error": {key: getattr(error, key) for key in keys}}


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Aligned columns, with a rule under the first row."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip() for cells in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
