"""What may share memory with what in a Dynamo graph, decided from the operators: in doubt, it does."""

from __future__ import annotations

import torch
from torch.fx import Node

# operators whose result never shares memory with an input, by name: of all others it is assumed
_NEW_MEMORY = (
    "new_empty new_zeros new_ones new_full new_tensor zeros empty ones full arange zeros_like empty_like ones_like "
    "full_like roll linear matmul bmm baddbmm softmax scaled_dot_product_attention add sub mul truediv div neg cat "
    "concat stack clone repeat repeat_interleave index_select gather where exp pow rsqrt sigmoid tanh logsumexp "
    "embedding cumsum topk layer_norm rms_norm silu gelu eq ne lt le gt ge"
)
NEW_MEMORY = frozenset(_NEW_MEMORY.split())


def name(node: Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def target(mutation: Node) -> Node:
    """What an in-place operator writes to."""
    out = mutation.kwargs.get("out")
    return out if isinstance(out, Node) else mutation.all_input_nodes[0]


def root(node: Node) -> Node:
    """The memory that a view is a view of, as far back as first inputs lead."""
    while node.op != "placeholder" and name(node) not in NEW_MEMORY and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def leads_to(node: Node, caches: set[Node]) -> bool:
    """Whether `node` may share memory with one of `caches`."""
    stack, seen = [node], set()
    while stack:
        n = stack.pop()
        if n in caches:
            return True
        if n in seen or n.op == "placeholder" or name(n) in NEW_MEMORY:
            continue
        seen.add(n)
        stack += n.all_input_nodes
    return False


def opaque(node: Node) -> bool:
    """Whether a node calls something that may write to its inputs without its name saying so."""
    if node.op == "call_module":
        return True
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return "flex_attention" not in name(node)
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return any(getattr(node.target, o)._schema.is_mutable for o in node.target.overloads())
    return False


def memory(node: Node) -> set[Node]:
    """Where the memory of `node` may come from: operators that make new memory, and placeholders."""
    found, stack, seen = set(), [node], set()
    while stack:
        n = stack.pop()
        if n in seen:
            continue
        seen.add(n)
        if n.op == "placeholder" or name(n) in NEW_MEMORY or not n.all_input_nodes:
            found.add(n)
        else:
            stack += n.all_input_nodes
    return found
