"""A model of transformers by its config alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any


class ConfigError(Exception):
    """A config that cannot be read, or does not say what is needed, in words for the user."""


@dataclass(frozen=True)
class AttentionShape:
    """Of a decoder whose layers are alike: query heads, heads of keys and values, channels of a head, layers."""

    heads: int
    kv_heads: int
    channels: int
    layers: int


def read(folder: str) -> Any:
    """The config of the decoder in a folder. No network. Raises ConfigError."""
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ConfigError(f"{error}; install kvc-compile[hf]") from None
    if not os.path.isdir(folder):
        raise ConfigError(f"model {folder!r}: a folder with a config.json is allowed")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config(decoder=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model {folder!r}: {str(error).strip().splitlines()[0]}") from None


def attention_shape(config: Any) -> AttentionShape:
    """Raises ConfigError where the config says less."""
    heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    channels = getattr(config, "head_dim", None) or (hidden // heads if heads and hidden else None)
    layers = getattr(config, "num_hidden_layers", None)
    if not heads or not channels or not layers:
        raise ConfigError(f"a {type(config).__name__} that does not say how many heads of which size and layers")
    return AttentionShape(heads, getattr(config, "num_key_value_heads", None) or heads, channels, layers)
