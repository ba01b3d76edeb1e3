"""The results file of a classifier: figures, classes, confusions and the worst images."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import numpy as np

from resnext_det.data.classification import LabelledImages
from resnext_det.environment import commit, hardware, versions
from resnext_det.evaluation.classification import Predictions
from resnext_det.evaluation.results_file import INFERENCE
from resnext_det.files import write_json

CLASSIFICATION = "classification.json"
_WORST = 24
_SIDE = 256  # pixels


def results_file(run: Path) -> Path:
    """Return where a run keeps its results."""
    return run / INFERENCE / CLASSIFICATION


def write_results(
    run: Path, found: Mapping[str, Predictions], images: LabelledImages, weights: str
) -> None:
    """Write the results of a test.

    Args:
        run: the folder of the training.
        found: predictions by kind, "" for those among all classes.
        images: that were classified.
        weights: what classified them.

    Raises:
        ResNeXtError: the file cannot be written.
    """
    every = found[""]
    labels, best = every.labels.numpy(), every.best.numpy()
    right, right_of_five = best[:, 0] == labels, (best == labels[:, None]).any(1)
    count = len(images.classes)
    totals = np.bincount(labels, minlength=count)
    # Of a thousand classes, few of the million pairs occur.
    pairs, counts = np.unique(labels * count + best[:, 0], return_counts=True)
    worst = every.losses.argsort(descending=True)[:_WORST].tolist()
    content = {
        "weights": weights,
        "source": str(images.source),
        "image_count": len(labels),
        "date": datetime.now().isoformat(timespec="seconds"),
        "figures": {kind or "all_classes": each.figures for kind, each in found.items()},
        "classes": [
            {
                "name": name,
                "images": int(totals[number]),
                "top1": 100 * float(right[labels == number].mean()),
                "top5": 100 * float(right_of_five[labels == number].mean()),
            }
            for number, name in enumerate(images.classes)
            if totals[number]
        ],
        "confusion": [
            [images.classes[pair // count], images.classes[pair % count], number]
            for pair, number in zip(pairs.tolist(), counts.tolist())
        ],
        "worst": [
            {
                "image": images.name(int(every.numbers[place])),
                "class": images.classes[labels[place]],
                "predicted": images.classes[best[place, 0]],
                "confidence": float(every.confidence[place]),
                "loss": float(every.losses[place]),
                "jpeg": _thumbnail(images, int(every.numbers[place])),
            }
            for place in worst
        ],
        "versions": versions(),
        "hardware": hardware(),
        "commit": commit(),
    }
    write_json(results_file(run), content)


def _thumbnail(images: LabelledImages, number: int) -> str:
    picture = images.picture(number)
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()
