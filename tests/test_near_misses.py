"""Modules that append to a KV cache and attend over it, or almost do.

A module is a choice for each stage of `STAGES`: how the new tokens are written, what happens between the write and the
attention, how attention is spelled, and so on. The first choice of a stage is the plain one, and the module of plain
choices must be compressed. For all others one law holds, whatever the compiler makes of them: over a prefill and some
decode steps they compute what the module computes without it, and leave the caller's caches with the same content.
A failure shows the module's code.
"""

from __future__ import annotations

import collections
import copy
import os
import re
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: F401, for the forwards
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kvc_compile.backend as backend
from kvc_compile.handle import CacheHandle
from kvc_compile.plan import SitePlan
from kvc_compile.report import remembered
from kvc_compile.sites import Declined

# a quarter of an hour: thousands of them
ASKED = pytest.mark.skipif("KVC_NEAR_MISSES" not in os.environ, reason="set KVC_NEAR_MISSES=1 for it")
MANY = [pytest.mark.slow, ASKED]

KINDS = ("static", "born", "grown")  # tensors that the caller made; that the first call makes; `cat`
FIXED = ("static", "born")
GAP = "appended at position|from position|consecutive positions"
SHOWN = "mask shows positions"
ROUND = "a full compressed cache is written from an earlier position"
WRITES = "writes to a compressed cache"
FIRST = "first tokens of a compressed cache that is not empty"


@dataclass(frozen=True)
class Choice:
    """Lines of a module's `forward`, or a setting of the driver.

    near: the compiler may leave the attention alone; where it is False, it must not. raises: a message that is allowed,
    because a compressed cache does not support what is asked. also: lines in other places of the forward. needs: what
    must be chosen elsewhere.
    """

    code: str = ""
    near: bool = False
    kinds: tuple[str, ...] = KINDS
    raises: str = ""
    also: dict[str, str] = field(default_factory=dict)
    needs: dict[str, str] = field(default_factory=dict)


def same(code: str = "", *kinds: str, **more: Any) -> Choice:
    """The same thing said in another way: it must be compressed too."""
    return Choice(code, False, kinds or KINDS, **more)


def near(code: str = "", *kinds: str, **more: Any) -> Choice:
    return Choice(code, True, kinds or KINDS, **more)


# ---------------------------------------------------------------- the stages of a forward

TEMPLATE = """\
def forward(self, x, pos, given, start, ck, cv):
    b, _, n, _ = x.shape
    x = x + self.place[pos]
    q, k, v = x @ self.wq, x @ self.wk, x @ self.wv
    causal, extra = False, x.new_zeros(())
    {birth}
    {tokens}
    {positions}
    {before}
    {write}
    {middle}
    {later}
    {read}
    {repeat}
    {mask}
    {cut}
    {attention}
    {after}
    {result}
"""

SDPA = "F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=gqa(q, keys){})"

BIRTH = {
    "zeros": same("c = [torch.zeros(b, self.h, self.length, d) for d in (self.dk, self.dv)]"),
    "zeros of a tuple": same("c = [torch.zeros((b, self.h, self.length, d)) for d in (self.dk, self.dv)]"),
    "zeros by keyword": near("c = [torch.zeros(size=(b, self.h, self.length, d)) for d in (self.dk, self.dv)]"),
    "new_zeros": same("c = [x.new_zeros(b, self.h, self.length, d) for d in (self.dk, self.dv)]"),
    "new_zeros by keyword": near("c = [x.new_zeros(size=(b, self.h, self.length, d)) for d in (self.dk, self.dv)]"),
    "zeros_": near("c = [torch.empty(b, self.h, self.length, d).zero_() for d in (self.dk, self.dv)]"),
    "zeros_like": near("c = [torch.zeros_like(x.new_empty(b, self.h, self.length, d)) for d in (self.dk, self.dv)]"),
    "full": near("c = [torch.full((b, self.h, self.length, d), 0.0) for d in (self.dk, self.dv)]"),
    "ones": near("c = [torch.ones(b, self.h, self.length, d) for d in (self.dk, self.dv)]"),
    "a copy of zeros": near("c = [torch.zeros(b, self.h, self.length, d).clone() for d in (self.dk, self.dv)]"),
    "one for both": near("c = [torch.zeros(b, self.h, self.length, self.dk)] * 2"),
    "halves of one": near("c = torch.zeros(2, b, self.h, self.length, self.dk)"),
    "transposed": near("c = [torch.zeros(b, self.length, self.h, d).transpose(1, 2) for d in (self.dk, self.dv)]"),
    "with room for the prompt": same(
        "c = [torch.zeros(b, self.h, n + 8, d) for d in (self.dk, self.dv)]",
        needs={"schedule": "prompts of three lengths", "mask": "computed"},
    ),
}

TOKENS = {
    "plain": same(),
    "rope": same("q, k = rotate(q, pos), rotate(k, pos)"),
    "views of one tensor": same(
        "q, k, v = (x @ torch.cat([self.wq, self.wk, self.wv])).split([self.h * self.g, self.h, self.h], 1)"
    ),
    "views of the input": same("k, v = x.expand(b, self.h, n, self.dk), x.expand(b, self.h, n, self.dv)"),
    "values are keys": same("v = k"),
    "keys and values exchanged": same("k, v = v, k"),
    "one head for all": same("k = k[:, :1].expand_as(k)"),
    "normalised": same("k = F.normalize(k, dim=-1)"),
    "queries scaled": same("q = q * 0.5"),
    "queries are keys": same("q = spread(k, q)"),
    "heads of queries reversed": same("q = q.flip(1)"),
    "contiguous": same("q, k, v = (t.contiguous() for t in (q, k, v))"),
    "stacked": same("k, v = torch.stack([k, v])"),
    "in full precision": same("q, k, v = (t.to(x.dtype) for t in (q, k, v))"),
    "doubles in decode steps": near(
        "if n == 1:\n    q, k, v = q.double(), k.double(), v.double()", "grown", needs={"mask": "none"}
    ),
    "the last query only": near("q = q[:, :, -1:]", also={"positions": "given = given[..., -1:, :]"}),
    "queries twice": near("q = torch.cat([q, q], 2)", also={"positions": "given = torch.cat([given, given], 2)"}),
}

POSITIONS = {
    "given": same(),
    "copied": same("pos = pos.clone()", *FIXED),
    "cast": same("pos = pos.int().long()", *FIXED),
    "range and number": same("pos = torch.arange(n) + start", *FIXED),
    "range from a number": same("pos = torch.arange(start, start + n)", *FIXED),
    "modulo": same("pos = pos % 64", *FIXED),
    "offset": same("pos = self.offset + pos", *FIXED),
    "counter": same("pos = torch.arange(n) + self.count\nself.count.add_(n)", *FIXED),
    "counter, moved on before attention": same(
        "pos = torch.arange(n) + self.count", *FIXED, also={"later": "self.count.add_(n)"}
    ),
    "counter itself, moved on before attention": near(
        "pos = self.count.view(1) if n == 1 else torch.arange(n) + self.count",
        *FIXED,
        raises=GAP,
        also={"later": "self.count.add_(n)"},
    ),
    "a copy for values": near("pos_v = pos.clone()", *FIXED),
    "values one later": near("pos_v = pos + 1", *FIXED, raises=GAP),
    "values one earlier in decode steps": near("pos_v = pos - 1 if n == 1 else pos", *FIXED),
    "values reversed": near("pos_v = pos.flip(0)", *FIXED, raises=GAP),
    "reversed": near("pos = pos.flip(0)", *FIXED, raises=GAP),
    "doubled": near("pos = pos * 2", *FIXED, raises=GAP),
}

BEFORE = {
    "nothing": same(),
    "sizes": same("extra = extra + ck.shape[-1] + ck.dim() + cv.size(0)"),
    "strides": near("extra = extra + ck.stride(0) + ck.is_contiguous()"),
    "sum": near("extra = extra + ck.sum()"),
    "sum of values": near("extra = extra + cv.sum()"),
    "sum of a slice": near("extra = extra + ck[..., :1].sum()"),
    "sum of a copy": near("extra = extra + ck.clone().sum()"),
    "sum in decode steps": near("if n == 1:\n    extra = extra + cv.sum()"),
    "emptied": near("ck.zero_()", raises=f"{GAP}|{WRITES}"),
    "scaled": near("ck.mul_(0.5)", raises=WRITES),
    "written to itself": near("ck.copy_(ck.clone())", *FIXED),
    "first token cleared": near("ck[:, :, 0] = 0", *FIXED),
    "unused view": near("view = ck.transpose(0, -1)"),
}


def write(code: str) -> str:
    """Lines for the keys, and the same for the values."""
    return code + "\n" + re.sub(r"\bpos\b", "pos_v", re.sub(r"\bk\b", "v", code.replace("ck", "cv")))


def push(
    one: str = "{new}[:, :, torch.tensor([-1])] = {k}\n{c}.copy_({new})",
    roll: str = "-1",
    first: str = "1:",
    seen: str = "",
) -> str:
    """A window that is full: for one token `roll`, the write of it and the copy back, for more tokens `cat`."""
    code = "if n == 1:\n"
    parts = [{"c": f"c{t}", "k": t, "new": f"new_{t}", "all": f"all_{t}"} for t in "kv"]
    for part in parts:
        code += "    {new} = {c}.roll(".format(**part) + roll + ", 2)\n    "
        code += one.format(**part).replace("\n", "\n    ") + "\n"
    code += "else:\n"
    for part in parts:
        code += "    {all} = torch.cat([{c}[:, :, FIRST], {k}], 2)\n".replace("FIRST", first).format(**part)
        code += ("    {c}.copy_({all}[:, :, -{c}.shape[2] :])\n    " + (seen or "pass") + "\n").format(**part)
    return code.rstrip()


AS_KEPT: dict[str, Any] = {"also": {"after": "ck, cv = kept"}, "needs": {"mask": "none"}}


def all_seen(make: Callable[..., Choice], part: str = "") -> Choice:
    """A window to which more than one token is pushed, and attention over what that puts together, or a part of it."""
    return make("kept = ck, cv\n" + push(seen="{c} = {all}" + part), "static", **AS_KEPT)


WRITE = {
    "index_copy_": same(write("ck.index_copy_(2, pos, k)"), *FIXED),
    "cat": same(write("ck = torch.cat([ck, k], 2)"), "grown"),
    # in place
    "index_copy_, dim -2": same(write("ck.index_copy_(-2, pos, k)"), *FIXED),
    "result of index_copy_": same(write("ck = ck.index_copy_(2, pos, k)"), *FIXED),
    "torch.index_copy": near(write("ck = torch.index_copy(ck, 2, pos, k)"), *FIXED),
    "index_copy into a copy": near(write("ck = ck.clone()\nck.index_copy_(2, pos, k)"), *FIXED),
    "setitem": same(write("ck[:, :, pos] = k"), *FIXED),
    "setitem of four": same(write("ck[:, :, pos, :] = k"), *FIXED),
    "setitem of ellipsis": near(write("ck[..., pos, :] = k"), *FIXED),
    "slice": same(write("ck[:, :, start : start + n] = k"), *FIXED, raises=f"{GAP}|{SHOWN}"),
    "slice of four": same(write("ck[:, :, start : start + n, :] = k"), *FIXED, raises=f"{GAP}|{SHOWN}"),
    "slice, copy_": same(write("ck[:, :, start : start + n].copy_(k)"), *FIXED, raises=f"{GAP}|{SHOWN}"),
    "narrow": same(write("ck.narrow(2, start, n).copy_(k)"), *FIXED, raises=f"{GAP}|{SHOWN}"),
    "narrow, dim -2": same(write("ck.narrow(-2, start, n).copy_(k)"), *FIXED, raises=f"{GAP}|{SHOWN}"),
    "slice, part used": near(
        write("new = ck[:, :, start : start + n]\nnew.copy_(k)\nextra = extra + new.sum()"), *FIXED
    ),
    "slice, written twice": near(write("new = ck[:, :, start : start + n]\nnew.copy_(k)\nnew.mul_(2)"), *FIXED),
    "slice, scaled": near(write("ck[:, :, start : start + n].mul_(0.5).add_(k)"), *FIXED),
    "slice, of one token": near(write("ck[:, :, start : start + n] = k[:, :, :1]"), *FIXED),
    "slice to the end": near(write("ck[:, :, start:].copy_(F.pad(k, (0, 0, 0, ck.shape[2] - start - n)))"), *FIXED),
    "slice from the end": near(write("ck[:, :, -n:] = k"), *FIXED, raises=GAP),
    "slice of every second": near(write("ck[:, :, start : start + 2 * n : 2] = k"), *FIXED),
    "slice of one head": near(write("ck[:, :1, start : start + n] = k[:, :1]"), *FIXED),
    "slice, values one later": near(
        "ck[:, :, start : start + n] = k\ncv[:, :, start + 1 : start + 1 + n] = v", *FIXED, raises=GAP
    ),
    "slice of keys, index of values": near("ck[:, :, start : start + n] = k\ncv[:, :, pos_v] = v", *FIXED),
    "slice, the copy returned": near(
        write("part_k = ck[:, :, start : start + n].copy_(k)"), *FIXED, also={"after": "extra = extra + part_k.sum()"}
    ),
    "narrow of channels": near(write("ck.narrow(3, 0, 4)[:, :, start : start + n].copy_(k[..., :4])"), *FIXED),
    "an alias": near(write("alias = ck.view(ck.shape)\nalias.index_copy_(2, pos, k)"), *FIXED),
    "tokens first": near(write("ck.transpose(1, 2).index_copy_(1, pos, k.transpose(1, 2))"), *FIXED),
    "index_put_": near(write("ck.transpose(0, 2).index_put_((pos,), k.transpose(0, 2))"), *FIXED),
    "index_put_, accumulated": near(
        write("ck.transpose(0, 2).index_put_((pos,), k.transpose(0, 2), accumulate=True)"), *FIXED
    ),
    "index_add_": near(write("ck.index_add_(2, pos, k)"), *FIXED),
    "iadd": near(write("ck[:, :, pos] += k"), *FIXED),
    "scatter_": near(write("ck.scatter_(2, pos.view(1, 1, -1, 1).expand_as(k), k)"), *FIXED),
    "where": near(write("ck.copy_(torch.where(hit(ck, pos), ck.index_copy(2, pos, k), ck))"), *FIXED),
    "a number": near(write("ck[:, :, pos] = 0.5"), *FIXED),
    "one head": near(write("ck[:, :1, pos] = k[:, :1]"), *FIXED),
    "one head for all": near(write("ck[:, :, pos] = k[:, :1]"), *FIXED),
    "one row": near(write("ck[:1, :, pos] = k[:1]"), *FIXED),
    "some channels": near(write("ck[:, :, pos, :4] = k[..., :4]"), *FIXED),
    "the last token": near(write("last = pos[-1:]\nck.index_copy_(2, last, k[:, :, -1:])"), *FIXED, raises=GAP),
    "reversed": near("pos = pos.flip(0)\nck.index_copy_(2, pos, k)\ncv.index_copy_(2, pos, v)", *FIXED, raises=GAP),
    "other channels": near(
        write("ck.index_copy_(3, pos, k.transpose(2, 3))"), *FIXED, needs={"sizes": "cube", "mask": "everything"}
    ),
    "other heads": near(
        write("ck.index_copy_(1, pos, k.transpose(1, 2))"), *FIXED, needs={"sizes": "cube", "mask": "everything"}
    ),
    "twice": near(write("ck.index_copy_(2, pos, k)\nck.index_copy_(2, pos, k)"), *FIXED),
    "cleared first": near(write("ck[:, :, pos] = 0.0\nck[:, :, pos] = k"), *FIXED),
    "values first": same("cv.index_copy_(2, pos, v)\nck.index_copy_(2, pos, k)", *FIXED),
    "keys only": near("ck.index_copy_(2, pos, k)", *FIXED),
    "values only": near("cv.index_copy_(2, pos, v)", *FIXED),
    "moved along": near(write("ck.copy_(torch.cat([ck[:, :, n:], k], 2))"), *FIXED, needs={"mask": "everything"}),
    "pushed": near(push(), "static", needs={"mask": "everything"}),
    "pushed, attention over the new tensor": near(
        push() + "\nck, cv = (new_k, new_v) if n == 1 else (ck, cv)", "static", needs={"mask": "everything"}
    ),
    "pushed, all tokens seen": all_seen(same),
    "pushed, all tokens seen of the keys": near(
        all_seen(near).code.replace("cv = all_v", "cv = F.pad(cv, (0, 0, n - 1, 0))"), "static", **AS_KEPT
    ),
    "pushed, all tokens seen but one": all_seen(near, "[:, :, 1:]"),
    "pushed, all tokens scaled": all_seen(near, " * 2"),
    "pushed, all tokens seen, first of them": all_seen(near, "[:, :, :n]"),
    "pushed, first tokens seen": near(
        push() + "\nkept = ck, cv\nck, cv = ck[:, :, :n], cv[:, :, :n]",
        "static",
        **AS_KEPT,
    ),
    "pushed, copied before the write": near(
        push("{c}.copy_({new})\n{new}[:, :, torch.tensor([-1])] = {k}"), "static", needs={"mask": "everything"}
    ),
    "pushed, written before the roll": near(
        push("{c}[:, :, torch.tensor([0])] = {k}\n{c}.copy_({c}.roll(-1, 2))"), "static", needs={"mask": "everything"}
    ),
    "pushed to the front": near(
        push("{new}[:, :, torch.tensor([0])] = {k}\n{c}.copy_({new})", "1"), "static", needs={"mask": "everything"}
    ),
    "pushed by two": near(push(roll="-2"), "static", needs={"mask": "everything"}),
    "pushed, first token kept": near(push(first=":-1"), "static", needs={"mask": "everything"}),
    "pushed, scaled": near(
        push("{new}[:, :, torch.tensor([-1])] = {k}\n{new}.mul_(0.5)\n{c}.copy_({new})"),
        "static",
        needs={"mask": "everything"},
    ),
    "pushed in decode steps": near(
        push().split("else:")[0] + "else:\n    ck.index_copy_(2, pos, k)\n    cv.index_copy_(2, pos, v)",
        *FIXED,
    ),
    "in the prefill only": near(
        "if n > 1:\n    ck.index_copy_(2, pos, k)\n    cv.index_copy_(2, pos, v)", *FIXED, raises=SHOWN
    ),
    "in decode steps only": near(
        "if n == 1:\n    ck.index_copy_(2, pos, k)\n    cv.index_copy_(2, pos, v)", *FIXED, raises=GAP
    ),
    "after attention": near("", *FIXED, also={"after": write("ck.index_copy_(2, pos, k)")}),
    "cat in decode steps": near(
        "if n == 1:\n    ck, cv = torch.cat([ck, k], 2), torch.cat([cv, v], 2)\n"
        "else:\n    ck.index_copy_(2, pos, k)\n    cv.index_copy_(2, pos, v)",
        "born",
        needs={"mask": "computed"},
    ),
    "without grad": near("with torch.no_grad():\n    ck.index_copy_(2, pos, k)\n    cv.index_copy_(2, pos, v)", *FIXED),
    # concatenation
    "cat, dim -2": same(write("ck = torch.cat((ck, k), dim=-2)"), "grown"),
    "concat": near(write("ck = torch.concat([ck, k], 2)"), "grown"),
    "cat of three": near(write("ck = torch.cat([ck, k, k], 2)"), "grown", needs={"mask": "none"}),
    "cat twice": near(write("ck = torch.cat([ck, k], 2)\nck = torch.cat([ck, k], 2)"), "grown", needs={"mask": "none"}),
    "prepended": near(write("ck = torch.cat([k, ck], 2)"), "grown"),
    "cat, transposed": near(write("ck = torch.cat([past(ck, k).mT, k.mT], 3).mT"), "grown"),
    "cat of doubles": near(write("ck = torch.cat([past(ck, k).double(), k.double()], 2).float()"), "grown"),
    "cat of copies": near(write("ck = torch.cat([ck.clone(), k], 2)"), "grown"),
    "cat of the last tokens": near(
        write("ck = torch.cat([past(ck, k)[:, :, -3:], k], 2)"), "grown", needs={"mask": "none"}
    ),
    "cat of the first token again": near(
        write("ck = torch.cat([ck, k if n > 1 else ck[:, :, :1]], 2)"), "grown", needs={"holder": "a literal"}
    ),
    "last token replaced in decode steps": near(
        "if n == 1:\n    pos = torch.arange(ck.shape[2] - 1, ck.shape[2])\n"
        "    ck.index_copy_(2, pos, k)\n    cv.index_copy_(2, pos, v)\n"
        "else:\n    ck, cv = torch.cat([ck, k], 2), torch.cat([cv, v], 2)",
        "grown",
        needs={"mask": "computed"},
    ),
    "cat of heads": near(
        write("ck = torch.cat([ck, k], 1)"), "grown", needs={"mask": "none", "schedule": "two tokens"}
    ),
    "pad and write": near(write("ck = F.pad(past(ck, k), (0, 0, 0, n))\nck[:, :, -n:] = k"), "grown"),
    "cat, one cache for both": near("ck = cv = torch.cat([ck, k], 2)", "grown"),
    "cat, not kept": near(
        "kept = ck, cv\n" + write("ck = torch.cat([ck, k], 2)"),
        "grown",
        also={"after": "ck, cv = kept"},
        needs={"mask": "none"},
    ),
    "cat, a copy kept": near(
        write("ck = torch.cat([ck, k], 2)"), "grown", also={"after": "ck, cv = ck.clone(), cv.clone()"}
    ),
    "cat, scaled and kept": near(write("ck = torch.cat([ck, k], 2)"), "grown", also={"after": "ck = ck * 2"}),
    "cat, last tokens kept": same(
        write("ck = torch.cat([ck, k], 2)"),
        "grown",
        also={"after": "ck, cv = ck[:, :, -4:], cv[:, :, -4:]"},
        needs={"mask": "none"},
    ),
    "cat, last tokens kept, of values fewer": near(
        write("ck = torch.cat([ck, k], 2)"),
        "grown",
        also={
            "after": "ck, cv = ck[:, :, -4:], cv[:, :, -3:]",
            "read": "keys, values = keys[:, :, -4:], values[:, :, -4:]",
        },
        needs={"mask": "none"},
    ),
    "cat, last tokens kept, and seen": near(
        write("ck = torch.cat([ck, k], 2)[:, :, -4:]"), "grown", needs={"mask": "none"}
    ),
    "cat, last tokens kept, as copies": near(
        write("ck = torch.cat([ck, k], 2)"),
        "grown",
        also={"after": "ck, cv = ck[:, :, -4:].clone(), cv[:, :, -4:].clone()"},
        needs={"mask": "none"},
    ),
    "cat, first tokens kept": near(
        write("ck = torch.cat([ck, k], 2)"),
        "grown",
        also={"after": "ck, cv = ck[:, :, :4], cv[:, :, :4]"},
        needs={"mask": "none"},
    ),
    "cat, last tokens kept in decode steps": near(
        write("ck = torch.cat([ck, k], 2)"),
        "grown",
        also={"after": "if n == 1:\n    ck, cv = ck[:, :, -4:], cv[:, :, -4:]"},
        needs={"mask": "none"},
    ),
    "cat, keys not kept": near(
        "kept = ck\n" + write("ck = torch.cat([ck, k], 2)"), "grown", also={"after": "ck = torch.cat([kept, k], 2)"}
    ),
    # either
    "tokens scaled": same(write("ck.index_copy_(2, pos, k * 2)"), *FIXED),
    "cat, tokens scaled": same(write("ck = torch.cat([ck, k * 2], 2)"), "grown"),
    "keys in both": same("ck.index_copy_(2, pos, k)\ncv.index_copy_(2, pos, k)", *FIXED),
    "cat, keys in both": same("ck, cv = torch.cat([ck, k], 2), torch.cat([cv, k], 2)", "grown"),
}

MIDDLE = {
    "nothing": same(),
    "new name": same("k = k * 2"),
    "sum of keys": same("extra = extra + k.sum()"),
    "another counter": same("self.ticks.add_(1)"),
    "keys scaled": near("k.mul_(2)"),
    "keys scaled by imul": near("k *= 2"),
    "keys squared by ipow": near("k **= 2"),
    "keys rounded by ifloordiv": near("k //= 0.25"),
    "keys remaindered by imod": near("k %= 1.0"),
    "keys of relu": near("F.relu(k, inplace=True)"),
    "keys of a custom op": near("torch.ops.near_misses.twice(k)"),
    "keys of out=": near("torch.mul(k, 2, out=k)"),
    "keys of foreach": near("torch._foreach_mul_([k, v], 2)"),
    "last key cleared": near("k[:, :, -1] = 0"),
    "first key scaled": near("k[:, :, 0].mul_(3)"),
    "values negated": near("v.neg_()"),
    "values of silu": near("F.silu(v, inplace=True)"),
    "values of a detached view": near("v.detach().mul_(2)"),
    "queries scaled": near("q.mul_(2)"),
    "positions moved": near("pos.add_(1)"),
    "mask changed": near("given.fill_(True)", raises=SHOWN),
    "cache scaled": near("ck.mul_(2)"),
    "cache scaled by imul": near("cv *= 2"),
    "cache of relu": near("F.relu(ck, inplace=True)"),
    "first token cleared": near("ck[:, :, 0] = 0", raises=WRITES),
    "cache summed": near("extra = extra + ck.sum()"),
    "new tokens read back": near("extra = extra + cv[:, :, -n:].sum()"),
    "another cache": near("self.other_ck.index_copy_(2, pos, k)", *FIXED, needs={"sizes": "usual"}),
    "second layer written first": near(
        write("self.other_ck.index_copy_(2, pos, k)"),
        *FIXED,
        also={"after": "keys, values = self.other_ck, self.other_cv\nout = out + " + SDPA.format("")},
        needs={"sizes": "usual"},
    ),
    "input scaled": near("x.mul_(2)", needs={"tokens": "views of the input"}),
    "graph break": near("torch._dynamo.graph_break()"),
}


def cut(expr: str, tokens: str, **more: Any) -> Choice:
    """A part of the cache's tokens, and of the mask's columns."""
    return near(expr, also={"cut": f"mask = mask[..., {tokens}] if mask is not None else None"}, **more)


READ = {  # of t, each cache tensor
    "itself": same("t"),
    "copy": same("t.clone()"),
    "contiguous": same("t.contiguous()"),
    "detached": same("t.detach()"),
    "all of it": same("t[:]"),
    "all tokens": same("t[:, :, :]"),
    "ellipsis": same("t[...]"),
    "its own dtype": same("t.to(t.dtype)"),
    "type_as": same("t.type_as(q)"),
    "transposed twice": same("t.transpose(2, 3).transpose(-1, -2)"),
    "mT twice": same("t.mT.mT"),
    "in the prefill the first tokens": Choice(
        "(t[:, :, :n] if n > 1 else t)",
        kinds=FIXED,
        also={"cut": "mask = mask[..., :n] if n > 1 and mask is not None else mask"},
        raises=FIRST,
    ),
    "first tokens": Choice(
        "t[:, :, :n]",
        True,
        FIXED,
        FIRST,
        {"cut": "mask = mask[..., :n] if mask is not None else None"},
    ),
    "tokens up to the last": Choice(
        "t[:, :, : start + n]", True, FIXED, also={"cut": "mask = mask[..., : start + n] if mask is not None else None"}
    ),
    "last tokens": cut("t[:, :, -n:]", "-n:"),
    "every second": cut("t[:, :, ::2]", "::2"),
    "without the first": cut("t[:, :, 1:]", "1:"),
    "without the last": cut("t[:, :, :-1]", ":-1"),
    "at the positions": Choice(
        "t[:, :, pos]", True, FIXED, also={"cut": "mask = mask[..., pos] if mask is not None else None"}
    ),
    "view": near("t.view(t.shape)"),
    "reshape": near("t.reshape(t.shape)"),
    "narrow": near("t.narrow(2, 0, t.shape[2])"),
    "permute": near("t.permute(0, 1, 2, 3)"),
    "expand": near("t.expand(-1, -1, -1, -1)"),
    "index_select": near("t.index_select(2, torch.arange(t.shape[2]))"),
    "times one": near("t * 1.0"),
    "shifted": near("t + 0.1"),
    "scaled": near("t * 0.5"),
    "rounded": near("t.bfloat16().to(t.dtype)"),
    "through doubles": near("t.double().to(t.dtype)"),
    "rope": near("rotate(t, torch.arange(t.shape[2]))"),
    "normalised": near("F.normalize(t, dim=-1)"),
    "dropout of nothing": near("F.dropout(t, 0.0)"),
    "tokens flipped": near("t.flip(2)"),
    "tokens rolled": near("t.roll(1, 2)"),
    "heads flipped": near("t.flip(1)"),
    "rows flipped": near("t.flip(0)"),
    "channels flipped": near("t.flip(3)"),
    "first row for all": near("t[:1].expand_as(t)"),
    "first head for all": near("t[:, :1].expand_as(t)"),
    "transposed": near("t.transpose(2, 3)", *FIXED, needs={"sizes": "square"}),
    "heads for tokens": near("t.transpose(1, 2)", *FIXED, needs={"sizes": "cube"}),
    "before the write": near(
        "{'ck': old_k, 'cv': old_v}['ck' if t is ck else 'cv']",
        *FIXED,
        also={"before": "old_k, old_v = ck.clone(), cv.clone()"},
    ),
    "a view from before the write": near(
        "{'ck': old_k, 'cv': old_v}['ck' if t is ck else 'cv']", *FIXED, also={"before": "old_k, old_v = ck[:], cv[:]"}
    ),
    "keys for both": near("ck"),
    "exchanged": same("(cv if t is ck else ck)", needs={"read of": "both"}),
}

READ_OF = {"both": same(), "keys": same(), "values": same()}

REPEAT = {
    "as they are": same(),
    "repeat_interleave": same("t.repeat_interleave(g, 1)"),
    "repeat_interleave, dim -3": same("torch.repeat_interleave(t, g, dim=-3)"),
    "repeat_kv": same("t[:, :, None].expand(b, t.shape[1], g, *t.shape[2:]).reshape(b, t.shape[1] * g, *t.shape[2:])"),
    "repeat_kv, flattened": same("t.unsqueeze(2).expand(-1, -1, g, -1, -1).flatten(1, 2)"),
    "repeat_interleave, then copied": same("t.repeat_interleave(g, 1).contiguous()"),
    "repeat": near("t.repeat(1, g, 1, 1)"),
    "tiled": near("t[:, None].expand(-1, g, -1, -1, -1).flatten(1, 2)"),
    "stacked": near("torch.stack([t] * g, 2).flatten(1, 2)"),
    "by index": near("t[:, torch.arange(q.shape[1]) // g]"),
    "by index, tiled": near("t[:, torch.arange(q.shape[1]) % t.shape[1]]"),
    "cat of heads": near("torch.cat([t] * g, 1)"),
    "keys in one order, values in another": near("(t.repeat_interleave(g, 1) if t is keys else t.repeat(1, g, 1, 1))"),
    "half of it": near("t.repeat_interleave(2, 1)", needs={"sizes": "four groups"}),
    "in two steps": near("t.repeat_interleave(2, 1).repeat_interleave(2, 1)", needs={"sizes": "four groups"}),
    "two ways": near(
        "t.repeat_interleave(2, 1)[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)", needs={"sizes": "four groups"}
    ),
}

MASK = {
    "given": same("mask = given"),
    "computed": same("mask = (torch.arange(keys.shape[2]) <= pos[:, None])[None, None]"),
    "additive": same("mask = additive(given)"),
    "additive, finite": same("mask = additive(given, torch.finfo(x.dtype).min)"),
    "additive, soft": near("mask = additive(given, -50.0)", raises=SHOWN),
    "two dimensions": same("mask = given[0, 0]"),
    "three dimensions": same("mask = given[0]"),
    "of each head": same("mask = given.expand(1, q.shape[1], -1, -1)"),
    "of each row": same("mask = given.expand(b, -1, -1, -1)"),
    "alibi": same("mask = additive(given) + distance(pos, q.shape[1], given.shape[-1])"),
    "learned": same("mask = additive(given) + self.bias[: q.shape[1]]"),
    "of the queries": same("mask = additive(given) + q.mean(-1, keepdim=True)"),
    "the last three": same("mask = torch.logical_and(given, torch.arange(given.shape[-1]) > pos[:, None] - 3)"),
    "transposed in memory": same("mask = given.mT.contiguous().mT"),
    "one row for all queries": same("mask = given[..., -1:, :]"),
    "masks combined by &": same("mask = given & (torch.arange(given.shape[-1]) != 1)"),
    "left padding": same("mask = torch.logical_and(given, torch.arange(given.shape[-1]) >= 2)"),
    "left padding, additive": same("mask = additive(torch.logical_and(given, torch.arange(given.shape[-1]) >= 2))"),
    "left padding, finite": same(
        "mask = additive(torch.logical_and(given, torch.arange(given.shape[-1]) >= 2), torch.finfo(x.dtype).min)"
    ),
    "nothing": same("mask = torch.zeros_like(given)"),
    "everything": same("mask = torch.ones_like(given)", raises=SHOWN),
    "the next token too": same("mask = torch.logical_or(given, given.roll(1, -1))", raises=SHOWN),
    "one column": near("mask = given[..., :1]"),
    "none": near("mask = None"),
    "causal": near("mask, causal = None, True"),
    "of the keys": near("mask = additive(given) + keys.mean((0, 1, 3))"),
}


SINKS = "self.sinks.reshape(1, -1, 1, 1).expand(b, -1, n, -1)"
JOINED = f"s = torch.cat([s, {SINKS}], -1)"
SINK = f"torch.cat([s, {SINKS}], -1).softmax(-1)[..., :-1]"


def by_hand(*lines: str) -> str:
    """softmax(q k^T * 0.3 + bias) v, with some lines changed: those that assign the same name."""
    plain = [
        "keys, values, bias = spread(keys, q), spread(values, q), additive(mask if mask is not None else given)",
        "s = q @ keys.transpose(2, 3)",
        "s = s * 0.3",
        "s = s + bias",
        "p = s.softmax(-1)",
        "out = p @ values",
    ]
    slots = {"heads": 0, "qk": 1, "scale": 2, "bias": 3, "p": 4, "out": 5}
    for line in lines:
        slot, _, code = line.partition(": ")
        plain[slots[slot]] = code
    return "\n".join(line for line in plain if line)


ATTENTION = {
    "sdpa": same("out = " + SDPA.format("")),
    "sdpa, scale": same("out = " + SDPA.format(", scale=0.3")),
    "sdpa, no scale": same("out = " + SDPA.format(", scale=1.0")),
    "sdpa, scale below 0": same("out = " + SDPA.format(", scale=-0.5")),
    "sdpa, scale 0": same("out = " + SDPA.format(", scale=0.0")),
    "sdpa, no dropout": same("out = " + SDPA.format(", dropout_p=0.0")),
    "sdpa, dropout": near("out = " + SDPA.format(", dropout_p=0.5")),
    "sdpa by position": same(
        "out = F.scaled_dot_product_attention(q, spread(keys, q), spread(values, q), mask, 0.0, causal)"
    ),
    "sdpa by keyword": same(
        "out = F.scaled_dot_product_attention(value=values, key=keys, query=q, attn_mask=mask, enable_gqa=gqa(q, keys))"
    ),
    "sdpa, output copied": same("out = " + SDPA.format("") + ".clone()"),
    "sdpa, output scaled": same("out = " + SDPA.format("") + "\nout.mul_(2)"),
    "sdpa, output transposed": same("out = " + SDPA.format("") + ".mT"),
    "sdpa, twice": same("out = " + SDPA.format("") + "\nq = q * 2\nout = out + " + SDPA.format("")),
    "sdpa, other scale for the second": same(
        "out = " + SDPA.format("") + "\nout = out + " + SDPA.format(", scale=1.0")
    ),
    "sdpa, second with caches exchanged": same(
        "out = " + SDPA.format("") + "\nkeys, values = values, keys\nout = out + " + SDPA.format("")
    ),
    "sdpa, second on queries from the first": same(
        "out = " + SDPA.format("") + "\nq = out + q\nout = " + SDPA.format("")
    ),
    "sdpa, second over what was left out": near(
        "out = " + SDPA.format("") + "\nkeys, values = keys[:, :, 1:], values[:, :, 1:]\n"
        "mask = mask[..., 1:] if mask is not None else None\nout = out + " + SDPA.format("")
    ),
    "sdpa, not used": near("out = " + SDPA.format("") + "\nout = q"),
    "sdpa, in the prefill only": near("out = q if n == 1 else " + SDPA.format("")),
    "sdpa, in decode steps only": near("out = q if n > 1 else " + SDPA.format(""), raises=GAP),
    "sdpa over new tokens": near(
        "out = F.scaled_dot_product_attention(q, k, v, is_causal=n > 1, enable_gqa=gqa(q, k))", raises=GAP
    ),
    "sdpa, keys as values": near("values = keys\nout = " + SDPA.format("")),
    "sdpa, values a part of the keys": near("values = keys[..., :4]\nout = " + SDPA.format("")),
    "sdpa, queries from the cache": near(
        "q = spread(keys, q)[:, :, :n]\nout = " + SDPA.format("").replace("keys, values", "keys, values")
    ),
    "sdpa, one tensor for queries and keys": near(
        "out = F.scaled_dot_product_attention(keys, keys, values, attn_mask=mask, is_causal=causal)",
        needs={"sizes": "full"},
    ),
    "sdpa, queries folded": near(
        "mask = None if mask is None else mask.expand(1, 1, -1, -1).repeat(1, 1, g, 1)\n"
        "out = F.scaled_dot_product_attention(q.reshape(b, -1, g * n, q.shape[3]), keys, values, attn_mask=mask)\n"
        "out = out.reshape(b, q.shape[1], n, -1)"
    ),
    "sdpa, one head for all without saying": same(
        "out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)", needs={"sizes": "one key head"}
    ),
    "sdpa of three dimensions": near(
        "keys, values = spread(keys, q), spread(values, q)\n"
        "out = torch.stack([F.scaled_dot_product_attention(q[i], keys[i], values[i], mask[0]) for i in range(b)])"
    ),
    "by hand": same(by_hand()),
    "by hand, matmul": same(
        by_hand("qk: s = torch.matmul(q, keys.permute(0, 1, 3, 2))", "out: out = torch.matmul(p, values)")
    ),
    "by hand, methods": same(
        by_hand(
            "qk: s = q.matmul(keys.mT)", "out: out = p.matmul(values)", "scale: s = s.mul(0.3)", "bias: s = s.add(bias)"
        )
    ),
    "by hand, one mask for all queries": same(by_hand("bias: s = s + bias[0, 0, -1]")),
    "by hand, div": same(by_hand("scale: s = s / 3.0")),
    "by hand, torch.div": same(by_hand("scale: s = torch.div(s, 3.0)", "bias: s = torch.add(s, bias)")),
    "by hand, scale below 0": same(by_hand("scale: s = s * -0.3")),
    "by hand, no scale": same(by_hand("scale: ")),
    "by hand, F.softmax": same(by_hand("p: p = F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype)")),
    "by hand, softmax in doubles": same(by_hand("p: p = torch.softmax(s, 3, dtype=torch.float64).type_as(q)")),
    "by hand, dropout in eval": same(by_hand("p: p = F.dropout(s.softmax(3), 0.5, self.training)")),
    "by hand, capped": same(by_hand("scale: s = s * 0.3 / 2.0\ns = torch.tanh(s)\ns = s * 2.0")),
    "by hand, capped by methods": same(by_hand("scale: s = s.div(4).tanh().mul(4)")),
    "by hand, largest taken off by max": same(by_hand("p: p = (s - s.max(-1, keepdim=True).values).softmax(-1)")),
    "by hand, sinks": same(by_hand("p: p = " + SINK)),
    "by hand, sinks, largest taken off": same(
        by_hand("p: " + JOINED + "\np = (s - s.max(dim=-1, keepdim=True)[0]).softmax(-1)[..., :-1]")
    ),
    "by hand, sinks, capped, dropout": same(
        by_hand("scale: s = s.div(4).tanh().mul(4)", "p: p = F.dropout(" + SINK + ", 0.5, self.training)")
    ),
    "by hand, no mask": near(by_hand("bias: ")),
    "by hand, dropout": near(by_hand("p: p = F.dropout(s.softmax(3), 0.5, True)")),
    "by hand, integer scale on the left": near(by_hand("scale: s = 2 * s")),
    "by hand, number over scores": near(by_hand("scale: s = 2 / (s + 10)")),
    "by hand, rounded down": near(by_hand("scale: s = torch.div(s, 0.5, rounding_mode='floor')")),
    "by hand, scale of a tensor": near(by_hand("scale: s = s * self.factor")),
    "by hand, scale of each head": near(by_hand("scale: s = s * self.bias[: q.shape[1]].exp()")),
    "by hand, scaled twice": near(by_hand("scale: s = s * 0.3 * 2")),
    "by hand, scale after the mask": near(by_hand("scale: s = s + bias", "bias: s = s * 0.3")),
    "by hand, squared": near(by_hand("scale: s = s * s")),
    "by hand, bias on the left": near(by_hand("bias: s = bias + s")),
    "by hand, two biases": near(by_hand("bias: s = s + bias + self.bias[: q.shape[1]]")),
    "by hand, bias doubled": near(by_hand("bias: s = torch.add(s, bias, alpha=2)")),
    "by hand, bias taken off": near(by_hand("bias: s = s - bias.clamp(-20, 0)")),
    "by hand, number added": near(by_hand("bias: s = s + bias.clamp_min(-20) + 0.5")),
    "by hand, only a number added": near(by_hand("bias: s = s + 0.5")),
    "by hand, scores added": near(by_hand("bias: s = s + bias + q @ spread(k, q).mT.sum(-1, keepdim=True)")),
    "by hand, masked_fill": near(by_hand("bias: s = s.masked_fill(~given, -torch.inf)")),
    "by hand, masked_fill_": near(by_hand("bias: s.masked_fill_(~given, -torch.inf)")),
    "by hand, where": near(by_hand("bias: s = torch.where(given, s, -1e9)")),
    "by hand, in place": near(by_hand("scale: s *= 0.3", "bias: s += bias")),
    "by hand, softcap": near(by_hand("scale: s = torch.tanh(s * 0.3) * 5")),
    "by hand, capped below 0": near(by_hand("scale: s = torch.tanh(s / -2.0) * -2.0")),
    "by hand, capped to one side": near(by_hand("scale: s = torch.tanh(s / 2.0) * -2.0")),
    "by hand, capped by sigmoid": near(by_hand("scale: s = torch.sigmoid(s / 2.0) * 2.0")),
    "by hand, capped twice": near(by_hand("scale: s = (s / 2).tanh() * 2\ns = (s / 3).tanh() * 3")),
    "by hand, capped after the mask": near(by_hand("bias: s = ((s + bias.clamp_min(-20)) / 2).tanh() * 2")),
    "by hand, tanh used": near(by_hand("scale: t = (s / 2).tanh()\nextra = extra + t.sum()\ns = t * 2")),
    "by hand, tanh in place": near(by_hand("scale: s = (s / 2).tanh_() * 2")),
    "by hand, smallest taken off": near(by_hand("p: p = (s - s.min(-2, keepdim=True).values).softmax(-1)")),
    "by hand, largest of another dimension taken off": near(
        by_hand("bias: s = s + bias.clamp_min(-20)", "p: p = (s - s.max(-2, keepdim=True).values).softmax(-1)")
    ),
    "by hand, index of the largest taken off": near(by_hand("p: p = (s - s.max(-1, keepdim=True)[1]).softmax(-1)")),
    "by hand, largest of the products taken off": near(
        by_hand("bias: s = s - s.max(-1, keepdim=True).values + bias"),
    ),
    "by hand, largest added": near(by_hand("p: p = (s + s.max(-1, keepdim=True).values).softmax(-1)")),
    "by hand, sinks first": near(by_hand(f"p: p = torch.cat([{SINKS}, s], -1).softmax(-1)[..., 1:]")),
    "by hand, sinks, cut at the other end": near(by_hand("p: p = " + SINK.replace(":-1]", "1:]"))),
    "by hand, sinks, two cut": near(
        by_hand("p: p = F.pad(" + SINK.replace(":-1]", ":-2]") + ", (0, 1))"),
    ),
    "by hand, sinks, two of them": near(by_hand(f"p: p = torch.cat([s, {SINKS[:-3]}2)], -1).softmax(-1)[..., :-2]")),
    "by hand, sinks, kept": near(
        by_hand(
            "p: p = " + SINK.removesuffix("[..., :-1]"),
            "out: out = p @ torch.cat([values, values[:, :, :1]], 2)",
        )
    ),
    "by hand, sinks, of queries": near(by_hand("p: p = torch.cat([s, s[..., :1]], -1).softmax(-1)[..., :-1]")),
    "by hand, sinks, from the keys": near(
        by_hand("p: p = torch.cat([s, keys.mean((2, 3), keepdim=True).expand(b, -1, n, 1)], -1).softmax(-1)[..., :-1]")
    ),
    "by hand, sinks, turned round": near(by_hand("p: p = " + SINK.replace("self.sinks", "self.sinks.flip(0)"))),
    "by hand, sinks, written to": near(
        by_hand("p: sinks = self.sinks * 1\np = " + SINK.replace("self.sinks", "sinks") + "\nsinks.add_(3)")
    ),
    "by hand, sinks, before the mask": near(
        by_hand("bias: " + JOINED, "p: p = (s + F.pad(bias, (0, 1))).softmax(-1)[..., :-1]")
    ),
    "by hand, scores used": near(by_hand("bias: extra = extra + s.sum()\ns = s + bias")),
    "by hand, products used": near(by_hand("scale: extra = extra + s.sum()\ns = s * 0.3")),
    "by hand, weights used": near(by_hand("out: extra = extra + p.amax()\nout = p @ values")),
    "by hand, largest taken off": near(by_hand("p: p = (s - s.amax(-1, keepdim=True)).softmax(-1)")),
    "by hand, softmax over queries": near(by_hand("bias: s = s + bias.clamp_min(-20)", "p: p = s.softmax(-2)")),
    "by hand, softmax over heads": near(by_hand("bias: s = s + bias.clamp_min(-20)", "p: p = s.softmax(1)")),
    "by hand, softmax twice": near(by_hand("p: p = s.softmax(-1).softmax(-1)")),
    "by hand, log_softmax": near(by_hand("p: p = s.log_softmax(-1).clamp_min(-9)")),
    "by hand, no softmax": near(by_hand("p: p = s.clamp_min(-9)")),
    "by hand, sigmoid": near(by_hand("p: p = s.sigmoid()")),
    "by hand, softmax by hand": near(by_hand("p: p = s.exp() / s.exp().sum(-1, keepdim=True)")),
    "by hand, softmax1": near(by_hand("p: p = torch.cat([s, torch.zeros_like(s[..., :1])], -1).softmax(-1)[..., :-1]")),
    "by hand, weights scaled": near(by_hand("p: p = s.softmax(-1) * 2")),
    "by hand, weights rounded": near(by_hand("p: p = s.softmax(-1).to(torch.bfloat16).to(q.dtype)")),
    "by hand, weights rounded by dtype": near(by_hand("p: p = s.softmax(-1, dtype=torch.bfloat16).to(q.dtype)")),
    "by hand, weights cut": near(by_hand("p: p = F.threshold(s.softmax(-1), 0.2, 0.0)")),
    "by hand, scores rounded": near(by_hand("p: p = s.bfloat16().softmax(-1).to(q.dtype)")),
    "by hand, weights transposed": near(by_hand("out: out = (values.mT @ p.mT).mT")),
    "by hand, products transposed": near(by_hand("qk: s = (keys @ q.mT).mT")),
    "by hand, einsum": near(by_hand("qk: s = torch.einsum('bhnd,bhld->bhnl', q, keys)")),
    "by hand, values by einsum": near(by_hand("out: out = torch.einsum('bhnl,bhld->bhnd', p, values)")),
    "by hand, sums": near(by_hand("out: out = (p[..., None] * values[:, :, None]).sum(3)")),
    "by hand, bmm": near(by_hand("qk: s = torch.bmm(q.flatten(0, 1), keys.flatten(0, 1).mT).unflatten(0, (b, -1))")),
    "by hand, linear": near(by_hand("p: ", "out: out = q @ (keys.mT @ values)")),
    "by hand, exchanged": near(by_hand("qk: s = q @ values.mT", "out: out = p @ keys")),
    "by hand, keys as values": near(by_hand("out: out = p @ keys")),
    "by hand, keys not transposed": near(by_hand("qk: s = q @ keys"), *FIXED, needs={"sizes": "square"}),
    "by hand, one head for all": near(by_hand("heads: bias = additive(given)"), needs={"sizes": "one key head"}),
    "by hand, groups apart": near(
        by_hand(
            "heads: bias = additive(given)[:, :, None]",
            "qk: s = q.unflatten(1, (-1, g)) @ keys[:, :, None].mT",
            "out: out = (p @ values[:, :, None]).flatten(1, 2)",
        )
    ),
}

AFTER = {
    "nothing": same(),
    "keys cleared": same("k.zero_()"),
    "values scaled": same("v.mul_(2)"),
    "positions moved": same("pos.add_(1)", raises=GAP),
    "output scaled": same("out.mul_(2)"),
    "sizes": same("extra = extra + ck.shape[2] + cv.numel()"),
    "second attention": same("q = q.flip(1)\nout = out + " + SDPA.format("")),
    "keys cleared, second attention": near("k.zero_()\nout = out + " + SDPA.format("")),
    "values of relu, second attention": near("F.relu(v, inplace=True)\nout = out + " + SDPA.format("")),
    "second layer": same(
        write("self.other_ck.index_copy_(2, pos, k)")
        + "\nkeys, values = self.other_ck, self.other_cv\nout = out + "
        + SDPA.format(""),
        *FIXED,
        needs={"sizes": "usual"},
    ),
    "second attention, other values": near(
        "self.other_cv.index_copy_(2, pos, v * 2)\nkeys, values = ck, self.other_cv\nout = out + " + SDPA.format(""),
        *FIXED,
        needs={"sizes": "usual"},
    ),
    "second layer in the same cache": near(
        write("ck.index_copy_(2, pos, k + 1)") + "\nout = out + " + SDPA.format(""), *FIXED
    ),
    "cache scaled, second attention": near("ck.mul_(2)\nout = out + " + SDPA.format("")),
    "attention over what is there": near("keys, values = ck, cv\nout = out + " + SDPA.format("")),
    "sum": near("extra = extra + ck.sum()"),
    "sum of values": near("extra = extra + cv.sum()"),
    "sum of the operand": near("extra = extra + keys.sum()", needs={"read": "all tokens"}),
    "sum of the last tokens": near("extra = extra + cv[:, :, -2:].sum()"),
    "sum in the prefill": near("if n > 1:\n    extra = extra + ck.sum()"),
    "sum in decode steps": near("if n == 1:\n    extra = extra + ck.sum() + cv.sum()"),
    "scaled": near("ck.mul_(0.5)"),
    "scaled in decode steps": near("if n == 1:\n    ck.mul_(0.5)", raises=WRITES),
    "emptied": near("ck.zero_()\ncv.zero_()", raises=GAP),
    "emptied in decode steps": near("if n == 1:\n    ck.zero_()\n    cv.zero_()", raises=GAP),
    "first token cleared": near("ck[:, :, 0] = 0"),
    "first token cleared in decode steps": near("if n == 1:\n    ck[:, :, 0] = 0", raises=WRITES),
    "written again": near("ck.index_copy_(2, pos, k)", *FIXED),
    "new tokens replaced": near("ck.index_copy_(2, pos, k * 2)", *FIXED),
    "output cached": near("cv.index_copy_(2, pos, out[:, : cv.shape[1]])", *FIXED),
    "copied": near("self.other_ck.copy_(ck)", *FIXED, needs={"sizes": "usual"}),
    "graph break": same("torch._dynamo.graph_break()"),
}

RESULT = {  # what is returned besides, and before the caches
    "nothing": same(),
    "attention's own output": same("out"),
    "new keys": same("k"),
    "caches": same("ck, cv"),
    "keys twice": same("ck, ck"),
    "scaled": near("ck * 2"),
    "a slice": near("ck[:, :, :3]"),
    "a view": near("cv.transpose(1, 2)"),
    "all of it": near("ck[:]"),
    "detached": near("ck.detach()"),
    "the operands": near("keys, values"),
    "a copy": near("cv.clone()"),
}

# ---------------------------------------------------------------- how it is driven


@dataclass(frozen=True)
class Sizes:
    """b rows, h key heads, g query heads for each, channels of keys and values, tokens of a buffer and of a prompt."""

    b: int = 2
    h: int = 2
    g: int = 2
    dk: int = 8
    dv: int = 8
    length: int = 24
    prompt: int = 5
    dtype: torch.dtype = torch.float32


SIZES = {
    "usual": Sizes(),
    "one group": Sizes(g=1),
    "one key head": Sizes(h=1, g=4),
    "four groups": Sizes(g=4),
    "narrow values": Sizes(dv=4),
    "one row": Sizes(b=1),
    "one token": Sizes(prompt=1),
    "square": Sizes(dk=12, dv=12, length=12, g=1),
    "cube": Sizes(b=4, h=8, g=1, length=8, prompt=4),
    "all alike": Sizes(b=4, h=4, g=1, dk=4, dv=4, length=8, prompt=4),
    "full": Sizes(g=1, length=8, prompt=8),
    "heads of 6": Sizes(dk=6, dv=6),
    "doubles": Sizes(dtype=torch.float64),
    "bfloat16": Sizes(dtype=torch.bfloat16),
}

SCHEDULE: dict[str, tuple[Choice, Any]] = {
    "a prompt and two tokens": (same(), lambda p, w: [range(p), [p], [p + 1]]),
    "chunks": (same(), lambda p, w: [range(p), range(p, p + 3), [p + 3]]),
    "two tokens": (same(), lambda p, w: [[0], [1]]),
    "token by token": (same(), lambda p, w: [[0], [1], [2]]),
    "a second prompt": (same(), lambda p, w: [range(p), [p], range(p - 1), [p - 1]]),
    "prompts of three lengths": (same(), lambda p, w: [range(p), [p], range(p + 1), [p + 1], range(p - 1), [p - 1]]),
    "the last token again": (same("", *FIXED), lambda p, w: [range(p), [p], [p], [p + 1]]),
    "two tokens back": (same("", *FIXED), lambda p, w: [range(p), [p], [p - 1], [p]]),
    "a gap": (same("", *FIXED, raises=f"{GAP}|{SHOWN}"), lambda p, w: [range(p), [p + 2], [p + 3]]),
    "a late start": (same("", *FIXED, raises=f"{GAP}|{SHOWN}"), lambda p, w: [range(3, p + 3), [p + 3]]),
    "a late start with a token": (same("", *FIXED, raises=f"{GAP}|{SHOWN}"), lambda p, w: [[3], [4]]),
    "every second": (same("", *FIXED, raises=f"{GAP}|{SHOWN}"), lambda p, w: [range(0, 2 * p, 2), [2 * p]]),
    "backwards": (same("", *FIXED, raises=f"{GAP}|{SHOWN}"), lambda p, w: [range(p)[::-1], [p]]),
    "a position twice": (same("", *FIXED, raises=f"{GAP}|{SHOWN}"), lambda p, w: [range(p), [p, p]]),
    "from the end": (
        same("", *FIXED, raises=f"{GAP}|{SHOWN}", needs={"write": "setitem"}),
        lambda p, w: [range(p), [p], [-1]],
    ),
    "round and round": (
        same("", *FIXED, raises=f"{GAP}|{SHOWN}|{ROUND}", needs={"mask": "everything"}),
        lambda p, w: [range(w), [0], [1]],
    ),
}

HOLDER: dict[str, Choice] = {
    "arguments": same("", *FIXED),
    "a literal": same("", "grown"),
    "buffers": same("", "static"),
    "filled without": same("", *KINDS),  # the first step is the module's own, not the compiled one's
    "full of rubbish": same("", "static"),
    "transposed in memory": near("", "static"),
    "halves of one": near("", "static"),
    "halves, taken at each step": near("", "static"),
    "seen through a view": near("", "static"),
    "one for both": near("", "static"),
    "parameters": near("", "static"),
    # between the steps, by the caller
    "copied": same("", "born", "grown"),
    "keys made plain": near("", "born", "grown"),
    "values made plain": near("", "born", "grown"),
    "rows exchanged": near("", "born", "grown"),
    "no tokens": same("", "grown"),
    "three tokens": same("", "grown"),
}

MODE: dict[str, Choice] = {
    "no_grad": same(),
    "inference_mode": same(),
    "frozen": same(),
    "gradients": near(),
    "dynamic": near(),
    "autocast": near(needs={"tokens": "in full precision"}),
}

STAGES: dict[str, dict[str, Choice]] = {
    "birth": {n: Choice(c.code, c.near, ("born",), c.raises, c.also, c.needs) for n, c in BIRTH.items()},
    "tokens": TOKENS,
    "positions": POSITIONS,
    "before": BEFORE,
    "write": WRITE,
    "middle": MIDDLE,
    "read": READ,
    "read of": READ_OF,
    "repeat": REPEAT,
    "mask": MASK,
    "attention": ATTENTION,
    "after": AFTER,
    "result": RESULT,
    "sizes": {n: Choice(near=n == "heads of 6", kinds=FIXED if n == "full" else KINDS) for n in SIZES},
    "schedule": {n: c for n, (c, _) in SCHEDULE.items()},
    "holder": HOLDER,
    "mode": MODE,
}


@dataclass(frozen=True)
class Variant:
    """A kind of cache and the choices that are not plain."""

    kind: str
    chosen: tuple[tuple[str, str], ...] = ()

    def name(self, stage: str) -> str:
        plain = next(n for n, c in STAGES[stage].items() if self.kind in c.kinds) if stage != "birth" else "zeros"
        return dict(self.chosen).get(stage, plain)

    def choices(self) -> list[Choice]:
        return [STAGES[s][self.name(s)] for s in STAGES]

    @property
    def raises(self) -> str:
        return "|".join(c.raises for c in self.choices() if c.raises)

    @property
    def near(self) -> bool:
        return any(c.near for c in self.choices())

    def source(self) -> str:
        """The forward of the module."""
        lines = {stage: [STAGES[stage][self.name(stage)].code] for stage in STAGES}
        slots = collections.defaultdict(list, lines)
        slots["positions"].insert(0, "pos_v = None")
        slots["positions"].append("pos_v = pos if pos_v is None else pos_v")
        slots["birth"] = []
        if self.name("holder") == "buffers":
            slots["birth"] = ["ck, cv = self.ck, self.cv"]
        elif self.kind == "born":
            slots["birth"] = ["if ck is None:\n    " + lines["birth"][0] + "\n    ck, cv = c[0], c[1]"]
        elif self.kind == "grown":
            slots["birth"] = ["if ck is None:\n    ck, cv = torch.tensor([]), torch.tensor([])"]
        of = self.name("read of")
        reads = [lines["read"][0] if of in ("both", which) else "t" for which in ("keys", "values")]
        keys, values = (re.sub(r"\bt\b", c, e) for c, e in zip(("ck", "cv"), reads, strict=True))
        slots["read"] = [f"keys, values = {keys}, {values}"]
        repeat = lines["repeat"][0]
        slots["repeat"] = ["g = q.shape[1] // keys.shape[1]"]
        if repeat:
            keys, values = (re.sub(r"\bt\b", c, repeat) for c in ("keys", "values"))
            slots["repeat"].append(f"keys, values = {keys}, {values}")
        for stage in STAGES:
            for slot, code in STAGES[stage][self.name(stage)].also.items():
                slots[slot].append(code)
        out = "out" if self.name("result") == "attention's own output" else "out + 0"
        more = [] if out == "out" else [lines["result"][0]] * bool(lines["result"][0])
        slots["result"] = ["return " + ", ".join([out, "extra", *more, *(["ck", "cv"] * (self.kind != "static"))])]
        filled = []
        for line in TEMPLATE.splitlines():
            slot = re.fullmatch(r" *\{(\w+)\}", line)
            code = "\n".join(c for c in slots[slot[1]] if c).splitlines() if slot else [line.strip()]
            indent = "" if line.startswith("def") else "    "
            filled += [indent + c for c in code]
        return "\n".join(filled) + "\n"

    def __str__(self) -> str:
        return f"{self.kind}, " + ", ".join(f"{s}: {n}" for s, n in self.chosen)


def variant(kind: str, chosen: dict[str, str]) -> Variant | None:
    """The variant with these choices and all they need; None if they do not go together."""
    todo, picked = list(chosen.items()), {}
    while todo:
        stage, name = todo.pop()
        if kind not in STAGES[stage][name].kinds or picked.get(stage, name) != name:
            return None
        if stage not in picked:
            picked[stage] = name
            todo += STAGES[stage][name].needs.items()
    return Variant(kind, tuple((s, picked[s]) for s in STAGES if s in picked))


# ---------------------------------------------------------------- what the forwards call


def rotate(t: Tensor, pos: Tensor) -> Tensor:
    """Rotary embedding of t [b, h, n, d] at positions [n]."""
    half = t.shape[-1] // 2
    angle = pos[:, None] / 10.0 ** (torch.arange(half) / half)
    a, b = t[..., :half], t[..., half : 2 * half]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def gqa(q: Tensor, keys: Tensor) -> bool:
    return q.shape[1] != keys.shape[1]


def spread(t: Tensor, q: Tensor) -> Tensor:
    """As many heads as q has."""
    return t if t.shape[1] == q.shape[1] else t.repeat_interleave(q.shape[1] // t.shape[1], 1)


def additive(mask: Tensor, hidden: float = -torch.inf) -> Tensor:
    return mask if mask.dtype != torch.bool else torch.zeros(mask.shape).masked_fill(~mask, hidden)


def distance(pos: Tensor, heads: int, width: int) -> Tensor:
    slopes = torch.arange(1, heads + 1)[:, None, None] / 10
    return slopes * (torch.arange(width) - pos[:, None])


def hit(cache: Tensor, pos: Tensor) -> Tensor:
    return (torch.arange(cache.shape[2])[:, None] == pos).any(1)[:, None]


def past(cache: Tensor, like: Tensor) -> Tensor:
    """The cache, of no tokens where it is a literal without a shape."""
    return cache if cache.dim() == 4 else like[:, :, :0]


@torch.library.custom_op("near_misses::twice", mutates_args=("x",))
def twice(x: Tensor) -> None:
    x.mul_(2)


class Layer(nn.Module):
    """What the forward of a variant finds in `self`."""

    def __init__(self, s: Sizes):
        super().__init__()
        torch.manual_seed(0)
        self.h, self.g, self.dk, self.dv, self.length = s.h, s.g, s.dk, s.dv, s.length
        self.wq, self.wk, self.wv = (
            nn.Parameter(torch.randn(heads, 8, d) / 3) for heads, d in ((s.h * s.g, s.dk), (s.h, s.dk), (s.h, s.dv))
        )
        self.place = nn.Parameter(torch.randn(s.length, 8))
        self.bias = nn.Parameter(torch.randn(s.h * s.g, 1, 1))
        self.sinks = nn.Parameter(torch.linspace(-1, 2, s.h * s.g))
        self.factor = nn.Parameter(torch.tensor(0.3))
        for name in ("count", "ticks"):
            self.register_buffer(name, torch.tensor(0))
        self.register_buffer("offset", torch.tensor([0]))
        for name, d in (("other_ck", s.dk), ("other_cv", s.dv)):
            self.register_buffer(name, torch.zeros(s.b, s.h, s.length, d))


def build(v: Variant) -> Layer:
    scope: dict[str, Any] = {}
    exec(compile(v.source(), "<variant>", "exec"), globals(), scope)
    model = Layer(SIZES[v.name("sizes")]).eval()
    model.forward = types.MethodType(scope["forward"], model)
    return model


# ---------------------------------------------------------------- running one


def caches(v: Variant, s: Sizes, model: Layer) -> tuple[Any, Any]:
    """(what is passed as the caches: a function, all that the caller can read them by)."""
    holder, shape = v.name("holder"), (s.b, s.h, s.length)
    if v.kind == "born" or (holder in ("a literal", "filled without") and v.kind == "grown"):
        return (lambda: (None, None)), ()
    if v.kind == "grown":
        made = [torch.randn(s.b, s.h, 3 * (holder == "three tokens"), d) for d in (s.dk, s.dv)]
        return (lambda: made), ()
    if holder == "transposed in memory":
        made = [torch.zeros(s.b, s.length, s.h, d).transpose(1, 2) for d in (s.dk, s.dv)]
    elif holder.startswith("halves"):
        both = torch.zeros(2, *shape, s.dk)
        if holder == "halves, taken at each step":
            return (lambda: (both[0], both[1])), (both[0], both[1])
        made = [both[0], both[1]]
    elif holder == "one for both":
        made = [torch.zeros(*shape, s.dk)] * 2
    else:
        made = [torch.zeros(*shape, d) for d in (s.dk, s.dv)]
    if holder == "full of rubbish":
        made = [t.normal_() for t in made]
    if holder == "parameters":
        made = [nn.Parameter(t, requires_grad=False) for t in made]
    if holder == "buffers":
        model.register_buffer("ck", made[0])
        model.register_buffer("cv", made[1])
        return (lambda: (None, None)), made
    return (lambda: made), ([made[0].transpose(1, 2).transpose(1, 2), made[1]] if "view" in holder else made)


def plain(x: Any, tokens: int | None = None) -> Any:
    """A copy of an output, or of a cache's first tokens: what is left after them is not seen, and may differ."""
    x = x.dense() if isinstance(x, CacheHandle) else x
    return x.detach()[:, :, :tokens].clone() if isinstance(x, Tensor) and x.dim() == 4 else copy.deepcopy(x)


def between(holder: str, ck: Tensor, cv: Tensor) -> tuple[Tensor, Tensor]:
    """What the caller does to a cache that a step returned."""
    if holder == "copied":
        return copy.deepcopy(ck), cv.clone()
    if holder == "rows exchanged":
        return ck.flip(0), cv.flip(0)
    return plain(ck) if holder == "keys made plain" else ck, plain(cv) if holder == "values made plain" else cv


def drive(v: Variant, backend: str | None) -> list[Any]:
    """All that the caller sees: outputs, what became of the inputs, and the content of the caches at the end."""
    s, mode = SIZES[v.name("sizes")], v.name("mode")
    generator = torch.Generator().manual_seed(1)
    model = build(v)
    if mode == "frozen":
        model.requires_grad_(False)
    fresh, seen = caches(v, s, model)
    dynamic = True if mode == "dynamic" else None
    options = {"kvc": 1} if backend == "kvc" else None
    call = torch.compile(model, backend=backend, options=options, dynamic=dynamic) if backend else model
    steps = [list(p) for p in SCHEDULE[v.name("schedule")][1](s.prompt, s.length)]
    if v.name("sizes") == "full" and v.kind != "grown":
        steps = steps[:1]
    held, outputs, width = fresh(), [], 3 * (v.name("holder") == "three tokens")
    for i, positions in enumerate(steps):
        n, pos = len(positions), torch.tensor(positions)
        if v.kind == "static":
            held = fresh()
        elif i and positions[0] == 0:
            held, width = fresh(), 0
        width += n
        length = n + 8 if v.name("birth") == "with room for the prompt" else s.length
        if v.kind == "grown":
            pos, length = torch.arange(width - n, width), width
        shown = (torch.arange(length) <= (pos % length)[:, None])[None, None]
        x = torch.randn(s.b, 1, n, 8, generator=generator)
        torch.manual_seed(i)
        step = model if not i and len(steps) > 1 and v.name("holder") == "filled without" else call
        out = step(x, pos, shown, positions[0], *held)
        if v.kind != "static":
            held = between(v.name("holder"), *out[-2:])
        last = None if v.kind == "grown" else positions[-1] + 1
        outputs += (
            [out[0].requires_grad] + [plain(t) for t in (*out[:2], pos, shown)] + [plain(t, last) for t in out[2:]]
        )
    return outputs + [plain(t, last) for t in (*seen, *model.buffers())]


def run(v: Variant, backend: str | None) -> list[Any]:
    mode = {"inference_mode": torch.inference_mode, "gradients": torch.enable_grad, "frozen": torch.enable_grad}
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(SIZES[v.name("sizes")].dtype)
        with mode.get(v.name("mode"), torch.no_grad)(), torch.autocast("cpu", enabled=v.name("mode") == "autocast"):
            return drive(v, backend)
    finally:
        torch.set_default_dtype(default)


def fails_without_us(v: Variant) -> bool:
    """Whether Dynamo fails on a variant whatever the backend."""
    torch._dynamo.reset()
    try:
        run(v, "eager")
    except Exception:
        return True
    return False


class Wrong(AssertionError):
    """A variant whose compiled form does something else."""


def check(v: Variant) -> str:
    """Run a variant both ways: what became of its attentions, or "raised", or "void" if the module itself fails."""
    torch._dynamo.reset()
    try:
        want = run(v, None)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
        return "void"
    before = {c.number for c in remembered()}
    try:
        got = run(v, "kvc")
    except Exception as e:
        if v.raises and re.search(v.raises, str(e)):
            return "raised"
        if fails_without_us(v):
            return "void"
        raise Wrong(f"{v}\n\n{v.source()}\n{type(e).__name__}: {e}") from e
    entries = [e for c in remembered() if c.number not in before for e in c.plan.entries]
    tolerance = 0.05 if v.name("sizes") == "bfloat16" or v.name("mode") == "autocast" else 1e-4
    try:
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance, equal_nan=True)
    except AssertionError as e:
        raise Wrong(f"{v}\n\n{v.source()}\n{[fate(e) for e in entries]}: {e}") from e
    found = {fate(e) for e in entries}
    return found.pop() if len(found) == 1 else "mixed" if found else "declined"


def fate(e: SitePlan | Declined) -> str:
    return "declined" if isinstance(e, Declined) else "read back" if e.site.pattern == "read back" else "compressed"


# ---------------------------------------------------------------- what has no defined result


def undefined(v: Variant) -> bool:
    """Whether some queries see nothing at all. Written by hand these give NaN, under a finite mask the mean of all
    positions, by SDPA 0; compressed, 0 or the mean of the positions that are filled."""
    mask, attention = v.name("mask"), v.name("attention")
    finite = mask == "left padding, finite" and v.kind in FIXED
    return finite or (mask.startswith(("nothing", "left padding")) and attention.startswith("by hand"))


def lost(v: Variant) -> bool:
    """Whether a step may read what a compressed cache does not keep: the strides of a window, what came after a
    position that a later step goes back to, and what the caller's buffer held after the first step's positions."""
    names = {n for _, n in v.chosen}
    if "strides" in names and v.name("write").startswith("cat, last tokens kept"):
        return True  # a window is a view of a longer tensor, and its handle is contiguous
    back = {"a second prompt", "prompts of three lengths"} if v.kind == "static" else set()
    return v.near and bool({"two tokens back", "full of rubbish", "ones", *back} & names)


# ---------------------------------------------------------------- tests


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The rewritten graphs without Inductor, and no measuring of how fast guards are."""
    monkeypatch.setattr(backend, "lower", lambda gm, inputs, request, births: gm.forward)
    monkeypatch.setattr(torch._dynamo.guards, "profile_guard_manager", lambda *args: 0.0, raising=False)


def singles() -> list[Any]:
    """Every choice alone, with each kind of cache. Fast tests: with one kind, all kinds in stages of few
    near misses, and of the plain choices every second."""
    found = []
    for stage, choices in STAGES.items():
        for i, name in enumerate(choices):
            made = [v for kind in KINDS if (v := variant(kind, {stage: name}))]
            for j, v in enumerate(made):
                if undefined(v):
                    continue
                few = stage in ("tokens", "mask", "mode")
                fast = (v.near and few) or (j == i % len(made) and (v.near or i % 2 == 0))
                marks = [] if fast else MANY
                found.append(pytest.param(v, id=f"{v.kind}-{stage}-{name}", marks=marks))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_module_is_compressed(kind):
    assert check(Variant(kind)) == "compressed"


@pytest.mark.parametrize("v", singles())
def test_one_step_away(v):
    """Said in another way it is compressed too; anything else is only right."""
    result = check(v)
    assert result != "void", f"the module itself fails:\n{v.source()}"
    assert v.near or result in ("compressed", "raised" if v.raises else ""), f"{result}:\n{v.source()}"


@st.composite
def variants(draw) -> Variant:
    """Two to five choices at once."""
    kind = draw(st.sampled_from(KINDS))
    stages = draw(st.lists(st.sampled_from(list(STAGES)), min_size=2, max_size=5, unique=True))
    names = ([n for n, c in STAGES[s].items() if kind in c.kinds] for s in stages)
    v = variant(kind, {s: draw(st.sampled_from(n)) for s, n in zip(stages, names, strict=True) if n})
    assume(v is not None and not undefined(v) and not lost(v))
    return v


def check_many(n: int, of: int) -> None:
    results: collections.Counter = collections.Counter()

    @seed(of)
    @settings(
        max_examples=n,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(variants())
    def any_variant(v: Variant) -> None:
        result = check(v)
        results[result] += 1
        assert v.near or result in ("compressed", "void", "raised" if v.raises else ""), f"{result}:\n{v.source()}"

    any_variant()
    print(dict(results))
    assert results["compressed"] > n / 10 and results["void"] < n / 5, results


def test_some_steps_away():
    check_many(25, 0)


@pytest.mark.parametrize("of", [pytest.param(n, marks=MANY) for n in range(1, 11)])
def test_many_of_them(of):
    check_many(400, of)
