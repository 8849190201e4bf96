"""Walking back from an operand of attention to the cache tensor it views.

One table of view ops. Each step proves, from the shapes, that the operand is the whole cache tensor with its heads
repeated in place (`repeat_kv`, `repeat_interleave`), its last two dimensions exchanged, or cut to its first tokens;
anything else ends the walk.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from kvc_compile.passes.fx import is_call, same, same_shape, shape, value

FULL = slice(None, None, None)


@dataclass(frozen=True)
class Peeled:
    """`source` seen through views: heads repeated `groups` times each, dims -1 and -2 exchanged or not, and only its
    first `window` tokens (a number or a node) where that is not None."""

    source: Node
    groups: int
    transposed: bool
    path: tuple[Node, ...]  # from the operand down, without the source
    window: Any = None


def dims(node: Node, first: int) -> tuple:
    """The integer arguments of a call from position `first`, spread or as one tuple; negatives as they are."""
    rest = node.args[first:]
    if len(rest) == 1 and isinstance(rest[0], (tuple, list, torch.Size)):
        rest = tuple(rest[0])
    return tuple(rest)


def _transpose(node: Node) -> bool:
    if is_call(node, "transpose", torch.transpose, "swapaxes", torch.swapaxes) and len(node.args) == 3:
        return not node.kwargs and {d % 4 for d in node.args[1:] if isinstance(d, int)} == {2, 3}
    if is_call(node, "permute", torch.permute):
        return dims(node, 1) in ((0, 1, 3, 2), (0, 1, -1, -2))
    return is_call(node, getattr) and node.args[1:] == ("mT",)


def _same_values(node: Node) -> bool:
    """Ops that return their input's values in the same shape and dtype."""
    if is_call(node, "contiguous", "detach", "clone"):
        return True
    if is_call(node, "to", "type_as", "float", "half", "bfloat16"):
        a, b = value(node.args[0]), value(node)
        return isinstance(a, torch.Tensor) and a.dtype == b.dtype and a.device == b.device
    if is_call(node, operator.getitem):
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return all(i == FULL or i is Ellipsis for i in index)
    return False


def _first_tokens(node: Node) -> Any:
    """n for `x[:, :, :n]` or `x[:, :, :n, :]`, else None."""
    if is_call(node, operator.getitem) and isinstance(node.args[1], tuple) and len(node.args[1]) in (3, 4):
        index = node.args[1]
        cut = index[2]
        whole = all(i == FULL for i in (*index[:2], *index[3:])) and isinstance(cut, slice)
        if whole and cut.start in (None, 0) and cut.step in (None, 1):
            return cut.stop
    return None


def _group_dim(node: Node) -> bool:
    """[B, H, N, D] to [B, H, 1, N, D]."""
    if is_call(node, "unsqueeze", torch.unsqueeze):
        return node.args[1:] in ((2,), (-3,)) and not node.kwargs
    if is_call(node, operator.getitem) and isinstance(node.args[1], tuple):
        index = [i for i in node.args[1] if i is not Ellipsis]
        return index[:3] == [FULL, FULL, None] and all(i == FULL for i in index[3:])
    return False


def _repeat_kv(node: Node) -> tuple[Node, int, tuple[Node, ...]] | None:
    """`x[:, :, None].expand(B, H, G, N, D).reshape(B, H * G, N, D)`: (x, G, the nodes)."""
    if not is_call(node, "reshape", "view", "flatten", torch.reshape, torch.flatten):
        return None
    expand = node.args[0]
    if not isinstance(expand, Node) or not is_call(expand, "expand", "expand_as", torch.Tensor.expand):
        return None
    grouped = expand.args[0]
    if not isinstance(grouped, Node) or not _group_dim(grouped):
        return None
    x = grouped.args[0]
    if not isinstance(x, Node):
        return None
    s = shape(x)
    five = shape(expand)
    if s is None or five is None or len(s) != 4 or len(five) != 5:
        return None
    b, h, n, d = s
    g = five[2]
    if not same_shape(grouped, b, h, 1, n, d) or not same_shape(expand, b, h, g, n, d):
        return None
    if not isinstance(g, int) or not same_shape(node, b, h * g, n, d):
        return None
    return x, g, (node, expand, grouped)


def _repeat_interleave(node: Node) -> tuple[Node, int] | None:
    if not is_call(node, "repeat_interleave", torch.repeat_interleave):
        return None
    names = ("input", "repeats", "dim", "output_size")
    bound = dict(zip(names, node.args, strict=False)) | {{"self": "input"}.get(k, k): v for k, v in node.kwargs.items()}
    x, g = bound.get("input"), bound.get("repeats")
    s = shape(x)
    if not isinstance(x, Node) or not isinstance(g, int) or bound.get("dim") not in (1, -3) or not s or len(s) != 4:
        return None
    return (x, g) if same_shape(node, s[0], s[1] * g, s[2], s[3]) else None


def peel(operand: Node) -> Peeled:
    """Walk back from an operand of attention as far as every step is proved."""
    node: Any = operand
    groups, transposed, window = 1, False, None
    path: list[Node] = []
    while isinstance(node, Node):
        if groups == 1 and (kv := _repeat_kv(node)) is not None:
            node, groups, steps = kv
            path += steps
        elif groups == 1 and (kv2 := _repeat_interleave(node)) is not None:
            path.append(node)
            node, groups = kv2
        elif _transpose(node) and isinstance(node.args[0], Node):
            path.append(node)
            transposed, node = not transposed, node.args[0]
        elif _same_values(node) and isinstance(node.args[0], Node) and same(len(shape(node) or ()), 4):
            path.append(node)
            node = node.args[0]
        elif window is None and not transposed and (cut := _first_tokens(node)) is not None:
            path.append(node)
            window, node = cut, node.args[0]
        else:
            break
    return Peeled(node, groups, transposed, tuple(path), window)
