"""The ways to hold a cache that are compared: how each is filled, how the model is compiled for it, what it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from kvc_compile.bench import models, predict, synthetic
from kvc_compile.bench.plan import QUANTIZED, STATIC
from kvc_compile.spec import Spec

QUANTIZED_BITS = 4
SIZES = r".*\.max_cache_len"  # what Dynamo must not take for a constant, for one graph to serve all sizes


class Missing(Exception):
    """Something that a baseline needs is not installed."""


class HfStatic:
    """Hugging Face's static cache and `torch.compile` as `generate` uses it on a GPU, but with sizes that are constants
    in the graph, which is faster. Its attention is over all of the room.

    name: for the tables; own_graph: each size has a compiled graph of its own; compiled_prefill: else a prompt runs
    through the model as it is, as `generate` does it; note: what else a reader should know.
    """

    note = ""

    name, own_graph, compiled_prefill = STATIC, True, False

    def __init__(self, config: Any, device: str, mode: str | None = None):
        self.config, self.device = config, device
        self.pairs = models.layouts(config, Spec.load("lossless"), device)
        self.mode = mode or usual_mode(device)

    def compile(self, model: Any) -> Callable[..., Any]:
        return torch.compile(model, mode=self.mode, dynamic=False)

    def backend(self, gm: Any, inputs: list[Any]) -> Any:
        """What `compile` hands Dynamo's graph to."""
        return torch._TorchCompileInductorWrapper(self.mode, None, False)(gm, inputs)

    def tracing(self) -> AbstractContextManager[Any]:
        """Within, the model is compiled."""
        return nullcontext()

    def filled(self, like: Tensor, batch: int, tokens: int, room: int) -> Any:
        """A cache object after `tokens` tokens. like: a tensor of the model's dtype on its device."""
        return synthetic.plain(self.config, self.pairs, batch, tokens, room, like)

    def empty(self, room: int) -> Any:
        from transformers import StaticCache

        return StaticCache(config=self.config, max_cache_len=room)

    def read_bytes(self, batch: int, tokens: int, room: int) -> int:
        return batch * sum(layout.dense_bytes(room) for pair in self.pairs for layout in pair)

    def room_bytes(self, batch: int, room: int) -> int:
        return self.read_bytes(batch, room, room)


class Compressed(HfStatic):
    """The same cache object, stored as a spec says and compiled with this backend."""

    own_graph, compiled_prefill = False, True

    def __init__(self, config: Any, device: str, mode: str | None, spec: Spec, linear: bool = False):
        super().__init__(config, device, mode)
        self.name, self.spec = spec.name, spec  # type: ignore[misc]
        self.pairs = models.layouts(config, spec, device)
        self.options: dict[str, Any] = {"spec": spec, "mode": self.mode, "strict": True, "linear": linear}

    def compile(self, model: Any) -> Callable[..., Any]:
        return torch.compile(model, backend="kvc", options=self.options)

    def backend(self, gm: Any, inputs: list[Any]) -> Any:
        from torch._dynamo.backends.registry import lookup_backend

        compiler: Any = lookup_backend("kvc")
        return compiler(gm, inputs, options=self.options)

    def tracing(self) -> AbstractContextManager[Any]:
        return torch.compiler.config.patch(dynamic_sources=SIZES)  # type: ignore[attr-defined]

    def filled(self, like: Tensor, batch: int, tokens: int, room: int) -> Any:
        return synthetic.compressed(self.config, self.pairs, batch, tokens, room, like)

    def read_bytes(self, batch: int, tokens: int, room: int) -> int:
        return predict.cache_read(self.pairs, batch, tokens)

    def room_bytes(self, batch: int, room: int) -> int:
        return predict.cache_room(self.pairs, batch, room)


class HfQuantized(HfStatic):
    """Hugging Face's quantised cache: every step dequantises all of it, and nothing is compiled. It is filled by a
    prompt. Its bytes predict nothing: it reads what it stores, and writes and reads all of it once more."""

    name, own_graph, compiled_prefill = QUANTIZED, False, False

    def compile(self, model: Any) -> Callable[..., Any]:
        return model

    def filled(self, like: Tensor, batch: int, tokens: int, room: int) -> Any:
        from transformers import QuantizedCache

        failed = []
        for backend in ("quanto", "hqq"):
            try:
                self.note = f"{backend}, {QUANTIZED_BITS} bits"
                return QuantizedCache(backend, self.config, nbits=QUANTIZED_BITS)
            except ImportError as error:
                failed.append(f"{backend}: {str(error).splitlines()[0]}")
        raise Missing("; ".join(failed))


def usual_mode(device: str) -> str:
    return "reduce-overhead" if device.startswith("cuda") else "default"


def cache_of(
    name: str, spec: Mapping[str, Any] | None, config: Any, device: str, mode: str | None = None, linear: bool = False
) -> HfStatic:
    """mode: of `torch.compile`; CUDA graphs on a GPU unless given. linear: the option, for what is compressed."""
    if spec is not None:
        return Compressed(config, device, mode, Spec.load(spec), linear)
    return {STATIC: HfStatic, QUANTIZED: HfQuantized}[name](config, device, mode)
