"""The operators of a decode step under `select`:

    kvc::select           the slots of a cache that a query reads
    kvc::attend_selected  attention over these slots alone

One new token a sequence. A selection travels as its key (`policy.Selection`), the slots as int64 [B, kv heads, C], -1
where there are fewer: other layers may read the same ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvc_compile.kernels.reference import LENGTH, check_mask, views
from kvc_compile.kernels.select import held, step
from kvc_compile.layout import Layout
from kvc_compile.lowering import cpu
from kvc_compile.lowering import ops as o
from kvc_compile.policy import Selection


def capacity(row_bytes: int, layout: Layout, s: Selection) -> int:
    """Slots that a query reads at most, of an arena with rows of so many bytes and the new token."""
    return step.slots(s, layout.room_of(row_bytes) + 1)


def scored(layout: Layout) -> bool:
    """Whether a kernel compares a query with what the arena holds."""
    return not layout.sketch.startswith("hash") or layout.sketch_bytes % 4 == 0


def prepare(selection: str, layout: Layout, device: torch.device) -> None:
    """Put what an index needs on the device, before a CUDA graph is captured. selection: "" where nothing selects."""
    if selection and not layout.sketch:
        step.table_of(Selection.parse(selection), layout.heads, layout.channels, device)
    held.prepare(layout, device)


@o.operator()
def select(
    q: Tensor,
    k_data: Tensor,
    k_new: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    scale: float,
    k_layout: str,
    selection: str,
    shown: int | None = None,
) -> Tensor:
    """The slots that q [B, query heads, 1, D] reads: int64 [B, kv heads, C], ascending, then -1.

    k_new [B, H, 1, D]: the key about to be appended, in slot L. mask, positions, shown: see `kvc::attend`.
    """
    layout, s = Layout.parse(k_layout), Selection.parse(selection)
    room = capacity(k_data.shape[1], layout, s)
    length, first, mask = _where(k_data, layout, mask, positions, shown)
    batch, heads = q.shape[0], layout.heads
    if isinstance(length, int) and step.reads_all(s.query, length + 1):
        every = torch.arange(length + 1).expand(batch, heads, -1)
        return torch.nn.functional.pad(every, (0, room - length - 1), value=-1)
    if layout.sketch:
        known = views(k_data, layout).sketch
        assert known is not None
        new = held.sketches(k_new, layout)
        if isinstance(length, int):
            known = torch.cat([known[:, :, :length], new], 2)
        elif scored(layout):
            from kvc_compile.lowering import scores  # imports Triton

            x = scores.of(q[:, :, 0], k_data, k_new, length, layout, s.query.gqa)
            seen = step.visible(mask, first, length + 1, batch, x.shape[3], q.device)
            return step.select_scored(s, x, seen, scale, room)
        else:
            known = torch.cat([known, new], 2).index_copy(2, length.reshape(1), new)
        seen = step.visible(mask, first, length + 1, batch, known.shape[2], q.device)
        return step.select_held(s, q[:, :, 0], known, seen, scale, room, layout)
    if isinstance(length, int):
        k = torch.cat([cpu.read(k_data, length, layout), k_new], 2)
    else:
        tokens = layout.room_of(k_data.shape[1])
        k = torch.cat([torch.ops.kvc.read(k_data, tokens, k_layout, False), k_new], 2)
        k = k.index_copy(2, length.reshape(1), k_new)  # past it there is nothing that is seen
    seen = step.visible(mask, first, length + 1, batch, k.shape[2], q.device)
    return step.select(s, q[:, :, 0], k, seen, scale, room)


def _where(
    data: Tensor, layout: Layout, mask: Tensor | None, positions: Tensor | None, shown: int | None
) -> tuple[Tensor | int, Tensor | int, Tensor | None]:
    """(the new token's slot, the first slot that is seen, the mask [b, h, 1, W] of the slots from that one on)."""
    length: Tensor | int
    first: Tensor | int
    if data.is_cuda:
        length = views(data, layout).header[0, 0, LENGTH] if positions is None else positions.reshape(-1)[0].long()
        first = length.new_zeros(()) if shown is None else (length - shown).clamp(min=0)
    else:
        held = cpu.length(data, layout)
        start = cpu.start_of(positions, 1)
        length = held if start is None else start
        if length > held:
            raise ValueError(f"attention from position {length} of a cache of {held} tokens")
        first = 0 if shown is None else max(0, length - shown)
    mask = four(mask)
    if mask is not None and isinstance(length, int):
        check_mask(mask, length + 1 - int(first))
    return length, first, mask


def four(mask: Tensor | None) -> Tensor | None:
    """A mask as [b, h, 1, W]."""
    if mask is None:
        return None
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    return mask.float() if mask.dtype == torch.float64 else mask


@o.shapes(select)
def _(q, k_data, k_new, mask, positions, scale, k_layout, selection, shown=None):
    layout, s = Layout.parse(k_layout), Selection.parse(selection)
    return q.new_empty((q.shape[0], layout.heads, capacity(k_data.shape[1], layout, s)), dtype=torch.int64)


@o.operator()
def attend_selected(
    q: Tensor,
    k_data: Tensor,
    v_data: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    index: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    scale: float,
    k_layout: str,
    v_layout: str,
    selection: str,
    cap: float = 0.0,
    sinks: Tensor | None = None,
    shown: int | None = None,
) -> Tensor:
    """Attention of q [B, query heads, 1, Dk] over the slots `index` of `kvc::select`; otherwise as `kvc::attend`."""
    k, v = Layout.parse(k_layout), Layout.parse(v_layout)
    if q.is_cuda:
        from kvc_compile.lowering import slots  # imports Triton

        return slots.attend(
            q, k_data, v_data, k_new, v_new, index, four(mask), positions, scale, k, v, cap, sinks, shown
        )
    length, first, mask = _where(k_data, k, mask, positions, shown)
    given = q, k_data, v_data, k_new, v_new
    if isinstance(length, int) and step.reads_all(Selection.parse(selection).query, length + 1):
        return cpu.attend(*given, mask, positions, False, scale, k, v, cap, sinks, shown)
    return step.attend(*given, index, mask, first, length, scale, k, v, cap, sinks)


@o.shapes(attend_selected)
def _(
    q, k_data, v_data, k_new, v_new, index, mask, positions, scale, k_layout, v_layout, selection, cap=0.0,
    sinks=None, shown=None,
):  # fmt: skip
    return q.new_empty((*q.shape[:-1], v_new.shape[-1]))
