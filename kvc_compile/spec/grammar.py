"""The kinds of value a vocabulary is built from. Each kind checks a value, and describes itself for people and editors.

    check(node, path, ctx) -> plain data     the canonical spelling of the value; SpecError if it is not of this kind
    claims(node) -> bool                     whether a value is meant as this kind: then its error is the useful one
    text() -> str                            how the reference page writes it; * marks what is only checked
    json() -> dict                           JSON Schema, for editors
    words() -> tuple of str                  its spellings, to find the nearest one

What is checked but not implemented yet is collected in `Context.todo`, so one walk gives both answers.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, NoReturn, Protocol

from kvc_compile.policy import Unbuilt

from .errors import Path, SpecError, nearest, show, show_path
from .source import MAX_INT, Node, scalar

Json = dict[str, Any]
ALLOWED = 160  # characters of an error's list of what is allowed


@dataclass
class Context:
    """One check of one spec. file: its name; root: its folder, which artefacts cannot leave (None: not from a file)."""

    file: str | None = None
    root: FilePath | None = None
    todo: list[tuple[str, str]] = field(default_factory=list)  # (key path, what of it is not implemented)
    lines: dict[Path, int | None] = field(default_factory=dict)
    planned: int = 0  # > 0 inside a key that is itself in `todo`
    notes: list[str] = field(default_factory=list)  # what the short form did that its author may not expect
    files: list[str] = field(default_factory=list)  # artefacts that are named, in the spec's folder

    def fail(
        self,
        path: Path,
        message: str,
        found: Node | str | None = None,
        allowed: str | None = None,
        near: str | None = None,
    ) -> NoReturn:
        """Raises the error. found: a Node, or its description; allowed: cut where long; near: the nearest spelling."""
        shown = show(found.value) if isinstance(found, Node) else found
        allowed = re.sub(r"\*(?=[\s,;)\]]|$)", "", allowed) if allowed else None  # the mark of what is not implemented
        if allowed and len(allowed) > ALLOWED:
            allowed = allowed[:ALLOWED].rsplit(" ", 1)[0] + " ..., see docs/spec.md"
        where, line = show_path(path), self.line(path)
        raise SpecError(message, file=self.file, path=where, line=line, found=shown, allowed=allowed, nearest=near)

    def later(self, path: Path, what: str = "") -> None:
        if not self.planned:
            self.todo.append((show_path(path), what))

    def line(self, path: Path) -> int | None:
        """The line of a value, or of what encloses it: expanded values were not written down themselves."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)


class Type(Protocol):
    def check(self, node: Node, path: Path, ctx: Context) -> Any: ...
    def claims(self, node: Node) -> bool: ...
    def text(self) -> str: ...
    def json(self) -> Json: ...
    def words(self) -> tuple[str, ...]: ...


class Scalar:
    """What the kinds of scalar share."""

    what = "not a valid value"

    def claims(self, node: Node) -> bool:
        return type(node.value) is str

    def words(self) -> tuple[str, ...]:
        return ()

    def text(self) -> str:
        raise NotImplementedError

    def refuse(self, node: Node, path: Path, ctx: Context) -> NoReturn:
        ctx.fail(path, self.what, node, self.text(), nearest(node.value, self.words()))


@dataclass(frozen=True)
class Int(Scalar):
    """A whole number lo..hi, or one of `only`. done: the values implemented (None: all)."""

    lo: int = 0
    hi: int = 1 << 24
    only: tuple[int, ...] = ()
    done: tuple[int, ...] | None = None
    name: str = "n"

    def claims(self, node: Node) -> bool:
        return type(node.value) is int

    def check(self, node: Node, path: Path, ctx: Context) -> int:
        value = node.value
        if type(value) is not int:
            ctx.fail(path, "not a whole number", node, self.text())
        good = value in self.only if self.only else self.lo <= value <= self.hi
        if not good:
            near = min(self.only, key=lambda n: abs(n - value)) if self.only else min(max(value, self.lo), self.hi)
            ctx.fail(path, "out of range", str(value), self.text(), str(near))
        if self.done is not None and value not in self.done:
            ctx.later(path, f"{value}; so far: {', '.join(map(str, self.done))}")
        return int(value)

    def text(self) -> str:
        if self.only:
            return ", ".join(f"{n}" if self.done is None or n in self.done else f"{n}*" for n in self.only)
        if self.done is not None:
            return f"{self.name} ({', '.join(map(str, self.done))}; others to {self.hi}*)"
        return f"{self.name} ({self.lo}..{self.hi})"

    def json(self) -> Json:
        if self.only:
            return {"enum": list(self.only)}
        return {"type": "integer", "minimum": self.lo, "maximum": self.hi}


@dataclass(frozen=True)
class Num(Scalar):
    """A finite number lo..hi."""

    lo: float = 0
    hi: float = 1e6

    def claims(self, node: Node) -> bool:
        return type(node.value) in (int, float)

    def check(self, node: Node, path: Path, ctx: Context) -> int | float:
        value = node.value
        if type(value) not in (int, float):
            ctx.fail(path, "not a number", node, self.text())
        if not (self.lo <= value <= self.hi and math.isfinite(value)):
            ctx.fail(path, "out of range", node, self.text(), f"{min(max(value, self.lo), self.hi):g}")
        return value

    def text(self) -> str:
        return f"number ({self.lo:g}..{self.hi:g})"

    def json(self) -> Json:
        return {"type": "number", "minimum": self.lo, "maximum": self.hi}


@dataclass(frozen=True)
class Bool(Scalar):
    def claims(self, node: Node) -> bool:
        return type(node.value) is bool

    def check(self, node: Node, path: Path, ctx: Context) -> bool:
        if type(node.value) is not bool:
            ctx.fail(path, "not true or false", node, self.text())
        return bool(node.value)

    def text(self) -> str:
        return "true | false"

    def json(self) -> Json:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Enum(Scalar):
    """One of a few words."""

    options: tuple[str, ...]
    what = "not one of the words known here"

    def __init__(self, *options: str) -> None:
        object.__setattr__(self, "options", options)

    def _word(self, node: Node) -> object:
        # YAML 1.1 reads an unquoted `off` as false; dicts made by such a reader must load too
        return "off" if node.value is False and "off" in self.options else node.value

    def claims(self, node: Node) -> bool:
        return type(self._word(node)) is str and self._word(node) in self.options

    def check(self, node: Node, path: Path, ctx: Context) -> str:
        if not self.claims(node):
            self.refuse(node, path, ctx)
        return str(self._word(node))

    def text(self) -> str:
        return " | ".join(self.options)

    def json(self) -> Json:
        return {"enum": [*self.options, *([False] if "off" in self.options else [])]}

    def words(self) -> tuple[str, ...]:
        return self.options


@dataclass(frozen=True)
class Pattern(Scalar):
    """A string of a fixed form, such as `25%`. shape: how to write it; regex: all of it; what: the complaint."""

    shape: str
    regex: str
    what: str = "not of the form expected"
    limit: float = math.inf  # of the number in its first group, which must also be > 0

    def claims(self, node: Node) -> bool:
        return type(node.value) is str and re.fullmatch(self.regex, node.value, re.ASCII) is not None

    def check(self, node: Node, path: Path, ctx: Context) -> str:
        if not self.claims(node):
            self.refuse(node, path, ctx)
        match = re.fullmatch(self.regex, node.value, re.ASCII)
        if match and match.groups() and not 0 < float(match[1]) <= self.limit:
            ctx.fail(path, "out of range", node, f"{self.shape}, above 0 and at most {self.limit:g}")
        return str(node.value)

    def text(self) -> str:
        return self.shape

    def json(self) -> Json:
        plain = self.regex.replace("(?:", "(")
        return {"type": "string", "pattern": f"^{plain}$"}


@dataclass(frozen=True)
class Ratio(Scalar):
    """`1/16`: a fraction of two whole numbers, above 0 and at most 1."""

    what = "not a fraction"

    def claims(self, node: Node) -> bool:
        return type(node.value) is str and re.fullmatch(r"[0-9]{1,6}/[0-9]{1,6}", node.value, re.ASCII) is not None

    def check(self, node: Node, path: Path, ctx: Context) -> str:
        if not self.claims(node):
            self.refuse(node, path, ctx)
        top, bottom = map(int, node.value.split("/"))
        if not 0 < top <= bottom:
            ctx.fail(path, "out of range", node, "a fraction above 0 and at most 1")
        return f"{top}/{bottom}"

    def text(self) -> str:
        return "1/16"

    def json(self) -> Json:
        return {"type": "string", "pattern": "^[0-9]{1,6}/[0-9]{1,6}$"}


@dataclass(frozen=True)
class Expr(Scalar):
    """Arithmetic on numbers and the variables named: `0.25*n`, `(n - 4)/8`. Parsed here, never evaluated as code."""

    variables: tuple[str, ...]
    what = "not an expression"

    def claims(self, node: Node) -> bool:
        return type(node.value) is str and re.search(r"[*/+()-]", node.value) is not None and len(node.value) <= 40

    def check(self, node: Node, path: Path, ctx: Context) -> str:
        value = node.value
        if not self.claims(node) and value not in self.variables:
            self.refuse(node, path, ctx)
        tokens = re.findall(r"\s*([0-9]+(?:\.[0-9]+)?|[A-Za-z_]\w*|\S)", value, re.ASCII)
        rest = self._sum(list(tokens), path, ctx)
        if rest:
            ctx.fail(path, self.what, f"{show(value)}, where {show(rest[0])} is not expected", self.text())
        return re.sub(r"([+-])", r" \1 ", "".join(tokens)).strip()

    def _sum(self, tokens: list[str], path: Path, ctx: Context) -> list[str]:
        """sum := atom (op atom)*; precedence does not matter, as nothing is computed here."""
        tokens = self._atom(tokens, path, ctx)
        while tokens and tokens[0] in "+-*/":
            tokens = self._atom(tokens[1:], path, ctx)
        return tokens

    def _atom(self, tokens: list[str], path: Path, ctx: Context) -> list[str]:
        if tokens and tokens[0] == "(":
            rest = self._sum(tokens[1:], path, ctx)
            if rest[:1] != [")"]:
                ctx.fail(path, "a bracket is not closed", None, self.text())
            return rest[1:]
        if not tokens or not (tokens[0] in self.variables or re.fullmatch(r"[0-9]+(\.[0-9]+)?", tokens[0], re.ASCII)):
            found = show(tokens[0]) if tokens else "the end"
            expected = " or ".join(("a number", *self.variables))
            ctx.fail(path, self.what, f"{found} where {expected} is expected", self.text())
        return tokens[1:]

    def text(self) -> str:
        return f"0.25*{self.variables[0]}"

    def json(self) -> Json:
        return {"type": "string", "pattern": r"^[0-9A-Za-z_.*/+() -]{1,40}$"}


@dataclass(frozen=True)
class Text(Scalar):
    """One line of free text."""

    limit: int = 200
    what = "not one line of text"

    def check(self, node: Node, path: Path, ctx: Context) -> str:
        if type(node.value) is not str or not 0 < len(node.value) <= self.limit or not node.value.isprintable():
            self.refuse(node, path, ctx)
        return str(node.value)

    def text(self) -> str:
        return f"text (up to {self.limit} characters)"

    def json(self) -> Json:
        return {"type": "string", "minLength": 1, "maxLength": self.limit}


_FILE = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*\.(?:safetensors|json|tsv|pt)"


@dataclass(frozen=True)
class File(Scalar):
    """An artefact in the spec's folder or below: tensors, tables. Pickles (.pt) pass the check, to be refused later."""

    what = "not the path of an artefact"

    def claims(self, node: Node) -> bool:
        return type(node.value) is str and re.search(r"[/\\:]|\.\w+$", node.value) is not None

    def check(self, node: Node, path: Path, ctx: Context) -> str:
        value = node.value
        if type(value) is not str or len(value) > 200 or not re.fullmatch(_FILE, value, re.ASCII):
            ctx.fail(path, self.what, node, "a relative path in the spec's folder: .safetensors, .json or .tsv")
        if ctx.root is not None and not self._inside(ctx.root, value):
            ctx.fail(path, "the file lies outside the spec's folder", node, "a file in the spec's folder or below")
        if value.endswith(".pt"):
            ctx.todo.append((show_path(path), f"{value} is a pickle, which can run code: convert to safetensors"))
        ctx.files.append(value)
        return value

    @staticmethod
    def _inside(root: FilePath, value: str) -> bool:
        """Whether links, if any, stay in the folder. The file may be absent: a calibration can come later."""
        try:
            home = root.resolve()
            return (home / value).resolve().is_relative_to(home)
        except (OSError, RuntimeError):  # a loop of links
            return False

    def text(self) -> str:
        return "FILE"

    def json(self) -> Json:
        return {"type": "string", "pattern": "^" + _FILE.replace("(?:", "(") + "$"}


@dataclass(frozen=True)
class Call(Scalar):
    """`head(arg)` with exactly one scalar; written `head arg` where `spaced`, and read either way."""

    head: str
    arg: Type
    spaced: bool = False

    def _match(self, node: Node) -> re.Match[str] | None:
        if type(node.value) is not str or len(node.value) > 100:
            return None
        return re.fullmatch(rf"{self.head}\s*\(\s*(.*?)\s*\)|{self.head}\s+([^()]*\S)", node.value, re.ASCII)

    def claims(self, node: Node) -> bool:
        return type(node.value) is str and re.match(rf"{self.head}\s*(\(|\s|$)", node.value, re.ASCII) is not None

    def check(self, node: Node, path: Path, ctx: Context) -> str:
        match = self._match(node)
        if match is None or (match[2] is not None and not self.spaced):
            self.refuse(node, path, ctx)
        text = match[1] if match[1] is not None else match[2]
        number = scalar(text)
        if type(number) is int and abs(number) > MAX_INT:
            number = text
        arg = self.arg.check(Node(number, node.line), path, ctx)
        return f"{self.head} {arg}" if self.spaced else f"{self.head}({arg})"

    def text(self) -> str:
        arg = self.arg.text().split(" (")[0]
        return f"{self.head} {arg}" if self.spaced else f"{self.head}({arg})"

    def json(self) -> Json:
        arg = r"\s*(\(.+\)|\s.+)" if self.spaced else r"\(.+\)"
        return {"type": "string", "pattern": f"^{self.head}{arg}$"}

    def words(self) -> tuple[str, ...]:
        return (self.text(),)


@dataclass(frozen=True)
class OneOf:
    """Alternatives, told apart by the shape of the value."""

    options: tuple[Type, ...]

    def __init__(self, *options: Type) -> None:
        object.__setattr__(self, "options", options)

    def claims(self, node: Node) -> bool:
        return any(option.claims(node) for option in self.options)

    def check(self, node: Node, path: Path, ctx: Context) -> Any:
        for option in self.options:
            if option.claims(node):
                return option.check(node, path, ctx)
        allowed = " | ".join((o.table[o.name] if isinstance(o, Ref) else o).text() for o in self.options)
        ctx.fail(path, "not a valid value", node, allowed, nearest(node.value, self.words()))

    def text(self) -> str:
        return " | ".join(option.text() for option in self.options)

    def json(self) -> Json:
        return {"anyOf": [option.json() for option in self.options]}

    def words(self) -> tuple[str, ...]:
        return tuple(word for option in self.options for word in option.words())


@dataclass(frozen=True)
class Planned:
    """A value that is checked, but not implemented yet."""

    type: Type

    def claims(self, node: Node) -> bool:
        return self.type.claims(node)

    def check(self, node: Node, path: Path, ctx: Context) -> Any:
        found = "" if isinstance(node.value, (dict, list)) else show(node.value).strip("'")
        ctx.later(path, found)
        ctx.planned += 1
        try:
            return self.type.check(node, path, ctx)
        finally:
            ctx.planned -= 1

    def text(self) -> str:
        return " | ".join(f"{part}*" for part in self.type.text().split(" | "))

    def json(self) -> Json:
        return self.type.json()

    def words(self) -> tuple[str, ...]:
        return self.type.words()


@dataclass(frozen=True)
class Apart(Planned):
    """A value of which a law says what is not implemented yet: it depends on the whole of it."""

    def check(self, node: Node, path: Path, ctx: Context) -> Any:
        ctx.planned += 1
        try:
            return self.type.check(node, path, ctx)
        finally:
            ctx.planned -= 1

    def text(self) -> str:
        return self.type.text()


@dataclass(frozen=True)
class Resolved(Apart):
    """A value of which another part of the program says whether it runs. resolve: raises `Unbuilt` if not."""

    resolve: Callable[[Any], object]

    def check(self, node: Node, path: Path, ctx: Context) -> Any:
        data = super().check(node, path, ctx)
        try:
            self.resolve(data)
        except Unbuilt as e:
            ctx.later(path, str(e))
        return data


class Container:
    def words(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class List(Container):
    """A list of lo..hi items, each greater than the one before if `ascending`."""

    item: Type
    lo: int = 1
    hi: int = 64
    ascending: bool = False

    def claims(self, node: Node) -> bool:
        return isinstance(node.value, list)

    def check(self, node: Node, path: Path, ctx: Context) -> list[Any]:
        if not isinstance(node.value, list):
            ctx.fail(path, "not a list", node, self.text())
        if not self.lo <= len(node.value) <= self.hi:
            ctx.fail(path, "too few or too many items", node, f"{self.lo}..{self.hi} items")
        items = [self.item.check(item, (*path, i), ctx) for i, item in enumerate(node.value)]
        if self.ascending and any(a >= b for a, b in itertools.pairwise(items)):
            ctx.fail(path, "the items must ascend", show(", ".join(map(str, items))))
        return items

    def text(self) -> str:
        return f"[{self.item.text()}, ..]"

    def json(self) -> Json:
        return {"type": "array", "items": self.item.json(), "minItems": self.lo, "maxItems": self.hi}


@dataclass(frozen=True)
class Tuple(Container):
    """A list with one kind for each position."""

    items: tuple[Type, ...]

    def __init__(self, *items: Type) -> None:
        object.__setattr__(self, "items", items)

    def claims(self, node: Node) -> bool:
        return isinstance(node.value, list)

    def check(self, node: Node, path: Path, ctx: Context) -> list[Any]:
        if not isinstance(node.value, list) or len(node.value) != len(self.items):
            ctx.fail(path, f"not a list of {len(self.items)}", node, self.text())
        return [kind.check(item, (*path, i), ctx) for i, (kind, item) in enumerate(zip(self.items, node.value))]

    def text(self) -> str:
        return "[" + ", ".join(item.text() for item in self.items) + "]"

    def json(self) -> Json:
        n = len(self.items)
        return {"type": "array", "prefixItems": [item.json() for item in self.items], "minItems": n, "maxItems": n}


@dataclass(frozen=True)
class Key:
    """A key of a mapping. doc: one line, with the unit; done: implemented, not only checked."""

    type: Type
    doc: str
    done: bool = False
    required: bool = False


@dataclass(frozen=True)
class Map(Container):
    """A mapping with known keys.

    one_of: keys of which at most one may be given (`need`: exactly one); open: other keys allowed, as the kind of the
    key's name and the key itself.
    """

    keys: Mapping[str, Key]
    one_of: tuple[str, ...] = ()
    need: bool = False
    open: tuple[Type, Key] | None = None

    def claims(self, node: Node) -> bool:
        return isinstance(node.value, dict)

    def check(self, node: Node, path: Path, ctx: Context) -> dict[str, Any]:
        value = node.value
        if not isinstance(value, dict):
            ctx.fail(path, "not a mapping", node, self.text())
        chosen = [name for name in self.one_of if name in value]
        if len(chosen) > 1:
            ctx.fail((*path, chosen[1]), f"cannot be given with `{chosen[0]}`", allowed="one of " + self._names())
        given = [(name, key) for name, key in self.keys.items() if name in value]
        out = {name: self._item(key, value[name], (*path, name), ctx) for name, key in given}
        for name in sorted(value):
            if name not in self.keys:
                out[name] = self._extra(name, value[name], path, ctx)
        if self.need and not chosen:
            ctx.fail(path, "one key is missing", node, "one of " + self._names())
        for name, key in self.keys.items():
            if key.required and name not in value:
                ctx.fail(path, f"`{name}` is missing", node)
        return out

    def _item(self, key: Key, node: Node, path: Path, ctx: Context) -> Any:
        kind = key.type if key.done else Planned(key.type)
        return kind.check(node, path, ctx)

    def _extra(self, name: str, node: Node, path: Path, ctx: Context) -> Any:
        if self.open is None:
            ctx.fail((*path, name), "unknown key", show(name), ", ".join(self.keys), nearest(name, self.keys))
        kind, key = self.open
        if not kind.claims(Node(name)):
            ctx.fail(
                (*path, name),
                "unknown key",
                show(name),
                f"{', '.join(self.keys)}, {kind.text()}".lstrip(", "),
                nearest(name, self.keys),
            )
        kind.check(Node(name, node.line), (*path, name), ctx)
        return self._item(key, node, (*path, name), ctx)

    def _names(self) -> str:
        return ", ".join(self.one_of)

    def text(self) -> str:
        return "{" + ", ".join([*self.keys, *([self.open[0].text()] if self.open else [])]) + "}"

    def json(self) -> Json:
        out: Json = {"type": "object", "additionalProperties": False}
        out["properties"] = {name: self._describe(key) for name, key in self.keys.items()}
        if self.open:
            out["additionalProperties"] = self._describe(self.open[1])
        required = [name for name, key in self.keys.items() if key.required]
        if required:
            out["required"] = required
        if self.need:
            out["oneOf"] = [{"required": [name]} for name in self.one_of]
        return out

    @staticmethod
    def _describe(key: Key) -> Json:
        return {**key.type.json(), "description": key.doc + ("" if key.done else " (checked, not implemented yet)")}


@dataclass(frozen=True)
class Ref(Container):
    """A named part of the vocabulary, which may contain itself."""

    name: str
    table: Mapping[str, Type] = field(repr=False, compare=False)

    def claims(self, node: Node) -> bool:
        return self.table[self.name].claims(node)

    def check(self, node: Node, path: Path, ctx: Context) -> Any:
        return self.table[self.name].check(node, path, ctx)

    def text(self) -> str:
        return self.name.upper()

    def json(self) -> Json:
        return {"$ref": f"#/$defs/{self.name}"}

    def words(self) -> tuple[str, ...]:
        return self.table[self.name].words()
