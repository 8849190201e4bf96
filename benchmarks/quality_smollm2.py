#!/usr/bin/env python3
"""Quality of presets on SmolLM2-135M-Instruct, through `torch.compile(model, backend="kvc", options=PRESET)`.

For each preset:
  KL, perplexity, top-1   three windows of pydoc topics: a prefill of 1536 tokens, then 512 in chunks of 32, each of
                          which reads the compressed cache; against the same model with the full cache
  bytes                   planned for 2048 tokens and really held (an independent walk over the cache objects); "of a
                          16-bit cache" counts the regions that stay in the model's dtype as 16-bit
  passkeys                a number hidden at 5 depths of 2k tokens and 3 of 4k, in contexts that the full cache answers

    benchmarks/quality_smollm2.py --presets int8,kivi-4bit,kivi-2bit
    benchmarks/quality_smollm2.py --markdown          # the table of the results file
Results are merged into the results file after each preset; 5 to 10 minutes for each on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "quality_smollm2.json"
PREFILL, SCORED, CHUNK = 1536, 512, 32
ROOM = 4352  # tokens of the static cache: one length for windows and passkeys, so that all share their graphs


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--presets", default="int8,kivi-4bit,kivi-2bit,default", help="names or paths, with commas between")
    ap.add_argument("--windows", type=int, default=3, help="how many windows of text")
    ap.add_argument("--lengths", default="2048,4096", help="lengths of the passkey contexts; empty to skip them")
    ap.add_argument("--redraw", action="store_true", help="search passkey contexts that the full cache answers anew")
    ap.add_argument("--json", type=Path, default=RESULTS, help="the results file")
    ap.add_argument("--markdown", action="store_true", help="print the table of the results file and stop")
    ap.add_argument("--device", default="cpu")
    args = ap.parse_args()
    result = json.loads(args.json.read_text()) if args.json.exists() else {}
    if not args.markdown:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        measure(args, result)
    print(markdown(result))


def measure(args: argparse.Namespace, result: dict) -> None:
    import torch
    import transformers

    from kvc_compile import demo_model, quality
    from kvc_compile.spec import Spec

    torch._dynamo.config.recompile_limit = 32
    model, tokenizer = demo_model.load(args.device, torch.float32)
    tokens = quality.topic_tokens(tokenizer)
    save(args.json, result, setup={
        "model": f"{demo_model.NAME} Q4_1 dequantised to float32", "device": args.device, "prefill": PREFILL,
        "scored": SCORED, "chunk": CHUNK, "windows": quality.WINDOWS[: args.windows], "torch": torch.__version__,
        "transformers": transformers.__version__, "python": platform.python_version(),
    })  # fmt: skip
    windows = []
    for start in quality.WINDOWS[: args.windows]:
        ids = torch.tensor([tokens[start : start + PREFILL + SCORED + 1]], device=args.device)
        full = quality.read(model, ids[:, :-1], PREFILL, transformers.DynamicCache(), SCORED)
        windows.append((ids, full))
        print(f"full cache, window {start}: perplexity", perplexity([(ids, full)], [full]), flush=True)
    result["full"] = {"perplexity": perplexity(windows, [f for _, f in windows])}
    draws = result.setdefault("draws", {})
    for name in args.presets.split(","):
        torch._dynamo.reset()
        row = result.setdefault("presets", {}).setdefault(name, {})
        compiled = torch.compile(model, backend="kvc", options={"spec": name, "strict": True})
        row.update(digest=Spec.load(name).digest, **scores(model, compiled, windows))
        save(args.json, result)
        print(name, {k: v for k, v in row.items() if k != "passkeys"}, flush=True)
        for length in [int(n) for n in args.lengths.split(",") if n]:
            known = {} if args.redraw else {float(d): n for d, n in draws.get(str(length), {}).items()}
            found = []
            for p in quality.passkeys(model, tokenizer, tokens, length, known):
                draws.setdefault(str(length), {})[str(p.depth)] = p.draw
                text = quality.answer(compiled, tokenizer, p, static_cache(model), CHUNK)
                found.append({"depth": p.depth, "code": p.code, "answer": text, "hit": p.code in text})
                print(name, length, found[-1], flush=True)
            row.setdefault("passkeys", {})[str(length)] = found
            args.redraw = False
            save(args.json, result)


def static_cache(model):
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=ROOM)


def scores(model, compiled, windows) -> dict:
    from kvc_compile import quality, report

    found, held, began = [], 0, time.time()
    for ids, full in windows:
        cache = static_cache(model)
        logits = quality.read(compiled, ids[:, :-1], PREFILL, cache, CHUNK)
        found.append(quality.score(logits, full, ids[0, PREFILL + 1 :]))
        held = quality.stored_bytes(cache)
        print(f"  {asdict(found[-1])}", flush=True)
    told = report(model)
    planned, planned16, dense16 = planned_bytes(told, PREFILL + SCORED)
    return {
        "perplexity": quality.perplexity(found),
        "kl_mean": statistics.mean(s.kl for s in found),
        "kl_worst": max(s.kl for s in found),
        "top1": statistics.mean(s.top1 for s in found),
        "windows": [asdict(s) for s in found],
        "bytes_2048": planned,
        "bytes_2048_16bit": planned16,
        "of_16bit": planned16 / dense16,
        "room": ROOM,
        "held": held,
        "held_of_planned": held / told.bytes(ROOM).compressed,
        "seconds": round(time.time() - began),
    }


def planned_bytes(told, tokens: int) -> tuple[int, int, int]:
    """(compressed, compressed in a 16-bit model, uncompressed in a 16-bit model) bytes for `tokens` tokens."""
    from kvc_compile.layout import Layout

    layouts = [Layout.parse(key) for s in told.sites if not s.shared for key in (s.keys, s.values)]
    as16 = [replace(x, dtype="bfloat16") for x in layouts]
    totals = [sum(x.row_bytes(tokens) for x in layouts), sum(x.row_bytes(tokens) for x in as16)]
    return totals[0], totals[1], sum(x.dense_bytes(tokens) for x in as16)


def perplexity(windows, logits) -> float:
    from kvc_compile import quality

    return quality.perplexity(quality.score(x, x, ids[0, PREFILL + 1 :]) for (ids, _), x in zip(windows, logits))


def save(path: Path, result: dict, **more: object) -> None:
    result.update(more)
    path.write_text(json.dumps(result, indent=1) + "\n")


def markdown(result: dict) -> str:
    head = ["preset", "of a 16-bit cache", "KL mean", "KL worst", "top-1", "perplexity", "passkeys 2k", "passkeys 4k"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines.append(f"| full cache | 1.000 | 0 | 0 | 1.000 | {result['full']['perplexity']:.2f} | | |")
    for name, r in result["presets"].items():
        if "kl_mean" not in r:
            continue
        keys = [r.get("passkeys", {}).get(n) for n in ("2048", "4096")]
        hits = ["-" if k is None else f"{sum(a['hit'] for a in k)} of {len(k)}" for k in keys]
        cells = [f"{r['of_16bit']:.3f}", f"{r['kl_mean']:.5f}", f"{r['kl_worst']:.5f}", f"{r['top1']:.3f}"]
        lines.append("| " + " | ".join([name, *cells, f"{r['perplexity']:.2f}", *hits]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
