"""A trained and evaluated run with hostile class names and detections of every kind of error."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resnext_det.data.toy import ToySpec, write_toy_coco
from resnext_det.evaluation.annotations import read_ground_truth
from resnext_det.evaluation.coco import Engine
from resnext_det.evaluation.compare import compare, comparison_document
from resnext_det.evaluation.detections import Detections
from resnext_det.evaluation.evaluator import evaluate_detections, write_evaluated

CLASSES = (
    *("class 1", "class 2", "apple", "Banana", "cherry", "dog", "zebra"),
    *("</script><script>alert(1)</script>", "\"quoted\" & 'so'", "a\u2028line", "<b>bold"),
)
CONFIG = """
MODEL:
  META_ARCHITECTURE: GeneralizedRCNN
  WEIGHTS: resnext://resnext50_32x4d.tv_in1k
  RESNETS: {DEPTH: 26, NUM_GROUPS: 8, WIDTH_PER_GROUP: 4}
SOLVER: {MAX_ITER: 12000, BASE_LR: 0.04, STEPS: [280, 320], IMS_PER_BATCH: 8}
"""


@pytest.fixture(scope="session")
def evaluated_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run; use `run` to change it."""
    root = tmp_path_factory.mktemp("evaluated")
    toy = write_toy_coco(root / "toy", ToySpec(train_images=1, val_images=14))
    path = toy / "annotations" / "instances_val2017.json"
    document = json.loads(path.read_text())
    generator = np.random.default_rng(0)
    document["categories"] = [{"id": 3 * n + 1, "name": name} for n, name in enumerate(CLASSES)]
    for n, entry in enumerate(document["annotations"]):
        entry["category_id"] = 3 * int(generator.integers(len(CLASSES))) + 1
        entry["iscrowd"] = int(n % 9 == 4)
    path.write_text(json.dumps(document))
    truth = read_ground_truth(path)
    old, new = (Detections.of(_erring(document, generator, share), truth) for share in (0.5, 0.3))
    # Too few images for real intervals.
    differences = tuple(
        dataclasses.replace(each, lower=each.difference - 4, upper=each.difference + 4)
        if each.difference is not None and each.figure[-1] != "l"
        else each
        for each in compare(truth, old, new, resamples=0)
    )
    write_evaluated(
        root / "run" / "inference",
        "toy_val",
        {"weights": "weights.pth", "config": "toy.yaml"},
        truth,
        new,
        {"bbox": evaluate_detections(truth, new)},
        {
            "images": str(toy / "val2017"),
            "engine": vars(Engine(cross_check=True)),
            "baseline": comparison_document(Path("<i>earlier"), differences),
        },
    )
    lines = [
        {"iteration": i, "lr": 0.02, "total_loss": 20 / i, "time": 0.5, "images_per_second": 8.0}
        for i in range(19, 1000, 20)
    ]
    lines[-1] |= {"bbox/AP": 41.25, "bbox/AP50": 62.35, "lr": 0.002}
    text = "\n".join(map(json.dumps, lines))
    (root / "run" / "metrics.jsonl").write_text(f"{text}\n")
    (root / "run" / "config.yaml").write_text(CONFIG)
    return root / "run"


def _erring(
    document: dict[str, Any], generator: np.random.Generator, share: float
) -> list[dict[str, Any]]:
    """Return predictions, a share of which has another class, and as many another place."""
    found = []
    for entry in document["annotations"]:
        for _ in range(3):
            box = np.array(entry["bbox"]) + generator.uniform(-3, 3, 4)
            if generator.random() < share:
                box += generator.uniform(-40, 40, 4) * [1, 1, 0, 0]
            other = int(generator.choice([each["id"] for each in document["categories"]]))
            number = other if generator.random() < share else entry["category_id"]
            box[2:] = box[2:].clip(2)
            found.append(
                {
                    "image_id": entry["image_id"],
                    "category_id": number,
                    "bbox": box.tolist(),
                    "score": float(generator.uniform(0.01, 1)),
                }
            )
    return found


@pytest.fixture()
def run(evaluated_run: Path, tmp_path: Path) -> Path:
    """A copy of the run with its annotations and images, to be changed."""
    shutil.copytree(evaluated_run.parent, tmp_path, dirs_exist_ok=True)
    metrics = tmp_path / "run" / "inference" / "metrics.json"
    metrics.write_text(metrics.read_text().replace(str(evaluated_run.parent), str(tmp_path)))
    return tmp_path / "run"


@pytest.fixture()
def annotation_file(run: Path) -> Path:
    return run.parent / "toy" / "annotations" / "instances_val2017.json"


def edit(run: Path, **changes: Any) -> None:
    """Change what metrics.json says about the data set."""
    file = run / "inference" / "metrics.json"
    document = json.loads(file.read_text())
    document["datasets"]["toy_val"].update(changes)
    file.write_text(json.dumps(document))
