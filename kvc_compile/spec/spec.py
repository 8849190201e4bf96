"""A spec: loaded, checked, compared by content."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path as FilePath
from typing import Any

import yaml

from kvc_compile.policy import Selection, key_of

from . import artefacts, heads, laws, ranges, source
from .artefacts import Artefact, Place
from .channels import channels_of
from .errors import NotImplementedInSpec, Path, SpecError, nearest, show
from .expand import expand, scoped
from .grammar import Context
from .schema import SPEC
from .source import Node
from .tensors import LayerSpec, TensorSpec, tensor_of

LINE = 80  # characters: what is longer is written over several lines


@dataclass(frozen=True)
class Origin:
    """Where a spec came from and what in it is not implemented; no part of its content."""

    file: str | None = None
    todo: tuple[tuple[str, str], ...] = ()  # key path, what of it
    folder: str | None = None  # where artefacts are
    notes: tuple[str, ...] = ()  # what the short form did that its author may not expect


@dataclass(frozen=True)
class Spec:
    """How a model's KV cache is stored, kept and read. Equal specs say the same, whatever their names and spelling.

    content: the expanded spec as canonical JSON; artefacts: the files it names, so far as they are there, as they were
    when it was read; name, description: for people.
    """

    content: str
    name: str = field(default="", compare=False)
    description: str = field(default="", compare=False)
    origin: Origin = field(default=Origin(), compare=False, repr=False)
    artefacts: tuple[Artefact, ...] = field(default=(), repr=False)

    @staticmethod
    def load(x: Spec | Mapping[str, Any] | str | os.PathLike[str]) -> Spec:
        """A spec from a Spec, a mapping, the path of a YAML or JSON file, or the name of a preset.

        Raises SpecError, and nothing else, if it is not a valid spec.
        """
        if isinstance(x, Spec):
            return x
        if isinstance(x, Mapping):
            return _build(source.from_data(x), None, None, "")
        if isinstance(x, str) and x in presets():
            return _build(source.parse(preset_text(x), x), x, None, x)
        if not isinstance(x, (str, os.PathLike)) or isinstance(os.fspath(x), bytes):
            raise SpecError(
                "not a spec",
                found=f"an object of type {type(x).__name__}",
                allowed="a Spec, a mapping, a path or the name of a preset",
            )
        path = FilePath(x)
        if not _exists(path):
            raise SpecError(
                "no such file or preset",
                found=show(str(x)),
                nearest=nearest(str(x), presets()),
                allowed="a path, or the name of a preset: `kvc presets` lists them",
            )
        root = source.parse(source.read_file(path), str(path))
        return _build(root, str(path), path.parent, path.stem)

    @cached_property
    def digest(self) -> str:
        """12 hex digits that stand for the content."""
        files = "".join(f"\n{a.name} {a.digest}" for a in self.artefacts)
        return hashlib.sha256((self.content + files).encode()).hexdigest()[:12]

    @property
    def _nameless(self) -> str:
        return f"spec-{self.digest}"

    def expanded(self) -> dict[str, Any]:
        """The full form as plain data: no short form, no defaults spelled out."""
        data = json.loads(self.content)
        names = {"name": self.name, "description": self.description}
        names = {key: text for key, text in names.items() if text not in ("", self._nameless)}
        return {"kvc": data.pop("kvc"), **names, **data}

    def to_yaml(self) -> str:
        """The full form as YAML; loading it gives an equal spec."""
        return "".join(line + "\n" for line in _yaml(self.expanded(), ""))

    @property
    def missing(self) -> tuple[str, ...]:
        """The key paths of what is only checked so far; () if the spec runs."""
        return tuple(path for path, _ in self.origin.todo)

    def require_implemented(self) -> None:
        """Raises NotImplementedInSpec if anything here is only checked so far, naming the key paths."""
        if not self.origin.todo:
            return
        paths = [path + (f" ({what})" if what else "") for path, what in self.origin.todo]
        shown = ", ".join(paths[:12]) + (f" and {len(paths) - 12} more" if len(paths) > 12 else "")
        error = NotImplementedInSpec(f"not implemented yet: {shown}", file=self.origin.file)
        error.paths = self.missing
        raise error

    def artefact(self, name: str, *path: str | int) -> FilePath:
        """The file `name` that the spec asks for at the key `path`. Raises SpecError if it is not there, or not the one
        that was there when the spec was read."""
        at = Place(self.origin.file, path, name)
        if self.origin.folder is None:
            at.fail(
                "the spec has no folder to find it in", "a mapping or a preset", "a spec in a file, beside this one"
            )
        known = {a.name: a.digest for a in self.artefacts}
        file = FilePath(self.origin.folder) / name
        if name not in known:
            at.fail("no such file", f"nothing in {self.origin.folder} of that name", "a file beside the spec")
        if not file.is_file() or artefacts.digest(file) != known[name]:
            at.fail("the file has changed since the spec was read", str(file), "the file as it was, or a new Spec.load")
        return file

    def table(self, data: Any, kv_heads: Sequence[int], *path: str | int) -> tuple[tuple[float, ...], ...]:
        """Numbers by layer and KV head, of `alloc.table` for instance. data: what the spec says at the key `path`, rows
        or the name of a file; kv_heads: KV heads of each layer. Raises SpecError where they do not fit."""
        at = Place(self.origin.file, path, data if isinstance(data, str) else "table")
        found = (
            artefacts.tables(self.artefact(data, *path), at)
            if isinstance(data, str)
            else {"": artefacts.rows(data, at)}
        )
        if len(found) != 1:
            at.fail("nothing says which table counts", ", ".join(sorted(found)) or "no table", "a file with one table")
        (rows,) = found.values()
        if isinstance(rows[0][0], str):
            at.fail("names where numbers are needed", repr(rows[0][0]), "numbers by layer and KV head")
        return tuple(tuple(map(float, row)) for row in artefacts.shaped(rows, kv_heads, at))

    def head_classes(self, kv_heads: Sequence[int]) -> tuple[tuple[str, ...], ...]:
        """The class of each KV head, by layers: the names under `heads:`; () without them. kv_heads: KV heads of each
        layer of the model. Raises SpecError where the table is not there or does not fit the model."""
        data = json.loads(self.content).get("heads")
        if data is None:
            return ()
        path, name = ("heads", "table"), data["table"]
        at = Place(self.origin.file, path, name if isinstance(name, str) else "table")
        if isinstance(name, str):
            return heads.resolve(data, artefacts.tables(self.artefact(name, *path), at), kv_heads, at)
        return heads.resolve(data, {"": artefacts.rows(name, at)}, kv_heads, at)

    def fragment(self, i: int, n_layers: int, head_class: str | None = None) -> dict[str, Any]:
        """What holds in layer i of a model of `n_layers` layers, in the heads of a class, as plain data: tokens, k, v,
        keep, select, attend. A class is laid over the layer. Raises SpecError if a layer is out of range."""
        data = json.loads(self.content)
        names = [name for name in data.get("layers", {}) if name != "kv_of"]
        owner = ranges.resolve(names, n_layers, ("layers",), Context(self.origin.file))
        found = scoped(data, data["layers"][owner[i]] if i in owner else {})
        return scoped(found, {} if head_class is None else data["heads"][head_class])

    def layer(self, i: int, n_layers: int) -> LayerSpec:
        """What holds for layer i of a model of `n_layers` layers.

        Raises SpecError if i, or a layer named in the spec, is out of range, and NotImplementedInSpec if the spec uses
        what is only checked so far.
        """
        self.require_implemented()
        if not 0 <= i < n_layers:
            raise SpecError(
                f"the model has {n_layers} layers",
                file=self.origin.file,
                found=f"layer {i}",
                allowed=f"0..{n_layers - 1}",
            )
        data = json.loads(self.content)
        names = [name for name in data.get("layers", {}) if name != "kv_of"]
        owner = ranges.resolve(names, n_layers, ("layers",), Context(self.origin.file))
        if i in owner:
            data = scoped(data, data["layers"][owner[i]])
        found = _layer(data)
        if found.select is None or found.select.query.index.kind != "channels":
            return found
        folder = None if self.origin.folder is None else FilePath(self.origin.folder)
        rows = channels_of(found.select.query.index.file, folder, self.origin.file, i, n_layers)
        return replace(found, select=Selection.of(data["select"], data.get("tokens", {}), rows))

    def scopes(self) -> tuple[tuple[str, LayerSpec], ...]:
        """("", base) and (range, what holds there) for each range of `layers:`. Raises as `layer` does."""
        self.require_implemented()
        data = json.loads(self.content)
        return tuple((path[-1] if path else "", _layer(fragment)) for path, fragment in _scopes(data))


def presets() -> tuple[str, ...]:
    """The names of the specs that come with the package, those that do not run yet included (`Spec.missing`)."""
    names = (entry.name for entry in _folder().iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


def preset_text(name: str) -> str:
    """The YAML of a preset, with its comments."""
    return (_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def _yaml(data: dict[str, Any], indent: str) -> Iterator[str]:
    """A mapping as YAML lines: what fits a line is on one line."""
    for key, value in data.items():
        line = indent + _flow({key: value})[1:-1]
        if isinstance(value, dict) and len(line) > LINE:
            yield f"{indent}{_flow(key)}:"
            yield from _yaml(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict) and len(line) > LINE:
            yield f"{indent}{_flow(key)}:"
            for item in value:
                first, *rest = _yaml(item, indent + "  ") if len(_flow(item)) > LINE else (_flow(item),)
                yield f"{indent}- {first.strip()}"
                yield from rest
        else:
            yield line


def _flow(value: Any) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").removesuffix("\n")


def _folder() -> Any:
    return resources.files(__package__) / "presets"


def _exists(path: FilePath) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long a name, a NUL in it
        return False


def _build(root: Node, file: str | None, folder: FilePath | None, name: str) -> Spec:
    ctx = Context(file, folder, lines=_lines(root))
    data = SPEC.check(root, (), ctx)
    if file is not None and "kvc" not in data:
        ctx.fail((), "`kvc: 1` is missing, the version of the vocabulary", root, "kvc: 1 as the first line")
    full = expand(data, ctx)
    laws.check(full, ctx)
    names = {key: full.pop(key, "") for key in ("name", "description")}
    # a second check puts the keys into the vocabulary's order, which makes the text canonical
    full = SPEC.check(source.from_data(full, file), (), Context(file))
    origin = Origin(
        file, tuple(dict.fromkeys(ctx.todo)), None if folder is None else str(folder.absolute()), tuple(ctx.notes)
    )
    files = () if folder is None else _artefacts(folder, ctx.files)
    spec = Spec(json.dumps(full), names["name"], names["description"], origin, files)
    if spec.name:
        return spec
    # a file may have any name, also one that could not be written into a spec
    fits = 0 < len(name) <= 80 and name.isprintable()
    return replace(spec, name=name if fits else spec._nameless)


def _artefacts(folder: FilePath, names: list[str]) -> tuple[Artefact, ...]:
    """Those that are there: a calibration can come later."""
    there = [name for name in sorted(set(names)) if (folder / name).is_file()]
    return tuple(Artefact(name, artefacts.digest(folder / name)) for name in there)


def _lines(root: Node) -> dict[Path, int | None]:
    """The line of every value; what `kv` and `bits` expand to is found where they are written."""
    lines: dict[Path, int | None] = {}

    def walk(node: Node, path: Path) -> None:
        lines.setdefault(path, node.line)
        items = node.value.items() if isinstance(node.value, dict) else ()
        for key, item in [*items, *(enumerate(node.value) if isinstance(node.value, list) else ())]:
            walk(item, (*path, key))
            if key in ("kv", "bits"):
                for side in ("k", "v"):
                    if side not in node.value:
                        walk(item, (*path, side))

    walk(root, ())
    return lines


def _layer(fragment: dict[str, Any]) -> LayerSpec:
    k, v = (tensor_of(fragment, side, (), Context()) or TensorSpec() for side in ("k", "v"))
    select = fragment.get("select", "off")
    chosen = None if select == "off" else Selection.of(select, fragment.get("tokens", {}))
    return LayerSpec(k, v, key_of(fragment), chosen)


def _scopes(data: dict[str, Any]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    return [(path, fragment) for path, fragment in laws.scopes(data) if not path or path[0] == "layers"]
