"""Writes what is derived from the vocabulary: `schema.json` (for editors) and `docs/spec.md` (the reference page).

python -m kvc_compile.spec.generate          # in a checkout; the tests fail if the files are out of date
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any

from . import schema, source
from .grammar import List, Map, OneOf, Planned, Tuple, Type
from .spec import Spec, presets
from .tensors import TensorSpec

HERE = FilePath(__file__).parent
SCHEMA_FILE = HERE / "schema.json"
DOCS_FILE = HERE.parent.parent / "docs" / "spec.md"
WIDTH = 128  # channels of a head, where bits per number depend on it

TITLES = {
    "amount": "Amount: of tokens, channels or dimensions",
    "when": "When",
    "repr": "Representation: `k`, `v`, `kv`",
    "codec": "Codec",
    "basis": "Basis",
    "map": "Map of a basis",
    "rope": "Rope",
    "ref": "Ref",
    "keep": "Keep",
    "rule": "Rule of `keep`",
    "score": "Score",
    "attention": "Attention score",
    "probe": "Probe: which queries vote",
    "alloc": "Alloc: how a budget is shared",
    "select": "Select",
    "query": "Query: `select` in full",
    "fragment": "Fragment: what a scope may change",
    "draft": "Draft",
    "body": "Body: a spec inside a spec",
}

INTRO = """\
# The spec file

<!-- Written by `python -m kvc_compile.spec.generate` from kvc_compile/spec/schema.py: edit that, not this. -->

A spec says how the KV cache of a model is stored, kept and read. It is a YAML or JSON file, a Python mapping, or the
name of a preset:

```yaml
kvc: 1                                           # version of the vocabulary; required in a file
tokens: {sink: 4, recent: 64}                    # in the model's dtype: the first 4 and at most 64 newest tokens
k: {codec: {int: 4, block: [32, 1]}}             # keys: 4 bits, a scale for each channel of 32 tokens
v: {codec: {int: 4, block: [1, 32]}}             # values: 4 bits, a scale for 32 channels of each token
layers: {"0,-1": {k: {codec: {int: 8}}}}         # the first and the last layer: keys in 8 bits
```

`{kvc: 1}` alone is lossless. `kvc check FILE` says what a spec means; an editor that knows JSON Schema can use
`kvc_compile/spec/schema.json`.

## What the words mean

**Regions.** The first `sink` tokens stay in the model's dtype for ever. At most `recent` newest tokens are kept in the
model's dtype; when one more arrives, the oldest `flush` tokens are encoded. The tokens between are the body, and only
they are compressed. `flush` is a multiple of the block's tokens (which is its default), as blocks are encoded whole,
and `recent` is at least `flush`: a block over tokens waits in the model's dtype until it is complete. So where `recent`
is absent or 0 it is `flush` if that is above 1, and else 0. `recent` and `flush` can be given apart for keys and
values, `{k: 32, v: 64}`. Regions say nothing for a tensor that is stored in the model's dtype anyway.

**Blocks.** `block: [t, c]` is one scale (and, with `zero`, one middle) for t tokens by c channels: `[32, 1]` is per
channel in groups of 32 tokens, `[1, 32]` per token in groups of 32 channels, `[1, all]` per token. A number costs
b + 32/(t*c) bits, or b + 16/(t*c) without a middle: 5 bits for `{int: 4, block: [32, 1]}`.

**Scopes.** `kv` holds for keys and values, and `k` and `v` refine it. What stands under `layers:` is laid over the rest
for those layers, key by key; a codec of another kind (`fp` over `int`) replaces the whole codec. Each layer belongs to
one range at most, and a range that the model does not have is an error.

**Classes of heads.** `heads:` says what differs in the KV heads of a class, such as retrieval and streaming heads, and
which heads are of it, by a table in the spec or beside it: [heads.md](heads.md).

**Short form.** `bits: b` stands for `{int: b}` with blocks %(k)s for keys and %(v)s for values and, if `tokens` is
absent, `tokens: %(tokens)s`; 16 stands for the model's dtype. `budget`, `rank` and `share` stand for `keep`,
`basis` and `ref`. `kvc check` shows the expansion. A key and its short form cannot both be given.
Where `keep` replaces single tokens at every step, keys get blocks %(single)s instead, as no token leaves a block alone.
These cost as many bits, and more quality: the KL divergence of SmolLM2's attention weights is 0.032 instead of 0.007
with 4 bits, and 0.86 instead of 0.20 with 2 (`benchmarks/key_blocks.py`). `bits: {k: 8, v: 4}`, or `when: every(32)`
with blocks of 32 tokens lose less.

**Status.** What is not implemented yet is still checked, and then refused by name. In the tables, *checked* and a star
after a value say so. Of `keep`, that every key runs does not mean that every combination does: `kvc check` says which.

**Eviction.** A rule of `keep` runs at the end of each prompt (`prefill_end`), and at each new token if it says so
(`append`). A share (`25%%`) is of all tokens that a sequence has seen. Tokens that the newest query cannot see, such as
padding, are not kept. Sliding windows keep what they have. With `append`, all tokens but the first `sink` ones are
encoded at once, so `recent` says which ones may not go, not which ones are exact. A later prompt is scored by its own
queries.

**Safety.** A spec is plain data of at most 64 KiB of UTF-8: no tags, anchors, aliases, merge keys or second document,
no code, at most %(depth)d levels and %(nodes)d values; expressions are parsed, never evaluated. Artefacts lie in the
spec's folder or below; pickles are refused. Numbers are written in decimal. Unknown and repeated keys are errors.
"""


def schema_json() -> str:
    """The JSON Schema (draft 2020-12) of spec files."""
    spec = schema.SPEC.json()
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"kvc_compile spec, version {schema.VERSION}",
        "description": "How a model's KV cache is stored, kept and read.",
    }
    defs = {name: part.json() for name, part in sorted(schema.PARTS.items())}
    return json.dumps({**head, **spec, "required": ["kvc"], "$defs": defs}, indent=1) + "\n"


def docs() -> str:
    """The reference page."""
    tokens = json.dumps(schema.SHORT_TOKENS).replace('"', "")
    blocks = {side: str(block) for side, block in schema.SHORT_BLOCKS.items()}
    limits = {"single": schema.SHORT_SINGLE, "tokens": tokens, "depth": source.MAX_DEPTH, "nodes": source.MAX_NODES}
    out = [
        INTRO % {**blocks, **limits},
        "## Presets\n",
        *_presets(),
        "",
        "## Keys of a spec\n",
        *_table(schema.SPEC, True),
        "",
    ]
    assert TITLES.keys() == schema.PARTS.keys(), "every part needs a title"
    for name, title in TITLES.items():
        out += [f'<a id="{name}"></a>', "", f"## {title}\n", *_part(schema.PARTS[name]), ""]
    out += ["## Forms of values\n", "| written | means |", "|---|---|"]
    out += [f"| `{form}` | {_cell(meaning)} |" for form, meaning in schema.FORMATS.items()]
    return "\n".join(out) + "\n"


def bits_per_element(tensor: TensorSpec) -> str:
    """Bits per encoded number, for heads of 128 channels."""
    return f"{tensor.codec.bits_per_element(WIDTH):.3g}"


def _presets() -> Iterator[str]:
    specs = {name: Spec.load(name) for name in presets()}
    yield f"| name | bits per number, K / V (heads of {WIDTH}) | what it is |"
    yield "|---|---|---|"
    for name, spec in specs.items():
        if not spec.missing:
            base = spec.scopes()[0][1]
            bits = f"{bits_per_element(base.k)} / {bits_per_element(base.v)}"
            yield f"| `{name}` | {bits} | {_cell(spec.description)} |"
    yield "\nPublished methods that are well formed, and refused by name until all of their keys are implemented:\n"
    yield "| name | needs | what it is |"
    yield "|---|---|---|"
    for name, spec in specs.items():
        if spec.missing:
            yield f"| `{name}` | {', '.join(f'`{path}`' for path in spec.missing)} | {_cell(spec.description)} |"


def _part(kind: Type) -> Iterator[str]:
    if isinstance(kind, Map):
        yield from _table(kind, True)
        return
    yield f"{_link(kind.text())}\n"
    for inner, done in _maps(kind, True):
        yield from _table(inner, done)


def _table(kind: Map, done: bool) -> Iterator[str]:
    yield "| key | value | status | what it says |"
    yield "|---|---|---|---|"
    yield from _rows(kind, "", done)


def _rows(kind: Map, prefix: str, done: bool) -> Iterator[str]:
    """A row for each key; done: whether the mapping itself is implemented."""
    items = [*kind.keys.items(), *([(kind.open[0].text(), kind.open[1])] if kind.open else [])]
    for name, key in items:
        status = "implemented" if key.done and done else "checked"
        need = " (required)" if key.required else ""
        yield f"| `{prefix}{name}` | {_link(key.type.text())} | {status} | {_cell(key.doc)}{need} |"
        for inner, inner_done in _maps(key.type, key.done and done):
            yield from _rows(inner, f"{prefix}{name}.", inner_done)


def _maps(kind: Any, done: bool) -> Iterator[tuple[Map, bool]]:
    """The mappings written inside a kind, and whether they are implemented; named parts have a section of their own."""
    if isinstance(kind, Map):
        yield kind, done
    elif isinstance(kind, Planned):
        yield from _maps(kind.type, False)
    elif isinstance(kind, List):
        yield from _maps(kind.item, done)
    elif isinstance(kind, (OneOf, Tuple)):
        for item in kind.options if isinstance(kind, OneOf) else kind.items:
            yield from _maps(item, done)


def _link(text: str) -> str:
    names = "|".join(schema.PARTS).upper()
    linked = re.sub(rf"\b({names})\b", lambda m: f"[{m[1]}](#{m[1].lower()})", text)
    return _cell(linked).replace("*", "\\*")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    for path, text in ((SCHEMA_FILE, schema_json()), (DOCS_FILE, docs())):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
