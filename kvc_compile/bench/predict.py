"""What a decode step must read, and how long that takes at the rate of the same run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvc_compile.bench.models import nbytes
from kvc_compile.config import attention_shape
from kvc_compile.layout import HEADER_WORDS, Layout


def stored_bytes(layout: Layout, tokens: int) -> int:
    """Bytes of one batch row that attention over `tokens` tokens reads: header, sinks, ring, codes, scales."""
    encoded = layout.encoded_after(tokens, 0)
    exact = min(tokens, layout.sink) + max(0, tokens - layout.sink - encoded)
    codes = sum(layout.plane_bytes(p, encoded) for p in layout.planes)
    return (
        layout.heads * (HEADER_WORDS * 8 + exact * layout.channels * layout.item) + codes + layout.params_bytes(encoded)
    )


def cache_read(pairs: Iterable[tuple[Layout, Layout]], batch: int, tokens: int) -> int:
    """Bytes of the caches of all layers, `pairs` of keys and values, that a step reads."""
    return batch * sum(stored_bytes(layout, tokens) for pair in pairs for layout in pair)


def cache_room(pairs: Iterable[tuple[Layout, Layout]], batch: int, tokens: int) -> int:
    """Bytes that those caches take with room for `tokens` tokens."""
    return batch * sum(layout.row_bytes(tokens) for pair in pairs for layout in pair)


def weights_read(model: Any) -> int:
    """Bytes of the parameters that a step reads: all but the embedding table, of which it takes rows. A head that
    shares the table's memory reads all of it."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    total = sum(nbytes(p) for p in model.parameters())  # shared ones once
    tied = head is not None and head.weight is table.weight
    return total if tied else total - nbytes(table.weight)


def prefill_flop(model: Any, tokens: int) -> int:
    """Of a prompt [1, tokens] of which the last logits are taken: two for each weight and token, and causal attention
    (two products over half the square)."""
    shape = attention_shape(model.config)
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.parameters()) - head
    if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        body -= model.get_input_embeddings().weight.numel()
    attention = 2 * tokens * tokens * shape.heads * shape.channels * shape.layers
    return 2 * body * tokens + 2 * head + attention
