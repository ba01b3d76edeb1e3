"""Train a detector, or evaluate one with --eval-only.

    python tools/train_net.py --config-file configs/faster_rcnn_X_50_32x4d_FPN_paper.yaml \
        MODEL.WEIGHTS resnext50_32x4d.pth OUTPUT_DIR output/run

Flags and KEY VALUE overrides come in any order. A training that SIGTERM or Ctrl-C ended has saved
itself and exits with code 75: start it again with --resume.
"""

from __future__ import annotations

import argparse

import resnext_det  # isort: skip  # noqa: F401  # before Detectron2: it imports that quietly
from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from resnext_det.config import load_config, locate_config
from resnext_det.config_use import refuse_impossible
from resnext_det.data import custom
from resnext_det.data.annotations import forget
from resnext_det.data.checks import check_datasets
from resnext_det.engine.evaluating import check_expectations, evaluate, last_checkpoint
from resnext_det.engine.job import Job, add_arguments
from resnext_det.engine.launch import run_everywhere
from resnext_det.engine.schedule import scale
from resnext_det.engine.setup import check_folder, set_up
from resnext_det.engine.trainer import Trainer
from resnext_det.engine.writers import check_wandb
from resnext_det.errors import reported
from resnext_det.evaluation.evaluator import Engine


def parse() -> argparse.Namespace:
    """Return the command line, overrides in `opts`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="or a shipped name")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS")
    parser.add_argument(
        "--resume", action="store_true", help="continue from OUTPUT_DIR's checkpoint"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a training in OUTPUT_DIR")
    parser.add_argument(
        "--cross-check", action="store_true", help="figures by hotcoco and pycocotools"
    )
    custom.add_arguments(parser)
    add_arguments(parser)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    return parser.parse_intermixed_args()


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


def run(cfg: CfgNode, arguments: argparse.Namespace) -> None:
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


def main() -> None:
    """Read the config and start as many processes as asked for."""
    arguments = parse()
    with reported():
        job = Job.of(arguments)
        # A path, also for a shipped name: Detectron2 copies the file into the log.
        arguments.config_file = str(locate_config(arguments.config_file))
        if arguments.cross_check:
            arguments.opts += ["TEST.CROSS_CHECK", "True"]
        cfg = load_config(arguments.config_file, arguments.opts)
        cfg = custom.from_arguments(cfg, arguments)
        check(cfg, arguments, job.world_size)
        if job.world_size > 1:
            forget()  # the processes read for themselves
    run_everywhere(run, job, (cfg, arguments))


if __name__ == "__main__":
    main()
