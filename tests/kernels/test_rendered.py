"""Rendered kernels do what ours do, bit for bit, in a process without kvc_compile, and are the ones launched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton.language as tl

from kvc_compile.kernels.form import form
from kvc_compile.lowering import launch, tuned, variants
from kvc_compile.lowering.known import Dtype
from kvc_compile.lowering.render import render
from kvc_compile.lowering.variants import Attention, Machine

from .caches import filled, keys, layout, values
from .test_decode import window

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")
BATCH = 1
CAPPED = ("int2", "general")  # cases with capped scores and sinks

# keys, values, dtype, word, channels, kv heads, groups, cached, new, mask, positions, splits
CASES = {
    "int4": ("int4z.64x1", "int4z.1x64", "float16", 16, 64, 1, 4, 200, 1, "causal", True, 2),
    "int4 chunk": ("int4z.32x1", "int4z.1x32", "bfloat16", 16, 64, 1, 2, 200, 3, "padded_add", False, 2),
    "int2": ("int2z.64x1", "int2z.1x64", "float16", 16, 64, 1, 4, 300, 1, "padded", False, 2),
    "int8": ("int8.1x64", "int8.1x64", "bfloat16", 16, 64, 2, 3, 200, 1, "none", False, 1),
    "int3": ("int3z.64x1", "int1z.1x64", "float16", 16, 64, 1, 2, 400, 1, "none", True, 2),
    "fp8": ("fp8.64x1", "fp8.1x64", "bfloat16", 16, 64, 1, 4, 200, 1, "bool", False, 2),
    "raw": ("raw", "raw", "float16", 16, 64, 1, 4, 200, 1, "none", False, 2),
    "80 channels": ("int4z.64x1", "int4z.1x80", "bfloat16", 16, 80, 1, 2, 150, 1, "bool", True, 2),
    "general": ("int4z.32x1", "int8z.1x24", "float32", 16, 40, 2, 2, 140, 1, "add_h", True, 2),
    "general chunk": ("int8z.64x1", "raw", "float32", 8, 40, 1, 2, 100, 40, "causal", False, 1),
}
CHILD = """
import importlib.util, sys, torch
sys.modules["kvc_compile"] = None  # importing it fails
folder = sys.argv[1]
def module(path):
    spec = importlib.util.spec_from_file_location("rendered", path)
    made = importlib.util.module_from_spec(spec)
    sys.modules["rendered"] = made  # as an import would
    spec.loader.exec_module(made)
    return made
for n, name in enumerate(sys.argv[2:]):
    file = module(f"{folder}/{n}.py")
    grid, stored, same = torch.load(f"{folder}/{n}.before")
    args = [a if not isinstance(a, tuple) else a[0].view(a[1]).as_strided(*a[2:]) for a in stored]
    args = [args[first] for first in same]
    getattr(file, name)[grid](*args, **file.CONSTANTS, **file.OPTIONS)
    torch.save([a for a in args if isinstance(a, torch.Tensor)], f"{folder}/{n}.after")
"""


class Recorder:
    """Stands in for a kernel: launches it, and keeps what it was launched with and what it left."""

    def __init__(self, kernel, name: str, folder: Path, launched: list):
        self.kernel, self.name, self.folder, self.launched = kernel, name, folder, launched

    def __getitem__(self, grid):
        def start(*args, **constants):
            n = len(self.launched)
            same = [next(i for i, b in enumerate(args) if a is b) for a in args]  # one may stand in for another
            torch.save((grid, [stored(a) for a in args], same), self.folder / f"{n}.before")
            self.kernel[grid](*args, **constants)
            left = [a.clone() for a in args if isinstance(a, torch.Tensor)]
            self.launched.append((self.name, constants, left))

        return start


def stored(x):
    """A tensor as its whole storage and how it lies in it: strides are arguments of their own."""
    if not isinstance(x, torch.Tensor):
        return x
    data = torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage()).clone()
    return data, x.dtype, x.size(), x.stride(), x.storage_offset()


def record(folder: Path, monkeypatch) -> list:
    """[(name, constants, tensors after)] of all launches from now on; what they began with is in the folder."""
    launched: list = []
    for module, names in (
        (launch.D, ["decode_split"]),
        (launch.T, ["attend_split", "merge"]),
        (launch.A, ["append_token", "append_pair", "append_encode", "append_store", "append_commit"]),
        (launch.R, ["read_tokens"]),
    ):
        for name in names:
            full = f"{module.__name__.rpartition('.')[2]}.{name}"
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), full, folder, launched))
    return launched


def plain(constants: dict) -> dict:
    """Types of Triton as we spell them ahead of time."""
    return {k: Dtype(_name(v)) if isinstance(v, tl.dtype) else v for k, v in constants.items()}


def _name(dtype: tl.dtype) -> str:
    return {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[dtype.name]


def machine(device: torch.device) -> Machine:
    return Machine(tuned.multiprocessors(device), launch.launches_early(device), launch.interpreted())


def run(case: str, device: torch.device, splits=...):
    """Attend, append keys and values, and read them back. Returns the kernels that should have been launched, with
    the layouts of their arenas."""
    k, v, dtype, word, d, heads, groups, cached, n, mask, placed, given = CASES[case]
    splits = given if splits is ... else splits
    torch.manual_seed(0)
    kl, vl = layout(k, heads, d, dtype, word), layout(v, heads, d, dtype, word)
    kx, vx = keys(BATCH, heads, cached + n, d, dtype), values(BATCH, heads, cached + n, d, dtype)
    room = cached + n + 40
    ka, va = filled(cached, room, kx, kl).to(device), filled(cached, room, vx, vl).to(device)
    q = values(BATCH, heads * groups, n, d, dtype).to(device)
    kn, vn = kx[:, :, cached:].to(device), vx[:, :, cached:].to(device)
    seen = window(mask, BATCH, heads * groups, n, cached, q.dtype)
    seen = None if seen is None else seen.to(device)
    positions = torch.arange(cached, cached + n, device=device) if placed else None
    cap = 20.0 if case in CAPPED else 0.0
    sinks = torch.randn(heads * groups, device=device).to(q.dtype) if cap else None
    launch.attend(q, ka, va, kn, vn, seen, positions, mask == "causal", 0.1, kl, vl, cap, sinks, splits=splits)
    if n == 1:
        launch.append_pair(ka.clone(), va.clone(), kn, vn, kl, vl, positions)
    launch.append(ka, kn, kl, positions)
    launch.append(va, vn, vl, positions)
    launch.read(ka, cached + n, kl)
    launch.read(va, cached, vl, last=True)

    at = None if positions is None else positions.dtype
    tokens = vl.room_of(va.shape[1]) + n
    masked = None if seen is None else seen.dtype
    call = Attention(
        kl, vl, BATCH, groups, n, tokens, q.dtype, masked, mask == "causal", at, cap, q.dtype if cap else None
    )
    expected = [(x, {"keys": kl, "values": vl}) for x in variants.attention(call, machine(device), splits)]
    if n == 1:
        expected += [(kernel, {"keys": kl, "values": vl}) for kernel in variants.appending_pair(kl, vl, at)]
    for role, x in (("keys", kl), ("values", vl)):
        expected += [(kernel, {role: x}) for kernel in variants.appending(x, n, at)]
    expected += [(kernel, {"keys": kl}) for kernel in variants.reading(kl, False)]
    return expected + [(kernel, {"values": vl}) for kernel in variants.reading(vl, True)]


# several a process, which takes longer to start than a kernel to run
TOGETHER = [
    ("int4", "int4 chunk", "raw"),
    ("int2", "int8", "80 channels"),
    ("int3", "fp8"),
    ("general", "general chunk"),
]


def test_every_case_is_rendered():
    assert sorted(case for together in TOGETHER for case in together) == sorted(CASES)


@pytest.mark.parametrize("cases", TOGETHER, ids=", ".join)
def test_rendered_kernels_equal_ours(cases, device, tmp_path, monkeypatch):
    launched = record(tmp_path, monkeypatch)
    expected = [x for case in cases for x in run(case, device)]
    assert [name for name, *_ in launched] == [kernel.name for kernel, _ in expected]
    for n, ((_, constants, _), (kernel, layouts)) in enumerate(zip(launched, expected, strict=True)):
        assert plain(constants) == kernel.constants, f"{kernel.name} is launched with others"
        (tmp_path / f"{n}.py").write_text(render(kernel, "For a test.", layouts))
    names = [kernel.function for kernel, _ in expected]
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, str(tmp_path), *names], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for n, (name, _, ours) in enumerate(launched):
        theirs = torch.load(tmp_path / f"{n}.after")
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(bits(a), bits(b)), name


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8) if x.dtype != torch.bool else x


@pytest.mark.parametrize("case", ("int4", "raw", "general"))
def test_splits_are_foreseen(case, device, tmp_path, monkeypatch):
    """Whether there is a merge, and of how many splits, follows from the machine."""
    launched = record(tmp_path, monkeypatch)
    expected = run(case, device, splits=None)
    assert [(name, plain(c)) for name, c, _ in launched] == [(k.name, k.constants) for k, _ in expected]


def test_a_form_is_copied_whole():
    """A rendered file names a compiled kernel by its form, too."""
    f = form(layout("int4z.64x1", 2, 64, "float16", 16))
    scope: dict = {}
    kernel = variants.appending(layout("int4z.64x1", 2, 64, "float16", 16), 1, None)[0]
    text = render(kernel, "", {})
    start, end = text.index("@dataclass"), text.index("CONSTANTS =")
    exec("from dataclasses import astuple, dataclass\n" + text[start:end], scope)
    assert repr(scope["Form"](**vars(f))) == repr(f)
