"""The runtime side of a rewritten graph: takes cache handles apart before the call and puts them together after it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvc_compile.handle import CacheHandle, Tag, become, growing, held_elsewhere, moved, track
from kvc_compile.layout import Layout
from kvc_compile.lowering import cpu, ops
from kvc_compile.passes.rewrite import Input, Output, Rewritten
from kvc_compile.plan import SLACK, Slide
from kvc_compile.policy import Policy, capacity

if TYPE_CHECKING:
    from kvc_compile.beside import Beside

log = logging.getLogger("kvc_compile")
_owners = iter(range(1, 1 << 62))


def owner_of(args: Sequence[Any]) -> str:
    """A name for the model whose graph is called: carried by its first parameter, which every graph of it takes."""
    for a in args:
        if isinstance(a, torch.nn.Parameter):
            return mark_owner(a)
    return "no parameters"


def mark_owner(p: torch.nn.Parameter) -> str:
    if not hasattr(p, "kvc_owner"):
        p.kvc_owner = f"model {next(_owners)}"  # type: ignore[attr-defined]
    return p.kvc_owner  # type: ignore[attr-defined]


class Bound:
    """A lowered graph that is called with what Dynamo passes: handles, or plain cache tensors to take over."""

    def __init__(
        self,
        lowered: Callable[..., Any],
        rewritten: Rewritten,
        on_call: Callable[[str], None],
        beside: Beside | None = None,
    ):
        self.lowered, self.rewritten, self.on_call, self.beside = lowered, rewritten, on_call, beside

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        owner = owner_of(args)
        self.on_call(owner)
        beside = self.beside if self.beside and not self.beside.done else None
        untouched = beside.run(args) if beside else None
        call = list(args)
        for i in self.rewritten.inputs:
            call[i.index] = take(args, i, owner).arena
        for index, stays in self.rewritten.dense:
            call[index] = release(args[index]) if stays else args[index].dense()
        outs = list(self.lowered(*call))
        results = outs[: self.rewritten.results]
        for o in self.rewritten.outputs:
            results[o.index] = give(o, outs, args, owner)
        if self.rewritten.births:
            for r in results:  # counters that the next step updates in place: CUDA graphs need their address fixed
                if isinstance(r, Tensor) and r.is_cuda and r.dim() == 0 and not r.dtype.is_floating_point:
                    torch._dynamo.mark_static_address(r)
        if beside and untouched:
            beside.compare(args, outs, results, untouched)
        return tuple(results)


def take(args: Sequence[Any], i: Input, owner: str) -> CacheHandle:
    """The handle of a cache input; a plain tensor is imported first, and its storage released."""
    tensor = args[i.index]
    if not isinstance(tensor, CacheHandle):
        if held_elsewhere(tensor):
            raise RuntimeError(
                f"layer {i.layer}: the memory of this cache tensor {tuple(tensor.shape)} is held by another tensor too "
                "(a view, `.detach()`, `.data`), which would not follow the compressed cache: drop that one first"
            )
        start = tensor.shape[2] if i.pushed else None if i.start is None else int(args[i.start].reshape(-1)[0])
        import_(tensor, i, start, owner)
    if i.slide:
        make_room(tensor, i.pushed, i.slide)
    elif i.static:
        settle(tensor, i, args)
    else:
        held = getattr(tensor.arena, "kvc_length", None)
        if held is not None and held != tensor.shape[2]:
            raise RuntimeError(
                f"layer {i.layer}: this compressed cache tensor of {tensor.shape[2]} tokens was already extended to "
                f"{held}; copy.deepcopy the cache before continuing it in two ways"
            )
    return tensor


def settle(window: CacheHandle, i: Input, args: Sequence[Any]) -> None:
    """A static cache whose tokens were pushed along as a window's takes a new prompt, and nothing at other positions:
    those are not the arena's any more."""
    moved_on = getattr(window.arena, "kvc_total", 0) > window.shape[2]
    if moved_on and (i.start is None or int(args[i.start].reshape(-1)[0]) != 0):
        raise RuntimeError(
            f"layer {i.layer}: this compressed cache is a window that has moved on; it can be written at its end, or "
            "from position 0, and at no other position"
        )
    window.arena.__dict__.pop("kvc_total", None)  # only now: the next call must meet the same error


def make_room(window: CacheHandle, tokens: int, slide: Slide) -> None:
    """Room for `tokens` more in the arena of a full window, whose oldest tokens may go. What happens depends on numbers
    of tokens alone: the same to keys and values."""
    arena, layout, visible = window.arena, window.stored, window.shape[2]
    total = getattr(arena, "kvc_total", None)
    if total is None:
        total = cpu.length(arena, layout)
        if total < visible:  # what a cache that is not full holds after its end is zeros
            ops.store(
                arena,
                arena.new_zeros((*window.shape[:2], visible - total, window.shape[3]), dtype=window.dtype),
                None,
                layout,
            )
            total = visible
    room = slide.room(visible, tokens)
    size = layout.row_bytes(room)
    if arena.shape[1] != size or total + tokens > room:
        drop = slide.forgotten(total, visible)
        cpu.trim(arena, layout, drop)
        total -= drop
    if arena.shape[1] != size:
        window.arena = moved(cpu.resize(arena, size, layout), arena)
    window.arena.kvc_total = total + tokens  # type: ignore[attr-defined]


def release(handle: CacheHandle) -> Tensor:
    """Turn a handle into the plain tensor of its content, in place."""
    log.warning("kvc: a compressed cache %s is written by what is no append: it is plain now", tuple(handle.shape))
    become(handle, handle.dense())
    return handle


def import_(tensor: Tensor, i: Input, start: int | None, owner: str) -> None:
    """Turn the caller's cache tensor [B, H, L, D] into a handle that holds its first `start` tokens, in place; where
    that number is not known, all up to the last one that is not zero."""
    layout = Layout.parse(i.layout)
    if start is None:
        filled = (tensor != 0).any(3).any(1).any(0).nonzero()
        start = int(filled[-1]) + 1 if len(filled) else 0
    arena = ops.empty(tensor, tensor.shape[0], tensor.shape[2], i.layout)
    if start:
        ops.store(arena, tensor[:, :, :start], None, layout)
    track(arena, Tag(owner, i.layer, i.role))
    become(tensor, CacheHandle(arena, layout.key, tensor.shape[2], static=True))


def fitted(arena: Tensor, layout: Layout, tokens: int, o: Output) -> tuple[Tensor, int]:
    """(the arena of a cache of `tokens` tokens, with no more room than it needs, and how many of them were evicted, at
    least). Only a graph that makes an arena is asked for the number."""
    policy = Policy.parse(o.keep) if o.keep else None
    most = capacity(policy.rule, policy.regions, tokens) if policy and policy.steps else None
    if o.arena < 0:
        known = getattr(arena, "kvc_evicted", None)  # None: it was loaded, or made elsewhere
        slots = tokens - 1 - (cpu.evicted(arena, layout) if known is None else known)  # before this step
        gone = tokens - (slots + 1 if most is None else min(slots + 1, max(slots, most)))
        arena.kvc_evicted = gone  # type: ignore[attr-defined]
        return arena, gone
    gone = cpu.evicted(arena, layout)
    room = tokens - gone if most is None else max(cpu.length(arena, layout), most)
    size = layout.row_bytes(room + (0 if o.static else SLACK))
    if size < arena.shape[1]:
        arena = cpu.resize(arena, size, layout)
    arena.kvc_evicted = gone  # type: ignore[attr-defined]
    return arena, gone


def give(o: Output, outs: list[Any], args: Sequence[Any], owner: str) -> CacheHandle:
    """The handle that the caller gets in place of a cache tensor."""
    if o.static and o.arena < 0:
        return args[~o.arena]
    tokens = o.tokens if o.tokens >= 0 else int(outs[~o.tokens])
    if o.add_to is not None:
        tokens += args[o.add_to].shape[2]
    arena = outs[o.arena] if o.arena >= 0 else args[~o.arena].arena
    layout = Layout.parse(o.layout)
    total = tokens
    if o.appended is not None:  # a sliding window: the arena holds some more
        total = o.appended if o.appended >= 0 else int(outs[~o.appended])
        if o.past is not None:
            total += getattr(args[o.past].arena, "kvc_total", args[o.past].shape[2])
        if o.slide and total - max(tokens, o.slide.least) > SLACK:
            drop = o.slide.forgotten(total, tokens)
            cpu.trim(arena, layout, drop)
            total -= drop
    if layout.evicts:
        arena, gone = fitted(arena, layout, tokens, o)
        total -= gone
    if not o.static and layout.body_tokens(total + 1) > layout.capacity_of(arena.shape[1]):
        grown = cpu.grow(arena, total + SLACK, layout)  # the next token must fit without moving the arena
        if layout.evicts:
            grown.kvc_evicted = arena.kvc_evicted  # type: ignore[attr-defined]
        arena = grown
    track(arena, Tag(owner, o.layer, o.role))
    if o.static:
        return CacheHandle(arena, o.layout, tokens, True)
    if o.appended is not None:
        arena.kvc_total = total
    return growing(arena, o.layout, tokens, o.appended is not None)
