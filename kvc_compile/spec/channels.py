"""The table of an index of channels, from the file beside a spec that names it. Data only, no torch.

The file holds whole numbers [layers, kv heads, R], channels of the keys of each head: a `.json` file lists of them, a
`.safetensors` file the tensor `channels`.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path as FilePath
from typing import Any

from .errors import SpecError

MOST = 1 << 26  # bytes
INTEGERS = {"I64": "q", "I32": "i", "I16": "h", "U8": "B"}
KEY = "select.index.basis.table"
Rows = tuple[tuple[int, ...], ...]


def channels_of(name: str, folder: FilePath | None, file: str | None, layer: int, layers: int) -> Rows:
    """The channels of a layer, for each KV head. Raises SpecError."""

    def fail(message: str, found: str, allowed: str) -> SpecError:
        return SpecError(message, file=file, path=KEY, found=found, allowed=allowed)

    if not name:
        raise fail("an index of channels needs their table", "no `table`", "table: FILE.safetensors, or FILE.json")
    if folder is None:
        raise fail("the spec is not in a folder, which the table is in", name, "a spec that is a file next to it")
    path = folder / name
    if not path.is_file():
        raise fail("no such file", name, "a file in the spec's folder")
    try:
        if path.stat().st_size > MOST:
            raise ValueError(f"more than {MOST} bytes")
        table = json.loads(path.read_text()) if path.suffix == ".json" else _tensor(path.read_bytes())
        if len(table) != layers:
            raise ValueError(f"{len(table)} layers, where the model has {layers}")
        rows = tuple(tuple(int(c) for c in head) for head in table[layer])
        if not rows or len({len(head) for head in rows}) > 1 or not rows[0] or min(map(min, rows)) < 0:
            raise ValueError("not as many channels for each head")
    except (ValueError, TypeError, KeyError, RecursionError, struct.error) as error:
        raise fail(f"{name} is no table of channels", str(error), "whole numbers [layers, KV heads, R]") from None
    return rows


def _tensor(raw: bytes) -> Any:
    (length,) = struct.unpack_from("<Q", raw)
    entry = json.loads(raw[8 : 8 + length])["channels"]
    (layers, heads, rank), (start, stop) = entry["shape"], entry["data_offsets"]
    count, code = math.prod(entry["shape"]), INTEGERS[entry["dtype"]]
    if stop - start != count * struct.calcsize(code) or 8 + length + stop > len(raw):
        raise ValueError("an entry that does not fit the file")
    flat = struct.unpack_from(f"<{count}{code}", raw, 8 + length + start)
    rows = [flat[i : i + rank] for i in range(0, count, rank)]
    return [rows[i : i + heads] for i in range(0, layers * heads, heads)]
