"""What a spec says about one cache tensor, resolved to numbers: the form in which the planner reads a spec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kvc_compile.policy import Selection

from .errors import Path
from .grammar import Context


@dataclass(frozen=True)
class CodecSpec:
    """How the numbers of a vector are stored.

    kind: "raw" (the model's dtype), "int" (affine codes) or "fp" (float8 e4m3); bits: per number, 16 for raw.
    block: (tokens, channels) that share one scale, channels None for all; None where there is no scale.
    zero_point: whether the block's middle is stored too.
    """

    kind: Literal["raw", "int", "fp"] = "raw"
    bits: int = 16
    block: tuple[int, int | None] | None = None
    zero_point: bool = False

    def bits_per_element(self, channels: int) -> float:
        """Bits stored per number, scales (fp16) included, for vectors of `channels` channels."""
        if self.block is None:
            return float(self.bits)
        tokens, width = self.block
        return self.bits + (32 if self.zero_point else 16) / (tokens * min(width or channels, channels))


@dataclass(frozen=True)
class TensorSpec:
    """The stored form of the keys or the values of a layer; sink, recent and flush in tokens.

    The first `sink` tokens stay in the model's dtype for ever. At most `recent` newest tokens stay in the model's
    dtype; when one more arrives, the oldest `flush` of them are encoded.
    """

    codec: CodecSpec = CodecSpec()
    sink: int = 0
    recent: int = 0
    flush: int = 1


@dataclass(frozen=True)
class LayerSpec:
    """What holds for a layer. keep: which tokens stay, as `policy.key_of` names it, "" if all do; select: which stored
    tokens a query reads, None for all."""

    k: TensorSpec = TensorSpec()
    v: TensorSpec = TensorSpec()
    keep: str = ""
    select: Selection | None = None


def codec_of(data: dict[str, Any] | None) -> CodecSpec | None:
    """The codec described by a checked mapping; None if it uses what is not implemented."""
    if data is None or data == {"fp": 16}:
        return CodecSpec()
    if set(data) - {"int", "fp", "block", "zero"} or data.get("fp") == 16:
        return None
    block = data.get("block", [1, "all"] if "int" in data else None)
    if block is not None and not isinstance(block[0], int):
        return None
    shape = None if block is None else (block[0], None if block[1] == "all" else block[1])
    if "int" in data:
        return CodecSpec("int", data["int"], shape, data.get("zero", True))
    return CodecSpec("fp", data["fp"], shape, False)


def tensor_of(fragment: dict[str, Any], side: str, path: Path, ctx: Context) -> TensorSpec | None:
    """The tensor `side` ("k" or "v") of an expanded fragment; None if it uses what is not implemented.

    Raises SpecError where recent, flush and block do not fit.
    """
    data = fragment.get(side, {}).get("codec")
    codec = None if isinstance(data, list) else codec_of(data)
    tokens = fragment.get("tokens", {})
    sink, recent, flush = (_number(tokens.get(key), side) for key in ("sink", "recent", "flush"))
    if isinstance(recent, str) and recent != "generated" and "keep" in fragment:
        recent = None  # a share of the length is about which tokens stay; those that wait for a block are counted
    if codec is None or isinstance(sink, str) or isinstance(recent, str) or isinstance(flush, str):
        return None
    if codec.kind == "raw":
        return TensorSpec()  # everything is in the model's dtype already: regions would say nothing
    unit = codec.block[0] if codec.block else 1
    flush = unit if flush is None else flush
    if flush % unit:
        up = -(-flush // unit) * unit
        ctx.fail(
            (*path, "tokens", "flush"),
            f"blocks of {side} span {unit} tokens and are encoded whole",
            str(flush),
            f"a multiple of {unit}, or another {side}.codec.block",
            str(up),
        )
    if not recent or (recent < flush and "keep" in fragment):  # what `keep` spares may be fewer than a block
        recent = flush if flush > 1 else recent or 0  # a block over tokens waits in the model's dtype until complete
    if recent < flush and flush > 1:
        ctx.fail(
            (*path, "tokens", "recent"),
            f"{flush} tokens of {side} are encoded at once, so they must fit",
            str(recent),
            f"at least {flush}, or a smaller tokens.flush or {side}.codec.block",
            str(flush),
        )
    return TensorSpec(codec, sink or 0, recent, flush)


def _number(value: Any, side: str) -> int | str | None:
    """A count of tokens; a string is a form that is not implemented yet."""
    number = value.get(side) if isinstance(value, dict) else value
    return number if number is None or isinstance(number, int) else str(number)
