"""Host launcher of attention over selected slots, `kernels.slots`: the semantics of `kernels.select.step.attend`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kvc_compile.kernels import slots as S
from kvc_compile.kernels.form import form
from kvc_compile.layout import Layout
from kvc_compile.lowering import tuned, variants
from kvc_compile.lowering.launch import DOT, inner_contiguous, interpreted, launcher, mask_strides, merge, on

TILE = 32  # slots of a tile
WAVES = 4  # of programs, that splits aim at
LEAST = 4  # tiles of a split


def attend(
    q: Tensor, k_data: Tensor, v_data: Tensor, k_new: Tensor, v_new: Tensor, slots: Tensor, mask: Tensor | None,
    positions: Tensor | None, scale: float, k_layout: Layout, v_layout: Layout, cap: float = 0.0,
    sinks: Tensor | None = None, shown: int | None = None, splits: int | None = None, dry: bool = False,
) -> Tensor:  # fmt: skip
    """Attention of q [B, query heads, 1, Dk] over `slots`, int64 [B, kv heads, C]: see `lowering.selecting`."""
    batch, heads = q.shape[:2]
    k_form, v_form = form(k_layout), form(v_layout)
    groups, count = heads // k_form.heads, slots.shape[2]
    out = torch.empty(batch, heads, 1, v_form.channels, dtype=q.dtype, device=q.device)
    q, slots = inner_contiguous(q, q.dtype), inner_contiguous(slots, slots.dtype)
    k_new = inner_contiguous(k_new, getattr(torch, k_layout.dtype))
    v_new = inner_contiguous(v_new, getattr(torch, v_layout.dtype))
    programs = batch * k_form.heads
    if splits is None:
        most = WAVES * tuned.multiprocessors(q.device) // programs
        splits = max(1, min(most, count // (TILE * LEAST)))
    if splits == 1:
        parts, lse = out, out
    else:
        parts = torch.empty(splits, batch * heads, v_form.channels, dtype=torch.float32, device=q.device)
        lse = torch.empty(splits, batch * heads, dtype=torch.float32, device=q.device)
    view = q if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    strides = [0] * 4 if mask is None else mask_strides(mask)
    wide = variants.pad(max(k_form.channels, v_form.channels))
    dot = torch.float32 if interpreted() else q.dtype
    with on(q.device):
        launcher(S.attend_slots, dry, splits, programs)(
            q, k_new, v_new, view, slots, q if sinks is None else sinks.contiguous(),
            q if positions is None else positions, parts, lse, k_data, v_data, scale, count, splits, shown or 0,
            k_layout.capacity_of(k_data.shape[1]), v_layout.capacity_of(v_data.shape[1]), k_data.stride(0),
            v_data.stride(0), 0 if mask is None else mask.shape[3], *q.stride()[:2], *k_new.stride()[:2],
            *v_new.stride()[:2], strides[0], strides[1], strides[3], *slots.stride()[:2],
            G=groups, MASK=variants.mask_kind(None if mask is None else mask.dtype), PLACED=positions is not None,
            DIRECT=splits == 1, CAP=cap, SINKS=sinks is not None, WINDOW=shown is not None,
            BM=max(16, triton.next_power_of_2(groups)), BN=TILE, DK=variants.pad(k_form.channels),
            DV=variants.pad(v_form.channels), DOT=DOT[dot], K=k_form, V=v_form, num_warps=4 if wide <= 128 else 8,
        )  # fmt: skip
        if splits > 1:
            merge(parts, lse, out, 1, groups, False, dry)
    return out
