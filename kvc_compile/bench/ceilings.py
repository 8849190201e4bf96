"""What the device does at most: bytes read and copied, matrix products."""

from __future__ import annotations

import torch

from kvc_compile.bench.clock import call_seconds
from kvc_compile.bench.rows import Ceilings

GPU_BYTES, CPU_BYTES = 4 << 30, 64 << 20
GPU_SIDE, CPU_SIDE = 8192, 512


def measure(device: str, dtype: torch.dtype) -> Ceilings:
    name, memory = f"CPU, {torch.get_num_threads()} threads", None
    if device.startswith("cuda"):
        name, memory = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]
    return Ceilings(read_rate(device), copy_rate(device), multiply_rate(device, dtype), name, memory)


def read_rate(device: str) -> float:
    """Bytes per second of a kernel that reads and does next to nothing else: the best of some shapes of it; on a CPU of
    a sum."""
    if device.startswith("cuda"):
        from kvc_compile.bench import reading

        return reading.rate(GPU_BYTES)
    x = torch.ones(CPU_BYTES // 4)
    return x.nbytes / min(call_seconds([lambda: x.sum()], device) for _ in range(3))


def copy_rate(device: str) -> float:
    """Bytes per second, read and written."""
    size = GPU_BYTES // 2 if device.startswith("cuda") else CPU_BYTES
    x = torch.zeros(size, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * size / call_seconds([lambda: y.copy_(x)], device)


def multiply_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP per second of a product of two square matrices."""
    n = GPU_SIDE if device.startswith("cuda") else CPU_SIDE
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n**3 / call_seconds([lambda: a @ b], device)
