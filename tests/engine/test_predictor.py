from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from PIL import Image

from resnext_det import load_config
from resnext_det.data.mapper import NamingDatasetMapper
from resnext_det.engine.checkpoints import Checkpointer
from resnext_det.engine.predictor import Predictor, with_threshold
from resnext_det.errors import ConfigError, DatasetError
from resnext_det.images import CHANNELS, read_picture

CLASSES = ("a", "b", "c", "d", "e", "f")


def saved(folder: Path, *more: object) -> CfgNode:
    """Return the config of a toy detector with random weights, as the trainer saves it."""
    words = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 8]
    words += ["INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 96]
    words += ["MODEL.WEIGHTS", folder / "model_final.pth", *more]
    cfg = load_config("faster_rcnn_X_26_8x4d_FPN_toy", [str(word) for word in words])
    torch.manual_seed(1)
    model = build_model(cfg)
    model.roi_heads.box_predictor.cls_score.weight.data *= 200  # else all are of one class
    Checkpointer(model, folder, config=cfg, class_names=CLASSES).save("model_final")
    return cfg


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> CfgNode:
    return saved(tmp_path_factory.mktemp("detector"))


@pytest.fixture(scope="module")
def predictor(config: CfgNode) -> Predictor:
    return Predictor(config)


def changed(config: CfgNode, *words: object) -> CfgNode:
    cfg: CfgNode = config.clone()
    cfg.defrost()
    cfg.merge_from_list([str(word) for word in words])
    cfg.freeze()
    return cfg


def noise(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 90, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kind", ["upright", "rotated", "16 bits"])
def test_record_matches_dataset_mapper(kind: str, config: CfgNode, tmp_path: Path) -> None:
    """To the last bit, in every pixel format."""
    file = tmp_path / "picture.png"
    picture, exif = noise(0), Image.Exif()
    exif[274] = 6 if kind == "rotated" else 1
    if kind == "16 bits":
        values = np.random.default_rng(0).integers(0, 65536, (60, 90)).astype(np.uint16)
        picture = Image.fromarray(values)
    picture.save(file, exif=exif)
    width, height = (60, 90) if kind == "rotated" else (90, 60)
    predictor = Predictor(config)
    for pixel_format, channels in CHANNELS.items():
        words = ["INPUT.FORMAT", pixel_format, "MODEL.PIXEL_MEAN", [1.0] * channels]
        cfg = changed(config, *words, "MODEL.PIXEL_STD", [1.0] * channels)
        mapper = NamingDatasetMapper(cfg, False)
        expected = mapper({"file_name": str(file), "width": width, "height": height})
        predictor._format = pixel_format
        found = predictor.record(read_picture(file))
        assert found["image"].dtype == expected["image"].dtype
        assert torch.equal(found["image"], expected["image"])
        assert (found["width"], found["height"]) == (width, height)


@pytest.mark.parametrize("pixel_format", ["BGR", "RGB"])
@pytest.mark.parametrize("head", ["", "MASK", "KEYPOINT"])
def test_matches_default_predictor(head: str, pixel_format: str, tmp_path: Path) -> None:
    words = ["INPUT.FORMAT", pixel_format, "DATASETS.TEST", "('keypoints_coco_2017_val',)"]
    words += ["MODEL.RESNEXT.PRECISION", "stock"]
    words += ["DATALOADER.DECODER", "pillow"]
    if head:
        words += [f"MODEL.{head}_ON", "True"]
    cfg = saved(tmp_path, *words)
    picture = noise(0)
    expected = DefaultPredictor(cfg)(np.asarray(picture)[:, :, ::-1])["instances"]
    predictor = Predictor(cfg)
    found = predictor(picture)
    assert len(found) == len(expected) == 8
    corners = expected.pred_boxes.tensor
    sizes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1)
    torch.testing.assert_close(torch.tensor([each.box for each in found]), sizes)
    torch.testing.assert_close(torch.tensor([each.score for each in found]), expected.scores)
    assert [each.category_index for each in found] == expected.pred_classes.tolist()
    assert [each.name for each in found] == [CLASSES[n] for n in expected.pred_classes]
    for number, each in enumerate(found):
        assert (each.mask is None) == (head != "MASK")
        assert (each.keypoints is None) == (head != "KEYPOINT")
        if each.mask is not None:
            assert np.array_equal(each.mask, expected.pred_masks[number].numpy())
        if each.keypoints is not None:
            assert np.array_equal(each.keypoints, expected.pred_keypoints[number].numpy())
    # A left ear, number 3, and a left eye.
    assert ((3, 1) in predictor.connections) == (head == "KEYPOINT")


def test_batch_matches_single_pictures(predictor: Predictor) -> None:
    pictures = [noise(1), noise(2), noise(3)]  # of equal size, since padding affects the network
    together = predictor.detect([predictor.record(each) for each in pictures])
    assert len(together) == 3
    for picture, found in zip(pictures, together):
        alone = predictor(picture)
        assert [each.box for each in found] == [pytest.approx(e.box, abs=0.01) for e in alone]


@pytest.mark.parametrize("picture", [Image.new("RGB", (1, 2000)), Image.new("F", (90, 60))])
def test_refuses_pictures(predictor: Predictor, picture: Image.Image) -> None:
    with pytest.raises(DatasetError, match=r"a picture of \d+ x \d+ pixels cannot be"):
        predictor(picture)


def test_refuses_other_networks(config: CfgNode) -> None:
    for use in (Predictor, lambda cfg: NamingDatasetMapper(cfg, False)):
        with pytest.raises(ConfigError, match=r"INPUT\.FORMAT L has 1 channels"):
            use(changed(config, "INPUT.FORMAT", "L"))
    proposals = changed(config, "MODEL.META_ARCHITECTURE", "ProposalNetwork")
    with pytest.raises(ConfigError, match="ProposalNetwork does not detect objects"):
        Predictor(proposals)
    with pytest.raises(ConfigError, match="LOAD_PROPOSALS is True"):
        Predictor(changed(config, "MODEL.LOAD_PROPOSALS", "True"))
    predictor = Predictor(config)
    predictor.model = build_model(proposals).eval()
    with pytest.raises(ConfigError, match="does not detect objects"):
        predictor(noise(0))


def test_low_threshold_applies_to_detector(config: CfgNode) -> None:
    key = "MODEL.ROI_HEADS.SCORE_THRESH_TEST"
    usual = changed(config, key, 0.6, "TEST.DETECTIONS_PER_IMAGE", 1000)
    assert min(each.score for each in Predictor(usual)(noise(0))) > 0.6
    low = with_threshold(usual, 0.1)
    assert 0.1 < min(each.score for each in Predictor(low)(noise(0))) < 0.3
    assert with_threshold(usual, 0.01).MODEL.RETINANET.SCORE_THRESH_TEST == 0.01
    assert with_threshold(usual, 0.9) == usual
    assert usual.MODEL.ROI_HEADS.SCORE_THRESH_TEST == 0.6
