"""Where weights came from: by the checkpoint, by a converted file, by the catalog."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resnext_det import model_zoo
from resnext_det.checkpoint_file import RUN, run_record
from resnext_det.report.config import summary_of
from resnext_det.report.weights import weights_facts

CATALOG = "resnext://resnext50_32x4d.tv_in1k"


def checkpoint(file: Path, began_with: str) -> None:
    cfg = model_zoo.get_config("faster_rcnn_X_50_32x4d_FPN_paper").clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = began_with
    record = run_record(cfg, ["star"], {})
    content = {"model": {"a": torch.zeros(2)}, "iteration": 299, RUN: record}
    torch.save(content, file)


def config(weights: str) -> str:
    return (
        f"MODEL: {{WEIGHTS: '{weights}', RESNETS: {{DEPTH: 50, NUM_GROUPS: 32, "
        "WIDTH_PER_GROUP: 4}}\nSOLVER: {MAX_ITER: 1, STEPS: [], BASE_LR: 1, IMS_PER_BATCH: 1}"
    )


def test_a_checkpoint_tells_what_it_was_trained_from(tmp_path: Path) -> None:
    checkpoint(tmp_path / "model_final.pth", CATALOG)
    # As after `--eval-only`, whose config.yaml names the checkpoint; and after a move.
    for name in (str(tmp_path / "model_final.pth"), "elsewhere/model_final.pth"):
        summary = summary_of(config(name))
        facts = weights_facts(tmp_path, name, summary, trained=True)
        if name.startswith("elsewhere"):
            facts = weights_facts(tmp_path, name, None, trained=False)
        assert facts[:3] == [
            ("Weights", name),
            ("Written after", "iteration 300"),
            ("Trained from", CATALOG),
        ]
        (source,) = facts[3:]
        assert source[0] == "Their source"
        assert "BSD-3-Clause" in source[1] and "77.6 % top-1" in source[1]
        assert "://" not in source[1]


def test_an_evaluation_within_a_training_is_of_its_weights(tmp_path: Path) -> None:
    facts = weights_facts(tmp_path, CATALOG, summary_of(config(CATALOG)), trained=True)
    assert facts[:2] == [("Weights", "of this training"), ("Trained from", CATALOG)]
    facts = weights_facts(tmp_path, "", summary_of(config("")), trained=True)
    assert facts == [("Weights", "of this training"), ("Trained from", "nothing, at random")]


def test_a_converted_file_tells_where_it_came_from(tmp_path: Path) -> None:
    file = tmp_path / "x50.pth"
    record = {
        **{"source": "theirs.pth", "sha256": "ab" * 32, "layout": "torchvision", "depth": 50},
        **{"template": "32x4d", "pixels": None, "fused": False, "stride_in_1x1": False},
        **{"name": None, "licence": "MIT", "top1": 77.5, "top5": None},
    }
    torch.save({"model": {"a": torch.zeros(2)}, "resnext_det": record}, file)
    facts = dict(weights_facts(tmp_path, str(file), None, trained=False))
    assert facts["Their source"] == (
        "theirs.pth, licence MIT, 77.5 % top-1 on ImageNet-1K; sha256 abababababababab\u2026"
    )


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x03\x04 no archive", b"\x80\x04]", b"x"])
@pytest.mark.parametrize("name", ["model_final.pth", "weights.pkl"])
def test_files_that_tell_nothing_are_named_alone(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert weights_facts(tmp_path, name, None, trained=False) == [("Weights", name)]


@pytest.mark.parametrize("name", ["", ".", "\0", "x" * 5000, "https://host/a.pkl", "resnext://no"])
def test_names_of_no_file_are_shown_as_they_are(tmp_path: Path, name: str) -> None:
    assert weights_facts(tmp_path, name, None, trained=False) == [("Weights", name)]
