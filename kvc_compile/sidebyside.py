"""Two graphs beside each other, line by line: what stayed, what changed, and into what. Plain text, no HTML.

    rows = aligned(lines_of(captured), lines_of(rewritten))
    for piece in pieces(rows): ...          # runs of rows to show, and runs of unchanged rows to fold

Strides, devices and the `; x = None` that free names are most of a printed graph and say little; lines that differ in
nothing else are "quiet" changes. Blank lines are left out, and a signature of hundreds of parameters is one line each.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest

QUIET = re.compile(r'(?<=\])\[[^\]"]*\][\w:]*(?=")|;\s+[\w =]+ = None$')
CONTEXT = 3  # unchanged lines that are shown around a change
FOLD = 5  # fewer unchanged lines are not worth folding
ALIKE = 0.5  # of their words two lines share at least, to be one line that changed
LARGEST = 40_000  # pairs of lines in one change that are compared; beyond, they are paired in order


@dataclass(frozen=True)
class Line:
    """A line of a graph. number: in its file. core: the text without its quiet parts. part: of a signature, or
    the class before it."""

    number: int
    text: str
    core: str
    part: bool = False

    @property
    def name(self) -> str:
        """What the line defines, "" if nothing."""
        found = re.match(r'(\w+)(?:: "[^"]*")?(?: = |,?$|\):$)', self.core)
        return found[1] if found else ""

    @property
    def comment(self) -> bool:
        return self.text.startswith("#")


@dataclass(frozen=True)
class Row:
    """kind: "same"; "quiet", if only quiet parts differ; "changed", where a side may be missing."""

    kind: str
    left: Line | None
    right: Line | None

    @property
    def lines(self) -> tuple[Line, ...]:
        return tuple(line for line in (self.left, self.right) if line is not None)


@dataclass(frozen=True)
class Piece:
    """Neighbouring rows. start: the index of the first."""

    shown: bool
    start: int
    rows: tuple[Row, ...]


def lines_of(text: str) -> list[Line]:
    """The lines of a graph as `dump.text_of` prints it, each parameter of a signature on its own."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        indent = len(line) - len(line.lstrip())
        body = line[min(indent, 8) :]  # 8: inside a forward
        if body.startswith("def forward("):  # no annotation holds a colon and a space
            found += [Line(number, p, QUIET.sub("", p), True) for p in re.split(r"(?<=,) (?=\w+: )", body)]
        elif body:
            found.append(Line(number, body, QUIET.sub("", body), body.startswith("class ")))
    return found


# ---------------------------------------------------------------- which line became which

Unit = tuple[Line | None, Line | None]  # the comment that names a source line, and a statement made from it


def aligned(old: Sequence[Line], new: Sequence[Line]) -> list[Row]:
    """Comments stand before many statements, so no match starts at one: it may only be extended over them."""
    rows: list[Row] = []
    before, after = ([line.core for line in side] for side in (old, new))
    matcher = difflib.SequenceMatcher(lambda core: core.startswith("#"), before, after, autojunk=False)
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag == "equal":
            rows += [row(x, y) for x, y in zip(old[a:b], new[c:d], strict=True)]
        else:
            rows += joined(changed(units(old[a:b]), units(new[c:d])))
    return rows


def row(left: Line | None, right: Line | None) -> Row:
    if left is None or right is None or left.core != right.core:
        return Row("changed", left, right)
    return Row("same" if left.text == right.text else "quiet", left, right)


def units(lines: Sequence[Line]) -> list[Unit]:
    found: list[Unit] = []
    for line in lines:
        if line.comment:
            found.append((line, None))
        elif found and found[-1][1] is None:
            found[-1] = (found[-1][0], line)
        else:
            found.append((None, line))
    return found


def changed(old: Sequence[Unit], new: Sequence[Unit]) -> Iterator[Row]:
    """Units that are alike beside each other, and what lies between them in order."""
    a = c = 0
    for b, d in [*alike(old, new), (len(old), len(new))]:
        pairs = [*zip_longest(old[a:b], new[c:d], fillvalue=(None, None)), *zip(old[b : b + 1], new[d : d + 1])]
        for left, right in pairs:
            yield from (row(x, y) for x, y in zip(left, right, strict=True) if x or y)
        a, c = b + 1, d + 1


def joined(rows: Iterable[Row]) -> list[Row]:
    """A comment of one side moved up to the same comment of the other, where nothing of its own side is in between."""
    found: list[Row] = []
    for r in rows:
        at = partner(found, r) if len(r.lines) == 1 and r.lines[0].comment else None
        if at is None:
            found.append(r)
        else:
            found[at] = row(found[at].left or r.left, found[at].right or r.right)
    return found


def partner(rows: Sequence[Row], comment: Row) -> int | None:
    for n in reversed(range(len(rows))):
        if (rows[n].right if comment.left is None else rows[n].left) is not None:
            return None
        if rows[n].lines[0].core == comment.lines[0].core:
            return n
    return None


def alike(old: Sequence[Unit], new: Sequence[Unit]) -> list[tuple[int, int]]:
    """The pairs of units, in the order of both, whose likenesses add up to most."""
    n, m = len(old), len(new)
    if n * m > LARGEST:
        return []
    like = [[likeness(x, y) for y in new] for x in old]
    best = [[0.0] * (m + 1) for _ in range(n + 1)]  # of the rest from here on
    for i in reversed(range(n)):
        for j in reversed(range(m)):
            best[i][j] = max(best[i + 1][j], best[i][j + 1], like[i][j] + best[i + 1][j + 1])
    found, i, j = [], 0, 0
    while i < n and j < m:
        if like[i][j] and best[i][j] == like[i][j] + best[i + 1][j + 1]:
            found.append((i, j))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return found


def likeness(old: Unit, new: Unit) -> float:
    """1 if both define the same name; else the share of their words that they have in common, and a little for the same
    source line; 0 if that is not much."""
    (c, x), (d, y) = old, new
    source = 0.25 if c and d and c.core == d.core else 0.0
    if x is None or y is None:
        return source
    if x.name and x.name == y.name:
        return 1.0
    a, b = (frozenset(re.findall(r"\w+", line.core)) for line in (x, y))
    share = source + len(a & b) / max(1, len(a | b))
    return share if share >= ALIKE else 0.0


def words(old: str, new: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both lines in pieces, and whether a piece is in this line only."""
    a, b = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in (old, new))
    left: list[tuple[str, bool]] = []
    right: list[tuple[str, bool]] = []
    for tag, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        left.append(("".join(a[i:j]), tag != "equal"))
        right.append(("".join(b[k:m]), tag != "equal"))
    return left, right


# ---------------------------------------------------------------- what to show


def pieces(rows: Sequence[Row], landmarks: Collection[int] = ()) -> list[Piece]:
    """The rows in runs that are shown, around changes and landmarks (indices of rows), and runs to fold."""
    shown = [False] * len(rows)
    for n, row in enumerate(rows):
        if row.kind == "changed" or n in landmarks:
            for near in range(max(0, n - CONTEXT), min(len(rows), n + CONTEXT + 1)):
                shown[near] = True
    start = 0
    for is_shown, run in [(k, len(list(g))) for k, g in groupby(list(shown))]:
        if not is_shown and run < FOLD:
            shown[start : start + run] = [True] * run
        start += run
    found, start = [], 0
    for is_shown, group in groupby(shown):
        end = start + len(list(group))
        found.append(Piece(is_shown, start, tuple(rows[start:end])))
        start = end
    return found
