"""Cache tensors: what each is, its append, and everything else that touches it.

A cache tensor is one of
- a buffer (a placeholder, or zeros made here) that one append writes in place: `index_copy_(2, positions, x)`,
  `buffer[:, :, positions] = x`, or to a slice of it: `buffer[:, :, a:b] = x`, `buffer[:, :, a:b].copy_(x)`,
  `buffer.narrow(2, a, n).copy_(x)`;
- `cat([past, x], -2)`, returned to the caller.
Every user of it must be that append, a view on the way to attention, a read of its sizes, or the graph's output.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from kvc_compile.passes.fx import is_call, same, same_shape, shape, source, value, writes
from kvc_compile.passes.views import FULL, dims

SIZES = ("size", "numel", "dim", "stride", "is_contiguous")
ZEROS = (torch.zeros, "new_zeros")
HELD_ELSEWHERE = "kvc_held_elsewhere"  # in the meta of a placeholder: another tensor lives in its memory


class Decline(Exception):
    """Why an attention is left alone, in words for the user."""


@dataclass(frozen=True)
class Span:
    """The positions first, first + 1, ..., as many as there are new tokens. first: a number or a node, not below 0."""

    first: int | Node


@dataclass(frozen=True)
class Buffer:
    """A static cache tensor [B, H, L, D] and its one append of `x` [B, H, n, D] at `positions` (int [n])."""

    node: Node  # the placeholder or the zeros
    born: bool
    append: Node
    positions: Node | Span | None  # None: a window that is full; x pushes the oldest tokens out
    consecutive: bool  # proved from the graph: positions = p, p+1, ...
    x: Node
    metadata: tuple[Node, ...]
    views: tuple[Node, ...] = ()  # that only the append uses, or attention with it


@dataclass(frozen=True)
class Concat:
    """`cat([past, x], -2)`; `past` is None where it is an empty literal."""

    node: Node
    past: Node | None
    x: Node
    metadata: tuple[Node, ...]  # reads of the sizes of `past`
    kept: Node | None = None  # the last tokens of `node`, where only these are returned: a sliding window

    @property
    def returned(self) -> Node:
        return self.kept or self.node


def kind(c: Buffer | Concat) -> str:
    """As `sites.CacheTensor.kind` says it."""
    if isinstance(c, Buffer):
        return "born" if c.born else "static"
    return "grown" if c.past is not None and hasattr(value(c.past), "arena") else "fresh"


def read_buffer(node: Node) -> Buffer:
    """The buffer's append, with every user accounted for."""
    what = source(node) or node.name
    s = shape(node)
    if s is None or len(s) != 4:
        raise Decline(f"{what} is no cache tensor [batch, heads, tokens, channels]")
    alone_in_memory(node)
    appends = [u for u in node.users if node in writes(u)]
    parts = [u for u in node.users if is_call(u, operator.getitem, "narrow", torch.narrow)]
    appends += [w for part in parts for w in part.users if part in writes(w)]
    if not appends:
        raise Decline(f"nothing in this graph is appended to {what} before attention reads it")
    if len(appends) > 1:
        raise Decline(f"{what} is written {len(appends)} times")
    (append,) = appends
    positions, x = _read_append(append, node)
    length = shape(x)[2] if isinstance(positions, Span) else (shape(positions) or (None,))[0]  # type: ignore[index]
    if length is None or not same_shape(x, s[0], s[1], length, s[3]):
        raise Decline(f"what is written to {what} does not have its shape, {tuple(s)}")
    if value(x).dtype != value(node).dtype:
        raise Decline(f"{value(x).dtype} is written to {what}, which is {value(node).dtype}")
    if node.op != "placeholder":
        born_sizes(node)
    metadata = tuple(u for u in node.users if is_call(u, *SIZES))
    views = () if append.args[0] is node else (append.args[0],)
    if views and (append.users or len(views[0].users) > 1):  # type: ignore[union-attr]
        raise Decline(f"a part of {what} is used besides being written")
    ascending = isinstance(positions, Span) or consecutive(positions)
    return Buffer(node, node.op != "placeholder", append, positions, ascending, x, metadata, views)  # type: ignore[arg-type]


def born_sizes(zeros: Node) -> tuple:
    """The four sizes that a cache is made with, numbers or nodes."""
    sizes = zeros.kwargs.get("size") or dims(zeros, 0 if zeros.op == "call_function" else 1)
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 4:
        raise Decline(f"the sizes that {zeros} is made with are not four numbers")
    return tuple(sizes)


def alone_in_memory(node: Node) -> None:
    """A cache that the caller made shares its memory with no other tensor: another would not follow it."""
    v = value(node)
    if node.op != "placeholder" or hasattr(v, "arena"):
        return
    others = (value(p) for p in node.graph.find_nodes(op="placeholder") if p is not node)
    memory = v.untyped_storage()
    if HELD_ELSEWHERE in node.meta or v._is_view() or memory.nbytes() != v.numel() * v.itemsize:
        raise Decline(f"{source(node) or node.name} shares its memory with another tensor, which would not follow it")
    if any(
        isinstance(o, torch.Tensor) and not hasattr(o, "arena") and o.untyped_storage()._cdata == memory._cdata
        for o in others
    ):
        raise Decline(f"{source(node) or node.name} shares its memory with another input")


def _read_append(node: Node, buffer: Node) -> tuple[Node | Span, Node]:
    """(positions [n], values) of an append to `buffer` along dimension 2."""
    if is_call(node, "copy_") and len(node.args) == 2 and isinstance(node.args[1], Node):
        span = _part(node.args[0], buffer)
        if span is not None and same_shape(node.args[1], *shape(node.args[0])):  # type: ignore[misc]
            return span, node.args[1]
    if is_call(node, "index_copy_") and len(node.args) == 4 and not node.kwargs and node.args[0] is buffer:
        _, dim, positions, x = node.args
        if dim in (2, -2) and isinstance(positions, Node) and isinstance(x, Node):
            return positions, x
    if is_call(node, operator.setitem) and node.args[0] is buffer:
        _, index, x = node.args
        if isinstance(index, tuple) and len(index) in (3, 4) and isinstance(x, Node):
            ok = index[0] == FULL and index[1] == FULL and all(i == FULL for i in index[3:])
            p = index[2]
            v = value(p)
            if ok and isinstance(p, slice) and (span := _span(p, shape(x))) is not None:
                return span, x
            if ok and isinstance(p, Node) and isinstance(v, torch.Tensor) and v.dtype == torch.int64 and v.dim() == 1:
                return p, x
    name = getattr(node.target, "__name__", node.target)
    raise Decline(f"`{name}` writes to {source(buffer) or buffer.name} in a way that is no append of tokens")


def _part(view: Any, buffer: Node) -> Span | None:
    """The tokens of `buffer[:, :, a:b]` or `buffer.narrow(2, a, n)`."""
    if is_call(view, operator.getitem) and view.args[0] is buffer and isinstance(view.args[1], tuple):
        index = view.args[1]
        if len(index) in (3, 4) and all(i == FULL for i in (*index[:2], *index[3:])) and isinstance(index[2], slice):
            return _span(index[2], shape(view))
    if is_call(view, "narrow", torch.narrow) and view.args[0] is buffer and len(view.args) == 4:
        _, dim, first, n = view.args
        if dim in (2, -2) and _not_negative(first) and same(value(n), (shape(view) or (0, 0, None))[2]):
            return Span(first)
    return None


def _span(cut: slice, s: tuple | None) -> Span | None:
    """The positions that `cut` takes, if it takes as many as a tensor of shape `s` has tokens."""
    first = 0 if cut.start is None else cut.start
    if cut.step not in (None, 1) or cut.stop is None or not _not_negative(first) or not s or len(s) != 4:
        return None
    return Span(first) if same(value(cut.stop) - value(first), s[2]) else None


def _not_negative(first: Any) -> bool:
    v = value(first)
    return isinstance(v, (int, torch.SymInt)) and not isinstance(v, bool) and bool(v >= 0)  # a guard, if it is a symbol


def consecutive(positions: Node) -> bool:
    """Whether `positions` is `arange(n) + scalar`, so that only its first value is not known."""
    if not is_call(positions, operator.add, torch.add, "add") or len(positions.args) != 2 or positions.kwargs:
        return False
    a, b = positions.args
    if is_call(b, torch.arange):
        a, b = b, a
    if not is_call(a, torch.arange) or len(a.args) != 1 or set(a.kwargs) - {"device", "dtype"}:
        return False
    return isinstance(b, int) or same(len(shape(b) if shape(b) is not None else (0,)), 0)


def read_concat(node: Node) -> Concat:
    """`cat([past, x], dim=-2)` of 4-D tensors."""
    args = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
    tensors, dim = args.get("tensors"), args.get("dim", 0)
    if not isinstance(tensors, (list, tuple)) or len(tensors) != 2 or dim not in (2, -2) or len(shape(node) or ()) != 4:
        raise Decline(f"`cat` of {node} does not append tokens to a cache")
    past, x = tensors
    if not isinstance(past, Node) or not isinstance(x, Node) or len(shape(x) or ()) != 4:
        raise Decline(f"`cat` of {node} does not append tokens to a cache")
    v = value(past)
    if value(x).dtype != value(node).dtype:
        raise Decline(f"`cat` of {v.dtype} and {value(x).dtype}")
    if isinstance(v, torch.Tensor) and v.dim() == 1 and same(v.numel(), 0):
        return Concat(node, None, x, ())
    if past.op != "placeholder":
        name = getattr(past.target, "__name__", past.target)
        raise Decline(f"the cache that {node} extends comes from `{name}`, not from the caller")
    if v.dtype != value(node).dtype:
        raise Decline(f"`cat` of {v.dtype} and {value(x).dtype}")
    if getattr(v, "static", False):
        raise Decline(f"{source(past)} is a cache of fixed length, and `cat` makes a longer one of it")
    return Concat(node, past, x, tuple(u for u in past.users if is_call(u, *SIZES)))


def check_window(c: Concat) -> None:
    """A cache that was a sliding window until now goes on as one: its arena holds tokens from before."""
    if c.kept is None and getattr(value(c.past), "window", False):
        raise Decline(f"{source(c.past)} is a sliding window, and here all of it is kept")  # type: ignore[arg-type]


def read_sizes(node: Node) -> list[Node]:
    """A read of sizes, after the reads of its elements where it is a tuple of them."""
    if not isinstance(value(node), torch.Size):
        return [node]
    return [*(u for u in node.users if is_call(u, operator.getitem) and isinstance(u.args[1], int)), node]


def size_value(size: Any, placeholders: list[Node]) -> Any:
    """A size of a cache tensor, or of a node that reads it: a constant, or the input of its symbol."""
    v = value(size)
    if isinstance(v, (int, bool)):
        return v
    if isinstance(v, torch.SymInt):
        if v.node.expr.is_number:
            return int(v)
        for p in placeholders:
            s = value(p)
            if isinstance(s, torch.SymInt) and s.node.expr == v.node.expr:
                return p
    raise Decline(f"the size {v} of a cache is used, and is no input of the graph")


def size_of(cache: Node, placeholders: list[Node]) -> int | Node:
    """The number of tokens of a cache tensor: a constant, or the input of its symbol."""
    return size_value(shape(cache)[2], placeholders)  # type: ignore[index]
