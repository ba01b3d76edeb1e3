from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from PIL import Image

from resnext_det import load_config
from resnext_det.data.mapper import NamingDatasetMapper
from resnext_det.engine.checkpoints import Checkpointer
from resnext_det.engine.predictor import Predictor, with_threshold
from resnext_det.errors import ConfigError, DatasetError
from resnext_det.images import CHANNELS, read_picture

CLASSES = ("a", "b", "c", "d", "e", "f")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> CfgNode:
    return saved(tmp_path_factory.mktemp("detector"))


def saved(folder: Path, *more: str) -> CfgNode:
    """Return the config of a toy detector with random weights, as the trainer saves it."""
    words = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "8"]
    words += ["INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "96"]
    words += ["MODEL.WEIGHTS", str(folder / "model_final.pth")]
    cfg = load_config("faster_rcnn_X_26_8x4d_FPN_toy", [*words, *more])
    torch.manual_seed(1)
    model = build_model(cfg)
    model.roi_heads.box_predictor.cls_score.weight.data *= 200  # else all are of one class
    Checkpointer(model, folder, config=cfg, class_names=CLASSES).save("model_final")
    return cfg


def noise(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 90, 3), np.uint8)
    return Image.fromarray(pixels)


def stored(kind: str, file: Path) -> Path:
    exif = Image.Exif()
    exif[274] = 6 if kind == "turned" else 1
    picture = noise(0)
    if kind == "16 bits":
        values = np.random.default_rng(0).integers(0, 65536, (60, 90)).astype(np.uint16)
        picture = Image.fromarray(values)
    picture.save(file, exif=exif)
    return file


@pytest.mark.parametrize("kind", ["upright", "turned", "16 bits"])
@pytest.mark.parametrize("pixel_format", CHANNELS)
def test_a_picture_is_seen_as_an_evaluation_sees_it(
    config: CfgNode, kind: str, pixel_format: str, tmp_path: Path
) -> None:
    """In every pixel format, and to the last bit."""
    file = stored(kind, tmp_path / "picture.png")
    channels = CHANNELS[pixel_format]
    words = ["INPUT.FORMAT", pixel_format, "MODEL.PIXEL_MEAN", [1.0] * channels]
    cfg = changed(config, *words, "MODEL.PIXEL_STD", [1.0] * channels)
    width, height = (60, 90) if kind == "turned" else (90, 60)
    mapper = NamingDatasetMapper(cfg, False)
    expected = mapper({"file_name": str(file), "width": width, "height": height})
    predictor = Predictor(config)
    predictor._format = pixel_format
    found = predictor.record(read_picture(file))
    assert found["image"].dtype == expected["image"].dtype
    assert found["image"].shape[0] == channels
    assert torch.equal(found["image"], expected["image"])
    assert (found["width"], found["height"]) == (width, height)


@pytest.mark.parametrize("pixel_format", ["BGR", "RGB", "YUV-BT.601", "HSV", "LAB"])
def test_boxes_are_those_of_an_evaluation(
    config: CfgNode, pixel_format: str, tmp_path: Path
) -> None:
    allowed = ["MODEL.RESNEXT.ALLOW_OTHER_FUNCTION", True]
    cfg = changed(config, "INPUT.FORMAT", pixel_format, *allowed)
    file = stored("turned", tmp_path / "picture.png")
    predictor = Predictor(cfg)
    record = NamingDatasetMapper(cfg, False)({"file_name": str(file), "width": 60, "height": 90})
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
    if pixel_format == "BGR":
        assert len({each.category_index for each in found}) > 1


def test_a_pixel_format_of_other_channels_is_refused(config: CfgNode) -> None:
    with pytest.raises(ConfigError, match=r"INPUT\.FORMAT L has 1 channels"):
        Predictor(changed(config, "INPUT.FORMAT", "L"))
    with pytest.raises(ConfigError, match=r"INPUT\.FORMAT L has 1 channels"):
        NamingDatasetMapper(changed(config, "INPUT.FORMAT", "L"), False)


@pytest.mark.parametrize("picture", [Image.new("RGB", (1, 2000)), Image.new("F", (90, 60))])
def test_pictures_that_cannot_be_looked_at_are_refused(
    config: CfgNode, picture: Image.Image
) -> None:
    with pytest.raises(DatasetError, match=r"a picture of \d+ x \d+ pixels cannot be"):
        Predictor(config)(picture)


def test_a_batch_finds_what_single_pictures_give(config: CfgNode) -> None:
    predictor = Predictor(config)
    pictures = [noise(1), noise(2), noise(3)]  # of one size: what pads a smaller one is seen
    together = predictor.detect([predictor.record(each) for each in pictures])
    assert len(together) == 3
    for picture, found in zip(pictures, together):
        alone = predictor(picture)
        assert [each.box for each in found] == [pytest.approx(e.box, abs=0.01) for e in alone]


@pytest.mark.parametrize("head", ["MASK", "KEYPOINT"])
def test_masks_and_keypoints_are_the_models(head: str, tmp_path: Path) -> None:
    """On the picture, not on the resized image."""
    tested = ["DATASETS.TEST", "('keypoints_coco_2017_val',)"]
    predictor = Predictor(saved(tmp_path, f"MODEL.{head}_ON", "True", *tested))
    record = predictor.record(noise(0))
    with torch.no_grad():
        expected = predictor.model([record])[0]["instances"]
    found = predictor.detect([record])[0]
    assert len(found) == 8
    for number, each in enumerate(found):
        if head == "MASK":
            assert each.keypoints is None and each.mask is not None
            assert each.mask.shape == (60, 90)
            assert np.array_equal(each.mask, expected.pred_masks[number].numpy())
        else:
            assert each.mask is None and each.keypoints is not None
            assert np.array_equal(each.keypoints, expected.pred_keypoints[number].numpy())
    # Of a left ear, which is number 3, and a left eye.
    assert ((3, 1) in predictor.connections) == (head == "KEYPOINT")


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
