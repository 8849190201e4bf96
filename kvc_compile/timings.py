"""The tuning database: how long each variant of a kernel took on a GPU, as JSON to read, share and ship. No torch.

An *entry* is a key and its timings. The key, frozen as VERSION 1:

    source     digest of the source files of the kernel, its helpers and its launch rules
    kernel     "decode" or "attend": `kernels.decode`, `kernels.attend`
    k, v       `Layout.key` of the two caches
    rows       query rows a kv head, rounded up to a power of two
    dtype      of the queries
    programs   batch x kv heads, to the nearest power of two
    tokens     room of the cache, to the nearest power of two
    device     the name that CUDA gives the GPU
    triton     Triton's version

All of it but the bucket (programs, tokens) is the entry's *family*. A timing is the sizes of a variant (`SIZES`) and
its microseconds, null if it does not compile, does not fit the GPU or computes something else.

Any file holds any number of entries. They are looked for in this order: next to the spec (`beside`), in the user's
folder, in the package; then the nearest bucket of the family in any of these. The user's folder has a file for each
entry, FAMILY/PROGRAMSxTOKENS.json, replaced as a whole: processes that store at once lose nothing of each other, and
one that is killed leaves every file as it was, or as it should be. What is no such file is skipped with a warning, and
left where it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kvc_compile.files import write
from kvc_compile.spec import Spec, presets
from kvc_compile.spec.errors import show, show_path

try:
    import fcntl
except ImportError:  # Windows: two processes may tune at once, and disturb each other's timings
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("kvc_compile")

VERSION = 1
SHIPPED = Path(__file__).with_name("tuned")
MAX_BYTES = 4 << 20
MAX_TEXT = 200  # characters
MAX_TIMINGS = 256
MAX_US = 1e9
BUCKET = re.compile(r"[0-9]{1,15}x[0-9]{1,15}\.json")

# The sizes of a variant of each kernel, in order, with their least and largest values: powers of two, `stages` aside.
SIZES: dict[str, dict[str, tuple[float, float]]] = {
    "decode": {
        "BM": (8, 32), "BT": (16, 128), "TP": (16, 32), "CK": (16, 1024), "CV": (16, 1024), "warps": (1, 8),
        "stages": (1, 8), "waves": (0.25, 16),
    },
    "attend": {"BM": (16, 128), "BN": (16, 128), "warps": (1, 8), "stages": (1, 8), "waves": (0.25, 16)},
}  # fmt: skip
DTYPES = ("float16", "bfloat16", "float32")


class TimingsError(ValueError):
    """A file of timings was refused: which, where in it, what was found and what is allowed."""

    def __init__(self, path: tuple[str | int, ...], found: object, allowed: str) -> None:
        self.path, self.found, self.allowed = path, found, allowed
        super().__init__(f"{show_path(path) or 'the file'}: found {show(found)}, allowed: {allowed}")


@dataclass(frozen=True, order=True)
class Key:
    """What a kernel was tuned for: see the top of this file."""

    source: str
    kernel: str
    k: str
    v: str
    rows: int
    dtype: str
    programs: int
    tokens: int
    device: str
    triton: str

    @property
    def family(self) -> str:
        """16 hex digits that stand for all but the bucket."""
        names = {name: x for name, x in asdict(self).items() if name not in ("programs", "tokens")}
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]

    def distance(self, other: Key) -> float:
        """Between the buckets of two keys of a family."""
        return abs(math.log2(self.programs / other.programs)) + abs(math.log2(self.tokens / other.tokens))


@dataclass(frozen=True)
class Entry:
    """The microseconds of each variant that was tried, by its sizes in the order of `SIZES`; None: it cannot be used.

    cut_short: time ran out before all variants were tried.
    """

    key: Key
    timings: tuple[tuple[tuple[float, ...], float | None], ...]
    cut_short: bool = False


def bucket(n: int) -> int:
    """The nearest power of two, by ratio."""
    low = 1 << max(n, 1).bit_length() - 1
    return 2 * low if n * n > 2 * low * low else low


def beside(spec: Spec) -> Path | None:
    """Where the timings that come with a spec are: my-spec.yaml has my-spec.tuning.json next to it. None for a preset,
    or what is no file."""
    file = spec.origin.file
    return None if file is None or file in presets() else Path(file).with_suffix(".tuning.json")


def user_folder() -> Path | None:
    """$KVC_TUNING_DIR, or the user's cache folder; None if the user has none."""
    named, cache = os.environ.get("KVC_TUNING_DIR"), os.environ.get("XDG_CACHE_HOME", "")
    if named:
        return Path(named)
    with contextlib.suppress(RuntimeError):
        return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "kvc_compile" / "tuning"
    return None


# ---------------------------------------------------------------- text


def text_of(entries: Iterable[Entry]) -> str:
    """The entries as a file, in the order of their keys, a line for each timing."""
    texts = map(_entry_text, sorted(entries, key=lambda e: e.key))
    return f'{{"version": {VERSION}, "entries": [' + ",".join(texts) + "\n]}\n"


def _entry_text(e: Entry) -> str:
    names = SIZES[e.key.kernel]
    rows = [json.dumps({**dict(zip(names, sizes, strict=True)), "us": us}) for sizes, us in e.timings]
    lines = ",\n   ".join(rows)
    return (
        f'\n {{"key": {json.dumps(asdict(e.key))},\n  "cut_short": {json.dumps(e.cut_short)},\n'
        f'  "timings": [\n   {lines}]}}'
    )


def read(path: Path) -> tuple[Entry, ...]:
    """The entries of a file. Raises TimingsError, and nothing else, if it is not one of ours, and OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise TimingsError((), "something else", "a regular file")
    with open(path, "rb") as f:
        data = f.read(MAX_BYTES + 1)
    return parse(data)


def parse(data: bytes) -> tuple[Entry, ...]:
    """The entries of a file's content: plain data, every field of which is checked. Raises TimingsError."""
    if len(data) > MAX_BYTES:
        raise TimingsError((), f"more than {MAX_BYTES} bytes", "up to 4 MiB")
    try:
        found = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise TimingsError((), f"no JSON ({str(error)[:80]})", "JSON") from None
    top = _mapping(found, (), ("version", "entries"))
    if type(top["version"]) is not int or top["version"] != VERSION:
        raise TimingsError(("version",), top["version"], str(VERSION))
    return tuple(_entry(x, ("entries", i)) for i, x in enumerate(_list(top["entries"], ("entries",), MAX_BYTES)))


def _entry(x: Any, path: tuple[str | int, ...]) -> Entry:
    top = _mapping(x, path, ("key", "cut_short", "timings"))
    at = (*path, "key")
    values = _mapping(top["key"], at, tuple(f.name for f in fields(Key)))
    for name in ("rows", "programs", "tokens"):
        _number(values[name], (*at, name), 1, 1 << 40)
    for name in ("source", "k", "v", "device", "triton"):
        text = values[name]
        if type(text) is not str or not 0 < len(text) <= MAX_TEXT or not text.isprintable():
            raise TimingsError((*at, name), text, f"1 to {MAX_TEXT} printable characters")
    for name, allowed in (("kernel", tuple(SIZES)), ("dtype", DTYPES)):
        if type(values[name]) is not str or values[name] not in allowed:
            raise TimingsError((*at, name), values[name], ", ".join(allowed))
    if type(top["cut_short"]) is not bool:
        raise TimingsError((*path, "cut_short"), top["cut_short"], "true or false")
    key = Key(**values)
    timings = {}
    for i, row in enumerate(_list(top["timings"], (*path, "timings"), MAX_TIMINGS)):
        at = (*path, "timings", i)
        sizes = SIZES[key.kernel]
        row = _mapping(row, at, (*sizes, "us"))
        for name, (least, most) in sizes.items():
            _number(row[name], (*at, name), least, most, power=name != "stages", whole=name != "waves")
        us = row["us"]
        if us is not None and not (type(us) in (int, float) and 0 < us <= MAX_US):
            raise TimingsError((*at, "us"), us, "microseconds, or null")
        timings[tuple(row[name] for name in sizes)] = us
    return Entry(key, tuple(timings.items()), top["cut_short"])


def _mapping(x: Any, path: tuple[str | int, ...], names: tuple[str, ...]) -> dict[str, Any]:
    if type(x) is not dict or set(x) != set(names):
        raise TimingsError(path, x, "a mapping with " + ", ".join(names))
    return x


def _list(x: Any, path: tuple[str | int, ...], most: int) -> list[Any]:
    if type(x) is not list or len(x) > most:
        raise TimingsError(path, x, f"a list of up to {most}")
    return x


def _number(
    x: Any, path: tuple[str | int, ...], least: float, most: float, power: bool = True, whole: bool = True
) -> None:
    fits = type(x) in ((int,) if whole else (int, float)) and least <= x <= most
    if not fits or (power and math.frexp(x)[0] != 0.5):
        kind = "powers of two" if power else "whole numbers"
        raise TimingsError(path, x, f"{kind} from {least} to {most}")


# ---------------------------------------------------------------- files


class Database:
    """The entries of all places. What was read once is kept: another process's newer entries show after `reload`."""

    def __init__(self, folder: Path | None, shipped: Path = SHIPPED):
        self.folder = folder
        self.specs: dict[Path, tuple[Entry, ...]] = {}  # next to specs, in the order in which they were used
        self.families: dict[str, tuple[Entry, ...]] = {}  # of the user's folder
        self.shipped = shipped
        self.defaults: tuple[Entry, ...] | None = None

    def use(self, file: Path) -> bool:
        """Look into this file first, from now on; whether that is news."""
        new = file not in self.specs and file.exists()
        if new:
            self.specs[file] = _read_all([file])
        return new

    def ranked(self, key: Key) -> list[Entry]:
        """The entries of the key's family, those of the key itself first, then by the distance of their buckets."""
        places = [*self.specs.values(), self._family(key.family), self._defaults()]
        found = [(i, e) for i, entries in enumerate(places) for e in entries if e.key.family == key.family]
        order = sorted(found, key=lambda x: (key.distance(x[1].key), x[0], x[1].key.tokens, x[1].key.programs))
        return [e for _, e in order]

    def find(self, key: Key) -> Entry | None:
        return next((e for e in self.ranked(key) if e.key == key), None)

    def save(self, entry: Entry) -> None:
        """Store an entry in the user's folder, for this process and all others. A folder that cannot be written to is
        no error."""
        kept = [e for e in self._family(entry.key.family) if e.key != entry.key]
        self.families[entry.key.family] = (entry, *kept)
        if self.folder is None:
            return
        name = f"{entry.key.programs}x{entry.key.tokens}.json"
        try:
            write(self.folder / entry.key.family / name, text_of([entry]))
        except OSError as error:
            _warn(self.folder, f"timings cannot be stored: {error.strerror}")

    def reload(self, key: Key) -> None:
        """Forget what was read of the key's family."""
        self.families.pop(key.family, None)

    def _family(self, family: str) -> tuple[Entry, ...]:
        if family not in self.families:
            self.families[family] = () if self.folder is None else _read_all(_files(self.folder / family, BUCKET))
        return self.families[family]

    def _defaults(self) -> tuple[Entry, ...]:
        if self.defaults is None:
            self.defaults = _read_all(_files(self.shipped, re.compile(r".*\.json")))
        return self.defaults

    @contextlib.contextmanager
    def alone(self, key: Key, seconds: float) -> Iterator[None]:
        """Only one process tunes on a GPU of this name at a time: waits for the others, no longer than `seconds`. The
        lock goes with its process."""
        handle = self._open_lock(key) if fcntl else None
        if handle is None:
            yield
            return
        give_up = time.monotonic() + seconds
        try:
            while not _locked(handle) and time.monotonic() < give_up:
                time.sleep(0.05)
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # a child of a fork may hold the file open
            os.close(handle)

    def _open_lock(self, key: Key) -> int | None:
        if self.folder is None:
            return None
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            name = hashlib.sha256(key.device.encode()).hexdigest()[:16]
            return os.open(self.folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        return None


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _files(folder: Path, name: re.Pattern[str]) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(p for p in folder.iterdir() if name.fullmatch(p.name))
    return []


def _read_all(files: Iterable[Path]) -> tuple[Entry, ...]:
    entries: list[Entry] = []
    for file in files:
        try:
            entries += read(file)
        except FileNotFoundError:
            continue
        except (TimingsError, OSError) as error:
            _warn(file, f"skipped: {error.strerror if isinstance(error, OSError) else error}")
    return tuple(entries)


_warned: set[Path] = set()


def _warn(path: Path, what: str) -> None:
    """Once for each file."""
    if path not in _warned:
        _warned.add(path)
        log.warning("kvc tuning: %s: %s", path if str(path).isprintable() else ascii(str(path)), what)
