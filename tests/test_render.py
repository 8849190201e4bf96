"""Rendered kernels as text: whole, explained, the same every time, and without anything that their layout rules out."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import test_dump
import torch

from kvc_compile import backend, explain
from kvc_compile.layout import Layout
from kvc_compile.lowering import variants
from kvc_compile.lowering.folding import folded
from kvc_compile.lowering.known import decided
from kvc_compile.lowering.render import gathered, picture, render, unexplained
from kvc_compile.lowering.sources import KERNELS, Function, Module, kernel
from kvc_compile.lowering.variants import Attention, Kernel, Machine
from kvc_compile.request import OptionError

INT4 = "int4z.64x1.h2.d64.bfloat16.s4.r128.f64.w16", "int4z.1x64.h2.d64.bfloat16.s4.r128.f1.w16"
PAIRS = {
    "int4": INT4,
    "int2": ("int2z.64x1.h2.d64.float16.s4.r64.f64.w16", "int2z.1x64.h2.d64.float16.s4.r13.f1.w16"),
    "int8": ("int8.1x64.h2.d64.float16.s0.r13.f1.w16", "int8.1x64.h2.d64.float16.s0.r13.f1.w16"),
    "int3": ("int3z.64x1.h1.d64.float16.s4.r64.f64.w16", "int1z.1x64.h1.d64.float16.s4.r13.f1.w16"),
    "fp8": ("fp8.64x1.h1.d64.bfloat16.s4.r64.f64.w16", "fp8.1x64.h1.d64.bfloat16.s4.r13.f1.w16"),
    "fp8 bare": ("fp8.0x0.h1.d64.bfloat16.s0.r0.f1.w16", "fp8.0x0.h1.d64.bfloat16.s0.r0.f1.w16"),
    "raw": ("raw16.0x0.h2.d64.bfloat16.s0.r0.f1.w16", "raw16.0x0.h2.d64.bfloat16.s0.r0.f1.w16"),
    "80 channels": ("int4z.64x1.h2.d80.bfloat16.s4.r64.f64.w16", "int4z.1x80.h2.d80.bfloat16.s4.r13.f1.w16"),
    "fp32": ("int4z.32x8.h2.d40.float32.s4.r40.f32.w16", "int8z.1x24.h2.d40.float32.s4.r13.f1.w16"),
}
MASKS = None, torch.bool, torch.bfloat16


def kernels(pair: str) -> list[tuple[Kernel, dict[str, Layout]]]:
    """Every kernel over a pair of layouts, for one token and more, with every kind of mask, on a GPU of each kind."""
    k, v = (Layout.parse(key) for key in PAIRS[pair])
    found: list[tuple[Kernel, dict[str, Layout]]] = []
    for n, mask, machine in ((1, MASKS[0], Machine()), (1, MASKS[1], Machine(1, False)), (3, MASKS[2], Machine())):
        dtype, positions = getattr(torch, k.dtype), torch.int64 if n == 1 else None
        call = Attention(k, v, 1, 4, n, 4096, dtype, mask, mask is None, positions, *((30.0, dtype) if n == 3 else ()))
        found += [(x, {"keys": k, "values": v}) for x in variants.attention(call, machine)]
        found += [(x, {role: y}) for role, y in (("keys", k), ("values", v)) for x in variants.appending(y, n, None)]
        found += [(x, {"keys": k, "values": v}) for x in variants.appending_pair(k, v, positions)]
    return found + [(x, {"keys": k}) for x in variants.reading(k, n == 3)]


@pytest.mark.parametrize("pair", PAIRS)
def test_self_contained_and_explained(pair):
    for x, layouts in kernels(pair):
        text = render(x, "For a test.", layouts)
        tree = ast.parse(text)
        functions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
        names = [f.name for f in functions]
        assert len(set(names)) == len(names) and names[-1] == x.function, "every helper once, the kernel last"
        imports = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        froms = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert imports == {"triton", "triton.language"} and froms <= {"__future__", "dataclasses"}
        called = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        assert set(names[:-1]) <= called, "no helper that nothing calls"
        assert unexplained(text) == [], f"{x.name}: give these a row in the table of symbols of their module"
        assert max(map(len, text.split("\n"))) <= 120 and "# fmt:" not in text and not re.search(r"[ \t]\n", text)
        for layout in layouts.values():
            assert not x.forms or layout.key in text
        scope: dict = {"tl": Anything()}
        start = text.index("@dataclass") if x.forms else text.index("\nCONSTANTS")
        end = text.index("\n\n\n", text.index("\nCONSTANTS"))
        exec("from dataclasses import astuple, dataclass\n" + text[start:end], scope)
        assert set(scope["CONSTANTS"]) | set(scope["OPTIONS"]) == set(x.constants)


class Anything:
    def __getattr__(self, name):
        return name


def test_every_helper_has_one_name():
    """Two of the same name in different modules could not stand in one file."""
    from kvc_compile.lowering.sources import module

    seen: dict[str, str] = {}
    for name in ("codec", "facts", "unpack", "body", "mixed", "decode", "attend", "append", "read"):
        for inner, node in module(f"{KERNELS}.{name}").definitions.items():
            if isinstance(node, ast.FunctionDef):
                assert seen.setdefault(inner, name) == name, f"{inner} in {name}.py and {seen[inner]}.py"


def test_what_a_layout_rules_out_is_gone():
    found = {x.function: render(x, "", layouts) for x, layouts in reversed(kernels("int4"))}
    decode, token = found["decode_split"], found["append_token"]
    for gone in ("fp8", "bounds +", "load_high(F.high", "if MASK", "if CAUSAL", "if PLACED", "if DIRECT", "F.high >"):
        assert gone not in decode.partition('"""\n\nfrom')[2], gone
    assert "inline_asm" in decode and "def encode_elements" not in token and "fp8_bits" not in token
    raw = {x.function: render(x, "", layouts) for x, layouts in kernels("raw")}
    assert "params_pointer" not in raw["decode_split"] and "quantise" not in raw["append_token"]
    assert "# the queries come first" in decode and "# products of equal rows" in decode, "comments stay"


# ---------------------------------------------------------------- folding

SOURCE = '''
import triton
import triton.language as tl

from kvc_compile.kernels import form

ONE = tl.constexpr(form.INT)


@triton.constexpr_function
def half(n):
    return n // 2


@triton.jit
def helper(x, N: tl.constexpr, F: tl.constexpr):
    if N > 1:
        return x
    else:  # one
        return -x


@triton.jit
def top(x, n, A: tl.constexpr, F: tl.constexpr):
    """Says."""
    y = 0
    # before
    if A:  # why
        y = 1  # kept
        # end of A
    elif n > 2:
        y = 2
    else:
        y = 3
    if n > 1:
        y = 4
    elif A:
        y = 5
        # of A
    else:
        y = 6
    for i in range(n):
        if y == 1:
            y += helper(x, 1, F)
    for j in tl.static_range(half(F.params * 2)):
        z = helper(x, 1, F) if j < 5 else (x if A else 0) * 2
        w = (x + 1 if F.kind == ONE and n else x + 2)
        if j == 1:
            z = form.RAW
    if not A:
        z = 0
    UNUSED: tl.constexpr = half(4)
    return tl.load(x, mask=(A if A else n)) + z
'''
FOLDED = '''
@triton.jit
def top(x, n, A: tl.constexpr, F: tl.constexpr):
    """Says."""
    y = 0
    # before
    # why
    y = 1  # kept
    # end of A
    if n > 1:
        y = 4
    else:
        y = 5
        # of A
    for i in range(n):
        if y == 1:
            y += helper(x, 1, F)
    for j in tl.static_range(half(F.params * 2)):
        z = helper(x, 1, F)
        w = (x + 1 if F.kind == ONE and n else x + 2)
        if j == 1:
            z = RAW
    return tl.load(x, mask=A) + z
'''


def test_folding():
    source = Module(f"{KERNELS}.made_up", SOURCE)
    top, helper = source.resolve("top"), source.resolve("helper")
    assert isinstance(top, Function) and isinstance(helper, Function)
    form = next(iter(kernels("int4")))[0].constants["K"]
    known = decided(top, {"A": True, "F": form}, {"x": "float16"})
    assert folded(top, known).strip() == FOLDED.strip()
    assert folded(helper, known).endswith("    # one\n    return -x\n")
    no = folded(top, decided(top, {"A": False, "F": form}, {}))
    assert "    # before\n    if n > 2:\n        y = 2\n    else:\n        y = 3\n" in no and "    z = 0\n" in no
    ast.parse(no)


def test_names_that_clash_are_refused(monkeypatch):
    text = SOURCE.replace("def helper", "def CONSTANTS").replace("helper(", "CONSTANTS(")
    top = Module(f"{KERNELS}.made_up", text).resolve("top")
    assert isinstance(top, Function)
    with pytest.raises(ValueError, match="CONSTANTS"):
        gathered(top, {})


def test_constants_fit_the_kernel():
    x, layouts = kernels("int4")[0]
    with pytest.raises(ValueError, match="STAGES"):
        render(replace(x, constants={n: v for n, v in x.constants.items() if n != "STAGES"}), "", layouts)
    with pytest.raises(ValueError, match="no kernel"):
        kernel("decode.nothing")


@pytest.mark.parametrize("pair", PAIRS)
def test_pictures_agree_with_the_layout(pair):
    """Evaluated at some capacity, every line of a picture begins where the one before ends."""
    for key in PAIRS[pair]:
        layout = Layout.parse(key)
        n = 4 * layout.unit
        lines = picture(layout).split("\n")
        rows = [m for line in lines if (m := re.match(r"\s+(\d+)(?: \+ (\d+) N)?  (\w+) +(\w+)", line))]
        starts = [int(m[1]) + int(m[2] or 0) * n for m in rows]
        expected = [0, layout.sink_offset, layout.ring_offset]
        expected += [layout.plane_offset(i, n) for i in range(len(layout.planes))]
        expected += [layout.params_offset(n)] if layout.codec.params else []
        assert starts == expected


# ---------------------------------------------------------------- in the dump


def test_no_triton(tmp_path):
    """Rendering reads sources: another process, on a machine without Triton, writes the same."""
    code = f"""
import sys
sys.modules["triton"] = None
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_render as t
for x, layouts in t.kernels("int4"):
    print(t.render(x, "For layers 0-31.", layouts))
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    here = [render(x, "For layers 0-31.", layouts) for x, layouts in kernels("int4")]
    assert done.stdout == "".join(text + "\n" for text in here) and len(here) > 5


@pytest.fixture
def unlowered(monkeypatch):
    monkeypatch.setattr(backend, "lower", lambda gm, *args, **kwargs: gm.forward)


def test_a_dump_on_a_cpu_says_what_ran(tmp_path, unlowered):
    test_dump.run(str(tmp_path))
    for folder in tmp_path.iterdir():
        assert not (folder / "kernels").exists()
        for name in ("README.md", "index.html"):
            assert "No kernels are rendered on a CPU" in (folder / name).read_text()


class Page(HTMLParser):
    """The text of every pre of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.texts: list[str] = []
        self.inside = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag == "pre":
            self.texts.append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "pre"

    def handle_data(self, data):
        if self.inside:
            self.texts[-1] += data


def planned(folder: Path) -> list[Path]:
    """Explain a small model as on a GPU; the folders of its prefill and its step."""
    torch.manual_seed(0)
    model = test_dump.Tiny().to(torch.bfloat16)
    kept = [torch.zeros(1, 1, test_dump.TOKENS, test_dump.WIDTH, dtype=torch.bfloat16) for _ in range(2)]
    for positions in (torch.arange(3), torch.tensor([3])):
        mask = torch.arange(test_dump.TOKENS) <= positions[:, None]
        x = torch.randn(1, len(positions), 2 * test_dump.WIDTH).to(torch.bfloat16)
        explain(model, {"spec": {"bits": 4}, "dump": str(folder)}, x, *kept, positions, mask[None, None], device="cuda")
    return sorted(folder.iterdir())


def test_a_dump_for_a_gpu_has_its_kernels(tmp_path):
    found = {}
    for folder in planned(tmp_path):
        names = sorted(p.name for p in (folder / "kernels").iterdir())
        readme, html = (folder / "README.md").read_text(), (folder / "index.html").read_text()
        texts = Page(html).texts
        for name in names:
            text = (folder / "kernels" / name).read_text()
            assert f"`kernels/{name}`: " in readme and text in texts
            assert "of layer 0." in text and str(tmp_path) not in text
            ast.parse(text)
        assert "not run" in readme and "src=" not in html
        found[len(names)] = names
    three = [f"append_{part}_{role}.py" for part in ("encode", "store", "commit") for role in ("keys", "values")]
    both = ["decode_split.py", "merge.py"]
    assert found == {3: ["append_pair.py", *both], 8: sorted([*three, *both])}


def test_a_cache_that_is_born_in_the_graph(tmp_path):
    """Its attention is that of a chunk of the room that the cache is made with."""

    class Born(torch.nn.Module):
        def forward(self, x, positions, mask):
            keys, values = torch.zeros(1, 1, 64, 16), torch.zeros(1, 1, 64, 16)
            keys.index_copy_(2, positions, x)
            values.index_copy_(2, positions, x)
            s = torch.matmul(x, keys.transpose(2, 3)) * 0.25 + mask
            return torch.matmul(s.softmax(-1), values), keys, values

    positions = torch.arange(5)
    mask = torch.zeros(1, 1, 5, 64).masked_fill(torch.arange(64) > positions[:, None], -torch.inf)
    options = {"spec": {"bits": 4}, "dump": str(tmp_path)}
    found = explain(Born(), options, torch.randn(1, 1, 5, 16), positions, mask, device="cuda")
    assert found.sites[0].status == "compressed"
    (folder,) = tmp_path.iterdir()
    assert "attend_split.py" in {p.name for p in (folder / "kernels").iterdir()}


def test_what_no_kernel_takes_is_said(tmp_path):
    kept = [torch.zeros(1, 1, test_dump.TOKENS, test_dump.WIDTH, dtype=torch.float64) for _ in range(2)]
    x, positions = torch.randn(1, 1, 2 * test_dump.WIDTH, dtype=torch.float64), torch.tensor([3])
    mask = (torch.arange(test_dump.TOKENS) <= 3)[None, None, None]
    options = {"spec": {"bits": 4}, "dump": str(tmp_path)}
    explain(test_dump.Tiny().double(), options, x, *kept, positions, mask, device="cuda")
    (folder,) = tmp_path.iterdir()
    assert "Not rendered: no kernel for float64 caches." in (folder / "README.md").read_text()


def test_devices_are_known():
    with pytest.raises(OptionError, match="cpu, cuda"):
        explain(test_dump.Tiny(), {"bits": 4}, device="tpu")
