"""Which attentions a rewritten graph will run on a GPU, and tuning them before it is lowered."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch.fx import GraphModule

from kvc_compile import timings
from kvc_compile.layout import Layout
from kvc_compile.passes.fx import hint, value
from kvc_compile.request import Request

log = logging.getLogger("kvc_compile")


def tune(gm: GraphModule, request: Request) -> None:
    """Make sure that the attentions of a graph that ran through the rewrite have timings, if the request says so. What
    goes wrong is a warning: without timings all runs as well, if slower."""
    found = problems_of(gm)
    if not found:
        return
    from kvc_compile.lowering import tuned

    if (file := timings.beside(request.spec)) is not None:
        tuned.use(file)
    if not request.tune or os.environ.get("KVC_TUNE") == "0" or torch.cuda.is_current_stream_capturing():
        return
    from kvc_compile.lowering import replay, tuning

    for device in dict.fromkeys(d for _, d in found):
        try:
            tuning.tune([p for p, d in found if d == device], device, replay.GraphBench)
        except (RuntimeError, ValueError) as error:
            log.warning("kvc tuning failed, the usual sizes are used: %s", error)


def problems_of(gm: GraphModule) -> list[tuple[Any, torch.device]]:
    """Every attention of so many new tokens on a GPU: (`lowering.tuned.Problem`, device), in order, each once.

    A size that varies is taken as it is now. Nothing is tuned where the new tokens vary in number, or for a cache that
    is born in this graph: that is a prompt.
    """
    found: dict[tuple[Any, torch.device], None] = {}
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.kvc.attend.default):
        q, v_data = value(node.args[0]), value(node.args[2])
        if not q.is_cuda or v_data is None:
            continue
        heads, n = q.shape[1:3]
        batch, row_bytes = hint(q.shape[0]), hint(v_data.shape[1])
        if not isinstance(n, int) or batch is None or row_bytes is None:
            continue
        from kvc_compile.lowering.tuned import Problem  # needs Triton

        k, v = (Layout.parse(key) for key in node.args[9:11])
        p = Problem(k, v, heads // k.heads, n, q.dtype, batch, v.room_of(row_bytes) + n)
        found[p, q.device] = None
    return list(found)
