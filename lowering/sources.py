"""The kernels as text: what a name in one of their modules means. Nothing of them is imported, so Triton need not be
there."""

from __future__ import annotations

import ast
import builtins
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from typing import Any

PACKAGE = "kvc_compile"
KERNELS = f"{PACKAGE}.kernels"


@dataclass(frozen=True, eq=False)
class Function:
    """A function of a kernel module; compared by identity, as a module is read once."""

    module: Module
    node: ast.FunctionDef

    @property
    def name(self) -> str:
        return self.node.name

    @cached_property
    def compiled(self) -> bool:
        """Whether it is a `triton.jit` function; the others run while one is compiled."""
        return any("triton.jit" in ast.unparse(d) for d in self.node.decorator_list)

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        return tuple(a.arg for a in self.node.args.args)

    @cached_property
    def constexprs(self) -> tuple[str, ...]:
        return tuple(a.arg for a in self.node.args.args if is_constexpr(a.annotation))

    @cached_property
    def locals(self) -> frozenset[str]:
        return local_names(self.node)


@dataclass(frozen=True, eq=False)
class Constant:
    """A name of a module for a plain value. wrapped: kernels may read it, it is a `tl.constexpr`."""

    module: Module
    name: str
    value: Any
    wrapped: bool
    comment: str


@dataclass(frozen=True, eq=False)
class Module:
    """One source file, by its full name."""

    name: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def lines(self) -> list[str]:
        return self.text.split("\n")

    @cached_property
    def docstring(self) -> str:
        return ast.get_docstring(self.tree) or ""

    @cached_property
    def definitions(self) -> dict[str, ast.AST]:
        """What stands at the top of the file: functions, classes, and the expressions of assignments."""
        found: dict[str, ast.AST] = {}
        for node in self.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[node.name] = node
            elif isinstance(node, ast.Assign) and len(node.targets) == 1:
                target, right = node.targets[0], node.value
                if isinstance(target, ast.Name):
                    found[target.id] = right
                elif isinstance(target, ast.Tuple) and isinstance(right, ast.Tuple):
                    found |= {n.id: v for n, v in zip(target.elts, right.elts) if isinstance(n, ast.Name)}
        return found

    @cached_property
    def imports(self) -> dict[str, tuple[str, str]]:
        """Local name -> (our module, name there), or (our module, "") for a module itself."""
        found = {}
        for node in self.tree.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE:
                for a in node.names:
                    inner = is_module(f"{node.module}.{a.name}")
                    found[a.asname or a.name] = (
                        (f"{node.module}.{a.name}", "") if inner else (node.module or "", a.name)
                    )
        return found

    def resolve(self, name: str) -> Function | Constant | Module | None:
        """What a name at the top of this file stands for; None for what is not ours."""
        if name in self.imports:
            where, inner = self.imports[name]
            return module(where).resolve(inner) if inner else module(where)
        return self._own.get(name)

    @cached_property
    def _own(self) -> dict[str, Function | Constant]:
        found: dict[str, Function | Constant] = {}
        for name, node in self.definitions.items():
            if isinstance(node, ast.FunctionDef):
                found[name] = Function(self, node)
            elif isinstance(node, ast.expr):
                wrapped = isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.constexpr"
                try:
                    value = self._value(node.args[0] if wrapped else node)  # type: ignore[attr-defined]
                except ValueError:
                    continue
                found[name] = Constant(self, name, value, wrapped, self._comment(node))
        return found

    def _value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            found = self.resolve(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            inner = self.resolve(node.value.id)
            found = inner.resolve(node.attr) if isinstance(inner, Module) else None
        else:
            return ast.literal_eval(node)
        if isinstance(found, Constant):
            return found.value
        raise ValueError(f"{ast.unparse(node)} is no constant")

    def _comment(self, node: ast.expr) -> str:
        """What stands behind an assignment of its own."""
        alone = sum(node.lineno == getattr(other, "lineno", 0) for other in self.definitions.values()) == 1
        _, mark, said = self.lines[(node.end_lineno or 1) - 1].partition("  # ")
        return said if mark and alone else ""


@lru_cache
def module(name: str) -> Module:
    """A module of ours by its full name."""
    package, _, stem = name.rpartition(".")
    return Module(name, (files(package) / f"{stem}.py").read_text(encoding="utf-8"))


@lru_cache
def is_module(name: str) -> bool:
    package, _, stem = name.rpartition(".")
    return package in (PACKAGE, KERNELS) and (files(package) / f"{stem}.py").is_file()


def kernel(name: str) -> Function:
    """The function that `module.function` of the kernels names."""
    where, _, inner = name.partition(".")
    found = module(f"{KERNELS}.{where}").resolve(inner)
    if not isinstance(found, Function):
        raise ValueError(f"no kernel {name!r}")
    return found


def is_constexpr(annotation: ast.expr | None) -> bool:
    return annotation is not None and ast.unparse(annotation) == "tl.constexpr"


def local_names(node: ast.FunctionDef) -> frozenset[str]:
    stored = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return frozenset(stored | {a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)})


def free_names(node: ast.FunctionDef) -> list[str]:
    """The names of its module that a function reads, in order of appearance."""
    own = local_names(node) | set(dir(builtins)) | {"tl", "triton"}
    body = [n for part in (*node.decorator_list, *node.body) for n in ast.walk(part)]
    names = [(n.lineno, n.col_offset, n.id) for n in body if isinstance(n, ast.Name) and n.id not in own]
    return list(dict.fromkeys(name for *_, name in sorted(names)))
