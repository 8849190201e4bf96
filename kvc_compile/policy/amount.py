"""Amounts that depend on the current length: 64, `25%`, `1/16`, `0.25*n`, `10x`. Exact, for numbers and for tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

Node = tuple[Any, ...]  # ("number", numerator, denominator) | ("name", "n") | (operator, Node, Node)
_TOKEN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|[A-Za-z_]\w*|\S)", re.ASCII)


class Unbuilt(ValueError):
    """A valid spec asks for something that has no reference semantics yet."""


@dataclass(frozen=True)
class Amount:
    """An arithmetic expression in one variable, `n`: the current length, or whatever the key is about.

    `of` works on int and on int64 tensors alike and never rounds in between, so that a batch of rows of different
    lengths gives each row what it would get alone.
    """

    tree: Node

    @staticmethod
    def parse(value: int | float | str) -> Amount:
        """From the canonical spelling of a checked spec. Raises ValueError for anything else."""
        if isinstance(value, (int, float)):
            return Amount(_number(str(value)))
        for pattern, unit in ((r"([0-9.]+)%", Fraction(1, 100)), (r"([0-9.]+)x", Fraction(1))):
            if match := re.fullmatch(pattern, value, re.ASCII):
                share = Fraction(match[1]) * unit
                return Amount(("*", ("name", "n"), ("number", share.numerator, share.denominator)))
        if re.fullmatch(r"[0-9]+/[0-9]+", value, re.ASCII):
            share = Fraction(value)
            return Amount(("*", ("name", "n"), ("number", share.numerator, share.denominator)))
        return Amount(expression(value))

    @property
    def monotone(self) -> bool:
        """Whether a longer row never gets less, as far as the form tells."""
        return _monotone(self.tree)

    def of(self, n: Any) -> Any:
        """The whole number of tokens, rounded down and never below 0; `n` an int or an int64 tensor."""
        top, bottom = self.ratio(n)
        floor = top // bottom
        return max(0, floor) if isinstance(floor, int) else floor.clamp(min=0)

    def most(self, n: Any) -> Any:
        """`of` a number of tokens that may be a symbol; of an amount that is `monotone`, so never below 0."""
        top, bottom = ratio(self.tree, {"n": n, "t": n})
        return top // bottom

    def real(self, n: Any) -> Any:
        """The value itself, a float or a floating-point tensor; `t` is another name of `n` here."""
        top, bottom = self.ratio(n)
        return top / bottom

    def ratio(self, n: Any) -> tuple[Any, Any]:
        """The value as numerator and denominator."""
        return ratio(self.tree, {"n": n, "t": n})


def expression(text: str) -> Node:
    """`0.25*n`, `(n - 4)/8`, `1/t` as a tree, with the usual precedence. Raises ValueError if it is none."""
    tokens = _TOKEN.findall(text)
    tree, rest = _sum(tokens)
    if rest:
        raise ValueError(f"{text!r}: {rest[0]!r} is not expected")
    return tree


def ratio(tree: Node, names: dict[str, Any]) -> tuple[Any, Any]:
    """The value of a tree as numerator and denominator, which are whole wherever `names` are."""
    kind = tree[0]
    if kind == "number":
        return tree[1], tree[2]
    if kind == "name":
        return names[tree[1]], 1
    (a, b), (c, d) = ratio(tree[1], names), ratio(tree[2], names)
    if kind == "*":
        return a * c, b * d
    if kind == "/":
        return a * d, b * c
    return (a * d + c * b if kind == "+" else a * d - c * b), b * d


def _monotone(tree: Node) -> bool:
    if tree[0] in ("number", "name"):
        return True
    if tree[0] == "-" or (tree[0] == "/" and tree[2][0] != "number"):
        return False
    return _monotone(tree[1]) and _monotone(tree[2])


def _number(text: str) -> Node:
    value = Fraction(text)
    return ("number", value.numerator, value.denominator)


def _sum(tokens: list[str]) -> tuple[Node, list[str]]:
    return _chain(tokens, "+-", lambda rest: _chain(rest, "*/", _atom))


def _chain(tokens: list[str], operators: str, operand: Any) -> tuple[Node, list[str]]:
    tree, tokens = operand(tokens)
    while tokens and tokens[0] in operators:
        right, rest = operand(tokens[1:])
        tree, tokens = (tokens[0], tree, right), rest
    return tree, tokens


def _atom(tokens: list[str]) -> tuple[Node, list[str]]:
    if not tokens:
        raise ValueError("an expression ends too soon")
    head, rest = tokens[0], tokens[1:]
    if head == "(":
        tree, rest = _sum(rest)
        if rest[:1] != [")"]:
            raise ValueError("a bracket is not closed")
        return tree, rest[1:]
    if head in ("n", "t"):
        return ("name", head), rest
    if head[0].isdigit():
        return _number(head), rest
    raise ValueError(f"{head!r} is not a number, n or t")
