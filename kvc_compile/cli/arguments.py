"""Types of command line arguments."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    n = int(text)
    if n < 1:
        raise argparse.ArgumentTypeError("1 or more is allowed")
    return n


def numbers(text: str) -> tuple[int, ...]:
    """Numbers from 1 on, with commas between them."""
    return tuple(positive(part) for part in text.split(","))
