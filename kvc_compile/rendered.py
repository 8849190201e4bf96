"""The kernels that a rewritten graph launches on a GPU, each as a file of the dump: `lowering.render` writes them, here
is found which ones.

A graph is on a GPU if its tensors are, or if `explain` was asked to plan for one: then as on an H100.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from kvc_compile.kernels.form import form
from kvc_compile.layout import Layout
from kvc_compile.lowering.render import render
from kvc_compile.lowering.variants import Attention, Kernel, Machine, appending, appending_pair, attention, reading
from kvc_compile.passes.fx import hint, is_call, value
from kvc_compile.passes.rewrite import SITE
from kvc_compile.plan import WORD, Plan
from kvc_compile.table import layers_text

kvc = torch.ops.kvc  # defined by `lowering.ops`, which the rewrite imports
ROLES = ("keys", "values")
ON_A_GPU = WORD["cuda"]
ORDER = ("decode", "attend", "append", "read")  # of the files, by the module of their kernel


@dataclass(frozen=True)
class File:
    """A rendered kernel: `kernels/<name>.py`. about: in a few words, for what it is."""

    name: str
    about: str
    text: str


@dataclass(frozen=True)
class Kernels:
    """The rendered kernels of a graph, and what is to say about them: why there are none, for example."""

    files: tuple[File, ...]
    note: str


@dataclass(frozen=True)
class Use:
    """A kernel, the layers that it serves, and the layouts of its arenas by what they hold."""

    kernel: Kernel
    layers: tuple[int, ...]
    roles: tuple[str, ...]
    layouts: tuple[Layout, ...]


def rendered(gm: GraphModule, plan: Plan) -> Kernels:
    """The kernels of a rewritten graph; none on a CPU."""
    calls = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in OPERATORS]
    if not plan.planned or not calls:
        return Kernels((), "No kernels of ours: nothing is compressed in this graph.")
    on_gpu = any(isinstance(v := value(n), torch.Tensor) and v.is_cuda for n in gm.graph.nodes)
    if not on_gpu and all(x.word != ON_A_GPU for e in plan.planned for x in (e.key, e.value)):
        return Kernels((), ON_A_CPU)
    machine = machine_here() if on_gpu else Machine()
    where = f"As launched on a GPU of {machine.multiprocessors} multiprocessors" + (
        "." if on_gpu else ", such as an H100, for which this graph was planned and not run."
    )
    uses: list[Use] = []
    files: list[File] = []
    skipped: set[str] = set()  # a dump does not fail for a kernel that it cannot show
    for node in calls:
        try:
            add(uses, list(OPERATORS[node.target](node, plan, machine)))
        except ValueError as e:  # no kernel takes it: the launch will raise the same
            skipped.add(str(e))
    for name, u in named(uses):
        try:
            files.append(file(name, u, where))
        except ValueError as e:
            skipped.add(str(e))
    return Kernels(tuple(files), where + "".join(f" Not rendered: {reason}." for reason in sorted(skipped)))


ON_A_CPU = (
    "No kernels are rendered on a CPU: C++ that is compiled for each layout attends and appends there, and PyTorch "
    "what it does not take. `kvc explain MODEL SPEC --device cuda --dump DIR` renders what a GPU would run."
)


def machine_here() -> Machine:
    from kvc_compile.lowering import launch, tuned  # import Triton

    device = torch.device("cuda", torch.cuda.current_device())
    return Machine(tuned.multiprocessors(device), launch.launches_early(device))


def add(uses: list[Use], new: list[Use]) -> None:
    """Two uses of the same kernel are one."""
    for u in new:
        for i, known in enumerate(uses):
            if known.kernel == u.kernel:
                pairs = dict(zip(known.roles, known.layouts)) | dict(zip(u.roles, u.layouts))
                roles = tuple(sorted(pairs))
                layers = tuple(sorted({*known.layers, *u.layers}))
                uses[i] = replace(known, layers=layers, roles=roles, layouts=tuple(pairs[r] for r in roles))
                break
        else:
            uses.append(u)


def named(uses: list[Use]) -> Iterator[tuple[str, Use]]:
    """append_token_keys, append_token_values, ...; numbered where layers differ."""
    taken: dict[str, int] = {}
    for u in sorted(uses, key=lambda u: (ORDER.index(u.kernel.module), u.roles)):
        name = u.kernel.function + (f"_{u.roles[0]}" if len(u.roles) == 1 else "")
        taken[name] = taken.get(name, 0) + 1
        yield f"{name}_{taken[name]}" if taken[name] > 1 else name, u


def file(name: str, u: Use, where: str) -> File:
    what = "attention" if u.kernel.module in ("decode", "attend") else " and ".join(u.roles)
    about = f"{what} of layer{'s' if len(u.layers) > 1 else ''} {layers_text(u.layers)}"
    layouts = dict(zip(u.roles, u.layouts)) if u.kernel.forms else {}
    return File(name, about, render(u.kernel, f"For the {about}. {where}", layouts))


# ---------------------------------------------------------------- from operators to kernels


def attend_uses(node: Node, plan: Plan, machine: Machine) -> Iterator[Use]:
    """The kernels of a `kvc::attend`."""
    q, _, v_data, _, _, mask, positions, causal, _, k_key, v_key = node.args[:11]
    k, v = Layout.parse(k_key), Layout.parse(v_key)  # type: ignore[arg-type]
    batch, heads, n, _ = (known(x) for x in value(q).shape)
    room = v.room_of(row_bytes(v_data, v)) + n
    cap, sinks = node.kwargs.get("cap", 0.0), node.kwargs.get("sinks")
    call = Attention(
        k, v, batch, heads // form(k).heads, n, room, value(q).dtype, dtype_of(mask), bool(causal),
        dtype_of(positions), float(cap), dtype_of(sinks), node.kwargs.get("shown") is not None,  # type: ignore[arg-type]
    )  # fmt: skip
    layers = tuple(e.site.layer for e in plan.planned if e.site.index == node.meta.get(SITE))
    sizes = splits = None
    if value(q).is_cuda:
        from kvc_compile.lowering import tuned  # imports Triton

        sizes, splits = tuned.chosen(k.key, v.key, call.groups, n, call.dtype, batch, room, value(q).device)
    for kernel in attention(call, machine, splits, sizes):
        yield Use(kernel, layers, ROLES, (k, v))


def append_uses(node: Node, plan: Plan, machine: Machine) -> Iterator[Use]:
    """The kernels of a `kvc::append`, `encode` or `extend`."""
    if is_call(node, kvc.append.default):
        _, x, positions, key = node.args[:4]
    elif is_call(node, kvc.extend.default):
        (_, x, key), positions = node.args[:3], None
    else:
        (x, _, key), positions = node.args[:3], None
    yield from uses_of(key, plan, appending(Layout.parse(key), known(value(x).shape[2]), dtype_of(positions)))  # type: ignore[arg-type]


def pair_uses(node: Node, plan: Plan, machine: Machine) -> Iterator[Use]:
    """The kernel of a `kvc::append_pair`: of all layers that store keys and values in these layouts."""
    positions, *keys = node.args[4:7]
    k, v = (Layout.parse(key) for key in keys)  # type: ignore[arg-type]
    layers = tuple(sorted({e.site.layer for e in plan.planned if [e.key.key, e.value.key] == keys}))
    for kernel in appending_pair(k, v, dtype_of(positions)):
        yield Use(kernel, layers, ROLES, (k, v))


def read_uses(node: Node, plan: Plan, machine: Machine) -> Iterator[Use]:
    """The kernel of a `kvc::read`."""
    _, _, key, last = node.args[:4]
    yield from uses_of(key, plan, reading(Layout.parse(key), bool(last)))  # type: ignore[arg-type]


OPERATORS = {
    kvc.attend.default: attend_uses,
    kvc.append.default: append_uses,
    kvc.append_pair.default: pair_uses,
    kvc.encode.default: append_uses,
    kvc.extend.default: append_uses,
    kvc.read.default: read_uses,
}


def uses_of(key: Any, plan: Plan, kernels: list[Kernel]) -> Iterator[Use]:
    """Kernels over one arena: of all layers that store keys or values in this layout."""
    found = [(e.site.layer, role) for e in plan.planned for role, x in zip(ROLES, (e.key, e.value)) if x.key == key]
    roles = tuple(r for r in ROLES if any(r == role for _, role in found))
    layers = tuple(sorted({layer for layer, _ in found}))
    for kernel in kernels:
        yield Use(kernel, layers, roles, (Layout.parse(key),) * len(roles))


def dtype_of(node: Any) -> torch.dtype | None:
    return None if node is None else value(node).dtype


def row_bytes(arena: Any, layout: Layout) -> int:
    """Of an arena that comes in, or is born in the graph."""
    if is_call(arena, kvc.empty.default):
        return layout.row_bytes(known(value(arena.args[2])))
    return known(value(arena).shape[1])


def known(size: Any) -> int:
    """A size, or what it was when the graph was captured. Raises ValueError where neither is known."""
    found = hint(size)
    if found is None:
        raise ValueError(f"the size {size} is not known before the graph runs")
    return found
