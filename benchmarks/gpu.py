"""Everything that needs a GPU, in one call: its tests, `kvc bench`, and the demo.

    python benchmarks/gpu.py --out results.json [--plot plot.svg] [--skip tests,bench,demo] [--minutes 8.5]

Compare numbers within one run only. The results that the README quotes are checked in under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


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


def bench(minutes: float, plot: Path | None) -> dict[str, Any]:
    """Its progress line and tables go to this process's own output."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json"
        words = ["bench", "--device", "cuda", "--minutes", str(minutes), "--out", str(out)]
        words += ["--plot", str(plot.resolve())] if plot else []
        subprocess.run([sys.executable, "-P", "-m", "kvc_compile.cli.main", *words], cwd=ROOT, check=False)
        return json.loads(out.read_text())


def demo() -> dict[str, Any]:
    text = command("-m", "kvc_compile.cli.main", "demo", "--device", "cuda", "--json")
    return json.loads(text[text.index("{") :])


def setup() -> dict[str, Any]:
    from importlib.metadata import version

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        # in a process of its own: this one takes no memory of a GPU
        "device": command("-c", "import torch; print(torch.cuda.get_device_name())").strip(),
        **{name: version(name) for name in ("torch", "triton", "transformers")},
        "python": platform.python_version(),
        "commit": os.environ.get("KVC_COMMIT") or commit.stdout.strip() or "unknown",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="a picture of the benchmark")
    parser.add_argument("--minutes", type=float, default=8.5, help="that the benchmark may take (default: 8.5)")
    parser.add_argument("--skip", default="", help="parts to leave out, of tests, bench, demo")
    args = parser.parse_args()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "bench": lambda: bench(args.minutes, args.plot),
        "tests": tests,
        "demo": demo,
    }
    results: dict[str, Any] = {"setup": setup()}
    for name, part in parts.items():
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
