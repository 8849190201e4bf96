"""Time of one decode attention over a compressed cache on a GPU, against the fastest fp16 attention of PyTorch.

Every time is the median over CUDA graph replays that rotate over enough caches to defeat the L2 cache.
`python benchmarks/gpu_kernels.py` prints a table; `run(out)` also fills a dictionary.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvc_compile.kernels import reference
from kvc_compile.layout import Codec, Layout
from kvc_compile.lowering import launch

QUERY_HEADS, HEADS, CHANNELS = 32, 8, 128  # Llama 3 8B
SHAPES = ((1, 4096), (1, 32768), (8, 4096), (8, 32768))  # batch, context
BITS = (16, 8, 4, 2)
ROTATE = 128 << 20  # bytes of caches that one replay goes through, at least
MOST_CACHES = 16
READ_RATE = 3.2e12  # bytes per second that a reading kernel reached on an H100


def layouts(bits: int) -> tuple[Layout, Layout]:
    """Keys per channel and values per token, with the newest tokens kept."""
    if bits == 16:
        raw = Layout(Codec("raw"), HEADS, CHANNELS, "float16", 0, 64, 1)
        return raw, raw
    k, v = (Codec("int", bits, block, True) for block in ((64, 1), (1, CHANNELS)))
    return (
        Layout(k, HEADS, CHANNELS, "float16", 4, 64, 64, 16),
        Layout(v, HEADS, CHANNELS, "float16", 4, 64, 1, 16),
    )


def microseconds(calls: list[Callable[[], object]], replays: int = 15) -> float:
    """The median time of one call inside a graph of all of them."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(max(1, 8 // len(calls))):
            for call in calls:
                call()
    count = len(calls) * max(1, 8 // len(calls))
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


def sdpa_time(q: Tensor, k: Tensor, v: Tensor) -> float:
    """The faster of PyTorch's fused attentions over a cache of fp16 [B, H, T, D]."""
    caches = [(k, v)] + [(k.clone(), v.clone()) for _ in range(copies(2 * k.nbytes) - 1)]
    best = float("inf")
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        try:
            with sdpa_kernel(backend):
                calls = [lambda k=k, v=v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True) for k, v in caches]
                best = min(best, microseconds(calls))
        except RuntimeError as reason:  # not available for this shape
            print(f"  {backend.name}: {str(reason).splitlines()[0]}")
    return best


def attend_time(q: Tensor, k: Tensor, v: Tensor, bits: int) -> tuple[float, int]:
    """Our attention over the same tokens: (microseconds, bytes of one cache)."""
    kl, vl = layouts(bits)
    batch, _, length, _ = k.shape
    arenas = reference.empty(batch, length + 64, kl, "cuda"), reference.empty(batch, length + 64, vl, "cuda")
    launch.append(arenas[0], k, kl, None)
    launch.append(arenas[1], v, vl, None)
    nbytes = sum(a.nbytes for a in arenas)
    caches = [arenas] + [(arenas[0].clone(), arenas[1].clone()) for _ in range(copies(nbytes) - 1)]
    new = torch.randn(2, batch, HEADS, 1, CHANNELS, dtype=torch.float16, device="cuda")
    scale = CHANNELS**-0.5
    return microseconds(
        [lambda a=a, b=b: launch.attend(q, a, b, new[0], new[1], None, None, True, scale, kl, vl) for a, b in caches]
    ), nbytes


def run(out: dict) -> None:
    """Fill `out` with one row for each shape and width."""
    rows = out.setdefault("decode_attention", [])
    print(f"{torch.cuda.get_device_name()}: {QUERY_HEADS}/{HEADS} heads of {CHANNELS}, fp16, one new token")
    print("batch  context  bits   SDPA us   ours us  speedup  of the read rate")
    for batch, length in SHAPES:
        q = torch.randn(batch, QUERY_HEADS, 1, CHANNELS, dtype=torch.float16, device="cuda")
        k, v = torch.randn(2, batch, HEADS, length, CHANNELS, dtype=torch.float16, device="cuda")
        sdpa = sdpa_time(q, k, v)
        for bits in BITS:
            ours, nbytes = attend_time(q, k, v, bits)
            rows.append({"batch": batch, "context": length, "bits": bits, "sdpa_us": sdpa, "us": ours, "bytes": nbytes})
            rate = nbytes / READ_RATE * 1e6 / ours
            print(f"{batch:5} {length:8} {bits:5} {sdpa:9.1f} {ours:9.1f} {sdpa / ours:8.2f} {rate:17.2f}", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    results: dict = {}
    run(results)
    print(json.dumps(results))
