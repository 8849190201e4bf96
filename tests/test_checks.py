"""Which attentions of a GPU graph carry an assertion about their mask: those whose kernel does not check it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph

from kvc_compile.layout import Codec, Layout
from kvc_compile.lowering.checks import check_positions
from kvc_compile.passes.caches import Buffer
from kvc_compile.passes.rewrite import _Rewrite, decodes


@pytest.fixture
def graph():
    """Queries, a mask, positions and new keys of a decode step, on a fake GPU."""
    made = Graph()
    with FakeTensorMode():
        shapes = {
            "q": (1, 4, 1, 64),
            "mask": (1, 1, 1, 80),
            "positions": (1,),
            "x": (1, 2, 1, 64),
            "cache": (1, 2, 80, 64),
        }
        for name, shape in shapes.items():
            node = made.placeholder(name)
            node.meta["example_value"] = torch.empty(shape, dtype=torch.float16, device="cuda")
    made.output((node,))
    return made, {n.name: n for n in made.find_nodes(op="placeholder")}


def test_each_attention_on_a_shared_mask_is_judged_by_itself(graph):
    made, n = graph
    work = _Rewrite(made)
    key = Buffer(n["cache"], False, n["cache"], n["positions"], True, n["x"], ())
    with made.inserting_before(next(iter(made.find_nodes(op="output")))):
        work.bounds[n["mask"]] = n["mask"]
        work.check(n["q"], n["mask"], key, checked=True)
        assert not made.find_nodes(op="call_function", target=check_positions)
        work.check(n["q"], n["mask"], key, checked=False)
        work.check(n["q"], n["mask"], key, checked=False)
    assert len(made.find_nodes(op="call_function", target=check_positions)) == 1


def test_which_kernel_it_will_be(graph):
    _, n = graph
    by_block, by_token = Codec("int", 4, (32, 1), True), Codec("int", 4, (1, 64), True)
    keys, values = (Layout(c, 2, 64, "float16", 4, 64, 32, 16) for c in (by_block, by_token))
    assert decodes(n["q"], SimpleNamespace(key=keys, value=values))
    assert not decodes(n["q"], SimpleNamespace(key=keys, value=keys))
