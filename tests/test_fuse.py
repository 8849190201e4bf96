"""Appends of one token to keys and values become one operator, where that is the same."""

from __future__ import annotations

import pytest
import torch
from torch.fx import GraphModule

from kvc_compile.kernels import reference
from kvc_compile.layout import Codec, Layout
from kvc_compile.lowering import ops
from kvc_compile.passes.fuse import fuse_appends, kvc

assert ops  # defines kvc::
K = Layout(Codec("int", 4, (16, 1), True), 2, 16, "float32", 4, 16, 16, 16)
V = Layout(Codec("int", 4, (1, 16), True), 2, 16, "float32", 4, 16, 1, 16)
ATTEND = "kvc.attend.default(q, {0}, {1}, {2}, {3}, None, pos, True, 0.25, K, V)"


def append(arena: str, x: str, layout: str, pos: str = "pos", after: str = "") -> str:
    return f"kvc.append.default({arena}, {x}, {pos}, {layout}, [{after}])"


KEYS, VALUES = append("ck", "k", "K"), append("cv", "v", "V")

FUSED = {
    "a layer": (f"o = {ATTEND.format('ck', 'cv', 'k', 'v')}\n{append('ck', 'k', 'K', after='o')}\n"
                f"{append('cv', 'v', 'V', after='o')}\nreturn o", 1),
    "two layers": (f"{KEYS}\n{VALUES}\n{append('dk', 'k', 'K')}\n{append('dv', 'v', 'V')}\nreturn k", 2),
    "three": (f"{KEYS}\n{VALUES}\n{append('dk', 'k', 'K')}\nreturn k", 1),
    "something else between": (f"{KEYS}\ny = k * 2\n{VALUES}\nreturn y", 1),
    "another arena read between": (f"{KEYS}\no = {ATTEND.format('dk', 'dv', 'k', 'v')}\n{VALUES}\nreturn o", 1),
    "at the end": (f"{append('ck', 'k', 'K', 'None')}\n{append('cv', 'v', 'V', 'None')}\nreturn k", 1),
    "other positions": (f"{KEYS}\n{append('cv', 'v', 'V', 'other')}\nreturn k", 0),
    "one at the end": (f"{KEYS}\n{append('cv', 'v', 'V', 'None')}\nreturn k", 0),
    "the same arena": (f"{append('ck', 'k', 'K', 'None')}\n{append('ck', 'v', 'K', 'None')}\nreturn k", 0),
    "the arena read between": (f"{KEYS}\no = {ATTEND.format('ck', 'dv', 'k', 'v')}\n{VALUES}\nreturn o", 0),
    "keys changed between": (f"k = k * 1\n{KEYS}\nk.mul_(2)\n{VALUES}\nreturn k", 0),
    "positions changed between": (f"pos = pos * 1\n{KEYS}\npos.sub_(1)\n{VALUES}\nreturn k", 0),
}  # fmt: skip


def arena(layout: Layout, x: torch.Tensor) -> torch.Tensor:
    data = reference.empty(1, 60, layout)
    reference.append(data, x, layout)
    return data


def inputs(n: int = 1) -> dict[str, object]:
    torch.manual_seed(0)
    new = {name: torch.randn(1, 2, n, 16) for name in "qkv"}
    arenas = {f"{a}{x}": arena(y, torch.randn(1, 2, 36, 16)) for a in "cd" for x, y in (("k", K), ("v", V))}
    return {**new, **arenas, "pos": torch.arange(36, 36 + n), "other": torch.arange(36, 36 + n)}


def traced(code: str, given: dict[str, object]) -> GraphModule:
    """The graph of a function of these lines, with example values as Dynamo leaves them."""
    scope: dict = {"kvc": kvc, "K": K.key, "V": V.key}
    body = "\n    ".join(code.splitlines())
    exec(f"def f({', '.join(given)}):\n    {body}", scope)
    gm = torch.fx.symbolic_trace(scope["f"])
    with torch.no_grad():
        values = iter(given.values())
        for n in gm.graph.nodes:
            n.meta["example_value"] = next(values) if n.op == "placeholder" else None
            if n.op in ("call_function", "call_method") and "append" not in str(n.target):
                n.meta["example_value"] = torch.empty(1, 2, 1, 16)
    return gm


@pytest.mark.parametrize("name", FUSED)
def test_what_is_fused(name):
    code, count = FUSED[name]
    gm = traced(code, inputs())
    assert fuse_appends(gm.graph) == count
    gm.graph.lint()
    gm.recompile()
    given, plain = inputs(), inputs()
    want = traced(code, inputs())(**plain)
    torch.testing.assert_close(gm(**given), want, atol=0, rtol=0)
    for arena_name in ("ck", "cv", "dk", "dv"):
        assert torch.equal(given[arena_name], plain[arena_name])


def test_only_one_token_and_only_on_a_gpu():
    assert fuse_appends(traced(f"{KEYS}\n{VALUES}\nreturn k", inputs(2)).graph) == 0
    words = f"{KEYS}\n{VALUES}\nreturn k".replace("K,", repr(K.key.replace("w16", "w8")) + ",")
    assert "w8" in words and fuse_appends(traced(words, inputs()).graph) == 0
