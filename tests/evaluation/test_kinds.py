"""Masks and keypoints: the figures are those of Detectron2's own COCOEvaluator."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from torch import nn

from resnext_det import load_config
from resnext_det.data.toy import ToySpec, write_toy_coco
from resnext_det.engine.trainer import Trainer
from resnext_det.errors import DatasetError
from resnext_det.evaluation.annotations import read_ground_truth
from resnext_det.evaluation.coco import Protocol
from resnext_det.evaluation.detections import KINDS, Detections, read_detections
from resnext_det.evaluation.evaluator import DetectionEvaluator, Engine, evaluate_detections
from resnext_det.evaluation.results_file import read_metrics

NAME = "kinds_test"
SIGMAS = [0.05, 0.08, 0.1]
Tool = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toy data whose objects have three keypoints, but for some that have none."""
    root = write_toy_coco(
        tmp_path_factory.mktemp("kinds") / "coco", ToySpec(train_images=1, val_images=12)
    )
    file = root / "annotations" / "instances_val2017.json"
    document = json.loads(file.read_text())
    for number, entry in enumerate(document["annotations"]):
        x, y, width, height = entry["bbox"]
        points = [[x + width / 4, y + height / 2, 2], [x + width / 2, y, 1], [x, y + height, 2]]
        if number % 5 == 1:
            points[1] = [0, 0, 0]
        if number % 7 == 3:
            points = [[0, 0, 0]] * 3
        entry["keypoints"] = [value for point in points for value in point]
        entry["num_keypoints"] = sum(point[2] > 0 for point in points)
    file.write_text(json.dumps(document))
    return root


@pytest.fixture
def annotations(toy: Path) -> Iterator[Path]:
    file = toy / "annotations" / "instances_val2017.json"
    register_coco_instances(NAME, {}, str(file), str(toy / "val2017"))
    MetadataCatalog.get(NAME).set(keypoint_names=["a", "b", "c"], keypoint_flip_map=[])
    DatasetCatalog.get(NAME)  # which tells the classes
    yield file
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def outputs(file: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Inputs, and what a model finds in them: objects moved by some pixels, and some twice."""
    generator = np.random.default_rng(0)
    coco = COCO(str(file))
    for number, image in coco.imgs.items():
        entries = [entry for entry in coco.imgToAnns[number] for _ in range(2)]
        found = Instances((image["height"], image["width"]))
        shifts = generator.integers(-5, 6, (len(entries), 2))
        boxes = np.array([entry["bbox"] for entry in entries]).reshape(-1, 4)
        boxes[:, :2] += shifts
        boxes[:, 2:] += boxes[:, :2]
        found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
        found.scores = torch.tensor(generator.random(len(entries)), dtype=torch.float32)
        found.pred_classes = torch.tensor([entry["category_id"] - 1 for entry in entries]).long()
        masks = [
            np.roll(coco.annToMask(entry), tuple(shift[::-1]), axis=(0, 1))
            for entry, shift in zip(entries, shifts)
        ]
        size = (0, image["height"], image["width"])
        found.pred_masks = torch.tensor(np.array(masks).reshape(-1, *size[1:])).bool()
        poses = np.array([entry["keypoints"] for entry in entries], np.float32).reshape(-1, 3, 3)
        poses[:, :, :2] += generator.normal(0, 3, poses[:, :, :2].shape)
        found.pred_keypoints = torch.tensor(poses)
        yield {"image_id": number}, {"instances": found}


def stock_results(folder: Path, many: list[tuple[Any, Any]]) -> Any:
    evaluator = COCOEvaluator(NAME, output_dir=str(folder), kpt_oks_sigmas=SIGMAS)
    evaluator.reset()
    for given, found in many:
        evaluator.process([given], [found])
    return evaluator.evaluate()


def assert_same(ours: Any, stock: Any) -> None:
    assert list(ours) == list(KINDS)
    for kind, figures in stock.items():
        for name, value in figures.items():
            assert ours[kind][name] == pytest.approx(value, abs=1e-9, nan_ok=True), (kind, name)


def test_all_figures_are_those_of_stock_detectron2(
    annotations: Path, tmp_path: Path, tool: Tool
) -> None:
    many = list(outputs(annotations))
    engine = Engine(cross_check=True)
    evaluator = DetectionEvaluator(NAME, tmp_path, {"weights": "a.pth"}, engine, SIGMAS)
    evaluator.reset()
    for given, found in many:
        evaluator.process([given], [found])
    ours = evaluator.evaluate()
    stock = stock_results(tmp_path / "stock", many)
    assert 20 < stock["segm"]["AP"] < 90
    assert 20 < stock["keypoints"]["AP"] < 90
    assert_same(ours, stock)

    file = tmp_path / f"detections_{NAME}.json"
    written = json.loads(file.read_text())
    expected = json.loads((tmp_path / "stock" / "coco_instances_results.json").read_text())
    assert [each["segmentation"] for each in written] == [each["segmentation"] for each in expected]
    assert [each["keypoints"] for each in written] == [each["keypoints"] for each in expected]
    (evaluation,) = read_metrics(tmp_path).evaluations
    assert evaluation.segm is not None
    assert evaluation.keypoints is not None
    assert evaluation.segm.figures["AP"] == pytest.approx(stock["segm"]["AP"])
    assert evaluation.keypoints.figures["AP50"] == pytest.approx(stock["keypoints"]["AP50"])
    assert evaluation.keypoints.per_class[0].APs is None
    details = json.loads((tmp_path / f"details_{NAME}.json").read_text())
    assert {"curves", "confusion", "errors"} <= set(details["segm"]) & set(details["keypoints"])

    words = ["--annotations", annotations, "--results", file, "--oks-sigmas", *SIGMAS]
    done = tool("evaluate.py", [*words, "--output", tmp_path / "again", "--cross-check"])
    assert done.returncode == 0, done.stderr
    entries = [
        next(iter(json.loads((folder / "metrics.json").read_text())["datasets"].values()))
        for folder in (tmp_path, tmp_path / "again" / "inference")
    ]
    for key in ("figures", "per_class", "segm", "keypoints"):
        assert entries[0][key] == entries[1][key]


@pytest.mark.parametrize("left", [("segmentation",), ("keypoints",)])
def test_results_without_boxes_are_coco_s_as_well(
    annotations: Path, tmp_path: Path, left: tuple[str, ...]
) -> None:
    """COCO's format has a mask or keypoints in the place of the box."""
    stock = stock_results(tmp_path, list(outputs(annotations)))
    results = json.loads((tmp_path / "coco_instances_results.json").read_text())
    keys = ("image_id", "category_id", "score", *left)
    found = Detections.of([{key: each[key] for key in keys} for each in results])
    (kind,) = found.kinds
    protocol = Protocol.of(kind, tuple(SIGMAS))
    truth, engine = read_ground_truth(annotations), Engine(cross_check=True)
    figures = evaluate_detections(truth, found, engine, protocol=protocol).figures
    assert figures.figures["AP"] == pytest.approx(stock[kind]["AP"])


@pytest.mark.parametrize("with_file", [True, False])
def test_text_ids_are_evaluated_as_stock_detectron2_does(
    annotations: Path, tmp_path: Path, with_file: bool
) -> None:
    """Records registered by a function of one's own often have a file's name for an id."""
    many = list(outputs(annotations))
    records = DatasetCatalog.get(NAME)
    for each in (*records, *(given for given, _ in many)):
        each["image_id"] = f"image {each['image_id']}"
    document = json.loads(annotations.read_text())
    for key, entries in (("id", document["images"]), ("image_id", document["annotations"])):
        for entry in entries:
            entry[key] = f"image {entry[key]}"
    (tmp_path / "text.json").write_text(json.dumps(document))
    del MetadataCatalog.get(NAME).json_file
    if with_file:
        MetadataCatalog.get(NAME).json_file = str(tmp_path / "text.json")
    DatasetCatalog.remove(NAME)
    DatasetCatalog.register(NAME, lambda: records)
    MetadataCatalog.get(NAME).thing_dataset_id_to_contiguous_id = {n + 1: n for n in range(6)}

    evaluator = DetectionEvaluator(NAME, tmp_path, {"weights": "a.pth"}, sigmas=SIGMAS)
    for given, found in many:
        evaluator.process([given], [found])
    ours = evaluator.evaluate()
    assert_same(ours, stock_results(tmp_path / "stock", many))
    written = json.loads((tmp_path / f"detections_{NAME}.json").read_text())
    assert written[0]["image_id"].startswith("image ")


def config(folder: Path, *words: str) -> CfgNode:
    return load_config(
        "faster_rcnn_X_26_8x4d_FPN_toy",
        [
            *("DATASETS.TRAIN", f"('{NAME}',)", "DATASETS.TEST", f"('{NAME}',)"),
            *("OUTPUT_DIR", str(folder), "DATALOADER.NUM_WORKERS", "0", "MODEL.WEIGHTS", ""),
            *("SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "SOLVER.IMS_PER_BATCH", "2"),
            *("SOLVER.WARMUP_ITERS", "0"),
            *("SOLVER.BASE_LR", "1e-6", "TEST.DETECTIONS_PER_IMAGE", "20"),
            *("INPUT.RANDOM_FLIP", "none", *words),
        ],
    )


def test_mask_and_keypoint_r_cnn_are_trained_and_evaluated(
    annotations: Path, tmp_path: Path
) -> None:
    cfg = config(
        tmp_path,
        *("MODEL.MASK_ON", "True", "MODEL.KEYPOINT_ON", "True"),
        *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
        *("MODEL.ROI_MASK_HEAD.NUM_CONV", "1", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"),
        *("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "3"),
        *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(16,)", "TEST.KEYPOINT_OKS_SIGMAS", str(SIGMAS)),
        *("TEST.EXPECTED_RESULTS", "[['segm', 'AP', 0, 100], ['keypoints', 'AP', 0, 100]]"),
    )
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    ours = trainer.train()
    stock = inference_on_dataset(
        trainer.model,
        Trainer.build_test_loader(cfg, NAME),
        COCOEvaluator(NAME, output_dir=str(tmp_path / "stock"), kpt_oks_sigmas=SIGMAS),
    )
    assert_same(ours, stock)
    losses = (tmp_path / "metrics.jsonl").read_text()
    assert "loss_mask" in losses
    assert "loss_keypoint" in losses
    assert "segm/AP" in losses


class Killed(BaseException):
    """What stands for a SIGKILL inside of one process."""


class Scripted(nn.Module):
    """A model that finds what it is told, and dies after some images."""

    def __init__(self, found: dict[int, Any], last: int = 10**9) -> None:
        super().__init__()
        self.found, self.last, self.images = found, last, 0

    def forward(self, inputs: list[dict[str, Any]]) -> Any:
        self.images += len(inputs)
        if self.images > self.last:
            raise Killed
        return [self.found[each["image_id"]] for each in inputs]


def test_a_killed_evaluation_keeps_masks_and_keypoints(annotations: Path, tmp_path: Path) -> None:
    cfg = config(tmp_path, "TEST.KEYPOINT_OKS_SIGMAS", str(SIGMAS))
    found = {given["image_id"]: each for given, each in outputs(annotations)}
    whole = Trainer.test(cfg, Scripted(found))
    with pytest.raises(Killed):
        Trainer.test(cfg, Scripted(found, last=5))
    rest = Scripted(found)
    np.testing.assert_equal(Trainer.test(cfg, rest), whole)
    assert rest.images == 7
    assert set(whole) == set(KINDS)


def changed(file: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    document = json.loads(file.read_text())
    for entry in document["annotations"]:
        change(entry)
    (folder / "changed.json").write_text(json.dumps(document))
    return folder / "changed.json"


def keep_flat(entry: dict[str, Any]) -> None:
    entry["keypoints"] = [[1, 2, 2]] * 3


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("segm", lambda entry: entry.pop("segmentation"), "have no segmentation that can be"),
        ("segm", lambda entry: entry.update(segmentation=[[1, 2, 3, 4]]), "have no segmentation"),
        ("segm", lambda entry: entry.update(segmentation=[[1e9] * 6]), "have no segmentation"),
        (
            "segm",
            lambda entry: entry.update(segmentation={"size": [1], "counts": "1"}),
            "have no segmentation that can be",
        ),
        ("keypoints", lambda entry: entry.pop("keypoints"), "0 of .* annotations have keypoints"),
        ("keypoints", keep_flat, "takes one flat list"),
        ("keypoints", lambda entry: entry.update(keypoints=[1, 2, 2]), "have 1 keypoints"),
    ],
)
def test_annotations_that_cannot_be_evaluated_are_refused_and_boxes_are_evaluated(
    annotations: Path,
    tmp_path: Path,
    kind: str,
    change: Callable[[dict[str, Any]], None],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    many = list(outputs(annotations))
    file = changed(annotations, tmp_path, change)
    del MetadataCatalog.get(NAME).json_file
    MetadataCatalog.get(NAME).json_file = str(file)
    evaluator = DetectionEvaluator(NAME, tmp_path, {"weights": "a.pth"}, sigmas=SIGMAS)
    for given, found in many:
        evaluator.process([given], [found])
    assert set(evaluator.evaluate()) == set(KINDS) - {kind}
    assert f"{kind} is not evaluated" in caplog.text
    detections = read_detections(tmp_path / f"detections_{NAME}.json")
    with pytest.raises(DatasetError, match=message):
        evaluate_detections(
            read_ground_truth(file), detections, protocol=Protocol.of(kind, tuple(SIGMAS))
        )


@pytest.mark.parametrize(
    "mask",
    [
        {"size": [4, 5], "counts": "zzzz"},
        {"size": [4, -5], "counts": "1"},
        {"size": [4], "counts": "1"},
        {"size": [4, 5], "counts": [1, 19]},
        {"size": [4, 5]},
        {"size": [4.0, 5], "counts": "1"},
    ],
)
def test_masks_that_are_no_masks_are_refused(mask: Any) -> None:
    result = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2], "score": 0.5}
    with pytest.raises(DatasetError, match="detection 0 of 1"):
        Detections.of([{**result, "segmentation": mask}])


def test_masks_of_resized_images_are_refused(annotations: Path) -> None:
    truth = read_ground_truth(annotations)
    mask = pycocotools.mask.encode(np.eye(5, 4, dtype=np.uint8, order="F"))
    mask["counts"] = mask["counts"].decode()
    result = {"image_id": int(truth.image_ids[0]), "category_id": 1, "score": 0.5}
    found = Detections.of([{**result, "segmentation": mask}])
    with pytest.raises(DatasetError, match=r"1 of 1 masks have another size than their image"):
        evaluate_detections(truth, found, protocol=Protocol.of("segm"))
