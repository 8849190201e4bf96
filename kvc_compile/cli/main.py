"""`kvc COMMAND`: finds the command's module and turns our own errors into one message."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = ("demo", "presets", "check", "explain", "calibrate", "tune", "bench")  # modules of this package
DESCRIPTION = "Compress the KV cache of a model under torch.compile, as a short spec file says."
EPILOG = """\
examples:
  kvc demo --quick              a real model, with its full cache and a compressed one, side by side
  kvc presets kivi-4bit         print a preset: a file to start from
  kvc check my-spec.yaml        is it valid, and what does it mean
"""
FAILED, MISUSED = 1, 2


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("kvc", description=DESCRIPTION, epilog=EPILOG)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--version", action="store_true", help="print the version")
    commands = p.add_subparsers(metavar="COMMAND", dest="command")
    for name in COMMANDS:
        import_module(f"kvc_compile.cli.{name}").add_parser(commands)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 if the command failed, 2 if it was misused."""
    from kvc_compile import __version__

    p = parser()
    args = p.parse_args(argv)
    if args.version:
        print(f"kvc_compile {__version__}")
        return 0
    if args.command is None:
        p.print_help()
        return MISUSED
    try:
        code: int = args.run(args)
        return code
    except BrokenPipeError:  # | head
        sys.stderr.close()
        return FAILED
    except KeyboardInterrupt:
        print("kvc: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        ours = explained(error)
        if ours is None:
            raise
        print(f"kvc {args.command}: {ours}", file=sys.stderr)
        return MISUSED if type(ours).__name__ == "OptionError" else FAILED


def explained(error: BaseException | None) -> BaseException | None:
    """The error of ours behind an exception: torch.compile wraps what a backend raises in one of its own."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if type(error).__module__.partition(".")[0] == "kvc_compile":
            return error
        inner = getattr(error, "inner_exception", None)
        error = inner or error.__cause__ or error.__context__
    return None


if __name__ == "__main__":
    sys.exit(main())
