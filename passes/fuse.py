"""Appends of one token to the keys and to the values of a layer become one operator: one launch instead of two."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from kvc_compile.layout import Layout
from kvc_compile.passes.alias import Writers
from kvc_compile.passes.fx import copy_meta, shape
from kvc_compile.plan import WORD

kvc = torch.ops.kvc  # defined by `lowering.ops`, which the rewrite imports


def fuse_appends(graph: Graph) -> int:
    """Fuse each append of one token to a GPU's arena with the next one, where nothing between the two uses the first
    one's arena or changes what it appends, and both write to the same positions; how many were."""
    appends = list(graph.find_nodes(op="call_function", target=kvc.append.default))
    if not any(worth(node) for node in appends):
        return 0
    fused, first, writers = 0, None, Writers(graph)
    for node in appends:
        if not worth(node):
            first = None
        elif first is not None and together(first, node, writers):
            k, v = first.args, node.args
            reads = list(dict.fromkeys([*k[4], *v[4]]))  # type: ignore[misc]
            with graph.inserting_before(node):
                args = k[0], v[0], k[1], v[1], k[2], k[3], v[3], reads
                copy_meta(graph.call_function(kvc.append_pair.default, args), node)
            graph.erase_node(first)
            graph.erase_node(node)
            fused, first = fused + 1, None
        else:
            first = node
    return fused


def worth(append: Node) -> bool:
    """Whether it is one token's, and a kernel's."""
    return shape(append.args[1])[2] == 1 and Layout.parse(append.args[3]).word == WORD["cuda"]  # type: ignore[index, arg-type]


def together(first: Node, second: Node, writers: Writers) -> bool:
    """Whether `first` may be done where `second` is, in one launch with it."""
    k, v = first.args, second.args
    heads = {Layout.parse(key).heads for key in (k[3], v[3])}  # type: ignore[arg-type]
    if k[0] is v[0] or k[2] is not v[2] or len(heads) > 1 or writers.between(first, second, k[1], k[2]):
        return False
    node = first.next
    while node is not second:
        if k[0] in node.all_input_nodes:
            return False
        node = node.next
    return True
