"""Train a detector, or evaluate one with --eval-only.

    python tools/train_net.py --config-file configs/faster_rcnn_X_50_32x4d_FPN_paper.yaml \
        MODEL.WEIGHTS resnext50_32x4d.pth OUTPUT_DIR output/run

Flags and KEY VALUE overrides come in any order.
"""

from __future__ import annotations

import argparse

from detectron2.config import CfgNode
from detectron2.engine import launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from resnext_det import load_config
from resnext_det.data.checks import check_datasets
from resnext_det.engine.setup import set_up
from resnext_det.engine.trainer import Trainer, evaluate, last_checkpoint
from resnext_det.errors import reported


def parse() -> argparse.Namespace:
    """Return the command line, overrides in `opts`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="or a shipped name")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS")
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT_DIR's checkpoint")
    parser.add_argument("--num-gpus", type=int, default=1, help="on this machine (default: 1)")
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0)
    parser.add_argument("--dist-url", default="auto", help="where the processes meet")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    return parser.parse_intermixed_args()


def run(cfg: CfgNode, arguments: argparse.Namespace) -> None:
    """Train or evaluate, in one of the processes."""
    with reported():
        tested, trained = list(cfg.DATASETS.TEST), list(cfg.DATASETS.TRAIN)
        check_datasets(cfg, tested if arguments.eval_only else [*trained, *tested])
        if arguments.resume:
            last_checkpoint(cfg)  # before anything is written
        set_up(cfg, arguments)
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
        cfg = load_config(arguments.config_file, arguments.opts)
    launch(
        run,
        arguments.num_gpus,
        num_machines=arguments.num_machines,
        machine_rank=arguments.machine_rank,
        dist_url=arguments.dist_url,
        args=(cfg, arguments),
    )


if __name__ == "__main__":
    main()
