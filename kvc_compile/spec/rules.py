"""What the rules of `keep` do, as far as other keys depend on it. Plain data."""

from __future__ import annotations

from typing import Any


def rules_of(keep: Any) -> list[dict[str, Any]]:
    """The rules of a checked `keep:`."""
    return [] if keep in (None, "off") else keep if isinstance(keep, list) else [keep]


def moments(rule: dict[str, Any]) -> list[Any]:
    """When a rule runs."""
    when = rule.get("when", "prefill_end")
    return when if isinstance(when, list) else [when]


def replaces(rule: dict[str, Any]) -> bool:
    """Whether single tokens of the body make place for others, or are merged into, at every step. The oldest leave a
    block one after the other, and where the body is empty there is none."""
    fifo = rule.get("score") == "fifo" and "merge" not in rule.get("else", "drop")
    return "append" in moments(rule) and not fifo and rule.get("budget") != 0
