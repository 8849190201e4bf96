"""Time of one decode attention over a compressed cache on a GPU, against the fastest 16-bit attentions of PyTorch and
against what the card reads in that time.

    python benchmarks/gpu_kernels.py [--shapes llama3-8b:8x32768,...] [--dtypes float16,bfloat16] [--out FILE]

Every time is the median over CUDA graph replays that rotate over enough caches to defeat the L2 cache. The ceiling is
the rate of a kernel that only reads, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvc_compile.kernels import reference
from kvc_compile.layout import Codec, Layout
from kvc_compile.lowering import launch

MODELS = {  # query heads, kv heads, channels
    "llama3-8b": (32, 8, 128), "llama2-7b": (32, 32, 128), "qwen2.5-7b": (28, 4, 128),
    "channels64": (32, 8, 64), "channels96": (32, 8, 96), "channels256": (16, 8, 256), "groups8": (32, 4, 128),
    "groups16": (64, 4, 128),
}  # fmt: skip
SHAPES = (
    "llama3-8b:1x4096", "llama3-8b:1x32768", "llama3-8b:1x131072", "llama3-8b:8x4096", "llama3-8b:8x32768",
    "llama3-8b:8x131072", "llama3-8b:32x4096", "llama3-8b:32x32768", "llama2-7b:1x4096", "llama2-7b:1x32768",
    "llama2-7b:8x32768", "qwen2.5-7b:1x4096", "qwen2.5-7b:8x4096", "qwen2.5-7b:8x32768",
    "channels64:8x65536", "channels96:8x43008", "channels256:8x16384", "groups8:8x65536", "groups16:8x65536",
)  # fmt: skip
FORMATS = ("16", "fp8", "int8", "int4", "int2", "int2 g128")
ROTATE = 320 << 20  # bytes of caches that one replay goes through, at least
MOST_CACHES = 40
MOST_BYTES = 60 << 30  # that one shape may take


def layouts(name: str, heads: int, channels: int, dtype: str) -> tuple[Layout, Layout]:
    """Keys by channel in groups of 64 (or 128) tokens, values by token; sinks and the newest tokens kept."""
    if name in ("16", "fp8"):
        plain = Layout(Codec("raw") if name == "16" else Codec("fp", 8), heads, channels, dtype)
        return plain, plain
    kind, _, group = name.partition(" g")
    t, bits = int(group or 64), int(kind[3:])
    k, v = (Codec("int", bits, block, True) for block in ((t, 1), (1, channels)))
    return (
        Layout(k, heads, channels, dtype, 4, 64, t, 16),
        Layout(v, heads, channels, dtype, 4, 32, 1, 16),
    )


def microseconds(calls: list[Callable[[], object]], replays: int = 11) -> float:
    """The median time of one call inside a graph of all of them."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    count = max(1, 8 // len(calls)) * len(calls)
    with torch.cuda.graph(graph):
        for i in range(count):
            calls[i % len(calls)]()
    times = []
    for _ in range(replays + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    return sorted(times[3:])[replays // 2]


def copies(nbytes: int) -> int:
    return min(MOST_CACHES, max(2, -(-ROTATE // nbytes)))


@triton.jit
def _xor(a, b):
    return a ^ b


@triton.jit
def _read_only(x, out, BLOCK: tl.constexpr, TURNS: tl.constexpr, UNROLL: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * (BLOCK * TURNS) + tl.arange(0, BLOCK)
    a = tl.zeros([BLOCK], tl.int32)
    for i in tl.range(0, TURNS, UNROLL):
        for j in tl.static_range(UNROLL):
            a = a ^ tl.load(x + at + (i + j) * BLOCK)
    tl.store(out + tl.program_id(0), tl.reduce(a, 0, _xor))


def read_rate() -> float:
    """Bytes per second of a kernel that reads 4 GiB and does next to nothing with them."""
    n = 1 << 30
    x = torch.randint(-(2**31), 2**31 - 1, (n,), dtype=torch.int32, device="cuda")
    best = float("inf")
    for block, turns, unroll, warps in ((1024, 16, 4, 4), (2048, 32, 8, 4), (4096, 32, 4, 8), (1024, 64, 8, 4)):
        out = torch.empty(n // (block * turns), dtype=torch.int32, device="cuda")
        args = {"BLOCK": block, "TURNS": turns, "UNROLL": unroll, "num_warps": warps}
        best = min(best, microseconds([lambda o=out, a=args: _read_only[(len(o),)](x, o, **a)]))
    return 4 * n / best * 1e6


def sdpa_times(q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
    """PyTorch's fused attentions over a cache of 16-bit numbers [B, H, T, D]."""
    caches = [(k, v)] + [(k.clone(), v.clone()) for _ in range(copies(2 * k.nbytes) - 1)]
    out = {}
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        try:
            with sdpa_kernel(backend):
                calls = [lambda k=k, v=v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True) for k, v in caches]
                out[name] = microseconds(calls)
        except RuntimeError as reason:  # not available for this shape
            print(f"  {name}: {str(reason).splitlines()[0]}")
    return out


def attend_time(q: Tensor, k: Tensor, v: Tensor, name: str) -> tuple[float, int]:
    """Our attention over the same tokens: (microseconds, bytes of one cache)."""
    batch, heads, length, channels = k.shape
    kl, vl = layouts(name, heads, channels, str(k.dtype).removeprefix("torch."))
    arenas = reference.empty(batch, length + 64, kl, "cuda"), reference.empty(batch, length + 64, vl, "cuda")
    launch.append(arenas[0], k, kl, None)
    launch.append(arenas[1], v, vl, None)
    nbytes = sum(a.nbytes for a in arenas)
    caches = [arenas] + [(arenas[0].clone(), arenas[1].clone()) for _ in range(copies(nbytes) - 1)]
    new = torch.randn(2, batch, heads, 1, channels, dtype=k.dtype, device="cuda")
    scale = channels**-0.5
    return microseconds(
        [lambda a=a, b=b: launch.attend(q, a, b, new[0], new[1], None, None, True, scale, kl, vl) for a, b in caches]
    ), nbytes


def run(out: dict, shapes: tuple[str, ...] = SHAPES, dtypes: tuple[str, ...] = ("float16", "bfloat16")) -> None:
    """Fill `out` with the ceiling and one row for each shape, dtype and format."""
    out["read_bytes_per_s"] = rate = read_rate()
    rows = out.setdefault("decode_attention", [])
    print(f"{torch.cuda.get_device_name()}: reads {rate / 1e12:.3f} TB/s; microseconds, gain, fraction of that rate")
    for shape in shapes:
        model, size = shape.split(":")
        batch, length = map(int, size.split("x"))
        query_heads, heads, channels = MODELS[model]
        for dtype in dtypes:
            dense = 4 * batch * heads * length * channels
            if 4 * dense > MOST_BYTES:
                continue
            q = torch.randn(batch, query_heads, 1, channels, dtype=getattr(torch, dtype), device="cuda")
            k, v = torch.randn(2, batch, heads, length, channels, dtype=q.dtype, device="cuda")
            row: dict = {"model": model, "batch": batch, "context": length, "dtype": dtype, "dense_bytes": dense}
            row["sdpa_us"] = sdpa_times(q, k, v)
            times = {name: attend_time(q, k, v, name) for name in FORMATS}
            best = row["best_16bit_us"] = min(*row["sdpa_us"].values(), times["16"][0])
            row["formats"] = {
                name: {"us": us, "bytes": nbytes, "gain": best / us, "of_read_rate": nbytes / us * 1e6 / rate}
                for name, (us, nbytes) in times.items()
            }
            rows.append(row)
            cells = (f"{n} {f['us']:.1f} x{f['gain']:.2f} {f['of_read_rate']:.2f}" for n, f in row["formats"].items())
            sdpa = " ".join(f"{n} {us:.1f}" for n, us in row["sdpa_us"].items())
            print(f"{shape} {dtype} | {sdpa} | " + " | ".join(cells), flush=True)
            del q, k, v
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--dtypes", default="float16,bfloat16")
    parser.add_argument(
        "--warm", action="store_true", help="only compile: several such processes side by side save time"
    )
    parser.add_argument("--out", type=Path, help="a file for the rows as JSON")
    args = parser.parse_args()
    if args.warm:
        for shape in args.shapes.split(","):
            for dtype in args.dtypes.split(","):
                query_heads, heads, channels = MODELS[shape.split(":")[0]]
                q = torch.randn(1, query_heads, 1, channels, dtype=getattr(torch, dtype), device="cuda")
                k = torch.randn(1, heads, 1024, channels, dtype=q.dtype, device="cuda")
                for name in FORMATS:
                    attend_time(q, k, k, name)
        return
    results: dict = {"torch": torch.__version__, "triton": triton.__version__, "device": torch.cuda.get_device_name()}
    run(results, tuple(args.shapes.split(",")), tuple(args.dtypes.split(",")))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
