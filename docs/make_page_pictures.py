#!/usr/bin/env python3
"""Makes docs/img/page_*.png: the pages of real dumps, as Chromium shows them.

    docs/make_page_pictures.py [--browser CHROMIUM]

The models are the tiny ones of tests/tiny_zoo.py; nothing is compiled. The fonts are those of the machine.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "img"
SPEC = "kivi-4bit"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--run-all-compositor-stages-before-draw",  # or a tile may be missing
]


@dataclass(frozen=True)
class Picture:
    """The page of the decode step of a model, from its top."""

    model: str
    height: int
    width: int = 1280
    dark: bool = False

    @property
    def name(self) -> str:
        return f"page_{self.model}{'' if self.width == 1280 else f'_{self.width}'}.png"


PICTURES = (
    Picture("llama", 1500),
    Picture("llama", 2000, width=400),
    Picture("gemma2", 1560, dark=True),
    Picture("deepseek_v3", 1560),
)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--browser", default=next(filter(None, map(shutil.which, BROWSERS)), None))
    args = ap.parse_args()
    if args.browser is None:
        raise SystemExit(f"no browser found: give one with --browser (tried {', '.join(BROWSERS)})")
    with tempfile.TemporaryDirectory() as scratch:
        pages = {model: decode_page(model, Path(scratch) / model) for model in sorted({p.model for p in PICTURES})}
        for picture in PICTURES:
            photograph(args.browser, pages[picture.model], picture, Path(scratch))
            print(picture.name, (OUT / picture.name).stat().st_size // 1024, "KiB")


def decode_page(model: str, folder: Path) -> Path:
    """Explain a tiny model with the dump on, and find the page of the graph that is given caches."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny_zoo

    import kvc_compile as kvc

    attention = "sdpa" if tiny_zoo.supports_sdpa(model) else "eager"
    kvc.explain(tiny_zoo.build(model, attention), {"spec": SPEC, "dump": str(folder)})
    (page,) = (p for p in folder.glob("*/index.html") if "is given" in p.read_text())
    return page


def photograph(browser: str, page: Path, picture: Picture, scratch: Path) -> None:
    """In a frame: a window of its own may not be as narrow as a telephone."""
    style = f"border: 0; width: {picture.width}px; height: {picture.height}px"
    frame = scratch / "frame.html"
    frame.write_text(f'<!doctype html><body style="margin: 0"><iframe src="{page.as_uri()}" style="{style}"></iframe>')
    command = [
        browser,
        *FLAGS,
        f"--user-data-dir={scratch / 'profile'}",
        f"--window-size={picture.width},{picture.height}",
        f"--screenshot={OUT / picture.name}",
        *(["--blink-settings=preferredColorScheme=0"] if picture.dark else []),
        frame.as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    main()
