"""Everything that needs a GPU, in one call: its tests, the kernel and whole-model benchmarks, and the demo.

    python benchmarks/gpu.py --out results.json [--skip tests,kernels,model,demo]

Compare numbers within one run only. The results that the README quotes are checked in under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LONG_SPEC = "examples/specs/long-context-4bit.yaml"


def command(*words: str) -> str:
    """The output of a Python command; its errors end the run of that part."""
    # -P: with the checkout on sys.path its folder kernels/ would hide the package of that name
    done = subprocess.run([sys.executable, "-P", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-3000:])
    return done.stdout


def tests() -> dict[str, Any]:
    folders = ["tests/kernels", "tests/test_models.py", "tests/test_gpu.py"]
    return {"summary": command("-m", "pytest", "-n", "8", *folders).strip().splitlines()[-1]}


def kernels() -> dict[str, Any]:
    sys.path.insert(0, str(HERE))
    import gpu_kernels

    out: dict[str, Any] = {}
    gpu_kernels.run(out)
    return out


def model() -> dict[str, Any]:
    return json.loads(command(str(HERE / "long_context.py"), "--all", "--spec", LONG_SPEC).splitlines()[-1])


def demo() -> dict[str, Any]:
    text = command("-m", "kvc_compile.cli.main", "demo", "--device", "cuda", "--json")
    return json.loads(text[text.index("{") :])


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"tests": tests, "model": model, "kernels": kernels, "demo": demo}


def setup() -> dict[str, Any]:
    import torch
    import transformers
    import triton

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": os.environ.get("KVC_COMMIT") or commit.stdout.strip() or "unknown",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--skip", default="", help=f"parts to leave out, of {', '.join(PARTS)}")
    args = parser.parse_args()
    results: dict[str, Any] = {"setup": setup()}
    for name, part in PARTS.items():
        if name in args.skip.split(","):
            continue
        started = time.time()
        try:
            results[name] = part()
        except Exception as e:  # one part that fails must not lose the others
            results[name] = {"error": str(e)[-3000:]}
        results[name]["seconds"] = round(time.time() - started, 1)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name}: {results[name]['seconds']} s {results[name].get('error', '')[-600:]}", flush=True)


if __name__ == "__main__":
    main()
