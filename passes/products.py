"""Linear layers of a decode step become kvc::products: most of a step's time is the reading of weights."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kvc_compile.lowering.products import MOST_WEIGHTS, takes
from kvc_compile.passes.alias import Writers
from kvc_compile.passes.fx import copy_meta, hint, value

LINEAR = (torch.nn.functional.linear, torch._C._nn.linear)


def fuse_products(graph: Graph) -> int:
    """Replace the linear layers of a few rows without a bias on a GPU, those of the same input together, where nothing
    between them writes to it; how many were. Nothing under autocast or with gradients."""
    names = " ".join(str(node.target) for node in graph.nodes)
    if torch.is_autocast_enabled("cuda") or torch.is_grad_enabled() or "autocast" in names or "grad_enabled" in names:
        return 0
    writers, groups = Writers(graph), list[list[Node]]()
    for node in graph.nodes:
        if not thin(node):
            continue
        near = (g for g in groups if g[0].args[0] is node.args[0] and len(g) < MOST_WEIGHTS)
        group = next((g for g in near if not writers.between(g[0], node, *node.args[:2])), None)
        if group is None:
            groups.append([node])
        else:
            group.append(node)
    for group in groups:
        x, weights = group[0].args[0], [node.args[1] for node in group]
        with graph.inserting_before(group[0]):
            made = graph.call_function(torch.ops.kvc.products.default, (x, weights))
            made.meta["example_value"] = [value(node) for node in group]
            parts = [graph.call_function(operator.getitem, (made, n)) for n in range(len(group))]
        for node, part in zip(group, parts, strict=True):
            copy_meta(part, node)
            part.meta["example_value"] = value(node)
            node.replace_all_uses_with(part)
            graph.erase_node(node)
    return sum(map(len, groups))


def thin(node: Node) -> bool:
    """Whether it is a linear layer that the kernel takes, by the rows that it has now."""
    if node.op != "call_function" or node.target not in LINEAR or node.kwargs or len(node.args) > 3:
        return False
    x, w = value(node.args[0]), value(node.args[1])
    if len(node.args) == 3 and node.args[2] is not None:
        return False
    if not isinstance(node.args[1], Node) or node.args[1].op != "placeholder":
        return False
    if not (isinstance(x, Tensor) and isinstance(w, Tensor) and x.is_cuda and w.is_cuda and x.dtype == w.dtype):
        return False
    if is_traceable_wrapper_subclass(w) or w.dim() != 2 or x.dim() < 1 or not all(isinstance(n, int) for n in w.shape):
        return False
    return takes(math.prod(hint(n) or 0 for n in x.shape[:-1]), w)
