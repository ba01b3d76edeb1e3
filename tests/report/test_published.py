"""Published figures beside a run: of the same network, on the same images, or none."""

from __future__ import annotations

from pathlib import Path

import pytest

from resnext_det import model_zoo
from resnext_det.evaluation.run_folder import Evaluation
from resnext_det.published.results import published_results
from resnext_det.report.config import ConfigSummary, summary_of
from resnext_det.report.published import published_beside


def config(name: str = "faster_rcnn_X_101_32x4d_FPN_1x") -> ConfigSummary:
    return summary_of(model_zoo.get_config(name).dump())


def evaluation(name: str, images: int = 5000) -> Evaluation:
    return Evaluation(
        name=name,
        annotations=Path("a"),
        annotations_sha256="",
        images=Path("b"),
        detections=Path("c"),
        detections_sha256="",
        image_count=images,
        figures={},
        per_class=[],
    )


@pytest.mark.parametrize(
    "name",
    ["coco_2014_minival", "coco_2017_val", "instances_val2017", "instances_minival2014"],
)
def test_all_that_is_published_of_the_network_stands_there(name: str) -> None:
    found = published_beside(evaluation(name), config())
    assert found.reason == ""
    assert (found.rows[0].AP, found.rows[0].AP50) == (30.0, 51.9)  # the paper's Table 8
    assert "C4, not FPN" in found.rows[0].differs
    published = published_results(101, "32x4d")
    assert sorted(row.AP for row in found.rows) == sorted(row.AP for row in published)
    assert any("without FPN" in sentence for sentence in found.caveats)
    # Both are minival, by whatever name, and the 1x of mmdetection is as long as this one.
    assert not any("evaluated on" in row.differs for row in found.rows)
    same = next(row for row in found.rows if "metafile" in row.source and row.schedule == "1x")
    assert "epochs" not in same.differs


@pytest.mark.parametrize(
    ("name", "images", "reason"),
    [
        ("toy_coco_minival", 5000, "of COCO minival and cannot be compared"),
        ("coco_2014_minival_100", 100, "of COCO minival and cannot be compared"),
        ("coco_2017_val", 4999, "all 5,000 images"),
        ("instances_val2017", 100, "all 5,000 images"),
        ("instances_val2014", 5000, "of COCO minival and cannot be compared"),
    ],
)
def test_other_images_are_not_compared(name: str, images: int, reason: str) -> None:
    found = published_beside(evaluation(name, images), config())
    assert (found.rows, found.caveats) == ((), ())
    assert reason in found.reason


def test_without_a_config_or_a_publication_this_is_said() -> None:
    assert "no config.yaml" in published_beside(evaluation("coco_2017_val"), None).reason
    toy = config("faster_rcnn_X_26_8x4d_FPN_toy")
    found = published_beside(evaluation("coco_2017_val"), toy)
    assert found.reason == "There are no published figures of ResNeXt-26 8x4d."
