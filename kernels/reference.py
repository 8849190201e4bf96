"""The reference semantics of a compressed cache tensor, in plain PyTorch.

What every kernel is tested against, and what the CPU runs (`lowering.cpu`). All functions take an arena and its
`Layout` (see `kvc_compile.layout` for the stored form).

Affine codec of b bits over blocks of t tokens x c channels, C = (2^b - 1)/2 (min/max blocks as in KIVI,
arXiv:2402.02750, with centred codes):

    middle = fp16((lo + hi) / 2)    scale = fp16 rounded up of max(hi - middle, middle - lo) / C
    code = round((x - middle) / scale + C)                        x^ = (code - C) * scale + middle

The scale is taken after the middle was rounded, so that no value of a block is clipped. Symmetric: middle = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvc_compile.layout import HEADER_WORDS, TILE, Layout

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
LENGTH, ENCODED, FAULT, EVICTED = 0, 1, 2, 3  # words of the header
WORDS = {8: torch.uint8, 16: torch.int16}
SPAN = 2048  # body tokens attended at a time: bounds the dequantised temporary whatever the context


@dataclass(frozen=True)
class Views:
    """Typed views into an arena; B = batch, H = heads, D = channels, N = body capacity in tokens."""

    header: Tensor  # int64 [B, H, 4]
    sink: Tensor  # dtype [B, H, sink, D]
    ring: Tensor  # dtype [B, H, recent, D]
    planes: tuple[Tensor, ...]  # words [B, H, N/(16n), 16, D], or elements [B, H, N, D]
    params: Tensor | None  # fp16 [B, H, N/t, groups, 2 or 1]
    words: Tensor | None = None  # int32 [B, H, words, N + sink + recent]
    sketch: Tensor | None = None  # of every token, [B, H, room, bytes], or [B, H, room, R] in the model's dtype


def views(data: Tensor, layout: Layout) -> Views:
    """The regions of the arena `data`, uint8 [B, row_bytes], without a copy. They are made once for an arena."""
    known = getattr(data, "kvc_views", None)
    if known is not None and known[0] == layout:
        return known[1]
    made = make_views(data, layout)
    data.kvc_views = (layout, made)  # type: ignore[attr-defined]
    return made


def make_views(data: Tensor, layout: Layout) -> Views:
    n = layout.capacity_of(data.shape[1])
    dtype = getattr(torch, layout.dtype)
    h, d = layout.heads, layout.channels

    storage, begin, row = data.untyped_storage(), data.storage_offset(), data.stride(0)

    def region(offset: int, dtype: torch.dtype, *shape: int) -> Tensor:
        # not a view in autograd's sense: that would refer to `data`, which refers to the views
        strides = [1]
        for size in reversed(shape[1:]):
            strides.insert(0, strides[0] * size)
        item = dtype.itemsize
        out = torch.empty(0, dtype=dtype, device=data.device)
        return out.set_(storage, (begin + offset) // item, (data.shape[0], *shape), (row // item, *strides))

    planes = []
    for i, p in enumerate(layout.planes):
        offset = layout.plane_offset(i, n)
        if layout.packed:
            planes.append(region(offset, WORDS[layout.word], h, n // layout.plane_tokens(p), TILE, d))
        else:
            planes.append(region(offset, FP8 if layout.codec.kind == "fp" else dtype, h, n, d))
    t, k = layout.codec.block[0], layout.codec.params
    room, bits = layout.room_of(data.shape[1]), layout.sketch.startswith("hash")
    width = layout.sketch_bytes // (1 if bits else layout.item)
    return Views(
        header=region(0, torch.int64, h, HEADER_WORDS),
        sink=region(layout.sink_offset, dtype, h, layout.sink, d),
        ring=region(layout.ring_offset, dtype, h, layout.recent, d),
        planes=tuple(planes),
        params=region(layout.params_offset(n), torch.float16, h, n // t, layout.groups, k) if k else None,
        words=region(layout.words_offset(n), torch.int32, h, layout.words, room) if layout.words else None,
        sketch=region(layout.sketch_offset(n), torch.uint8 if bits else dtype, h, room, width) if width else None,
    )


def empty(batch: int, tokens: int, layout: Layout, device: torch.device | str | None = None) -> Tensor:
    """A new arena, uint8 [batch, row_bytes], with no token in it and room for `tokens`."""
    return torch.zeros(batch, layout.row_bytes(tokens), dtype=torch.uint8, device=device)


# ---------------------------------------------------------------- codec


def half_up(x: Tensor) -> Tensor:
    """The least fp16 number not below `x` (fp32, x >= 0)."""
    h = x.to(torch.float16)
    return torch.where(h.float() < x, (h.view(torch.int16) + 1).view(torch.float16), h)


def spread(params: Tensor, layout: Layout) -> Tensor:
    """One number per block [B, H, T/t, groups] to one per channel, fp32 [B, H, T/t, 1, D]."""
    c = layout.codec.block[1]
    return params.float().unsqueeze(-1).expand(*params.shape, c).flatten(3)[..., : layout.channels].unsqueeze(3)


def blocks(x: Tensor, layout: Layout) -> Tensor:
    """[B, H, T, D] to [B, H, T/t, t, groups, c]; a short last group is filled with its last channel."""
    t, c = layout.codec.block
    short = layout.groups * c - layout.channels
    if short:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], short)], -1)
    return x.unflatten(3, (layout.groups, c)).unflatten(2, (-1, t))


def encode(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """Values [B, H, T, D] to codes of the same shape (uint8, fp8 or the model's dtype) and params, fp16
    [B, H, T/t, groups, k]."""
    codec = layout.codec
    if codec.kind == "raw":
        return x.to(getattr(torch, layout.dtype)), None
    x = x.float()
    if codec.params == 0:
        return x.clamp(-FP8_MAX, FP8_MAX).to(FP8), None
    b = blocks(x, layout)
    if codec.zero_point:
        lo, hi = b.amin((3, 5)), b.amax((3, 5))
        middle = ((lo + hi) / 2).to(torch.float16)
        radius = torch.maximum(hi - middle.float(), middle.float() - lo)
        params = torch.stack([half_up(radius / codec.centre), middle], -1)
    else:
        radius = b.abs().amax((3, 5))
        params = half_up(radius / (FP8_MAX if codec.kind == "fp" else codec.centre)).unsqueeze(-1)
    rows = x.unflatten(2, (-1, codec.block[0]))
    if codec.zero_point:
        rows = rows - spread(params[..., 1], layout)
    scale = spread(params[..., 0], layout)
    rows = torch.where(scale > 0, rows / scale, 0.0)
    if codec.kind == "fp":
        return rows.clamp(-FP8_MAX, FP8_MAX).flatten(2, 3).to(FP8), params
    codes = (rows + codec.centre).round().clamp(0, codec.levels - 1)
    return codes.flatten(2, 3).to(torch.uint8), params


def decode(codes: Tensor, params: Tensor | None, layout: Layout) -> Tensor:
    """The inverse of `encode`, in the model's dtype; `codes` cover whole blocks."""
    codec, dtype = layout.codec, getattr(torch, layout.dtype)
    if params is None:
        return codes.to(dtype)
    rows = codes.float().unflatten(2, (-1, codec.block[0]))
    if codec.kind == "int":
        rows = rows - codec.centre
    rows = rows * spread(params[..., 0], layout)
    if codec.zero_point:
        rows = rows + spread(params[..., 1], layout)
    return rows.flatten(2, 3).to(dtype)


# ---------------------------------------------------------------- packing


def pack(fields: Tensor, plane: int, layout: Layout) -> Tensor:
    """Fields of `plane` bits [B, H, T, D] to words [B, H, T/(16n), 16, D]; T is a multiple of 16n. The one packer."""
    n = layout.codes_per_word(plane)
    w = fields.unflatten(2, (-1, n, TILE)).to(torch.int32)
    out = w[:, :, :, 0]
    for j in range(1, n):
        out = out | (w[:, :, :, j] << (plane * j))
    return out.to(WORDS[layout.word])


def unpack(words: Tensor, plane: int, layout: Layout) -> Tensor:
    """The inverse of `pack`: uint8 [B, H, T, D]."""
    mask = 2**plane - 1
    parts = [((words >> (plane * j)) & mask).to(torch.uint8) for j in range(layout.codes_per_word(plane))]
    return torch.stack(parts, 3).flatten(2, 4)


def unpack_codes(planes: tuple[Tensor, ...], layout: Layout) -> Tensor:
    """The codes of some packing blocks: lower planes hold the lower bits."""
    if not layout.packed:
        return planes[0]
    codes, shift = unpack(planes[0], layout.planes[0], layout), layout.planes[0]
    for words, p in zip(planes[1:], layout.planes[1:], strict=True):
        codes = codes | (unpack(words, p, layout) << shift)
        shift += p
    return codes


def body_slices(v: Views, layout: Layout, first: int, last: int) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The stored form of the body tokens first .. last-1, both multiples of `layout.unit`."""
    planes = []
    for words, p in zip(v.planes, layout.planes, strict=True):
        n = layout.plane_tokens(p)
        planes.append(words[:, :, first // n : last // n])
    t = layout.codec.block[0]
    return tuple(planes), None if v.params is None else v.params[:, :, first // t : last // t]


def decode_body(planes: tuple[Tensor, ...], params: Tensor | None, layout: Layout) -> Tensor:
    """Whole units of the body as values [B, H, T, D]."""
    return decode(unpack_codes(planes, layout), params, layout)


def attend_body(
    rows: Tensor,
    k_planes: tuple[Tensor, ...],
    k_params: Tensor | None,
    v_planes: tuple[Tensor, ...],
    v_params: Tensor | None,
    mask: Tensor | None,
    scale: float,
    k_layout: Layout,
    v_layout: Layout,
    cap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`partial` over whole units of the bodies of keys and values: the part of attention that is worth compiling."""
    k, v = decode_body(k_planes, k_params, k_layout), decode_body(v_planes, v_params, v_layout)
    return partial(rows, k, v, mask, scale, cap)


def write_body(v: Views, layout: Layout, first: int, x: Tensor) -> None:
    """Encode the values x [B, H, T, D] as the body tokens first .. first+T-1: whole scale blocks."""
    last = first + x.shape[2]
    codes, params = encode(x, layout)
    if v.params is not None and params is not None:
        t = layout.codec.block[0]
        v.params[:, :, first // t : last // t] = params
    if not layout.packed:
        v.planes[0][:, :, first:last] = codes
        return
    shift = 0
    for words, p in zip(v.planes, layout.planes, strict=True):
        n = layout.plane_tokens(p)
        here = words[:, :, first // n : -(-last // n)]
        fields = unpack(here, p, layout)
        start = first - first // n * n
        fields[:, :, start : start + x.shape[2]] = (codes >> shift) & (2**p - 1)
        here.copy_(pack(fields, p, layout))
        shift += p


# ---------------------------------------------------------------- cache


def lengths(v: Views) -> tuple[int, int]:
    """(tokens in the cache, body tokens encoded)."""
    return int(v.header[0, 0, LENGTH]), int(v.header[0, 0, ENCODED])


def read_ring(v: Views, layout: Layout, first: int, last: int) -> Tensor:
    """The tokens at positions first .. last-1, all of them in the ring."""
    if first >= last:
        return v.ring[:, :, :0]
    a, b = (first - layout.sink) % layout.recent, (last - 1 - layout.sink) % layout.recent + 1
    return v.ring[:, :, a:b] if a < b else torch.cat([v.ring[:, :, a:], v.ring[:, :, :b]], 2)


def write_ring(v: Views, layout: Layout, first: int, x: Tensor) -> None:
    """Store x [B, H, T, D], T <= recent, as the positions first .. first+T-1."""
    n, a = x.shape[2], (first - layout.sink) % layout.recent if layout.recent else 0
    head = min(n, layout.recent - a)
    v.ring[:, :, a : a + head] = x[:, :, :head]
    v.ring[:, :, : n - head] = x[:, :, head:]


def read(data: Tensor, layout: Layout, first: int, last: int) -> Tensor:
    """The tokens at positions first .. last-1 as values [B, H, last-first, D]; positions past the length are zeros."""
    v = views(data, layout)
    length, encoded = lengths(v)
    body_end = layout.sink + encoded
    parts = []
    if first < (s := min(last, layout.sink, length)):
        parts.append(v.sink[:, :, first:s])
    if (a := max(first, layout.sink) - layout.sink) < (b := min(last, body_end, length) - layout.sink):
        lo, hi = a // layout.unit * layout.unit, -(-b // layout.unit) * layout.unit
        parts.append(decode_body(*body_slices(v, layout, lo, hi), layout)[:, :, a - lo : b - lo])
    if (a := max(first, body_end)) < (b := min(last, length)):
        parts.append(read_ring(v, layout, a, b))
    missing = last - max(first, min(last, length))
    if missing or not parts:
        parts.append(v.ring.new_zeros(data.shape[0], layout.heads, missing, layout.channels))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def rewind(data: Tensor, layout: Layout, length: int) -> None:
    """Forget the tokens from position `length` on; those of a block that is cut return, decoded, to the ring."""
    v = views(data, layout)
    _, encoded = lengths(v)
    keep = max(0, length - layout.sink)
    if encoded > keep:
        whole = keep // max(1, layout.codec.block[0]) * max(1, layout.codec.block[0])
        if whole < keep:
            write_ring(v, layout, layout.sink + whole, read(data, layout, layout.sink + whole, length))
        v.header[..., ENCODED] = whole
    v.header[..., LENGTH] = length


def trim(data: Tensor, layout: Layout, drop: int) -> None:
    """Forget the oldest `drop` tokens: whole units, so that nothing is encoded anew, and encoded ones. The first ones
    that remain are in the sink from then on, as they are decoded."""
    v = views(data, layout)
    length, encoded = lengths(v)
    if drop % layout.unit or not 0 <= drop <= max(0, encoded - layout.sink):
        raise ValueError(f"{drop} tokens cannot be forgotten: {encoded} are encoded, in units of {layout.unit}")
    if not drop:
        return
    first = read(data, layout, drop, drop + layout.sink).clone()
    exact = read_ring(v, layout, layout.sink + encoded, length).clone()
    for words, p in zip(v.planes, layout.planes, strict=True):
        n = drop // layout.plane_tokens(p)
        words[:, :, : words.shape[2] - n] = words[:, :, n:].clone()
    if v.params is not None:
        n = drop // layout.codec.block[0]
        v.params[:, :, : v.params.shape[2] - n] = v.params[:, :, n:].clone()
    if v.sketch is not None:
        v.sketch[:, :, : length - drop] = v.sketch[:, :, drop:length].clone()
    v.sink.copy_(first)
    v.header[..., LENGTH] = length - drop
    v.header[..., ENCODED] = encoded - drop
    write_ring(v, layout, layout.sink + encoded - drop, exact)


def append(data: Tensor, x: Tensor, layout: Layout, start: int | None = None) -> None:
    """Store the tokens x [B, H, T, D] at positions start .. start+T-1 (the end of the cache unless given).

    A start before the end forgets what was from there on; one after it is an error, and so is a full arena.
    """
    v = views(data, layout)
    length, encoded = lengths(v)
    start = length if start is None else start
    if start > length:
        raise ValueError(f"tokens are appended at position {start} of a compressed cache that holds {length}")
    if start < length:
        rewind(data, layout, start)
        length, encoded = lengths(v)
    total = start + x.shape[2]
    end = layout.encoded_after(total, encoded)
    if end > layout.capacity_of(data.shape[1]):
        raise ValueError(
            f"a compressed cache with room for {layout.capacity_of(data.shape[1])} encoded tokens got {total} in all"
        )
    if start < layout.sink:
        n = min(total, layout.sink) - start
        v.sink[:, :, start : start + n] = x[:, :, :n]
    # what leaves the ring is read before what enters it is written
    first, last = layout.sink + encoded, layout.sink + end
    if first < last:
        pending = x[:, :, max(first - start, 0) : last - start]
        if first < start:
            old = read_ring(v, layout, first, min(start, last))
            pending = torch.cat([old, pending], 2) if last > start else old
        write_body(v, layout, encoded, pending)
    if (a := max(last, start)) < total:
        write_ring(v, layout, a, x[:, :, a - start :])
    v.header[..., LENGTH] = total
    v.header[..., ENCODED] = end


# ---------------------------------------------------------------- attention


def rows_mask(mask: Tensor | None, groups: int) -> Tensor | None:
    """A mask [b, h, n, W] (h = 1 or query heads) for queries folded to [B, kv heads, groups * n, D]."""
    if mask is None:
        return None
    b, h, n, w = mask.shape
    if h == 1:
        return mask.unsqueeze(2).expand(b, 1, groups, n, w).reshape(b, 1, groups * n, w)
    return mask.reshape(b, h // groups, groups * n, w)


def partial(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attention over one region: (output, log-sum-exp), q [B, H, n, D]; a row that sees nothing gives (0, -inf)."""
    s = torch.matmul(q.float(), k.float().transpose(-1, -2)) * scale
    if cap:
        s = cap * torch.tanh(s / cap)
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask
    m = s.amax(-1, keepdim=True).clamp_min(torch.finfo(s.dtype).min)
    p = torch.exp(s - m)
    total = p.sum(-1, keepdim=True)
    o = torch.matmul(p, v.float()) / total.clamp_min(torch.finfo(s.dtype).tiny)
    return o, (m + total.log()).squeeze(-1)


def merge(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The attention over the union of disjoint regions: o = sum exp(lse_r - lse) o_r."""
    if len(parts) == 1:
        return parts[0][0]
    lse = torch.stack([p[1] for p in parts])
    weight = torch.softmax(lse, 0).nan_to_num(0.0)  # a row that sees nothing anywhere
    return sum(w.unsqueeze(-1) * p[0] for w, p in zip(weight, parts, strict=True))  # type: ignore[return-value]


def attend(
    q: Tensor,
    k_data: Tensor,
    v_data: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    mask: Tensor | None,
    start: int | None,
    causal: bool,
    scale: float,
    k_layout: Layout,
    v_layout: Layout,
    cap: float = 0.0,
    sinks: Tensor | None = None,
    shown: int | None = None,
    attend_body=attend_body,
) -> Tensor:
    """Attention of the new queries over what the cache holds and over the new tokens themselves, which are exact.

    q [B, query heads, n, Dk]; k_new [B, H, n, Dk] and v_new [B, H, n, Dv] are the tokens that will be appended, at
    positions L .. L+n-1 where L is `start`, or the tokens in the cache. mask [b, h, n, W >= L+n] by absolute position:
    bool (True: visible) or additive; it must hide every position from L+n on. Without a mask, `causal` says whether
    query i sees positions up to L+i or all of them. cap: before the mask, scores s become cap * tanh(s / cap), as in
    Gemma 2 (arXiv:2408.00118). sinks [query heads]: a score each that takes its share of the softmax and has no value,
    as in gpt-oss (arXiv:2508.10925). shown: how many cached tokens are seen, the last ones, if not all: the mask, then
    [b, h, n, W >= shown+n], begins at the first of them. Returns [B, query heads, n, Dv] in q's dtype.
    """
    kv, vv = views(k_data, k_layout), views(v_data, v_layout)
    k_length, k_encoded = lengths(kv)
    v_length, v_encoded = lengths(vv)
    length = k_length if start is None else start
    if length > min(k_length, v_length) or (start is None and k_length != v_length):
        raise ValueError(f"attention from position {length} of a cache of {k_length} keys and {v_length} values")
    batch, heads, n, _ = q.shape
    groups, total = heads // k_layout.heads, length + n
    hidden = 0 if shown is None else max(0, length - shown)
    if mask is not None:
        check_mask(mask, total - hidden)
        mask = mask[..., : total - hidden]
        if hidden:
            mask = F.pad(mask, (hidden, 0), value=False if mask.dtype == torch.bool else -torch.inf)
    elif causal or hidden:
        mask = torch.ones(n, total, dtype=torch.bool, device=q.device).tril(length if causal else total)[None, None]
        mask[..., :hidden] = False
    if length == 0 and not cap and sinks is None:  # a first chunk: plain attention, and its numerics
        return F.scaled_dot_product_attention(
            q, k_new, v_new, attn_mask=mask, scale=scale, enable_gqa=groups > 1
        ).contiguous()
    rows = q.reshape(batch, k_layout.heads, groups * n, q.shape[-1])
    mask = rows_mask(mask, groups)

    # the part of the body that both tensors have encoded; all else is read token by token
    unit = max(k_layout.unit, v_layout.unit)
    same = k_layout.sink == v_layout.sink
    sink = k_layout.sink
    body = max(0, min(k_encoded, v_encoded, length - sink)) // unit * unit if same else 0
    parts = []
    for first in range(max(0, hidden - sink) // unit * unit, body, SPAN):
        last = min(first + SPAN, body)
        stored = *body_slices(kv, k_layout, first, last), *body_slices(vv, v_layout, first, last)
        window = None if mask is None else mask[..., sink + first : sink + last]
        parts.append(attend_body(rows, *stored, window, scale, k_layout, v_layout, cap))
    head, tail = (sink, sink + body) if body else (0, 0)
    k = torch.cat([read(k_data, k_layout, 0, head), read(k_data, k_layout, tail, length), k_new], 2)
    v = torch.cat([read(v_data, v_layout, 0, head), read(v_data, v_layout, tail, length), v_new], 2)
    window = None if mask is None else torch.cat([mask[..., :head], mask[..., tail:]], -1)
    parts.append(partial(rows, k, v, window, scale, cap))
    if sinks is not None:
        weight = sinks.float().view(1, -1, groups, 1).expand(batch, -1, -1, n).flatten(2)
        parts.append((torch.zeros_like(parts[-1][0]), weight))
    return merge(parts).reshape(batch, heads, n, -1).to(q.dtype)


HIDDEN = -1e4  # an additive mask at or below this gives a softmax weight of exactly zero


def check_mask(mask: Tensor, total: int) -> None:
    """Raise if a mask [b, h, n, W] is too short for `total` tokens or shows a position that the cache does not hold."""
    if mask.shape[-1] < total:
        raise ValueError(f"a mask over {mask.shape[-1]} positions for a cache of {total} tokens")
    tail = mask[..., total:]
    if tail.numel() and bool((tail if tail.dtype == torch.bool else tail > HIDDEN).any()):
        raise ValueError(f"the attention mask shows positions from {total} on, which the cache does not hold")
