"""What a run measures, as records that go to JSON as they are. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Ceilings:
    """What the device does at most, measured by each job for itself. read: bytes/s of a kernel that only reads;
    copy: bytes/s read and written by a copy; multiply: FLOP/s of a large matrix product in the model's dtype."""

    read: float
    copy: float
    multiply: float
    device: str = ""
    memory: int | None = None


@dataclass(frozen=True)
class Call:
    """One attention call over one stored form. seconds: median, inside a CUDA graph on a GPU; stored_bytes: that it has
    to read; best_16bit_s: the fastest 16-bit attention of the same shape and `best` its name; of_ceiling: the share of
    the read rate; against_128: `of_ceiling` over that of 128 channels at the same bytes, where such a row is there."""

    shape: str
    batch: int
    context: int
    query_heads: int
    heads: int
    channels: int
    dtype: str
    format: str
    seconds: float | None = None
    stored_bytes: int | None = None
    predicted_s: float | None = None
    of_ceiling: float | None = None
    best: str = ""
    best_16bit_s: float | None = None
    gain: float | None = None
    against_128: float | None = None
    note: str = ""
    error: str = ""


@dataclass(frozen=True)
class Step:
    """One measurement of a whole model.

    seconds: of a decode step, or of a prompt's first token; read_bytes: of weights and cache that a decode step needs;
    predicted_s: these over the read rate (for a prompt: its FLOP over the multiply rate); cache_bytes: of the whole
    cache; peak_bytes: of the allocator, weights included; setup_s: of the point in all; compiles: graphs that were
    compiled for it and not found in a cache on disk; cudagraph_skips: graphs that could not be recorded.
    """

    part: str
    cache: str
    batch: int
    context: int
    seconds: float | None = None
    tokens_per_s: float | None = None
    read_bytes: int | None = None
    predicted_s: float | None = None
    over_predicted: float | None = None
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    setup_s: float | None = None
    compiles: int | None = None
    cudagraph_skips: int | None = None
    finite: bool | None = None
    note: str = ""
    error: str = ""


@dataclass(frozen=True)
class Failure:
    """A job that ended before it had measured all: its name, what it said last."""

    job: str
    error: str


KINDS: dict[str, type] = {"ceilings": Ceilings, "call": Call, "step": Step, "failure": Failure}


def to_json(row: Any) -> dict[str, Any]:
    kind = next(name for name, cls in KINDS.items() if type(row) is cls)
    return {"kind": kind, **asdict(row)}


def from_json(data: Mapping[str, Any]) -> Any:
    cls = KINDS[data["kind"]]
    return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})
