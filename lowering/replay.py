"""How long attention takes on this GPU: CUDA graph replays over scratch caches, never over a model's own."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from triton.errors import TritonError

from kvc_compile.kernels.reference import empty
from kvc_compile.layout import Layout
from kvc_compile.lowering import launch
from kvc_compile.lowering.candidates import Sizes
from kvc_compile.lowering.synthetic import fill
from kvc_compile.lowering.tuned import Problem
from kvc_compile.lowering.tuning import Unfit

MOST_BYTES = 4 << 30  # of scratch caches
MOST_OF_FREE = 4  # and a part of what is free: one in so many
MOST_CACHES = 40
LEAST_TOKENS = 2048
SHORT, LONG = 11, 5  # replays, and those of calls of more than `SLOW` microseconds
SLOW = 2000
WARM = 0.03  # seconds of replays before: an idle GPU is a slow one
SAME = 0.03  # relative difference of two results in the worst format, rounded differently


class GraphBench:
    """A problem's attention over copies of a random cache, more of them than the L2 cache holds.

    A problem that is too large for the memory that may be used is measured with fewer tokens, then fewer sequences.
    Raises torch.OutOfMemoryError if there is none for that either.
    """

    def __init__(self, p: Problem, device: torch.device):
        with torch.no_grad(), torch.cuda.device(device):
            self.p = p
            free, _ = torch.cuda.mem_get_info(device)
            budget = min(free // MOST_OF_FREE, MOST_BYTES)
            batch, tokens, nbytes = shrunk(p, budget)
            l2 = torch.cuda.get_device_properties(device).L2_cache_size
            copies = min(MOST_CACHES, max(2, -(-4 * l2 // nbytes)), max(2, budget // nbytes))
            dice = torch.Generator(device).manual_seed(0)  # the caller's random numbers stay as they are
            pair = [scratch(batch, tokens, layout, device, dice) for layout in (p.k, p.v)]
            self.caches = [tuple(pair), *(tuple(x.clone() for x in pair) for _ in range(copies - 1))]
            sizes = ((p.k.heads * p.groups, p.k.channels), (p.k.heads, p.k.channels), (p.v.heads, p.v.channels))
            self.new = [torch.randn(batch, h, p.n, d, dtype=p.dtype, device=device, generator=dice) for h, d in sizes]
            self.device = device
            self.expected: Tensor | None = None

    def call(self, c: Sizes, i: int = 0, dry: bool = False) -> Tensor:
        p, (q, k_new, v_new), (k, v) = self.p, self.new, self.caches[i]
        scale = p.k.channels**-0.5
        return launch.attend(q, k, v, k_new, v_new, None, None, True, scale, p.k, p.v, tiles=c, dry=dry)

    def compile(self, c: Sizes) -> None:
        with torch.no_grad(), torch.cuda.device(self.device):
            self.call(c, dry=True)

    def time(self, c: Sizes) -> float:
        with torch.no_grad(), torch.cuda.device(self.device):
            try:
                out = self.call(c).float()
            except TritonError as error:
                raise Unfit(str(error)) from None
            self.expected = out if self.expected is None else self.expected
            if not (out - self.expected).norm() <= SAME * self.expected.norm():
                raise Unfit("its result differs")
            return self.replayed(c)

    def replayed(self, c: Sizes) -> float:
        """The median time of one call inside a graph of several on all caches."""
        count = max(1, 8 // len(self.caches)) * len(self.caches)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may still compile
            for i in range(count):
                self.call(c, i % len(self.caches))
        warm = time.monotonic() + WARM
        while time.monotonic() < warm:
            graph.replay()
            torch.cuda.synchronize()
        times: list[float] = []
        while len(times) < (SHORT if not times or times[0] < SLOW else LONG):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / count)
        return sorted(times)[len(times) // 2]


def shrunk(p: Problem, budget: int) -> tuple[int, int, int]:
    """(batch, tokens, bytes) of a cache pair like the problem's, two of which fit the budget if any do."""
    batch, tokens = p.batch, p.room - p.n

    def nbytes() -> int:
        return batch * (p.k.row_bytes(tokens) + p.v.row_bytes(tokens))

    while 2 * nbytes() > budget and tokens >= 2 * LEAST_TOKENS:
        tokens //= 2
    while 2 * nbytes() > budget and batch > 1:
        batch //= 2
    if 2 * nbytes() > budget:
        raise torch.OutOfMemoryError(f"{budget} bytes are too few")
    return batch, tokens, nbytes()


def scratch(batch: int, tokens: int, layout: Layout, device: torch.device, dice: torch.Generator) -> Tensor:
    """An arena that holds `tokens` tokens: random codes, and scales that differ little, all of them finite."""
    data = empty(batch, tokens, layout, device)
    fill(data, layout, tokens, dice)
    return data
