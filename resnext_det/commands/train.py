"""`resnext-det train` and `resnext-det eval`."""

from __future__ import annotations

import argparse
from pathlib import Path

import resnext_det  # isort: skip  # noqa: F401  # before Detectron2: it imports that quietly
from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from resnext_det.config import load_config, locate_config
from resnext_det.config_use import refuse_impossible
from resnext_det.console import json_alone
from resnext_det.data import custom
from resnext_det.data.annotations import forget, read_json
from resnext_det.data.checks import check_datasets
from resnext_det.engine.evaluating import check_expectations, evaluate, last_checkpoint, of_run
from resnext_det.engine.job import Job
from resnext_det.engine.launch import run_everywhere
from resnext_det.engine.schedule import scale
from resnext_det.engine.setup import check_folder, set_up
from resnext_det.engine.trainer import Trainer
from resnext_det.engine.writers import check_wandb
from resnext_det.errors import reported
from resnext_det.evaluation.evaluator import Engine
from resnext_det.evaluation.results_file import metrics_file


def check(cfg: CfgNode, arguments: argparse.Namespace, world_size: int) -> None:
    """Look for what would end the run later, once for all processes."""
    check_expectations(cfg)
    refuse_impossible(cfg, world_size, training=not arguments.eval_only)
    Engine(cfg.TEST.ENGINE)  # refuses one that is not known
    tested, trained = list(cfg.DATASETS.TEST), list(cfg.DATASETS.TRAIN)
    names = tested if arguments.eval_only else [*trained, *tested]
    check_datasets(cfg, names, ignore_health=arguments.ignore_health)
    if arguments.eval_only:
        if arguments.resume:
            last_checkpoint(cfg)
        return
    check_wandb(cfg)
    scale(cfg, world_size)
    check_folder(
        cfg,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        weights_given="MODEL.WEIGHTS" in arguments.opts[::2],
    )


def work(cfg: CfgNode, arguments: argparse.Namespace) -> None:
    """Train or evaluate, in one of the processes."""
    custom.register_arguments(arguments)
    folder = set_up(cfg, arguments)
    if comm.is_main_process():
        custom.record(cfg, folder)
    if arguments.eval_only:
        results = evaluate(cfg, resume=arguments.resume)
        if comm.is_main_process():
            verify_results(cfg, results)
        return
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=arguments.resume)
    trainer.train()


def run(arguments: argparse.Namespace) -> None:
    """Read the config and start as many processes as asked for."""
    with json_alone(arguments.json) as print_json:
        with reported():
            job = Job.of(arguments)
            if arguments.run:
                arguments.config_file, weights = of_run(arguments.run)
                given = ["OUTPUT_DIR", str(arguments.run)]
                if arguments.eval_only:  # a training that continues finds its checkpoint itself
                    given += ["MODEL.WEIGHTS", str(weights)]
                arguments.opts = [*given, *arguments.opts]
            # A path, also for a shipped name: Detectron2 copies the file into the log.
            arguments.config_file = str(locate_config(arguments.config_file))
            if arguments.cross_check:
                arguments.opts += ["TEST.CROSS_CHECK", "True"]
            cfg = load_config(arguments.config_file, arguments.opts)
            cfg = custom.from_arguments(cfg, arguments)
            check(cfg, arguments, job.world_size)
            if job.world_size > 1:
                forget()  # the processes read for themselves
        run_everywhere(work, job, (cfg, arguments))
        if arguments.json and job.machine_rank == 0 and not job.local_rank:
            file = metrics_file(Path(cfg.OUTPUT_DIR))
            print_json(read_json(file) if file else {})
