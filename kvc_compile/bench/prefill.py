"""The time to the first token of a prompt, all of it in one call as `generate` makes it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from kvc_compile.bench import predict
from kvc_compile.bench.clock import synchronize
from kvc_compile.bench.plan import Point
from kvc_compile.bench.rows import Step

if TYPE_CHECKING:
    from kvc_compile.bench.decode import Bench

RUNS = 3  # timed, after one that compiles


def prefill(bench: Bench, point: Point) -> Step:
    """Wall-clock time from the call to a token on the host, at its best of some; a new cache each time."""
    compiled = bench.cache.compiled_prefill
    call = bench.step if compiled else bench.model
    ids = torch.randint(0, bench.model.config.vocab_size, (point.batch, point.context), device=bench.device)
    torch._dynamo.maybe_mark_dynamic(ids, 1)
    cuda = bench.device.startswith("cuda")
    times = []
    for n in range(RUNS + 1):
        past: Any = bench.cache.empty(bench.room(point.context))
        if cuda and n == 1:
            torch.cuda.reset_peak_memory_stats()
        synchronize(bench.device)
        began = time.perf_counter()
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            logits = call(input_ids=ids, past_key_values=past, logits_to_keep=1).logits
            finite = bool(torch.isfinite(logits).all())
            int(logits[0, -1].argmax())
        times.append(time.perf_counter() - began)
        del past, logits
    seconds = min(times[1:])
    predicted = predict.prefill_flop(bench.model, point.context) * point.batch / bench.ceilings.multiply
    return replace(
        Step(point.part, bench.cache.name, point.batch, point.context),
        seconds=seconds,
        tokens_per_s=point.batch * point.context / seconds,
        predicted_s=predicted,
        over_predicted=seconds / predicted,
        peak_bytes=torch.cuda.max_memory_allocated() if cuda else None,
        finite=finite,
        note="" if compiled else "not compiled, as generate runs it",
    )
