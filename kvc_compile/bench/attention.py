"""The time of one decode attention over a compressed cache, against the fastest 16-bit one and the read rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvc_compile.bench import shapes, synthetic
from kvc_compile.bench.clock import call_seconds
from kvc_compile.bench.plan import Settings
from kvc_compile.bench.predict import stored_bytes
from kvc_compile.bench.rows import Call, Ceilings
from kvc_compile.bench.shapes import MODELS, Heads
from kvc_compile.kernels import reference
from kvc_compile.layout import Layout
from kvc_compile.lowering import ops

ROTATE = {"cuda": 320 << 20, "cpu": 0}  # bytes of caches that one replay goes through, at least
MOST_CACHES = 40
OF_FREE = 0.85  # of the free memory that a shape may take
ROOM = 64  # tokens more than there are
WARM = 1024  # tokens of a cache for which a kernel is only compiled


def wanted(s: Settings) -> tuple[tuple[str, int, int], ...]:
    if not s.device.startswith("cuda"):
        return shapes.TOY
    return (
        shapes.QUICK
        if s.quick
        else (shapes.REFERENCE, *(x for x in (*shapes.GRID, *shapes.SAME_BYTES) if x != shapes.REFERENCE))
    )


def calls(s: Settings, dtype: str, ceilings: Ceilings) -> Iterator[Call]:
    """One row for each shape and format. Those of other shapes than 128 channels come after their reference."""
    reference_rows: dict[str, Call] = {}
    for model, batch, context in wanted(s):
        best: tuple[str, float] | None = None
        for row in shape(model, batch, context, dtype, s, ceilings):
            if row.format in ("cudnn", "flash", "sdpa", "16") and row.seconds:
                best = min(best or (row.format, row.seconds), (row.format, row.seconds), key=lambda b: b[1])
            if best and row.seconds and row.format in shapes.FORMATS:
                row = replace(row, best=best[0], best_16bit_s=best[1], gain=best[1] / row.seconds)
            if (model, batch, context) == shapes.REFERENCE:
                reference_rows[row.format] = row
            same = reference_rows.get(row.format)
            if (model, batch, context) in shapes.SAME_BYTES and same and same.of_ceiling and row.of_ceiling:
                row = replace(row, against_128=row.of_ceiling / same.of_ceiling)
            yield row


def shape(model: str, batch: int, context: int, dtype: str, s: Settings, ceilings: Ceilings) -> Iterator[Call]:
    """The rows of one shape: PyTorch's attentions, then ours, the 16-bit one first."""
    h = MODELS[model]
    empty = Call(model, batch, context, h.query_heads, h.heads, h.channels, dtype, "")
    word = 16 if s.device.startswith("cuda") else 8
    dense = shapes.dense_bytes(h, batch, context) * getattr(torch, dtype).itemsize // 2
    runs: list[tuple[str, int, Callable[[], float]]] = []
    for name in ("cudnn", "flash") if s.device.startswith("cuda") else ("sdpa",):
        runs.append((name, dense, partial(sdpa, h, batch, context, dtype, s.device, name)))
    for name in shapes.FORMATS:
        k, v = shapes.layouts(name, h, dtype, word)
        nbytes = batch * (stored_bytes(k, context) + stored_bytes(v, context))
        runs.append((name, nbytes, partial(ours, h, batch, context, k, v, s.device)))
    for name, nbytes, run in runs:
        row = replace(empty, format=name, stored_bytes=nbytes, predicted_s=nbytes / ceilings.read)
        try:
            if s.until is not None and time.time() > s.until:
                raise TimeoutError("left out: no time was left")
            if s.device.startswith("cuda") and 2 * nbytes > OF_FREE * torch.cuda.mem_get_info()[0]:
                raise MemoryError("does not fit twice")
            seconds = run()
            row = replace(row, seconds=seconds, of_ceiling=nbytes / seconds / ceilings.read)
        except Exception as error:  # one that fails must not lose the others
            text = (str(error).strip().splitlines() or [""])[0][:300]
            row = replace(
                row, error=text if isinstance(error, (TimeoutError, MemoryError)) else f"{type(error).__name__}: {text}"
            )
        if s.device.startswith("cuda"):
            torch.cuda.empty_cache()
        yield row


def copies(nbytes: int, device: str) -> int:
    return min(MOST_CACHES, max(2, -(-ROTATE[device.partition(":")[0]] // max(1, nbytes))))


def queries(h: Heads, batch: int, dtype: str, device: str) -> Tensor:
    return torch.randn(batch, h.query_heads, 1, h.channels, device=device).to(getattr(torch, dtype))


def sdpa(h: Heads, batch: int, context: int, dtype: str, device: str, name: str) -> float:
    """PyTorch's attention over a cache of the model's dtype."""
    q = queries(h, batch, dtype, device)
    count = copies(shapes.dense_bytes(h, batch, context), device)
    caches = []
    for _ in range(count):
        k = torch.empty(batch, h.heads, context, h.channels, dtype=q.dtype, device=device).normal_()
        v = torch.empty(batch, h.heads, context, h.values, dtype=q.dtype, device=device).normal_()
        caches.append((k, v))
    backend = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "sdpa": SDPBackend.MATH}[name]
    with sdpa_kernel(backend):
        return call_seconds(
            [lambda k=k, v=v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True) for k, v in caches],  # type: ignore[misc]
            device,
        )


def caches_of(
    h: Heads, batch: int, context: int, k: Layout, v: Layout, device: str, count: int
) -> list[tuple[Tensor, Tensor]]:
    """Arena pairs of `context` tokens."""
    found = []
    for _ in range(count):
        pair = tuple(reference.empty(batch, context + ROOM, layout, device) for layout in (k, v))
        for arena, layout in zip(pair, (k, v), strict=True):
            synthetic.fill(arena, layout, context)
        found.append((pair[0], pair[1]))
    return found


def ours(h: Heads, batch: int, context: int, k: Layout, v: Layout, device: str, warm: bool = False) -> float:
    """Our attention over a compressed cache of as many tokens, and one more that is exact. warm: once, untimed."""
    q = queries(h, batch, k.dtype, device)
    new_k = torch.randn(batch, h.heads, 1, h.channels, device=device).to(q.dtype)
    new_v = torch.randn(batch, h.heads, 1, h.values, device=device).to(q.dtype)
    count = 1 if warm else copies(batch * (k.row_bytes(context) + v.row_bytes(context)), device)
    scale = h.channels**-0.5

    def call(a: Tensor, b: Tensor) -> Tensor:
        return ops.attend(q, a, b, new_k, new_v, None, None, True, scale, k.key, v.key)

    arenas = caches_of(h, batch, context, k, v, device, count)
    if warm:
        call(*arenas[0])
        return 0.0
    return call_seconds([lambda a=a, b=b: call(a, b) for a, b in arenas], device)  # type: ignore[misc]


def warm(s: Settings, dtype: str, part: int, parts: int) -> None:
    """Compile every `parts`-th of the kernels that `calls` runs, the first one being `part`."""
    models = dict.fromkeys(model for model, _, _ in wanted(s))
    every = [(m, f) for m in models for f in shapes.FORMATS]
    for model, name in every[part::parts]:
        h = MODELS[model]
        try:
            k, v = shapes.layouts(name, h, dtype, 16)
            ours(h, 1, WARM, k, v, s.device, warm=True)
        except Exception:  # the run says why
            continue
