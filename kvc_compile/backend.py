"""The front door: `torch.compile(model, backend="kvc", options=SPEC)`. Reads like the pipeline, nothing else."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.fx import GraphModule

from kvc_compile.bound import Bound
from kvc_compile.doors import install
from kvc_compile.dump import Trail
from kvc_compile.handle import CacheHandle
from kvc_compile.layout import Layout
from kvc_compile.passes.fx import duplicate, value
from kvc_compile.passes.recognise import Match, legal, recognise
from kvc_compile.passes.rewrite import rewrite
from kvc_compile.passes.verify import verify
from kvc_compile.plan import make_plan
from kvc_compile.report import Compile, remember, warn_declined
from kvc_compile.request import Request


def kvc(gm: GraphModule, example_inputs: list[Any], *, options: Any = None, mode: str | None = None, **extra: Any):
    """Compile a Dynamo graph with its KV cache compressed as `options` say (see `Request`)."""
    request = Request.of(options, mode)
    return compile_graph(gm, example_inputs, request)


def compile_graph(gm: GraphModule, example_inputs: list[Any], request: Request):
    """Recognise, plan, rewrite, lower. `gm` itself stays as it is: Dynamo reads it again afterwards."""
    gm = duplicate(gm)
    found = legal(gm, recognise(gm), example_inputs)
    matches = [m for m in found if isinstance(m, Match)]
    device = "cuda" if any(isinstance(x, torch.Tensor) and x.is_cuda for x in example_inputs) else "cpu"
    existing = {c: Layout.parse(k) for m in matches for c, k in handles(m).items()}
    plan = make_plan([m.site if isinstance(m, Match) else m for m in found], request.spec, device, existing)
    trail = Trail(request, gm, plan)
    compiled = remember(Compile(request, plan))
    warn_declined(plan, request)
    rewritten = rewrite(gm, matches, plan)
    verify(gm, plan)
    trail.rewritten(gm)
    inputs = [value(p) if any(i.index == n for i in rewritten.inputs) else x
              for n, (p, x) in enumerate(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))]
    lowered = lower(gm, inputs, request, births=rewritten.births)
    return Bound(lowered, rewritten, compiled.called) if matches else lowered


def handles(m: Match) -> dict[str, str]:
    """Layouts of the buffers of a match that are compressed already."""
    out = {}
    for c, record in ((m.key, m.site.key), (m.value, m.site.value)):
        v = value(getattr(c, "past", None) or c.node)
        if isinstance(v, CacheHandle):
            out[record.buffer] = v.layout_key
    return out


def lower(gm: GraphModule, inputs: list[Any], request: Request, births: bool):
    """Hand the rewritten graph to Inductor. A graph that gives birth to caches is not captured in a CUDA graph: its
    outputs would live in the graph's memory pool, which the next replay overwrites."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = dict(list_mode_options(request.mode)) if request.mode != "default" else {}
    if births:
        patches["triton.cudagraphs"] = False
    with contextlib.nullcontext():
        return compile_fx(gm, inputs, config_patches=patches)


install()
