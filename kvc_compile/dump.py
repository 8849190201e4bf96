"""The dump: what the backend did to each graph, as a folder to read from top to bottom.

    <dump>/<graph id>/          id: digest of the spec and of the captured graph
        README.md               what was found, what it saves, how to read the rest
        index.html              the same with both graphs side by side: one page to attach to a pull request
        0_captured.py           the graph as Dynamo hands it over, with shapes and the user's source lines
        1_rewritten.py          the same after the rewrite (absent if the backend stopped before)
        rewrite.diff            from one to the other
        sites.json  plan.json   every attention: found or declined; how it is stored
        spec.yaml               what was asked, in full
        repro.py                rebuilds the graph and its inputs and runs it three ways
        kernels/                the kernels that a GPU runs for it, each a file that needs nothing but Triton

No paths, process ids, times or addresses: two runs differ in nothing. Each file also goes to TORCH_TRACE, where
`tlparse` shows it. Without a dump folder and without a trace nothing is printed or kept.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from kvc_compile.files import write
from kvc_compile.layout import Layout
from kvc_compile.page import Dumped, page, status
from kvc_compile.plan import Plan, SitePlan, bytes_of
from kvc_compile.policy import words_of
from kvc_compile.rendered import Kernels, rendered
from kvc_compile.report import words
from kvc_compile.repro import repro
from kvc_compile.request import Request
from kvc_compile.table import layers_text, ratio

TOKENS = 1024  # of the bytes in the tables


class Trail:
    """The dump of one graph, written as the backend goes: what happened before a failure is on the disk."""

    def __init__(self, request: Request, gm: GraphModule, plan: Plan, example_inputs: Sequence[Any] = ()):
        self.folder: Path | None = None
        self.active = request.dump is not None or traced()
        if not self.active:
            return
        self.captured = text_of(gm)
        self.id = hashlib.sha256(f"{request.spec.digest}\n{self.captured}".encode()).hexdigest()[:12]
        self.folder = Path(request.dump) / self.id if request.dump is not None else None
        self.emit("0_captured.py", self.captured)
        self.emit("sites.json", as_json(sites_data(plan)))
        self.emit("plan.json", as_json(plan_data(plan, request)))
        self.emit("spec.yaml", request.spec.to_yaml())
        self.emit("repro.py", repro(self.id, self.captured, gm, example_inputs, request.spec.expanded()))
        self.emit("README.md", readme(self.id, plan, request))
        self.dumped = Dumped(self.id, model_of(gm, plan), plan, request, TOKENS, self.captured)
        self.emit("index.html", page(self.dumped))

    def rewritten(self, gm: GraphModule) -> None:
        """`gm` is the graph given to the constructor, rewritten."""
        if not self.active:
            return
        text = text_of(gm)
        self.emit("1_rewritten.py", text)
        old, new = self.captured.splitlines(keepends=True), text.splitlines(keepends=True)
        self.emit("rewrite.diff", "".join(difflib.unified_diff(old, new, "0_captured.py", "1_rewritten.py")))
        kernels = rendered(gm, self.dumped.plan)
        for file in kernels.files:
            self.emit(f"kernels/{file.name}.py", file.text)
        self.emit("README.md", readme(self.id, self.dumped.plan, self.dumped.request, kernels))
        self.emit("index.html", page(replace(self.dumped, rewritten=text, kernels=kernels)))

    def emit(self, name: str, text: str) -> None:
        if self.folder is not None:
            write(self.folder / name, text)
        trace = getattr(torch._logging, "trace_structured", None)
        if trace is not None:
            about = {"name": f"kvc/{self.id}/{name}", "encoding": "json" if name.endswith(".json") else "string"}
            trace("artifact", metadata_fn=lambda: about, payload_fn=lambda: text)


def traced() -> bool:
    """Whether someone listens to TORCH_TRACE."""
    from torch._logging import _internal

    return bool(_internal.trace_log.handlers)


# ---------------------------------------------------------------- the texts


def text_of(gm: GraphModule) -> str:
    """A graph as Python with shapes, strides, devices and source lines, and nothing of this machine or process."""
    text = gm.print_readable(print_output=False, include_stride=True, include_device=True)
    text = re.sub(r"(# File: )(.+?)(:\d+ in )", lambda m: m[1] + "/".join(m[2].split("/")[-2:]) + m[3], text)
    text = re.sub(r"\b0x[0-9a-f]{6,}\b", "0x...", text)
    return "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n"


def model_of(gm: GraphModule, plan: Plan) -> str:
    """The class of the outermost module that holds every attention, else the user's file; "" if neither is known."""
    nodes = {n.name: n for n in gm.graph.nodes}
    sites = [e.site if isinstance(e, SitePlan) else e for e in plan.entries]
    stacks = [nodes[s.node].meta.get("nn_module_stack") or {} for s in sites if s.node in nodes]
    outermost = {next(iter(stack.values()), None) for stack in stacks}
    module = outermost.pop() if len(outermost) == 1 else None
    if module is not None:
        return getattr(module[1], "__qualname__", str(module[1])).rpartition(".")[2]
    return sites[0].where.partition(":")[0] if sites else ""


def as_json(data: Any) -> str:
    return json.dumps(data, indent=2) + "\n"


def sites_data(plan: Plan) -> list[dict[str, Any]]:
    """Every attention in order, as it was found."""
    return [{"status": status(e), **asdict(e.site if isinstance(e, SitePlan) else e)} for e in plan.entries]


def plan_data(plan: Plan, request: Request) -> dict[str, Any]:
    """How every cache tensor is stored; bytes are for `TOKENS` tokens of one sequence."""
    compressed, dense = bytes_of(plan, TOKENS)
    return {
        "version": 1,
        "spec": {"name": request.spec.name, "digest": request.spec.digest},
        "mode": request.mode,
        "strict": request.strict,
        "verify": request.verify,
        "tokens": TOKENS,
        "bytes": {"compressed": compressed, "dense": dense},
        "sites": [
            {"index": e.site.index, "layer": e.site.layer, "keys": tensor_data(e.key), "values": tensor_data(e.value)}
            | ({"keep": json.loads(e.keep.policy), "group": e.keep.group} if e.keep else {})
            | ({"stays": e.stays} if e.stays else {})
            | ({"reads": asdict(e.reading)} if e.reading else {})
            for e in plan.planned
        ],
        "declined": [e.index for e in plan.declined],
    }


def tensor_data(layout: Layout) -> dict[str, Any]:
    return {
        "layout": layout.key,
        "words": words(layout),
        "bytes": {"compressed": layout.row_bytes(TOKENS), "dense": layout.dense_bytes(TOKENS)},
    }


def readme(graph: str, plan: Plan, request: Request, kernels: Kernels | None = None) -> str:
    rows = [f"| site | layer | layout | bytes for {TOKENS} tokens |", "|---|---|---|---|"]
    for e in plan.entries:
        if isinstance(e, SitePlan):
            k, v = words(e.key), words(e.value)
            said = k if k == v else f"keys {k}; values {v}"
            said += f"; {words_of(e.keep.policy)}" if e.keep else ""
            said += f"; {e.reading.words(e.site.layer)}" if e.reading else ""
            after, before = e.bytes(TOKENS)
            rows.append(f"| {e.site.index} `{e.site.node}` | {e.site.layer} | {said} | {before} -> {after} |")
        else:
            rows.append(f"| {e.index} `{e.node}` | | **{status(e)}**: {e.reason} ({e.where}) | |")
    compressed, dense = bytes_of(plan, TOKENS)
    total = "Nothing is compressed in this graph."
    if dense:
        layers = layers_text(sorted({e.site.layer for e in plan.planned}))
        total = f"Layers {layers}: {dense} -> {compressed} bytes, {ratio(dense, compressed)} smaller."
    table = "\n".join(rows)
    said = ""
    if kernels is not None:
        files = "".join(f"\n- `kernels/{f.name}.py`: {f.about}" for f in kernels.files)
        said = f"\n## Kernels\n\n{kernels.note}\n{files}\n" if files else f"\n## Kernels\n\n{kernels.note}\n"
    return f"""# Graph {graph}

Spec `{request.spec.name}` ({request.spec.digest}): {len(plan.planned)} attentions compressed, \
{len(plan.declined)} declined. {total}

{table}

Bytes are those of one sequence, header and scales included. Attentions that share a cache show it each; the total
counts it once.
{said}
## How to read this folder

- `0_captured.py` is the graph as Dynamo captured it, `1_rewritten.py` what is compiled instead; start with
  `rewrite.diff`. A cache that was a tensor is an arena there, `uint8 [batch, row bytes]`, and the calls of
  `kvc.attend`, `kvc.append`, ... say with which layout.
- `index.html` shows all of this as one page, both graphs side by side; it loads nothing, so it can be sent as it is.
- `sites.json` says what was found for each attention (its cache tensors, its mask, the source line), `plan.json` how
  each cache tensor is stored, `spec.yaml` what was asked.
- `kernels/` has a file for each kernel that a GPU runs for this graph, with its constants, the bytes that it reads
  and what its symbols mean at the head; branches of other layouts are left out.
- `repro.py` needs nothing but kvc_compile: `python repro.py` runs the graph as captured, rewritten, and compiled;
  `python repro.py --lossless` does so with the empty spec, where all three must agree.
"""
