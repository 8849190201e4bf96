"""Recognise and plan, without touching the graph: what compiling and explaining have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from kvc_compile.handle import CacheHandle, held_elsewhere
from kvc_compile.layout import Layout
from kvc_compile.passes.caches import HELD_ELSEWHERE
from kvc_compile.passes.fx import value
from kvc_compile.passes.recognise import Match, recognise, without_gradients
from kvc_compile.plan import Plan, make_plan
from kvc_compile.request import Request


def analyse(gm: GraphModule, example_inputs: list[Any], request: Request) -> tuple[list[Match], Plan]:
    """The attentions of a Dynamo graph that can be compressed, and the plan for all of them. Raises SpecError."""
    for node, x in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        if isinstance(x, torch.Tensor) and held_elsewhere(x):
            node.meta[HELD_ELSEWHERE] = True
    found = without_gradients(recognise(gm), example_inputs)
    matches = [m for m in found if isinstance(m, Match)]
    here = "cuda" if any(isinstance(x, torch.Tensor) and x.is_cuda for x in example_inputs) else "cpu"
    existing = {c: Layout.parse(k) for m in matches for c, k in handles(m).items()}
    return matches, make_plan(
        [m.site if isinstance(m, Match) else m for m in found], request.spec, request.device or here, existing
    )


def handles(m: Match) -> dict[str, str]:
    """Layouts of the buffers of a match that are compressed already."""
    out = {}
    for c, record in ((m.key, m.site.key), (m.value, m.site.value)):
        v = value(getattr(c, "past", None) or c.node)
        if isinstance(v, CacheHandle):
            out[record.buffer] = v.layout_key
    return out
