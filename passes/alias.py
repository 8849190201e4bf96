"""What may share memory with what in a Dynamo graph, decided from the operators: in doubt, it does."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import Any

from torch.fx import Graph, Node

from kvc_compile.passes.fx import writes

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


def makes_memory(node: Node) -> bool:
    """Whether the result of `node` shares memory with none of its inputs."""
    return node.op != "placeholder" and name(node) in NEW_MEMORY and not writes(node)


def root(node: Node) -> Node:
    """The memory that a view is a view of, as far back as first inputs lead."""
    while node.op != "placeholder" and not makes_memory(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def leads_to(node: Node, caches: set[Node]) -> bool:
    """Whether `node` may share memory with one of `caches`."""
    stack, seen = [node], set()
    while stack:
        n = stack.pop()
        if n in caches:
            return True
        if n in seen or n.op == "placeholder" or makes_memory(n):
            continue
        seen.add(n)
        stack += n.all_input_nodes
    return False


def memory(node: Node) -> set[Node]:
    """Where the memory of `node` may come from: operators that make new memory, and placeholders."""
    found, stack, seen = set(), [node], set()
    while stack:
        n = stack.pop()
        if n in seen:
            continue
        seen.add(n)
        if n.op == "placeholder" or makes_memory(n) or not n.all_input_nodes:
            found.add(n)
        else:
            stack += n.all_input_nodes
    return found


class Writers:
    """The nodes of a graph that may write in place, in order, as they were when this was made."""

    def __init__(self, graph: Graph):
        self.writes = {n: w for n in graph.nodes if (w := writes(n))}
        self.nodes = list(self.writes)

    def between(self, first: Node, last: Node, *read: Any, but: Iterable[Node] = ()) -> Node | None:
        """One after `first`, before `last` and none of `but` that may write to the memory of one of `read`."""
        ours = {m for r in read if isinstance(r, Node) for m in memory(r)}
        for n in self.nodes[bisect_right(self.nodes, first) : bisect_left(self.nodes, last)]:
            if n not in but and any(memory(w) & ours for w in self.writes[n]):
                return n
        return None
