"""What a mask comes down to, so that a kernel need not read it where it only hides a beginning and an end."""

from __future__ import annotations

import torch
from torch import Tensor

from kvc_compile.kernels.reference import HIDDEN

NEVER = 2**31 - 1


def bounds(mask: Tensor) -> Tensor:
    """int32 [b, h, n, 3] of a mask [b, h, n, W] (or of fewer dimensions): the first position that a query sees, one
    past the last, and 1 if it sees all between them with nothing added. 0, 0, 1 for one that sees nothing."""
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    seen = mask if mask.dtype == torch.bool else mask > HIDDEN
    clear = seen if mask.dtype == torch.bool else mask == 0
    p = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
    end = torch.where(seen, p + 1, 0).amax(-1)
    # a constant, not the width: Inductor (2.11) takes a size that varies for int64, and Triton refuses the reduction
    first = torch.where(seen, p, NEVER).amin(-1).minimum(end)
    count = (seen & clear).sum(-1, dtype=torch.int32)
    return torch.stack([first, end, (count >= end - first).int()], -1)
