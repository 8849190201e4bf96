"""Scores of heads, by which a spec classes them: measured on a model in one forward pass, nothing trained.

echo        attention to earlier copies of the token itself, on random tokens that are repeated
induction   attention to what came after earlier copies (both: RazorAttention, Tang et al. 2024, arXiv:2407.15891)
streaming   how far a head's output moves where it sees only the first and the newest tokens:
            sum |o - o'|^2 / sum |o|^2. DuoAttention (Xiao et al. 2024, arXiv:2410.10819) trains gates for the effect
            on the model's last hidden state instead; this looks at one layer at a time, and is no substitute where
            trained gates are published.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 128  # queries whose attention exists at a time
NAME = "kvc_calibrate"  # of the attention that looks, in transformers
UNKNOWN = ("softcap", "s_aux", "head_mask", "position_bias")  # what changes weights and is not computed here


class CalibrateError(Exception):
    """A model, or a probe, that gives no scores, in words for the user."""


@dataclass(frozen=True)
class Probe:
    """What the model reads and how it is judged. ids: int64 [T]; period: tokens after which they repeat, 0 if they do
    not; sink, recent: tokens that a streaming head sees."""

    ids: Tensor
    period: int = 0
    sink: int = 16
    recent: int = 64


@dataclass(frozen=True)
class Seen:
    """A block of rows of a layer's attention. p: [H, G, n, T], weights of G query heads of a KV head; v: [H, T, D];
    first: the position of the first query; sees: bool [n, T]."""

    p: Tensor
    v: Tensor
    first: int
    sees: Tensor


# a score adds up, over blocks of queries, a numerator and a denominator [H, G]; heads of a group are put together after
Measure = Callable[[Probe, Seen], tuple[Tensor, Tensor]]


def repeated(vocabulary: int, tokens: int, repeats: int, seed: int, without: Sequence[int] = ()) -> Tensor:
    """int64 [tokens * repeats]: different random tokens, again and again. Raises CalibrateError."""
    allowed = torch.tensor(sorted(set(range(vocabulary)) - set(without)))
    if tokens > len(allowed):
        raise CalibrateError(f"{tokens} different tokens of a vocabulary of {len(allowed)}")
    g = torch.Generator().manual_seed(seed)
    return allowed[torch.randperm(len(allowed), generator=g)[:tokens]].repeat(repeats)


def _copies(after: int) -> Measure:
    """The weight on what is `after` tokens behind earlier copies of the query's token."""

    def measure(probe: Probe, s: Seen) -> tuple[Tensor, Tensor]:
        n, tokens = s.p.shape[2:]
        query = torch.arange(s.first, s.first + n, device=s.p.device)[:, None]
        key = torch.arange(tokens, device=s.p.device)
        back = query + after - key
        copy = (back > after) & (back % probe.period == 0) & (key >= after)
        voting = query[:, 0] >= probe.period
        held = (s.p * copy).sum(-1)[..., voting]
        return held.sum(-1), torch.full(held.shape[:2], float(held.shape[-1]), device=held.device, dtype=held.dtype)

    return measure


def _streaming(probe: Probe, s: Seen) -> tuple[Tensor, Tensor]:
    n, tokens = s.p.shape[2:]
    query = torch.arange(s.first, s.first + n, device=s.p.device)[:, None]
    key = torch.arange(tokens, device=s.p.device)
    near = (key < probe.sink) | (key > query - probe.recent)
    some = (s.sees & ~near).any(-1)  # queries from which anything is hidden
    left = torch.where(near, s.p, 0.0)
    left = left / left.sum(-1, keepdim=True).clamp(min=torch.finfo(left.dtype).tiny)
    whole = torch.einsum("hgnt,htd->hgnd", s.p, s.v)[:, :, some]
    moved = torch.einsum("hgnt,htd->hgnd", left, s.v)[:, :, some] - whole
    return moved.square().sum((-1, -2)), whole.square().sum((-1, -2))


@dataclass(frozen=True)
class Score:
    """group: how query heads of a KV head are put together: the "best" of them, or "all" in one ratio."""

    measure: Measure
    group: str
    repeats: bool  # whether it needs tokens that repeat


SCORES: dict[str, Score] = {
    "echo": Score(_copies(0), "best", True),
    "induction": Score(_copies(1), "best", True),
    "streaming": Score(_streaming, "all", False),
}


def calibrate(
    model: Any, probe: Probe, scores: Sequence[str], progress: Callable[[int], None] = lambda layer: None
) -> dict[str, list[list[float]]]:
    """Each score by layer and KV head, six digits. model: a decoder of transformers, whose attention is put back after.

    progress: called with the number of layers seen. Raises CalibrateError for models whose attention cannot be looked
    at, and for probes that say nothing.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise CalibrateError(f"{error}; install kvc-compile[hf]") from None
    _check(model, probe, scores)
    layers: dict[int, Mapping[str, Tensor]] = {}

    def look(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **more: Any) -> Any:
        odd = [name for name in UNKNOWN if more.get(name) is not None]
        if odd or q.shape[2] != k.shape[2]:
            raise CalibrateError(f"attention with {', '.join(odd) or 'a cache'}, which is not calibrated")
        i = getattr(module, "layer_idx", len(layers))
        scale = more.get("scaling") or q.shape[-1] ** -0.5
        layers[i] = measured(probe, scores, q[0], k[0], v[0], scale, None if mask is None else mask[0, 0])
        progress(len(layers))
        return sdpa_attention_forward(module, q, k, v, mask, **more)

    AttentionInterface.register(NAME, look)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(NAME)
        with torch.no_grad():
            model(probe.ids[None].to(model.device), use_cache=False)
    finally:
        model.set_attn_implementation(before)
    wanted = model.config.get_text_config(decoder=True).num_hidden_layers
    if sorted(layers) != list(range(wanted)):
        raise CalibrateError(
            f"saw attention in {len(layers)} of {wanted} layers: others do not go through transformers'"
        )
    return {name: [_digits(layers[i][name]) for i in range(wanted)] for name in scores}


def measured(
    probe: Probe, scores: Sequence[str], q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None
) -> dict[str, Tensor]:
    """Each score [H] of a layer. q: [Hq, T, D]; k, v: [H, T, D]; mask: [T, T], bool or added, None if it is causal."""
    heads, tokens = k.shape[:2]
    q, k, v = (x.float() for x in (q, k, v))
    total = dict.fromkeys(scores, (torch.zeros(()), torch.zeros(())))
    for first in range(0, tokens, BLOCK):
        rows = slice(first, min(first + BLOCK, tokens))
        s = torch.einsum("hgnd,htd->hgnt", q[:, rows].unflatten(0, (heads, -1)), k) * scale
        if mask is None:
            sees = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()[rows]
        else:
            seen = mask[rows, :tokens]
            sees = seen if seen.dtype == torch.bool else seen == 0
        block = Seen(s.masked_fill(~sees, -torch.inf).softmax(-1), v, first, sees)
        for name in scores:
            top, bottom = SCORES[name].measure(probe, block)
            total[name] = (total[name][0] + top, total[name][1] + bottom)
    found = {}
    for name, (top, bottom) in total.items():
        best = SCORES[name].group == "best"
        found[name] = (top / bottom).amax(-1) if best else top.sum(-1) / bottom.sum(-1)
    return found


def _check(model: Any, probe: Probe, scores: Sequence[str]) -> None:
    config = model.config.get_text_config(decoder=True)
    most = getattr(config, "max_position_embeddings", None) or len(probe.ids)
    if len(probe.ids) > most:
        raise CalibrateError(f"a probe of {len(probe.ids)} tokens; the model takes {most}")
    if any(SCORES[name].repeats for name in scores) and not 2 <= probe.period < len(probe.ids):
        raise CalibrateError("echo and induction heads show only on tokens that repeat")
    if "streaming" in scores and len(probe.ids) <= probe.sink + probe.recent:
        raise CalibrateError(
            f"a probe of {len(probe.ids)} tokens hides nothing behind {probe.sink} first and {probe.recent} newest ones"
        )


def _digits(x: Tensor) -> list[float]:
    if not bool(torch.isfinite(x).all()):
        raise CalibrateError("a score that is no number: the model's outputs are not finite")
    return [round(n, 6) for n in x.tolist()]
