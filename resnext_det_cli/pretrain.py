r"""Train a classifier of images, from whose weights a detector can start.

    %(prog)s --recipe imagenet1k --data imagenet --output output/x50
    %(prog)s --recipe cifar10 --data cifar --download --template 8x64d --output output/c10
    %(prog)s --recipe folder --data photos --output output/mine SOLVER.MAX_EPOCHS 30
    %(prog)s --output output/x50 --resume
    %(prog)s --output output/x50 --eval-only

--recipe imagenet1k, imagenet5k and folder read DATA/train/CLASS/IMAGE and DATA/val/CLASS/IMAGE;
cifar10 and cifar100 the official files; toy, for the demonstration, crops of the toy data set.
MODEL.WEIGHTS OUTPUT/model_final.pth then starts a detector from it. On SIGTERM or Ctrl-C the
training saves a checkpoint and exits with code 75: continue it with --resume. --eval-only tests
RUN's last checkpoint, or MODEL.WEIGHTS FILE, as the training does.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from resnext_det_cli import flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="NAME", help="of configs/pretrain_NAME.yaml, or a file")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the images")
    parser.add_argument("--output", type=Path, metavar="RUN", required=True, help="a folder")
    parser.add_argument("--depth", type=int, metavar="N", help="layers, such as 50")
    parser.add_argument("--template", metavar="CxDd", help="cardinality and width, such as 32x4d")
    parser.add_argument("--synsets", type=Path, metavar="FILE", help="the class folders to take")
    parser.add_argument("--download", action="store_true", help="fetch CIFAR if it is missing")
    parser.add_argument("--resume", action="store_true", help="continue from RUN's checkpoint")
    parser.add_argument("--eval-only", action="store_true", help="test RUN's weights again")
    parser.add_argument("--overwrite", action="store_true", help="replace the training in RUN")
    flags.add_precision(parser)
    flags.add_processes(parser)
    flags.add_overrides(parser)


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    flags.take_precision(parser, arguments)
    if arguments.eval_only and (arguments.recipe or arguments.resume or arguments.overwrite):
        parser.error(
            "--eval-only tests the training in --output: leave out --recipe, --resume, --overwrite"
        )
    if not (arguments.recipe or arguments.resume or arguments.eval_only):
        parser.error("--recipe is missing, or --resume to continue a training")
    if arguments.recipe and not arguments.data and arguments.recipe != "toy":
        parser.error("--data is missing: the folder of the images")


def run(arguments: argparse.Namespace) -> None:
    """Read the recipe, check it and its data, and start the processes."""
    from resnext_det.config import load_config, recipe
    from resnext_det.data.classification import download_cifar
    from resnext_det.data.registered import TOY_FOLDER, datasets_root
    from resnext_det.engine.classifier import prepared
    from resnext_det.engine.evaluate import of_run
    from resnext_det.engine.job import Job
    from resnext_det.engine.launch import run_everywhere
    from resnext_det.engine.schedule import scale
    from resnext_det.engine.setup import check_folder
    from resnext_det.engine.writers import check_wandb
    from resnext_det.errors import ConfigError
    from resnext_det.modeling.template import Template

    job = Job.of(arguments)
    given = ["OUTPUT_DIR", str(arguments.output)]
    if arguments.eval_only:
        config, weights = of_run(arguments.output)
        arguments.config_file = str(config)
        given += ["MODEL.WEIGHTS", str(weights)]
    elif arguments.recipe is None:
        arguments.config_file = str(arguments.output / "config.yaml")
    elif Path(arguments.recipe).is_file():
        arguments.config_file = arguments.recipe
    else:
        arguments.config_file = str(recipe(arguments.recipe))
    if arguments.recipe == "toy" and not arguments.data:
        arguments.data = datasets_root() / TOY_FOLDER
    if arguments.data:
        given += ["CLASSIFICATION.DATA", str(arguments.data.absolute())]
    if arguments.synsets:
        given += ["CLASSIFICATION.SYNSETS", str(arguments.synsets.absolute())]
    if arguments.depth is not None:
        given += ["MODEL.RESNETS.DEPTH", str(arguments.depth)]
    if arguments.template:
        template = Template(arguments.template)
        given += ["MODEL.RESNETS.NUM_GROUPS", str(template.cardinality)]
        given += ["MODEL.RESNETS.WIDTH_PER_GROUP", str(template.width)]
    keys = arguments.opts[::2]
    if "SOLVER.MAX_ITER" in keys and "SOLVER.MAX_EPOCHS" not in keys:
        given += ["SOLVER.MAX_EPOCHS", "0"]  # which would replace it
    cfg = load_config(arguments.config_file, [*given, *arguments.opts])
    if arguments.download:
        layout = cfg.CLASSIFICATION.LAYOUT
        if not layout.startswith("cifar"):
            raise ConfigError(f"--download fetches CIFAR, and this recipe's data is a {layout}.")
        download_cifar(Path(cfg.CLASSIFICATION.DATA), layout)
    if not arguments.eval_only:
        check_folder(cfg, resume=arguments.resume, overwrite=arguments.overwrite)
        check_wandb(cfg)
    cfg = prepared(
        cfg,
        classes_given="CLASSIFICATION.NUM_CLASSES" in keys,
        check_images=bool(arguments.recipe),
    )
    scale(cfg, job.world_size)
    run_everywhere(_work, job, (cfg, arguments))


def _work(cfg: Any, arguments: argparse.Namespace) -> None:
    """Train or test in one of the processes."""
    from resnext_det.engine.classifier import ClassifierTrainer, evaluate
    from resnext_det.engine.setup import set_up

    set_up(cfg, arguments)
    if arguments.eval_only:
        evaluate(cfg)
        return
    trainer = ClassifierTrainer(cfg)
    trainer.resume_or_load(resume=arguments.resume)
    trainer.train()
