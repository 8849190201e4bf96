"""Two ways to time. A *call* is timed on the device alone; a decode *step* as a generation runs, host included."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch

REPLAYS, LEAST_REPLAYS = 11, 3
ENOUGH = 0.25  # seconds of replays
SHORTEST = 8  # calls that a graph holds at least, so that its launch does not count


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def call_seconds(calls: Sequence[Callable[[], object]], device: str) -> float:
    """The median time of one of `calls`, which take turns: over different memory they defeat the caches. On a GPU all
    are in one CUDA graph; on a CPU it is wall-clock time."""
    if not device.startswith("cuda"):
        times = []
        for i in range(5 * len(calls) + 2):
            began = time.perf_counter()
            calls[i % len(calls)]()
            times.append(time.perf_counter() - began)
        return statistics.median(times[2:])
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    count = max(1, SHORTEST // len(calls)) * len(calls)
    with torch.cuda.graph(graph):
        for i in range(count):
            calls[i % len(calls)]()

    def replay() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    first = [replay() for _ in range(2)][1]
    replays = max(LEAST_REPLAYS, min(REPLAYS, int(ENOUGH / first)))
    return statistics.median(replay() for _ in range(replays)) / count


def step_seconds(step: Callable[[], object], count: int, device: str) -> float:
    """The median time of a step when the host need not wait for one to ask for the next."""
    if not device.startswith("cuda"):
        marks = [time.perf_counter()]
        for _ in range(count):
            step()
            marks.append(time.perf_counter())
        return statistics.median(b - a for a, b in itertools.pairwise(marks))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for e in events[1:]:
        step()
        e.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events))
