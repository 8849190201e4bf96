"""What would become of every attention of a model under a spec: captured and planned, nothing changed.

The model's forward runs as it is, under a backend of our own that only looks. What Dynamo knows of the model stays
untouched: it keeps its compiled code by code object, so what is explained is a copy of the forward with its own.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

from kvc_compile.analyse import analyse
from kvc_compile.dump import Trail
from kvc_compile.passes.fuse import fuse_appends
from kvc_compile.passes.fx import duplicate
from kvc_compile.passes.rewrite import rewrite
from kvc_compile.passes.verify import verify
from kvc_compile.plan import WORD
from kvc_compile.report import Compile, Report, empty, of, places_of
from kvc_compile.request import OptionError, Request

PROMPT = 5  # tokens of the made-up prompt
ROOM = 32  # tokens of the made-up cache


def explain(
    model: torch.nn.Module, spec: Any, *example_inputs: Any, device: str | None = None, **kwargs: Any
) -> Report:
    """The report of compiling `model` with `spec` and calling it with these inputs; nothing is changed or compressed.

    spec: anything the backend takes as options; with "dump" the graphs are dumped too. Without inputs, a Hugging Face
    model is run on a made-up prompt with a static cache and one decoding step. device: "cpu" or "cuda" to plan for
    that kind of device, wherever the model is; nothing runs on it. Buffers of the model that the call
    writes to are put back. Raises SpecError for a spec that does not fit, TypeError where inputs are needed.
    """
    model = getattr(model, "_orig_mod", model)
    request = replace(Request.of(spec), device=device)
    if device not in (None, *WORD):
        raise OptionError(f"device {device!r}: allowed are {', '.join(WORD)}")
    look = Look(request)
    calls = torch.compile(fresh(model), backend=look, dynamic=False)
    saved = {name: b.clone() for name, b in model.named_buffers()}
    try:
        with torch.no_grad():
            if example_inputs or kwargs:
                calls(*example_inputs, **kwargs)
            else:
                generate(model, calls)
    finally:
        with torch.no_grad():
            for name, b in model.named_buffers():
                if name in saved and not torch.equal(b, saved[name]):
                    b.copy_(saved[name])
    if look.failed is not None:
        raise look.failed
    if not look.compiles:
        return empty("nothing was captured: is compilation disabled (TORCHDYNAMO_DISABLE)?")
    return of(look.compiles)


class Look:
    """A backend that plans each graph, remembers the plan, and runs the graph as it is."""

    def __init__(self, request: Request):
        self.request = request
        self.compiles: list[Compile] = []
        self.failed: Exception | None = None

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            self.plan(duplicate(gm), list(example_inputs))
        except Exception as e:  # Dynamo would wrap it: `explain` raises it as it is
            self.failed = self.failed or e
        return gm.forward

    def plan(self, gm: GraphModule, example_inputs: list[Any]) -> None:
        matches, plan = analyse(gm, example_inputs, self.request)
        self.compiles.append(Compile(self.request, plan, places_of(gm, plan)))
        trail = Trail(self.request, gm, plan, example_inputs)
        if trail.active:
            rewrite(gm, matches, plan)
            fuse_appends(gm.graph)
            verify(gm, plan)
            trail.rewritten(gm)


def fresh(model: torch.nn.Module) -> Callable[..., Any]:
    """The model's forward with a code object of its own."""
    forward = model.forward
    function = getattr(forward, "__func__", None)
    if not isinstance(function, types.FunctionType):  # replaced on the instance, by hooks of accelerate for example
        return lambda *args, **kwargs: forward(*args, **kwargs)
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update({k: v for k, v in function.__dict__.items() if k != "__wrapped__"})
    return types.MethodType(copy, model)


def generate(model: torch.nn.Module, calls: Callable[..., Any]) -> None:
    """A prefill and one decoding step of a Hugging Face model."""
    config = getattr(model, "config", None)
    takes = inspect.signature(model.forward).parameters
    if config is None or "input_ids" not in takes or "past_key_values" not in takes:
        raise TypeError(f"explain needs example inputs for {type(model).__name__}, which is no Hugging Face decoder")
    from transformers import StaticCache

    device = next(model.parameters()).device
    text = config.get_text_config(decoder=True)
    ids = torch.arange(PROMPT, device=device)[None] % text.vocab_size
    cache = StaticCache(config=config, max_cache_len=ROOM)
    calls(input_ids=ids, past_key_values=cache, use_cache=True)
    calls(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
