"""`resnext-det how-much-data`, in miniature."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from resnext_det.data.layouts import Part
from resnext_det_cli import main

from ..data.test_folder import yolo

TINY = ["MODEL.WEIGHTS", "", "INPUT.MIN_SIZE_TRAIN", 64, "INPUT.MIN_SIZE_TEST", 64]
TINY += ["SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0]


def test_trains_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    data, run = yolo(tmp_path / "data", 12), tmp_path / "run"
    words = ["train", "--data", data, "--output", run, "--epochs", "1"]
    words += ["--config-file", "faster_rcnn_X_26_8x4d_FPN_toy", *TINY]
    assert main([str(word) for word in words]) == 0
    command = ["how-much-data", "--run", str(run), "--iterations", "3"]
    folder = run / "how_much_data"
    capfd.readouterr()
    assert main([*command, "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed == json.loads((folder / "how_much_data.json").read_text())
    assert printed["images"][0] < printed["images"][1] < printed["images"][2]
    assert not printed["supported"] and printed["expected"] is None  # three updates teach nothing
    metrics = [
        folder / f"{share}_percent" / "inference" / "metrics.json" for share in (25, 50, 100)
    ]
    written = [each.stat().st_mtime_ns for each in metrics]
    metrics[2].unlink()
    assert main(command) == 0  # only what is missing
    assert [each.stat().st_mtime_ns for each in metrics[:2]] == written[:2]
    assert metrics[2].is_file()
    assert "No forecast" in capfd.readouterr().out
    with pytest.raises(SystemExit):
        main([*command, "--seed", "1"])
    assert "other settings or data. Add --overwrite" in capfd.readouterr().err
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Part, "annotated", 7)
        main([*command, "--overwrite"])
    assert "have 7, 7, 7 images with objects, similar ones" in capfd.readouterr().err
    assert metrics[2].is_file()
    with pytest.raises(SystemExit):  # in the first training
        main([*command, "--overwrite", "MODEL.WEIGHTS", "missing.pth"])
    assert not any(each.exists() for each in metrics)  # would be taken for those of this command
