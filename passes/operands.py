"""What an operand of attention reads: a cache tensor, through views that are proved."""

from __future__ import annotations

import torch
from torch.fx import Node

from kvc_compile.passes.alias import Writers
from kvc_compile.passes.caches import ZEROS, Buffer, Concat, Decline, read_buffer
from kvc_compile.passes.fx import is_call, shape
from kvc_compile.passes.views import Peeled, peel
from kvc_compile.passes.windows import joined_window, read_window, sliding


def trace_operand(operand: Node, transposed: bool, writers: Writers) -> tuple[Peeled, Buffer | Concat]:
    """The cache tensor behind an operand of attention, or `Decline`."""
    peeled = peel(operand)
    node = peeled.source
    if peeled.transposed != transposed:
        raise Decline(f"{operand} is transposed in a way that is not a key's")
    if is_call(node, "index_copy_") and isinstance(node.args[0], Node):  # its result is the buffer itself
        node = node.args[0]
    if not isinstance(node, Node):
        raise Decline(f"{operand} is not a tensor of this graph")
    if is_call(node, torch.cat):
        return peeled, joined_window(node, writers) or sliding(node)
    if node.op == "placeholder" and any(is_call(u, "copy_") and u.args[0] is node for u in node.users):
        c = read_window(node, writers)
        if shape(c.x)[2] != 1:  # type: ignore[index]
            raise Decline(f"{operand} is a window that does not hold all tokens that its queries see")
        return peeled, c
    if node.op == "placeholder" or is_call(node, *ZEROS):
        return peeled, read_buffer(node)
    name = getattr(node.target, "__name__", node.target)
    raise Decline(f"{operand} goes through `{name}`, which is no view of a cache known here")
