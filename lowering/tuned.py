"""Which variant of an attention kernel a call runs: the fastest by the stored timings, else the rule's.

On the way of every launch: what was decided once is kept for calls of the same shape, and reads no file.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

import torch
import triton

from kvc_compile.kernels.form import form
from kvc_compile.layout import Layout
from kvc_compile.lowering.candidates import Sizes, best, candidates, rows_bucket, split_count
from kvc_compile.lowering.decoding import Tiles
from kvc_compile.lowering.general import Blocks, fitted
from kvc_compile.lowering.variants import pad
from kvc_compile.timings import Database, Entry, Key, bucket, user_folder

# Files whose content decides what a timing means, by kernel: it with all that it imports of its folder, and the rules.
SOURCES = {
    "decode": (
        *(f"kernels/{name}.py" for name in ("decode", "attend", "body", "codec", "facts", "form", "mixed", "unpack")),
        "lowering/decoding.py",
    ),
    "attend": (*(f"kernels/{name}.py" for name in ("attend", "codec", "form")), "lowering/general.py"),
}


@dataclass(frozen=True)
class Problem:
    """Attention of one shape: n new tokens of batch sequences, `groups` query heads to one of the caches' heads, over
    caches with room for `room` tokens, the new ones included."""

    k: Layout
    v: Layout
    groups: int
    n: int
    dtype: torch.dtype
    batch: int
    room: int

    @property
    def rows(self) -> int:
        return self.groups * self.n

    @property
    def programs(self) -> int:
        return self.batch * self.k.heads

    @property
    def candidates(self) -> tuple[Sizes, ...]:
        """Those of its bucket: what is tuned once must be good for all of it."""
        return candidates(form(self.k), form(self.v), rows_bucket(self.rows), self.dtype)

    def key(self, device: torch.device) -> Key:
        kernel = "decode" if isinstance(self.candidates[0], Tiles) else "attend"
        return Key(
            source(kernel), kernel, self.k.key, self.v.key, rows_bucket(self.rows),
            str(self.dtype).removeprefix("torch."), bucket(self.programs), bucket(self.room),
            device_name(device), triton.__version__,
        )  # fmt: skip


@lru_cache
def source(kernel: str) -> str:
    """16 hex digits that stand for the kernel's source files."""
    folder = resources.files("kvc_compile")
    text = "\0".join((folder / name).read_text(encoding="utf-8") for name in SOURCES[kernel])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@lru_cache
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program can have of a multiprocessor's memory: 227 KiB on an H100, 99 on a consumer's card."""
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)  # not on ROCm


# ---------------------------------------------------------------- the database of this process


@lru_cache
def database() -> Database:
    return Database(user_folder())


def use(file: Path) -> None:
    """Let the timings of this file go before all others."""
    if database().use(file):
        chosen.cache_clear()


def save(entry: Entry) -> None:
    database().save(entry)
    chosen.cache_clear()


def reload(key: Key) -> None:
    """See what other processes have stored meanwhile."""
    database().reload(key)
    chosen.cache_clear()


def pick(key: Key, among: tuple[Sizes, ...]) -> Sizes:
    """The candidate to run by the stored timings of the key, or of the nearest bucket; the rule's without any."""
    found = (best(e.timings, among) for e in database().ranked(key))
    return next((c for c in found if c is not None), among[0])


# ---------------------------------------------------------------- the choice


@lru_cache(maxsize=4096)
def chosen(
    k: str, v: str, groups: int, n: int, dtype: torch.dtype, batch: int, room: int, device: torch.device
) -> tuple[Sizes, int]:
    """The sizes to run a `Problem` with, k and v being the keys of its layouts, and its splits."""
    p = Problem(Layout.parse(k), Layout.parse(v), groups, n, dtype, batch, room)
    sizes = p.candidates[0]
    if device.type == "cuda":
        sizes = pick(p.key(device), p.candidates)
        if isinstance(sizes, Blocks):
            sizes = fitted(sizes, pad(p.k.channels), pad(p.v.channels), dtype.itemsize, shared_memory(device))
    return sizes, splits(sizes, p, device)


def splits(sizes: Sizes, p: Problem, device: torch.device) -> int:
    """Into how many parts the sequence is divided."""
    return split_count(sizes, form(p.k), form(p.v), p.batch, p.rows, p.room, multiprocessors(device))
