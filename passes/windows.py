"""Sliding windows: a cache that holds the last tokens only.

A static one is a full buffer out of which an append pushes the oldest tokens, by `copy_` of what `roll` or `cat` put
together; of a growing one the graph returns the last tokens of a `cat`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from kvc_compile.passes.alias import Writers
from kvc_compile.passes.caches import SIZES, Buffer, Decline, alone_in_memory
from kvc_compile.passes.fx import is_call, same_shape, shape, source, value, writes
from kvc_compile.passes.views import FULL


def read_window(node: Node, writers: Writers) -> Buffer:
    """A full window [B, H, W, D] that appending x pushes the oldest tokens out of: `copy_` of the last W tokens of
    itself and x, put together by `roll` for one token and by `cat` for more."""
    alone_in_memory(node)
    what, s = source(node) or node.name, shape(node)
    written = [u for u in node.users if node in writes(u)]
    if len(written) != 1 or not is_call(written[0], "copy_") or len(written[0].args) != 2:
        raise Decline(f"{what} is no window of the last tokens")
    (copy,) = written
    x = _rolled_in(copy.args[1], node, copy, writers) or _shifted_in(copy.args[1], node, copy, writers)
    if x is None or s is None or value(x).dtype != value(node).dtype or not isinstance(shape(x)[2], int):  # type: ignore[index]
        raise Decline(f"`copy_` writes to {what} what is not its last tokens")
    return Buffer(node, False, copy, None, True, x, tuple(u for u in node.users if is_call(u, *SIZES)))


def _rolled_in(new: Any, cache: Node, copy: Node, writers: Writers) -> Node | None:
    """x of `new = cache.roll(-1, 2); new[:, :, tensor([-1])] = x`, both before `copy`."""
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
    return x if last and whole and s is not None and same_shape(x, s[0], s[1], 1, s[3]) else None


def _shifted_in(new: Any, cache: Node, copy: Node, writers: Writers) -> Node | None:
    """x of `new = cat([cache[:, :, 1:], x], 2)[:, :, -W:]`, before `copy`."""
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
    return x if but_first and xs is not None and same_shape(x, s[0], s[1], xs[2], s[3]) else None


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
