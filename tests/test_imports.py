"""The import law: one direction, no torch where none is needed, no top-level names that are not ours to take."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "kvc_compile"

# What each part may import of ours, besides itself. A part is a module of the package or one of its folders.
PURE = {"layout", "policy", "sites", "table", "reading"}
MAY = {
    "policy": set(),
    "spec": {"policy"},
    "table": set(),
    "layout": set(),
    "sites": set(),
    "reading": {"policy", "sites", "spec"},
    "files": set(),
    "config": set(),
    "timings": {"spec", "files"},
    "request": {"spec"},
    "plan": {"spec", *PURE},
    "kernels": {"layout", "policy"},
    "lowering": {"layout", "policy", "timings", "kernels"},
    "handle": {"layout", "lowering"},
    "passes": {"plan", "handle", "lowering", *PURE},
    "rendered": {"plan", "kernels", "lowering", "passes", *PURE},
    "bound": {"plan", "handle", "lowering", "passes", *PURE},
    # measures through torch.compile, as a user does
    "bench": {"spec", "request", "config", "plan", "handle", "lowering", "kernels", *PURE},
}
# What runs a compile or shows one may import anything but the front door, which only these name:
FRONT_DOOR = {"backend", "doors", "api", "cli"}
TORCHLESS = {"spec", "layout", "policy", "sites", "table", "files", "timings", "request", "plan", "reading"}


def files() -> list[Path]:
    found = [p for folder in (PACKAGE, "passes", "lowering", "kernels") for p in (ROOT / folder).rglob("*.py")]
    linked = {ROOT / PACKAGE / name for name in ("passes", "lowering", "kernels")}
    return sorted(p for p in found if not linked & set(p.parents))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == PACKAGE else (PACKAGE, *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """The full names of all that a file imports, those under TYPE_CHECKING excepted."""
    module, found = module_of(path), set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] + "." if node.level else ""
            name = (base + (node.module or "")).rstrip(".")
            found.update(f"{name}.{a.name}" for a in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def part_of(name: str) -> str:
    """The part of ours that a full name belongs to, "" for the package itself and for what is not ours."""
    top, _, rest = name.partition(".")
    return rest.partition(".")[0] if top == PACKAGE else ""


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_law(path: Path) -> None:
    part = part_of(module_of(path))
    ours = {part_of(name) for name in imports_of(path)} - {"", part}
    tops = {name.partition(".")[0] for name in imports_of(path)}
    assert not tops & {"passes", "lowering", "kernels"}, "import these as kvc_compile.*"
    if part in MAY:
        assert ours <= MAY[part], f"{part} may not import {sorted(ours - MAY[part])}"
    if part not in FRONT_DOOR:
        assert "backend" not in ours, f"{part} may not import the front door"
    if part in TORCHLESS:
        assert not tops & {"torch", "triton", "transformers", "numpy"}


def python(code: str, *flags: str) -> str:
    ran = subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT / "tests"
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_specs_need_no_torch() -> None:
    heavy = "sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'transformers', 'triton', 'numpy'})"
    code = f"""
import sys, kvc_compile, kvc_compile.spec, kvc_compile.cli.main, kvc_compile.cli.check, kvc_compile.cli.presets
import kvc_compile.bench.plan, kvc_compile.bench.rows, kvc_compile.bench.tables, kvc_compile.bench.shapes
import kvc_compile as kvc
kvc.Spec.load('kivi-4bit').to_yaml(), kvc.presets(), dir(kvc), kvc.__version__
print({heavy})
"""
    assert python(code).strip() == "[]"


def test_no_top_level_names() -> None:
    """transformers imports a package called kernels: it must never find ours."""
    code = """
import sys, torch, kvc_compile.backend
import kvc_compile.passes.recognise, kvc_compile.lowering.ops, kvc_compile.kernels.reference
files = {name: getattr(sys.modules.get(name), "__file__", None) for name in ("passes", "lowering", "kernels")}
print({name: file for name, file in files.items() if file and "site-packages" not in file})
"""
    assert python(code).strip() == "{}"


def test_functions_win_over_modules_of_their_name() -> None:
    code = """
import kvc_compile as kvc
import kvc_compile.report, kvc_compile.explain
from kvc_compile import report, explain, compile
from kvc_compile.report import Report
assert all(map(callable, (kvc.report, kvc.explain, kvc.compile, report, explain, compile)))
assert isinstance(report(), Report)
try:
    kvc.nothing
except AttributeError:
    print("ok")
"""
    assert python(code).strip() == "ok"
