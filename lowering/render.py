"""One kernel as one file to read: a head that says what it is and what its symbols mean, its constants, and the code
that remains for them.

    render(kernel, about, layouts)      a pure function of its arguments and of the sources of `kernels`

The file needs Triton and nothing else. It holds every helper that is still called, once, callees first; names of other
modules are plain names in it. Symbols are explained by the tables in the docstrings of the modules that the code is
from: lines of four columns, names, two columns, meaning.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvc_compile.kernels.form import Form
from kvc_compile.layout import HEADER_WORDS, TILE, Layout
from kvc_compile.lowering.folding import folded
from kvc_compile.lowering.known import Dtype, decided
from kvc_compile.lowering.sources import KERNELS, Constant, Function, Module, free_names, is_constexpr, kernel, module
from kvc_compile.lowering.variants import Kernel

WIDTH = 120  # columns
OPTIONS = ("num_warps", "launch_pdl")  # of a launch, not of the kernel
OWN = {"CONSTANTS", "OPTIONS", "Form", "dataclass", "astuple"}  # names of the file that are no helpers
ROW = re.compile(r"    (\w+(?:, \w+)*) {2,}(\S.*)")


def render(k: Kernel, about: str, layouts: Mapping[str, Layout]) -> str:
    """The file of a kernel.

    about: for what it is rendered, a sentence or two. layouts: of its arenas, by what they hold: "keys", "values".
    """
    root = kernel(k.name)
    constants = {n: v for n, v in k.constants.items() if n not in OPTIONS}
    options = {n: v for n, v in k.constants.items() if n in OPTIONS}
    missing = set(root.constexprs) ^ set(constants)
    if missing:
        raise ValueError(f"{k.name}: {', '.join(sorted(missing))} are constants of the kernel or of the launch only")
    code = gathered(root, decided(root, constants, k.pointers))
    symbols = symbols_of(root, [f for f in code if isinstance(f, Function)], "\n".join(code.values()))
    parts = [
        head(k, root, about, layouts, symbols),
        "from __future__ import annotations\n",
        ("from dataclasses import astuple, dataclass\n\n" if k.forms else "")
        + "import triton\nimport triton.language as tl\n",
    ]
    values = [text for found, text in code.items() if isinstance(found, Constant)]
    parts += ["".join(values)] if values else []
    parts += ["\n" + form_class()] if k.forms else []
    parts += ["\n" + assigned(constants, options)]
    parts += ["\n" + text for found, text in code.items() if isinstance(found, Function)]
    return "\n".join(parts)


# ---------------------------------------------------------------- the code


def gathered(root: Function, known: Mapping[ast.AST, bool]) -> dict[Function | Constant, str]:
    """What the file defines, and its text: all that the kernel still names, the kernel last."""
    found: dict[Function | Constant, str] = {}
    names: dict[str, Function | Constant] = {}
    under_way: list[Function] = []

    def visit(x: Function | Constant) -> None:
        if names.setdefault(x.name, x) is not x or x.name in OWN:
            raise ValueError(f"two things are called {x.name!r}: rename one in kernels/")
        if x in found or x in under_way:
            return
        if isinstance(x, Constant):
            value = f"tl.constexpr({x.value!r})" if x.wrapped else repr(x.value)
            found[x] = f"{x.name} = {value}{'  # ' if x.comment else ''}{x.comment}\n"
            return
        under_way.append(x)
        text = folded(x, known)
        node = ast.parse(text).body[0]
        assert isinstance(node, ast.FunctionDef)
        for name in free_names(node):
            inner = definition(x, name)
            if inner is None:
                raise ValueError(f"{x.name} in {x.module.name} reads {name!r}, which no rendered file can have")
            visit(inner)
        found[x] = text

    visit(root)
    return found


def definition(f: Function, name: str) -> Function | Constant | None:
    """What a name of the folded text stands for; `folded` has taken aliases of modules from in front of some."""
    x = f.module.resolve(name)
    if x is None:
        aliases = (f.module.resolve(alias) for alias in f.module.imports)
        x = next((y for m in aliases if isinstance(m, Module) and (y := m.resolve(name)) is not None), None)
    return x if isinstance(x, (Function, Constant)) else None


def form_class() -> str:
    """`kernels.form.Form` as it is written."""
    source = module(f"{KERNELS}.form")
    node = source.definitions["Form"]
    assert isinstance(node, ast.ClassDef)
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return "\n".join(source.lines[first - 1 : node.end_lineno]) + "\n"


def assigned(constants: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    rows = "".join(f'    "{n}": {written(v)},\n' for n, v in constants.items())
    given = ", ".join(f'"{n}": {v!r}' for n, v in options.items())
    return f"CONSTANTS = {{\n{rows}}}\nOPTIONS = {{{given}}}  # of the launch\n"


def written(value: Any) -> str:
    if isinstance(value, Dtype):
        return f"tl.{value.name}"
    if isinstance(value, Form):
        fields = ", ".join(f"{n}={v}" for n, v in vars(value).items())
        body = textwrap.wrap(fields, WIDTH - 8)
        return "Form(\n" + "".join(f"        {line}\n" for line in body) + "    )"
    return repr(value)


# ---------------------------------------------------------------- the head


def head(k: Kernel, root: Function, about: str, layouts: Mapping[str, Layout], symbols: Mapping[str, str]) -> str:
    title = root.module.docstring.split("\n\n")[0].replace("\n", " ")
    given = ", ".join(f"{n} {k.pointers[n]}" for n in root.parameters if n in k.pointers)
    said = (
        f"{about} Rendered from `kernels/{root.module.name.rpartition('.')[2]}.py` and what it calls, without the "
        "branches that the constants below rule out. Nothing but Triton is needed to run it: "
        f"`{root.name}[grid](..., **CONSTANTS, **OPTIONS)`."
    )
    text = f"{root.name}: {title[0].lower()}{title[1:]}"
    parts = ["\n".join(textwrap.wrap(text, WIDTH - 3)), filled(said)]
    for role, layout in layouts.items():
        parts.append(f"{role.capitalize()}: {layout.key}\n\n{picture(layout)}")
    parts.append("Tensors\n\n" + filled(given, 4))
    parts.append("Symbols\n\n" + table(symbols))
    return '"""' + "\n\n".join(parts).replace("\\", "\\\\").replace('"""', "'''") + '\n"""\n'


def filled(text: str, indent: int = 0) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)


def table(rows: Mapping[str, str]) -> str:
    wide = min(16, max((len(n) for n in rows), default=0))
    lines = []
    for names, meaning in rows.items():
        first = f"    {names.ljust(wide)}  "
        lines.append(textwrap.fill(meaning, WIDTH, initial_indent=first, subsequent_indent=" " * (wide + 6)))
    return "\n".join(lines)


def tables(source: Module) -> Iterator[tuple[str, str]]:
    """The rows of the tables of symbols in a docstring, those under a line that begins so: (names, meaning)."""
    lines = source.docstring.split("\n")
    inside = False
    for n, line in enumerate(lines):
        if line[:1].strip():
            inside = line.startswith("Symbols")
        if inside and (m := ROW.fullmatch(line)):
            meaning = [m[2]]
            for more in lines[n + 1 :]:
                if not more.startswith(" " * m.start(2)):
                    break
                meaning.append(more.strip())
            yield m[1], " ".join(meaning)


def symbols_of(root: Function, functions: Sequence[Function], code: str) -> dict[str, str]:
    """The symbols of the code, and of what explains them, and what they mean: the kernel's module knows best, then
    those that it imports from. The kernel's parameters come first."""
    order = list(dict.fromkeys([root.module, *imported(root.module), *(f.module for f in functions)]))
    rows: dict[str, str] = {}
    known: set[str] = set()
    for source in order:
        for names, meaning in tables(source):
            if not known & set(split := names.split(", ")):
                rows[names] = meaning
                known.update(split)
    found: dict[str, str] = {}
    used = words_of(code)
    while new := {names: m for names, m in rows.items() if names not in found and used & set(names.split(", "))}:
        found |= new
        used = words_of(" ".join(new.values()))
    place = {n: i for i, n in enumerate(root.parameters)}
    at = {names: min(place.get(n, len(place)) for n in names.split(", ")) for names in found}
    return {names: found[names] for names in sorted(rows, key=lambda names: at.get(names, 0)) if names in found}


def words_of(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def imported(source: Module) -> list[Module]:
    """The modules that a module imports from, and those that they do, in order."""
    found: list[Module] = []
    for where, _ in source.imports.values():
        inner = module(where)
        if inner not in found and where.startswith(KERNELS):
            found.append(inner)
    return list(dict.fromkeys([*found, *(deeper for m in found for deeper in imported(m))]))


def explained(text: str) -> set[str]:
    """The symbols that the head of a rendered file explains."""
    head = ast.get_docstring(ast.parse(text)) or ""
    rows = head.partition("Symbols\n\n")[2].split("\n")
    return {n for line in rows if (m := ROW.match(line)) for n in m[1].split(", ")}


def unexplained(text: str) -> list[str]:
    """The parameters of the kernel of a rendered file, and the constants of its helpers, that its head leaves out."""
    functions = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)]
    names = [a.arg for a in functions[-1].args.args]
    for f in functions:
        names += [a.arg for a in f.args.args if is_constexpr(a.annotation)]
        names += [n.target.id for n in ast.walk(f) if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    return sorted(set(names) - explained(text))


# ---------------------------------------------------------------- bytes


def picture(layout: Layout) -> str:
    """One row of an arena, byte by byte: N is the number of body tokens that it has room for."""
    c, h, d = layout.codec, layout.heads, layout.channels
    rows = [
        (0, "header", "int64", f"[{h}, {HEADER_WORDS}]", "length, encoded, fault, 0"),
        (layout.sink_offset, "sink", layout.dtype, f"[{h}, {layout.sink}, {d}]", "the first tokens"),
        (layout.ring_offset, "ring", layout.dtype, f"[{h}, {layout.recent}, {d}]", "the newest tokens"),
    ]
    at, factor = layout.body_offset, 0
    lines: list[tuple[str, str, str, str, str]] = [(str(a), *rest) for a, *rest in rows]  # type: ignore[misc]
    for bits in layout.planes:
        where = f"{at} + {factor} N" if factor else str(at)
        if layout.packed:
            codes = layout.codes_per_word(bits)
            shape = f"[{h}, N / {TILE * codes}, {TILE}, {d}]"
            said = f"{bits} bits of {codes} tokens to a word"
            lines.append((where, "plane", f"uint{layout.word}", shape, said))
        else:
            kind = "fp8 e4m3" if c.kind == "fp" else layout.dtype
            lines.append((where, "plane", kind, f"[{h}, N, {d}]", "whole elements"))
        factor += h * d * bits // 8
    if c.params:
        t = c.block[0]
        what = "scale, middle" if c.params == 2 else "scale"
        shape = f"[{h}, {f'N / {t}' if t > 1 else 'N'}, {layout.groups}, {c.params}]"
        lines.append((f"{at} + {factor} N", "params", "fp16", shape, f"{what} of {t} x {c.block[1]} blocks"))
    wide = [max(len(line[i]) for line in lines) for i in range(4)]
    rendered = [
        f"    {a.rjust(wide[0])}  {b.ljust(wide[1])}  {t.ljust(wide[2])}  {s.ljust(wide[3])}  {said}"
        for a, b, t, s, said in lines
    ]
    return "\n".join([*rendered, *(["", *fields(layout)] if layout.packed else [])])


def fields(layout: Layout) -> list[str]:
    """The fields of a word of the first plane, as they stand in it."""
    bits = layout.planes[0]
    codes = layout.codes_per_word(bits)
    places = [f"{bits * j + bits - 1}..{bits * j}" if bits > 1 else str(j) for j in reversed(range(codes))]
    tokens = ["t" if j == 0 else f"t+{TILE * j}" for j in reversed(range(codes))]
    wide = [max(len(a), len(b)) for a, b in zip(places, tokens)]
    rows = (["bits", *places], ["token", *tokens])
    return ["    " + " ".join(x.ljust(w) for x, w in zip(row, [5, *wide])).rstrip() for row in rows]
