"""How one cache tensor (the keys or the values of one layer) is stored: the layout and its byte arithmetic.

A compressed cache tensor is one byte buffer, the *arena*, `uint8 [batch, row_bytes]`: each batch row is self-contained,
so that selecting or reordering sequences is an index over rows. A row holds, in this order:

    header   int64 [heads, 4]                            one per head
    sink     dtype [heads, sink, channels]               tokens 0 .. sink-1, as the model made them
    ring     dtype [heads, recent, channels]             the newest tokens; token p lies in slot (p - sink) % recent
    planes   word  [heads, capacity/(16*n), 16, channels]  one per bit plane of the codec, n = word bits / plane bits
    params   fp16  [heads, capacity/t, groups, 2 or 1]   scale (and middle) of each block of t tokens x c channels
    words    int32 [heads, words, capacity+sink+recent]  of a cache that evicts: what is known of each slot
    sketch   [heads, room, bytes]                        of every token, what `select` compares a query with, if it does

The header is length, encoded, fault, evicted. `length` is the number of tokens in the cache, `encoded` how many of them
are in the planes: the tokens sink .. sink+encoded-1. Every token after those is in the ring. The *body* token i is
position sink + i. Every head has a header, so that one program may append to one head; all heads and rows of an arena
agree.

A cache that *evicts* holds fewer tokens than were appended. Then all of the above is about *slots*: slot s holds some
position, another one in each head, or none (a hole); `evicted` is how many tokens fewer there are than were appended,
so that a position p from the last eviction on is slot p - evicted. The first of the words is position - slot (keys
alone have it), -slot - 1 for a hole: a cache that nothing was evicted from has zeros.

A word packs tokens, not channels: with n codes to a word, the word at row t of a packing block holds the tokens
t, t+16, t+32, ... of one channel, lowest bits first (here 4 bits in 8-bit words, n = 2):

      bits 7..4  bits 3..0                          so unpacking is a shift and a mask on whole vectors of channels,
      token t+16 token t        t = 0..15           and a 16-token slice of a block has one shift.

3 bits are stored as a plane of 2 and a plane of 1. A codec of 16-bit floats or fp8 has one plane of whole elements.
No torch here: planning and checking need none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

HEADER_WORDS = 4
TILE = 16  # tokens per packed row group: the smallest tensor-core tile
ITEM = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


@dataclass(frozen=True)
class Codec:
    """How the numbers of a vector are stored.

    kind: "raw" (the model's dtype), "int" (affine codes of `bits` bits) or "fp" (float8 e4m3).
    block: (tokens, channels) that share one scale; (0, 0) where there is no scale.
    zero_point: whether the block's middle is stored too (asymmetric).
    """

    kind: str
    bits: int = 16
    block: tuple[int, int] = (0, 0)
    zero_point: bool = False

    @property
    def levels(self) -> int:
        return 2**self.bits

    @property
    def centre(self) -> float:
        """The code that stands for the middle: a sum over centred codes does not drift (accuracy in long sums)."""
        return (self.levels - 1) / 2

    @property
    def params(self) -> int:
        """fp16 numbers stored per block."""
        return 0 if self.block == (0, 0) else 2 if self.zero_point else 1


@dataclass(frozen=True)
class Layout:
    """The stored form of one cache tensor `[batch, heads, tokens, channels]` of `dtype`.

    sketch: what is held of each token for `select`, beside the token: "hash128", its signs under 128 random projections
    (HATA, arXiv:2506.02572), or "channels0,3;5,1", channels 0 and 3 of the first head, 5 and 1 of the second (Double
    Sparsity, arXiv:2408.07092).
    """

    codec: Codec
    heads: int
    channels: int
    dtype: str
    sink: int = 0
    recent: int = 0
    flush: int = 1
    word: int = 8
    evicts: bool = False
    words: int = 0  # of a slot; only where it evicts
    sketch: str = ""

    @cached_property
    def key(self) -> str:
        """A canonical name that `Layout.parse` reads back; the form in which ops receive a layout."""
        c = self.codec
        return (
            f"{c.kind}{c.bits}{'z' if c.zero_point else ''}.{c.block[0]}x{c.block[1]}"
            f".h{self.heads}.d{self.channels}.{self.dtype}.s{self.sink}.r{self.recent}.f{self.flush}.w{self.word}"
            + (f".e{self.words}" if self.evicts else "")
            + (f".i{self.sketch}" if self.sketch else "")
        )

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(key: str) -> Layout:
        m = _KEY.fullmatch(key)
        if m is None:
            raise ValueError(f"not a layout: {key!r}")
        kind, bits, zero, t, c, heads, channels, dtype, sink, recent, flush, word, words, sketch = m.groups()
        codec = Codec(kind, int(bits), (int(t), int(c)), bool(zero))
        sizes = int(sink), int(recent), int(flush), int(word)
        evicts = words is not None, int(words or 0)
        return Layout(codec, int(heads), int(channels), dtype, *sizes, *evicts, sketch or "")

    @property
    def item(self) -> int:
        return ITEM[self.dtype]

    @property
    def packed(self) -> bool:
        return self.codec.kind == "int"

    @cached_property
    def planes(self) -> tuple[int, ...]:
        """Bits of each plane."""
        return PLANES[self.codec.bits] if self.packed else (self.element_bytes * 8,)

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of an unpacked plane."""
        return 1 if self.codec.kind == "fp" else self.item

    def codes_per_word(self, plane: int) -> int:
        return self.word // plane if self.packed else 1

    def plane_tokens(self, plane: int) -> int:
        """Tokens of one packing block of a plane."""
        return TILE * self.codes_per_word(plane) if self.packed else 1

    @cached_property
    def unit(self) -> int:
        """The body's capacity is a multiple of this many tokens: whole packing blocks and whole scale blocks."""
        return max([self.codec.block[0], 1, *(self.plane_tokens(p) for p in self.planes)])

    @cached_property
    def groups(self) -> int:
        """Scale groups along the channels; the last one may be shorter."""
        c = self.codec.block[1]
        return -(-self.channels // c) if c else 0

    def plane_bytes(self, plane: int, capacity: int) -> int:
        return self.heads * capacity * self.channels * plane // 8

    def params_bytes(self, capacity: int) -> int:
        t = self.codec.block[0]
        return self.heads * (capacity // t) * self.groups * self.codec.params * 2 if t else 0

    @cached_property
    def sink_offset(self) -> int:
        return round_up(self.heads * HEADER_WORDS * 8, 64)

    @cached_property
    def ring_offset(self) -> int:
        return round_up(self.sink_offset + self.heads * self.sink * self.channels * self.item, 16)

    @cached_property
    def body_offset(self) -> int:
        return round_up(self.ring_offset + self.heads * self.recent * self.channels * self.item, 16)

    @cached_property
    def unit_bytes(self) -> int:
        """Bytes that one unit more of capacity adds to a row, a multiple of 16 so that every row starts aligned."""
        planes = sum(self.plane_bytes(p, self.unit) for p in self.planes)
        beside = self.heads * self.unit * (4 * self.words + self.sketch_bytes)
        return round_up(planes + self.params_bytes(self.unit) + beside, 16)

    @cached_property
    def sketch_bytes(self) -> int:
        """Bytes of the sketch of a token of one head."""
        if self.sketch.startswith("hash"):
            return int(self.sketch[4:]) // 8
        return len(self.sketch_channels[0]) * self.item if self.sketch else 0

    @cached_property
    def sketch_channels(self) -> tuple[tuple[int, ...], ...]:
        """The channels of each head that a sketch of channels holds."""
        rows = self.sketch.removeprefix("channels").split(";")
        return tuple(tuple(map(int, row.split(","))) for row in rows)

    def sketch_offset(self, capacity: int) -> int:
        return round_up(self.params_offset(capacity) + self.params_bytes(capacity), 16)

    @cached_property
    def fixed_bytes(self) -> int:
        """Bytes of a row without capacity; of words and sketch, those of tokens that are in no body."""
        exact = self.heads * (self.sink + self.recent) * (4 * self.words + self.sketch_bytes)
        regions = (self.words > 0) + (self.sketch != "")  # each begins at a multiple of 16
        return self.body_offset + (round_up(exact, 16) + 16 * regions if regions else 0)

    def plane_offset(self, index: int, capacity: int) -> int:
        return self.body_offset + sum(self.plane_bytes(p, capacity) for p in self.planes[:index])

    def params_offset(self, capacity: int) -> int:
        return self.plane_offset(len(self.planes), capacity)

    def words_offset(self, capacity: int) -> int:
        tokens = capacity + self.sink + self.recent
        return round_up(self.sketch_offset(capacity) + self.heads * tokens * self.sketch_bytes, 16)

    def body_tokens(self, tokens: int) -> int:
        """Most tokens that are encoded at once in a cache of at most `tokens` tokens."""
        return round_up(max(0, tokens - self.sink - self.recent), self.flush)

    def capacity(self, tokens: int) -> int:
        """Body tokens that a cache for `tokens` tokens allocates."""
        return round_up(self.body_tokens(tokens), self.unit)

    def row_bytes(self, tokens: int) -> int:
        """Bytes of one batch row of a cache for `tokens` tokens, header, regions and scales included."""
        return self.fixed_bytes + self.capacity(tokens) // self.unit * self.unit_bytes

    def capacity_of(self, row_bytes: int) -> int:
        """The body capacity of a row of this size: the inverse of `row_bytes`."""
        return (row_bytes - self.fixed_bytes) // self.unit_bytes * self.unit

    def room_of(self, row_bytes: int) -> int:
        """Tokens that a row of this size has room for at most: body, sink and ring."""
        return self.capacity_of(row_bytes) + self.sink + self.recent

    def dense_bytes(self, tokens: int) -> int:
        """Bytes of one batch row in the model's dtype, uncompressed."""
        return self.heads * tokens * self.channels * self.item

    def encoded_after(self, length: int, encoded: int) -> int:
        """How many body tokens are encoded once `length` tokens are in the cache and `encoded` were before."""
        over = length - self.sink - encoded - self.recent
        return encoded + round_up(over, self.flush) if over > 0 else encoded


_KEY = re.compile(
    r"(raw|int|fp)(\d+)(z?)\.(\d+)x(\d+)\.h(\d+)\.d(\d+)\.(\w+)\.s(\d+)\.r(\d+)\.f(\d+)\.w(\d+)"
    r"(?:\.e(\d+))?(?:\.i([a-z]+\d+(?:[,;]\d+)*))?"
)
