"""Decode steps of a whole model at one context and batch, and how far memory goes."""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from typing import Any

import torch

from kvc_compile.bench import models, predict
from kvc_compile.bench.caches import HfQuantized, HfStatic
from kvc_compile.bench.clock import step_seconds, synchronize
from kvc_compile.bench.plan import Point, Settings
from kvc_compile.bench.rows import Ceilings, Step

WARM_STEPS = 3  # compile, record, replay
SPARE = 16  # tokens of room that are left when all is measured
SHRINK = 0.02  # of what was tried, each time it does not fit
TRIES = 8
RESERVE = 256 << 20  # bytes that a step takes besides weights and cache, at least


class Bench:
    """A model on a device and one way to hold its cache, compiled once for all that is measured of it."""

    def __init__(self, model: Any, cache: HfStatic, ceilings: Ceilings, settings: Settings):
        self.model, self.cache, self.ceilings, self.settings = model, cache, ceilings, settings
        self.device = settings.device
        self.like = torch.empty(0, dtype=next(model.parameters()).dtype, device=self.device)
        self.weights = predict.weights_read(model)
        self.held = sum(models.nbytes(p) for p in model.parameters())
        self.step = cache.compile(model)

    def measure(self, point: Point) -> Step:
        """Never raises for what may happen at one point: the row says it."""
        began = time.perf_counter()
        empty = Step(point.part, self.cache.name, point.batch, point.context)
        if self.settings.until is not None and time.time() > self.settings.until:
            return replace(empty, error="left out: no time was left")
        try:
            with self.cache.tracing():
                row = self.at(point)
        except torch.cuda.OutOfMemoryError as error:
            row = replace(empty, error=f"does not fit: {first_line(error)}")
        except Exception as error:  # one point that fails must not lose the others
            row = replace(empty, error=f"{type(error).__name__}: {first_line(error)}")
        self.free()
        return replace(row, setup_s=round(time.perf_counter() - began, 1))

    def at(self, point: Point) -> Step:
        if point.part in ("largest batch", "longest context"):
            return self.most(point)
        if point.part == "prefill":
            from kvc_compile.bench.prefill import prefill

            return prefill(self, point)
        return self.decode(point)

    def free(self) -> None:
        """What a point took, given back before the next: a graph for each size goes with it."""
        if self.cache.own_graph:
            torch._dynamo.reset()
            if self.device.startswith("cuda"):
                from torch._inductor.cudagraph_trees import reset_cudagraph_trees

                reset_cudagraph_trees()  # with the memory that its graphs have for themselves
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def room(self, tokens: int) -> int:
        return tokens + WARM_STEPS + self.settings.steps + SPARE

    def available(self) -> int:
        """Bytes that caches may take."""
        if self.settings.memory is not None:
            return self.settings.memory - self.held
        if self.device.startswith("cuda"):
            return torch.cuda.mem_get_info()[0]
        raise ValueError("on a CPU --memory says how much may be used")

    def decode(self, point: Point) -> Step:
        """The time of a step at this point, and what its bytes predict."""
        room, cuda = self.room(point.context), self.device.startswith("cuda")
        need, quantized = self.cache.room_bytes(point.batch, room), isinstance(self.cache, HfQuantized)
        row = self.predicted(point, room)
        if (cuda or self.settings.memory is not None) and need > self.available():
            return replace(row, cache_bytes=need, error="does not fit: its cache alone is larger than the free memory")
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        past = self.cache.filled(self.like, point.batch, point.context, room)
        token = torch.zeros(point.batch, 1, dtype=torch.int64, device=self.device)
        if quantized:
            row = replace(row, read_bytes=None, predicted_s=None)
            ids = torch.randint(0, self.model.config.vocab_size, (point.batch, point.context), device=self.device)
            with torch.no_grad():
                self.model(input_ids=ids, past_key_values=past, logits_to_keep=1)
        elif point.batch > 1 and not self.cache.own_graph:
            torch._dynamo.maybe_mark_dynamic(token, 0)
        logits = None

        def decode() -> None:
            nonlocal token, logits
            torch.compiler.cudagraph_mark_step_begin()
            logits = self.step(input_ids=token, past_key_values=past, logits_to_keep=1).logits
            token = logits[:, -1:].argmax(-1).clone()

        before, compiled = skips(), misses()
        with torch.no_grad():
            for _ in range(WARM_STEPS):
                decode()
            synchronize(self.device)
            seconds = step_seconds(decode, self.settings.steps, self.device)
        assert logits is not None
        return replace(
            row,
            seconds=seconds,
            tokens_per_s=point.batch / seconds,
            over_predicted=seconds / row.predicted_s if row.predicted_s else None,
            cache_bytes=None if quantized else need,
            peak_bytes=torch.cuda.max_memory_allocated() if cuda else None,
            cudagraph_skips=skips() - before if cuda else None,
            compiles=misses() - compiled,
            finite=bool(torch.isfinite(logits).all()),
            note=self.cache.note,
        )

    def predicted(self, point: Point, room: int) -> Step:
        nbytes = self.weights + self.cache.read_bytes(point.batch, point.context, room)
        row = Step(point.part, self.cache.name, point.batch, point.context)
        return replace(row, read_bytes=nbytes, predicted_s=nbytes / self.ceilings.read)

    def most(self, point: Point) -> Step:
        """The largest batch at a context, or the longest context at a batch, with which a step runs: from what the
        bytes say, less a little each time it does not fit."""
        n, said = self.fits(point), ""
        for _ in range(TRIES):
            if n < 1:
                break
            tried = sized(point, n)
            try:
                row = self.decode(tried)
            except torch.cuda.OutOfMemoryError as error:
                said = first_line(error)
            else:
                if not row.error:
                    return replace(row, note=f"{n + step_down(n)} did not fit" if said else "the bytes allow no more")
                said = row.error
            n -= step_down(n)
            self.free()
        raise MemoryError(f"nothing from {self.fits(point)} down to {max(n, 0)} fits: {said or 'no room for one'}")

    def fits(self, point: Point) -> int:
        """The largest number whose cache fits by its bytes."""
        free, n = self.available() - RESERVE, 0
        if self.settings.memory is not None:
            free = self.available()
        bit = 1 << 40
        while bit:
            p = sized(point, n + bit)
            if self.cache.room_bytes(p.batch, self.room(p.context)) <= free:
                n += bit
            bit >>= 1
        return n


def sized(point: Point, n: int) -> Point:
    """The point with what it looks for set to n."""
    return replace(point, batch=n) if point.part == "largest batch" else replace(point, context=n)


def step_down(n: int) -> int:
    return max(1, int(n * SHRINK))


def skips() -> int:
    from torch._dynamo.utils import counters

    return counters["inductor"]["cudagraph_skips"]


def misses() -> int:
    """Graphs that Inductor compiled and did not find in its cache."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["fxgraph_cache_miss"]


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return (text.splitlines() or [type(error).__name__])[0][:400]
