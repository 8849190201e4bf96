"""The kvc:: operators: schemas, what they mutate, and their shapes for tracing. They take arenas (`kvc_compile.layout`)
and layouts by key, so a graph that holds them can be printed, cached and run by itself.

    kvc::empty    a new arena
    kvc::encode   a new arena that holds some tokens
    kvc::extend   a larger copy of an arena with tokens appended
    kvc::append   tokens appended in place
    kvc::attend   attention over an arena pair and the tokens about to be appended
    kvc::read     the content as plain values
    kvc::length   the number of tokens

The CPU runs the reference semantics (`lowering.cpu`), CUDA the Triton kernels (`lowering.launch`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvc_compile.kernels.reference import EVICTED, LENGTH, views
from kvc_compile.kernels.select import held
from kvc_compile.layout import Layout
from kvc_compile.lowering import cpu


def _kernels():
    from kvc_compile.lowering import launch

    return launch


_library = torch.library.Library("kvc", "DEF")


def operator(
    mutates: Sequence[str] = (), tags: Sequence[torch.Tag] = ()
) -> Callable[[Callable], torch._ops.OpOverload]:
    """Register a function as the operator of its name. `torch.library.custom_op` costs 13 us more a call."""

    def register(f: Callable) -> torch._ops.OpOverload:
        schema = torch.library.infer_schema(f, mutates_args=mutates)
        _library.define(f.__name__ + schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        _library.impl(f.__name__, f, "CompositeExplicitAutograd")
        return getattr(torch.ops.kvc, f.__name__).default

    return register


def shapes(op: torch._ops.OpOverload) -> Callable:
    """Register a function as what tracing calls in the operator's place."""
    return torch.library.register_fake(op, lib=_library)


@operator()
def empty(like: Tensor, batch: int, tokens: int, layout: str) -> Tensor:
    """A new arena for `batch` rows of up to `tokens` tokens on the device of `like`."""
    return torch.zeros(batch, Layout.parse(layout).row_bytes(tokens), dtype=torch.uint8, device=like.device)


@shapes(empty)
def _(like, batch, tokens, layout):
    return like.new_empty((batch, Layout.parse(layout).row_bytes(tokens)), dtype=torch.uint8)


@operator(mutates=("data",))
def append(data: Tensor, x: Tensor, positions: Tensor | None, layout: str, after: Sequence[Tensor]) -> None:
    """Append x [B, H, n, D]; `positions` int [n] are where the graph writes them: the end of the cache unless given.

    after: results of the operators that read the arena before. Nothing is done with them, but in a functional graph
    they are all that keeps the readers before the append; moved behind it, they would need a copy of the arena.
    """
    parsed = Layout.parse(layout)
    if parsed.evicts and positions is not None and x.shape[2] > 1:  # at slot 0 a cache begins anew
        view = views(data, parsed)
        for part in (view.header[..., EVICTED], *([] if view.words is None else [view.words])):
            part.mul_((positions[0] != 0).to(part.dtype))
    store(data, x, positions, parsed)


def store(data: Tensor, x: Tensor, positions: Tensor | None, layout: Layout) -> None:
    """`append` as a plain function."""
    if data.is_cuda:
        _kernels().append(data, x, layout, positions)
    else:
        cpu.append(data, x, positions, layout)
    if layout.sketch:
        held.update(data, x, layout)


@shapes(append)
def _(data, x, positions, layout, after):
    return None


@operator(mutates=("k_data", "v_data"))
def append_pair(
    k_data: Tensor,
    v_data: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    positions: Tensor | None,
    k_layout: str,
    v_layout: str,
    after: Sequence[Tensor],
) -> None:
    """`append` of one key and one value [B, H, 1, D] a sequence, in one launch; `passes.fuse` puts it there."""
    k, v = Layout.parse(k_layout), Layout.parse(v_layout)
    if k_data.is_cuda:
        _kernels().append_pair(k_data, v_data, k_new, v_new, k, v, positions)
    else:
        cpu.append(k_data, k_new, positions, k)
        cpu.append(v_data, v_new, positions, v)
    if k.sketch:
        held.update(k_data, k_new, k)


@shapes(append_pair)
def _(k_data, v_data, k_new, v_new, positions, k_layout, v_layout, after):
    return None


@operator()
def encode(x: Tensor, tokens: int, layout: str) -> Tensor:
    """A new arena with room for `tokens` tokens that holds x [B, H, n, D]."""
    parsed = Layout.parse(layout)
    data = torch.zeros(x.shape[0], parsed.row_bytes(tokens), dtype=torch.uint8, device=x.device)
    store(data, x, None, parsed)
    return data


@shapes(encode)
def _(x, tokens, layout):
    return x.new_empty((x.shape[0], Layout.parse(layout).row_bytes(tokens)), dtype=torch.uint8)


@operator()
def extend(data: Tensor, x: Tensor, layout: str) -> Tensor:
    """A copy of the arena with room for n more tokens and x [B, H, n, D] appended."""
    parsed = Layout.parse(layout)
    grown = cpu.resize(data, extended_bytes(data.shape[1], x.shape[2], parsed), parsed)
    store(grown, x, None, parsed)
    return grown


def extended_bytes(row_bytes: int, n: int, layout: Layout) -> int:
    """Row bytes after n tokens more: never less room than they need, whatever part of it was free."""
    return row_bytes + (n + layout.flush + layout.unit - 1) // layout.unit * layout.unit_bytes


@shapes(extend)
def _(data, x, layout):
    return data.new_empty((data.shape[0], extended_bytes(data.shape[1], x.shape[2], Layout.parse(layout))))


@operator()
def read(data: Tensor, tokens: int, layout: str, last: bool) -> Tensor:
    """The first `tokens` positions as values [B, H, tokens, D] in the model's dtype; zeros past the end.

    last: the last ones, where there are more: a window. Raises EvictedError where some are gone.
    """
    parsed = Layout.parse(layout)
    if parsed.evicts and (gone := int(views(data, parsed).header[0, 0, EVICTED])):
        raise EvictedError(
            f"{gone} tokens of this cache were evicted in each head, other ones in each: it cannot be read by position"
        )
    return values(data, tokens, parsed, last)


class EvictedError(RuntimeError):
    """The content of a cache is asked for by position, and some of it was evicted."""


def values(data: Tensor, tokens: int, layout: Layout, last: bool = False) -> Tensor:
    """`read` as a plain function, of slots."""
    if data.is_cuda and tokens:
        return _kernels().read(data, tokens, layout, last)
    out = cpu.read(data, tokens, layout, last)
    return out.clone() if out.untyped_storage().data_ptr() == data.untyped_storage().data_ptr() else out


@shapes(read)
def _(data, tokens, layout, last):
    p = Layout.parse(layout)
    return data.new_empty((data.shape[0], p.heads, tokens, p.channels), dtype=getattr(torch, p.dtype))


@operator()
def length(data: Tensor, layout: str) -> Tensor:
    """The number of tokens in an arena: int64 []."""
    return views(data, Layout.parse(layout)).header[0, 0, LENGTH].clone()


@shapes(length)
def _(data, layout):
    return data.new_empty((), dtype=torch.int64)


@operator()
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
    k_layout: str,
    v_layout: str,
    bounds: Tensor | None = None,
    cap: float = 0.0,
    sinks: Tensor | None = None,
    shown: int | None = None,
) -> Tensor:
    """Attention of q [B, query heads, n, Dk] over the cache and the new tokens; see `kernels.reference.attend`.

    bounds: what `lowering.bounds` says of the mask, where the graph has it already.
    """
    k, v = Layout.parse(k_layout), Layout.parse(v_layout)
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape)).expand(-1, -1, q.shape[2], -1)
        mask = mask.float() if mask.dtype == torch.float64 else mask
    args = q, k_data, v_data, k_new, v_new, mask, positions, causal, scale, k, v, cap, sinks, shown
    return _kernels().attend(*args, bounds=bounds) if q.is_cuda else cpu.attend(*args)


@shapes(attend)
def _(
    q, k_data, v_data, k_new, v_new, mask, positions, causal, scale, k_layout, v_layout, bounds=None, cap=0.0,
    sinks=None, shown=None,
):  # fmt: skip
    return q.new_empty((*q.shape[:-1], v_new.shape[-1]))
