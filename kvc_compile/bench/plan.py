"""Which measurements a run takes, and in which order: most telling first, since time may run out. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from kvc_compile.request import MODES, OptionError
from kvc_compile.spec import Spec

PARTS = ("attention", "model", "capacity", "growth", "prefill")
WEIGHTS = ("int8",)
STATIC, QUANTIZED = "hf static", "hf quantized"  # the baselines


def blocks(bits: int) -> dict[str, Any]:
    """The codec that the kernels are best at: keys by channel in blocks of 64 tokens, values by token."""
    return {
        "kvc": 1,
        "name": f"{bits} bits",
        "tokens": {"sink": 4, "recent": 64, "flush": {"k": 64, "v": 32}},
        "k": {"codec": {"int": bits, "block": [64, 1]}},
        "v": {"codec": {"int": bits, "block": [1, "all"]}},
    }


def default_specs() -> tuple[Spec, ...]:
    """In the order in which they are measured."""
    four, two, eight = (Spec.load(blocks(bits)) for bits in (4, 2, 8))
    return four, two, Spec.load("lossless"), eight


@dataclass(frozen=True)
class Settings:
    """What was asked for. contexts, batches: of the model part; growth: its contexts, at batch 1; prompts: of the
    prefill part; room_at: the context at which the largest batch is looked for; memory: bytes that may be used, None
    for all of the device; mode: of `torch.compile`, None for CUDA graphs on a GPU; weights: None as
    they are, or one of WEIGHTS; linear: the option of compressed caches; until: the time (of `time.time`)
    after which nothing more is begun."""

    device: str
    parts: tuple[str, ...] = PARTS
    model: str | None = None
    contexts: tuple[int, ...] = (4096, 32768, 131072)
    batches: tuple[int, ...] = (1, 8, 32)
    growth: tuple[int, ...] = (1024, 4096, 16384, 65536, 262144, 1048576)
    prompts: tuple[int, ...] = (8192, 32768)
    room_at: int = 32768
    steps: int = 8
    quick: bool = False
    memory: int | None = None
    mode: str | None = None
    weights: str | None = None
    linear: bool = False
    until: float | None = None

    def __post_init__(self) -> None:
        for name in ("contexts", "batches", "growth", "prompts"):
            if any(n < 1 for n in getattr(self, name)) or not getattr(self, name):
                raise OptionError(f"{name} are {getattr(self, name)}: numbers from 1 on are allowed")
        if self.mode is not None and self.mode not in MODES:
            raise OptionError(f"mode {self.mode!r}: allowed are {', '.join(MODES)}")
        if self.weights is not None and self.weights not in WEIGHTS:
            raise OptionError(f"weights {self.weights!r}: allowed are {', '.join(WEIGHTS)}")
        for part in self.parts:
            if part not in PARTS:
                raise OptionError(f"part {part!r}: allowed are {', '.join(PARTS)}")


def quick(device: str, **changes: Any) -> Settings:
    """Sizes that take two minutes on a GPU; on a CPU those that a toy model takes."""
    small: dict[str, Any] = {
        "contexts": (4096, 32768), "batches": (1, 8), "growth": (1024, 16384, 262144), "prompts": (8192,), "steps": 5,
    }  # fmt: skip
    if device == "cpu":
        small = {
            "contexts": (64, 128), "batches": (1, 2), "growth": (64, 128, 256), "prompts": (64,), "room_at": 128,
            "steps": 3, "memory": 64 << 20,
        }  # fmt: skip
    return Settings(device, quick=True, **(small | changes))


@dataclass(frozen=True)
class Point:
    """One measurement of a model. part: "model", "growth", "largest batch" (at this context), "longest context" (at
    this batch) or "prefill"."""

    part: str
    batch: int
    context: int


@dataclass(frozen=True)
class Job:
    """What one process measures on one device, in this order. cache: a name for the tables; spec: what `cache` is,
    expanded, or None for a baseline; points: of a model; dtype: of attention calls, for a job of these."""

    name: str
    settings: Settings
    cache: str = ""
    spec: Mapping[str, Any] | None = None
    points: tuple[Point, ...] = ()
    dtype: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Job:
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data["settings"].items()}
        points = tuple(Point(**p) for p in data["points"])
        return Job(data["name"], Settings(**settings), data["cache"], data["spec"], points, data["dtype"])


def points(s: Settings, baseline: bool) -> tuple[Point, ...]:
    """Decode steps of one way to hold the cache. Growth takes what the model part has measured from there. The baseline
    attends over its whole room, one compiled graph for each size, so its curve ends where the model part does."""
    found: list[Point] = []
    if "model" in s.parts:
        found += [Point("model", b, c) for b in s.batches for c in s.contexts]
    if "capacity" in s.parts and not baseline:
        found += [Point("largest batch", 0, s.room_at), Point("longest context", 1, 0)]
    if "growth" in s.parts:
        at = s.contexts if baseline else s.growth
        found += [Point("growth", 1, c) for c in at if Point("model", 1, c) not in found]
    return tuple(found)


def jobs(s: Settings, specs: Sequence[Spec]) -> list[Job]:
    """One for each way to hold the cache and each dtype of attention calls; prompts, whose graphs take longest to
    compile, in the end."""
    whole = []
    for spec in specs:
        whole.append(Job(spec.name, s, spec.name, spec.expanded(), points(s, baseline=False)))
    whole.insert(2, Job(STATIC, s, STATIC, None, points(s, baseline=True)))
    if "model" in s.parts:
        one = Point("model", min(s.batches), sorted(s.contexts)[len(s.contexts) // 2])
        whole.append(Job(QUANTIZED, s, QUANTIZED, None, (one,)))
    found = [j for j in whole if j.points]
    if "prefill" in s.parts:
        prompts = tuple(Point("prefill", 1, c) for c in s.prompts)
        found += [replace(j, name=f"{j.name}, prompts", points=prompts) for j in whole if j.cache != QUANTIZED]
    if "attention" in s.parts:
        found.insert(1, Job("attention bfloat16", s, dtype="bfloat16"))
        found.insert(4, Job("attention float16", s, dtype="float16"))
    return found
