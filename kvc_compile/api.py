"""`kvc_compile.compile`: the same as `model.compile(backend="kvc", options=...)`, with checks."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from kvc_compile.request import OptionError, Request

M = TypeVar("M", bound=torch.nn.Module)


def compile(model: M, spec: Any, *, strict: bool = True, **runtime: Any) -> M:
    """Compile `model` in place so that its calls, and `generate`, run on the cache that `spec` describes.

    spec: a Spec, a dict, a path or a preset name. runtime: mode, dump, verify, tune (see `Request`), and `dynamic` and
    `fullgraph` of torch.compile. strict: an attention that cannot be compressed is an error, not a warning.
    Returns the model. Raises SpecError for a bad spec, OptionError for a bad option.
    """
    if not isinstance(model, torch.nn.Module):
        raise OptionError(f"kvc_compile.compile takes a torch.nn.Module, got {type(model).__name__}")
    dynamo = {k: runtime.pop(k) for k in ("dynamic", "fullgraph") if k in runtime}
    request = Request.of({"spec": spec, "strict": strict, **runtime})
    model.compile(backend="kvc", options=request, **dynamo)
    return model
