"""The front door: `torch.compile(model, backend="kvc", options=SPEC)`. Reads like the pipeline, nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from kvc_compile.analyse import analyse
from kvc_compile.beside import Beside
from kvc_compile.bound import Bound, owner_of
from kvc_compile.doors import install
from kvc_compile.dump import Trail
from kvc_compile.passes.fuse import fuse_appends
from kvc_compile.passes.fx import duplicate, value
from kvc_compile.passes.products import fuse_products
from kvc_compile.passes.rewrite import rewrite
from kvc_compile.passes.verify import verify
from kvc_compile.report import Compile, places_of, remember, say_read_back, unselected, warn_declined
from kvc_compile.request import Request
from kvc_compile.tune import tune


def kvc(gm: GraphModule, example_inputs: list[Any], *, options: Any = None, mode: str | None = None, **extra: Any):
    """Compile a Dynamo graph with its KV cache compressed as `options` say (see `Request`)."""
    request = Request.of(options, mode)
    return compile_graph(gm, example_inputs, request)


def compile_graph(gm: GraphModule, example_inputs: list[Any], request: Request):
    """Recognise, plan, rewrite, tune, lower. `gm` itself stays as it is: Dynamo reads it again afterwards."""
    gm = duplicate(gm)
    matches, plan = analyse(gm, example_inputs, request)
    beside = Beside(gm, plan) if request.verify and plan.planned else None
    trail = Trail(request, gm, plan, example_inputs)
    compiled = remember(Compile(request, plan, places_of(gm, plan), {owner_of(example_inputs)}))
    warn_declined(plan, request)
    unselected(plan, request)
    say_read_back(plan)
    rewritten = rewrite(gm, matches, plan)
    fuse_appends(gm.graph)
    verify(gm, plan)
    if request.linear and plan.entries:
        fuse_products(gm.graph)
        gm.recompile()
    trail.rewritten(gm)
    if beside:
        beside.compare_with(gm, rewritten)
        compiled.differences = beside.found
    changed = {i.index for i in rewritten.inputs} | {n for n, _ in rewritten.dense}
    inputs = [
        value(p) if n in changed else x
        for n, (p, x) in enumerate(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    ]
    tune(gm, request)
    lowered = lower(gm, [settled(x) for x in inputs], request, births=rewritten.births or rewritten.evicts)
    return Bound(lowered, rewritten, compiled.called, beside) if plan.entries or rewritten.dense else lowered


def settled(x: Any) -> Any:
    """A size under the symbol that stands for it by now. Inductor binds the symbol that an input was given first; that
    another one has taken its place it learns from the shapes of caches, and an arena's has no such size."""
    if isinstance(x, torch.SymInt) and x.node.expr.is_Symbol and x.node.expr != x.node._expr:
        return x.node.shape_env.create_symintnode(x.node.expr, hint=x.node.hint)
    return x


def lower(gm: GraphModule, inputs: list[Any], request: Request, births: bool):
    """Hand the rewritten graph to Inductor. A graph that gives birth to caches is not captured in a CUDA graph: its
    outputs would live in the graph's memory pool, which the next replay overwrites. Nor is one that evicts."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = dict(list_mode_options(request.mode)) if request.mode != "default" else {}
    if births:
        patches["triton.cudagraphs"] = False
    if patches.get("triton.cudagraphs"):  # torch 2.11 fails to record a partitioned graph again for a second cache
        patches["graph_partition"] = False
    return compile_fx(gm, inputs, config_patches=patches)


install()
