"""The gallery: the score that orders its pictures, and which of them are shown."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from resnext_det.evaluation.gallery import Labelled, compare, make_gallery
from resnext_det.evaluation.run_folder import read_metrics

TRUE = Labelled([10, 10, 40, 40], category=1)


def test_a_perfect_image_scores_one_and_an_empty_one_too() -> None:
    assert compare([TRUE], [TRUE]).score == 1
    assert compare([], []).score == 1


def test_missed_and_false_boxes_halve_the_score() -> None:
    other = replace(TRUE, category=2)
    outcome = compare([TRUE, other], [TRUE])
    assert (outcome.found, outcome.right) == ([True, False], [True])
    assert outcome.score == pytest.approx(1 / 1.5)
    outcome = compare([TRUE], [TRUE, TRUE])
    assert (outcome.found, outcome.right) == ([True], [True, False])
    assert outcome.score == pytest.approx(1 / 1.5)
    assert compare([TRUE], [other]).score == 0


def test_a_match_needs_half_of_the_union() -> None:
    shifted = replace(TRUE, xywh=[20, 10, 40, 40])
    assert compare([TRUE], [shifted]).score == pytest.approx(0.6)
    further = replace(TRUE, xywh=[24, 10, 40, 40])
    assert compare([TRUE], [further]).right == [False]


def test_the_nearest_free_box_is_taken() -> None:
    near, far = replace(TRUE, xywh=[12, 10, 40, 40]), replace(TRUE, xywh=[16, 10, 40, 40])
    assert compare([far, near], [TRUE]).found == [False, True]
    assert compare([far, near], [TRUE, TRUE]).found == [True, True]


def test_crowds_are_neither_found_nor_missed() -> None:
    crowd = replace(TRUE, xywh=[0, 0, 200, 200], crowd=True)
    outcome = compare([crowd], [TRUE])
    assert (outcome.found, outcome.right, outcome.score) == ([None], [None], 1)
    assert compare([crowd], [replace(TRUE, category=2)]).right == [False]


def test_the_gallery_has_the_best_and_the_worst(run: Path) -> None:
    gallery = make_gallery(read_metrics(run).evaluations[0], 3)
    assert (len(gallery.best), len(gallery.worst), gallery.missing) == (2, 1, 0)
    everything = make_gallery(read_metrics(run).evaluations[0], 24)
    scores = sorted(entry.score for entry in everything.best + everything.worst)
    assert [entry.score for entry in gallery.best] == scores[::-1][:2]
    assert [entry.score for entry in gallery.worst] == scores[:1]
    names = [entry.file_name for entry in everything.best + everything.worst]
    assert len(names) == len(set(names))
    header, _, encoded = gallery.best[0].truth.partition(",")
    assert header == "data:image/jpeg;base64"
    assert min(Image.open(io.BytesIO(base64.b64decode(encoded))).size) >= 320


def test_others_take_the_place_of_missing_pictures(run: Path) -> None:
    evaluation = read_metrics(run).evaluations[0]
    first = make_gallery(evaluation, 3).worst[0]
    (evaluation.images / first.file_name).unlink()
    gallery = make_gallery(evaluation, 3)
    assert (len(gallery.best), len(gallery.worst), gallery.missing) == (2, 1, 1)


def test_sure_predictions_come_first_and_unsure_ones_do_not_count(
    run: Path, annotation_file: Path
) -> None:
    box = [20.0, 20.0, 40.0, 40.0]
    document = json.loads(annotation_file.read_text())
    image = document["images"][0]["id"]
    document["annotations"] = [{"image_id": image, "category_id": 1, "bbox": box}]
    annotation_file.write_text(json.dumps(document))
    shifted = [30.0, 20.0, 40.0, 40.0]
    results = [
        {"image_id": image, "category_id": 1, "bbox": xywh, "score": score}
        for xywh, score in ((box, 0.6), (shifted, 0.9), (box, 0.4))
    ]
    (run / "results.json").write_text(json.dumps(results))
    (entry,) = make_gallery(read_metrics(run).evaluations[0], 3).best
    assert (entry.found, entry.objects, entry.false) == (1, 1, 1)
    assert entry.score == pytest.approx(0.6 / 1.5)  # the surer, shifted one has the match
