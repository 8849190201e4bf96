"""Finding attention: each spelling is read into one record with every attribute explicit.

Two spellings: `scaled_dot_product_attention`, and softmax written by hand as
`matmul(softmax(capped(matmul(q, k^T) * scale) + mask), v)`, whose scores may be joined by one more per query head, a
sink, that takes its share of the softmax and has no value. What a spelling says that the record cannot express is a
reason to decline, never to ignore.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from kvc_compile.passes.fx import bind, constant, is_call, same, shape, signature, value

SDPA = {F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention}
_SDPA = signature(
    "(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False)"
)
SOFTMAX = {torch.softmax, F.softmax, torch.nn.functional.softmax, "softmax"}
_SOFTMAX_ARGS = signature("(input, dim=None, _stacklevel=3, dtype=None)")
_SOFTMAX_METHOD = signature("(input, dim=None, dtype=None)")
MATMUL = {torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm"}
PRODUCTS = MATMUL | {torch.baddbmm, torch.einsum, "baddbmm"}
PRODUCT = {operator.mul, torch.mul, "mul"}
PRODUCT_OR_QUOTIENT = PRODUCT | {operator.truediv, torch.div, "div"}
_WHOLE_MODULES = ("multi_head_attention_forward", "_native_multi_head_attention")
_DROPOUT = signature("(input, p=0.5, training=True, inplace=False)")


@dataclass(frozen=True)
class Attention:
    """softmax(capped(q k^T * scale) + mask) v.  q [B, query heads, n, Dk]; k and v are the operands as attention sees
    them."""

    node: Node  # whose value is the attention's output [B, query heads, n, Dv]
    pattern: str
    q: Node
    k: Node
    v: Node
    mask: Node | None
    causal: bool  # lower triangle from the top left, as SDPA's is_causal
    scale: float
    broadcast_heads: bool  # k and v may have fewer heads than q, each serving consecutive query heads
    inner: tuple[Node, ...]  # nodes of the pattern other than `node`
    cap: float = 0.0  # capped(s) = cap * tanh(s / cap); 0: as it is
    sinks: Node | None = None  # [query heads]: a score of each that takes its share of the softmax and has no value


@dataclass(frozen=True)
class NotAttention:
    """A node that looks like attention, and why it is none that can be rewritten."""

    node: Node
    reason: str


def find_attention(graph: Graph) -> list[Attention | NotAttention]:
    """Every attention of the graph, in order."""
    found: list[Attention | NotAttention] = []
    for node in graph.nodes:
        if is_call(node, *SDPA):
            found.append(read_sdpa(node))
        elif is_call(node, *SOFTMAX):
            match = read_softmax(node)
            if match is not None:
                found.append(match)
        elif node.op == "call_function" and "flex_attention" in str(getattr(node.target, "__name__", node.target)):
            found.append(NotAttention(node, "flex_attention is not supported yet; use attn_implementation='sdpa'"))
        elif getattr(node.target, "__name__", "") in _WHOLE_MODULES:
            found.append(NotAttention(node, "torch.nn.MultiheadAttention has no cache to compress"))
    return found


def read_sdpa(node: Node) -> Attention | NotAttention:
    a = bind(node, _SDPA)
    if a is None:
        return NotAttention(node, "arguments of scaled_dot_product_attention that are not known here")
    q, k, v, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    if a["dropout_p"] != 0.0:
        return NotAttention(node, f"dropout of {a['dropout_p']} in attention: put the model in eval mode")
    if any(len(shape(x) or ()) != 4 for x in (q, k, v)):
        return NotAttention(node, "attention over tensors that are not [batch, heads, tokens, channels]")
    scale = a["scale"]
    if scale is None:
        scale = 1 / math.sqrt(shape(q)[3])  # type: ignore[index]
    if (scale := constant(scale)) is None:
        return NotAttention(node, "a scale that is not a constant")
    return Attention(node, "sdpa", q, k, v, mask, bool(a["is_causal"]), float(scale), bool(a["enable_gqa"]), ())


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_mask(node: Any, scores: Node) -> bool:
    """Whether a tensor can be a mask added to the scores: it has no more elements than they, over the same keys."""
    s, m = shape(scores), shape(node)
    v = value(node)
    return bool(s and m and len(m) <= 4 and same(m[-1], s[-1]) and v.dtype.is_floating_point)


def read_softmax(node: Node) -> Attention | NotAttention | None:
    """Read hand-written attention around a softmax; None where it has no matrix product on both sides (a router, a
    sampler)."""
    found = _read_softmax(node)
    if found is None and product(node, up=True) and product(node, up=False):
        return NotAttention(node, "a softmax between two matrix products, in a form that is not known here")
    return found


def product(node: Node, up: bool) -> bool:
    """Whether a matrix product of two activations comes before (or after) `node`, with no projection in between."""
    stack = [node]
    for _ in range(24):
        stack = list(dict.fromkeys(x for n in stack for x in (n.all_input_nodes if up else n.users)))
        stack = [n for n in stack if len(shape(n) or ()) >= 3 and not is_call(n, F.linear, torch._C._nn.linear)]
        if any(is_call(n, *PRODUCTS) for n in stack):
            return True
        stack = [n for n in stack if not is_call(n, *SDPA, *SOFTMAX)]
    return False


def _read_softmax(node: Node) -> Attention | NotAttention | None:
    a = bind(node, _SOFTMAX_METHOD if node.target == "softmax" else _SOFTMAX_ARGS)
    if a is None or a["dim"] not in (-1, 3) or len(shape(node) or ()) != 4:
        return None
    s, shift = _less_the_largest(a["input"])
    s, joined, sinks = _sinks(s, node)
    # down: softmax [-> without the sink] -> to -> dropout -> matmul(p, v)
    inner: list[Node] = [node]
    p = node
    if sinks is not None:
        p = next(iter(node.users))
        inner.append(p)
    while True:
        user = _only_user(p)
        if user is None:
            if any(is_call(u, *MATMUL) and u.args[0] is p for u in p.users):
                return NotAttention(node, "the attention weights are used elsewhere (output_attentions?)")
            return None
        if is_call(user, *MATMUL) and user.args[0] is p:
            out, v = user, user.args[1]
            break
        if is_call(user, F.dropout) and user.args[0] is p:
            d = bind(user, _DROPOUT)
            if d is None or (d["p"] != 0.0 and d["training"]):
                return NotAttention(node, "dropout in attention: put the model in eval mode")
        elif not (is_call(user, "to", "type_as", "float") and user.args[0] is p):
            return None
        inner.append(user)
        p = user
    rounded = {value(n).dtype for n in inner if torch.promote_types(value(n).dtype, value(out).dtype) != value(n).dtype}
    if rounded:
        return NotAttention(node, f"the attention weights are rounded to {rounded.pop()}")
    inner += [*shift, *joined]
    # up: scores = capped(matmul(q, k^T) [* scale]) [+ mask]
    mask: Node | None = None
    scale = 1.0
    if is_call(s, operator.add, torch.add, "add") and len(s.args) == 2 and not s.kwargs:
        left, right = s.args
        if not isinstance(left, Node) or not isinstance(right, Node):
            return NotAttention(node, "a constant is added to the scores")
        if not _is_mask(right, left):
            return NotAttention(node, f"{right} is added to the scores and is not a floating-point mask over the keys")
        inner.append(s)
        s, mask = left, right
        if len(inner[-1].args[0].users) != 1:  # type: ignore[union-attr]
            return NotAttention(node, "the scores are used elsewhere")
    s, cap, inside = _cap(s)
    inner += inside
    if (factor := _factor(s)) is not None:
        if len(s.users) != 1:
            return NotAttention(node, "the scores are used elsewhere")
        scale = factor
        inner.append(s)
        s = s.args[0]  # type: ignore[assignment]
    elif is_call(s, *PRODUCT_OR_QUOTIENT):
        return NotAttention(node, "the scores are multiplied by something that is not a constant")
    if not is_call(s, *MATMUL) or len(s.users) != 1:
        what = getattr(s.target, "__name__", s.target) if isinstance(s, Node) else s
        return NotAttention(node, f"the scores come from `{what}`, not from query x key")
    inner.append(s)
    q, k = s.args[:2]
    if any(len(shape(x) or ()) != 4 for x in (q, k, v)):
        return NotAttention(node, "attention over tensors that are not [batch, heads, tokens, channels]")
    return Attention(out, "softmax", q, k, v, mask, False, scale, False, tuple(inner), cap, sinks)


def _factor(s: Any) -> float | None:
    """f for `s = x * f` or `s = x / (1 / f)` with a constant f."""
    if not is_call(s, *PRODUCT_OR_QUOTIENT) or len(s.args) != 2 or s.kwargs:
        return None
    f = constant(s.args[1])
    if not f:
        return None
    return float(f) if s.target in PRODUCT else 1 / float(f)


def _cap(s: Any) -> tuple[Any, float, list[Node]]:
    """(x, cap, nodes) of `s = tanh(x / cap) * cap`; (s, 0, []) if it is none."""
    cap = _factor(s)
    if cap is None or not is_call(s.args[0], torch.tanh, F.tanh, "tanh") or cap <= 0:
        return s, 0.0, []
    tanh = s.args[0]
    inside = tanh.args[0] if len(tanh.args) == 1 and not tanh.kwargs else None
    shrink = _factor(inside)
    if shrink is None or not math.isclose(shrink * cap, 1.0, rel_tol=1e-6):
        return s, 0.0, []
    nodes = [s, tanh, inside]
    if any(len(n.users) != 1 for n in nodes):
        return s, 0.0, []
    return inside.args[0], cap, nodes


def _less_the_largest(s: Any) -> tuple[Any, list[Node]]:
    """(x, nodes) of `s = x - x.max(-1, keepdim=True).values`, which no softmax notices; (s, []) if it is none."""
    nothing: tuple[Any, list[Node]] = s, []
    if not is_call(s, operator.sub, torch.sub, "sub") or len(s.args) != 2 or s.kwargs or len(s.users) != 1:
        return nothing
    x, most = s.args
    if not isinstance(x, Node) or not is_call(most, operator.getitem, getattr) or most.args[1] not in (0, "values"):
        return nothing
    largest = most.args[0]
    if not is_call(largest, torch.max, "max"):
        return nothing
    bound = dict(zip(("input", "dim", "keepdim"), largest.args, strict=False)) | largest.kwargs
    if bound["input"] is not x or bound.get("dim") not in (-1, 3) or bound.get("keepdim") is not True:
        return nothing
    alone = len(most.users) == len(largest.users) == 1 and set(x.users) == {s, largest}
    return (x, [s, most, largest]) if alone else nothing


def _sinks(joined: Any, softmax: Node) -> tuple[Any, list[Node], Node | None]:
    """(scores, nodes, sinks) of `softmax(cat([scores, sinks], -1))[..., :-1]`, where sinks [query heads] are spread
    over rows; (joined, [], None) if it is none."""
    nothing: tuple[Any, list[Node], None] = joined, [], None
    cut = _only_user(softmax)
    if not is_call(cut, operator.getitem) or cut.args[1] != (Ellipsis, slice(None, -1, None)):  # type: ignore[union-attr]
        return nothing
    if not is_call(joined, torch.cat):
        return nothing
    bound = dict(zip(("tensors", "dim"), joined.args, strict=False)) | joined.kwargs
    if len(bound["tensors"]) != 2 or bound.get("dim") not in (-1, 3):
        return nothing
    scores, spread = bound["tensors"]
    rows, column = shape(scores), shape(spread)
    if rows is None or column is None or len(rows) != 4 or not same(column[3], 1) or len(scores.users) != 1:
        return nothing
    views, sinks = _spread(spread, rows[1])
    return (scores, [joined, *views], sinks) if sinks is not None else nothing


def _spread(x: Node, heads: object) -> tuple[list[Node], Node | None]:
    """The views through which x [B, heads, n, 1] repeats a tensor [heads] over B and n, and that tensor."""
    views = [x]
    if is_call(x, "expand"):
        x = x.args[0]  # type: ignore[assignment]
        views.append(x)
    if not is_call(x, "reshape", "view", torch.reshape) or shape(x) != (1, heads, 1, 1):
        return [], None
    sinks = x.args[0]
    return (views, sinks) if isinstance(sinks, Node) and shape(sinks) == (heads,) else ([], None)
