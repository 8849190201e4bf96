#!/usr/bin/env python3
"""Draws docs/img/graph_diff.svg: what the backend does to the decode step of a small Llama, from a real dump.

    docs/make_diff_picture.py [--out FILE]

The picture shows one layer, before and after, cut from `0_captured.py` and `1_rewritten.py` of the dump.
"""

from __future__ import annotations

import argparse
import difflib
import re
import tempfile
from html import escape
from pathlib import Path

OUT = Path(__file__).parent / "img" / "graph_diff.svg"
SPEC = "kivi-4bit"
COLUMNS, LINE, CHAR, PAD = 74, 17, 6.63, 14  # characters a side; pixels
STYLE = """
rect { shape-rendering: crispEdges }
.bg { fill: #ffffff } .head { font-weight: bold; fill: #24292f } text { fill: #24292f; white-space: pre }
.del { fill: #ffebe9 } .add { fill: #dafbe1 } .rule { stroke: #d0d7de } .note { fill: #57606a }
@media (prefers-color-scheme: dark) {
  .bg { fill: #0d1117 } .head, text { fill: #e6edf3 } .del { fill: #4b1b1f } .add { fill: #12361f }
  .rule { stroke: #30363d } .note { fill: #8b949e }
}"""


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, default=OUT)
    args = ap.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dump(Path(folder))
        before, after = decode_graph(Path(folder))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(draw(rows(one_layer(before), one_layer(after))))


def dump(folder: Path) -> None:
    """Explain a Llama of two layers with the dump on; nothing is compiled."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import kvc_compile as kvc

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    kvc.explain(LlamaForCausalLM(config).eval(), {"spec": SPEC, "dump": str(folder)})


def decode_graph(folder: Path) -> tuple[list[str], list[str]]:
    """The lines of the graph of a decode step, which updates caches that exist: captured and rewritten."""
    for graph in sorted(folder.iterdir()):
        captured, rewritten = graph / "0_captured.py", graph / "1_rewritten.py"
        if rewritten.exists() and "kvc.append" in rewritten.read_text() and "kvc.empty" not in rewritten.read_text():
            return tidy(captured.read_text()), tidy(rewritten.read_text())
    raise SystemExit("no graph of a decode step in the dump")


def tidy(text: str) -> list[str]:
    """Without blank lines, strides and devices, and with the longest names shortened."""
    for pattern, short in (
        (r"l_self_\w*?layers_modules_(\d+)_modules_self_attn_modules_", r"layer\1_"),
        (r"l_(?:kwargs_)?past_key_values_layers_(\d+)_", r"cache\1_"),
        (r"torch\.ops\.kvc\.(\w+)\.default", r"kvc.\1"),
        (r"torch\._C\._nn\.", ""),
        (r'"(\w+)\[([\d, ]*)\]\[[\d, ]*\]cpu"', r'"\1[\2]"'),  # strides and device
        (r"slice\(None, None, None\)", ":"),
        (r"device = device\(type='cpu'\)", "..."),
        (r";\s+\w+ = .*None$", ""),
        (r"parameter_\b", ""),
    ):
        text = re.sub(pattern, short, text, flags=re.MULTILINE)
    return [line.strip() for line in text.splitlines() if line.strip()]


def one_layer(lines: list[str]) -> list[str]:
    """From the rotary embedding of the first layer to its output projection."""
    end = next(i for i, line in enumerate(lines) if "o_proj" in line and "linear" in line)
    start = max(i for i, line in enumerate(lines[:end]) if re.match(r"(k_embed|q_embed)\b", line))
    return [line for line in lines[start : end + 1] if not line.startswith("#")]


def rows(old: list[str], new: list[str]) -> list[tuple[str, str, str]]:
    """(kind, left, right), kind one of "same", "del", "add", "both"."""
    out: list[tuple[str, str, str]] = []
    for tag, a, b, c, d in difflib.SequenceMatcher(a=old, b=new, autojunk=False).get_opcodes():
        left, right = wrapped(old[a:b]), wrapped(new[c:d])
        for i in range(max(len(left), len(right))):
            pair = (left[i] if i < len(left) else "", right[i] if i < len(right) else "")
            out.append(("same" if tag == "equal" else "both", *pair))
    return out


def wrapped(lines: list[str]) -> list[str]:
    out = []
    for line in lines:
        while len(line) > COLUMNS:
            cut = max(line.rfind(" ", 0, COLUMNS), line.rfind("(", 0, COLUMNS)) + 1
            cut = cut if cut > COLUMNS // 4 else COLUMNS
            out.append(line[:cut].rstrip())
            line = "    " + line[cut:].strip()
        out.append(line)
    return out


def draw(pairs: list[tuple[str, str, str]]) -> str:
    side = int(COLUMNS * CHAR) + 2 * PAD
    width, height = 2 * side, (len(pairs) + 2) * LINE + 2 * PAD
    font = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="{font}" font-size="11">',
        "<title>The attention of one layer in the graph of a decode step, before and after the rewrite</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="bg" width="{width}" height="{height}"/>',
    ]
    for x, head in ((PAD, "0_captured.py: as Dynamo hands it over"), (side + PAD, f"1_rewritten.py: {SPEC}")):
        out.append(f'<text class="head" x="{x}" y="{PAD + 10}">{escape(head)}</text>')
    for n, (kind, left, right) in enumerate(pairs):
        y = PAD + (n + 2) * LINE
        for x, text, colour in ((0, left, "del"), (side, right, "add")):
            if kind == "both" and text:
                out.append(f'<rect class="{colour}" x="{x}" y="{y - 12}" width="{side}" height="{LINE + 1}"/>')
            if text:
                out.append(f'<text x="{x + PAD}" y="{y}" xml:space="preserve">{escape(text)}</text>')
    out.append(f'<line class="rule" x1="{side}" y1="0" x2="{side}" y2="{height}"/>')
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    main()
