"""Linear layers of a decode step: which are taken, together or apart."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph

from kvc_compile.lowering import products
from kvc_compile.passes.products import fuse_products

assert products  # defines kvc::products


def graph_of(code: str, rows: int = 2, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Graph:
    """The graph of these lines over x [rows, 1, 64], weights a, b, c, d [32, 64], a bias e, and w [24, 64]."""
    scope: dict = {"F": F, "torch": torch}
    names = ("x", *"abcd", "e", "w")
    exec(f"def f({', '.join(names)}):\n    " + "\n    ".join(code.splitlines()), scope)
    gm = torch.fx.symbolic_trace(scope["f"])
    with FakeTensorMode():
        sizes = {"x": (rows, 1, 64), "e": (32,), "w": (24, 64)}
        given = {n: torch.empty(sizes.get(n, (32, 64)), dtype=dtype, device=device) for n in names}

        class Run(torch.fx.Interpreter):
            def run_node(self, n):
                n.meta["example_value"] = super().run_node(n)
                return n.meta["example_value"]

        Run(gm).run(*given.values())
    return gm.graph


def groups(graph: Graph) -> list[int]:
    return [len(n.args[1]) for n in graph.find_nodes(op="call_function", target=torch.ops.kvc.products.default)]


TAKEN = {
    "one": ("return F.linear(x, a)", [1]),
    "same input": ("y = F.linear(x, a)\nreturn y, F.linear(x, b), F.linear(x, c)", [3]),
    "four of an input": ("return [F.linear(x, v) for v in (a, b, c, d)]", [3, 1]),
    "another input": ("return F.linear(x, a), F.linear(x * 2, b)", [1, 1]),
    "input written between": ("y = F.linear(x, a)\nx.mul_(2)\nreturn y, F.linear(x, b)", [1, 1]),
    "weight written between": ("y = F.linear(x, a)\nb.mul_(2)\nreturn y, F.linear(x, b)", [1, 1]),
    "a bias": ("return F.linear(x, a, e)", []),
    "outputs that fill no program": ("return F.linear(x, w)", []),
    "a weight that is computed": ("return F.linear(x, a * 2)", []),
    "one after the other": ("y = F.linear(x, a)\nreturn F.linear(torch.cat([y, y], -1), b)", [1, 1]),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_is_taken(case):
    code, expected = TAKEN[case]
    with torch.no_grad():
        graph = graph_of(code)
        assert fuse_products(graph) == sum(expected)
    graph.lint()
    assert groups(graph) == expected


@pytest.mark.parametrize("what", ["rows", "dtype", "device", "gradients", "autocast"])
def test_what_is_not_taken(what, monkeypatch):
    given = {"rows": {"rows": 17}, "dtype": {"dtype": torch.float32}, "device": {"device": "cpu"}}.get(what, {})
    graph = graph_of("return F.linear(x, a)", **given)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: what == "autocast")  # of a GPU, if there is one
    with torch.set_grad_enabled(what == "gradients"):
        assert fuse_products(graph) == 0


def test_the_results_are_those_of_the_layers():
    x, a, b = torch.randn(2, 1, 64), torch.randn(32, 64), torch.randn(16, 64)
    for out, w in zip(torch.ops.kvc.products(x, [a, b]), (a, b), strict=True):
        assert torch.equal(out, F.linear(x, w))
