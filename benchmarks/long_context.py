"""Peak memory and step time of a full-size decoder on a long static cache, compressed or not: one process per run.

    python benchmarks/long_context.py --spec default      # through kvc
    python benchmarks/long_context.py --spec none         # Hugging Face's static cache, compiled by Inductor
    python benchmarks/long_context.py --all               # both and `lossless`, and what the difference is

Llama-3-8B shape, random weights, bf16, CUDA graphs in all. The static cache has room for --tokens tokens, --prompt of
which are filled first; the baseline attends over all of the room whatever is filled, so --all fills less of it. Prints
one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time

import torch


def build_model(layers: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, rope_theta=500000.0,
    )  # fmt: skip
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    return model


@torch.no_grad()
def run(spec: str, tokens: int, batch: int, prompt: int, steps: int, layers: int, profile: bool = False) -> dict:
    from torch._dynamo.utils import counters
    from transformers import StaticCache

    model = build_model(layers)
    torch.cuda.synchronize()
    weights = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(0, 128000, (batch, prompt), device="cuda")
    cache = StaticCache(config=model.config, max_cache_len=tokens)
    # the prompt goes in chunks: what is measured is the cache, not the activations of one large prefill
    started = time.perf_counter()
    if spec == "none":
        step = torch.compile(model, mode="reduce-overhead", fullgraph=True)
        prefill = model
    else:
        step = prefill = torch.compile(model, backend="kvc", options={"spec": spec, "mode": "reduce-overhead"})
    for chunk in ids.split(1024, 1):
        torch.compiler.cudagraph_mark_step_begin()
        logits = prefill(input_ids=chunk.clone(), past_key_values=cache, logits_to_keep=1).logits.clone()
    token = logits[:, -1:].argmax(-1)

    def decode() -> None:
        nonlocal token
        torch.compiler.cudagraph_mark_step_begin()
        token = step(input_ids=token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1).clone()

    alone = []
    for _ in range(steps // 2):  # the first of them compile and record
        torch.cuda.synchronize()
        t = time.perf_counter()
        decode()
        torch.cuda.synchronize()
        alone.append((time.perf_counter() - t) * 1e3)
    # as a generation runs: the host need not wait for a token to ask for the next
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps // 2 + 1)]
    marks[0].record()
    for mark in marks[1:]:
        decode()
        mark.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    out = {
        "spec": spec, "tokens": tokens, "batch": batch, "prompt": prompt, "layers": layers,
        "weights_bytes": weights,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "held_bytes": torch.cuda.memory_allocated() - weights,
        "dense_cache_bytes": 2 * layers * batch * 8 * tokens * 128 * 2,
        "step_ms_median": statistics.median(times),
        "step_ms_alone": statistics.median(alone[len(alone) // 2 :]),
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
        "graphs": counters["stats"]["unique_graphs"],
        "finite": bool(torch.isfinite(logits).all()),
        "setup_s": round(time.perf_counter() - started, 1),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }  # fmt: skip
    if profile:
        out["kernels"] = kernel_times(lambda: step(input_ids=token, past_key_values=cache, logits_to_keep=1))
    if spec != "none":
        from kvc_compile.handle import held

        out["cache_bytes"] = sum(held().values())
    return out


def kernel_times(step, most: int = 25) -> dict[str, list[float]]:
    """The kernels of one step that take longest: calls and microseconds in all."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        torch.compiler.cudagraph_mark_step_begin()
        step()
        torch.cuda.synchronize()
    rows = sorted(seen.key_averages(), key=lambda e: -e.device_time_total)[:most]
    return {e.key[:80]: [e.count, round(e.device_time_total, 1)] for e in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", default="default", help="a preset, or none for the uncompressed baseline")
    parser.add_argument("--tokens", type=int, default=32832, help="room of the static cache")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--profile", action="store_true", help="the kernels of one step, by time")
    parser.add_argument("--all", action="store_true", help="the baseline and the spec, each in its own process")
    args = parser.parse_args()
    if not args.all:
        print(json.dumps(run(args.spec, args.tokens, args.batch, args.prompt, args.steps, args.layers, args.profile)))
        return
    rows = {}
    for spec in ("none", "lossless", args.spec):
        prompt = min(args.prompt, 4096) if spec == "none" else args.prompt
        settings = [f"--{k}={getattr(args, k)}" for k in ("tokens", "batch", "steps", "layers")]
        command = [sys.executable, __file__, "--spec", spec, f"--prompt={prompt}", *settings]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-4000:])
        rows[spec] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({"runs": rows, **differences(rows, args.spec)}))


def differences(rows: dict[str, dict], spec: str) -> dict:
    """What a spec saves of the baseline's peak memory, in bytes and of its cache."""
    saved = rows["none"]["peak_bytes"] - rows[spec]["peak_bytes"]
    return {"peak_saved_bytes": saved, "of_cache": saved / rows["none"]["dense_cache_bytes"]}


if __name__ == "__main__":
    main()
