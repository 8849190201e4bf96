"""Decoding speed on a CPU: SmolLM2 at 2k tokens on a compressed static cache against plain Inductor on the same cache.

    python benchmarks/cpu_decode.py [--specs int8,kivi-4bit] [--steps 24] [--json FILE]

All run in one process and take turns, step by step, so that whatever else the machine does meets all of them. The
ratio is plain Inductor's median step over ours: above 1 is faster than no compression.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import StaticCache

from kvc_compile import demo_model


@torch.no_grad()
def run(specs: list[str], context: int, steps: int) -> dict:
    torch._dynamo.config.recompile_limit = 64
    model, tokenizer = demo_model.load("cpu", torch.float32)
    from pydoc_data.topics import topics

    ids = tokenizer("\n\n".join(topics[k] for k in sorted(topics)), add_special_tokens=False).input_ids
    prompt = torch.tensor(ids[:context])[None]
    filled = StaticCache(config=model.config, max_cache_len=context + steps + 16)
    token = model(input_ids=prompt, past_key_values=filled, logits_to_keep=1).logits.argmax(-1)
    calls = {"inductor": (torch.compile(model, dynamic=False), copy.deepcopy(filled))}
    for spec in specs:
        compiled = torch.compile(model, backend="kvc", options={"spec": spec}, dynamic=False)
        calls[spec] = (compiled, copy.deepcopy(filled))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(steps):
        for name, (call, cache) in calls.items():
            t = time.perf_counter()
            call(input_ids=token, past_key_values=cache, logits_to_keep=1)
            elapsed = (time.perf_counter() - t) * 1e3
            if i >= 4:  # compiling and warming up
                times[name].append(elapsed)
    rows = {n: {"median_ms": statistics.median(t), "min_ms": min(t)} for n, t in times.items()}
    base = rows["inductor"]
    for row in rows.values():
        row["ratio"] = base["median_ms"] / row["median_ms"]
        row["ratio_of_min"] = base["min_ms"] / row["min_ms"]
    return {
        "model": demo_model.NAME, "dtype": "float32", "context": context, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "rows": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specs", default="int8,kivi-4bit", help="presets, comma-separated")
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = run(args.specs.split(","), args.context, args.steps)
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
