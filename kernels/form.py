"""What a kernel is compiled for: the facts of a layout as plain integers."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import lru_cache

from kvc_compile.layout import Layout

RAW, INT, FP8 = 0, 1, 2
NO_MASK, BOOL_MASK, ADDED_MASK = 0, 1, 2


@dataclass(frozen=True, repr=False)
class Form:
    """What a kernel must know of a layout at compile time; passed as one `tl.constexpr`.

    Its repr names the compiled function, so it holds every field and only characters of a symbol.
    """

    kind: int  # RAW, INT or FP8
    heads: int
    channels: int
    item: int  # bytes of the model's dtype
    sink: int
    recent: int
    flush: int
    word: int  # bits
    low: int  # bits of the first plane, of the only one if `high` is 0
    high: int
    t: int  # 0: no params
    c: int
    groups: int
    params: int
    levels: int
    doubled: int  # 2 C, an integer
    divisor: int  # twice what the radius of a block is divided by
    sink_offset: int  # bytes, as all offsets
    ring_offset: int
    body_offset: int

    def __repr__(self) -> str:
        return "F" + "_".join(map(str, astuple(self)))


@lru_cache(maxsize=1024)
def form(layout: Layout) -> Form:
    """The compile-time facts of `layout`."""
    codec = layout.codec
    if layout.dtype == "float64":
        raise ValueError("no kernel for float64 caches")
    if codec.params and not (codec.block[0] == 1 or codec.block[0] % 16 == 0):
        raise ValueError(f"scale blocks of {codec.block[0]} tokens: the kernels know 1 and multiples of 16")
    if codec.params and layout.flush % codec.block[0]:
        raise ValueError(f"flushes of {layout.flush} tokens do not fill scale blocks of {codec.block[0]}")
    planes = (*layout.planes, 0)
    return Form(
        kind={"raw": RAW, "int": INT, "fp": FP8}[codec.kind],
        heads=layout.heads,
        channels=layout.channels,
        item=layout.item,
        sink=layout.sink,
        recent=layout.recent,
        flush=layout.flush,
        word=layout.word,
        low=planes[0],
        high=planes[1],
        t=codec.block[0] if codec.params else 0,
        c=codec.block[1] if codec.params else layout.channels,
        groups=max(layout.groups, 1),
        params=codec.params,
        levels=codec.levels,
        doubled=codec.levels - 1,
        divisor=896 if codec.kind == "fp" and not codec.zero_point else codec.levels - 1,
        sink_offset=layout.sink_offset,
        ring_offset=layout.ring_offset,
        body_offset=layout.body_offset,
    )
