"""Compiles ahead, into Inductor's and Triton's caches on disk, so that timed processes find their code there.

A model is compiled for fake tensors: no memory of the device, so several processes do it side by side. What fails here
is compiled later, in the process that needs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kvc_compile.bench import models
from kvc_compile.bench.caches import Compressed, HfStatic, cache_of
from kvc_compile.bench.decode import SPARE, WARM_STEPS
from kvc_compile.bench.plan import QUANTIZED, Job, Point, Settings
from kvc_compile.config import attention_shape
from kvc_compile.layout import Layout


class Compiled(Exception):
    """Raised in place of a first call: it would need the tensors."""


def split(job: Job) -> list[Job]:
    """The compiles of a job, each as a job of its own."""
    if job.cache == QUANTIZED:
        return []
    if job.dtype:
        return [job]
    decode = [p for p in job.points if p.part in ("model", "growth")]
    if job.spec is None:
        found = decode  # a graph for each size
    else:
        found = [p for p in (next((p for p in decode if p.batch == 1), None), largest(decode)) if p]
        found += [p for p in job.points if p.part == "prefill"][:1]
    return [Job(job.name, job.settings, job.cache, job.spec, (p,)) for p in dict.fromkeys(found)]


def largest(decode: list[Point]) -> Point | None:
    """One with a batch, if there is one: a batch of 1 has a graph of its own."""
    return next((p for p in decode if p.batch > 1), None)


def model(job: Job) -> None:
    """Compile the graphs of the job's points, and on a GPU the kernels of its layouts."""
    s = job.settings
    config = models.config_of(s.model, s.device)
    cache = cache_of(job.cache, job.spec, config, s.device, s.mode, s.linear)
    for point in job.points:
        if point.part != "prefill" or cache.compiled_prefill:
            trace(cache, config, point, s, point.context + WARM_STEPS + s.steps + SPARE)
            torch._dynamo.reset()
    if isinstance(cache, Compressed) and s.device.startswith("cuda"):
        for k, v in sorted(set(cache.pairs), key=str):
            kernels(k, v, attention_shape(config).heads)


def trace(cache: HfStatic, config: Any, point: Point, s: Settings, room: int) -> None:
    """Compile the graph of a point and run nothing."""
    device = s.device

    def stop(gm: Any, inputs: list[Any]) -> Any:
        cache.backend(gm, inputs)
        raise Compiled

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), cache.tracing():
        net = models.build(config, device, s.weights)
        like = torch.empty(0, dtype=models.dtype_of(device), device=device)
        prompt = point.part == "prefill"
        past = cache.empty(room) if prompt else cache.filled(like, point.batch, point.context, room)
        ids = torch.zeros(point.batch, point.context if prompt else 1, dtype=torch.int64, device=device)
        if prompt:
            torch._dynamo.maybe_mark_dynamic(ids, 1)
        elif point.batch > 1 and not cache.own_graph:
            torch._dynamo.maybe_mark_dynamic(ids, 0)
        try:
            torch.compile(net, backend=stop, dynamic=False if cache.own_graph else None)(
                input_ids=ids, past_key_values=past, logits_to_keep=1
            )
        except Exception as error:
            if not caused_by(error, Compiled):
                raise


def caused_by(error: BaseException | None, kind: type) -> bool:
    while error is not None:
        if isinstance(error, kind) or isinstance(getattr(error, "inner_exception", None), kind):
            return True
        error = error.__cause__ or error.__context__
    return False


def kernels(k: Layout, v: Layout, query_heads: int) -> None:
    """The Triton kernels of a decode step over a cache of these layouts, as a model with a mask calls them."""
    from kvc_compile.kernels import reference
    from kvc_compile.lowering import launch

    tokens = 2048
    for batch in (1, 2):
        dtype = getattr(torch, k.dtype)
        arenas = reference.empty(batch, tokens, k, "cuda"), reference.empty(batch, tokens, v, "cuda")
        x = torch.randn(2, batch, k.heads, 1, k.channels, dtype=dtype, device="cuda")
        position = torch.zeros(1, dtype=torch.int64, device="cuda")
        q = torch.randn(batch, query_heads, 1, k.channels, dtype=dtype, device="cuda")
        mask = torch.zeros(batch, 1, 1, tokens, dtype=torch.bool, device="cuda")
        mask[..., 0] = True
        scale = k.channels**-0.5
        launch.attend(q, *arenas, x[0], x[1], mask, position, False, scale, k, v)
        launch.append(arenas[0], x[0], k, position)
        launch.append(arenas[1], x[1], v, position)
    torch.cuda.synchronize()
