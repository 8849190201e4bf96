"""The model that is measured: a shape, with random weights. Time and memory do not depend on what they are."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kvc_compile.config import ConfigError, attention_shape, read
from kvc_compile.layout import Layout
from kvc_compile.plan import layout_of
from kvc_compile.sites import CacheTensor
from kvc_compile.spec import Spec

LLAMA_3_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
}  # fmt: skip
TOY = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 131072,
}  # fmt: skip


def config_of(folder: str | None, device: str) -> Any:
    """The config in a folder, or Llama-3-8B's; a toy's on a CPU. Raises ConfigError."""
    if folder is not None:
        return read(folder)
    from transformers import LlamaConfig

    return LlamaConfig(**(LLAMA_3_8B if device.startswith("cuda") else TOY))


def dtype_of(device: str) -> torch.dtype:
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def build(config: Any, device: str, weights: str | None = None) -> Any:
    """The model in the dtype of the device, in eval mode. Its weights are what initialisation makes them; weights:
    "int8" for those of its linear layers, by torchao."""
    from transformers import AutoModelForCausalLM

    config._attn_implementation = "sdpa"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype_of(device)).eval()
    if weights is not None:
        quantization = torchao()
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def torchao() -> Any:
    """Its module that quantises weights. Raises ConfigError if it is not installed."""
    try:
        import torchao.quantization
    except ImportError:
        raise ConfigError("quantised weights need torchao: pip install torchao") from None
    return torchao.quantization


def nbytes(tensor: torch.Tensor) -> int:
    """Of its storage, that of quantised tensors included, which say the bytes of what they stand for."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.numel() * tensor.element_size()
    parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return sum(nbytes(part) for part in parts)


def layouts(config: Any, spec: Spec, device: str) -> list[tuple[Layout, Layout]]:
    """The layouts of every layer's keys and values."""
    dtype = str(dtype_of(device)).removeprefix("torch.")
    shape = attention_shape(config)
    cache = CacheTensor("static", "", "", "", shape.kv_heads, shape.channels, dtype)
    asked = [spec.layer(i, shape.layers) for i in range(shape.layers)]
    word = "cuda" if device.startswith("cuda") else "cpu"
    return [(layout_of(a.k, cache, word), layout_of(a.v, cache, word)) for a in asked]
