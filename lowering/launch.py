"""Host launchers of the Triton kernels: the semantics of `kernels.reference`, without reading a length on the host.

Two entry points, `attend` and `append`. What differs from the reference is only how a misuse shows, since a kernel
cannot raise: `append` beyond the end or the room of a cache sets the fault word of its header and stores nothing, and
`attend` over such a cache gives NaN. An append at position 0 starts the cache over and clears the fault.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvc_compile.kernels import append as A
from kvc_compile.kernels import attend as T
from kvc_compile.kernels import decode as D
from kvc_compile.kernels import read as R
from kvc_compile.kernels.form import form
from kvc_compile.layout import Layout
from kvc_compile.lowering import decoding, tuned, variants
from kvc_compile.lowering.bounds import bounds as bounds_of
from kvc_compile.lowering.candidates import Sizes

DOT = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def interpreted() -> bool:
    return triton.knobs.runtime.interpret


@lru_cache
def launches_early(device: torch.device) -> bool:
    """Whether a kernel can start before the one it waits for has ended: from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


def launcher(kernel: Any, dry: bool, *grid: int) -> Callable[..., Any]:
    """What runs a kernel, or if dry only compiles it."""
    return partial(kernel.warmup, grid=grid) if dry else kernel[grid]


def inner_contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def aligned(x: Tensor) -> Tensor:
    """x, each row of which begins at a multiple of 16 bytes: the decoding kernel reads rows in such pieces."""
    steps = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1]) if size > 1]
    if x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in steps):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def mask_strides(mask: Tensor) -> list[int]:
    """Strides of a mask [b, h, n, W], 0 where it broadcasts."""
    return [0 if size == 1 else stride for size, stride in zip(mask.shape[:3], mask.stride())] + [mask.stride(3)]


def attend(
    q: Tensor,
    k_data: Tensor,
    v_data: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    causal: bool,
    scale: float,
    k_layout: Layout,
    v_layout: Layout,
    cap: float = 0.0,
    sinks: Tensor | None = None,
    shown: int | None = None,
    splits: int | None = None,
    tiles: Sizes | None = None,
    out: Tensor | None = None,
    bounds: Tensor | None = None,
    dry: bool = False,
) -> Tensor:
    """Attention of the new queries over the cache and the new tokens: see `kernels.reference.attend`.

    splits, tiles: into how many parts the sequence is divided, and the sizes of the kernel, which say which one it is;
    see `lowering.tuned` for what they are unless given. out: where to write, fp32 or q's dtype. bounds: those of the
    mask, computed if they are needed and not given. dry: compile the kernels and run nothing; the result is not set.
    """
    batch, heads, n, _ = q.shape
    k_form, v_form = form(k_layout), form(v_layout)
    groups = heads // k_form.heads
    if out is None:
        out = torch.empty(batch, heads, n, v_form.channels, dtype=q.dtype, device=q.device)
    q = inner_contiguous(q, q.dtype)
    k_new = inner_contiguous(k_new, getattr(torch, k_layout.dtype))
    v_new = inner_contiguous(v_new, getattr(torch, v_layout.dtype))
    room = v_layout.room_of(v_data.shape[1]) + n
    shape = groups, n, q.dtype, batch, room
    if tiles is None:
        tiles, usual = tuned.chosen(k_layout.key, v_layout.key, *shape, q.device)
        splits = splits or usual
    elif splits is None:
        splits = tuned.splits(tiles, tuned.Problem(k_layout, v_layout, *shape), q.device)
    decodes = isinstance(tiles, decoding.Tiles)
    view, seen = q, q
    if decodes:
        k_new, v_new = aligned(k_new), aligned(v_new)
    if mask is not None:
        view = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        seen = (bounds_of(mask) if bounds is None else bounds).expand(-1, -1, n, -1)

    rows = batch * heads * n
    if splits == 1:
        parts, lse = out, out
    else:
        parts = torch.empty(splits, rows, v_form.channels, dtype=torch.float32, device=q.device)
        lse = torch.empty(splits, rows, dtype=torch.float32, device=q.device)
    place = q if positions is None else positions
    share = q if sinks is None else sinks.contiguous()
    sizes = (
        k_layout.capacity_of(k_data.shape[1]), v_layout.capacity_of(v_data.shape[1]),
        k_data.stride(0), v_data.stride(0), 0 if mask is None else mask.shape[3],
        *q.stride()[:3], *k_new.stride()[:3], *v_new.stride()[:3],
        *([0] * 7 if mask is None else (*mask_strides(mask), *mask_strides(seen)[:3])),
    )  # fmt: skip
    masked = None if mask is None else mask.dtype
    given = positions is not None, sinks is not None, shown is not None
    variant = variants.attending(k_form, v_form, groups, masked, causal, cap, *given, splits)
    interpreted_bf16 = interpreted() and q.dtype == torch.bfloat16  # the interpreter computes bf16 wrongly
    wide = tl.float32 if interpreted_bf16 else DOT[q.dtype]
    early = decodes and splits > 1 and launches_early(q.device)
    with on(q.device):
        if isinstance(tiles, decoding.Tiles):
            apart = decoding.apart(tiles, decoding.other_tiles(k_form, v_form), splits, room)
            launcher(D.decode_split, dry, splits, batch * k_form.heads)(
                q, k_new, v_new, view, seen, share, place, parts, lse, k_data, v_data, scale, n, splits, *apart,
                shown or 0, *sizes, **variant, **variants.decode_split(tiles, wide, not interpreted(), early),
            )  # fmt: skip
        else:
            launcher(T.attend_split, dry, triton.cdiv(n * groups, tiles.BM), batch * k_form.heads, splits)(
                q, k_new, v_new, view, seen, share, place, parts, lse, k_data, v_data, scale, n, splits, shown or 0,
                *sizes, **variant, **variants.attend_split(k_form, v_form, n, tiles, wide),
            )  # fmt: skip
        if splits > 1:
            merge(parts, lse, out, n, groups, early, dry)
    return out


def merge(parts: Tensor, lse: Tensor, out: Tensor, n: int, groups: int, early: bool, dry: bool) -> None:
    """out [B, query heads, n, D] from the parts [S, rows, D] of its splits. early: the kernel waits for them itself."""
    splits, rows, channels = parts.shape
    constants = variants.merge(splits, rows, channels, groups, early)
    launcher(T.merge, dry, rows, triton.cdiv(channels, constants["DC"]))(parts, lse, out, n, splits, **constants)


def read(data: Tensor, tokens: int, layout: Layout, last: bool = False) -> Tensor:
    """The first or last `tokens` positions as values [B, H, tokens, D]: see `lowering.ops.read`."""
    f = form(layout)
    batch = data.shape[0]
    out = torch.empty(batch, f.heads, tokens, f.channels, dtype=getattr(torch, layout.dtype), device=data.device)
    with on(data.device):
        R.read_tokens[triton.cdiv(tokens, variants.READ), batch * f.heads](
            data, out, data.stride(0), layout.capacity_of(data.shape[1]), tokens, **variants.read_tokens(f, last)
        )
    return out


def append(data: Tensor, x: Tensor, layout: Layout, positions: Tensor | None) -> None:
    """Store the tokens x [B, H, n, D] from positions[0] on, or at the end: see `kernels.reference.append`."""
    batch, heads, n, _ = x.shape
    if n == 0:
        return
    f = form(layout)
    x = inner_contiguous(x, getattr(torch, layout.dtype))
    capacity = layout.capacity_of(data.shape[1])
    at, placed = (data, False) if positions is None else (positions, True)
    constants = variants.append(f, placed, n)
    rows, source = data.stride(0), x.stride()[:3]
    with on(data.device):
        if n == 1:
            token = constants["append_token"]
            A.append_token[batch * heads,](data, x, at, rows, *source[:2], capacity, **token)
            return
        encode, store, commit = constants.values()
        A.append_encode[A.pieces(f, n), batch * heads](data, x, at, rows, *source, capacity, n, **encode)
        A.append_store[triton.cdiv(n, store["TOKENS"]), batch * heads](data, x, at, rows, *source, capacity, n, **store)
        A.append_commit[batch * heads,](data, at, rows, capacity, n, **commit)


def append_pair(
    k_data: Tensor,
    v_data: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_layout: Layout,
    v_layout: Layout,
    positions: Tensor | None,
) -> None:
    """`append` of one key and one value [B, H, 1, D] a sequence, in one launch."""
    batch, heads = k_new.shape[:2]
    k_new = inner_contiguous(k_new, getattr(torch, k_layout.dtype))
    v_new = inner_contiguous(v_new, getattr(torch, v_layout.dtype))
    at, placed = (k_data, False) if positions is None else (positions, True)
    constants = variants.append_pair(form(k_layout), form(v_layout), placed)
    with on(k_data.device):
        A.append_pair[batch * heads, 2](
            k_data, v_data, k_new, v_new, at, k_data.stride(0), v_data.stride(0), *k_new.stride()[:2],
            *v_new.stride()[:2], k_layout.capacity_of(k_data.shape[1]), v_layout.capacity_of(v_data.shape[1]),
            **constants,
        )  # fmt: skip
