"""The command line, `resnext-det COMMAND`: what it takes, parsed with the standard library alone.

Importing `resnext_det` imports torch and Detectron2, which takes seconds. The parsers live outside
of it, so that `--help` and a mistyped flag are answered at once. Each command is a pair of modules
of the same name: here, its help text and `add_arguments`; in `resnext_det.commands`, its `run`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

COMMANDS = {
    "train": "train",
    "eval": "eval",
    "predict": "predict",
    "demo": "predict",
    "report": "report",
    "evaluate": "evaluate",
    "convert": "convert",
    "weights": "weights",
    "eval-imagenet": "eval_imagenet",
    "check-data": "check_data",
    "show-data": "show_data",
    "prepare-minival": "prepare_minival",
    "complexity": "complexity",
    "curves": "curves",
    "make-toy-coco": "make_toy_coco",
    "pretrain-toy": "pretrain_toy",
}
"""By command, its module."""


def main(words: Sequence[str] | None = None) -> int:
    """Run `resnext-det`.

    Args:
        words: of the command line; sys.argv by default.

    Returns:
        The exit code.
    """
    words = sys.argv[1:] if words is None else list(words)
    parser = argparse.ArgumentParser(
        prog="resnext-det",
        description="ResNeXt detectors: train, evaluate, use. Each command has a --help.",
        epilog="commands:\n" + "\n".join(f"  {name:22}{_summary(name)}" for name in COMMANDS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    command = parser.parse_args(words[:1]).command
    return run(command, f"resnext-det {command}", words[1:])


def run_tool(command: str) -> None:
    """Run a command as a script of tools/; exit with its code, if that is not 0."""
    if code := run(command, f"python tools/{Path(sys.argv[0]).name}", sys.argv[1:]):
        sys.exit(code)


def run(command: str, program: str, words: Sequence[str]) -> int:
    """Parse a command line and do what it says.

    Args:
        command: one of `COMMANDS`.
        program: what the user typed before `words`, for the help text.
        words: flags and values.

    Returns:
        The exit code.
    """
    module = importlib.import_module(f"{__name__}.{COMMANDS[command]}")
    parser = argparse.ArgumentParser(
        prog=program,
        description=(module.__doc__ or "").replace("PROGRAM", program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    # Overrides and flags come in any order.
    arguments = parser.parse_intermixed_args(words)
    if hasattr(module, "check"):
        module.check(parser, arguments)
    try:
        implementation = importlib.import_module(f"resnext_det.commands.{COMMANDS[command]}")
    except KeyboardInterrupt:
        sys.stderr.write("stopped by Ctrl-C\n")
        return 130
    return int(implementation.run(arguments) or 0)


def _summary(command: str) -> str:
    module = importlib.import_module(f"{__name__}.{COMMANDS[command]}")
    return (module.__doc__ or "").splitlines()[0]


def _version() -> str:
    try:
        return f"resnext_det {metadata.version('resnext_det')}"
    except metadata.PackageNotFoundError:
        return "resnext_det, not installed"
