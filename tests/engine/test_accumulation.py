"""Two processes over gloo and one that accumulates: the same images, choices and weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = """
import argparse
import sys
from pathlib import Path

from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.structures import Boxes

from resnext_det import load_config
from resnext_det.engine.launch import Job, run_everywhere
from resnext_det.engine.setup import set_up
from resnext_det.engine.trainer import Trainer

WORDS = "SOLVER.MAX_ITER 4 SOLVER.STEPS (3,) SOLVER.WARMUP_ITERS 2 SOLVER.IMS_PER_BATCH 4"
WORDS += " SOLVER.REFERENCE_WORLD_SIZE 2 MODEL.PROPOSAL_GENERATOR.NAME DoubleRPN DATASETS.TEST ()"
WORDS += " INPUT.MIN_SIZE_TRAIN (64,80) INPUT.MAX_SIZE_TRAIN 96"
WORDS += " SOLVER.CLIP_GRADIENTS.ENABLED True"
WORDS += " SOLVER.CLIP_GRADIENTS.CLIP_TYPE global_norm SOLVER.EMA.ENABLED True SOLVER.EMA.DECAY 0.5"


@PROPOSAL_GENERATOR_REGISTRY.register()
class DoubleRPN(RPN):
    '''torchvision's NMS takes boxes and scores of one kind, and Detectron2's boxes are floats.'''

    def predict_proposals(self, anchors, logits, deltas, sizes):
        logits, deltas = [each.float() for each in logits], [each.float() for each in deltas]
        return super().predict_proposals(anchors, logits, deltas, sizes)


class DoubleTrainer(Trainer):
    @classmethod
    def build_model(cls, cfg):
        return super().build_model(cfg).double()


def train(folder):
    words = ["OUTPUT_DIR", str(folder), *WORDS.split()]
    cfg = load_config("faster_rcnn_X_26_8x4d_FPN_toy", words)
    set_up(cfg, argparse.Namespace())
    trainer = DoubleTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()


if __name__ == "__main__":
    run_everywhere(train, Job(), (Path(sys.argv[1]) / "accumulated",))
    run_everywhere(train, Job(processes=2), (Path(sys.argv[1]) / "processes",))
"""


def test_accumulation_repeats_what_processes_do(datasets: Path, tmp_path: Path) -> None:
    """In double precision to 1e-10, with a whole Faster R-CNN, its sampling and augmentation."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path)],
        env={**os.environ, "DETECTRON2_DATASETS": str(datasets)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "4 = 1 process x 2 micro-batches x 2 images" in done.stdout
    assert "4 = 2 processes x 1 micro-batch x 2 images" in done.stdout
    one, other = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)
        for name in ("accumulated", "processes")
    )
    for first, second in (
        (one["model"], other["model"]),
        (one["trainer"]["_trainer"]["ema"], other["trainer"]["_trainer"]["ema"]),
    ):
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-10, msg=name)
    moved = one["model"]["backbone.fpn_output3.weight"] - one["trainer"]["_trainer"]["ema"].get(
        "module.backbone.fpn_output3.weight"
    )
    assert one["model"]["roi_heads.box_head.fc1.weight"].dtype == torch.float64
    assert moved.abs().max() > 1e-6  # something was learned
