"""Which attentions of a GPU graph carry an assertion, and what it says."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph

from kvc_compile.lowering.checks import check_positions
from kvc_compile.passes.caches import Buffer
from kvc_compile.passes.rewrite import _Rewrite


@pytest.fixture
def graph():
    """Queries, a mask, positions and new keys of some tokens, on a fake GPU."""
    made = Graph()
    with FakeTensorMode():
        shapes = {
            "q": (1, 4, 3, 64),
            "mask": (1, 1, 3, 80),
            "positions": (3,),
            "x": (1, 2, 3, 64),
            "cache": (1, 2, 80, 64),
        }
        for name, shape in shapes.items():
            node = made.placeholder(name)
            node.meta["example_value"] = torch.empty(shape, dtype=torch.float16, device="cuda")
    made.output((node,))
    return made, {n.name: n for n in made.find_nodes(op="placeholder")}


def test_positions_are_checked_once_for_all_attentions(graph):
    made, n = graph
    work = _Rewrite(made)
    for consecutive in (False, True):
        key = Buffer(n["cache"], False, n["cache"], n["positions"], consecutive, n["x"], ())
        with made.inserting_before(next(iter(made.find_nodes(op="output")))):
            work.check(n["q"], key)
            work.check(n["q"], key)
        found = made.find_nodes(op="call_function", target=check_positions)
        assert len(found) == 1, "consecutive ones need none"


def test_positions_that_are_not_consecutive():
    check_positions(torch.arange(3, 9))
    check_positions(torch.tensor([5]))
    with pytest.raises(RuntimeError, match="consecutive"):
        check_positions(torch.tensor([1, 2, 4]))
