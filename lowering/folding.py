"""The text of a kernel without the branches that were decided: lines are cut and moved, so that comments stay."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence

from kvc_compile.lowering.sources import Function, Module, is_constexpr

STEP = 4  # columns of an indentation
ATOMS = (ast.Name, ast.Attribute, ast.Constant, ast.Call, ast.Subscript)


def folded(function: Function, decided: Mapping[ast.AST, bool]) -> str:
    """The source of a function: decided tests are gone, names of our modules in front of a name too."""
    text = "\n".join(_Fold(function, decided).function()) + "\n"
    while (shorter := without_unused(text)) != text:
        text = shorter
    return text


def without_unused(text: str) -> str:
    """Without a local constant that nothing reads any more."""
    tree = ast.parse(text)
    read = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    for n in ast.walk(tree):
        if not isinstance(n, ast.AnnAssign) or not isinstance(n.target, ast.Name) or n.target.id in read:
            continue
        if is_constexpr(n.annotation):
            lines = text.split("\n")
            del lines[n.lineno - 1 : n.end_lineno]
            return "\n".join(lines)
    return text


class _Fold:
    """Lines are counted from 1, as `ast` does. cut: columns by which lines move to the left."""

    def __init__(self, function: Function, decided: Mapping[ast.AST, bool]):
        self.f, self.lines, self.decided = function, function.module.lines, decided

    def function(self) -> list[str]:
        node = self.f.node
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        body = node.body[0].lineno
        head = [re.sub(r"  # fmt: skip$", "", line) for line in self.raw(first, body - 1, 0)]
        return head + self.block(node.body, body, self.last(node), 0)

    def block(self, body: Sequence[ast.stmt], first: int, last: int, cut: int) -> list[str]:
        """The statements of a block and the comments between them, which fill the lines first .. last."""
        found: list[str] = []
        for s in body:
            found += self.raw(first, s.lineno - 1, cut) + self.statement(s, cut)
            first = self.last(s) + 1
        found += self.raw(first, last, cut)
        if not any(line.strip() and not line.strip().startswith("#") for line in found):
            found.append(" " * (body[0].col_offset - cut) + "pass")
        return found

    def statement(self, s: ast.stmt, cut: int) -> list[str]:
        if isinstance(s, ast.If):
            return self.branch(s, cut, False)
        if isinstance(s, (ast.For, ast.While)):
            end = self.header_end(s)
            return self.edited(s, s.lineno, end, cut) + self.block(s.body, end + 1, self.last(s), cut)
        return self.edited(s, s.lineno, s.end_lineno or s.lineno, cut)

    def branch(self, s: ast.If, cut: int, chained: bool) -> list[str]:
        """chained: a branch before this one stays, so that this one is an `elif` or an `else`."""
        end = self.header_end(s)
        column = s.col_offset - cut
        body_last, otherwise = self.parts(s)
        truth = self.decided.get(s)
        if truth is None:
            head = self.edited(s, s.lineno, end, cut)
            head[0] = re.sub(r"^(\s*)(?:el)?if\b", r"\1elif" if chained else r"\1if", head[0])
            return head + self.block(s.body, end + 1, body_last, cut) + self.otherwise(s, otherwise, cut, True)
        if not truth:
            return self.otherwise(s, otherwise, cut, chained)
        if chained:
            return [" " * column + "else:", *self.block(s.body, end + 1, body_last, cut)]
        return self.said(end, column) + self.unless_nothing(s.body, end + 1, body_last, cut + STEP)

    def otherwise(self, s: ast.If, start: int, cut: int, chained: bool) -> list[str]:
        if not s.orelse:
            return []
        first = s.orelse[0]
        if isinstance(first, ast.If) and first.lineno == start:  # elif
            return self.branch(first, cut, chained)
        if chained:
            return [*self.raw(start, start, cut), *self.block(s.orelse, start + 1, self.last(s), cut)]
        return self.said(start, s.col_offset - cut) + self.unless_nothing(s.orelse, start + 1, self.last(s), cut + STEP)

    def unless_nothing(self, body: Sequence[ast.stmt], first: int, last: int, cut: int) -> list[str]:
        """A block that takes the place of its `if`: it may be empty, but for a function that had nothing else."""
        found = self.block(body, first, last, cut)
        return [] if [line.strip() for line in found] == ["pass"] and len(self.f.node.body) > 1 else found

    def said(self, line: int, column: int) -> list[str]:
        """The comment of a header that goes, on a line of its own."""
        _, mark, comment = self.lines[line - 1].partition("  # ")
        return [f"{' ' * column}# {comment}"] if mark and not comment.startswith("fmt:") else []

    # ------------------------------------------------------------ lines

    def parts(self, s: ast.If) -> tuple[int, int]:
        """(the last line of the body, that of `else` or `elif`, 0 if there is none)."""
        if not s.orelse:
            return self.last(s), 0
        at = s.orelse[0].lineno
        while not re.match(rf"\s{{{s.col_offset}}}(else\s*:|elif\b)", self.lines[at - 1]):
            at -= 1
        return at - 1, at

    def header_end(self, s: ast.If | ast.For | ast.While) -> int:
        test = s.iter if isinstance(s, ast.For) else s.test
        at = test.end_lineno or s.lineno
        while not re.search(r":\s*(#.*)?$", self.lines[at - 1]):
            at += 1
        return at

    def last(self, s: ast.stmt) -> int:
        """The last line of a statement, with the comments at the end of its innermost block."""
        at = s.end_lineno or s.lineno
        if isinstance(s, (ast.If, ast.For, ast.While)):
            while at < len(self.lines) and re.match(rf"\s{{{s.col_offset + 1},}}#", self.lines[at]):
                at += 1
        return at

    def raw(self, first: int, last: int, cut: int) -> list[str]:
        return [line[min(cut, len(line) - len(line.lstrip())) :] for line in self.lines[first - 1 : last]]

    def edited(self, s: ast.stmt, first: int, last: int, cut: int) -> list[str]:
        """The lines first .. last of a statement, its decided expressions replaced by what they come to."""
        start = sum(len(line) + 1 for line in self.lines[: first - 1])
        end = sum(len(line) + 1 for line in self.lines[:last]) - 1
        nodes = [n for n in ast.iter_child_nodes(s) if isinstance(n, ast.expr)]
        nodes = [n for n in nodes if n.lineno <= last]
        text = self.spliced(start, end, nodes)
        text = re.sub(r"  # fmt: skip$", "", text)
        return [line[min(cut, len(line) - len(line.lstrip())) :] for line in text.split("\n")]

    def spliced(self, start: int, end: int, nodes: Sequence[ast.AST]) -> str:
        """The source from start to end (characters), with the replacements within some nodes."""
        text, found = self.f.module.text, ""
        for node in sorted(nodes, key=self.span):
            for a, b, new in self.replacements(node):
                alone = text[a - 1] == "(" and text[b] == ")" and not re.match(r"[\w\])]", text[a - 2])  # no call
                if alone and is_plain(new):
                    a, b = a - 1, b + 1
                found, start = found + text[start:a] + new, b
        return found + text[start:end]

    def replacements(self, node: ast.AST) -> list[tuple[int, int, str]]:
        """What changes within a node, in order and none within another: (start, end, new text)."""
        if isinstance(node, ast.IfExp) and node in self.decided:
            side = node.body if self.decided[node] else node.orelse
            return [(*self.span(node), self.spliced(*self.span(side), [side]))]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            alias = node.value.id not in self.f.locals and self.f.module.resolve(node.value.id)
            if isinstance(alias, Module):
                return [(*self.span(node), node.attr)]
        found = [r for child in ast.iter_child_nodes(node) for r in self.replacements(child)]
        return sorted(found)

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Where a node begins and ends in the source; ast counts columns in bytes."""
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]

    def offset(self, line: int, column: int) -> int:
        before = sum(len(x) + 1 for x in self.lines[: line - 1])
        return before + len(self.lines[line - 1].encode()[:column].decode())


def is_plain(text: str) -> bool:
    """Whether an expression needs no parentheses anywhere."""
    return isinstance(ast.parse(text.strip(), mode="eval").body, ATOMS)
