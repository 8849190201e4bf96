#!/usr/bin/env python3
"""Refreshes the numbers in README.md: the output of `kvc demo` and the table of the quality benchmark.

    docs/demo_output.py            # runs kvc demo: some minutes
    docs/demo_output.py FILE       # takes its output from a file

The table is that of benchmarks/results/quality_smollm2.json, which benchmarks/quality_smollm2.py writes.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def main() -> None:
    if len(sys.argv) > 1:
        shown = Path(sys.argv[1]).read_text()
    else:
        shown = run("kvc", "demo")
    shown = "\n".join(line.rstrip() for line in shown.strip("\n").splitlines())
    table = run(sys.executable, str(ROOT / "benchmarks" / "quality_smollm2.py"), "--markdown")
    text = replaced(README.read_text(), "demo output", f"```text\n{shown}\n```\n")
    README.write_text(replaced(text, "quality table", table))


def run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def replaced(text: str, name: str, new: str) -> str:
    """`text` with `new` between the markers of `name`."""
    pattern = rf"(<!-- {name}:[^\n]*-->\n).*?(<!-- end of {name} -->)"
    out, n = re.subn(pattern, lambda m: m[1] + new + m[2], text, flags=re.DOTALL)
    if n != 1:
        raise SystemExit(f"README.md has {n} blocks of {name}")
    return out


if __name__ == "__main__":
    main()
