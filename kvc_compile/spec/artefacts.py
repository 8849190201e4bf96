"""Files beside a spec: tables by layer and head, and tensors. Strangers wrote them: nothing in them is run. No torch.

A table has a row for each layer and in it an entry for each KV head: a number, or the name of a class. It is a list of
lists in the spec itself, or a file:

    .json         [[..], ..], or {"tables": {name: [[..], ..]}, "about": {..}}
    .tsv          a line for each layer, numbers with blanks between them
    .safetensors  a tensor [layers, heads] for each table
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, NoReturn

from .errors import Path, SpecError, show, show_path

Cell = float | str
Rows = tuple[tuple[Cell, ...], ...]

MAX_TABLE = 1 << 22  # bytes of a file of tables
MAX_HEADER = 1 << 24  # bytes of the description of tensors
FORMATS = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U8": "B", "BOOL": "?"}
SIZES = {**{name: struct.calcsize(f"<{code}") for name, code in FORMATS.items()}, "BF16": 2, "F8_E4M3": 1}


@dataclass(frozen=True)
class Artefact:
    """A file as it was when the spec was read. name: its path in the spec's folder; digest: SHA-256, 64 hex digits."""

    name: str
    digest: str


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. dtype: as safetensors spells it; start, stop: bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Place:
    """Where an artefact is asked for: the spec's file, the key path, and the artefact's name."""

    file: str | None
    path: Path
    name: str

    def fail(self, message: str, found: str | None = None, allowed: str | None = None) -> NoReturn:
        raise SpecError(
            f"{self.name}: {message}", file=self.file, path=show_path(self.path), found=found, allowed=allowed
        )


def digest(path: FilePath) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def tables(path: FilePath, at: Place) -> dict[str, Rows]:
    """The tables of a file by their names, "" for one without a name. Raises SpecError."""
    if path.stat().st_size > MAX_TABLE:
        at.fail("too large for a table", f"{path.stat().st_size} bytes", f"at most {MAX_TABLE}")
    try:
        if path.suffix == ".safetensors":
            return {name: _numbers(path, t, name, at) for name, t in tensors(path, at).items()}
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".tsv":
            lines = [line.split() for line in text.splitlines() if line.strip()]
            return {"": rows([[float(cell) for cell in line] for line in lines], at)}
        return _json(json.loads(text), at)
    except (ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, SpecError):
            raise
        at.fail("cannot be read", show(str(error).splitlines()[0] if str(error) else type(error).__name__))


def _json(data: Any, at: Place) -> dict[str, Rows]:
    if isinstance(data, list):
        return {"": rows(data, at)}
    if not isinstance(data, dict) or not isinstance(data.get("tables"), dict) or data.keys() - {"tables", "about"}:
        at.fail("holds no tables", show(data), '[[..], ..], or {"tables": {NAME: [[..], ..]}, "about": {..}}')
    return {str(name): rows(table, at, f"tables.{name}") for name, table in data["tables"].items()}


def rows(data: Any, at: Place, inside: str = "") -> Rows:
    """A list of lists as a table: all numbers, or all words. Raises SpecError."""
    where = f" in {show(inside)[1:-1]}" if inside else ""
    if not isinstance(data, list) or not data or not all(isinstance(row, list) and row for row in data):
        at.fail(f"not a table{where}", show(data), "a list for each layer, with an entry for each KV head")
    for i, row in enumerate(data):
        for h, cell in enumerate(row):
            number = type(cell) in (int, float) and math.isfinite(cell)
            if not number and type(cell) is not str:
                at.fail(f"layer {i}, head {h}{where}", show(cell), "a finite number, or the name of a class")
            if (type(cell) is str) != (type(data[0][0]) is str):
                at.fail(f"layer {i}, head {h}{where}: numbers and names together", show(cell), "one or the other")
    return tuple(tuple(cell if isinstance(cell, str) else float(cell) for cell in row) for row in data)


def shaped(table: Rows, heads: Sequence[int], at: Place) -> Rows:
    """The table, if it has a row for each layer of a model with so many KV heads in each. Raises SpecError."""
    layers = len(heads)
    if len(table) != layers:
        uniform = f" with {heads[0]} KV heads each" if len(set(heads)) == 1 else ""
        at.fail(f"the model has {layers} layers{uniform}", f"{len(table)} rows", f"{layers} rows")
    for i, (row, wanted) in enumerate(zip(table, heads)):
        if len(row) != wanted:
            at.fail(f"layer {i} has {wanted} KV heads", f"{len(row)} entries in row {i}", f"{wanted} entries")
    return table


def tensors(path: FilePath, at: Place) -> dict[str, Stored]:
    """What a safetensors file holds: its header is read, and every entry checked against the file. Raises SpecError."""
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            at.fail("not a safetensors file", f"{size} bytes, whose header claims {length}")
        try:
            data = json.loads(f.read(length).decode())
        except (ValueError, RecursionError):
            at.fail("not a safetensors file", "a header that is no JSON")
    if not isinstance(data, dict):
        at.fail("not a safetensors file", "a header that is no mapping")
    base, found = 8 + length, {}
    for name, entry in data.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            whole = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
            good = whole and stop - start == math.prod(shape) * SIZES[dtype] and base + stop <= size
        except (KeyError, TypeError, ValueError):
            good = False
        if not good:
            at.fail(f"tensor {show(name)}", "an entry that does not fit the file", f"dtype one of {', '.join(SIZES)}")
        found[str(name)] = Stored(dtype, shape, base + start, base + stop)
    return found


def _numbers(path: FilePath, t: Stored, name: str, at: Place) -> Rows:
    if len(t.shape) != 2 or 0 in t.shape:
        at.fail(f"tensor {show(name)}", f"shape {list(t.shape)}", "[layers, KV heads]")
    with path.open("rb") as f:
        f.seek(t.start)
        raw = f.read(t.stop - t.start)
    if t.dtype == "BF16":  # the upper half of an fp32
        raw = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
    elif t.dtype not in FORMATS:
        at.fail(f"tensor {show(name)}", t.dtype, ", ".join([*FORMATS, "BF16"]))
    count = math.prod(t.shape)
    flat = [float(x) for x in struct.unpack(f"<{count}{FORMATS.get(t.dtype, 'f')}", raw)]
    width = t.shape[1]
    return rows([flat[i : i + width] for i in range(0, count, width)], at, name)
