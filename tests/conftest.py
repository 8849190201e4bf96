"""Fixtures for all tests: no network, a clean compiler between tests, GPU tests only where there is one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("KVC_TUNE", "0")
os.environ.setdefault("KVC_TUNING_DIR", os.path.join(os.path.dirname(__file__), "no-timings"))  # not the user's


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """What one test compiled is not reused by the next, does not count against its recompile limit, and is not in its
    report: all modules without parameters share one."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    if "kvc_compile.report" in sys.modules:
        sys.modules["kvc_compile.report"]._recent.clear()
        sys.modules["kvc_compile.report"]._alive.clear()


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer) of SmolLM2-135M-Instruct in float32. Not to be compiled in place: torch.compile a wrapper, or
    compile a deepcopy."""
    from kvc_compile import demo_model

    try:
        return demo_model.load()
    except demo_model.DemoMissing as e:
        pytest.skip(str(e))


@pytest.fixture(scope="session")
def device() -> str:
    """Where the compiler's tests run: the GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
