"""Labels broken on purpose are suspected first, and a patch restores them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resnext_det.data.patch import FORMAT, apply_patch
from resnext_det.errors import DatasetError
from resnext_det.evaluation.annotations import GroundTruth, read_ground_truth
from resnext_det.evaluation.coco import Figures
from resnext_det.evaluation.detections import Detections
from resnext_det.evaluation.evaluator import evaluate_detections, write_evaluated
from resnext_det.evaluation.label_errors import likely_label_errors
from resnext_det.files import file_digest
from resnext_det_cli import main

Document = dict[str, Any]


def boxes_of(document: Document) -> set[tuple[Any, ...]]:
    """Return the labels without their ids."""
    return {
        (each["image_id"], each["category_id"], *np.round(each["bbox"], 1).tolist())
        for each in document["annotations"]
    }


def detected(document: Document, jitter: float = 0.0) -> list[Document]:
    """Return what a good detector would find: every object, and noise with low scores."""
    generator = np.random.default_rng(1)
    found = []
    for each in document["annotations"]:
        place = {key: each[key] for key in ("image_id", "category_id")}
        box = np.array(each["bbox"]) + generator.uniform(-jitter, jitter, 4)
        found.append({**place, "bbox": box.tolist(), "score": float(generator.uniform(0.8, 1))})
        other = {"category_id": each["category_id"] % 6 + 1, "bbox": each["bbox"]}
        found.append({**place, **other, "score": float(generator.uniform(0.05, 0.3))})
    return found


@pytest.fixture()
def broken(toy: GroundTruth, tmp_path: Path) -> tuple[Path, Document, dict[str, set[Any]]]:
    """Return a broken copy of the labels, the original, and by kind what was broken.

    For a missing label that is its image, otherwise the label's id.
    """
    original = json.loads(toy.file.read_text())
    sizes = {each["id"]: each["width"] for each in original["images"]}
    document = json.loads(toy.file.read_text())
    labels = document["annotations"]
    dropped = [labels.pop(at) for at in (40, 23, 3)]
    wrong, moved = labels[7:60:9], labels[6:60:11]
    for each in wrong:
        each["category_id"] = each["category_id"] % 6 + 1
    for each in moved:
        x, _, width, _ = each["bbox"]
        right = x + 1.5 * width < sizes[each["image_id"]]
        each["bbox"][0] = x + (0.4 if right else -0.4) * width  # IoU 0.43
    invented = {
        **labels[0],
        "id": 500_000,
        "image_id": labels[30]["image_id"],
        "bbox": [0, 0, 9, 9],
    }
    labels.append(invented)
    kinds = {
        "missing": {each["image_id"] for each in dropped},
        "class": {each["id"] for each in wrong},
        "box": {each["id"] for each in moved},
        "extra": {invented["id"]},
    }
    file = tmp_path / "broken.json"
    file.write_text(json.dumps(document))
    return file, original, kinds


@pytest.mark.parametrize("jitter", [0.0, 1.5])
def test_broken_labels_come_first(
    broken: tuple[Path, Document, dict[str, set[Any]]], jitter: float
) -> None:
    file, original, kinds = broken
    truth = read_ground_truth(file)
    detections = Detections.of(detected(original, jitter), truth)
    errors = likely_label_errors(truth, detections)
    count = sum(map(len, kinds.values()))
    found: dict[str, set[Any]] = {kind: set() for kind in kinds}
    for each in errors[:count]:
        found[each.kind].add(each.image_id if each.label is None else truth.ids[each.label])
    assert found == kinds
    assert len(errors) == count or errors[count].suspicion < 0.5
    suspicions = [each.suspicion for each in errors]
    assert suspicions == sorted(suspicions, reverse=True)


@pytest.mark.parametrize(("score", "suspected"), [(0.1, True), (0.35, False)])
def test_a_label_that_is_nearly_found_is_no_extra(
    toy: GroundTruth, score: float, suspected: bool
) -> None:
    found = detected(json.loads(toy.file.read_text()))
    best = next(each for each in found if each["score"] >= 0.8)
    best["score"] = score
    found.remove(found[1])  # the noise there
    errors = likely_label_errors(toy, Detections.of(found, toy))
    assert [each.kind for each in errors] == ["extra"] * suspected


def test_a_patch_restores_the_labels(
    broken: tuple[Path, Document, dict[str, set[Any]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, original, _ = broken
    truth = read_ground_truth(file)
    detections = Detections.of(detected(original), truth)
    run = tmp_path / "run"
    evaluated = {"bbox": evaluate_detections(truth, detections)}
    more = {"images": str(tmp_path), "engine": {"name": "hotcoco", "cross_check": False}}
    model = {"weights": "w.pth"}
    write_evaluated(run / "inference", "toy", model, truth, detections, evaluated, more)
    edits = [each.edit(truth) for each in likely_label_errors(truth, detections)]
    patch, fixed = tmp_path / "patch.json", tmp_path / "new" / "fixed.json"
    about = {"format": FORMAT, "annotations_sha256": truth.sha256}
    patch.write_text(json.dumps({**about, "edits": edits}))
    before = file.read_bytes()
    words = [str(patch), "--annotations", str(file), "--output", str(fixed), "--run", str(run)]
    assert main(["apply-patch", *words]) == 0
    assert file.read_bytes() == before
    result = json.loads(fixed.read_text())
    assert boxes_of(result) == boxes_of(original)
    assert len({each["id"] for each in result["annotations"]}) == len(original["annotations"])
    moved = [each["id"] for each in map(dict, edits) if "id" in each and "bbox" in each]
    for each in result["annotations"]:
        assert ("segmentation" in each) == (each["id"] in truth.ids and each["id"] not in moved)
    printed = capsys.readouterr().out
    assert "15 labels changed: " in printed and "3 added" in printed and "1 removed" in printed
    assert f"{len(moved)} moved boxes had a mask" in printed
    figures: Figures = evaluated["bbox"].figures
    ap = next(line.split() for line in printed.splitlines() if line.startswith("AP "))
    assert ap == ["AP", f"{figures.figures['AP']:.2f}", "100.00"]


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        ({"edit": "remove", "id": 10**9}, "has no valid id:"),
        ({"edit": "change", "id": 1, "category_id": 99}, "has no valid category_id:"),
        ({"edit": "remove", "id": [[[]]]}, "has no valid id:"),
        ({"edit": "remove", "id": True}, "has no valid id:"),
        ({"edit": "remove", "id": 2}, "has no valid id:"),  # edited before
        ({"edit": "change", "id": 3, "category_id": 1}, "must have it once"),
        ({"edit": "change", "id": 1, "bbox": [0, 0, 50, float("nan")]}, "no box"),
        ({"edit": "change", "id": 1, "bbox": [90, 0, 50, 50]}, "no box"),
        ({"edit": "add", "image_id": 1, "category_id": 1, "bbox": [0, 0, 0, 5]}, "no box"),
        ({"edit": "add", "image_id": 1, "category_id": 1, "bbox": "\x1b]0;"}, "no box"),
        ({"edit": "remove", "id": 1, "file_name": "/etc/passwd"}, "is not an edit that a report"),
        ({"edit": "__class__", "id": 1}, "is not an edit that a report"),
        ("\x1b[2J" * 9999, "is not an edit that a report"),
    ],
)
def test_refuses_hostile_edits(tmp_path: Path, edit: Any, reason: str) -> None:
    box = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9]}
    document = {
        "images": [{"id": 1, "width": 100, "height": 100, "file_name": "a.jpg"}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{**box, "id": number} for number in (1, 2, 3, 3)] + [None],
    }
    file, patch = tmp_path / "labels.json", tmp_path / "patch.json"
    file.write_text(json.dumps(document))
    edits = [{"edit": "remove", "id": 2}, edit]
    about = {"format": FORMAT, "annotations_sha256": file_digest(file)}
    patch.write_text(json.dumps({**about, "edits": edits}))
    with pytest.raises(DatasetError, match=reason) as refused:
        apply_patch(patch, file)
    assert "edit 2 of 2" in str(refused.value)
    assert len(str(refused.value)) < 600 and str(refused.value).isprintable()


def test_refuses_patches_of_other_files(
    toy: GroundTruth, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patch, output = tmp_path / "patch.json", tmp_path / "fixed.json"
    words = ["apply-patch", str(patch), "--annotations", str(toy.file)]
    for content, reason in (
        ({"format": FORMAT, "annotations_sha256": "0" * 64, "edits": []}, "for another file"),
        ({"format": FORMAT, "annotations_sha256": toy.sha256, "edits": {}}, "is not a patch"),
        ({"annotations_sha256": toy.sha256, "edits": []}, "is not a patch"),
        ([], "is not a patch"),
    ):
        patch.write_text(json.dumps(content))
        with pytest.raises(SystemExit):
            main([*words, "--output", str(output)])
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1
        assert not output.exists()
    with pytest.raises(SystemExit):
        main([*words, "--output", str(toy.file.parent / ".." / "annotations" / toy.file.name)])
    assert "--output must be another file" in capsys.readouterr().err
