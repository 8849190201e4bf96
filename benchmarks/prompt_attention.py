"""Attention of a prompt, or of its last part, by our general kernel and by PyTorch's, on a GPU.

    python benchmarks/prompt_attention.py --out results.json

32 query and 8 key-value heads of 128 channels in bf16, one sequence. Ours takes the mask that Hugging Face's static
cache comes with, and a compressed cache of what came before; PyTorch's takes the same mask, or is told that it is
causal. Milliseconds are medians; TFLOP/s count causal attention alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvc_compile.kernels import reference
from kvc_compile.layout import Codec, Layout
from kvc_compile.lowering import launch
from kvc_compile.lowering.bounds import bounds
from kvc_compile.lowering.general import Blocks

QUERY_HEADS, HEADS, CHANNELS, SPARE = 32, 8, 128, 27
SHAPES = ((8192, 0), (32768, 0), (2048, 30720))  # new tokens, tokens before them
RUNS = 7
CODECS = {
    "16 bits": (Codec("raw"), Codec("raw")),
    "4 bits": (Codec("int", 4, (64, 1), True), Codec("int", 4, (1, CHANNELS), True)),
}
TRIED = (None, Blocks(64, 64, 4, 3), Blocks(128, 64, 8, 3), Blocks(128, 128, 8, 2))  # None: what a model gets


def milliseconds(call: Callable[[], Any]) -> float:
    for _ in range(2):
        call()
    times = []
    for _ in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def layouts(codecs: tuple[Codec, Codec]) -> tuple[Layout, Layout]:
    if codecs[0].kind == "raw":
        return tuple(Layout(c, HEADS, CHANNELS, "bfloat16", word=16) for c in codecs)  # type: ignore[return-value]
    k, v = codecs
    return (
        Layout(k, HEADS, CHANNELS, "bfloat16", 4, 64, 64, 16),
        Layout(v, HEADS, CHANNELS, "bfloat16", 4, 32, 1, 16),
    )


def tokens(heads: int, n: int) -> Tensor:
    return torch.randn(1, heads, n, CHANNELS, device="cuda", dtype=torch.bfloat16)


def cache(layout: Layout, before: int, n: int) -> Tensor:
    arena = reference.empty(1, before + n + SPARE, layout, "cuda")
    if before:
        launch.append(arena, tokens(HEADS, before), layout, torch.arange(before, device="cuda"))
    return arena


def measure(n: int, before: int) -> dict[str, dict[str, Any]]:
    q, k, v = tokens(QUERY_HEADS, n), tokens(HEADS, n), tokens(HEADS, n)
    i, p = torch.arange(n, device="cuda"), torch.arange(before + n + SPARE, device="cuda")
    mask = (p <= before + i[:, None])[None, None]
    seen = torch.compile(bounds)(mask)
    flop = 4 * QUERY_HEADS * CHANNELS * (n * n / 2 + n * before)
    found: dict[str, dict[str, Any]] = {}

    def row(name: str, call: Callable[[], Tensor], expected: Tensor | None) -> Tensor:
        out = call()
        ms = milliseconds(call)
        error = None if expected is None else float((out - expected).abs().max())
        found[name] = {"ms": round(ms, 3), "tflops": round(flop / ms / 1e9, 1), "difference": error}
        return out

    expected = None
    if not before:
        padded = [F.pad(x.repeat_interleave(QUERY_HEADS // HEADS, 1), (0, 0, 0, SPARE)) for x in (k, v)]
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            expected = row("sdpa, mask", partial(F.scaled_dot_product_attention, q, *padded, attn_mask=mask), None)
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
            with sdpa_kernel(backend):
                call = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
                row(f"{name}, causal", call, expected)
    for name, codecs in CODECS.items():
        kl, vl = layouts(codecs)
        arenas = cache(kl, before, n), cache(vl, before, n)
        rest = (mask, i + before, False, CHANNELS**-0.5, kl, vl)
        for tiles in TRIED:
            call = partial(launch.attend, q, *arenas, k, v, *rest, tiles=tiles, bounds=seen)
            row(f"{name}{f', {tiles}' if tiles else ''}", call, expected)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    torch.manual_seed(0)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        **{name: version(name) for name in ("torch", "triton", "kvc-compile")},
    }
    for n, before in SHAPES:
        results[f"{n} after {before}"] = measure(n, before)
        out.write_text(json.dumps(results, indent=1) + "\n")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
