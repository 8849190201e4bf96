"""Compile-time constants of the kernels that a call launches, and which ones a dump shows: no Triton, no GPU.

`lowering.launch` passes what the first half gives; the second half says the same ahead of time, for `lowering.render`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvc_compile.kernels.form import ADDED_MASK, BOOL_MASK, NO_MASK, Form, form
from kvc_compile.layout import Layout
from kvc_compile.lowering import decoding
from kvc_compile.lowering.candidates import Sizes, candidates, rows_bucket, split_count
from kvc_compile.lowering.general import Blocks
from kvc_compile.lowering.known import Dtype

Constants = dict[str, Any]  # by the name of the kernel's parameter; num_warps among them

MERGE = 128  # splits that `merge` takes at a time, at most
MANY_ROWS = 512  # query rows from which on a program of `merge` takes all channels
STORE = 16  # tokens that a program of `append_store` takes
READ = 32  # tokens that a program of `read_tokens` takes


def power_of_2(n: int) -> int:
    """The least one that is not below n."""
    return 1 << (n - 1).bit_length()


def pad(channels: int) -> int:
    """Channels of a tile: a power of two, and what `tl.dot` takes at least."""
    return max(16, power_of_2(channels))


def mask_kind(dtype: torch.dtype | None) -> int:
    return NO_MASK if dtype is None else BOOL_MASK if dtype == torch.bool else ADDED_MASK


# ---------------------------------------------------------------- what a kernel is compiled for


def attending(
    k: Form,
    v: Form,
    groups: int,
    mask: torch.dtype | None,
    causal: bool,
    cap: float,
    placed: bool,
    sinks: bool,
    window: bool,
    splits: int,
) -> Constants:
    """What both kernels of attention have."""
    return {
        "G": groups, "MASK": mask_kind(mask), "CAUSAL": causal, "PLACED": placed, "DIRECT": splits == 1,
        "CAP": cap, "SINKS": sinks, "WINDOW": window, "K": k, "V": v,
    }  # fmt: skip


def decode_split(tiles: decoding.Tiles, wide: Any, asm: bool, early: bool) -> Constants:
    """wide: the type of an operand, as the caller spells types."""
    return {
        "BM": tiles.BM, "BT": tiles.BT, "TP": tiles.TP, "MIX": 16, "CK": tiles.CK, "CV": tiles.CV,
        "STAGES": tiles.stages, "WIDE": wide, "ASM": asm, "EARLY": early, "num_warps": tiles.warps,
    }  # fmt: skip


def attend_split(k: Form, v: Form, n: int, blocks: Blocks, dot: Any) -> Constants:
    """dot: the type of an operand, as the caller spells types."""
    return {
        "CHUNK": n >= blocks.BN, "BM": blocks.BM, "BN": blocks.BN, "STAGES": blocks.stages, "DK": pad(k.channels),
        "DV": pad(v.channels), "DOT": dot, "num_warps": blocks.warps,
    }  # fmt: skip


def merge(splits: int, rows: int, channels: int, groups: int, early: bool) -> Constants:
    together = min(MERGE, max(16, power_of_2(splits)))
    wide = pad(channels) if rows >= MANY_ROWS else 32
    launch = {"launch_pdl": True} if early else {}
    return {
        "G": groups, "BS": together, "D": channels, "DC": wide, "EARLY": early, **launch,
        "num_warps": 4 if together * wide >= 4096 else 2,
    }  # fmt: skip


def append(f: Form, placed: bool, n: int) -> dict[str, Constants]:
    """The kernels that append n tokens, in order."""
    groups, channels, padded = append_tile(f)
    tile = {"GP": groups, "CP": channels}
    if n == 1:
        return {"append_token": {"PLACED": placed, **tile, "DP": padded, "F": f, "num_warps": 4}}
    return {
        "append_encode": {"PLACED": placed, **tile, "F": f, "num_warps": 4},
        "append_store": {"PLACED": placed, "TOKENS": STORE, "DP": padded, "F": f, "num_warps": 4},
        "append_commit": {"PLACED": placed, "F": f, "num_warps": 1},
    }


def append_pair(k: Form, v: Form, placed: bool) -> Constants:
    """The kernel that appends one key and one value."""
    keys = dict(zip(("GK", "CK", "DK"), append_tile(k), strict=True))
    values = dict(zip(("GV", "CV", "DV"), append_tile(v), strict=True))
    return {"PLACED": placed, **keys, **values, "K": k, "V": v, "num_warps": 4}


def append_tile(f: Form) -> tuple[int, int, int]:
    """Channel groups, channels of a group and channels, each rounded up to a power of two."""
    return power_of_2(f.groups), power_of_2(min(f.c, f.channels)), power_of_2(f.channels)


def read_tokens(f: Form, last: bool) -> Constants:
    return {"LAST": last, "BN": READ, "DP": pad(f.channels), "F": f}


# ---------------------------------------------------------------- what a call launches


@dataclass(frozen=True)
class Machine:
    """What of a GPU the choice depends on. early: a kernel can start before the one that it waits for has ended.
    interpreted: Triton's interpreter stands in for it, which has no assembly and computes bf16 wrongly."""

    multiprocessors: int = 132  # an H100
    early: bool = True
    interpreted: bool = False


@dataclass(frozen=True)
class Kernel:
    """A kernel for one set of constants. name: `module.function`; pointers: what its tensors hold, those
    left out that nothing is read from."""

    name: str
    constants: Mapping[str, Any]
    pointers: Mapping[str, str]

    @property
    def module(self) -> str:
        return self.name.partition(".")[0]

    @property
    def function(self) -> str:
        return self.name.partition(".")[2]

    @property
    def forms(self) -> bool:
        """Whether it is compiled for the layouts of arenas."""
        return any(isinstance(v, Form) for v in self.constants.values())


def spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Attention:
    """A call of attention, by its shapes: n queries a head over arenas with room for `room` tokens and the new ones."""

    k: Layout
    v: Layout
    batch: int
    groups: int  # query heads of one kv head
    n: int
    room: int
    dtype: torch.dtype
    mask: torch.dtype | None
    causal: bool
    positions: torch.dtype | None
    cap: float = 0.0
    sinks: torch.dtype | None = None
    window: bool = False


def attention(a: Attention, machine: Machine, splits: int | None = None, sizes: Sizes | None = None) -> list[Kernel]:
    """The kernels that `launch.attend` launches for a call. sizes: those that were tuned, or else the rule's."""
    k, v = form(a.k), form(a.v)
    rows = a.n * a.groups
    sizes = sizes or candidates(k, v, rows_bucket(rows), a.dtype)[0]
    splits = splits or split_count(sizes, k, v, a.batch, rows, a.room, machine.multiprocessors)
    tiles = sizes if isinstance(sizes, decoding.Tiles) else None
    given = a.positions is not None, a.sinks is not None, a.window
    common = attending(k, v, a.groups, a.mask, a.causal, a.cap, *given, splits)
    wide = Dtype("float32" if machine.interpreted and a.dtype == torch.bfloat16 else spelled(a.dtype))
    early = tiles is not None and splits > 1 and machine.early
    q = spelled(a.dtype)
    pointers = {
        "q": q, "k_new": a.k.dtype, "v_new": a.v.dtype, "out": q if splits == 1 else "float32", "k_data": "uint8",
        "v_data": "uint8",
    }  # fmt: skip
    if splits > 1:
        pointers["lse"] = "float32"
    if a.mask is not None:
        pointers["mask"] = "uint8" if a.mask == torch.bool else spelled(a.mask)
        pointers["bounds"] = "int32"
    pointers |= {n: spelled(t) for n, t in (("positions", a.positions), ("sinks", a.sinks)) if t is not None}
    if isinstance(sizes, decoding.Tiles):
        constants = common | decode_split(sizes, wide, not machine.interpreted, early)
        found = [Kernel("decode.decode_split", constants, pointers)]
    else:
        found = [Kernel("attend.attend_split", common | attend_split(k, v, a.n, sizes, wide), pointers)]
    if splits > 1:
        constants = merge(splits, a.batch * k.heads * rows, v.channels, a.groups, early)
        found.append(Kernel("attend.merge", constants, {"parts": "float32", "lse": "float32", "out": q}))
    return found


def appending(layout: Layout, n: int, positions: torch.dtype | None) -> list[Kernel]:
    """The kernels that `launch.append` launches for n tokens."""
    pointers = {"data": "uint8", "x": layout.dtype}
    if positions is not None:
        pointers["positions"] = spelled(positions)
    return [
        Kernel(f"append.{name}", constants, pointers)
        for name, constants in append(form(layout), positions is not None, n).items()
    ]


def appending_pair(k: Layout, v: Layout, positions: torch.dtype | None) -> list[Kernel]:
    """The kernel that `launch.append_pair` launches."""
    pointers = {"k_data": "uint8", "v_data": "uint8", "k_new": k.dtype, "v_new": v.dtype}
    if positions is not None:
        pointers["positions"] = spelled(positions)
    return [Kernel("append.append_pair", append_pair(form(k), form(v), positions is not None), pointers)]


def reading(layout: Layout, last: bool) -> list[Kernel]:
    return [Kernel("read.read_tokens", read_tokens(form(layout), last), {"data": "uint8", "out": layout.dtype})]
