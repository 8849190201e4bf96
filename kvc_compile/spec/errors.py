"""What goes wrong with a spec, said so that its author can repair it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

Path = tuple[str | int, ...]  # the keys and list indices that lead to a value


def show_path(path: Path) -> str:
    """`layers."0,1".k.codec.int`, `keep[1].when`; the top of the file is the empty string."""
    out = ""
    for part in path:
        if isinstance(part, int):
            out += f"[{part}]"
        else:
            plain = re.fullmatch(r"[A-Za-z_][\w-]*", part)
            out += ("." if out else "") + (part if plain else '"' + show(part)[1:-1] + '"')
    return out


def show(value: object, limit: int = 60) -> str:
    """A value as one short printable line: spec files come from strangers, and terminals obey control characters."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        text = "a mapping with " + (", ".join(show(str(key))[1:-1] for key in list(value)[:4]) or "no keys")
    elif isinstance(value, (list, tuple)):
        text = f"a list of {len(value)}"
    elif isinstance(value, int) and abs(value) >= 1 << 64:
        text = "an integer beyond 64 bits"  # Python refuses to print the largest
    else:
        text = ascii(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def nearest(word: object, words: Iterable[str]) -> str | None:
    """The closest of `words`, or None if none is close."""
    if not isinstance(word, str) or len(word) > 64:  # difflib is quadratic
        return None
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return found[0] if found else None


class SpecError(ValueError):
    """A spec was refused.

    message: one sentence; file, line: where (None if the spec is no file); path: key path such as `k.codec.int`;
    found, allowed, nearest: what was there, what may be there, and the closest valid spelling (None if not known).
    """

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        path: str = "",
        line: int | None = None,
        found: str | None = None,
        allowed: str | None = None,
        nearest: str | None = None,
    ) -> None:
        self.message, self.file, self.path, self.line = message, file, path, line
        self.found, self.allowed, self.nearest = found, allowed, nearest
        super().__init__(self._render())

    def _render(self) -> str:
        file = None if self.file is None else self.file if self.file.isprintable() else ascii(self.file)
        where = file or ("spec" if self.path or self.line else "")
        if self.line is not None:
            where += f":{self.line}"
        head = ": ".join(part for part in (where, self.path, self.message) if part)
        rows = (("found", self.found), ("allowed", self.allowed), ("nearest", self.nearest))
        return "\n".join([head, *(f"  {label + ':':<9}{text}" for label, text in rows if text)])

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.__dict__.copy()))


class NotImplementedInSpec(SpecError):
    """The spec is well formed, but uses what is only checked so far.

    paths: the key paths that are not implemented.
    """

    paths: tuple[str, ...] = ()


def _rebuild(cls: type[SpecError], fields: dict[str, object]) -> SpecError:
    error = cls.__new__(cls)
    error.__dict__.update(fields)
    error.args = (error._render(),)
    return error
