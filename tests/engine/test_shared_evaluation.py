"""Evaluations that several processes share, over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import torch
from detectron2.utils import comm
from torch import nn

from resnext_det import load_config
from resnext_det.engine.inference import buffers_of_the_first, model_digest
from resnext_det.errors import EvaluationError
from resnext_det.engine.job import Job
from resnext_det.engine.launch import run_everywhere


def look():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    cfg = load_config("faster_rcnn_X_26_8x4d_FPN_toy")
    rank = comm.get_rank()
    model[1].running_mean += rank
    model[1].num_batches_tracked += rank
    try:
        model_digest(cfg, model)
        raise AssertionError("different statistics were not noticed")
    except EvaluationError as error:
        assert "different weights" in str(error)
    with buffers_of_the_first(model):
        assert model[1].running_mean.tolist() == [0, 0, 0, 0]
        assert model[1].num_batches_tracked == 0
        digests = comm.all_gather(model_digest(cfg, model))
        assert digests[0] == digests[1]
    assert model[1].running_mean.tolist() == [rank] * 4
    assert model[1].num_batches_tracked == rank
    try:
        with buffers_of_the_first(model):
            raise KeyError
    except KeyError:
        assert model[1].running_mean.tolist() == [rank] * 4
    if rank == 0:
        print("looked")


if __name__ == "__main__":
    run_everywhere(look, Job(processes=2), ())
"""


EVALUATION = """
import sys
from pathlib import Path

import torch
from detectron2.modeling import build_model

from resnext_det import load_config
from resnext_det.engine.trainer import Trainer
from resnext_det.engine.job import Job
from resnext_det.engine.launch import run_everywhere


def evaluate(folder):
    # Sums of another number of threads come in another order: what is compared is the sharing.
    torch.set_num_threads(1)
    words = ["OUTPUT_DIR", folder, "DATASETS.TEST", "('toy_coco_train',)"]
    cfg = load_config("faster_rcnn_X_26_8x4d_FPN_toy", [*words, "DATALOADER.NUM_WORKERS", "0"])
    torch.manual_seed(0)
    Trainer.test(cfg, build_model(cfg))


if __name__ == "__main__":
    for processes in (1, 2, 5):  # 12 images: equal shares, and such as are not
        folder = str(Path(sys.argv[1]) / str(processes))
        run_everywhere(evaluate, Job(processes=processes), (folder,))
"""


def test_any_number_of_processes_gives_the_same_to_the_last_digit(
    tmp_path: Path, datasets: Path
) -> None:
    (tmp_path / "evaluation.py").write_text(EVALUATION)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "evaluation.py"), str(tmp_path)],
        env={**os.environ, "DETECTRON2_DATASETS": str(datasets)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    results, entries = [], []
    for processes in ("1", "2", "5"):
        metrics = json.loads((tmp_path / processes / "inference" / "metrics.json").read_text())
        entry = metrics["datasets"]["toy_coco_train"]
        for key in ("date", "seconds_per_image"):
            entry.pop(key, None)
        entries.append(entry)
        file = tmp_path / processes / "inference" / "detections_toy_coco_train.json"
        results.append(file.read_bytes())
    assert results[0] == results[1] == results[2]
    assert entries[0] == entries[1] == entries[2]
    assert len(json.loads(results[0])) > 100


def test_all_evaluate_with_the_statistics_of_the_first_and_train_on_with_their_own(
    tmp_path: Path,
) -> None:
    (tmp_path / "look.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "look.py")], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "looked" in done.stdout
