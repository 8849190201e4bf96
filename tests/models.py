"""Tiny random models and the loops that drive them: what the tests of the compiler share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "smollm3", "granite")


def tiny(family: str, attention="sdpa", device="cpu", layers=2, dtype=torch.float32, **config: Any):
    """A random model of a family: 4 query heads on 2 key heads of 16 channels unless `config` says otherwise."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": attention,
    }
    if family == "mistral":
        settings["sliding_window"] = None  # unless `config` has one
    cfg = AutoConfig.for_model(family, **(settings | config))
    return AutoModelForCausalLM.from_config(cfg, dtype=dtype).eval().to(device)


def prompt(batch: int = 2, tokens: int = 13, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (batch, tokens), generator=generator).to(device)


def new_cache(model: Any, kind: str, tokens: int = 64):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=tokens)
    return DynamicCache(config=model.config)


@torch.no_grad()
def decode(call: Callable[..., Any], cache: Any, ids: torch.Tensor, steps=8, forced: Any = None) -> torch.Tensor:
    """Logits [B, prompt + steps, vocabulary] of a prefill and `steps` decode steps: greedy, or fed `forced`."""
    logits = [call(input_ids=ids, past_key_values=cache, use_cache=True).logits]
    for i in range(steps):
        token = logits[-1][:, -1:].argmax(-1) if forced is None else forced[:, i : i + 1].clone()
        logits.append(call(input_ids=token, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, 1)
