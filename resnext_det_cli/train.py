r"""Train a detector, or evaluate one with --eval-only.

    %(prog)s --data photos --output output/photos --dry-run    the plan for your own data
    %(prog)s --data photos --output output/photos --model x101 --epochs 30
    %(prog)s --config-file configs/faster_rcnn_X_50_32x4d_FPN_paper.yaml \
        MODEL.WEIGHTS resnext50_32x4d.pth OUTPUT_DIR output/run
    %(prog)s --config-file output/run/config.yaml --resume
    %(prog)s --run output/run --eval-only

Flags and KEY VALUE overrides come in any order. On SIGTERM or Ctrl-C the training saves a
checkpoint and exits with code 75: continue it with --resume.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from resnext_det_cli import flags

MODELS = ("x50", "x101")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_config(parser, run=True, required=False)
    switches = {
        "--eval-only": "evaluate MODEL.WEIGHTS",
        "--resume": "continue from OUTPUT_DIR's checkpoint",
        "--overwrite": "replace the training in OUTPUT_DIR",
        "--json": "with --eval-only: print only metrics.json",
    }
    for name, meaning in switches.items():
        parser.add_argument(name, action="store_true", help=meaning)
    parser.set_defaults(save_proposals=None, artifact=None)
    flags.add_precision(parser)
    flags.add_cross_check(parser)
    _add_folder(parser)
    flags.add_own_data(parser)
    flags.add_processes(parser, elastic=True)
    flags.add_overrides(parser)


def _add_folder(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a folder of your own data")
    flags.add_data(group)
    group.add_argument("--model", choices=MODELS, help="ResNeXt-50 or 101, 32x4d (default: x50)")
    group.add_argument("--epochs", type=float, metavar="N", help="passes over the images")
    group.add_argument("--output", type=Path, metavar="RUN", help="the run (default: output/NAME)")
    group.add_argument(
        "--write", action="store_true", help="keep the split in the folder, in resnext_det/"
    )
    group.add_argument("--dry-run", action="store_true", help="print the plan, and stop")


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if not (arguments.config_file or arguments.run or arguments.data):
        parser.error("name what to train: --data FOLDER, --config-file or --run")
    _check_folder_flags(parser, arguments)
    if arguments.run and not (arguments.eval_only or arguments.resume):
        parser.error("--run evaluates or continues a run: add --eval-only or --resume")
    if arguments.resume and isinstance(arguments.run, str):
        parser.error(f"--resume needs the folder of a training, and {arguments.run!r} is not one")
    if arguments.json and not arguments.eval_only:
        parser.error("--json prints figures: add --eval-only")
    flags.take_precision(parser, arguments)


def _check_folder_flags(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if not arguments.data:
        of_folder = ("layout", "model", "epochs", "output", "write", "dry_run")
        given = [f"--{name.replace('_', '-')}" for name in of_folder if getattr(arguments, name)]
        if given:
            parser.error(f"{', '.join(given)} is for --data FOLDER")
        return
    if arguments.run or arguments.eval_only or arguments.train_json or arguments.test_json:
        parser.error(
            "--data trains on a folder: leave out --run, --eval-only, --train-json and so on"
        )
    if arguments.model and arguments.config_file:
        parser.error("--model and --config-file both name a detector: give one")
    if arguments.epochs is not None and not 0 < arguments.epochs < 1e6:
        parser.error(f"--epochs is {arguments.epochs:g}; it must be more than 0")
    overridden = arguments.opts[::2]
    if arguments.output and "OUTPUT_DIR" in overridden:
        parser.error("--output and OUTPUT_DIR both name the run: give one")
    if arguments.epochs and "SOLVER.MAX_ITER" in overridden:
        parser.error("--epochs and SOLVER.MAX_ITER both set the length: give one")
    arguments.model = arguments.model or MODELS[0]


def run(arguments: argparse.Namespace) -> None:
    """Read the config, check it, and start the processes."""
    from resnext_det.config import load_config, locate_config
    from resnext_det.console import json_alone
    from resnext_det.data import custom
    from resnext_det.data.annotations import forget, read_json
    from resnext_det.data.proposals import check_proposals
    from resnext_det.engine.evaluate import of_run
    from resnext_det.engine.job import Job
    from resnext_det.engine.launch import run_everywhere
    from resnext_det.engine.own_data import take_folder
    from resnext_det.engine.setup import check_folder
    from resnext_det.evaluation.results_file import metrics_file

    with json_alone(arguments.json) as print_json:
        job = Job.of(arguments)
        if (job.is_elastic or job.is_restarted) and not arguments.eval_only:
            arguments.resume = True
        if arguments.data:
            alone = job.machines == 1 and job.local_rank is None
            plan = take_folder(arguments, job.world_size, alone=alone)
            if not job.local_rank:
                print(plan)
            if arguments.dry_run:
                return
        if arguments.artifact:
            _take_artifact(arguments)
        elif arguments.run:
            arguments.config_file, weights = of_run(arguments.run)
            given = ["OUTPUT_DIR", str(flags.output_of(arguments.run))]
            if arguments.eval_only:  # a resumed training finds its checkpoint itself
                given += ["MODEL.WEIGHTS", str(weights)]
            arguments.opts = [*given, *arguments.opts]
        # A path even for a shipped name: Detectron2 copies the file into the log.
        arguments.config_file = str(locate_config(arguments.config_file))
        if arguments.cross_check:
            arguments.opts += ["TEST.CROSS_CHECK", "True"]
        cfg = load_config(arguments.config_file, arguments.opts)
        cfg = custom.from_arguments(cfg, arguments)
        check_run(cfg, arguments, job.world_size, elastic=job.is_elastic)
        if cfg.MODEL.LOAD_PROPOSALS:
            check_proposals(cfg, training=not arguments.eval_only)
        if not arguments.eval_only:
            check_folder(
                cfg,
                resume=arguments.resume,
                overwrite=arguments.overwrite,
                weights_given="MODEL.WEIGHTS" in arguments.opts[::2],
            )
        if job.world_size > 1:
            forget()  # each process reads the annotations itself
        run_everywhere(_work, job, (cfg, arguments))
        if arguments.json and job.machine_rank == 0 and not job.local_rank:
            file = metrics_file(Path(cfg.OUTPUT_DIR))
            print_json(read_json(file) if file else {})


def _take_artifact(arguments: argparse.Namespace) -> None:
    """Read an artifact's metadata, and set the config to evaluate it with."""
    from resnext_det.engine.evaluate import of_run
    from resnext_det.errors import ConfigError, quoted
    from resnext_det.export.evaluating import settings
    from resnext_det.runtime import load

    description = load(arguments.artifact).description
    if not arguments.config_file:
        if isinstance(arguments.run, str):  # an address; one that the artifact names is not fetched
            arguments.config_file = of_run(arguments.run)[0]
        else:
            source = arguments.run or (Path(description.run) if description.run else None)
            if source is None or not (source / "config.yaml").is_file():
                reason = f"{quoted(source)} holds no config.yaml" if source else "it records no run"
                raise ConfigError(
                    f"the data to evaluate {quoted(arguments.artifact)} on is unknown: {reason}. "
                    "Name a run with --run FOLDER, or a config with --config-file FILE."
                )
            arguments.config_file = source / "config.yaml"
    arguments.opts = [*settings(description, arguments.artifact), *arguments.opts]


def check_run(
    cfg: Any, arguments: argparse.Namespace, world_size: int, *, elastic: bool = False
) -> None:
    """Fail now, once for all processes, on what would end the run later."""
    from resnext_det.config_rules import refuse_impossible
    from resnext_det.data.checks import check_datasets
    from resnext_det.engine.evaluate import check_expectations, last_checkpoint
    from resnext_det.engine.schedule import scale
    from resnext_det.engine.writers import check_wandb
    from resnext_det.errors import ConfigError
    from resnext_det.evaluation.coco import Engine

    check_expectations(cfg)
    refuse_impossible(cfg, world_size, training=not arguments.eval_only)
    Engine(cfg.TEST.ENGINE)  # refuses an unknown one
    tested, trained = list(cfg.DATASETS.TEST), list(cfg.DATASETS.TRAIN)
    names = tested if arguments.eval_only else [*trained, *tested]
    check_datasets(cfg, names, ignore_health=arguments.ignore_health)
    if arguments.eval_only:
        if arguments.resume:
            last_checkpoint(cfg)
        return
    check_wandb(cfg)
    _, plan = scale(cfg, world_size)
    if elastic and not plan.fixed:
        raise ConfigError(
            f"--nnodes {arguments.nnodes} needs micro-batches that do not depend on the number of "
            f"processes, up to {world_size}: set SOLVER.IMS_PER_MICRO_BATCH to a divisor of "
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} up to "
            f"{cfg.SOLVER.IMS_PER_BATCH // world_size}, and SOLVER.SCALING accumulate."
        )


def _work(cfg: Any, arguments: argparse.Namespace) -> None:
    """Train or evaluate in one of the processes."""
    from detectron2.evaluation import verify_results
    from detectron2.utils import comm

    from resnext_det.data import custom
    from resnext_det.engine.evaluate import evaluate
    from resnext_det.engine.setup import set_up
    from resnext_det.engine.trainer import Trainer
    from resnext_det.export.evaluating import evaluate_artifact

    custom.register_arguments(arguments)
    folder = set_up(cfg, arguments)
    if comm.is_main_process():
        custom.record(cfg, folder)
    if arguments.eval_only:
        if arguments.artifact:
            results = evaluate_artifact(cfg, arguments.artifact)
        else:
            proposals = arguments.save_proposals
            results = evaluate(cfg, resume=arguments.resume, save_proposals=proposals)
        if comm.is_main_process():
            verify_results(cfg, results)
        return
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=arguments.resume)
    trainer.train()
