"""Panoptic quality, by hotcoco: how well things and stuff are found and outlined."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.data.catalog import Metadata
from hotcoco.panoptic import PanopticEval
from tabulate import tabulate

from resnext_det.data.annotations import read_json
from resnext_det.errors import DatasetError, EvaluationError, quoted
from resnext_det.evaluation.annotations import ImageKey
from resnext_det.prediction import run_lengths

Segments = list[tuple[bool, int, dict[str, Any]]]
"""Of one image: whether it is a thing, its class of the model, and its pixels as COCO's RLE."""

_GROUPS = {"": "All", "_th": "Things", "_st": "Stuff"}


def segments_in(output: Mapping[str, Any]) -> Segments | None:
    """Return the segments in a Panoptic FPN's output for one image; None from other models."""
    pixels, described = output.get("panoptic_seg", (None, None))
    if described is None:
        return None
    map_of_ids = pixels.cpu().numpy()
    return [
        (bool(each["isthing"]), int(each["category_id"]), run_lengths(map_of_ids == each["id"]))
        for each in described
    ]


def panoptic_figures(
    metadata: Metadata, found: Mapping[ImageKey, Segments | None]
) -> dict[str, float]:
    """Compute the figures of Detectron2's COCOPanopticEvaluator, which needs panopticapi.

    Args:
        metadata: of a data set of `register_coco_panoptic_separated`.
        found: in each image.

    Returns:
        PQ, SQ, RQ, and the same of things ("PQ_th", ...) and stuff ("PQ_st", ...), in percent;
        none of a group without segments.

    Raises:
        DatasetError: the annotations cannot be read, or do not fit the model's classes.
        EvaluationError: images of the annotations were not predicted.
    """
    file = Path(metadata.panoptic_json)
    document = read_json(file)
    try:
        tables = [
            {position: category for category, position in table.items()}
            for table in (
                metadata.stuff_dataset_id_to_contiguous_id,
                metadata.thing_dataset_id_to_contiguous_id,
            )
        ]
        missing = [each["id"] for each in document["images"] if found.get(each["id"]) is None]
        if missing:
            raise EvaluationError(
                f"{len(missing)} images of {quoted(file)} have no panoptic prediction, such as "
                f"{quoted(missing[:5])}: predict all images that it lists."
            )
        rows = [
            {"image_id": image, "category_id": tables[thing][position], "segmentation": mask}
            for image, segments in found.items()
            for thing, position, mask in segments or []
        ]
        annotations = [row | {"id": number} for number, row in enumerate(rows, start=1)]
        predicted = {**document, "annotations": annotations}
        evaluation = PanopticEval(document, predicted, gt_folder=metadata.panoptic_root)
        evaluation.evaluate()
        results = evaluation.results()
    except (AttributeError, KeyError, ValueError, TypeError, OSError) as error:
        raise DatasetError(
            f"the segments cannot be compared with {quoted(file)}: {quoted(error)}."
        ) from error
    return {
        f"{name}{end}": 100 * results[group][name.lower()]
        for end, group in _GROUPS.items()
        if results[group]["pq"] >= 0  # hotcoco's -1: nothing to compare
        for name in ("PQ", "SQ", "RQ")
    }


def panoptic_table(figures: Mapping[str, float]) -> str:
    """Return `panoptic_figures` as text."""
    rows = [
        [group, *(f"{figures[name + end]:.2f}" for name in ("PQ", "SQ", "RQ"))]
        for end, group in _GROUPS.items()
        if f"PQ{end}" in figures
    ]
    return tabulate(rows, headers=["", "PQ", "SQ", "RQ"], disable_numparse=True)
