from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.engine import DefaultPredictor
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from PIL import Image

from resnext_det import Prediction, Predictor, load_config
from resnext_det.data.mapper import NamingDatasetMapper
from resnext_det.engine.checkpoints import Checkpointer
from resnext_det.engine.predictor import with_threshold
from resnext_det.errors import ConfigError, DatasetError, WeightsError
from resnext_det.image_files import picture_of
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
        found = predictor.record(picture_of(file))
        assert found["image"].dtype == expected["image"].dtype
        assert torch.equal(found["image"], expected["image"])
        assert (found["width"], found["height"]) == (width, height)


@pytest.mark.parametrize(
    ("head", "pixel_format"), [("", "BGR"), ("", "RGB"), ("MASK", "BGR"), ("KEYPOINT", "BGR")]
)
def test_equals_default_predictor(head: str, pixel_format: str, tmp_path: Path) -> None:
    """In stock arithmetic, bit for bit."""
    words = ["INPUT.FORMAT", pixel_format, "DATASETS.TEST", "('keypoints_coco_2017_val',)"]
    words += ["DATALOADER.DECODER", "pillow"]
    if head:
        words += [f"MODEL.{head}_ON", "True"]
        words += ["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(16, 16)"]  # of 512 it takes seconds
    cfg = saved(tmp_path, *words)
    picture = noise(0)
    expected = DefaultPredictor(cfg)(np.asarray(picture)[:, :, ::-1])["instances"]
    predictor = Predictor(cfg, precision="stock")
    found = predictor(picture)
    assert isinstance(found, Prediction)
    assert len(found) == len(expected) == 8
    assert np.array_equal(found.boxes, expected.pred_boxes.tensor.numpy())
    assert np.array_equal(found.scores, expected.scores.numpy())
    assert np.array_equal(found.labels, expected.pred_classes.numpy())
    assert found.names == [CLASSES[n] for n in expected.pred_classes]
    assert (found.width, found.height) == picture.size
    assert (found.masks is None) == (head != "MASK")
    assert (found.keypoints is None) == (head != "KEYPOINT")
    if found.masks is not None:
        assert np.array_equal(found.masks, expected.pred_masks.numpy())
    if found.keypoints is not None:
        assert np.array_equal(found.keypoints, expected.pred_keypoints.numpy())
    # A left ear, number 3, and a left eye.
    assert ((3, 1) in found.connections) == (head == "KEYPOINT")
    fast = Predictor(cfg)(picture)
    assert fast.boxes == pytest.approx(found.boxes, abs=0.01)
    assert fast.scores == pytest.approx(found.scores, abs=1e-4)


def test_augmented_detections_equal_detectron2s(config: CfgNode) -> None:
    words = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(48, 80)", "TEST.AUG.MAX_SIZE", 120]
    cfg = changed(config, *words, "MODEL.RESNEXT.PRECISION", "stock")
    predictor = Predictor(cfg)
    found = predictor(noise(0))
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    with torch.no_grad():
        expected = GeneralizedRCNNWithTTA(cfg, model)([predictor.record(noise(0))])[0]["instances"]
    assert len(found) == 8
    assert np.array_equal(found.boxes, expected.pred_boxes.tensor.numpy())
    assert np.array_equal(found.scores, expected.scores.numpy())
    assert not np.array_equal(found.boxes, Predictor(config, precision="stock")(noise(0)).boxes)
    with pytest.raises(ConfigError, match=r"TEST\.AUG\.ENABLED is True.*Set TEST\.AUG\.ENABLED"):
        Predictor(changed(cfg, "MODEL.KEYPOINT_ON", True))


def equal(one: Prediction, other: Prediction) -> bool:
    return np.array_equal(one.boxes, other.boxes) and np.array_equal(one.scores, other.scores)


def test_images_of_every_kind_give_the_same(predictor: Predictor, tmp_path: Path) -> None:
    picture = noise(0)
    pixels = np.asarray(picture)
    picture.save(tmp_path / "b.png")
    expected = predictor(tmp_path / "b.png")
    assert expected.source == tmp_path / "b.png"
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    given = {"RGB": [str(tmp_path / "b.png"), picture, pixels, tensor]}
    given["BGR"] = [pixels[..., ::-1], tensor.flip(0)]
    for order, images in given.items():
        found = [*predictor(images, order=order), *(predictor(one, order=order) for one in images)]
        assert len(found) == 2 * len(images) and all(equal(one, expected) for one in found)
    assert not equal(predictor(pixels, order="BGR"), expected)
    grey = picture.convert("L")
    greys = [np.asarray(grey), np.asarray(grey)[..., None], torch.from_numpy(np.array(grey))[None]]
    assert all(equal(predictor(one), predictor(grey)) for one in greys)
    noise(1).save(tmp_path / "A.PNG")
    (tmp_path / "notes.txt").write_text("no image")
    in_folder = predictor(str(tmp_path))
    assert isinstance(in_folder, list)
    assert [Path(str(one.source)).name for one in in_folder] == ["A.PNG", "b.png"]
    assert equal(in_folder[1], expected)
    assert predictor([]) == []


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_exif_orientation_is_applied_once(
    suffix: str, predictor: Predictor, tmp_path: Path
) -> None:
    file, upright = tmp_path / f"a.{suffix}", noise(0)
    exif = Image.Exif()
    exif[274] = 6  # shown after a quarter turn clockwise
    quarter = upright.transpose(Image.Transpose.ROTATE_90)
    quarter.save(file, exif=exif, **({"quality": 100, "subsampling": 0} if suffix == "jpg" else {}))
    found = predictor(file)
    assert (found.width, found.height) == upright.size
    if suffix != "jpg":
        assert equal(found, predictor(upright))
    with Image.open(file) as opened:
        assert equal(predictor(opened), found)
    assert equal(predictor(read_picture(file)), found)  # a picture that is upright already
    assert found.draw(threshold=2).size == upright.size


def test_batches_equal_single_images(predictor: Predictor) -> None:
    pictures = [noise(1), noise(2), noise(3)]  # of equal size, since padding affects the network
    alone = [predictor(each) for each in pictures]
    for batch in (1, 2, 3):
        together = predictor(pictures, batch=batch)
        assert [one.boxes.tolist() for one in together] == [
            [pytest.approx(box, abs=0.01) for box in one.boxes.tolist()] for one in alone
        ]
        assert batch > 1 or all(map(equal, together, alone))
    with pytest.raises(ConfigError, match="a batch of 0 images"):
        predictor(pictures, batch=0)


def test_stream_reads_as_it_goes(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"")
    stream = predictor.stream(iter([noise(1), noise(2), tmp_path / "broken.jpg"]))
    assert [next(stream).width, next(stream).width] == [90, 90]
    with pytest.raises(DatasetError, match=r"broken\.jpg"):
        next(stream)


PIXELS = np.asarray(noise(0))


@pytest.mark.parametrize(
    ("image", "order", "message"),
    [
        (PIXELS, None, 'the channel order of arrays and tensors is None: pass order="BGR"'),
        (PIXELS, "GRB", "the channel order of arrays and tensors is 'GRB'"),
        (PIXELS / 255, "RGB", r"an array of float64 and shape \(60, 90, 3\).*Scale floats"),
        (PIXELS.astype(np.int64), "RGB", "an array of int64"),
        (PIXELS.transpose(2, 0, 1), "RGB", r"shape \(3, 60, 90\).*\(height, width, 3\)"),
        (PIXELS[None], "RGB", r"shape \(1, 60, 90, 3\)"),
        (PIXELS[:0], "RGB", r"shape \(0, 90, 3\)"),
        (torch.tensor(PIXELS), "RGB", r"a tensor of uint8 .*\(3, height, width\)"),
        (torch.zeros(3, 60, 90), "RGB", r"a tensor of float32 .*Scale floats"),
        (torch.zeros(3, 9, 9, dtype=torch.bfloat16), "RGB", "a tensor of bfloat16"),
        (torch.zeros(1, 3, 60, 90, dtype=torch.uint8), "RGB", r"height, width\)\.$"),
        (b"bytes", None, "bytes is not an image: give a file"),
        (Image.new("RGB", (0, 5)), None, "0 x 5 pixels"),
        (Image.new("F", (90, 60)), None, "its mode is F, whose range is unknown"),
        (Image.new("RGB", (1, 2000)), None, "a picture of 1 x 2000 pixels cannot be"),
        ("nowhere.jpg", None, r"nowhere\.jpg cannot be read: No such file"),
        (__file__, None, r"test_predictor\.py cannot be read: it is damaged, or in none of"),
    ],
)
def test_refuses_other_objects_and_unreadable_images(
    image: Any, order: str | None, message: str, predictor: Predictor
) -> None:
    with pytest.raises((ConfigError, DatasetError), match=message) as caught:
        predictor(image, order=order)
    assert "\n" not in str(caught.value)


def test_refuses_truncated_files_and_empty_folders(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no image"):
        predictor(tmp_path)
    file = tmp_path / "cut.jpg"
    noise(0).save(file)
    file.write_bytes(file.read_bytes()[:1500])
    with pytest.raises(DatasetError, match=r"cut\.jpg cannot be read: .*truncated"):
        predictor(file)
    with Image.open(file) as opened, pytest.raises(DatasetError, match=r"cut\.jpg.*truncated"):
        predictor(opened)


def test_finds_the_config_of_a_detector(predictor: Predictor, config: CfgNode) -> None:
    """Of a run folder, a checkpoint, or given beside a checkpoint."""
    weights, expected = Path(config.MODEL.WEIGHTS), predictor(noise(0))
    (weights.parent / "config.yaml").write_text(config.dump())
    for detector in (weights.parent, str(weights)):
        assert equal(Predictor(detector)(noise(0)), expected)
    bare = weights.with_name("bare.pth")
    torch.save({"model": predictor.model.state_dict()}, bare)
    words = ["INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "96"]
    words += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "8"]
    found = Predictor(bare, config="faster_rcnn_X_26_8x4d_FPN_toy", overrides=words)(noise(0))
    assert np.array_equal(found.boxes, expected.boxes)
    assert found.names[0] in MetadataCatalog.get("toy_coco_minival").thing_classes
    with pytest.raises(ConfigError, match=r"bare\.pth' records no config.*pass config="):
        Predictor(bare)
    with pytest.raises(ConfigError, match="give one of them"):
        Predictor(config, config="faster_rcnn_X_26_8x4d_FPN_toy")


def test_stuff_is_that_of_the_panoptic_segments(tmp_path: Path) -> None:
    words = ["MODEL.META_ARCHITECTURE", "PanopticFPN", "MODEL.MASK_ON", "True"]
    words += ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3, "DATALOADER.DECODER", "pillow"]
    words += ["MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT", 1, "DATASETS.TEST", "stuff_of_test"]
    cfg = saved(tmp_path, *words, "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH", 0.0)
    MetadataCatalog.get("stuff_of_test").set(stuff_classes=["things", "sky"])
    expected = DefaultPredictor(cfg)(np.asarray(noise(0))[:, :, ::-1])
    segments, described = expected["panoptic_seg"]
    found = Predictor(cfg, precision="stock")(noise(0))
    assert found.masks is not None and len(found) == len(expected["instances"]) == 8
    names = {0: "things", 1: "sky", 2: "stuff 2"}
    stuff = {names[each["category_id"]]: each["id"] for each in described if not each["isthing"]}
    assert list(found.stuff) == list(stuff) and len(stuff) > 1
    for name, number in stuff.items():
        assert np.array_equal(found.stuff[name], segments.numpy() == number)
    assert found.above(0.9).stuff is found.stuff


def test_device_replaces_the_configs(config: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # else "cuda" becomes "cpu"
    on_gpu = changed(config, "MODEL.DEVICE", "cuda:7")
    assert next(Predictor(on_gpu, device="cpu").model.parameters()).device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_detects_the_same(config: CfgNode) -> None:
    found, expected = (Predictor(config, device=each)(noise(0)) for each in ("cuda", "cpu"))
    assert found.boxes == pytest.approx(expected.boxes, abs=0.1)
    assert found.scores == pytest.approx(expected.scores, abs=0.01)


def test_refuses_what_is_no_detector(config: CfgNode, tmp_path: Path) -> None:
    weights, backbone = Path(config.MODEL.WEIGHTS), tmp_path / "backbone.pth"
    torch.save(torchvision.models.resnext50_32x4d().state_dict(), backbone)
    refused: list[tuple[Any, dict[str, Any], str]] = [
        (tmp_path, {}, r"holds no config\.yaml: name the OUTPUT_DIR"),
        ("nowhere", {}, "'nowhere' is neither the folder of a run nor a checkpoint"),
        ("resnext://resnext50_32x4d.tv_in1k", {}, "trained on ImageNet, not a detector"),
        (backbone, {}, "records no config, so another program wrote it, or it holds a backbone"),
        (backbone, {"config": "faster_rcnn_X_50_32x4d_FPN_1x"}, "holds a bare backbone"),
        (weights, {"device": "tpu"}, "device 'tpu' cannot be used"),
        (weights, {"precision": "int8"}, "MODEL.RESNEXT.PRECISION is 'int8'"),
    ]
    if not torch.cuda.is_available():
        refused.append((weights, {"device": "cuda"}, "device 'cuda' cannot be used"))
    for detector, more, message in refused:
        with pytest.raises((ConfigError, WeightsError), match=message):
            Predictor(detector, **more)
    (tmp_path / "config.yaml").write_text(config.dump())
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        Predictor(tmp_path)


def test_refuses_other_networks(config: CfgNode) -> None:
    for use in (Predictor, lambda cfg: NamingDatasetMapper(cfg, False)):
        with pytest.raises(ConfigError, match=r"INPUT\.FORMAT L has 1 channels"):
            use(changed(config, "INPUT.FORMAT", "L"))
    for name in ("ProposalNetwork", "ImageClassifier"):
        with pytest.raises(ConfigError, match=f"{name} does not detect objects"):
            Predictor(changed(config, "MODEL.META_ARCHITECTURE", name))
    with pytest.raises(ConfigError, match="LOAD_PROPOSALS is True"):
        Predictor(changed(config, "MODEL.LOAD_PROPOSALS", "True"))
    predictor = Predictor(config)
    predictor._detect = lambda records: [{"proposals": None}]
    with pytest.raises(ConfigError, match="does not detect objects"):
        predictor(noise(0))


def test_category_ids_are_those_of_the_data_set(config: CfgNode, tmp_path: Path) -> None:
    names = MetadataCatalog.get("coco_2017_val").thing_classes
    cfg = saved(tmp_path, "MODEL.ROI_HEADS.NUM_CLASSES", 80, "DATASETS.TEST", "coco_2017_val")
    run = torch.load(cfg.MODEL.WEIGHTS, weights_only=False)
    run["resnext_det_run"]["class_names"] = names
    torch.save(run, cfg.MODEL.WEIGHTS)
    found = Predictor(cfg)(noise(0))
    ids = {each["name"]: each["id"] for each in COCO_CATEGORIES}
    assert [row["category_id"] for row in found.to_coco(1)] == [ids[name] for name in found.names]


def test_low_threshold_applies_to_detector(config: CfgNode) -> None:
    key = "MODEL.ROI_HEADS.SCORE_THRESH_TEST"
    usual = changed(config, key, 0.6, "TEST.DETECTIONS_PER_IMAGE", 1000)
    assert Predictor(usual)(noise(0)).scores.min() > 0.6
    assert 0.1 < Predictor(usual, threshold=0.1)(noise(0)).scores.min() < 0.3
    assert Predictor(usual, threshold=0.7)(noise(0)).scores.min() >= 0.7
    assert with_threshold(usual, 0.01).MODEL.RETINANET.SCORE_THRESH_TEST == 0.01
    assert with_threshold(usual, 0.9) == usual
    assert usual.MODEL.ROI_HEADS.SCORE_THRESH_TEST == 0.6


@pytest.fixture()
def documented(config: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The Python of docs/deployment.md about predictions, in a folder where it finds its files."""
    run = tmp_path / "output" / "demo"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(config.dump())
    (run / "model_final.pth").symlink_to(config.MODEL.WEIGHTS)
    (tmp_path / "photos").mkdir()
    for name in ("photo.jpg", "photos/a.jpg"):
        Image.fromarray(np.asarray(noise(0)).repeat(5, 0).repeat(5, 1)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text()
    section = page.partition("\n## Predict")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_examples_of_the_page_run(
    documented: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(documented[0], {})
    assert capsys.readouterr().out.startswith("450 x 300 pixels: ")
    with Image.open("drawn.jpg") as drawn:
        assert drawn.size == (450, 300)
    made = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "fiftyone", made)
    sample = mock.MagicMock(filepath="photos/a.jpg")
    made.Dataset.from_images_dir("photos").iter_samples.return_value = [sample]
    exec(documented[2], {})
    boxes = [each.kwargs["bounding_box"] for each in made.Detection.call_args_list]
    assert boxes and all(0 <= side <= 1 for box in boxes for side in box)
    sample.__setitem__.assert_called_once_with("predictions", made.Detections())


def test_sahi_runs_the_detector_as_it_is(documented: list[str]) -> None:
    pytest.importorskip("sahi")
    from sahi.predict import get_prediction

    names: dict[str, Any] = {}
    exec(documented[1], names)
    assert len(list(Path("drawn").iterdir())) == 1
    assert len(names["result"].object_prediction_list) > 0
    found = get_prediction("photo.jpg", names["detector"]).object_prediction_list
    words = ["DATALOADER.DECODER", "pillow"]
    expected = Predictor("output/demo", precision="stock", threshold=0.5, overrides=words)
    boxes = [each.bbox.to_xyxy() for each in found]
    assert boxes and np.array_equal(np.array(boxes, np.float32), expected("photo.jpg").boxes)
