"""Which branches of a kernel its compile-time constants decide: a walk through it and all that it calls.

Every call of a helper is followed with what is known of its arguments; loops that are unrolled are run. A test is
decided if it has the same truth whenever it is reached. What Triton would find out beyond that stays open, which costs
readability and nothing else.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any

from kvc_compile.kernels.form import Form
from kvc_compile.lowering.sources import Constant, Function, Module, free_names

WIDTHS = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 16, "int64": 64, "int32": 32, "uint8": 8}


class Unknown:
    def __repr__(self) -> str:
        return "?"


UNKNOWN = Unknown()


@dataclass(frozen=True)
class Dtype:
    """A type of numbers, by its name in `triton.language`."""

    name: str

    @property
    def primitive_bitwidth(self) -> int:
        return WIDTHS[self.name]


@dataclass(frozen=True)
class Pointer:
    """An argument that points to numbers of a type."""

    element_ty: Dtype

    @property
    def dtype(self) -> Pointer:
        return self


LANGUAGE = SimpleNamespace(**{name: Dtype(name) for name in WIDTHS})
BINARY: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.LShift: operator.lshift,
    ast.RShift: operator.rshift, ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}  # fmt: skip
UNARY: Mapping[type, Callable[[Any], Any]] = {
    ast.Not: operator.not_, ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.invert,
}  # fmt: skip
Names = dict[str, Any]  # what is known of the variables of a function; what is not known is not in it


def decided(root: Function, constants: Mapping[str, Any], pointers: Mapping[str, str]) -> dict[ast.AST, bool]:
    """The tests, as `if` statements and conditional expressions, whose truth follows from the constants.

    constants: values of the kernel's `tl.constexpr` parameters: numbers, `Form`, `Dtype`. pointers: the types of what
    its other parameters point to, where they are tensors.
    """
    walk = _Walk()
    walk.call(root, {**constants, **{name: Pointer(Dtype(t)) for name, t in pointers.items()}})
    return {
        node: truth
        for node, found in walk.tests.items()
        if len(found) == 1 and (truth := next(iter(found))) is not None
    }


class _Walk:
    def __init__(self) -> None:
        self.tests: dict[ast.AST, set[bool | None]] = {}
        self.done: set[tuple[Function, frozenset]] = set()

    def call(self, function: Function, names: Names) -> None:
        key = function, frozenset((k, type(v), v) for k, v in names.items())
        if key not in self.done:
            self.done.add(key)
            self.block(function, function.node.body, dict(names))

    def test(self, node: ast.AST, value: Any) -> bool | None:
        truth = None if value is UNKNOWN or isinstance(value, Pointer) else bool(value)
        self.tests.setdefault(node, set()).add(truth)
        return truth

    # ------------------------------------------------------------ statements

    def block(self, f: Function, body: Sequence[ast.stmt], names: Names) -> bool:
        """Run statements, `names` in place; whether they end in a return."""
        return any(self.statement(f, s, names) for s in body)

    def statement(self, f: Function, s: ast.stmt, names: Names) -> bool:
        if isinstance(s, ast.Return):
            if s.value is not None:
                self.value(f, s.value, names)
            return True
        if isinstance(s, ast.If):
            return self.branch(f, s, names)
        if isinstance(s, (ast.For, ast.While)):
            self.loop(f, s, names)
        elif isinstance(s, ast.Assign):
            value = self.value(f, s.value, names)
            for target in s.targets:
                self.assign(f, target, s.value, value, names)
        elif isinstance(s, ast.AnnAssign) and s.value is not None:
            self.assign(f, s.target, s.value, self.value(f, s.value, names), names)
        elif isinstance(s, ast.AugAssign):
            right = self.value(f, s.value, names)
            left = self.value(f, s.target, names)
            self.assign(f, s.target, s.value, compute(s.op, left, right), names)
        else:
            for child in ast.iter_child_nodes(s):
                if isinstance(child, ast.expr):
                    self.value(f, child, names)
        return False

    def assign(self, f: Function, target: ast.expr, source: ast.expr, value: Any, names: Names) -> None:
        if isinstance(target, ast.Name):
            put(names, target.id, value)
        elif isinstance(target, ast.Tuple) and isinstance(source, ast.Tuple) and len(target.elts) == len(source.elts):
            found = [self.value(f, x, names) for x in source.elts]
            for t, x, v in zip(target.elts, source.elts, found):
                self.assign(f, t, x, v, names)
        else:
            for n in ast.walk(target):
                if isinstance(n, ast.Name):
                    names.pop(n.id, None)

    def branch(self, f: Function, s: ast.If, names: Names) -> bool:
        truth = self.test(s, self.value(f, s.test, names))
        if truth is not None:
            return self.block(f, s.body if truth else s.orelse, names)
        one, two = dict(names), dict(names)
        ends = self.block(f, s.body, one), self.block(f, s.orelse, two)
        left = [n for n, end in zip((one, two), ends) if not end]
        names.clear()
        if left:
            names.update({k: v for k, v in left[0].items() if all(same(v, n.get(k, UNKNOWN)) for n in left)})
        return all(ends)

    def loop(self, f: Function, s: ast.For | ast.While, names: Names) -> None:
        values = self.unrolled(f, s, names)
        if values is not None and isinstance(s, ast.For):
            for v in values:
                self.assign(f, s.target, s.iter, v, names)
                self.block(f, s.body, names)
            return
        for n in ast.walk(s):
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
                names.pop(n.id, None)
        inner = dict(names)
        if isinstance(s, ast.While):
            self.value(f, s.test, inner)
        self.block(f, s.body, inner)

    def unrolled(self, f: Function, s: ast.For | ast.While, names: Names) -> range | None:
        if not isinstance(s, ast.For):
            return None
        self.value(f, s.iter, names)
        if isinstance(s.iter, ast.Call) and ast.unparse(s.iter.func) == "tl.static_range":
            bounds = [self.value(f, a, names) for a in s.iter.args]
            if all(isinstance(b, int) for b in bounds):
                return range(*bounds)
        return None

    # ------------------------------------------------------------ expressions

    def value(self, f: Function, node: ast.expr, names: Names) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            if node.id in f.locals:
                return names.get(node.id, UNKNOWN)
            found = f.module.resolve(node.id)
            return found.value if isinstance(found, Constant) else UNKNOWN
        if isinstance(node, ast.Attribute):
            return self.attribute(f, node, names)
        if isinstance(node, ast.BinOp):
            return compute(node.op, self.value(f, node.left, names), self.value(f, node.right, names))
        if isinstance(node, ast.UnaryOp):
            x = self.value(f, node.operand, names)
            return UNKNOWN if not isinstance(x, (int, float)) else UNARY[type(node.op)](x)
        if isinstance(node, ast.BoolOp):
            return self.junction(node, [self.value(f, v, names) for v in node.values])
        if isinstance(node, ast.Compare):
            values = [self.value(f, v, names) for v in (node.left, *node.comparators)]
            truths = [compute(op, x, y) for op, x, y in zip(node.ops, values, values[1:])]
            return UNKNOWN if UNKNOWN in truths else all(truths)
        if isinstance(node, ast.IfExp):
            truth = self.test(node, self.value(f, node.test, names))
            sides = [
                self.value(f, x, names) for x, when in ((node.body, True), (node.orelse, False)) if truth != (not when)
            ]
            return sides[0] if len(sides) == 1 else UNKNOWN
        if isinstance(node, ast.Call):
            return self.called(f, node, names)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.value(f, child, names)
        return UNKNOWN

    def attribute(self, f: Function, node: ast.Attribute, names: Names) -> Any:
        if isinstance(node.value, ast.Name) and node.value.id not in f.locals:
            if node.value.id == "tl":
                return getattr(LANGUAGE, node.attr, UNKNOWN)
            inner = f.module.resolve(node.value.id)
            found = inner.resolve(node.attr) if isinstance(inner, Module) else None
            return found.value if isinstance(found, Constant) else UNKNOWN
        x = self.value(f, node.value, names)
        return getattr(x, node.attr, UNKNOWN) if isinstance(x, (Form, Pointer, Dtype)) else UNKNOWN

    def junction(self, node: ast.BoolOp, values: list[Any]) -> Any:
        ends = isinstance(node.op, ast.Or)  # the truth that decides it alone
        if any(v is not UNKNOWN and not isinstance(v, Pointer) and bool(v) == ends for v in values):
            return ends
        return UNKNOWN if any(v is UNKNOWN or isinstance(v, Pointer) for v in values) else not ends

    def called(self, f: Function, node: ast.Call, names: Names) -> Any:
        args = [self.value(f, a, names) for a in node.args]
        keywords = {k.arg: self.value(f, k.value, names) for k in node.keywords if k.arg}
        target = None
        if isinstance(node.func, ast.Name) and node.func.id not in f.locals:
            target = f.module.resolve(node.func.id)
        elif isinstance(node.func, ast.Attribute):
            self.value(f, node.func.value, names)
            if isinstance(node.func.value, ast.Name) and node.func.value.id not in f.locals:
                inner = f.module.resolve(node.func.value.id)
                target = inner.resolve(node.func.attr) if isinstance(inner, Module) else None
        if not isinstance(target, Function) or any(isinstance(a, ast.Starred) for a in node.args):
            return UNKNOWN
        bound = {**dict(zip(target.parameters, args)), **keywords}
        if target.compiled:
            self.call(target, {k: v for k, v in bound.items() if v is not UNKNOWN})
            return UNKNOWN
        if UNKNOWN in bound.values():
            return UNKNOWN
        try:
            return python(target)(**bound)
        except Exception:  # Triton will say it
            return UNKNOWN


def put(names: Names, name: str, value: Any) -> None:
    if value is UNKNOWN:
        names.pop(name, None)
    else:
        names[name] = value


def same(x: Any, y: Any) -> bool:
    return type(x) is type(y) and x == y


def compute(op: ast.operator | ast.cmpop, x: Any, y: Any) -> Any:
    if isinstance(op, (ast.Add, ast.Sub)) and isinstance(x, Pointer):
        return x
    if UNKNOWN in (x, y) or isinstance(x, Pointer) or isinstance(y, Pointer) or type(op) not in BINARY:
        return UNKNOWN
    try:
        return BINARY[type(op)](x, y)
    except (TypeError, ArithmeticError, ValueError):
        return UNKNOWN


@cache
def python(f: Function) -> Callable[..., Any]:
    """A function that runs at compile time, to run without Triton."""
    bare = ast.FunctionDef(f.name, f.node.args, f.node.body, [], None)
    tree = ast.fix_missing_locations(ast.Module([bare], []))
    scope: dict[str, Any] = {"tl": LANGUAGE}
    for name in free_names(bare):
        found = f.module.resolve(name)
        if isinstance(found, Constant):
            scope[name] = SimpleNamespace(value=found.value) if found.wrapped else found.value
        elif isinstance(found, Function):
            scope[name] = python(found)
    exec(compile(tree, f.module.name, "exec"), scope)  # a source file of this package
    made = scope[f.name]
    assert isinstance(made, FunctionType)
    return made
