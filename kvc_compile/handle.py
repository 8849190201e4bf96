"""The cache handle: what the caller's cache object holds in place of its tensor.

It has the shape and dtype of the cache tensor and no storage of its own; its one inner tensor is the arena. Its eager
semantics are the reference semantics: a read dequantises, an append quantises, `zero_` empties it, a copy copies the
compressed bytes. So an op that no rewrite knows is slow but right, and the state lives and dies with the handle.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from kvc_compile.layout import Layout
from kvc_compile.lowering import cpu, keeping, ops

log = logging.getLogger("kvc_compile")
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
    for name in ("kvc_length", "kvc_total", "kvc_evicted"):
        if hasattr(h.arena, name):
            setattr(arena, name, getattr(h.arena, name))
    return _same(h, moved(arena, h.arena))


def moved(arena: Tensor, old: Tensor) -> Tensor:
    """`arena` counted as `old` was."""
    if hasattr(old, "kvc_tag"):
        track(arena, old.kvc_tag)
    return arena


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
    if h.stored.evicts:
        keeping.start_at(out.arena, h.stored, tokens)
        return growing(out.arena, h.layout_key, tokens)
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
    if h.stored.evicts and not isinstance(h.arena, FakeTensor):
        keeping.start_at(h.arena, h.stored, int(positions.reshape(-1)[0]))
        positions = None
    ops.append(h.arena, x, positions, h.layout_key, [])
    if not isinstance(h.arena, FakeTensor):
        happened(h)
    return h


def _cat(tensors, dim=0):
    """A frame that Dynamo gave up on appends as the model spells it: to a cache that grows, by `cat`."""
    handles = [t for t in tensors if isinstance(t, CacheHandle)]
    if any(type(h.arena) is not Tensor for h in handles):
        return NotImplemented  # it is being traced
    why = no_append(tensors, dim)
    out = aten.cat.default([_plain(t) for t in tensors], dim) if why else extended(*tensors)
    for h in handles:
        happened(h, why)
    return out


def no_append(tensors: list[Tensor], dim: int) -> str:
    """Why `cat` of these makes no compressed cache with some tokens more of its first tensor, or "" if it does."""
    h, *others = tensors
    if not isinstance(h, CacheHandle):
        return "the cache is not the first of what it joins"
    if len(others) != 1:
        return f"it joins {len(tensors)} tensors"
    if dim not in (2, -2):
        return f"it joins along dimension {dim}, not along the tokens"
    if h.static or h.window:
        return f"the cache is {'one of fixed length' if h.static else 'a sliding window'}"
    x = others[0]
    sizes = (*h.shape[:2], *h.shape[3:])
    if type(x) is not Tensor or (*x.shape[:2], *x.shape[3:]) != sizes or x.device != h.device:
        return "what it appends is no plain tensor of tokens as it has"
    if x.dtype != h.dtype:
        return f"it appends {x.dtype} to {h.dtype}"
    return "gradients are asked for" if x.requires_grad else ""


def extended(h: CacheHandle, x: Tensor) -> CacheHandle:
    """A longer copy of a cache that grows, with the tokens x [B, H, n, D] behind its own."""
    layout, held, tokens = h.stored, h.shape[2], h.shape[2] + x.shape[2]
    size = max(h.arena.shape[1], layout.row_bytes(tokens + 1))  # the next token must fit without moving the arena
    arena = moved(cpu.resize(h.arena, size, layout), h.arena)
    if layout.evicts:
        arena.kvc_evicted = cpu.evicted(arena, layout)  # type: ignore[attr-defined]
        keeping.start_at(arena, layout, held)
    if held < tokens:  # at these positions: a graph may have appended to the arena, for another handle, since
        at = None if layout.evicts else torch.arange(held, tokens, device=x.device)
        ops.store(arena, x, at, layout)
    return growing(arena, h.layout_key, tokens)


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
    aten.cat.default: _cat,
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


# ---------------------------------------------------------------- what eager code did


numbers = itertools.count()  # order of what happens: compiles (`report.Compile`) and what eager code does
_eager: dict[tuple[Tag, str], int] = {}  # whose cache, and why it is plain now -> when, the last time
_said: set[str] = set()


def happened(h: CacheHandle, plain: str = "") -> None:
    """Remember, and say once, that eager code appended to a cache, or `plain`: why its `cat` is a plain tensor."""
    tag = getattr(h.arena, "kvc_tag", None)
    if tag is not None:
        _eager[tag, plain] = next(numbers)
    if plain in _said:
        return
    _said.add(plain)
    where = f" of layer {tag.layer}" if tag else ""
    if plain:
        log.warning("kvc: eager code made a plain tensor of a compressed cache%s by `cat`: %s", where, plain)
        return
    log.warning(
        "kvc: eager code appends to a compressed cache%s. The cache stays compressed, but attention to it is not: it "
        "reads all of the cache back in each step. If this model is compiled, Dynamo gave up on the frame: raise "
        "torch._dynamo.config.recompile_limit (it is %s); TORCH_LOGS=recompiles says what differs each time",
        where,
        torch._dynamo.config.recompile_limit,
    )


def in_eager_code(owners: Iterable[str], since: int) -> dict[int, dict[str, None]]:
    """By layer, what happened to caches of these owners in eager code: reasons why `cat` made them plain, "" where they
    were appended to."""
    wanted, found = set(owners), dict[int, dict[str, None]]()
    for (tag, plain), number in _eager.items():
        if tag.owner in wanted and number > since:
            found.setdefault(tag.layer, {})[plain] = None
    return found
