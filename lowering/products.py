"""kvc::products: linear layers without a bias of one input, on a GPU in one launch if it has few rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kvc_compile.lowering.ops import operator, shapes

MOST_ROWS = 16
MOST_WEIGHTS = 3  # of one launch
OUTPUTS, STAGES = 16, 4  # of a program, and steps in flight: measured on an H100
CHANNELS = 256, 128, 64  # of a step: the first that divides those of a row


def takes(rows: int, weight: Tensor) -> bool:
    """Whether the kernel multiplies as many rows with this weight [N, K]."""
    return (
        0 < rows <= MOST_ROWS
        and weight.dtype in (torch.float16, torch.bfloat16)
        and weight.is_contiguous()
        and weight.shape[0] % OUTPUTS == 0
        and weight.shape[1] % CHANNELS[-1] == 0
    )


@operator()
def products(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """`linear(x, w)` of each weight: x [..., K], w [N, K] to [..., N]."""
    rows = x.numel() // x.shape[-1]
    if x.is_cuda and all(takes(rows, w) and w.data_ptr() % 16 == 0 for w in weights):
        return launch(x, weights)
    return [F.linear(x, w) for w in weights]


@shapes(products)
def _(x, weights):
    return [x.new_empty((*x.shape[:-1], w.shape[0])) for w in weights]


def launch(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """By the kernel, for weights that it takes, `MOST_WEIGHTS` at most."""
    from kvc_compile.kernels.products import products as kernel
    from kvc_compile.lowering.launch import aligned, launches_early, on

    channels = x.shape[-1]
    rows = aligned(x.reshape(-1, channels).contiguous())
    out = [x.new_empty((*x.shape[:-1], w.shape[0])) for w in weights]
    widths = [w.shape[0] for w in weights]
    none = MOST_WEIGHTS - len(weights)
    step = next(c for c in CHANNELS if channels % c == 0)
    early = launches_early(x.device)
    with on(x.device):
        kernel[sum(widths) // OUTPUTS,](
            rows, *weights, *[weights[0]] * none, *out, *[out[0]] * none, len(rows), *widths, *[0] * none,
            K=channels, BM=8 if len(rows) <= 8 else 16, BN=OUTPUTS, BK=step, STAGES=STAGES, EARLY=early,
            num_warps=1, **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
    return out
