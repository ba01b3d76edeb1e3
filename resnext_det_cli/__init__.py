"""The command line `resnext-det COMMAND`, one module per command.

A module holds the help text (its docstring), `add_arguments`, optionally `check` for flags that
exclude each other, and `run`. Importing `resnext_det` takes seconds (torch, Detectron2), so only
`run` does it: `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

COMMANDS = {
    "train": "train",
    "submit": "submit",
    "two-step": "two_step",
    "eval": "eval",
    "predict": "predict",
    "demo": "predict",
    "export": "export",
    "report": "report",
    "push": "push",
    "evaluate": "evaluate",
    "convert": "convert",
    "weights": "weights",
    "eval-imagenet": "eval_imagenet",
    "check-data": "check_data",
    "apply-patch": "apply_patch",
    "how-much-data": "how_much_data",
    "show-data": "show_data",
    "prepare-minival": "prepare_minival",
    "complexity": "complexity",
    "benchmark": "benchmark",
    "paper": "paper",
    "curves": "curves",
    "make-toy-coco": "make_toy_coco",
    "pretrain": "pretrain",
}
"""The module of each command."""


def main(words: Sequence[str] | None = None) -> int:
    """Run `resnext-det` with a command line (default: sys.argv[1:]); return the exit code."""
    words = sys.argv[1:] if words is None else list(words)
    summaries = [f"  {name:22}{_module(name).__doc__.splitlines()[0]}" for name in COMMANDS]
    parser = argparse.ArgumentParser(
        prog="resnext-det",
        description="Train, evaluate and use ResNeXt detectors. Each command has its own --help.",
        epilog="commands:\n" + "\n".join(summaries),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    command = parser.parse_args(words[:1]).command
    return run(command, f"resnext-det {command}", words[1:])


def run_tool(command: str) -> None:
    """Run a command as a script of tools/; exit with its code unless that is 0."""
    if code := run(command, f"python tools/{Path(sys.argv[0]).name}", sys.argv[1:]):
        sys.exit(code)


def run(command: str, program: str, words: Sequence[str]) -> int:
    """Parse `words` and run the command; return the exit code. The help text names `program`."""
    arguments = parse(command, program, words)
    try:
        from resnext_det import require_detectron2
        from resnext_det.errors import reported

        require_detectron2()
    except KeyboardInterrupt:  # the import takes seconds
        return 130
    with reported():
        return int(_module(command).run(arguments) or 0)


def parse(command: str, program: str, words: Sequence[str]) -> argparse.Namespace:
    """Parse and check the words of a command; exit with 2 and a message if they are wrong."""
    module = _module(command)
    parser = argparse.ArgumentParser(
        prog=program,
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    if command == "submit":  # another command follows its flags
        arguments = parser.parse_args(words)
    else:
        arguments = parser.parse_intermixed_args(words)  # flags and overrides in any order
    if hasattr(module, "check"):
        module.check(parser, arguments)
    return arguments


def _module(command: str) -> Any:
    return importlib.import_module(f"{__name__}.{COMMANDS[command]}")


def _version() -> str:
    try:
        return f"resnext_det {metadata.version('resnext_det')}"
    except metadata.PackageNotFoundError:
        return "resnext_det, not installed"
