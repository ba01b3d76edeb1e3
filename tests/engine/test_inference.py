from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from torch import nn

from resnext_det import load_config
from resnext_det.engine.evaluating import check_expectations
from resnext_det.engine.inference import Remaining, state_digest
from resnext_det.engine.trainer import Trainer
from resnext_det.errors import ConfigError, EvaluationError

TOY = "faster_rcnn_X_26_8x4d_FPN_toy"
NAME = "inference_test"


class Killed(BaseException):
    """What stands for a SIGKILL inside of one process."""


@pytest.fixture
def cfg(datasets: Path, tmp_path: Path) -> Iterator[CfgNode]:
    toy = datasets / "toy_coco"
    annotations = toy / "annotations" / "instances_val2017.json"
    register_coco_instances(NAME, {}, str(annotations), str(toy / "val2017"))
    words = ["DATASETS.TEST", f"('{NAME}',)", "OUTPUT_DIR", str(tmp_path)]
    yield load_config(TOY, [*words, "DATALOADER.NUM_WORKERS", "0"])
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.fixture
def model(cfg: CfgNode) -> nn.Module:
    torch.manual_seed(0)
    built: nn.Module = build_model(cfg)
    return built


class Counting(nn.Module):
    """A model that counts its images, and dies at one of them."""

    def __init__(self, model: nn.Module, last: int = 10**9) -> None:
        super().__init__()
        self.model, self.last, self.images = model, last, 0

    def forward(self, inputs: list[dict[str, Any]]) -> Any:
        self.images += len(inputs)
        if self.images > self.last:
            raise Killed
        return self.model(inputs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.state_dict(*args, **kwargs)


def figures(folder: Path) -> Any:
    return json.loads((folder / "inference" / "metrics.json").read_text())["datasets"][NAME][
        "figures"
    ]


def test_a_killed_evaluation_goes_on_with_what_it_has(
    cfg: CfgNode, model: nn.Module, tmp_path: Path
) -> None:
    whole = Counting(model)
    expected = Trainer.test(cfg, whole)
    assert whole.images == 6
    entry = json.loads((tmp_path / "inference" / "metrics.json").read_text())["datasets"][NAME]
    assert entry["parameters"] == sum(each.numel() for each in model.parameters())
    assert entry["seconds_per_image"] > 0
    assert {"date", "command"} <= set(entry)
    detections = (tmp_path / "inference" / f"detections_{NAME}.json").read_bytes()
    assert len(json.loads(detections)) > 100  # an untrained detector finds things everywhere
    assert not list(tmp_path.rglob("*.partial"))

    with pytest.raises(Killed):
        Trainer.test(cfg, Counting(model, last=4))
    rest = Counting(model)
    again = Trainer.test(cfg, rest)
    assert rest.images == 2
    np.testing.assert_equal(again, expected)
    assert (tmp_path / "inference" / f"detections_{NAME}.json").read_bytes() == detections
    assert not list(tmp_path.rglob("*.partial"))


def test_one_that_was_killed_over_the_figures_needs_no_image(
    cfg: CfgNode, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Trainer.test(cfg, model)
    with monkeypatch.context() as patched:

        def killed(*_: object, **__: object) -> None:
            raise Killed

        patched.setattr("resnext_det.evaluation.evaluator.evaluate_detections", killed)
        with pytest.raises(Killed):
            Trainer.test(cfg, model)
    rest = Counting(model)
    np.testing.assert_equal(Trainer.test(cfg, rest), expected)
    assert rest.images == 0


def test_one_that_was_killed_at_the_last_data_set_repeats_no_other(
    cfg: CfgNode, model: nn.Module, datasets: Path, tmp_path: Path
) -> None:
    cfg.defrost()
    toy = datasets / "toy_coco"
    annotations = toy / "annotations" / "instances_train2017.json"
    register_coco_instances("second_test", {}, str(annotations), str(toy / "train2017"))
    cfg.DATASETS.TEST = (NAME, "second_test")
    try:
        with pytest.raises(Killed):
            Trainer.test(cfg, Counting(model, last=8))
        rest = Counting(model)
        assert set(Trainer.test(cfg, rest)) == {NAME, "second_test"}
        assert rest.images == 10
        assert not list(tmp_path.rglob("*.partial"))
    finally:
        DatasetCatalog.remove("second_test")
        MetadataCatalog.remove("second_test")


@pytest.mark.parametrize("change", ["weights", "size", "limit", "image"])
def test_other_weights_settings_or_images_begin_anew(
    cfg: CfgNode, model: nn.Module, change: str
) -> None:
    with pytest.raises(Killed):
        Trainer.test(cfg, Counting(model, last=4))
    cfg.defrost()
    if change == "size":
        cfg.INPUT.MIN_SIZE_TEST += 8
    if change == "limit":
        cfg.TEST.DETECTIONS_PER_IMAGE = 50
    if change == "weights":
        next(iter(model.parameters())).data.flatten()[0] += 1e-3
    if change == "image":
        file = Path(DatasetCatalog.get(NAME)[0]["file_name"])
        os.utime(file, (1, 1))
    rest = Counting(model)
    Trainer.test(cfg, rest)
    assert rest.images == 6


def test_a_subclass_with_a_loader_of_its_own_goes_on_as_well(
    cfg: CfgNode, model: nn.Module
) -> None:
    class Own(Trainer):
        @classmethod
        def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
            return DefaultTrainer.build_test_loader(cfg, dataset_name)

    with pytest.raises(Killed):
        Own.test(cfg, Counting(model, last=4))
    rest = Counting(model)
    Own.test(cfg, rest)
    assert rest.images == 2


def test_a_killed_rpn_is_one_still(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    torch.manual_seed(0)
    rpn = build_model(cfg)
    expected = Trainer.test(cfg, rpn)
    with monkeypatch.context() as patched:

        def killed(*_: object, **__: object) -> None:
            raise Killed

        patched.setattr("resnext_det.evaluation.evaluator.proposal_figures", killed)
        with pytest.raises(Killed):
            Trainer.test(cfg, rpn)
    rest = Counting(rpn)
    assert Trainer.test(cfg, rest) == expected
    assert rest.images == 0


def test_a_data_set_without_a_file_is_evaluated(
    cfg: CfgNode, model: nn.Module, tmp_path: Path
) -> None:
    expected = Trainer.test(cfg, model)
    records, names = DatasetCatalog.get(NAME), MetadataCatalog.get(NAME).thing_classes
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)
    DatasetCatalog.register(NAME, lambda: records)
    MetadataCatalog.get(NAME).thing_classes = names
    found = Trainer.test(cfg, model)
    # Areas are those of the boxes then, so AP by size may differ.
    for name in ("AP", "AP50", "AR100", f"AP-{names[0]}"):
        assert found["bbox"][name] == pytest.approx(expected["bbox"][name], nan_ok=True)
    assert (tmp_path / "inference" / f"{NAME}_coco_format.json").is_file()


def test_other_weights_do_not_share_a_heading(
    cfg: CfgNode, model: nn.Module, tmp_path: Path
) -> None:
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference" / "metrics.json").write_text(
        json.dumps({"weights": "", "model_sha256": "0" * 64, "datasets": {"other": {}}})
    )
    Trainer.test(cfg, model)
    document = json.loads((tmp_path / "inference" / "metrics.json").read_text())
    assert list(document["datasets"]) == [NAME]
    document["datasets"]["other"] = {}
    (tmp_path / "inference" / "metrics.json").write_text(json.dumps(document))
    Trainer.test(cfg, model)
    document = json.loads((tmp_path / "inference" / "metrics.json").read_text())
    assert set(document["datasets"]) == {NAME, "other"}


def test_an_rpn_alone_gives_the_recall_of_its_proposals(
    cfg: CfgNode, model: nn.Module, tmp_path: Path
) -> None:
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    results = Trainer.test(cfg, build_model(cfg))["box_proposals"]
    assert 0 < results["AR@100"] <= results["AR@1000"] <= 100
    entry = json.loads((tmp_path / "inference" / "metrics.json").read_text())["datasets"][NAME]
    assert entry["proposals"]["AR@300"] == results["AR@300"]


def test_a_data_set_that_lacks_images_of_its_file_is_an_error(
    cfg: CfgNode, model: nn.Module
) -> None:
    records = DatasetCatalog.get(NAME)
    DatasetCatalog.remove(NAME)
    DatasetCatalog.register(NAME, lambda: records[1:])
    with pytest.raises(EvaluationError, match="1 of 6 images were not predicted"):
        Trainer.test(cfg, model)


def test_the_digest_is_of_every_tensor_and_name() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    model[2].to(torch.bfloat16)
    before = state_digest(model)
    assert before == state_digest(model)
    for tensor in model.state_dict().values():
        kept = tensor.clone()
        tensor.flatten()[-1] += 1
        assert state_digest(model) != before
        tensor.copy_(kept)
    assert state_digest(model) == before
    assert state_digest(nn.Sequential(*reversed(model))) != before


def test_what_remains() -> None:
    batches: list[list[dict[str, Any]]] = [[{"image_id": 1}, {"image_id": 2}], [{"image_id": 3}]]
    assert list(Remaining(batches, frozenset([1, 3]))) == [[{"image_id": 2}]]
    assert list(Remaining(batches, frozenset())) == batches
    assert len(Remaining(batches, frozenset([1]))) == 2


@pytest.mark.parametrize(
    "expected",
    [
        [["bbox", "AP", 40.0]],
        [["segm", "AP", 40.0, 1.0]],
        [["bbox", "mAP", 40.0, 1.0]],
        [["bbox", "AP", "40", 1.0]],
        [["bbox", "AP", 40.0, -1.0]],
        [["bbox", "AP-dog", 40.0, 1.0]],
        [40],
    ],
)
def test_expectations_that_nothing_could_meet_are_refused(expected: Any) -> None:
    cfg = load_config(TOY).clone()
    cfg.defrost()
    check_expectations(cfg)
    cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP50", 40, 1.5], ["bbox", "AP-star", 40, 1.5]]
    check_expectations(cfg)
    cfg.TEST.EXPECTED_RESULTS = expected
    with pytest.raises(
        ConfigError, match=r"EXPECTED_RESULTS has the entry .* METRIC are 'bbox' and AP"
    ):
        check_expectations(cfg)


def test_masks_and_keypoints_can_be_expected() -> None:
    words = ["MODEL.MASK_ON", "True", "MODEL.KEYPOINT_ON", "True"]
    words += ["TEST.EXPECTED_RESULTS", "[['segm', 'APs', 1, 1], ['keypoints', 'AR', 1, 1]]"]
    check_expectations(load_config(TOY, words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL.META_ARCHITECTURE", "SemanticSegmentor"], "evaluate with Detectron2's SemSeg"),
        (
            ["MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "5"],
            r"KEYPOINT_OKS_SIGMAS has 0 values",
        ),
        (
            ["MODEL.KEYPOINT_ON", "True", "TEST.KEYPOINT_OKS_SIGMAS", "[0.1]"],
            r"NUM_KEYPOINTS is 17, .* has 1 values",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_the_training(
    words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_expectations(load_config(TOY, words))
    check_expectations(load_config(TOY, [*words, "DATASETS.TEST", "()"]))


def test_panoptic_quality_is_said_not_to_be_evaluated(caplog: pytest.LogCaptureFixture) -> None:
    check_expectations(load_config(TOY, ["MODEL.META_ARCHITECTURE", "PanopticFPN"]))
    assert "none of panoptic or semantic quality" in caplog.text


def test_expectations_are_of_one_data_set() -> None:
    words = ["DATASETS.TEST", "('a', 'b')", "TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 1, 1]]"]
    with pytest.raises(ConfigError, match="is of one data set"):
        check_expectations(load_config(TOY, words))


def test_losses_of_nothing_are_refused() -> None:
    words = ["DATASETS.TEST", "()", "TEST.VALIDATION_LOSS", "True"]
    with pytest.raises(ConfigError, match=r"VALIDATION_LOSS is True and DATASETS\.TEST is empty"):
        check_expectations(load_config(TOY, words))
