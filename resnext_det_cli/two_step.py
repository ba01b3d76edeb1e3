r"""Train the paper's own detector: an RPN, then a Fast R-CNN on its proposals.

    %(prog)s --config-file fast_rcnn_X_50_32x4d_C4_paper --output output/paper \
        MODEL.WEIGHTS resnext://resnext50_32x4d.tv_in1k
    %(prog)s ... --share                           both on one backbone, the RPN's
    %(prog)s ... rpn.SOLVER.MAX_ITER 90000 fast_rcnn.SOLVER.MAX_ITER 90000

Both start from MODEL.WEIGHTS and learn their own backbone (arXiv 1611.05431v2, appendix B). The
same command continues a run that was stopped or killed. OUTPUT/rpn and OUTPUT/fast_rcnn are run
folders as those of train; OUTPUT/proposals has a file for each data set.

A KEY VALUE override counts for both steps; rpn.KEY and fast_rcnn.KEY count for one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resnext_det_cli import flags

STEPS = ("rpn", "fast_rcnn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config-file",
        required=True,
        metavar="FILE",
        help="fast_rcnn_NAME or rpn_NAME, a file or the name of a shipped config; the other step's "
        "is beside it",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="of the run")
    parser.add_argument(
        "--share",
        action="store_true",
        help="keep the RPN's backbone in Fast R-CNN, frozen up to res4, which learns the rest: one "
        "network, as after the last step of Faster R-CNN's alternating training (1506.01497)",
    )
    flags.add_precision(parser)
    flags.add_own_data(parser)
    flags.add_json(parser)
    flags.add_processes(parser)
    flags.add_overrides(parser)
    parser.set_defaults(eval_only=False, resume=False)


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if any(word.rpartition(".")[2] == "OUTPUT_DIR" for word in arguments.opts[::2]):
        parser.error("OUTPUT_DIR follows from --output")
    flags.take_precision(parser, arguments)


def run(arguments: argparse.Namespace) -> None:
    """Check both configs, start the processes, and print the figures."""
    from resnext_det.config import load_config
    from resnext_det.console import json_alone
    from resnext_det.data import custom
    from resnext_det.data.annotations import forget
    from resnext_det.engine.job import Job
    from resnext_det.engine.launch import run_everywhere
    from resnext_det.engine.two_step import TwoStep, train_two_steps
    from resnext_det.files import check_writable
    from resnext_det_cli.train import check_run

    with json_alone(arguments.json) as print_json:
        job = Job.of(arguments)
        check_writable(arguments.output, "--output")
        files = _both(arguments.config_file)
        arguments.config_file = str(files[-1])  # a path, as Detectron2 copies the file into the log
        rpn, fast_rcnn = (
            custom.from_arguments(load_config(file, _overrides(arguments.opts, step)), arguments)
            for step, file in zip(STEPS, files)
        )
        steps = TwoStep.of(arguments.output, rpn, fast_rcnn, arguments, share=arguments.share)
        done = steps.finished()  # refuses a folder of another run
        for cfg in (steps.rpn, steps.fast_rcnn):
            check_run(cfg, arguments, job.world_size)
        if not done:
            steps.check_weights()
        if job.world_size > 1:
            forget()  # each process reads the annotations itself
        run_everywhere(train_two_steps, job, (steps,))
        if job.machine_rank == 0 and not job.local_rank:
            print_json(_report(arguments.output))


def _both(file: str) -> tuple[Path, Path]:
    """Return the configs of both steps, given one of them."""
    from resnext_det.config import locate_config
    from resnext_det.errors import ConfigError, quoted

    given = locate_config(file)
    for step, other in (STEPS, STEPS[::-1]):
        if given.name.startswith(f"{step}_"):
            beside = given.with_name(f"{other}_{given.name.removeprefix(f'{step}_')}")
            if beside.is_file():
                return (given, beside) if step == STEPS[0] else (beside, given)
            raise ConfigError(f"--config-file {quoted(given)}: {quoted(beside)} does not exist.")
    raise ConfigError(
        f"--config-file {quoted(given)}: its name must begin with rpn_ or fast_rcnn_, and the "
        "other step's config be beside it."
    )


def _overrides(words: Sequence[str], step: str) -> list[str]:
    """Return the overrides of one step, without its name."""
    kept: list[str] = []
    for position in range(0, len(words), 2):
        owner, _, key = words[position].partition(".")
        if owner not in STEPS:
            kept += words[position : position + 2]
        elif owner == step:
            kept += [key, *words[position + 1 : position + 2]]
    return kept


def _report(folder: Path) -> dict[str, Any]:
    """Print the figures of both steps; return them by step and data set."""
    from resnext_det.data.annotations import read_json
    from resnext_det.errors import plain
    from resnext_det.evaluation.results_file import metrics_file

    found = {}
    for step, key, names in (
        ("rpn", "proposals", ("AR@100", "AR@300", "AR@1000")),
        ("fast_rcnn", "figures", ("AP", "AP50", "AP75")),
    ):
        file = metrics_file(folder / step)
        found[step] = read_json(file)["datasets"] if file else {}
        for dataset, entry in found[step].items():
            values = ", ".join(
                f"{name} {entry[key][name]:.2f}" for name in names if entry[key][name] is not None
            )
            print(f"{step} on {plain(dataset)}: {values}")
    return found
