"""The doors around `torch.compile`: places where generation would slip past a compiled call, and run uncompressed.

- `torch.compile(model, backend="kvc").generate` is the original module's method, bound to the original module.
- On a GPU, Hugging Face's `generate` compiles decoding by itself (`get_compiled_call`), with Inductor, around any
  `model.compile`.
- A `CompileConfig(backend="kvc", options=...)` for `generate` has a mode as well, unless told otherwise, and
  `torch.compile` refuses the two together.
- Dynamo takes two compiles for the same if their options are equal, and the path of a spec file equals itself when the
  file has changed.
All are closed by two properties and two methods, which do nothing for modules that are not compiled with this backend.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch._dynamo.eval_frame import OptimizedModule, _TorchDynamoContext

from kvc_compile.request import Request


def backend_of(compiled: Any) -> Any:
    """The compiler function behind a `torch.compile`d callable or its context, or None."""
    ctx = compiled
    if not isinstance(ctx, _TorchDynamoContext):
        config = getattr(compiled, "get_compiler_config", None)
        cells = getattr(config, "__closure__", None) or ()
        ctx = next((c.cell_contents for c in cells if isinstance(c.cell_contents, _TorchDynamoContext)), None)
    found: Any = getattr(ctx, "callback", None)
    while hasattr(found, "_torchdynamo_orig_backend"):
        found = found._torchdynamo_orig_backend
    return getattr(found, "compiler_fn", found)


def is_ours(compiled: Any) -> bool:
    """Whether a compiled callable or context belongs to this backend."""
    from kvc_compile.backend import kvc

    return compiled is not None and backend_of(compiled) is kvc


@contextlib.contextmanager
def calls_compiled(module: torch.nn.Module, ctx: _TorchDynamoContext) -> Iterator[None]:
    """Within, calling `module` runs what `ctx` compiles, as after `module.compile`."""
    before = module._compiled_call_impl
    if not is_ours(before):
        calls = module.__dict__.setdefault("_kvc_calls", {})
        if id(ctx) not in calls:
            calls[id(ctx)] = (ctx, ctx(module._call_impl))
        module._compiled_call_impl = calls[id(ctx)][1]
    try:
        yield
    finally:
        module._compiled_call_impl = before


def _generate(self: OptimizedModule) -> Any:
    method: Any = self._orig_mod.generate
    if not is_ours(self.dynamo_ctx):
        return method

    @functools.wraps(method)
    def generate(*args: Any, **kwargs: Any) -> Any:
        with calls_compiled(self._orig_mod, self.dynamo_ctx):
            return method(*args, **kwargs)

    return generate


def _get_compiled_call(original: Any) -> Any:
    @functools.wraps(original)
    def get_compiled_call(self: Any, compile_config: Any) -> Any:
        if is_ours(self._compiled_call_impl) or is_ours(self.__dict__.get("forward")):
            return self.__call__
        return original(self, with_mode_in_options(compile_config))

    get_compiled_call.kvc_door = True  # type: ignore[attr-defined]
    return get_compiled_call


def with_mode_in_options(config: Any) -> Any:
    """A `CompileConfig` for this backend as `torch.compile` takes it; any other as it is."""
    if config is None or config.backend != "kvc" or config.options is None:
        return config
    return dataclasses.replace(config, mode=None, options=Request.of(config.options, config.mode))


def _module_compile(original: Any) -> Any:
    @functools.wraps(original)
    def compile(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        install()  # transformers may have been imported since
        return original(self, *args, **kwargs)

    compile.kvc_door = True  # type: ignore[attr-defined]
    return compile


class _Resolved(dict[str, Any]):
    """The keyword arguments that `torch.compile` keeps for this backend: `options` is read as soon as it is given, so
    that what Dynamo compares, and what is compiled later, is the content that a file or a dict had at that moment."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, Request.of(value, self.get("mode")) if key == "options" else value)


def _kwargs() -> property:
    """`torch._TorchCompileWrapper.kwargs`. Its `__init__` cannot be wrapped: it is running when, looking the backend
    up, it imports this package, and sets `kwargs` after that."""

    def put(self: Any, value: dict[str, Any]) -> None:
        from kvc_compile.backend import kvc

        self.__dict__["kwargs"] = value
        if getattr(self, "compiler_fn", None) is kvc:
            self.__dict__["kwargs"] = _Resolved()
            for key in sorted(value):  # "mode" before "options", which reads it
                self.__dict__["kwargs"][key] = value[key]

    return property(lambda self: self.__dict__["kwargs"], put)


def install() -> None:
    """Close the doors; safe to call again, and again after transformers was imported."""
    if not isinstance(OptimizedModule.__dict__.get("generate"), property):
        OptimizedModule.generate = property(_generate)  # type: ignore[assignment,attr-defined]
    if not isinstance(torch._TorchCompileWrapper.__dict__.get("kwargs"), property):
        torch._TorchCompileWrapper.kwargs = _kwargs()  # type: ignore[assignment,attr-defined]
    if not hasattr(torch.nn.Module.compile, "kvc_door"):
        torch.nn.Module.compile = _module_compile(torch.nn.Module.compile)  # type: ignore[method-assign]
    modeling = sys.modules.get("transformers.modeling_utils")
    model_class = getattr(modeling, "PreTrainedModel", None)
    if model_class is not None and not hasattr(model_class.get_compiled_call, "kvc_door"):
        model_class.get_compiled_call = _get_compiled_call(model_class.get_compiled_call)
