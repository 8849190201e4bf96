"""The kvc:: operators on the CPU: the reference semantics, its bulk compiled by Inductor where that pays, and decode
steps over caches that are not small by the C++ kernels of `lowering.native`.

Reading a length from an arena costs nothing here, so only the valid tokens are touched. What follows `read` runs on
any device: it is not on the path of a decode step.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kvc_compile.kernels import reference
from kvc_compile.layout import Layout
from kvc_compile.lowering import native

COMPILE_FROM = 1 << 17  # elements of keys and values above which a compiled attention is worth its compile time


@functools.cache
def _compiled(k_layout: Layout, v_layout: Layout, scale: float, cap: float):
    def part(rows, k_planes, k_params, v_planes, v_params, mask):
        stored = k_planes, k_params, v_planes, v_params
        return reference.attend_body(rows, *stored, mask, scale, k_layout, v_layout, cap)

    return torch.compile(part, dynamic=True, fullgraph=True)


def attend_body(
    rows, k_planes, k_params, v_planes, v_params, mask, scale, k_layout: Layout, v_layout: Layout, cap: float = 0.0
):
    """`reference.attend_body`, compiled for large parts of a packed cache."""
    stored = k_planes, k_params, v_planes, v_params
    count = sum(p.numel() * k_layout.codes_per_word(b) for p, b in zip(k_planes, k_layout.planes, strict=True))
    if count < COMPILE_FROM or not (k_layout.packed or v_layout.packed):
        return reference.attend_body(rows, *stored, mask, scale, k_layout, v_layout, cap)
    return _compiled(k_layout, v_layout, scale, cap)(rows, *stored, mask)


def start_of(positions: Tensor | None, n: int) -> int | None:
    """The first position; an error unless the positions are consecutive."""
    if positions is None:
        return None
    if n == 1 and positions.numel() == 1:
        return int(positions)
    first = int(positions.reshape(-1)[0])
    if positions.numel() != n or not torch.equal(positions, torch.arange(first, first + n)):
        raise ValueError(f"a compressed cache takes consecutive positions, got {positions.tolist()} for {n} tokens")
    return first


def append(data: Tensor, x: Tensor, positions: Tensor | None, layout: Layout) -> None:
    start = start_of(positions, x.shape[2])
    if not (native.appends(data, x, layout) and native.append(data, x, start, layout)):
        reference.append(data, x, layout, start)


def attend(
    q: Tensor, k_data: Tensor, v_data: Tensor, k_new: Tensor, v_new: Tensor, mask: Tensor | None,
    positions: Tensor | None, causal: bool, scale: float, k_layout: Layout, v_layout: Layout, cap: float = 0.0,
    sinks: Tensor | None = None, shown: int | None = None,
) -> Tensor:  # fmt: skip
    start = start_of(positions, k_new.shape[2])
    plain = not cap and sinks is None and shown is None
    if plain and native.attends(q, k_data, k_layout, v_layout) and start != 0:
        out = native.attend(q, k_data, v_data, k_new, v_new, mask, start, causal, scale, k_layout, v_layout)
        if out is not None:
            return out
    where = q, k_data, v_data, k_new, v_new, mask, start, causal, scale, k_layout, v_layout
    return reference.attend(*where, cap, sinks, shown, attend_body)


def read(data: Tensor, tokens: int, layout: Layout, last: bool = False) -> Tensor:
    first = max(0, length(data, layout) - tokens) if last else 0
    return reference.read(data, layout, first, first + tokens)


def length(data: Tensor, layout: Layout) -> int:
    """The number of tokens in an arena."""
    return reference.lengths(reference.views(data, layout))[0]


def evicted(data: Tensor, layout: Layout) -> int:
    """How many tokens fewer are held than were appended."""
    return int(reference.views(data, layout).header[0, 0, reference.EVICTED])


def rewind(data: Tensor, layout: Layout, tokens: int) -> None:
    """Forget all but the first tokens."""
    reference.rewind(data, layout, tokens)


def trim(data: Tensor, layout: Layout, drop: int) -> None:
    """Forget the oldest `drop` tokens: `kernels.reference.trim`."""
    reference.trim(data, layout, drop)


def grow(data: Tensor, tokens: int, layout: Layout) -> Tensor:
    """A copy of the arena with room for `tokens` tokens."""
    return resize(data, layout.row_bytes(tokens), layout)


def resize(data: Tensor, row_bytes: int, layout: Layout) -> Tensor:
    """A copy of the arena, uint8 [B, row_bytes], with all that both have room for."""
    out = torch.zeros(data.shape[0], row_bytes, dtype=torch.uint8, device=data.device)
    old, new = reference.views(data, layout), reference.views(out, layout)
    out[:, : layout.body_offset] = data[:, : layout.body_offset]
    for a, b in zip(old.planes, new.planes, strict=True):
        n = min(a.shape[2], b.shape[2])
        b[:, :, :n] = a[:, :, :n]
    if old.params is not None and new.params is not None:
        n = min(old.params.shape[2], new.params.shape[2])
        new.params[:, :, :n] = old.params[:, :, :n]
    if old.words is not None and new.words is not None:
        n = min(old.words.shape[3], new.words.shape[3])
        new.words[..., :n] = old.words[..., :n]
        new.words[:, :, 0, n:] = old.header[..., reference.EVICTED].unsqueeze(-1)  # as after any eviction
    if old.sketch is not None and new.sketch is not None:
        n = min(old.sketch.shape[2], new.sketch.shape[2])
        new.sketch[:, :, :n] = old.sketch[:, :, :n]
    return out
