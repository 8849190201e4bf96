"""The cache handle: what the caller's cache object holds in place of its tensor.

It has the shape and dtype of the cache tensor and no storage of its own; its one inner tensor is the arena. Its eager
semantics are the reference semantics: a read dequantises, an append quantises, `zero_` empties it, a copy copies the
compressed bytes. So an op that no rewrite knows is slow but right, and the state lives and dies with the handle.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from kvc_compile.layout import Layout
from kvc_compile.lowering import cpu, ops

aten = torch.ops.aten

_WRITES = (
    "writes to a compressed cache, which takes appends at its end, zero_() and copies of another compressed cache; "
    "clone its content first (tensor.dense()) to edit it"
)


class CacheHandle(torch.Tensor):
    """A compressed cache tensor [batch, heads, tokens, channels].

    arena: uint8 [batch, row_bytes]. layout_key: its `Layout.key`. A *static* handle has room for `tokens` tokens, of
    which those past the valid ones read as zeros; a dynamic one has `tokens` tokens. Where the arena of a static one or
    of a *window* holds more, it is the last ones.
    """

    arena: Tensor
    layout_key: str
    static: bool
    window: bool

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, arena: Tensor, layout_key: str, tokens: int, static: bool, window: bool = False):
        layout = Layout.parse(layout_key)
        shape = (arena.shape[0], layout.heads, tokens, layout.channels)
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=getattr(torch, layout.dtype), device=arena.device, requires_grad=False
        )

    def __init__(self, arena: Tensor, layout_key: str, tokens: int, static: bool, window: bool = False):
        self.arena, self.layout_key, self.static, self.window = arena, layout_key, static, window

    @property
    def stored(self) -> Layout:  # not `layout`, which every tensor has already
        return Layout.parse(self.layout_key)

    def __getitem__(self, index):
        tokens = first_tokens(self, index)
        return super().__getitem__(index) if tokens is None else crop(self, tokens)

    def __setitem__(self, index, value):
        """Elsewhere `x[a:b] = y` writes to a view of x; here that would be a write to a copy, and be lost."""
        parts = index if isinstance(index, tuple) and len(index) in (3, 4) else (None, None, None)
        positions, rest = parts[2], (*parts[:2], *parts[3:])
        whole = all(isinstance(i, slice) and i == slice(None) for i in rest)
        if isinstance(positions, slice) and isinstance(self.arena, FakeTensor) and whole:
            return  # Dynamo traces it, for which nothing is written
        if isinstance(positions, slice) and positions.indices(self.shape[2])[1] >= cpu.length(self.arena, self.stored):
            positions = torch.arange(self.shape[2], device=self.device)[positions]  # an append: nothing comes after it
        tokens = isinstance(positions, Tensor) and positions.dim() == 1 and positions.dtype == torch.int64
        if whole and tokens and isinstance(value, Tensor) and value.dim() == 4:
            self.index_copy_(2, positions, value)
            return
        raise NotImplementedError(f"an assignment by index {_WRITES}")

    def __reduce_ex__(self, protocol):
        plain = self.arena.detach()  # without what is remembered on the arena itself
        return _load, (plain, self.layout_key, self.shape[2], self.static, self.window)

    def __deepcopy__(self, memo):
        """Tensor's own would copy `__dict__` after cloning, so the arena twice, and the copy would not be counted."""
        if id(self) not in memo:
            memo[id(self)] = _clone(self)
        return memo[id(self)]

    def repeat_interleave(self, repeats, dim=None, *, output_size=None):
        """Whole sequences are repeated compressed. (No dispatch sees this operator, only what it is made of.)"""
        if isinstance(repeats, int) and dim == 0:
            return self.index_select(0, torch.arange(self.shape[0], device=self.device).repeat_interleave(repeats))
        return self.dense().repeat_interleave(repeats, dim, output_size=output_size)

    def tolist(self):
        return self.dense().tolist()

    def __tensor_flatten__(self):
        return ["arena"], (self.layout_key, self.static, self.window)

    @staticmethod
    def __tensor_unflatten__(inner, meta, outer_size, outer_stride):
        return CacheHandle(inner["arena"], meta[0], outer_size[2], *meta[1:])

    def __repr__(self, *, tensor_contents=None):  # type: ignore[override]
        return f"CacheHandle({tuple(self.shape)}, {self.dtype}, {self.device}, {self.layout_key})"

    @torch._disable_dynamo
    def dense(self) -> Tensor:
        """The content as a plain tensor, dequantised."""
        return ops.read(self.arena, self.shape[2], self.layout_key, self.static or self.window)

    @classmethod
    @torch._disable_dynamo  # a call from a frame between two graphs is not itself a frame to compile
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        written = [
            a
            for a, s in zip(args, func._schema.arguments, strict=False)
            if isinstance(a, CacheHandle) and s.alias_info is not None and s.alias_info.is_write
        ]
        if written and isinstance(written[0].arena, FakeTensor):  # Dynamo traces it: see `rewrite`, which allows it
            func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
            return written[0]
        if written or isinstance(kwargs.get("out"), CacheHandle):
            raise NotImplementedError(f"{func} {_WRITES}")
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs))


def _plain(x):
    return x.dense() if isinstance(x, CacheHandle) else x


def _same(h: CacheHandle, arena: Tensor) -> CacheHandle:
    return CacheHandle(arena, h.layout_key, h.shape[2], h.static, h.window)


def _load(arena: Tensor, layout_key: str, tokens: int, static: bool, window: bool = False) -> CacheHandle:
    if hasattr(arena, "kvc_tag"):
        track(arena, arena.kvc_tag)
    return CacheHandle(arena, layout_key, tokens, static, window)


def _detach(h):
    return _same(h, h.arena)


def _clone(h, *, memory_format=None):
    return _owned(h, h.arena.clone())


def _owned(h, arena: Tensor) -> CacheHandle:
    """A handle like `h` on an arena of its own."""
    for name in ("kvc_length", "kvc_total"):
        if hasattr(h.arena, name):
            setattr(arena, name, getattr(h.arena, name))
    if hasattr(h.arena, "kvc_tag"):
        track(arena, h.arena.kvc_tag)
    return _same(h, arena)


def _index_select(h, dim, index):
    """Some sequences of the batch, in any order: as beam search does."""
    return _owned(h, h.arena.index_select(0, index)) if isinstance(h, CacheHandle) and dim % 4 == 0 else NotImplemented


def _index(h, indices):
    first, rest = indices[0], indices[1:]
    if not isinstance(h, CacheHandle) or first is None or any(i is not None for i in rest) or first.dim() != 1:
        return NotImplemented
    return _owned(h, h.arena[first])


def first_tokens(h: CacheHandle, index: object) -> int | None:
    """n where `index` cuts a cache that grows to its first n tokens, `[..., :n, :]`: as assisted decoding crops it."""
    if h.static or not isinstance(index, tuple) or isinstance(h.arena, FakeTensor):
        return None
    parts = [*index]
    if Ellipsis in parts[:1]:
        parts[:1] = [slice(None)] * (5 - len(parts))
    cut, whole = (parts + [None] * 4)[2], [p for i, p in enumerate(parts) if i != 2]
    if not isinstance(cut, slice) or any(p != slice(None) for p in whole) or len(parts) > 4:
        return None
    start, stop, step = cut.indices(h.shape[2])
    return stop if start == 0 and step == 1 and 0 < stop < h.shape[2] else None


def crop(h: CacheHandle, tokens: int) -> CacheHandle:
    """A copy that holds the first tokens only; not a view, so writes to it are on it alone."""
    out = _clone(h)
    held = cpu.length(out.arena, h.stored)
    last = held - h.shape[2] + tokens if h.window else tokens
    cpu.rewind(out.arena, h.stored, last)
    out.arena.kvc_total = last
    return growing(out.arena, h.layout_key, tokens, h.window)


def growing(arena: Tensor, layout_key: str, tokens: int, window: bool = False) -> CacheHandle:
    """A handle whose length changes from step to step: one graph for all lengths."""
    torch._dynamo.maybe_mark_dynamic(arena, 1)
    arena.kvc_length = tokens  # type: ignore[attr-defined]
    if not window:
        arena.__dict__.pop("kvc_total", None)
    handle = CacheHandle(arena, layout_key, tokens, False, window)
    torch._dynamo.maybe_mark_dynamic(handle, 2)
    return handle


def forget(arena: Tensor) -> None:
    """Drop what is remembered of an arena whose content was changed: see `bound.make_room` and `beside`."""
    for name in ("kvc_total", "kvc_beside"):
        arena.__dict__.pop(name, None)


def _zero(h):
    """Empties a static cache; a dynamic one of zeros would be no cache that can grow."""
    if not h.static:
        return NotImplemented
    h.arena.zero_()
    forget(h.arena)
    return h


def _fill(h, value):
    return _zero(h) if value == 0 else NotImplemented


def _copy(dst, src, non_blocking=False):
    if not isinstance(dst, CacheHandle):
        return dst.copy_(src.dense())
    if not isinstance(src, CacheHandle) or src.layout_key != dst.layout_key or src.arena.shape != dst.arena.shape:
        return NotImplemented
    dst.arena.copy_(src.arena)
    forget(dst.arena)
    return dst


def _index_copy(h, dim, index, source):
    if not isinstance(h, CacheHandle) or dim % 4 != 2:
        return NotImplemented
    return _append(h, source, index)


def _index_put(h, indices, values, accumulate=False):
    if not isinstance(h, CacheHandle) or accumulate or len(indices) != 3 or any(i is not None for i in indices[:2]):
        return NotImplemented
    return _append(h, values, indices[2])


def _append(h: CacheHandle, x: Tensor, positions: Tensor) -> CacheHandle:
    if not isinstance(h.arena, FakeTensor):
        if h.static and cpu.length(h.arena, h.stored) > h.shape[2] and int(positions.reshape(-1)[0]):
            raise NotImplementedError(f"a write at a position of a window that has moved on {_WRITES}")
        forget(h.arena)
    ops.append(h.arena, x, positions, h.layout_key, [])
    return h


_HANDLERS = {
    aten.detach.default: _detach,
    aten.alias.default: _detach,
    aten.clone.default: _clone,
    aten.zero_.default: _zero,
    aten.fill_.Scalar: _fill,
    aten.copy_.default: _copy,
    aten.index_copy_.default: _index_copy,
    aten.index_put_.default: _index_put,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
}


def held_elsewhere(tensor: Tensor) -> bool:
    """Whether another tensor (a view, `.detach()`, `.data`, a Parameter) lives in the same memory: it would keep the
    memory, and not follow what is written to the cache."""
    if isinstance(tensor, (FakeTensor, CacheHandle)):
        return False
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) > 2  # the tensor and the storage object here


def become(tensor: Tensor, other: Tensor) -> None:
    """The Python object `tensor` becomes what `other` is, for everyone who holds it; its old storage is released.

    `torch.utils.swap_tensors` refuses tensors with weak references, and Dynamo's guards hold some.
    """
    tensor.__class__, other.__class__ = other.__class__, tensor.__class__
    tensor.__dict__, other.__dict__ = other.__dict__, tensor.__dict__
    torch._C._swap_tensor_impl(tensor, other)


# ---------------------------------------------------------------- accounting

import weakref  # noqa: E402
from dataclasses import dataclass  # noqa: E402


@dataclass(frozen=True)
class Tag:
    """Whose arena this is: the model (by id of the compile request), the layer, and keys or values."""

    owner: str
    layer: int
    role: str


_live: dict[int, weakref.ref] = {}


def track(arena: Tensor, tag: Tag) -> None:
    """Count the arena in `held` for as long as it lives."""
    if id(arena) in _live and _live[id(arena)]() is arena:
        return
    arena.kvc_tag = tag  # type: ignore[attr-defined]
    key = id(arena)
    live = _live  # the module's name for it is gone when the last arenas die at exit
    live[key] = weakref.ref(arena, lambda _: live.pop(key, None))


def held(owner: str | None = None) -> dict[tuple[int, str], int]:
    """Bytes of the live arenas by (layer, "keys" or "values"), of one owner or of all."""
    total: dict[tuple[int, str], int] = {}
    for ref in list(_live.values()):
        arena = ref()
        if arena is None or (owner is not None and arena.kvc_tag.owner != owner):
            continue
        key = (arena.kvc_tag.layer, arena.kvc_tag.role)
        total[key] = total.get(key, 0) + arena.untyped_storage().nbytes()
    return total
