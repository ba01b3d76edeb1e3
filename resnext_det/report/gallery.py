"""Images for the report: the best, the worst, the most confused, and labels that may be wrong."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from resnext_det.data.patch import FORMAT
from resnext_det.data.records import leads_out
from resnext_det.errors import DatasetError, quoted
from resnext_det.evaluation.annotations import GroundTruth, read_ground_truth
from resnext_det.evaluation.coco import hotcoco_evaluation
from resnext_det.evaluation.detections import Detections, read_detections
from resnext_det.evaluation.label_errors import LabelError, can_be_named, likely_label_errors
from resnext_det.evaluation.results_file import DatasetMetrics
from resnext_det.files import file_digest
from resnext_det.images import read_picture
from resnext_det.visualize.draw import Colour, Drawn, draw_objects

logger = logging.getLogger(__name__)

SHOWN_FROM = 0.5
"""Lowest score of the predictions that are drawn and counted."""
MATCHED_FROM = 0.5
"""Lowest IoU of a prediction with the object that it finds."""

# Okabe and Ito's colours: they stay distinct for most kinds of colour blindness.
FOUND, CORRECT, WRONG, IGNORED = (0, 158, 115), (0, 114, 178), (213, 94, 0), (130, 130, 130)
_COLOURS: Mapping[str, Colour] = {"matched": FOUND, "fn": WRONG, "tp": CORRECT, "fp": WRONG}
MOST_QUESTIONS = 24
_QUESTIONS = {
    "missing": "is a label missing here, {now}?",
    "class": "labelled {was}, is it {now}?",
    "box": "is the blue box of {now} better than the label's?",
    "extra": "labelled {was}, is this label wrong?",
}
_MARGIN = 0.75, 32.0  # around a label: a share of its longer side, and pixels
_SIDE, _LABEL = 480, 18  # pixels; a page shows an image at about half its size


@dataclass(frozen=True)
class GalleryImage:
    """An image of the gallery.

    Attributes:
        file_name: as in the annotations.
        truth: a data URI of the image with its ground truth.
        predictions: one with the predictions.
        found: number of objects found.
        missed: number of objects missed.
        false: number of false predictions.
        confused: number of false predictions on an object of another class.
        f1: of the image, 0 to 1.
    """

    file_name: str
    truth: str
    predictions: str
    found: int
    missed: int
    false: int
    confused: int
    f1: float


@dataclass(frozen=True)
class Question:
    """A label that may be wrong.

    Attributes:
        file_name: of its image.
        picture: a data URI of the part around the label.
        text: the question, to answer with yes or no.
        suspicion: 0 to 1.
        edit: for a yes, as JSON.
    """

    file_name: str
    picture: str
    text: str
    suspicion: float
    edit: str


@dataclass(frozen=True)
class Gallery:
    """The images in groups, each in one only, and questions about their labels.

    Attributes:
        groups: "Best" (highest F1), "Worst" (lowest), and "Most confused of the others".
        questions: the most suspicious first.
        suspected: how many labels may be wrong, with those that are not asked about.
        patch: what a patch of these annotations says besides its edits, as JSON; "" if the ids of
            labels repeat or are missing, so that no edit can name them.
        missing: number of images that are missing or unreadable.
        outdated: whether annotations or detections have changed since the evaluation.
    """

    groups: dict[str, list[GalleryImage]]
    questions: list[Question]
    suspected: int
    patch: str
    missing: int
    outdated: bool


def make_gallery(evaluation: DatasetMetrics, limit: int) -> Gallery:
    """Choose up to `limit` images of an evaluation, a third for each group, and draw their boxes.

    hotcoco matches at IoU 0.5 with scores of at least 0.5. Images with neither an object nor a
    prediction are left out.

    Raises:
        DatasetError: annotations or detections are missing or malformed.
    """
    truth, detections = _read(evaluation)
    shown = detections.where(detections.scores >= SHOWN_FROM)
    diagnostics = hotcoco_evaluation(truth, shown).image_diagnostics(
        iou_thr=MATCHED_FROM, score_thr=SHOWN_FROM
    )
    confusions = [each for each in diagnostics["label_errors"] if each["type"] == "wrong_label"]
    confused = Counter(each["image_id"] for each in confusions)
    files = dict(zip(truth.image_ids.tolist(), truth.file_names))
    outside = [name for name in files.values() if leads_out(name)]
    if outside:
        logger.warning(
            "%d file names, such as %s, lead out of %s: these images are not opened",
            len(outside),
            quoted(outside[0]),
            quoted(evaluation.images),
        )
    present = {name for name in files.values() if _is_picture(evaluation.images, name)}
    summary = {
        image_id: each
        for image_id, each in diagnostics["img_summary"].items()
        if files[image_id] in present
    }
    groups: dict[str, list[GalleryImage]] = {}
    unreadable = 0
    for heading, ids in _chosen(summary, confused, limit).items():
        groups[heading] = []
        for image_id in ids:
            try:
                picture = read_picture(evaluation.images / files[image_id])
            except DatasetError as error:
                logger.warning("the report leaves out an image: %s", error)
                unreadable += 1
                continue
            counts = summary[image_id]
            entry = GalleryImage(
                file_name=files[image_id],
                truth=_with_truth(picture, truth, image_id, diagnostics),
                predictions=_with_predictions(picture, truth, shown, image_id, diagnostics),
                found=counts["tp"],
                missed=counts["fn"],
                false=counts["fp"],
                confused=confused[image_id],
                f1=counts["f1"],
            )
            groups[heading].append(entry)
    digests = {
        evaluation.annotations_sha256: truth.sha256,
        evaluation.detections_sha256: file_digest(evaluation.detections),
    }
    suspects = likely_label_errors(truth, detections) if can_be_named(truth) else []
    about = {
        "format": FORMAT,
        "annotations": truth.file.name,
        "annotations_sha256": truth.sha256,
    }
    return Gallery(
        {heading: entries for heading, entries in groups.items() if entries},
        questions=_questions(evaluation.images, truth, suspects, files, present),
        suspected=len(suspects),
        patch=json.dumps(about) if can_be_named(truth) else "",
        missing=sum(name not in present for name in files.values()) + unreadable,
        outdated=any(recorded and recorded != now for recorded, now in digests.items()),
    )


def _questions(
    folder: Path,
    truth: GroundTruth,
    suspects: Sequence[LabelError],
    files: Mapping[int, str],
    present: Collection[str],
) -> list[Question]:
    """Draw the most suspicious labels beside what was detected instead."""
    questions: list[Question] = []
    for each in suspects:
        if len(questions) == MOST_QUESTIONS:
            break
        name = files[each.image_id]
        if name not in present:
            continue
        try:
            picture = read_picture(folder / name)
        except DatasetError:
            continue  # the gallery has warned
        drawn: list[tuple[list[float], str, Colour]] = []
        names = {"was": "", "now": ""}
        if each.found is not None:
            category, score, box = each.found
            names["now"] = truth.categories[category]
            drawn.append((box, f"{names['now']} {score:.2f}", CORRECT))
        if each.label is not None:
            names["was"] = truth.categories[int(truth.objects.category_ids[each.label])]
            place = truth.objects.boxes[each.label].tolist()
            drawn.append((place, f"label: {names['was']}", WRONG))
        corners = np.array([box for box, _, _ in drawn])
        low = corners[:, :2].min(axis=0)
        high = (corners[:, :2] + corners[:, 2:]).max(axis=0)
        margin = max(_MARGIN[0] * float((high - low).max()), _MARGIN[1])
        left, top = np.clip(low - margin, 0, np.array(picture.size) - 1).astype(int).tolist()
        right, bottom = (
            np.clip(high + margin, (left + 1, top + 1), picture.size).astype(int).tolist()
        )
        others = np.flatnonzero(truth.objects.image_ids == each.image_id).tolist()
        drawn += [
            (truth.objects.boxes[row].tolist(), "", FOUND) for row in others if row != each.label
        ]
        boxes, labels, colours = zip(*drawn)
        corners = np.array(boxes)
        corners[:, :2] -= (left, top)
        part = picture.crop((left, top, right, bottom))
        question = Question(
            file_name=name,
            picture=data_uri(part, corners.tolist(), labels, colours),
            text=_QUESTIONS[each.kind].format(**names),
            suspicion=each.suspicion,
            edit=json.dumps(each.edit(truth)),
        )
        questions.append(question)
    return questions


def _read(evaluation: DatasetMetrics) -> tuple[GroundTruth, Detections]:
    try:
        truth = read_ground_truth(evaluation.annotations, checked=True)
        detections = read_detections(evaluation.detections, truth)
    except DatasetError as error:
        raise DatasetError(f"{error} Restore the file, or evaluate the run again.") from error
    return truth, detections


def _is_picture(folder: Path, file_name: str) -> bool:
    """Tell whether a name from untrusted annotations is a file inside a folder."""
    try:
        return not leads_out(file_name) and (folder / file_name).is_file()
    except (OSError, ValueError):  # too long, or with a zero byte
        return False


def _chosen(
    summary: Mapping[int, Mapping[str, Any]], confused: Mapping[int, int], limit: int
) -> dict[str, list[int]]:
    """Return the ids of the images to show, by group."""
    ids = sorted(summary)  # hotcoco's order is random
    third = -(-min(limit, len(ids)) // 3)

    def errors(image_id: int) -> int:
        return int(summary[image_id]["fp"] + summary[image_id]["fn"])

    def f1(image_id: int) -> float:
        return float(summary[image_id]["f1"])

    best = sorted(ids, key=lambda each: (-f1(each), -summary[each]["tp"]))[:third]
    best = [each for each in best if f1(each) > 0]
    rest = [each for each in ids if each not in best]
    worst = sorted(rest, key=lambda each: (f1(each), -errors(each)))[:third]
    rest = [each for each in rest if each not in worst and confused.get(each)]
    most = sorted(rest, key=lambda each: -confused[each])[: max(0, limit - 2 * third)]
    return {"Best": best, "Worst": worst, "Most confused of the others": most}


def _with_truth(
    picture: Image.Image, truth: GroundTruth, image_id: int, diagnostics: Mapping[str, Any]
) -> str:
    rows = np.flatnonzero(truth.objects.image_ids == image_id).tolist()
    classes = truth.objects.category_ids
    return data_uri(
        picture,
        truth.objects.boxes[rows].tolist(),
        [truth.categories[int(classes[row])] for row in rows],
        # hotcoco numbers objects and detections from 1, and leaves out those that COCO ignores.
        [_COLOURS.get(diagnostics["gt_status"].get(row + 1), IGNORED) for row in rows],
    )


def _with_predictions(
    picture: Image.Image,
    truth: GroundTruth,
    shown: Detections,
    image_id: int,
    diagnostics: Mapping[str, Any],
) -> str:
    rows = np.flatnonzero(shown.image_ids == image_id)
    rows = rows[np.argsort(-shown.scores[rows], kind="stable")]
    instead_of = {
        each["dt_id"]: f", not {each['gt_category']}"
        for each in diagnostics["label_errors"]
        if each["type"] == "wrong_label"
    }
    return data_uri(
        picture,
        shown.boxes[rows].tolist(),
        [
            f"{truth.categories[int(shown.category_ids[row])]} {shown.scores[row]:.2f}"
            f"{instead_of.get(row + 1, '')}"
            for row in rows.tolist()
        ],
        [_COLOURS.get(diagnostics["dt_status"].get(row + 1), IGNORED) for row in rows.tolist()],
    )


def data_uri(
    picture: Image.Image,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[str],
    colours: Sequence[Colour],
) -> str:
    """Return a resized image with boxes as a JPEG in a data: URI."""
    scale = _SIDE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    resized = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    objects = [
        Drawn([scale * side for side in box], label, colour)
        for box, label, colour in zip(boxes, labels, colours)
    ]
    buffer = io.BytesIO()
    drawn = draw_objects(resized, objects, label_size=_LABEL)
    drawn.save(buffer, "JPEG", quality=80, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
