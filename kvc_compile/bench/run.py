"""All jobs of a run, on all devices: results as one JSON object.

On GPUs, first everything is compiled by processes side by side, then each GPU does one job after another, a process for
each. On a CPU all is done in this process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvc_compile.bench.plan import Settings, jobs
from kvc_compile.bench.rows import Failure, from_json, to_json
from kvc_compile.spec import Spec

Show = Callable[[str, int, int], None]  # what is going on, measurements done, and to do
Save = Callable[[dict[str, Any]], None]  # all that was found so far
GRACE = 20.0  # seconds that a process gets after the time is up
WARM_SHARE = 0.4  # of the time, at most, for compiling ahead
ATTENTION_PARTS = 4  # processes that compile the attention calls of a dtype
MOST_PROCESSES = 12
COMPILE_THREADS = "4"  # the same everywhere: Inductor's caches depend on its configuration
POLL = 0.1
SAVE_EVERY = 5.0  # seconds, at least


class Results:
    """What has been measured so far."""

    def __init__(self, settings: Settings, specs: Sequence[Spec], show: Show, save: Save = lambda _: None):
        self.settings, self.show, self.save = settings, show, save
        self.jobs = jobs(settings, specs)
        self.total = sum(len(j.points) for j in self.jobs)
        self.found: list[tuple[str, Any]] = []
        self.began = self.saved = time.time()
        self.setup = setup(settings, specs)

    def add(self, job: str, row: Any) -> None:
        self.found.append((job, row))
        steps = sum(to_json(r)["kind"] == "step" for _, r in self.found)
        self.show(describe(job, row), steps, self.total)
        if time.time() > self.saved + SAVE_EVERY:
            self.save(self.to_json())
            self.saved = time.time()

    def to_json(self) -> dict[str, Any]:
        rows = [(job, to_json(row)) for job, row in self.found]

        def of(kind: str) -> list[dict[str, Any]]:
            return [{k: v for k, v in row.items() if k != "kind"} for _, row in rows if row["kind"] == kind]

        ceilings = {job: {k: v for k, v in r.items() if k != "kind"} for job, r in rows if r["kind"] == "ceilings"}
        first = next(iter(ceilings.values()), {})
        return {
            "setup": {"device": first.get("device", ""), **self.setup, "seconds": round(time.time() - self.began, 1)},
            "ceilings": ceilings,
            "attention": of("call"),
            "steps": of("step"),
            "failures": of("failure"),
        }


def describe(job: str, row: Any) -> str:
    data = to_json(row)
    if data["kind"] == "step":
        return f"{row.cache}: {row.part}, {row.batch} x {row.context}"
    if data["kind"] == "call":
        return f"attention: {row.shape}, {row.batch} x {row.context}, {row.dtype}, {row.format}"
    return f"{job}: {data['kind']}"


def setup(settings: Settings, specs: Sequence[Spec]) -> dict[str, Any]:
    """What a reader must know to compare. The device is what the first process finds."""
    from importlib.metadata import PackageNotFoundError, version

    from kvc_compile.request import Request

    versions: dict[str, str | None] = {}
    for name in ("kvc-compile", "torch", "triton", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "devices": devices(settings.device),
        **versions,
        "python": platform.python_version(),
        "commit": commit(),
        "tune": Request.of("lossless").tune and os.environ.get("KVC_TUNE") != "0",
        "settings": dataclasses.asdict(settings),
        "specs": [s.expanded() for s in specs],
    }


def commit() -> str | None:
    """Of the checkout that the package lies in, if it is one."""
    if os.environ.get("KVC_COMMIT"):
        return os.environ["KVC_COMMIT"]
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def devices(device: str) -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them; one name for a CPU."""
    if not device.startswith("cuda"):
        return ["cpu"]
    import torch  # counts through NVML: this process must take no memory of a GPU

    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = shown.split(",") if shown else [str(i) for i in range(torch.cuda.device_count())]
    index = device.partition(":")[2]
    return [names[int(index)]] if index else names


def run(
    settings: Settings, specs: Sequence[Spec], show: Show = lambda *_: None, save: Save = lambda _: None
) -> dict[str, Any]:
    """save: called now and then and in the end, so that no end of this process loses what was measured."""
    results = Results(settings, specs, show, save)
    try:
        if settings.device.startswith("cuda"):
            with tempfile.TemporaryDirectory() as folder:
                gpus = devices(settings.device)
                compile_ahead(results, gpus, Path(folder))
                measure(results, gpus, Path(folder))
        else:
            here(results)
    finally:
        found = results.to_json()
        save(found)
    return found


def here(results: Results) -> None:
    """All jobs in this process."""
    from kvc_compile.bench import worker

    for job in results.jobs:
        for row in worker.rows(job):
            results.add(job.name, row)


class Child:
    """A worker process on one GPU. It imports what it needs at once and begins when told to."""

    def __init__(self, folder: Path, gpu: str, task: dict[str, Any], name: str):
        self.name, self.read_to = name, 0
        n = len(list(folder.iterdir()))
        self.rows = folder / f"{n}.rows"
        self.log = folder / f"{n}.log"
        self.rows.touch()
        file = folder / f"{n}.task"
        file.write_text(json.dumps(task))
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu, "TORCHINDUCTOR_COMPILE_THREADS": COMPILE_THREADS}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                # -P: with a checkout on sys.path its folder kernels/ would hide the package of that name
                [sys.executable, "-P", "-m", "kvc_compile.bench.worker", str(file), str(self.rows)],
                stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, text=True,
            )  # fmt: skip

    def go(self) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.close()
        except BrokenPipeError:  # it has ended already: `failure` says how
            pass

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def new_rows(self) -> list[Any]:
        with self.rows.open() as f:
            f.seek(self.read_to)
            text = f.read()
        whole = text[: text.rfind("\n") + 1]
        self.read_to += len(whole.encode())
        return [from_json(json.loads(line)) for line in whole.splitlines()]

    def failure(self) -> Failure | None:
        code = self.process.poll()
        if not code:
            return None
        return Failure(self.name, f"the process ended with {code}: {self.log.read_text()[-1500:].strip()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def compile_ahead(results: Results, gpus: Sequence[str], folder: Path) -> None:
    """Fill the caches of compiled code. What is not done in its share of the time is compiled later."""
    from kvc_compile.bench import warm

    tasks: deque[tuple[str, dict[str, Any]]] = deque()
    for job in results.jobs:
        parts = ATTENTION_PARTS if job.dtype else 1
        for one in warm.split(job):
            for part in range(parts):
                tasks.append((job.name, {"job": one.to_json(), "part": part, "parts": parts}))
    until = results.settings.until
    stop = None if until is None else time.time() + WARM_SHARE * (until - time.time())
    running: list[Child] = []
    most, count = max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) // 2)), len(tasks)
    try:
        while tasks or running:
            while tasks and len(running) < most:
                name, task = tasks.popleft()
                child = Child(folder, gpus[len(tasks) % len(gpus)], task, f"compiling ahead: {name}")
                child.go()
                running.append(child)
            for child in [c for c in running if c.ended]:
                running.remove(child)
                failure = child.failure()
                if failure:
                    results.add(child.name, failure)
            results.show(f"compiling ahead: {count - len(tasks) - len(running)} of {count}", 0, results.total)
            if stop is not None and time.time() > stop:
                return
            time.sleep(POLL)
    finally:
        for child in running:
            child.kill()


def measure(results: Results, gpus: Sequence[str], folder: Path) -> None:
    """A process for each job; on each GPU one at a time, and the next one waits with its imports done."""
    queue, until = deque(results.jobs), results.settings.until
    running: dict[str, Child] = {}
    staged: dict[str, Child] = {}
    try:
        while queue or running or staged:
            for gpu in gpus:
                child = running.get(gpu)
                if child:
                    ended = child.ended  # before its last rows are read
                    for row in child.new_rows():
                        results.add(child.name, row)
                    if ended:
                        failure = child.failure()
                        if failure:
                            results.add(child.name, failure)
                        del running[gpu]
                if gpu not in staged and queue:
                    job = queue.popleft()
                    staged[gpu] = Child(folder, gpu, {"job": job.to_json()}, job.name)
                if gpu not in running and gpu in staged:
                    running[gpu] = staged.pop(gpu)
                    running[gpu].go()
            if until is not None and time.time() > until + GRACE:
                left = [*(c.name for c in [*running.values(), *staged.values()]), *(j.name for j in queue)]
                for name in left:
                    results.add(name, Failure(name, "the time was up before it had ended"))
                return
            time.sleep(POLL)
    finally:
        for child in [*running.values(), *staged.values()]:
            child.kill()
