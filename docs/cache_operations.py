#!/usr/bin/env python3
"""Makes docs/cache_operations.md: what becomes of a compressed cache under each operation that programs do on caches.

    python docs/cache_operations.py [--out FILE]

Every operation is done on a plain and on a compressed cache of a tiny Llama after 60 tokens and two steps; then both
models go on with the same tokens, and the largest difference of two logits is shown, or the error that was raised.
"""

from __future__ import annotations

import argparse
import copy
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch

import kvc_compile.backend as backend
from kvc_compile.handle import CacheHandle
from models import decode, new_cache, prompt, tiny

SPECS = ({"kvc": 1}, "int8", "kivi-4bit", "kivi-2bit")
ALL = slice(None)
BATCH, TOKENS, ROOM = 3, 60, 128


@dataclass(frozen=True)
class Operation:
    """What is done to a cache, which it changes or returns. then: the batch, and the tokens that follow."""

    name: str
    do: Callable[[Any], Any]
    batch: int = BATCH
    tokens: int = 3


def each(change: Callable[[torch.Tensor], Any]) -> Callable[[Any], None]:
    def do(cache: Any) -> None:
        for layer in cache.layers:
            layer.keys, layer.values = change(layer.keys), change(layer.values)

    return do


def in_place(change: Callable[[torch.Tensor], Any]) -> Callable[[Any], None]:
    def do(cache: Any) -> None:
        for layer in cache.layers:
            change(layer.keys)
            change(layer.values)

    return do


def updated(cache: Any) -> None:
    """What attention does first that no graph holds."""
    for i, layer in enumerate(cache.layers):
        generator = torch.Generator().manual_seed(7)
        heads, channels = layer.keys.shape[1], layer.keys.shape[3]
        cache.update(*torch.randn(2, BATCH, heads, 3, channels, generator=generator), i)


def saved(t: torch.Tensor) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


OPERATIONS = (
    Operation("none", lambda c: None),
    Operation("a chunk longer than the recent tokens", lambda c: None, tokens=50),
    Operation("`reorder_cache`", lambda c: c.reorder_cache(torch.tensor([2, 0, 0]))),
    Operation("`batch_select_indices`", lambda c: c.batch_select_indices(torch.tensor([1, 2])), batch=2),
    Operation("`batch_repeat_interleave`", lambda c: c.batch_repeat_interleave(2), batch=6),
    Operation("`crop(-1)`", lambda c: c.crop(-1)),
    Operation("`crop(-25)`", lambda c: c.crop(-25)),
    Operation("`crop(-61)`", lambda c: c.crop(-61)),
    Operation("`reset`", lambda c: c.reset(), tokens=20),
    Operation("`update` in eager code, by 3 tokens", updated),
    Operation("`copy.deepcopy`", copy.deepcopy),
    Operation("`torch.save` and `load` of the tensors", each(saved)),
    Operation("`clone` of the tensors", each(torch.clone)),
    Operation("`detach` of the tensors", each(torch.detach)),
    Operation("`to` another dtype and back", each(lambda t: t.double().float())),
    Operation("the tensors times 1", each(lambda t: t * 1)),
    Operation("`mul_` of the tensors", in_place(lambda t: t.mul_(1))),
    Operation(
        "a token assigned, `t[:, :, 3] = 0`", in_place(lambda t: t.__setitem__((slice(None), slice(None), 3), 0))
    ),
)


def outcome(spec: Any, kind: str, operation: Operation) -> tuple[str, str]:
    """(what happened, what the tensors are afterwards)."""
    torch._dynamo.reset()
    model, ids, forced = tiny("llama"), prompt(BATCH, TOKENS), prompt(BATCH, 2, seed=3)
    compiled = torch.compile(copy.deepcopy(model), backend="kvc", options=spec)
    plain, ours = new_cache(model, kind, ROOM), new_cache(model, kind, ROOM)
    decode(model, plain, ids, 2, forced)
    decode(compiled, ours, ids, 2, forced)
    try:
        plain = operation.do(plain) or plain
    except Exception:
        return "", ""  # transformers has no such operation
    try:
        ours = operation.do(ours) or ours
    except Exception as e:
        return f"{type(e).__name__}", ""
    kept = all(isinstance(t, CacheHandle) for layer in ours.layers for t in (layer.keys, layer.values))
    more = prompt(operation.batch, operation.tokens, seed=5)
    steps = prompt(operation.batch, 3, seed=6)
    want, got = decode(model, plain, more, 3, steps), decode(compiled, ours, more, 3, steps)
    return f"{float((got - want).abs().max()):.0e}", "compressed" if kept else "plain, then compressed anew"


HEAD = """# Operations on a compressed cache

Made by `python docs/cache_operations.py`. On a plain and on a compressed cache of a tiny random Llama (float32, {batch}
sequences, {tokens} tokens) the operation is done, and both models go on with the same tokens. Numbers: the largest
difference of two logits after it; of these, the row "none" is the error of the codec alone. A name is the error that is
raised: nothing is changed then, and its message says what to do. Empty: transformers has no such operation.

| operation | cache | {specs} | the tensors afterwards |
|---|---|{dashes}---|
"""

TAIL = """
Besides: a write at positions that are not consecutive, or after a gap, is an error on a CPU, and NaN on a GPU; a write
at an earlier position forgets what came after it. A dynamic cache that is continued in two ways without a copy is an
error. What is read from a handle (slices, arithmetic, `tolist`) is a dequantised copy, and a write to a slice is on
that copy. `torch.cat` of a dynamic cache with new tokens, as transformers appends them, is a longer compressed copy;
any other `cat` is a plain tensor, of which a warning and the report tell.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    backend.lower = lambda gm, inputs, request, births: gm.forward  # type: ignore[assignment]
    names = ["lossless" if isinstance(s, dict) else s for s in SPECS]
    text = HEAD.format(batch=BATCH, tokens=TOKENS, specs=" | ".join(names), dashes="---|" * len(SPECS))
    for operation in OPERATIONS:
        for kind in ("static", "dynamic"):
            found = [outcome(spec, kind, operation) for spec in SPECS]
            after = ", ".join(dict.fromkeys(a for _, a in found if a))
            text += f"| {operation.name} | {kind} | {' | '.join(x for x, _ in found)} | {after} |\n"
    args.out.write_text(text + TAIL)


if __name__ == "__main__":
    main()
