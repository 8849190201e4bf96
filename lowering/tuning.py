"""Fills the tuning database: times the candidates of a problem, within a bounded time, and stores what it has."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

import torch

from kvc_compile.layout import Layout
from kvc_compile.lowering import tuned
from kvc_compile.lowering.candidates import SHARES, Sizes, best, sizes_of
from kvc_compile.lowering.tuned import Problem
from kvc_compile.timings import Entry

log = logging.getLogger("kvc_compile")

SECONDS = 60.0  # for all problems of one graph
COMPILING = 2 / 3  # of a problem's time, at most
LEADERS = 3  # variants that are timed with other waves, too
QUIET = 1.0  # seconds before anything is said
WORKERS = min(8, os.cpu_count() or 1)

Times = dict[tuple[float, ...], float | None]


class Unfit(Exception):
    """A candidate that cannot be used: it needs more than the GPU has, or computes something else."""


class Bench(Protocol):
    """Runs candidates of one problem on memory of its own."""

    def compile(self, c: Sizes) -> None:
        """Called in threads. Raises anything if it cannot be compiled."""

    def time(self, c: Sizes) -> float:
        """Microseconds. Raises Unfit."""


@dataclass(frozen=True)
class Clock:
    """When to stop. `now` is injected for tests."""

    end: float
    now: Callable[[], float] = time.monotonic

    @property
    def left(self) -> float:
        return max(0.0, self.end - self.now())

    def part(self, share: float) -> Clock:
        return Clock(self.now() + self.left * share, self.now)


def measure(
    among: Sequence[Sizes], bench: Bench, clock: Clock, known: Times, tell: Callable[[int, int], None]
) -> tuple[Times, bool]:
    """(the times of the candidates, whether the clock ran out): every variant as the rule would launch it, then the
    fastest of them with other waves. What is known is not timed again. tell: (how many are done, of how many)."""
    variants = among[: len(among) // len(SHARES)]
    times = dict(known)
    todo = [c for c in variants if sizes_of(c) not in times]
    total = len(todo) + LEADERS * (len(SHARES) - 1)
    usable, complete = compiled(todo, bench, clock.part(COMPILING), times, lambda: tell(0, total))
    for done, c in enumerate(usable):
        if not clock.left:
            return times, True
        tell(done, total)
        times[sizes_of(c)] = timed(bench, c)
    rank = sorted(variants, key=lambda c: (times.get(sizes_of(c)) or float("inf"), variants.index(c)))
    leaders = [c for c in rank[:LEADERS] if times.get(sizes_of(c)) is not None]
    rest = [among[variants.index(c) + i * len(variants)] for c in leaders for i in range(1, len(SHARES))]
    for done, c in enumerate(c for c in rest if sizes_of(c) not in times):
        if not clock.left:
            return times, True
        tell(len(usable) + done, total)
        times[sizes_of(c)] = timed(bench, c)
    return times, not complete


def compiled(
    todo: Sequence[Sizes], bench: Bench, clock: Clock, times: Times, tell: Callable[[], None]
) -> tuple[list[Sizes], bool]:
    """(those that compile, in order; whether all were tried), in threads: the compiler lets go of Python's lock. What
    does not compile is noted in `times`."""
    pool = ThreadPoolExecutor(WORKERS, "kvc-tune")
    work = {pool.submit(bench.compile, c): c for c in todo}
    waiting = set(work)
    while waiting and clock.left:
        waiting = wait(waiting, min(clock.left, 0.2), FIRST_COMPLETED).not_done
        tell()
    pool.shutdown(wait=False, cancel_futures=True)
    usable = []
    for future, c in work.items():
        if future in waiting:
            continue
        if (error := future.exception()) is None:
            usable.append(c)
        else:
            log.debug("kvc tuning: %s does not compile: %s", c, error)
            times[sizes_of(c)] = None
    return usable, not waiting


def timed(bench: Bench, c: Sizes) -> float | None:
    try:
        return round(bench.time(c), 3)
    except Unfit as error:
        log.debug("kvc tuning: %s: %s", c, error)
        return None


# ---------------------------------------------------------------- the database


def tune(
    problems: Iterable[Problem],
    device: torch.device,
    make_bench: Callable[[Problem, torch.device], Bench],
    seconds: float = SECONDS,
    finish: bool = False,
    now: Callable[[], float] = time.monotonic,
) -> list[Entry]:
    """Tune those problems that no stored timings are exactly for, within `seconds` for all of them; what is stored for
    each in the end, in order. finish: those whose tuning was cut short, too.

    Another process that tunes on a GPU of this name is waited for, and what it stored is used.
    """
    todo = {p.key(device): p for p in problems}
    end, found = now() + seconds, []
    for i, (key, p) in enumerate(todo.items()):
        clock = Clock(end, now).part(1 / (len(todo) - i))
        entry = tuned.database().find(key)
        if entry is None or (finish and entry.cut_short):
            with tuned.database().alone(key, clock.left):
                tuned.reload(key)
                entry = tuned.database().find(key)
                if clock.left and (entry is None or (finish and entry.cut_short)):
                    entry = filled(p, device, make_bench, clock, entry) or entry
        if entry is not None:
            found.append(entry)
    return found


def filled(
    p: Problem,
    device: torch.device,
    make_bench: Callable[[Problem, torch.device], Bench],
    clock: Clock,
    before: Entry | None,
) -> Entry | None:
    """Measure and store; None if there was no time or memory for anything."""
    among = p.candidates
    progress = Progress(p, clock.now)
    bench: Bench | None = None
    try:
        bench = make_bench(p, device)
        times, cut_short = measure(among, bench, clock, dict(before.timings if before else ()), progress.tell)
    except torch.OutOfMemoryError:
        log.warning("kvc tuning: no memory to tune %s with %s; the usual sizes are used", p.k.key, p.v.key)
        return None
    finally:
        progress.end()
        bench = None
        torch.cuda.empty_cache()  # its memory goes back to the GPU
    if best(list(times.items()), among) is None:
        return None
    order = [s for c in among if (s := sizes_of(c)) in times]
    entry = Entry(p.key(device), tuple((s, times[s]) for s in order), cut_short)
    tuned.save(entry)
    return entry


class Progress:
    """One line on standard error, if it takes long enough to be noticed."""

    def __init__(self, p: Problem, now: Callable[[], float]):
        self.what, self.now, self.start, self.said = words(p), now, now(), False

    def tell(self, done: int, total: int) -> None:
        seconds = self.now() - self.start
        tty = sys.stderr.isatty()
        if seconds < QUIET or (self.said and not tty):
            return
        self.said = True
        line = f"kvc: tuning {self.what}"
        print(f"\r{line}: {done} of {total}, {seconds:.0f} s " if tty else line, end="" if tty else "\n",
              file=sys.stderr, flush=True)  # fmt: skip

    def end(self) -> None:
        if self.said and sys.stderr.isatty():
            print(file=sys.stderr)


def words(p: Problem) -> str:
    return f"attention over {short(p.k)} / {short(p.v)}, {p.batch} x {p.room} tokens"


def short(layout: Layout) -> str:
    c = layout.codec
    block = f" by {c.block[0]}x{c.block[1]}" if c.params else ""
    return f"{layout.dtype if c.kind == 'raw' else f'{c.kind}{c.bits}'}{block}"
