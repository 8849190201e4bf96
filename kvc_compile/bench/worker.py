"""One process of a run: `python -P -m kvc_compile.bench.worker TASK.json ROWS`.

It imports what it needs, waits for a line on its standard input (so that the next process can start while this one has
the device), does the task and appends its rows to the file ROWS, a JSON object in each line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvc_compile.bench.plan import Job
from kvc_compile.bench.rows import Failure, to_json


def rows(job: Job) -> Iterator[Any]:
    """All that a job measures; never raises."""
    try:
        yield from (attention_rows if job.dtype else model_rows)(job)
    except Exception as error:  # what it has measured is kept
        yield Failure(job.name, f"{type(error).__name__}: {error}"[:2000])


def attention_rows(job: Job) -> Iterator[Any]:
    import torch

    from kvc_compile.bench import attention, ceilings

    found = ceilings.measure(job.settings.device, getattr(torch, job.dtype))
    yield found
    yield from attention.calls(job.settings, job.dtype, found)


def model_rows(job: Job) -> Iterator[Any]:
    import torch

    from kvc_compile.bench import ceilings, models
    from kvc_compile.bench.caches import cache_of
    from kvc_compile.bench.decode import Bench

    s = job.settings
    torch.manual_seed(0)
    config = models.config_of(s.model, s.device)
    found = ceilings.measure(s.device, models.dtype_of(s.device))
    yield found
    bench = Bench(
        models.build(config, s.device, s.weights),
        cache_of(job.cache, job.spec, config, s.device, s.mode, s.linear),
        found,
        s,
    )
    bench.free()
    for point in job.points:
        yield bench.measure(point)


def warm(task: dict[str, Any]) -> None:
    from kvc_compile.bench import attention
    from kvc_compile.bench import warm as ahead

    job = Job.from_json(task["job"])
    if job.dtype:
        attention.warm(job.settings, job.dtype, task["part"], task["parts"])
    else:
        ahead.model(job)


def main(task_file: str, rows_file: str, read: Callable[[], str] = sys.stdin.readline) -> None:
    task = json.loads(Path(task_file).read_text())
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import kvc_compile.bench.decode  # noqa: F401

    read()
    if "part" in task:
        warm(task)
        return
    with Path(rows_file).open("a") as out:
        for row in rows(Job.from_json(task["job"])):
            out.write(json.dumps(to_json(row)) + "\n")
            out.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
