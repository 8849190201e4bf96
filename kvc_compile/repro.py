"""`repro.py` of a dump: a script that rebuilds a captured graph and inputs like its own, and runs it three ways.

A Dynamo graph takes its parameters as placeholders, so the graph's text, shapes and dtypes are all there is to it.
Values are random, with these exceptions, which the graph's meaning hangs on: numbers and tensors of one integer
(positions, lengths) are the ones of the run, masks are those of the run where they are triangles or prefixes, caches
hold as many tokens as they did.
"""

from __future__ import annotations

import pprint
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from kvc_compile.handle import CacheHandle
from kvc_compile.kernels import reference

KNOWN = {"inf", "nan", "NoneType", "torch", "device", "fx_pytree", "pytree", "kvc_compile_handle_CacheHandle"}


def repro(graph: str, captured: str, gm: GraphModule, example_inputs: Sequence[Any], spec: dict[str, Any]) -> str:
    """The text of the script."""
    placeholders = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    given = [*example_inputs, *[None] * (len(placeholders) - len(example_inputs))]
    inputs = [f"        {value_of(n, x)},  # {n}" for n, x in zip(placeholders, given, strict=True)]
    names = gm.graph.python_code("self").globals
    imports = {name: import_of(name, names[name]) for name in sorted(set(names) - KNOWN)}
    lacks = [name for name, line in imports.items() if line is None]
    lacks += sorted({f"self.{n.target}" for n in gm.graph.nodes if n.op in ("get_attr", "call_module")})
    warning = ""
    if lacks:
        warning = f"\n# NOT SELF-CONTAINED: the graph uses {', '.join(lacks)}; define them before running this.\n"
    text = TEMPLATE.replace("@GRAPH@", graph).replace("@WARNING@", warning)
    text = text.replace("@IMPORTS@\n", "".join(f"{line}\n" for line in imports.values() if line))
    # torch's own telemetry, on which Dynamo would break the graph when it reads the script
    captured = re.sub(r"^ *\w+ = torch\._C\._log_api_usage_once\(.*\n", "", captured, flags=re.M)
    captured = re.sub(r"\btorch\.sym_(sum|max|min)\(", r"\1(", captured)  # sizes are plain numbers there
    text = text.replace("@SPEC@", pprint.pformat(spec, sort_dicts=False, width=110))
    return text.replace("@INPUTS@", "\n".join(inputs)).replace("@CAPTURED@", captured.rstrip())


def import_of(name: str, x: Any) -> str | None:
    """The line that makes a global of the graph's code, or None if it is not importable."""
    module, attribute = getattr(x, "__module__", None), getattr(x, "__qualname__", None)
    if not module or not attribute or not attribute.isidentifier():
        return None
    return (
        f"from {module} import {attribute} as {name}"
        if getattr(sys.modules.get(module), attribute, None) is x
        else None
    )


def value_of(name: str, x: Any) -> str:
    """The expression that makes an input like `x`."""
    if isinstance(x, torch.SymInt):
        hint = getattr(x.node, "hint", None)
        return repr(int(hint)) if hint is not None else "2"
    if isinstance(x, CacheHandle):
        header = reference.views(x.arena, x.stored).header[0, 0]  # as if none had been evicted
        length = int(header[reference.LENGTH] + header[reference.EVICTED])
        return f"handle({tuple(x.shape)}, {length}, {x.layout_key!r}, {x.static}, {str(x.device)!r})"
    if isinstance(x, Tensor):
        about = f"{tuple(x.shape)}, {x.stride()}, {x.dtype}, {str(x.device)!r}"
        lengths = prefixes(name, x)
        if lengths is not None:
            return f"mask({about}, {lengths}, {float(x.min()) if x.is_floating_point() else 0})"
        if not x.is_floating_point() and x.numel() == 1:
            return f"torch.full({tuple(x.shape)}, {x.item()}, dtype={x.dtype}, device={str(x.device)!r})"
        if not x.is_floating_point():
            return f"whole({about}, {'mask' in name})"
        return f"real({about})"
    if x is None or isinstance(x, (int, float, bool)):
        return repr(x)
    return f"None  # was a {type(x).__name__}, which a script cannot make"


def prefixes(name: str, x: Tensor) -> int | list[int] | None:
    """If x is a mask that lets each query see the first n keys: n, or one n per query. Else None."""
    if x.dim() < 2 or x.numel() == 0 or x.numel() > 1 << 20 or (x.dtype is not torch.bool and "mask" not in name):
        return None
    if x.dtype is not torch.bool and not x.is_floating_point():
        return None
    seen = x if x.dtype is torch.bool else x == 0
    rows = seen.reshape(-1, *x.shape[-2:])
    counts = rows[0].sum(-1)
    first = torch.arange(x.shape[-1], device=x.device) < counts[:, None]
    if not bool((rows == first).all()) or (x.is_floating_point() and not bool((x[~seen] == x.min()).all())):
        return None
    found = counts.tolist()
    return found[0] if len(set(found)) == 1 else found


TEMPLATE = '''"""Graph @GRAPH@ of a kvc dump, with random inputs of the right shapes.

    python repro.py              as captured; rewritten; rewritten and compiled: the largest differences
    python repro.py --lossless   the same with the empty spec, where all three must agree (exit status 1 if not)
    python repro.py --eager      leave out the compiler
"""

import argparse
from math import inf, nan  # noqa: F401

import torch
from torch import device  # noqa: F401
from torch._dynamo.testing import rand_strided
@IMPORTS@

import kvc_compile.backend as backend
from kvc_compile.handle import CacheHandle
from kvc_compile.layout import Codec, Layout
from kvc_compile.lowering import ops
from kvc_compile.plan import SLACK
@WARNING@
SPEC = @SPEC@
LOSSLESS = {}


def inputs(lossless):
    torch.manual_seed(0)

    def real(shape, stride, dtype, device):
        x = rand_strided(shape, stride, dtype, device)
        return 1 + 0.02 * x if x.dim() == 1 else 0.02 * x  # vectors are mostly scales of norms

    def whole(shape, stride, dtype, device, ones):
        x = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        count = torch.arange(shape[-1] if shape else 1, device=device)
        return x.copy_(torch.ones_like(x) if ones or dtype is torch.bool else count.to(dtype).expand(shape))

    def mask(shape, stride, dtype, device, lengths, hidden):
        x = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        lengths = torch.tensor(lengths, device=device).reshape(-1, 1).expand(shape[-2], 1)
        seen = (torch.arange(shape[-1], device=device) < lengths).expand(shape)
        return x.copy_(seen if dtype is torch.bool else torch.where(seen, 0.0, hidden))

    def handle(shape, length, layout, static, device):
        batch, heads, tokens, channels = shape
        parsed = Layout.parse(layout)
        if lossless:
            parsed = Layout(Codec("raw"), heads, channels, parsed.dtype, word=parsed.word)
        x = 0.02 * torch.randn(batch, heads, length, channels, device=device)
        x = x.to(getattr(torch, parsed.dtype))
        arena = ops.encode(x, tokens if static else tokens + SLACK, parsed.key)
        if not static:
            arena.kvc_length = tokens
        return CacheHandle(arena, parsed.key, tokens, static)

    return [
@INPUTS@
    ]


@CAPTURED@


def dense(outputs):
    outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    return [content(x) if isinstance(x, CacheHandle) else x for x in outputs]


def content(cache):
    """What is stored; None where some of it was evicted, of which there is nothing to compare."""
    try:
        return cache.dense()
    except ops.EvictedError:
        return None


def run(spec, lossless, compiled):
    """The outputs; spec: None for the graph as captured."""
    graph, given = GraphModule(), inputs(lossless)
    if spec is None:
        return dense(graph(*given))
    lower = backend.lower
    if not compiled:
        backend.lower = lambda gm, *args, **kwargs: gm.forward
    try:
        torch._dynamo.reset()
        how = {"backend": backend.kvc, "options": {"spec": spec}, "dynamic": False, "fullgraph": True}
        return dense(torch.compile(graph, **how)(*given))
    finally:
        backend.lower = lower


def compare(title, left, right):
    """Print and return the largest difference, relative to the largest value of its output."""
    worst, where = 0.0, None
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            a, b = a.double(), b.double()
            size = max(1e-12, a.abs().nan_to_num(0.0).max().item()) if a.numel() else 1.0
            gap = (a - b).abs().nan_to_num(0.0).max().item() / size if a.numel() else 0.0
            if not torch.equal(a.isnan(), b.isnan()):
                gap = inf
            worst, where = max((worst, where), (gap, i), key=lambda x: x[0])
    print(f"{title}: largest relative difference {worst:.3g}" + (f" in output {where}" if where is not None else ""))
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lossless", action="store_true", help="run with the empty spec")
    parser.add_argument("--eager", action="store_true", help="leave out the compiler")
    args = parser.parse_args()
    spec = LOSSLESS if args.lossless else SPEC
    with torch.no_grad():
        captured = run(None, args.lossless, False)
        rewritten = run(spec, args.lossless, False)
        worst = compare("captured vs rewritten", captured, rewritten)
        if not args.eager:
            compiled = run(spec, args.lossless, True)
            lowered = compare("rewritten vs compiled", rewritten, compiled)
            worst = max(worst, lowered)
    low = any(isinstance(x, torch.Tensor) and x.dtype in (torch.bfloat16, torch.float16) for x in captured)
    return int(args.lossless and worst > (0.03 if low else 1e-4))


if __name__ == "__main__":
    raise SystemExit(main())
'''
