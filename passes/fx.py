"""Small questions about FX nodes, answered in one place."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true


def value(node: Any) -> Any:
    """The fake value of a node (or the constant itself)."""
    return node.meta.get("example_value") if isinstance(node, Node) else node


def constant(x: Any) -> int | float | None:
    """A number, or what a symbol stands for, which a guard then keeps; None where it is neither."""
    v = value(x)
    if isinstance(v, torch.SymFloat):
        return float(v) if not free_unbacked_symbols(v) else None
    if isinstance(v, torch.SymInt):
        return int(v) if not free_unbacked_symbols(v) else None
    return v if isinstance(v, (int, float)) and not isinstance(v, bool) else None


def hint(size: int | torch.SymInt) -> int | None:
    """A size, or what a symbol stands for at present, None where that is not known; asking so adds no guard."""
    return size if isinstance(size, int) else size.node.hint


def shape(node: Any) -> tuple | None:
    v = value(node)
    return tuple(v.shape) if isinstance(v, Tensor) else None


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every input that reaches this graph."""
    return a is not None and b is not None and statically_known_true(a == b)


def same_shape(node: Any, *sizes: Any) -> bool:
    s = shape(node)
    return s is not None and len(s) == len(sizes) and all(same(x, y) for x, y in zip(s, sizes, strict=True))


def is_call(node: Any, *names: Any) -> bool:
    """Whether a node calls one of these functions, or one of these methods given by name."""
    return isinstance(node, Node) and node.op in ("call_function", "call_method") and node.target in names


def bind(node: Node, signature: inspect.Signature) -> dict[str, Any] | None:
    """All arguments by name with defaults filled in, or None if they do not fit: nothing stays unmentioned."""
    try:
        bound = signature.bind(*node.args, **node.kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    return bound.arguments


def signature(text: str) -> inspect.Signature:
    """The signature written as `(a, b=None, *, c=1)`."""
    scope: dict[str, Any] = {}
    exec(f"def f{text}: pass", scope)  # a literal of ours, at import
    return inspect.signature(scope["f"])


def source(node: Node) -> str:
    """The name by which the caller reaches a placeholder: `L['past_key_values'].layers[0].keys`."""
    found = getattr(node, "_dynamo_source", None)
    name = getattr(found, "name", "")
    return name() if callable(name) else name


def where(node: Node) -> str:
    """The user's line that made this node, `folder/file.py:12 in forward`: its last frame."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    file, line, function = frames[-1]
    return f"{'/'.join(file.split('/')[-2:])}:{line} in {function}"


def module_layer(node: Node) -> int | None:
    """The number of the innermost numbered module that encloses a node."""
    stack = node.meta.get("nn_module_stack") or {}
    numbers = [int(m) for path, _ in stack.values() for m in re.findall(r"(?:\.|\[|_modules\['?)(\d+)", str(path))[-1:]]
    return numbers[-1] if numbers else None


def output(graph: Graph) -> Node:
    return next(iter(graph.find_nodes(op="output")))


def order(graph: Graph) -> dict[Node, int]:
    return {n: i for i, n in enumerate(graph.nodes)}


def copy_meta(new: Node, old: Node, fake: Any = None) -> None:
    """Only the value and the stack trace: other entries describe the old op."""
    for key in ("stack_trace", "nn_module_stack"):
        if key in old.meta:
            new.meta[key] = old.meta[key]
    if fake is not None:
        new.meta["example_value"] = fake


def erase_unused(graph: Graph, nodes: list[Node]) -> None:
    """Erase these nodes if unused, then their inputs that become unused; never a placeholder or a mutation.

    `eliminate_dead_code` would drop in-place calls without users, on which the program's meaning hangs.
    """
    stack = list(nodes)
    while stack:
        n = stack.pop()
        if n._erased or n.users or n.op in ("placeholder", "output") or writes(n) or is_call(n, *_EFFECTS):
            continue
        inputs = list(n.all_input_nodes)
        graph.erase_node(n)
        stack += inputs


_EFFECTS = tuple(
    getattr(torch, name) for name in ("_assert_async", "_assert_scalar", "_check", "_assert") if hasattr(torch, name)
)
_IN_PLACE = frozenset(
    "i" + n for n in re.findall(r"\w+", "add and concat floordiv lshift matmul mod mul or pow rshift sub truediv xor")
)
_KNOWN_MODULES = ("torch", "operator", "_operator", "builtins", "math")


def writes(node: Node) -> tuple[Node, ...]:
    """The tensors that a node may write to, decided from its operator: all that it takes, where that is not known."""
    if node.op == "call_module":
        return tuple(node.all_input_nodes)
    if node.op == "call_method":
        return _nodes(node.args[:1] if _in_place(str(node.target)) else (), node.kwargs.get("out"))
    if node.op != "call_function":
        return ()
    f: Any = node.target
    if isinstance(f, torch._ops.OpOverload):
        return _written_by_schema(node, f._schema)
    if isinstance(f, torch._ops.OpOverloadPacket):
        mutable = any(getattr(f, o)._schema.is_mutable for o in f.overloads())
        return tuple(node.all_input_nodes) if mutable else ()
    name = getattr(f, "__name__", str(f))
    if isinstance(f, torch._ops.HigherOrderOperator):
        return () if "flex_attention" in name else tuple(node.all_input_nodes)
    if (getattr(f, "__module__", None) or "torch").split(".")[0] not in _KNOWN_MODULES:
        return tuple(node.all_input_nodes)
    return _nodes(node.args[:1] if _in_place(name) or _inplace(node) else (), node.kwargs.get("out"))


def _in_place(name: str) -> bool:
    bare = name.strip("_")
    return bare == "setitem" or bare in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def _nodes(*values: Any) -> tuple[Node, ...]:
    return tuple(x for x in torch.utils._pytree.tree_leaves(values) if isinstance(x, Node))


def _inplace(node: Node) -> bool:
    """Whether a function is called with `inplace=True`, by keyword or by position."""
    if True not in (*node.args, *node.kwargs.values()):
        return False
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin without a signature: none has `inplace`
        return bool(node.kwargs.get("inplace"))
    return bool(bound.arguments.get("inplace"))


def _written_by_schema(node: Node, schema: Any) -> tuple[Node, ...]:
    names = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
    return _nodes([x for name, x in given.items() if name in names])


def tensor_dtype(t: torch.dtype) -> str:
    return str(t).removeprefix("torch.")


def duplicate(gm: GraphModule) -> GraphModule:
    """A copy of a Dynamo graph that may be rewritten; attributes and fake values are shared."""
    graph = Graph()
    mapping: dict[Node, Node] = {}
    result = graph.graph_copy(gm.graph, mapping, return_output_node=True)
    assert result is not None
    out = graph.output(result[0])
    out.meta = dict(result[1].meta)
    for old, new in mapping.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    copy = GraphModule(gm, graph)
    # AOTAutograd looks for these to know that the graph is Dynamo's, and then which inputs are static
    copy.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        copy._param_name_to_source = gm._param_name_to_source
    return copy
