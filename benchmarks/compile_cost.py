"""What compiling costs: this compiler's own passes against all of `torch.compile`.

    python benchmarks/compile_cost.py [--spec kivi-4bit] [--layers 8,16,32,64] [--json FILE]

SmolLM2 is compiled in full with Inductor's caches off, prefill and decode; our passes are all of the backend but the
call of Inductor. Then models of SmolLM2's shape with random weights and more and more layers are captured and rewritten
without Inductor: seconds for a layer should not grow.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import kvc_compile.backend as backend
from kvc_compile import demo_model

PROMPT = 64


@contextmanager
def timed(inductor: bool) -> Iterator[dict[str, float]]:
    """Seconds spent in the backend ("kvc") and, within it, in Inductor; without `inductor` that is skipped."""
    spent = {"kvc": 0.0, "inductor": 0.0}
    lower, compile_graph = backend.lower, backend.compile_graph

    def count(name: str, call: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            t = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - t

        return run

    backend.lower = count("inductor", lower if inductor else lambda gm, *args, **kwargs: gm.forward)
    backend.compile_graph = count("kvc", compile_graph)
    try:
        yield spent
    finally:
        backend.lower, backend.compile_graph = lower, compile_graph


@torch.no_grad()
def first_calls(model: Any, spec: str, kind: str, inductor: bool) -> dict[str, float]:
    """Seconds of the first prefill and the first two decode steps, and what of them the passes take."""
    torch._dynamo.reset()
    ids = torch.arange(10, 10 + PROMPT)[None]
    cache = StaticCache(config=model.config, max_cache_len=256) if kind == "static" else DynamicCache()
    compiled = torch.compile(copy.deepcopy(model), backend="kvc", options=spec)
    with timed(inductor) as spent:
        t = time.perf_counter()
        for part in (ids, ids[:, :1], ids[:, 1:2]):
            compiled(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        total = time.perf_counter() - t
    passes = spent["kvc"] - spent["inductor"]
    return {"total_s": total, "passes_s": passes, "inductor_s": spent["inductor"], "share": passes / total}


def of_layers(model: Any, layers: int) -> Any:
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    config.layer_types = None
    return AutoModelForCausalLM.from_config(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", default="kivi-4bit")
    parser.add_argument("--layers", default="8,16,32,64")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch._inductor.config.force_disable_caches = True
    model, _ = demo_model.load("cpu", torch.float32)
    result: dict[str, Any] = {"model": demo_model.NAME, "spec": args.spec, "torch": torch.__version__}
    result["full"] = {kind: first_calls(model, args.spec, kind, True) for kind in ("static", "dynamic")}
    result["layers"] = []
    for layers in map(int, args.layers.split(",")):
        made = of_layers(model, layers)
        for kind in ("static", "dynamic"):
            found = min((first_calls(made, args.spec, kind, False) for _ in range(2)), key=lambda r: r["passes_s"])
            row = {"layers": layers, "cache": kind, "passes_s": found["passes_s"], "capture_s": found["total_s"]}
            result["layers"].append(row | {"ms_per_layer": 1e3 * found["passes_s"] / layers})
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
