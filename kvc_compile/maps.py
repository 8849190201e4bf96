"""Trained maps from a safetensors file beside a spec, as the kernels' reference takes them: shapes checked, by layers.

Each layer i of the model has tensors `layers.i.NAME`; what stands before, a module between, and `.weight` after are
allowed, as in `model.layers.3.self_attn.fc1.weight`.

    Locret            fc1 [hidden, (Hq + H) Dk + H Dv], fc2 [H, hidden]
    LESS              kernel_q_mat1 [Hq, D, hidden], kernel_q_mat2 [Hq, hidden, R], kernel_k_mat1 [H, D, hidden],
                      kernel_k_mat2 [H, hidden, R], interaction_k [H, R, R], scalingD, scalingD2 [H, R]
    LoCoCo            conv [slots, Dk + Dv, taps], bias [slots], normalizer [1]
    HATA              hash [H, D, bits]
    Double Sparsity   channels [H, R], whole numbers
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from kvc_compile.kernels.keep.fold import FeatureMaps
from kvc_compile.kernels.keep.learned import ACTIVATIONS, RetainingHead
from kvc_compile.kernels.keep.mixing import Mixer
from kvc_compile.spec import Spec
from kvc_compile.spec.artefacts import Place, tensors

T = TypeVar("T")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class Shape:
    """Of a layer's attention: query heads, KV heads, channels of a key and of a value."""

    heads: int
    kv_heads: int
    dk: int
    dv: int


@dataclass(frozen=True)
class Layer:
    """The tensors of layer `i` in a file. `take` checks as it hands out."""

    i: int
    shape: Shape
    found: dict[str, Tensor]
    at: Place

    def take(self, name: str, *wanted: int | str) -> Tensor:
        """The tensor, its axes as wanted: a number, or a word for any number. Axes of 1 around them are dropped.
        Raises SpecError."""
        full = f"layers.{self.i}.{name}"
        if name not in self.found:
            self.at.fail(f"layer {self.i} of the model needs {full}", ", ".join(sorted(self.found)) or "none", full)
        x = self.found[name]
        kept = [n for n in x.shape if n != 1]
        if x.dim() > len(wanted) and kept == [n for n in wanted if n != 1]:
            x = x.reshape([n for n in wanted if isinstance(n, int)])
        good = x.dim() == len(wanted) and all(isinstance(w, str) or n == w for n, w in zip(x.shape, wanted))
        if not good or 0 in x.shape:
            shown = "[" + ", ".join(map(str, wanted)) + "]"
            self.at.fail(f"{full} does not fit the model", f"shape {list(x.shape)}", shown)
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            self.at.fail(f"{full} is not finite", "inf or nan", "finite numbers")
        return x


def by_layer(spec: Spec, name: str, shapes: Sequence[Shape], make: Callable[[Layer], T], *path: str | int) -> list[T]:
    """What `make` makes of each layer's tensors in the file `name`, which the spec asks for at the key `path`. shapes:
    of all layers of the model. Raises SpecError where the file or a tensor is missing, or does not fit."""
    at = Place(spec.origin.file, path, name)
    file = spec.artefact(name, *path)
    if file.suffix != ".safetensors":
        at.fail("trained maps come from safetensors", file.suffix, ".safetensors")
    layers: dict[int, dict[str, Tensor]] = {}
    with file.open("rb") as f:
        for full, stored in tensors(file, at).items():
            match = re.search(r"(?:^|\.)layers\.([0-9]{1,4})\.(?:\w+\.)*?(\w+?)(?:\.weight)?$", full, re.ASCII)
            if match is None:
                continue
            if stored.dtype not in DTYPES:
                at.fail(f"tensor {full}", stored.dtype, ", ".join(DTYPES))
            f.seek(stored.start)
            raw = bytearray(f.read(stored.stop - stored.start))
            flat = torch.frombuffer(raw, dtype=DTYPES[stored.dtype]) if raw else torch.empty(0)
            layers.setdefault(int(match[1]), {})[match[2]] = flat.reshape(stored.shape)
    if layers and max(layers) >= len(shapes):
        at.fail(f"the model has {len(shapes)} layers", f"tensors of layer {max(layers)}", f"0..{len(shapes) - 1}")
    return [make(Layer(i, shape, layers.get(i, {}), at)) for i, shape in enumerate(shapes)]


def retaining_head(layer: Layer, inputs: Sequence[str] = ("q", "k", "v"), act: str = "silu") -> RetainingHead:
    """Of Locret. act: the model's `hidden_act`."""
    s = layer.shape
    if act not in ACTIVATIONS:
        layer.at.fail("trained heads with the model's activation", act, ", ".join(ACTIVATIONS))
    sizes = {"q": s.heads * s.dk, "k": s.kv_heads * s.dk, "v": s.kv_heads * s.dv}
    up = layer.take("fc1", "hidden", sum(sizes[x] for x in inputs))
    return RetainingHead(up, layer.take("fc2", s.kv_heads, up.shape[0]), tuple(inputs), act)


def feature_maps(layer: Layer, rank: int) -> FeatureMaps:
    """Of LESS."""
    s = layer.shape
    q1 = layer.take("kernel_q_mat1", s.heads, s.dk, "hidden")
    k1 = layer.take("kernel_k_mat1", s.kv_heads, s.dk, "hidden")
    return FeatureMaps(
        q1,
        layer.take("kernel_q_mat2", s.heads, q1.shape[2], rank),
        k1,
        layer.take("kernel_k_mat2", s.kv_heads, k1.shape[2], rank),
        layer.take("interaction_k", s.kv_heads, rank, rank),
        layer.take("scalingD", s.kv_heads, rank),
        layer.take("scalingD2", s.kv_heads, rank),
    )


def mixer(layer: Layer, slots: int) -> Mixer:
    """Of LoCoCo."""
    conv = layer.take("conv", slots, layer.shape.dk + layer.shape.dv, "taps")
    if conv.shape[2] % 2 == 0:
        layer.at.fail(f"layers.{layer.i}.conv has an even number of taps", str(conv.shape[2]), "an odd number")
    return Mixer(conv, layer.take("bias", slots), layer.take("normalizer", 1))


def projection(layer: Layer, bits: int) -> Tensor:
    """Of HATA: [H, D, bits]."""
    return layer.take("hash", layer.shape.kv_heads, layer.shape.dk, bits)


def channels(layer: Layer) -> Tensor:
    """Of Double Sparsity: int64 [H, R]."""
    found = layer.take("channels", layer.shape.kv_heads, "channels")
    if found.is_floating_point() or not bool(((found >= 0) & (found < layer.shape.dk)).all()):
        layer.at.fail(f"layers.{layer.i}.channels", "other numbers", f"whole numbers, 0..{layer.shape.dk - 1}")
    return found.long()
