"""A small run: toy data, predictions near the truth, and what a training leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resnext_det.data.toy import ToySpec, write_toy_coco
from resnext_det.evaluation import baseline
from resnext_det.evaluation.detections import Detections
from resnext_det.evaluation.evaluator import Engine, evaluate_detections, write_evaluated
from resnext_det.evaluation.truth import read_truth

FIGURES = {
    "AP": 41.23, "AP50": 62.34, "AP75": 43.45, "APs": 24.56, "APm": 45.67, "APl": None,
    "AR1": 36.78, "AR10": 57.89, "AR100": 58.91, "ARs": 39.12, "ARm": 60.13, "ARl": None,
}  # fmt: skip

CLASSES = (
    *("class 1", "class 2", "class 10", "apple", "Banana", "cherry", "dog", "zebra"),
    *("</script><script>alert(1)</script>", "\"quoted\" & 'so'", "a\u2028line", "<b>bold"),
)
"""Of `evaluated_run`: some would break out of text, of attributes, or of a script's data."""


def jittered(annotations: dict[str, Any]) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    return [
        {
            "image_id": entry["image_id"],
            "category_id": entry["category_id"],
            "bbox": [float(v) for v in np.array(entry["bbox"]) + generator.uniform(-2, 2, 4)],
            "score": float(generator.uniform(0.4, 1)),
        }
        for entry in annotations["annotations"]
    ]


@pytest.fixture()
def run(tmp_path: Path) -> Path:
    """Return the folder of a small run, with everything a training and an evaluation leave."""
    toy = write_toy_coco(tmp_path / "toy", ToySpec(train_images=1, val_images=6))
    path = toy / "annotations" / "instances_val2017.json"
    annotations = json.loads(path.read_text())
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(jittered(annotations)))
    entry = {
        "annotations": str(path),
        "images": str(toy / "val2017"),
        "detections": "results.json",
        "image_count": 6,
        "figures": FIGURES,
        "per_class": [
            {"name": "star", "AP": 31.41, "AP50": 59.26, "instances": 53},
            {"name": "cross", "AP": None, "AP50": None, "instances": 0},
            {"name": "circle", "AP": 71.41, "AP50": 89.26, "instances": 47},
        ],
    }
    metrics = {
        "weights": "weights.pth",
        "config": "toy.yaml",
        "versions": {"torch": "2.9.1"},
        "hardware": "2 cores",
        "datasets": {"toy_val": entry},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "metrics.jsonl").write_text("\n".join(training_lines()) + "\n")
    (folder / "config.yaml").write_text(
        "MODEL:\n  RESNETS: {DEPTH: 26, NUM_GROUPS: 8, WIDTH_PER_GROUP: 4}\n"
        "SOLVER: {MAX_ITER: 12000, BASE_LR: 0.04, STEPS: [280, 320], IMS_PER_BATCH: 8}\n"
    )
    return folder


def training_lines() -> list[str]:
    keys = ("total_loss", "loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc")
    lines = [
        json.dumps({"iteration": i, "lr": 0.1, **{key: 20 / (i + n) for n, key in enumerate(keys)}})
        for i in range(19, 400, 20)
    ]
    return [*lines, '{"iteration": 400, "bbox/AP": 41.25, "bbox/AP50": 62.35}']


@pytest.fixture()
def annotation_file(run: Path) -> Path:
    """Return the annotations that the run was evaluated with."""
    return run.parent / "toy" / "annotations" / "instances_val2017.json"


@pytest.fixture(scope="session")
def evaluated_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that was evaluated in earnest, with errors of every kind.

    It is shared: copy it to change it.
    """
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
    truth = read_truth(path)
    folder = root / "run"
    old, new = (Detections.of(_erring(document, generator, share)) for share in (0.5, 0.3))
    description = {"weights": "weights.pth"}
    arguments = "toy_val", description, truth
    first = evaluate_detections(truth, old)
    write_evaluated(root / "earlier", *arguments, old, first, {"images": str(toy / "val2017")})
    metrics = root / "earlier" / "metrics.json"
    entry = {
        "images": str(toy / "val2017"),
        "engine": vars(Engine(cross_check=True)),
        "baseline": baseline.document(metrics, baseline.compare(truth, old, new, resamples=50)),
    }
    write_evaluated(folder, *arguments, new, evaluate_detections(truth, new), entry)
    return folder


def _erring(
    document: dict[str, Any], generator: np.random.Generator, share: float
) -> list[dict[str, Any]]:
    """Return predictions of which a share has another class, and as many another place."""
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
