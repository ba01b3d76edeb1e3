"""A toy data set with enough images for intervals."""

from __future__ import annotations

import pytest

from resnext_det.data.toy import ToySpec, write_toy_coco
from resnext_det.evaluation.annotations import GroundTruth, read_ground_truth


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> GroundTruth:
    spec = ToySpec(train_images=1, val_images=30)
    root = write_toy_coco(tmp_path_factory.mktemp("toy") / "coco", spec)
    return read_ground_truth(root / "annotations" / "instances_val2017.json")
