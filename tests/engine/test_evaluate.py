"""Evaluations: resumed after a kill, of any model that can be evaluated."""

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
from resnext_det.data.mapper import NamingDatasetMapper
from resnext_det.data.proposals import read_proposals
from resnext_det.engine import inference
from resnext_det.engine.evaluate import check_expectations, evaluate, propose
from resnext_det.engine.trainer import Trainer
from resnext_det.errors import ConfigError

TOY = "faster_rcnn_X_26_8x4d_FPN_toy"
NAMES = ("evaluated_first", "evaluated_second")


class Killed(BaseException):
    """Stands for a SIGKILL, within one process."""


@pytest.fixture
def cfg(datasets: Path, tmp_path: Path) -> Iterator[CfgNode]:
    """A config with the 6 images of the toy minival as test set; 12 others are registered too."""
    toy = datasets / "toy_coco"
    for name, split in zip(NAMES, ("val2017", "train2017")):
        file = toy / "annotations" / f"instances_{split}.json"
        register_coco_instances(name, {}, str(file), str(toy / split))
    words = ["DATASETS.TEST", f"('{NAMES[0]}',)", "OUTPUT_DIR", str(tmp_path)]
    words += ["DATALOADER.NUM_WORKERS", "0", "DATALOADER.DECODER", "pillow"]
    cfg: CfgNode = load_config(TOY, words).clone()
    cfg.defrost()
    yield cfg
    for name in NAMES:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def model(cfg: CfgNode) -> nn.Module:
    torch.manual_seed(0)
    built: nn.Module = build_model(cfg)
    return built


class Counting(nn.Module):
    """A model that counts its images and is killed after the last one allowed."""

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


def document(folder: Path) -> Any:
    return json.loads((folder / "inference" / "metrics.json").read_text())


def test_resumes_after_kill(cfg: CfgNode, model: nn.Module, tmp_path: Path) -> None:
    whole = Counting(model)
    expected = Trainer.test(cfg, whole)
    assert whole.images == 6
    entry = document(tmp_path)["datasets"][NAMES[0]]
    assert entry["parameters"] == sum(each.numel() for each in model.parameters())
    assert entry["seconds_per_image"] > 0
    detections = (tmp_path / "inference" / f"detections_{NAMES[0]}.json").read_bytes()
    assert len(json.loads(detections)) > 100  # an untrained detector detects objects everywhere

    class OwnLoader(Trainer):
        @classmethod
        def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
            return DefaultTrainer.build_test_loader(cfg, dataset_name)

    for trainer in (Trainer, OwnLoader):
        with pytest.raises(Killed):
            trainer.test(cfg, Counting(model, last=4))
        rest = Counting(model)
        np.testing.assert_equal(trainer.test(cfg, rest), expected)
        assert rest.images == 2
        assert (tmp_path / "inference" / f"detections_{NAMES[0]}.json").read_bytes() == detections
        assert not list(tmp_path.rglob("*.partial"))


def test_processes_share_the_rest(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = [record["image_id"] for record in DatasetCatalog.get(NAMES[1])]
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        loader = Trainer.build_test_loader(cfg, NAMES[1])
        inference.share_rest(loader, frozenset(everything[:5]))
        shares.append([record["image_id"] for batch in loader for record in batch])
    assert [len(share) for share in shares] == [4, 3]
    assert shares[0] + shares[1] == everything[5:]


def test_resumes_at_last_data_set(cfg: CfgNode, model: nn.Module, tmp_path: Path) -> None:
    cfg.DATASETS.TEST = NAMES
    with pytest.raises(Killed):
        Trainer.test(cfg, Counting(model, last=8))
    rest = Counting(model)
    assert set(Trainer.test(cfg, rest)) == set(NAMES)
    assert rest.images == 10
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("architecture", ["GeneralizedRCNN", "ProposalNetwork"])
def test_resumes_computing_figures(
    architecture: str, cfg: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg.MODEL.META_ARCHITECTURE = architecture
    torch.manual_seed(0)
    model = build_model(cfg)
    expected = Trainer.test(cfg, model)
    with monkeypatch.context() as patched:

        def killed(*_: object, **__: object) -> None:
            raise Killed

        for name in ("evaluate_detections", "proposal_figures"):
            patched.setattr(f"resnext_det.evaluation.evaluator.{name}", killed)
        with pytest.raises(Killed):
            Trainer.test(cfg, model)
    rest = Counting(model)
    np.testing.assert_equal(Trainer.test(cfg, rest), expected)
    assert rest.images == 0
    if architecture == "ProposalNetwork":
        recall = expected["box_proposals"]
        assert 0 < recall["AR@100"] <= recall["AR@1000"] <= 100
        written = document(tmp_path)["datasets"][NAMES[0]]["proposals"]
        assert written["AR@300"] == recall["AR@300"]


def test_saves_the_proposals_of_one_rpn_for_one_data_set(
    cfg: CfgNode, model: nn.Module, tmp_path: Path
) -> None:
    """Those of Faster R-CNN are the proposals of its RPN."""
    file = tmp_path / "proposals.safetensors"
    found = propose(cfg, model.eval(), {NAMES[0]: file})
    assert 0 < found["box_proposals"]["AR@100"] <= 100
    saved = read_proposals(file)
    for row, record in enumerate(DatasetCatalog.get(NAMES[0])):
        image = NamingDatasetMapper(cfg, False)(record)
        assert image is not None
        with torch.no_grad():
            images = model.preprocess_image([image])
            features = model.backbone(images.tensor)
            (rpn,), _ = model.proposal_generator(images, features, None)
        scale = record["width"] / images.image_sizes[0][1]
        boxes, scores = saved.of(row)
        assert saved.image_ids[row] == record["image_id"]
        np.testing.assert_allclose(boxes, rpn.proposal_boxes.tensor * scale, rtol=0.02, atol=0.5)
        np.testing.assert_array_equal(scores, rpn.objectness_logits)
    with pytest.raises(ConfigError, match="RetinaNet, whose detector has no RPN"):
        cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
        propose(cfg, model.backbone, {NAMES[0]: file})
    cfg.DATASETS.TEST = NAMES
    with pytest.raises(ConfigError, match=r"of one data set, and DATASETS\.TEST names 2"):
        evaluate(cfg, save_proposals=file)


@pytest.mark.parametrize("change", ["weight", "statistics", "size", "limit", "image"])
def test_starts_over_if_inputs_changed(cfg: CfgNode, model: nn.Module, change: str) -> None:
    with pytest.raises(Killed):
        Trainer.test(cfg, Counting(model, last=4))
    if change == "size":
        cfg.INPUT.MIN_SIZE_TEST += 8
    if change == "limit":
        cfg.TEST.DETECTIONS_PER_IMAGE = 50
    if change == "weight":
        next(iter(model.parameters())).data.flatten()[0] += 1e-3
    if change == "statistics":
        dict(model.named_buffers())["backbone.bottom_up.stem.conv1.norm.running_mean"][0] += 1e-3
    if change == "image":
        os.utime(DatasetCatalog.get(NAMES[0])[0]["file_name"], (1, 1))
    rest = Counting(model)
    Trainer.test(cfg, rest)
    assert rest.images == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("MODEL.META_ARCHITECTURE SemanticSegmentor", "use Detectron2's SemSeg"),
        ("MODEL.KEYPOINT_ON True MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS 5", "SIGMAS has 0 values"),
        ("MODEL.KEYPOINT_ON True TEST.KEYPOINT_OKS_SIGMAS [0.1]", "KEYPOINTS is 17, .* 1 values"),
        ("DATASETS.TEST () TEST.VALIDATION_LOSS True", "LOSS is True, but DATASETS.TEST is empty"),
    ],
)
def test_refuses_what_cannot_be_evaluated(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_expectations(load_config(TOY, words.split()))
    words = words.replace("VALIDATION_LOSS True", "VALIDATION_LOSS False")
    check_expectations(load_config(TOY, [*words.split(), "DATASETS.TEST", "()"]))


def test_says_if_panoptic_annotations_are_missing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        check_expectations(load_config(TOY, ["MODEL.META_ARCHITECTURE", "PanopticFPN"]))
    assert "toy_coco_minival has no panoptic annotations" in caplog.text
