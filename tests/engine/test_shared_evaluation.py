"""Two processes over gloo whose batch norms have seen different images."""

from __future__ import annotations

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
from resnext_det.launching.launch import run_everywhere
from resnext_det.launching.processes import Where


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
    run_everywhere(look, Where(processes=2), ())
"""


def test_all_evaluate_with_the_statistics_of_the_first_and_train_on_with_their_own(
    tmp_path: Path,
) -> None:
    (tmp_path / "look.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "look.py")], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "looked" in done.stdout
