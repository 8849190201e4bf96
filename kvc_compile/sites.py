"""Records of what was found in a graph: plain, frozen, printable. Nodes are named, never held."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheTensor:
    """One cache tensor (keys or values) of one attention, as the graph holds it.

    kind: "static" (a buffer of fixed length, handed in), "born" (one that this graph allocates), "grown" (a compressed
    cache handed in that is concatenated with the new tokens), "fresh" (the result of a concatenation with nothing or
    with plain values: compressed from here on).
    """

    kind: str
    buffer: str  # node of the buffer, or of the concatenation
    source: str  # where the caller keeps it, "" if the graph made it
    append: str  # node of the append
    heads: int
    channels: int
    dtype: str
    length: int | None = None  # of a buffer, where the graph says it
    window: bool = False  # one that slides: the oldest tokens fall out of it


@dataclass(frozen=True)
class Site:
    """An attention whose keys and values were proved to come from an append to a cache."""

    index: int  # order of attention in the graph
    layer: int
    node: str
    pattern: str  # "sdpa" or "softmax"; "read back": not rewritten itself, its compressed cache is read in full for it
    query_heads: int
    scale: float
    mask: str  # "none", "causal" or the node of the mask
    key: CacheTensor
    value: CacheTensor
    where: str  # the user's source line
    note: str = ""  # why it is read back
    cap: float = 0.0  # scores s become cap * tanh(s / cap)
    sinks: str = ""  # node of the scores [query heads] that take their share of the softmax and have no value
    queries: int = 0  # of a sequence; 0: their number varies
    window: bool = False  # its cache forgets tokens that fell out of a sliding window
    slots: int = 0  # of its cache; 0: their number varies


@dataclass(frozen=True)
class Declined:
    """An attention that was left alone, and why."""

    index: int
    node: str
    reason: str
    where: str


@dataclass(frozen=True)
class Uncached(Declined):
    """An attention that was left alone because no cache is behind its keys and values: nothing stays uncompressed."""
