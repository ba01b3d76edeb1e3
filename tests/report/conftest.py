"""A run that was evaluated in earnest, and whose names are hostile."""

from __future__ import annotations

import dataclasses
import json
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
    *("class 1", "class 2", "class 10", "apple", "Banana", "cherry", "dog", "zebra"),
    *("</script><script>alert(1)</script>", "\"quoted\" & 'so'", "a\u2028line", "<b>bold"),
)
"""Of `evaluated_run`: some would break out of text, of attributes, or of a script's data."""


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
    truth = read_ground_truth(path)
    folder = root / "run"
    old, new = (Detections.of(_erring(document, generator, share), truth) for share in (0.5, 0.3))
    description = {"weights": "weights.pth"}
    arguments = "toy_val", description, truth
    first = {"bbox": evaluate_detections(truth, old)}
    write_evaluated(root / "earlier", *arguments, old, first, {"images": str(toy / "val2017")})
    metrics = root / "earlier" / "metrics.json"
    # Too few images for real intervals, and a page shows some.
    differences = tuple(
        dataclasses.replace(each, lower=each.difference - 4, upper=each.difference + 4)
        if each.difference is not None and each.figure[-1] != "l"
        else each
        for each in compare(truth, old, new, resamples=0)
    )
    entry = {
        "images": str(toy / "val2017"),
        "engine": vars(Engine(cross_check=True)),
        "baseline": comparison_document(metrics, differences),
    }
    write_evaluated(folder, *arguments, new, {"bbox": evaluate_detections(truth, new)}, entry)
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
