"""Trainings that are killed, told to stop, or shared out otherwise, and end with the same weights.

Each training is a process of its own, of a server that has imported everything before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = '''
import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

ITERATIONS, PERIOD = 12, 3
MEASURED = "time data_time rank_data_time images_per_second memory_mib".split()
WORDS = ["SOLVER.MAX_ITER", ITERATIONS, "SOLVER.STEPS", "(8,)", "SOLVER.WARMUP_ITERS", 3]
WORDS += ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.CHECKPOINT_PERIOD", PERIOD, "SOLVER.KEEP_LAST", 0]
WORDS += ["INPUT.MIN_SIZE_TRAIN", "(64, 80)", "INPUT.MAX_SIZE_TRAIN", 96, "TEST.EVAL_PERIOD", 6]
WORDS += ["INPUT.MIN_SIZE_TEST", 64]
WORDS += ["SOLVER.EMA.ENABLED", "True", "SOLVER.EMA.DECAY", 0.9]


def config(folder, *more):
    from resnext_det import load_config

    words = [*WORDS, "OUTPUT_DIR", folder, *more]
    return load_config("faster_rcnn_X_26_8x4d_FPN_toy", [str(word) for word in words])


def train(folder, *more):
    from resnext_det.engine.setup import set_up
    from resnext_det.engine.trainer import Trainer

    os.setsid()  # a group of its own, with its workers
    cfg = config(folder, *more)
    set_up(cfg, argparse.Namespace())
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()


def began(folder):
    """How many iterations are in the log of numbers, whole or not."""
    file = Path(folder) / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def start(context, folder, *more):
    process = context.Process(target=train, args=(str(folder), *more))
    process.start()
    return process


def finish(context, folder, *more):
    process = start(context, folder, *more)
    process.join()
    return process.exitcode


def kill_at(context, number, moment, folder, *more):
    """Start a training, and send a signal once it has come to an iteration, and a bit later."""
    process = start(context, folder, *more)
    while process.is_alive() and began(folder) < moment:
        time.sleep(0.005)
    time.sleep(random.random() * 0.3)
    # As a terminal or a scheduler does: all of the group, workers included.
    os.killpg(process.pid, number)
    process.join()
    return process.exitcode


def weights(folder):
    import torch

    content = torch.load(Path(folder) / "model_final.pth", weights_only=True)
    tensors = dict(content["model"])
    tensors |= {f"ema {k}": v for k, v in content["trainer"]["_trainer"]["ema"].items()}
    momentum = content["trainer"]["_trainer"]["optimizer"]["state"]
    return tensors | {f"momentum {k}": v["momentum_buffer"] for k, v in momentum.items()}


def unequal(one, other):
    import torch

    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def rows(folder):
    """The log of numbers, but for times and memory."""
    found = []
    for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.append({k: v for k, v in row.items() if k not in MEASURED})
    return [json.dumps(row, sort_keys=True) for row in found]


def main(folder, kills):
    random.seed()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resnext_det.engine.trainer", "resnext_det.engine.setup"])
    found = {"whole": finish(context, folder / "whole")}
    for workers in (0, 2):
        run, more = folder / f"killed{workers}", ("DATALOADER.NUM_WORKERS", workers)
        moments = sorted(random.sample(range(1, ITERATIONS), kills))
        found[f"killed{workers}"] = [
            [moment, kill_at(context, signal.SIGKILL, moment, run, *more)] for moment in moments
        ] + [["end", finish(context, run, *more)]]
        found[f"unequal{workers}"] = unequal(folder / "whole", run)
        found[f"same log{workers}"] = rows(folder / "whole") == rows(run)
    stopped = folder / "stopped"
    found["stopped"] = kill_at(context, signal.SIGTERM, 4, stopped, "DATALOADER.NUM_WORKERS", 2)
    found["pointer"] = (stopped / "last_checkpoint").read_text()
    found["went on"] = finish(context, stopped)
    found["unequal stopped"] = unequal(folder / "whole", stopped)
    found["same log stopped"] = rows(folder / "whole") == rows(stopped)
    found["iterations"] = [json.loads(row)["iteration"] for row in rows(folder / "whole")]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
'''


@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_killed_training_ends_with_the_same_weights_and_log(
    kills: int, datasets: Path, tmp_path: Path
) -> None:
    """To the last bit: weights, momentum, moving average and the log; with 0 and 2 workers."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path), str(kills)],
        env={**os.environ, "DETECTRON2_DATASETS": str(datasets)},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["whole"] == found["went on"] == 0
    for workers in (0, 2):
        *killed, end = found[f"killed{workers}"]
        assert [code for _, code in killed] == [-9] * kills and end == ["end", 0], found
        assert found[f"unequal{workers}"] == [], (workers, killed)
        assert found[f"same log{workers}"], (workers, killed)
    assert found["stopped"] == 75 and found["pointer"].startswith("model_00000")
    assert found["unequal stopped"] == []
    assert found["same log stopped"]
    assert found["iterations"] == list(range(12))
