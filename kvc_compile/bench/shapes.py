"""The attention calls that are measured. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from kvc_compile.layout import Codec, Layout


@dataclass(frozen=True)
class Heads:
    """query_heads on `heads` of `channels` (keys) and `values` channels."""

    query_heads: int
    heads: int
    channels: int
    values: int


MODELS = {
    "llama3-8b": Heads(32, 8, 128, 128),
    "llama2-7b": Heads(32, 32, 128, 128),
    "qwen2.5-7b": Heads(28, 4, 128, 128),
    "channels 64": Heads(32, 8, 64, 64),
    "channels 256": Heads(16, 4, 256, 256),
    "groups of 4": Heads(16, 4, 128, 128),
    "groups of 7": Heads(28, 4, 128, 128),
    "groups of 8": Heads(32, 4, 128, 128),
    "groups of 16": Heads(64, 4, 128, 128),
    # one latent of 512 channels and 64 of positions for all 128 heads; here values are stored a second time
    "mla": Heads(128, 1, 576, 512),
}
K = 1024
GRID = tuple(
    (model, batch, context)
    for model in ("llama3-8b", "llama2-7b", "qwen2.5-7b")
    for batch in (1, 8, 32)
    for context in (4 * K, 32 * K, 128 * K)
)
# at the bytes of llama3-8b at 8 x 32k
SAME_BYTES = (
    ("channels 64", 8, 64 * K), ("channels 256", 8, 32 * K), ("groups of 4", 8, 64 * K), ("groups of 7", 8, 64 * K),
    ("groups of 8", 8, 64 * K), ("groups of 16", 8, 64 * K), ("mla", 8, 64 * K),
)  # fmt: skip
REFERENCE = ("llama3-8b", 8, 32 * K)
QUICK = (("llama3-8b", 1, 4 * K), ("llama3-8b", 1, 32 * K), REFERENCE, *SAME_BYTES)
TOY = (("llama3-8b", 1, 128), ("qwen2.5-7b", 2, 256), ("channels 64", 1, 256), ("mla", 1, 128))

FORMATS = ("16", "fp8", "int8", "int4", "int2", "int4 g128", "int2 g128")


def layouts(name: str, heads: Heads, dtype: str, word: int) -> tuple[Layout, Layout]:
    """Keys by channel in blocks of 64 (or 128) tokens, values by token; sinks and the newest tokens kept."""
    kd, vd = heads.channels, heads.values
    if name in ("16", "fp8"):
        codec = Codec("raw") if name == "16" else Codec("fp", 8)
        return Layout(codec, heads.heads, kd, dtype, word=word), Layout(codec, heads.heads, vd, dtype, word=word)
    kind, _, group = name.partition(" g")
    t, bits = int(group or 64), int(kind[3:])
    k, v = (Codec("int", bits, block, True) for block in ((t, 1), (1, vd)))
    return Layout(k, heads.heads, kd, dtype, 4, max(64, t), t, word), Layout(v, heads.heads, vd, dtype, 4, 32, 1, word)


def dense_bytes(heads: Heads, batch: int, context: int) -> int:
    """Of a 16-bit cache."""
    return 2 * batch * heads.heads * context * (heads.channels + heads.values)
