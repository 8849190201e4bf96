"""Placeholder for the report: see `Report`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from kvc_compile.plan import Plan
from kvc_compile.request import Request

log = logging.getLogger("kvc_compile")


@dataclass
class Compile:
    """One compiled graph: what was asked, what was planned, and which models called it."""

    request: Request
    plan: Plan
    owners: set[str] = field(default_factory=set)

    def called(self, owner: str) -> None:
        self.owners.add(owner)


_compiles: list[Compile] = []


def remember(c: Compile) -> Compile:
    _compiles.append(c)
    return c


class DeclinedError(RuntimeError):
    """strict: an attention could not be compressed."""


_warned: set[str] = set()


def warn_declined(plan: Plan, request: Request) -> None:
    """An error under `strict`, else one warning for each reason."""
    if not plan.declined:
        return
    lines = [f"attention {d.index} ({d.where}): {d.reason}" for d in plan.declined]
    if request.strict:
        raise DeclinedError("not compressed, and strict is set:\n  " + "\n  ".join(lines))
    for d, line in zip(plan.declined, lines, strict=True):
        if d.reason not in _warned:
            _warned.add(d.reason)
            log.warning("kvc leaves an attention uncompressed: %s", line)
