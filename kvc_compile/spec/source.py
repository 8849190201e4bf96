"""Reads a spec's text into a tree of plain values with line numbers, and refuses everything that is not plain data.

Spec files come from strangers, so the tree is built from PyYAML's *events*: no tag, anchor, alias or merge key is ever
acted upon, and the limits below hold while the text is parsed, not after. JSON is read by the same path, being YAML.
Differences from YAML 1.1, which PyYAML reads: 010, 0x10, 1_000, 1:30 and dates are strings, 1e-3 is a number.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import yaml

from .errors import Path, SpecError, show, show_path

MAX_BYTES = 64 * 1024
MAX_DEPTH = 24
MAX_NODES = 4096
MAX_SCALAR = 2000  # characters
MAX_KEY = 100  # characters; from 128 on YAML writes a key in another way
MAX_INT = 2**63 - 1

_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,18})")
_DIGITS = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?([0-9]{1,40}\.[0-9]{0,40}|\.[0-9]{1,40}|[0-9]{1,40})([eE][-+]?[0-9]{1,4})?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|nan)", re.IGNORECASE)
_BOOL = {w: b for b, ws in ((True, "true yes on"), (False, "false no off")) for w in ws.split()}
_BOOL |= {form(w): b for w, b in list(_BOOL.items()) for form in (str.capitalize, str.upper)}


@dataclass(frozen=True, slots=True)
class Node:
    """value: None, bool, int, float, str, a list of Nodes or a dict of str to Node; line: from 1, None if no file."""

    value: Any
    line: int | None = None


def read_file(path: FilePath) -> str:
    """The text of a spec file: a regular file of at most `MAX_BYTES` bytes of UTF-8 without NUL."""
    file = str(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise SpecError("not a regular file", file=file)
        with open(path, "rb") as handle:
            data = handle.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"cannot be read: {getattr(error, 'strerror', None) or error}", file=file) from None
    return decode(data, file)


def decode(data: bytes, file: str | None) -> str:
    if len(data) > MAX_BYTES:
        raise SpecError("too large", file=file, found=f"more than {MAX_BYTES} bytes", allowed="up to 64 KiB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise SpecError("not UTF-8", file=file, line=line, found=f"byte 0x{data[error.start]:02x}") from None
    if "\0" in text:
        raise SpecError("contains a NUL byte", file=file, line=text[: text.index("\0")].count("\n") + 1)
    return text


def parse(text: str, file: str | None) -> Node:
    """The tree of one YAML or JSON document. Raises SpecError, and nothing else, on any text."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise SpecError("too large", file=file, found=f"more than {MAX_BYTES} bytes", allowed="up to 64 KiB")
    if text.lstrip()[:1] == "{":  # JSON may be indented with tabs, YAML may not; a raw tab in a JSON string is illegal
        text = text.replace("\t", " ")
    root = _Builder(file).build(_events(text, file))
    if not isinstance(root.value, dict):
        raise SpecError("a spec is a mapping of keys", file=file, line=root.line, found=show(root.value))
    return root


def from_data(data: object, file: str | None = None) -> Node:
    """The tree of a Python mapping of plain data, under the same limits as a file (it may nest in itself)."""
    budget = [MAX_NODES]

    def convert(value: object, path: Path) -> Node:
        budget[0] -= 1
        if budget[0] < 0 or len(path) > MAX_DEPTH:
            raise _too_big(file, None, path[:6])
        if isinstance(value, Mapping):
            out: dict[str, Node] = {}
            for key, item in value.items():
                name = _key(Node(key), file, path)
                if name in out:
                    raise SpecError("given twice", file=file, path=show_path((*path, name)))
                out[name] = convert(item, (*path, name))
            return Node(out)
        if isinstance(value, (list, tuple)):
            return Node([convert(item, (*path, i)) for i, item in enumerate(value)])
        if value is None or type(value) in (bool, int, float, str):
            return Node(_limited(value, file, None, path))
        kind = type(value).__name__
        raise SpecError(
            "not plain data",
            file=file,
            path=show_path(path),
            found=f"an object of type {kind}",
            allowed="mapping, list, string, number, true or false",
        )

    return convert(data, ())


def scalar(text: str) -> bool | int | float | str | None:
    """What a plain (unquoted) scalar means."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        return int(text)
    # YAML 1.1 would read 010 as octal; better a string, which no number accepts, than a surprise
    if _FLOAT.fullmatch(text) and not (_DIGITS.fullmatch(text) and text.lstrip("+-")[:1] == "0"):
        return float(text)
    return text


def _events(text: str, file: str | None) -> Iterator[yaml.Event]:
    """PyYAML's events; its scanner can also raise ValueError and friends (`"\\UFFFFFFFF"`, `%YAML 9...9`)."""
    try:
        yield from yaml.parse(text, Loader=yaml.SafeLoader)
    except SpecError:
        raise
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise SpecError(f"not YAML: {error.problem or error.context}", file=file, line=line) from None
    except (yaml.YAMLError, ValueError, OverflowError, IndexError, AttributeError, TypeError) as error:
        raise SpecError(f"not YAML: {show(str(error).splitlines()[0] if str(error) else '', 100)}", file=file) from None


class _Builder:
    """Events to Nodes, without recursion. A frame is an open list or mapping with its path."""

    def __init__(self, file: str | None) -> None:
        self.file = file
        self.nodes = 0
        self.stack: list[tuple[list[Node] | dict[str, Node], int, Path]] = []
        self.keys: list[str | None] = []  # for each frame: the mapping key that awaits its value
        self.root: Node | None = None

    def build(self, events: Iterator[yaml.Event]) -> Node:
        documents = 0
        for event in events:
            line = event.start_mark.line + 1 if event.start_mark else None
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise SpecError("more than one document in the file", file=self.file, line=line)
                if event.version or event.tags:
                    raise SpecError("YAML directives are not allowed", file=self.file, line=line)
            elif isinstance(event, yaml.NodeEvent):
                self._node(event, line)
            elif isinstance(event, yaml.CollectionEndEvent):
                frame, start, path = self.stack.pop()
                self.keys.pop()
                self._attach(Node(frame, start), path)
        if self.root is None:
            raise SpecError("the file is empty", file=self.file, allowed="at least `kvc: 1`")
        return self.root

    def _node(self, event: yaml.NodeEvent, line: int | None) -> None:
        path = self._path()
        tag = getattr(event, "tag", None)
        self.nodes += 1
        if self.nodes > MAX_NODES or len(self.stack) > MAX_DEPTH:
            raise _too_big(self.file, line, path[:6])
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise self._error("anchors and aliases are not allowed", line, path, event.anchor)
        if tag is not None:
            raise self._error("YAML tags are not allowed", line, path, tag)
        if isinstance(event, yaml.ScalarEvent):
            value = scalar(event.value) if event.style is None else event.value
            if event.style is None and _too_long(event.value):
                raise self._error("the number is too large", line, path, event.value)
            if event.style is None and _NOT_FINITE.fullmatch(event.value):
                raise self._error("numbers must be finite", line, path, event.value)
            node = Node(_limited(value, self.file, line, path), line)
            if self.stack and isinstance(self.stack[-1][0], dict) and self.keys[-1] is None:
                self._open_key(node)
            else:
                self._attach(node, path)
        elif self.stack and isinstance(self.stack[-1][0], dict) and self.keys[-1] is None:
            raise self._error("not a key", line, path, "a list or mapping")
        else:
            frame: list[Node] | dict[str, Node] = [] if isinstance(event, yaml.SequenceStartEvent) else {}
            self.stack.append((frame, line or 0, path))
            self.keys.append(None)

    def _error(self, message: str, line: int | None, path: Path, found: object) -> SpecError:
        return SpecError(message, file=self.file, line=line, path=show_path(path), found=show(found))

    def _open_key(self, node: Node) -> None:
        frame, _, path = self.stack[-1]
        assert isinstance(frame, dict)
        name = _key(node, self.file, path)
        if name in frame:
            raise SpecError("given twice", file=self.file, line=node.line, path=show_path((*path, name)))
        self.keys[-1] = name

    def _attach(self, node: Node, path: Path) -> None:
        if not self.stack:
            self.root = node
            return
        frame = self.stack[-1][0]
        if isinstance(frame, list):
            frame.append(node)
        else:
            key = self.keys[-1]
            assert key is not None
            frame[key] = node
            self.keys[-1] = None

    def _path(self) -> Path:
        if not self.stack:
            return ()
        frame, _, path = self.stack[-1]
        if isinstance(frame, list):
            return (*path, len(frame))
        key = self.keys[-1]
        return path if key is None else (*path, key)


def _too_long(text: str) -> bool:
    """A whole number that no 64 bits hold; `scalar` would take it for a float."""
    return _DIGITS.fullmatch(text) is not None and len(text.lstrip("+-0")) > 19


def _key(node: Node, file: str | None, path: Path) -> str:
    """Keys are strings; layer ranges such as 0 or -1 may be written without quotes."""
    value = node.value
    if type(value) is int and abs(value) <= MAX_INT:
        return str(value)
    if type(value) is not str or not 0 < len(value) <= MAX_KEY:
        found = show(value) if value is None or type(value) in (bool, int, float, str) else type(value).__name__
        raise SpecError(
            "not a key",
            file=file,
            line=node.line,
            path=show_path(path),
            found=found,
            allowed=f"a word of up to {MAX_KEY} characters",
        )
    if value == "<<":
        raise SpecError("merge keys are not allowed", file=file, line=node.line, path=show_path(path))
    _limited(value, file, node.line, path)
    return value


def _limited(value: Any, file: str | None, line: int | None, path: Path) -> Any:
    problem = None
    if type(value) is int and abs(value) > MAX_INT:
        problem = "the number is too large"
    elif type(value) is float and not math.isfinite(value):
        problem = "numbers must be finite"
    elif type(value) is str and len(value) > MAX_SCALAR:
        problem = f"longer than {MAX_SCALAR} characters"
    elif type(value) is str and any(0xD800 <= ord(c) <= 0xDFFF or c == "\0" for c in value):
        problem = "contains a character that is not valid text"
    if problem:
        raise SpecError(problem, file=file, line=line, path=show_path(path), found=show(value))
    return value


def _too_big(file: str | None, line: int | None, path: Path) -> SpecError:
    allowed = f"{MAX_DEPTH} levels and {MAX_NODES} values"
    where = show_path(path)
    return SpecError("nested too deeply or too many values", file=file, line=line, path=where, allowed=allowed)
