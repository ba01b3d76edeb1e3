from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from PIL import Image

from resnext_det import load_config
from resnext_det.data.checks import NamingDatasetMapper
from resnext_det.engine.checkpoints import Checkpointer
from resnext_det.engine.predictor import Predictor, with_threshold
from resnext_det.errors import ConfigError
from resnext_det.looking.pictures import read_picture

CLASSES = ("a", "b", "c", "d", "e", "f")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> CfgNode:
    """A toy detector with random weights, as the trainer saves it."""
    folder = tmp_path_factory.mktemp("detector")
    words = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "8"]
    words += ["INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "96"]
    words += ["MODEL.WEIGHTS", str(folder / "model_final.pth")]
    cfg = load_config("faster_rcnn_X_26_8x4d_FPN_toy", words)
    torch.manual_seed(1)
    model = build_model(cfg)
    model.roi_heads.box_predictor.cls_score.weight.data *= 200  # else all are of one class
    Checkpointer(model, folder, config=cfg, class_names=CLASSES).save("model_final")
    return cfg


def noise(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 90, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_a_picture_is_seen_as_an_evaluation_sees_it(
    config: CfgNode, orientation: int, order: str, tmp_path: Path
) -> None:
    """Upright, in the same order of colours and of the same size: boxes are the same."""
    cfg = config.clone()
    cfg.defrost()
    cfg.INPUT.FORMAT = order
    exif = Image.Exif()
    exif[274] = orientation
    file = tmp_path / "picture.png"
    noise(0).save(file, exif=exif)
    width, height = (90, 60) if orientation == 1 else (60, 90)
    predictor = Predictor(cfg)
    mapper = NamingDatasetMapper(cfg, False)
    record = mapper({"file_name": str(file), "width": width, "height": height})
    with torch.no_grad():
        expected = predictor.model([record])[0]["instances"]
    found = predictor(read_picture(file))
    corners = expected.pred_boxes.tensor
    sizes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1)
    assert len(found) == 8
    torch.testing.assert_close(torch.tensor([each.box for each in found]), sizes)
    torch.testing.assert_close(torch.tensor([each.score for each in found]), expected.scores)
    assert [each.category_index for each in found] == expected.pred_classes.tolist()
    assert [each.name for each in found] == [CLASSES[n] for n in expected.pred_classes]
    assert len({each.category_index for each in found}) > 1


def test_a_batch_finds_what_single_pictures_give(config: CfgNode) -> None:
    predictor = Predictor(config)
    pictures = [noise(1), noise(2), noise(3)]  # of one size: what pads a smaller one is seen
    together = predictor.detect([predictor.record(each) for each in pictures])
    assert len(together) == 3
    for picture, found in zip(pictures, together):
        alone = predictor(picture)
        assert [each.box for each in found] == [pytest.approx(e.box, abs=0.01) for e in alone]


def changed(config: CfgNode, *words: object) -> CfgNode:
    cfg: CfgNode = config.clone()
    cfg.defrost()
    cfg.merge_from_list([str(word) for word in words])
    cfg.freeze()
    return cfg


def test_an_rpn_is_refused_in_words(config: CfgNode) -> None:
    cfg = changed(config, "MODEL.META_ARCHITECTURE", "ProposalNetwork")
    with pytest.raises(ConfigError, match="ProposalNetwork gives proposals without classes"):
        Predictor(cfg)


def test_other_networks_without_boxes_are_refused_in_words(config: CfgNode) -> None:
    predictor = Predictor(config)
    cfg = changed(config, "MODEL.META_ARCHITECTURE", "ProposalNetwork")
    predictor.model = build_model(cfg).eval()
    with pytest.raises(ConfigError, match="GeneralizedRCNN gives proposals; detections have"):
        predictor(noise(0))


def test_a_low_threshold_is_the_detectors_too(config: CfgNode) -> None:
    """And a high one is not: what the detector gives above it is the same without."""
    key = "MODEL.ROI_HEADS.SCORE_THRESH_TEST"
    usual = changed(config, key, 0.6, "TEST.DETECTIONS_PER_IMAGE", 1000)
    assert min(each.score for each in Predictor(usual)(noise(0))) > 0.6
    low = with_threshold(usual, 0.1)
    assert 0.1 < min(each.score for each in Predictor(low)(noise(0))) < 0.3
    assert low.MODEL.RETINANET.SCORE_THRESH_TEST == usual.MODEL.RETINANET.SCORE_THRESH_TEST
    assert with_threshold(usual, 0.01).MODEL.RETINANET.SCORE_THRESH_TEST == 0.01
    assert with_threshold(usual, 0.9) == usual
    assert usual.MODEL.ROI_HEADS.SCORE_THRESH_TEST == 0.6
