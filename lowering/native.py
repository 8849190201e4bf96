"""Decode steps on the CPU: C++ kernels over the stored bytes, compiled once per layout with Inductor's own toolchain.

What Inductor makes of the reference writes keys and values out dequantised before its matrix products read them, which
costs more than a short query's whole attention; here they never leave the cache. A kernel declines what is not a plain
step (`False`), and the reference then does it or raises.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from array import array
from dataclasses import fields
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from kvc_compile.kernels.form import Form, form
from kvc_compile.layout import TILE, Layout

TYPES = {"float32": "float", "bfloat16": "Bf16", "float16": "Half"}
LANES = 16  # floats of a vector
ROWS = 64  # query rows a kv head beyond which matrix products pay for their temporaries
BYTES = 1 << 16  # arenas below this are not worth a compilation


def attends(q: Tensor, data: Tensor, k_layout: Layout, v_layout: Layout) -> bool:
    """Whether `attend` takes this call."""
    rows = q.shape[1] // k_layout.heads * q.shape[2]
    return rows <= ROWS and data.nbytes >= BYTES and _known(k_layout) and _known(v_layout)


def appends(data: Tensor, x: Tensor, layout: Layout) -> bool:
    """Whether `append` takes this call."""
    return x.shape[2] == 1 and data.nbytes >= BYTES and _known(layout)


def _known(layout: Layout) -> bool:
    whole = layout.channels % LANES == 0 and (layout.codec.block[0] <= 1 or layout.codec.block[0] % TILE == 0)
    return sys.platform != "win32" and layout.word == 8 and layout.dtype in TYPES and whole


def attend(
    q: Tensor, k_data: Tensor, v_data: Tensor, k_new: Tensor, v_new: Tensor, mask: Tensor | None,
    start: int | None, causal: bool, scale: float, k_layout: Layout, v_layout: Layout,
) -> Tensor | None:  # fmt: skip
    """`kernels.reference.attend`; None where that has an error to raise."""
    batch, heads, n, _ = q.shape
    q, k_new, v_new = _rows(q), _rows(k_new), _rows(v_new)
    out = torch.empty(batch, heads, n, v_layout.channels, dtype=q.dtype)
    if mask is None:
        seen = [0] * 8
    else:
        strides = [0 if size == 1 else s for size, s in zip(mask.shape[:3], mask.stride(), strict=False)]
        kind = 1 if mask.dtype == torch.bool else 2
        seen = [kind, mask.shape[3], *strides, mask.stride(3), *mask.shape[:2]]
    call = array("q", [
        q.data_ptr(), k_data.data_ptr(), v_data.data_ptr(), k_new.data_ptr(), v_new.data_ptr(), out.data_ptr(),
        0 if mask is None else mask.data_ptr(), batch, heads, n,
        *q.stride()[:3], *k_new.stride()[:3], *v_new.stride()[:3], k_data.stride(0), v_data.stride(0),
        k_layout.capacity_of(k_data.shape[1]), v_layout.capacity_of(v_data.shape[1]),
        -1 if start is None else start, causal, *seen,
    ])  # fmt: skip
    return out if _attend(k_layout, v_layout)(call.buffer_info()[0], scale) else None


def append(data: Tensor, x: Tensor, start: int | None, layout: Layout) -> bool:
    """`kernels.reference.append` of one token; False where that must be called."""
    x = _rows(x)
    call = array("q", [
        data.data_ptr(), x.data_ptr(), x.shape[0], data.stride(0), *x.stride()[:2],
        layout.capacity_of(data.shape[1]), -1 if start is None else start,
    ])  # fmt: skip
    return _append(layout)(call.buffer_info()[0])


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


@cache
def _attend(k_layout: Layout, v_layout: Layout):
    return _function("attend", k_layout, v_layout, (ctypes.c_void_p, ctypes.c_double))


@cache
def _append(layout: Layout):
    return _function("append", layout, layout, (ctypes.c_void_p,))


def _function(name: str, k_layout: Layout, v_layout: Layout, arguments: tuple[type, ...]):
    from torch._inductor.codecache import CppCodeCache

    flags = []
    if name == "attend":  # the loops marked for the vectoriser need it; `append` rounds as the reference does
        flags += ["-ftree-loop-vectorize", "-ffp-contract=fast", "-funroll-loops"]
        flags += ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
    library = CppCodeCache.load(source(name, k_layout, v_layout), extra_flags=tuple(flags))
    function = getattr(library, f"kvc_{name}")
    function.argtypes, function.restype = arguments, ctypes.c_bool
    return function


def source(name: str, k_layout: Layout, v_layout: Layout) -> str:
    """The C++ source of a kernel, "attend" or "append", for a pair of layouts; it includes nothing of torch."""
    folder = files("kvc_compile.kernels.native")
    body = [(folder / f"{part}.cpp").read_text() for part in ("cache", name)]
    head = f"struct Bf16;\nstruct Half;\nusing T = {TYPES[k_layout.dtype]};\n"
    return head + _facts("K", form(k_layout)) + _facts("V", form(v_layout)) + "\n" + "\n".join(body)


def _facts(name: str, f: Form) -> str:
    values = ", ".join(f"{field.name} = {getattr(f, field.name)}" for field in fields(f))
    return f"struct {name} {{ static constexpr int {values}; }};\n"
