"""Sliding windows: a cache that holds the last tokens only.

A static one is a full buffer out of which an append pushes the oldest tokens, by `copy_` of what `roll` or `cat` put
together; of a growing one the graph returns the last tokens of a `cat`.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from kvc_compile.passes.alias import Writers
from kvc_compile.passes.caches import SIZES, Buffer, Concat, Decline, alone_in_memory, read_concat
from kvc_compile.passes.fx import is_call, output, same_shape, shape, source, value, writes
from kvc_compile.passes.views import FULL

NONE: tuple[None, tuple[Node, ...]] = (None, ())


def read_window(node: Node, writers: Writers) -> Buffer:
    """A full window [B, H, W, D] that appending x pushes the oldest tokens out of: `copy_` of the last W tokens of
    itself and x, put together by `roll` for one token and by `cat` for more."""
    alone_in_memory(node)
    what, s = source(node) or node.name, shape(node)
    written = [u for u in node.users if node in writes(u)]
    if len(written) != 1 or not is_call(written[0], "copy_") or len(written[0].args) != 2:
        raise Decline(f"{what} is no window of the last tokens")
    (copy,) = written
    x, views = _rolled_in(copy.args[1], node, copy, writers) or _shifted_in(copy.args[1], node, copy, writers) or NONE
    if x is None or s is None or value(x).dtype != value(node).dtype or not isinstance(shape(x)[2], int):  # type: ignore[index]
        raise Decline(f"`copy_` writes to {what} what is not its last tokens")
    return Buffer(node, False, copy, None, True, x, tuple(u for u in node.users if is_call(u, *SIZES)), views)


def joined_window(node: Node, writers: Writers) -> Buffer | None:
    """The full window that `node`, a `cat` of all its tokens but the first and of new ones, is written back to."""
    tensors = node.args[0] if node.args else node.kwargs.get("tensors")
    old = tensors[0] if isinstance(tensors, (list, tuple)) and tensors else None
    cache = old.args[0] if is_call(old, operator.getitem) else None
    if not isinstance(cache, Node) or cache.op != "placeholder":
        return None
    c = read_window(cache, writers)
    return c if node in c.views else None


def sliding(node: Node) -> Concat:
    """`read_concat`, with the last tokens of it where only these are returned."""
    c, out = read_concat(node), output(node.graph)
    kept = [u for u in node.users if last_tokens(u) and out in u.users]
    return replace(c, kept=kept[0]) if out not in node.users and len(kept) == 1 else c


def _rolled_in(new: Any, cache: Node, copy: Node, writers: Writers) -> tuple[Node, tuple[Node, ...]] | None:
    """x of `new = cache.roll(-1, 2); new[:, :, tensor([-1])] = x`, both before `copy`, and the nodes of that."""
    if not is_call(new, "roll", torch.roll) or new.args[0] is not cache:
        return None
    bound = dict(zip(("input", "shifts", "dims"), new.args, strict=False)) | new.kwargs
    written = [u for u in new.users if new in writes(u)]
    if bound.get("shifts") not in (-1, (-1,)) or bound.get("dims") not in (2, -2, (2,), (-2,)) or len(written) != 1:
        return None
    (write,) = written
    if not is_call(write, operator.setitem) or not write < copy:
        return None
    index, x = write.args[1:]
    if not isinstance(index, tuple) or len(index) not in (3, 4) or not isinstance(x, Node):
        return None
    if writers.between(new, write, new, index[2]) or writers.between(write, copy, new, x):
        return None
    last = is_call(index[2], torch.tensor) and list(index[2].args[0]) == [-1]  # type: ignore[union-attr]
    whole = all(i == FULL for i in (*index[:2], *index[3:]))
    s = shape(cache)
    fits = last and whole and s is not None and same_shape(x, s[0], s[1], 1, s[3])
    return (x, (write, new)) if fits else None


def _shifted_in(new: Any, cache: Node, copy: Node, writers: Writers) -> tuple[Node, tuple[Node, ...]] | None:
    """x of `new = cat([cache[:, :, 1:], x], 2)[:, :, -W:]`, before `copy`, and the nodes of that."""
    s = shape(cache)
    if s is None or not isinstance(new, Node) or last_tokens(new) != s[2] or not is_call(new.args[0], torch.cat):
        return None
    joined = new.args[0]
    args = dict(zip(("tensors", "dim"), joined.args, strict=False)) | joined.kwargs  # type: ignore[union-attr]
    old, x = args["tensors"] if len(args["tensors"]) == 2 else (None, None)
    if args.get("dim") not in (2, -2) or not isinstance(x, Node) or not is_call(old, operator.getitem):
        return None
    index = old.args[1]
    if old.args[0] is not cache or not isinstance(index, tuple) or len(index) not in (3, 4):
        return None
    but_first = index[2] == slice(1, None, None) and all(i == FULL for i in (*index[:2], *index[3:]))
    xs = shape(x)
    if writers.between(joined, copy, joined, x):  # type: ignore[arg-type]
        return None
    fits = but_first and xs is not None and same_shape(x, s[0], s[1], xs[2], s[3])
    return (x, (new, joined, old)) if fits else None  # type: ignore[return-value]


def last_tokens(node: Node) -> int | None:
    """n for `x[:, :, -n:]`, else None."""
    if not is_call(node, operator.getitem) or not isinstance(node.args[1], tuple) or len(node.args[1]) not in (3, 4):
        return None
    index = node.args[1]
    cut = index[2]
    if not isinstance(cut, slice) or cut.stop is not None or cut.step not in (None, 1):
        return None
    if not isinstance(cut.start, int) or cut.start >= 0 or any(i != FULL for i in (*index[:2], *index[3:])):
        return None
    return -cut.start
