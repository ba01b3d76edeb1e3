"""Figures of boxes, masks and keypoints against Detectron2's own COCOEvaluator."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
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

import resnext_det_cli.evaluate
from resnext_det import load_config
from resnext_det.data.toy import ToySpec, write_toy_coco
from resnext_det.engine.trainer import Trainer
from resnext_det.errors import DatasetError
from resnext_det.evaluation.annotations import read_ground_truth
from resnext_det.evaluation.coco import Engine, Protocol
from resnext_det.evaluation.detections import KINDS, Detections, read_detections
from resnext_det.evaluation.evaluator import DetectionEvaluator, evaluate_detections
from resnext_det.evaluation.results_file import read_metrics

NAME = "kinds_test"
SIGMAS = [0.05, 0.08, 0.1]
Outputs = list[tuple[dict[str, Any], dict[str, Any]]]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toy data whose objects have three keypoints, except for some without any."""
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
    DatasetCatalog.get(NAME)  # which registers the classes
    yield file
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def outputs(file: Path) -> Outputs:
    """Return inputs and a model's outputs: every object twice, moved by some pixels."""
    many: Outputs = []
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
        many.append(({"image_id": number}, {"instances": found}))
    return many


def stock_results(folder: Path, many: Outputs) -> Any:
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


def our_results(folder: Path, many: Outputs, engine: Engine = Engine()) -> Any:
    evaluator = DetectionEvaluator(NAME, folder, {"weights": "a.pth"}, engine, SIGMAS)
    evaluator.reset()
    for given, found in many:
        evaluator.process([given], [found])
    return evaluator.evaluate()


def test_figures_and_files_match_stock_detectron2(annotations: Path, tmp_path: Path) -> None:
    many = outputs(annotations)
    ours = our_results(tmp_path, many, Engine(cross_check=True))
    stock = stock_results(tmp_path / "stock", many)
    assert 20 < stock["segm"]["AP"] < 90
    assert 20 < stock["keypoints"]["AP"] < 90
    assert_same(ours, stock)

    file = tmp_path / f"detections_{NAME}.json"
    written = json.loads(file.read_text())
    expected = json.loads((tmp_path / "stock" / "coco_instances_results.json").read_text())
    for key in ("segmentation", "keypoints"):
        assert [each[key] for each in written] == [each[key] for each in expected]
    (evaluation,) = read_metrics(tmp_path).evaluations
    for kind, found in evaluation.kinds.items():
        assert found.figures["AP"] == pytest.approx(stock[kind]["AP"])
        for name in ("AP", "AP50", "APm", "APl"):  # each is the mean over the classes
            values = [v for row in found.per_class if (v := getattr(row, name)) is not None]
            assert found.figures[name] == (pytest.approx(np.mean(values)) if values else None)
    assert set(evaluation.kinds) == set(KINDS)
    assert evaluation.kinds["keypoints"].per_class[0].APs is None
    details = json.loads((tmp_path / f"details_{NAME}.json").read_text())
    assert {"curves", "confusion", "errors"} <= set(details["segm"]) & set(details["keypoints"])

    # `evaluate` computes the same from the file.
    parser = argparse.ArgumentParser()
    resnext_det_cli.evaluate.add_arguments(parser)
    words = ["--annotations", annotations, "--results", file, "--oks-sigmas", *SIGMAS]
    words += ["--output", tmp_path / "again", "--cross-check", "--baseline", tmp_path]
    again = resnext_det_cli.evaluate._evaluate(
        parser.parse_args([*map(str, words), "--resamples", "0"])
    )
    assert {each["difference"] for each in again["baseline"]["differences"]} <= {0, None}
    first, second = (
        next(iter(json.loads((folder / "metrics.json").read_text())["datasets"].values()))
        for folder in (tmp_path, tmp_path / "again" / "inference")
    )
    for key in ("figures", "per_class", "segm", "keypoints"):
        assert first[key] == second[key]
    with pytest.raises(DatasetError, match="holds no figures"):
        resnext_det_cli.evaluate._evaluate(parser.parse_args(["--run", str(tmp_path / "stock")]))


@pytest.mark.parametrize("key", ["segmentation", "keypoints"])
def test_results_may_have_no_boxes(annotations: Path, tmp_path: Path, key: str) -> None:
    stock = stock_results(tmp_path, outputs(annotations))
    results = json.loads((tmp_path / "coco_instances_results.json").read_text())
    truth = read_ground_truth(annotations)
    keys = ("image_id", "category_id", "score", key)
    found = Detections.of([{key: each[key] for key in keys} for each in results], truth)
    (kind,) = found.kinds
    protocol, engine = Protocol.of(kind, tuple(SIGMAS)), Engine(cross_check=True)
    figures = evaluate_detections(truth, found, protocol, engine).figures
    assert figures.figures["AP"] == pytest.approx(stock[kind]["AP"])


def test_evaluates_records_without_file_and_with_text_ids(
    annotations: Path, tmp_path: Path
) -> None:
    many = outputs(annotations)
    records = DatasetCatalog.get(NAME)
    for each in (*records, *(given for given, _ in many)):
        each["image_id"] = f"image {each['image_id']}"
    del MetadataCatalog.get(NAME).json_file
    DatasetCatalog.remove(NAME)
    DatasetCatalog.register(NAME, lambda: records)
    ours = our_results(tmp_path, many)
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


def test_trains_and_evaluates_masks_and_keypoints(annotations: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("segm", {"segmentation": [[1, 2, 3, 4]]}, "have no usable segmentation, such as"),
        ("segm", {"segmentation": [[1e9] * 6]}, "have no usable segmentation, such as"),
        ("segm", {"segmentation": {"size": [1], "counts": "1"}}, "have no usable segmentation"),
        ("keypoints", {"keypoints": []}, "0 of .* annotations have keypoints"),
        ("keypoints", {"keypoints": [[1, 2, 2]] * 3}, "Give flat lists"),
        ("keypoints", {"keypoints": [1, 2, 2]}, "have 1 keypoints, detections 3, and there are 3"),
    ],
)
def test_evaluates_boxes_if_other_annotations_are_unusable(
    annotations: Path,
    tmp_path: Path,
    kind: str,
    change: dict[str, Any],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    document = json.loads(annotations.read_text())
    for entry in document["annotations"]:
        entry.update(change)
    file = tmp_path / "changed.json"
    file.write_text(json.dumps(document))
    del MetadataCatalog.get(NAME).json_file
    MetadataCatalog.get(NAME).json_file = str(file)
    assert set(our_results(tmp_path, outputs(annotations))) == set(KINDS) - {kind}
    assert f"{kind} is not evaluated" in caplog.text
    truth = read_ground_truth(file)
    detections = read_detections(tmp_path / f"detections_{NAME}.json", truth)
    with pytest.raises(DatasetError, match=message):
        evaluate_detections(truth, detections, Protocol.of(kind, tuple(SIGMAS)))


def test_refuses_masks_of_resized_images(annotations: Path) -> None:
    truth = read_ground_truth(annotations)
    mask = pycocotools.mask.encode(np.eye(5, 4, dtype=np.uint8, order="F"))
    mask["counts"] = mask["counts"].decode()
    result = {"image_id": int(truth.image_ids[0]), "category_id": 1, "score": 0.5}
    found = Detections.of([{**result, "segmentation": mask}], truth)
    with pytest.raises(DatasetError, match=r"a mask of image \d+ has height and width \[5, 4\]"):
        evaluate_detections(truth, found, Protocol.of("segm"))
