"""`kvc presets [NAME]`: the specs that come with the package. Needs no torch."""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import Any

from kvc_compile.spec import Spec, SpecError, presets
from kvc_compile.spec.errors import nearest
from kvc_compile.spec.spec import preset_text

from .check import WIDTH, table


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `presets` to the command line; its namespace has `run`."""
    text = "List the presets, or print the YAML of one: a file to start from."
    parser = subparsers.add_parser("presets", help="list the presets, or print one", description=text)
    parser.add_argument("name", metavar="NAME", nargs="?", help="the preset to print")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0, or 1 if there is no preset of that name."""
    if args.name is None:
        rows = [entry(name) for name in presets()]
        print(json.dumps(rows, indent=2) if args.json else as_text(rows))
        return 0
    if args.name not in presets():
        allowed = "a name that `kvc presets` lists"
        error = SpecError(
            "no such preset", found=ascii(args.name), allowed=allowed, nearest=nearest(args.name, presets())
        )
        print(f"kvc presets: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps({**entry(args.name), "expanded": Spec.load(args.name).expanded()}, indent=2))
    else:
        print(preset_text(args.name), end="")
    return 0


def entry(name: str) -> dict[str, Any]:
    """runs: whether all of it is implemented; needs: the key paths that are not. k, v: bits per number of encoded
    tokens, in heads of `WIDTH` channels, None where it does not run."""
    spec = Spec.load(name)
    bits: dict[str, float | None] = {"k": None, "v": None}
    if not spec.missing:
        layer = spec.scopes()[0][1]
        bits = {side: getattr(layer, side).codec.bits_per_element(WIDTH) for side in ("k", "v")}
    runs = not spec.missing
    return {"name": name, **bits, "runs": runs, "needs": list(spec.missing), "description": spec.description}


def keys(paths: list[str]) -> list[str]:
    """The keys of a spec in which these paths lie, each once."""
    return list(dict.fromkeys(re.split(r"[.\[]", path)[0] for path in paths))


def as_text(rows: list[dict[str, Any]]) -> str:
    runs = [(r["name"], f"{r['k']:.4g}", f"{r['v']:.4g}", r["description"]) for r in rows if r["runs"]]
    later = [(r["name"], ", ".join(keys(r["needs"])), r["description"]) for r in rows if not r["runs"]]
    return "\n".join(
        [
            *table([("preset", "bits K", "bits V", "what it is"), *runs]),
            "",
            f"Bits per number of encoded tokens, scales included, in heads of {WIDTH} channels.",
            "",
            "These do not run yet: they are checked, and refused by what they need that is not implemented.",
            "",
            *table([("preset", "needs", "what it is"), *later]),
        ]
    )
