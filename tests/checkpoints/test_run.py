from __future__ import annotations

import pickle
import platform
from pathlib import Path
from typing import Any

import detectron2
import numpy as np
import pytest
import safetensors.torch
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from torch import nn

from resnext_det.checkpoints.run import read_run
from resnext_det.checkpoints.writing import RUN, export_weights, write_checkpoint
from resnext_det.config import add_resnext_config
from resnext_det.engine.checkpoints import Checkpointer
from resnext_det.errors import WeightsError


def defaults() -> CfgNode:
    cfg = get_cfg()
    add_resnext_config(cfg)
    return cfg


def config() -> CfgNode:
    cfg = defaults()
    cfg.SOLVER.STEPS = (3, 7)
    return cfg


def test_a_checkpoint_tells_of_its_run(tmp_path: Path) -> None:
    best = {"best": np.float32(37.5), "seed": 5}
    checkpointer = Checkpointer(
        nn.Linear(2, 2),
        tmp_path,
        config=config(),
        class_names=("Stoppschild", "自行车"),
        provenance=lambda: best,
    )
    checkpointer.save("model_best", iteration=4)
    run = read_run(tmp_path / "model_best.pth")
    assert run is not None
    read = defaults()
    read.merge_from_other_cfg(CfgNode.load_cfg(run.config))
    assert read.SOLVER == config().SOLVER != defaults().SOLVER
    assert read.MODEL.RESNEXT == config().MODEL.RESNEXT
    assert run.class_names == ("Stoppschild", "自行车")
    assert (run.iteration, run.best, run.provenance["seed"]) == (4, 37.5, 5)
    assert torch.__version__.startswith(run.versions["torch"])
    assert run.versions["python"] == platform.python_version()
    assert run.versions["detectron2"] == detectron2.__version__
    assert {"torchvision", "numpy", "resnext_det"} <= run.versions.keys()
    record = checkpointer.run_record()
    export_weights(checkpointer.model.state_dict(), tmp_path / "ema.pth", record)
    exported = read_run(tmp_path / "ema.pth")
    assert exported is not None and exported.iteration is None
    assert exported.class_names == run.class_names


def test_a_file_of_stock_detectron2_tells_nothing(tmp_path: Path) -> None:
    DetectionCheckpointer(nn.Linear(2, 2), str(tmp_path)).save("stock")
    assert read_run(tmp_path / "stock.pth") is None


GOOD = {"config": "", "class_names": ["a"], "versions": {}, "provenance": {}}


@pytest.mark.parametrize("kind", ["pickle", "before archives", "safetensors"])
def test_files_that_are_no_archives_tell_nothing(kind: str, tmp_path: Path) -> None:
    """Such as the detectors of Detectron2's zoo, which are evaluated and demonstrated as well."""
    file = tmp_path / "model.pkl"
    if kind == "pickle":
        content = {"model": {"weight": np.ones(3)}, "__author__": "Detectron2"}
        file.write_bytes(pickle.dumps(content))
    elif kind == "safetensors":
        safetensors.torch.save_file({"weight": torch.ones(3)}, file)
    else:
        torch.save({"weight": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    assert read_run(file) is None


@pytest.mark.parametrize(
    "record",
    [
        5,
        [],
        "text",
        {},
        {**GOOD, "class_names": "abc"},
        {**GOOD, "class_names": 3},
        {**GOOD, "versions": ["torch"]},
        {**GOOD, "provenance": {"best": "high"}},
        {**GOOD, "provenance": {"best": [1]}},
        {**GOOD, "provenance": None},
    ],
)
def test_rubbish_is_refused(tmp_path: Path, record: Any) -> None:
    write_checkpoint({"model": {"w": torch.ones(1)}, RUN: record}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"a\.pth: what it says about its run cannot be read"):
        read_run(tmp_path / "a.pth")


def test_a_damaged_or_missing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"PK\x03\x04rubbish")
    for name in ("a.pth", "missing.pth"):
        with pytest.raises(WeightsError, match=name):
            read_run(tmp_path / name)
