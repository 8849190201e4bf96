"""What the caller asks for: the options of `torch.compile(..., backend="kvc", options=...)` as one frozen value."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvc_compile.spec import Spec, SpecError

RUNTIME = {
    "spec": "a Spec, a dict, a path or a preset name",
    "mode": "a torch.compile mode: default, reduce-overhead (CUDA graphs), max-autotune, max-autotune-no-cudagraphs",
    "dump": "a directory for the graph dump",
    "verify": "true or false",
    "strict": "true or false: an attention that is declined is an error",
    "tune": "true or false: on a GPU, time the kernels' variants when a layout is first used (KVC_TUNE=0: never)",
    "linear": "true or false: on a GPU, linear layers of a decode step by a kernel of ours",
}
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class OptionError(ValueError):
    """An option of the backend that is not known or has a wrong value."""


@dataclass(frozen=True)
class Request:
    """A spec and how to run it."""

    spec: Spec
    mode: str = "default"
    dump: str | None = None
    verify: bool = False
    strict: bool = False
    tune: bool = True
    linear: bool = False
    device: str | None = None  # to plan for, where nothing is compiled: "cpu" or "cuda"; that of the inputs if None

    @staticmethod
    def of(options: Any, mode: str | None = None) -> Request:
        """Read `options`: a Spec, a dict, a path, a preset name, or a dict of one of these and runtime options."""
        runtime: dict[str, Any] = {}
        spec: Any = options
        if isinstance(options, Request):
            return options
        if isinstance(options, Mapping) and "spec" in options:
            for key in options:
                if key not in RUNTIME:
                    near = difflib.get_close_matches(str(key), RUNTIME, 1)
                    hint = f"; did you mean {near[0]!r}?" if near else ""
                    allowed = ", ".join(RUNTIME)
                    raise OptionError(f"unknown option {key!r} of backend 'kvc': allowed are {allowed}{hint}")
            runtime = {k: v for k, v in options.items() if k != "spec"}
            spec = options["spec"]
        elif isinstance(options, Mapping):
            runtime = {k: options[k] for k in RUNTIME if k != "spec" and k in options}
            spec = {k: v for k, v in options.items() if k not in runtime}
        if spec is None:
            raise OptionError("backend 'kvc' needs options: a spec (a preset name, a path, a dict or a Spec)")
        loaded = spec if isinstance(spec, Spec) else Spec.load(spec)
        loaded.require_implemented()
        chosen = runtime.get("mode") or mode or "default"
        if chosen not in MODES:
            raise OptionError(f"mode {chosen!r}: allowed are {', '.join(MODES)}")
        switches = {"verify": False, "strict": False, "tune": True, "linear": False}
        for key in switches:
            switches[key] = runtime.get(key, switches[key])
            if not isinstance(switches[key], bool):
                raise OptionError(f"option {key!r} is {switches[key]!r}: true or false is allowed")
        dump = runtime.get("dump") or os.environ.get("KVC_DUMP") or None
        if dump is not None and not isinstance(dump, (str, Path)):
            raise OptionError(f"option 'dump' is {dump!r}: the path of a directory is allowed")
        made = Request(loaded, chosen, str(dump) if dump else None)
        verify, strict, tune, linear = (switches[name] for name in ("verify", "strict", "tune", "linear"))
        return replace(made, verify=verify, strict=strict, tune=tune, linear=linear)


__all__ = ["OptionError", "Request", "SpecError"]
