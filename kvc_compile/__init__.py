"""A torch.compile backend that compresses KV caches: `torch.compile(model, backend="kvc", options=SPEC)`.

Importing this package imports no torch: the names below are loaded when they are first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvc_compile.api import compile as compile
    from kvc_compile.explain import explain as explain
    from kvc_compile.report import report as report
    from kvc_compile.spec import Spec as Spec
    from kvc_compile.spec import SpecError as SpecError
    from kvc_compile.spec import presets as presets

__version__ = "0.1.0"

_HOME = {
    "Spec": "spec",
    "SpecError": "spec",
    "presets": "spec",
    "compile": "api",
    "explain": "explain",
    "report": "report",
}
__all__ = ["Spec", "SpecError", "compile", "explain", "presets", "report"]


class _Package(ModuleType):
    """The class of this package: its public names are properties, because Python binds a submodule that is imported to
    its name in the package, and `report` and `explain` are also the names of functions. Here the functions win."""

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_HOME})


def _public(name: str) -> property:
    def load(_: ModuleType) -> Any:
        return getattr(import_module(f"kvc_compile.{_HOME[name]}"), name)

    def ignore(_: ModuleType, value: Any) -> None:
        pass

    return property(load, ignore)


for _name in _HOME:
    setattr(_Package, _name, _public(_name))
sys.modules[__name__].__class__ = _Package
