"""The demo and the quality measures, on a tiny random model with the demo's tokenizer; the command line's manners."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from kvc_compile import demo_model, quality
from kvc_compile.cli import main as cli


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    """(model, tokenizer): a random Llama with the vocabulary of the demo's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    try:
        tokenizer = AutoTokenizer.from_pretrained(demo_model.folder(), gguf_file=demo_model.GGUF)
    except demo_model.DemoMissing as e:
        pytest.skip(str(e))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def static_cache(model: Any) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=128)


def test_reading_in_chunks_is_reading_at_once(small: tuple[Any, Any]) -> None:
    from transformers import DynamicCache

    model, tokenizer = small
    ids = torch.tensor([quality.topic_tokens(tokenizer)[:91]])
    full = quality.read(model, ids[:, :-1], 60, DynamicCache(), 512)
    assert full.shape == (30, len(tokenizer))
    for logits in (
        quality.read(model, ids[:, :-1], 60, static_cache(model), 8),
        quality.generate(model, ids[:, :-1], 60, static_cache(model)),
    ):
        score = quality.score(logits, full, ids[0, 61:])
        assert score.tokens == 30 and abs(score.kl) < 1e-5 and score.top1 == 1.0
    alone = torch.nn.functional.cross_entropy(full, ids[0, 61:])
    assert score.nll == pytest.approx(alone.item(), abs=1e-4)


def test_passkeys_hold_their_number(small: tuple[Any, Any]) -> None:
    model, tokenizer = small
    tokens = quality.topic_tokens(tokenizer)
    found = list(quality.passkeys(model, tokenizer, tokens, 2048, dict.fromkeys(quality.DEPTHS[2048], 1)))
    assert [p.depth for p in found] == list(quality.DEPTHS[2048])
    for p in found:
        text = tokenizer.decode(p.context[0])
        assert text.count(p.code) == 2 and abs(p.context.shape[1] + p.question.shape[1] - 2048) < 60


@pytest.mark.slow
def test_demo(
    small: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    monkeypatch.setattr(demo_model, "load", lambda device: small)
    asked = ["demo", "--quick", "--tokens", "4", "--presets", "lossless,kivi-4bit", "--device", "cpu"]
    assert cli.main([*asked, "--json", "--dump", str(tmp_path)]) == 0
    data = json.loads(capsys.readouterr().out)
    full, lossless, kivi = data["rows"]
    assert [r["cache"] for r in data["rows"]] == ["uncompressed", "lossless", "kivi-4bit"]
    assert full["planned"] == full["held"] and full["kl"] == 0 and full["of_dtype"] == 1
    assert abs(lossless["kl"]) < 1e-6 and lossless["top1"] == 1 and lossless["text"] == full["text"]
    assert kivi["held"] == pytest.approx(kivi["planned"], rel=0.02) and kivi["planned"] < full["planned"] / 2
    assert 1e-6 < kivi["kl"] < 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kivi-4bit", "lossless"]


def test_demo_reads_well() -> None:
    from rich.console import Console

    from kvc_compile.cli import demo

    setup = {"dtype": "float32", "question": "What?"}
    rows = [demo.Row("uncompressed", "text " * 60, 10**8, 10**8, 1.0, 2.0, 11.384, 0.0, 1.0, 163.9, 1384.0)] * 2
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(demo.measures(setup, rows), demo.answers(setup, rows))
    text = console.export_text()
    assert "…" not in text and "of fp32" in text and max(map(len, text.splitlines())) <= 100


def test_command_line_manners(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, code, said in (
        (["demo", "--presets", "kivi-5bit"], 1, "kivi-4bit"),
        (["demo", "--tokens", "0"], 2, "--tokens"),
        (["demo", "--device", "tpu"], 2, "--device tpu"),
        (["check", "nope"], 1, "no such file or preset"),
    ):
        assert cli.main(asked) == code
        err = capsys.readouterr().err
        assert err.startswith(f"kvc {asked[0]}: ") and said in err and "Traceback" not in err
    monkeypatch.setattr(demo_model, "GGUF", "missing.gguf")
    assert cli.main(["demo"]) == 1
    assert "pip install" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: kvc") and (command or "demo") in text


def test_our_errors_are_found_inside_those_of_torch() -> None:
    from kvc_compile.spec import SpecError

    ours = SpecError("bad")
    try:
        try:
            raise ours
        except SpecError as e:
            raise RuntimeError("backend failed") from e
    except RuntimeError as e:
        assert cli.explained(e) is ours
    assert cli.explained(ValueError("theirs")) is None
