"""Host launcher of the scores of a held index, `kernels.scores`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kvc_compile.kernels import scores as K
from kvc_compile.kernels.reference import views
from kvc_compile.kernels.select import held
from kvc_compile.layout import Layout
from kvc_compile.lowering.launch import interpreted, launcher, on
from kvc_compile.lowering.variants import power_of_2

TILE = 256  # slots of a program
HOW = {"mean": 0, "sum": 1, "max": 2}


def of(q: Tensor, k_data: Tensor, k_new: Tensor, length: Tensor, layout: Layout, gqa: str, dry: bool = False) -> Tensor:
    """What the index in an arena says of every slot, the new token in slot `length`, int64 []: fp32 [B, H, 1, T] of
    hashes, [B, H, G, T] of channels, T the room of the arena and one more. q: [B, query heads, D]; k_new: [B, H, 1, D].
    """
    v = views(k_data, layout)
    assert v.sketch is not None
    batch, heads, room = v.sketch.shape[:3]
    query = held.sketches(q.float().unflatten(1, (heads, -1)), layout)
    new, known = held.sketches(k_new, layout), v.sketch
    hashed = layout.sketch.startswith("hash")
    groups, tokens = query.shape[2], room + 1
    if hashed:
        query, new, known = (x.view(torch.int32) for x in (query.contiguous(), new.contiguous(), known))
    out = torch.empty(batch, heads, 1 if hashed else groups, tokens, dtype=torch.float32, device=q.device)
    args = query.contiguous(), known, new.contiguous(), length, out, tokens, *known.stride()[:3]
    grid = triton.cdiv(tokens, TILE), batch * heads
    with on(q.device):
        if hashed:
            launcher(K.hash_scores, dry, *grid)(
                *args, G=groups, HEADS=heads, WORDS=known.shape[3], BT=TILE, HOW=HOW[gqa], ASM=not interpreted()
            )
        else:
            width = known.shape[3]
            launcher(K.channel_scores, dry, *grid)(*args, G=groups, HEADS=heads, R=width, RP=power_of_2(width), BT=TILE)
    return out
