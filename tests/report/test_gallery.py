"""The gallery: the score that orders its pictures, and which of them are shown."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from resnext_det.evaluation.results_file import read_metrics
from resnext_det.report.gallery import make_gallery


def test_the_gallery_has_the_best_and_the_worst(run: Path) -> None:
    gallery = make_gallery(read_metrics(run).evaluations[0], 3)
    assert (len(gallery.best), len(gallery.worst), gallery.missing) == (2, 1, 0)
    everything = make_gallery(read_metrics(run).evaluations[0], 24)
    scores = sorted(entry.outcome.score for entry in everything.entries)
    assert [entry.outcome.score for entry in gallery.best] == scores[::-1][:2]
    assert [entry.outcome.score for entry in gallery.worst] == scores[:1]
    names = [entry.file_name for entry in everything.entries]
    assert len(names) == len(set(names))
    header, _, encoded = gallery.best[0].picture.partition(",")
    assert header == "data:image/jpeg;base64"
    size = Image.open(io.BytesIO(base64.b64decode(encoded))).size
    assert size == (gallery.best[0].width, gallery.best[0].height)


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
    assert (entry.outcome.found, entry.outcome.right) == ([True], [True, False])
    # The surer, shifted one has the match.
    assert entry.outcome.score == pytest.approx(0.6 / 1.5)
    assert [box.right for box in entry.predictions] == [True, False, False]


def test_nothing_is_best_where_nothing_was_found(run: Path) -> None:
    evaluation = read_metrics(run).evaluations[0]
    results = json.loads((run / "results.json").read_text())
    some = make_gallery(evaluation, 3)
    (run / "results.json").write_text(json.dumps([]))
    gallery = make_gallery(evaluation, 3)
    assert (gallery.best, len(gallery.worst), gallery.detections) == ([], 3, 0)
    kept = [each for each in results if each["image_id"] == results[0]["image_id"]]
    (run / "results.json").write_text(json.dumps(kept))
    gallery = make_gallery(evaluation, 6)
    assert (len(gallery.best), len(gallery.worst), gallery.detections) == (1, 5, len(kept))
    assert some.detections == len(results) > len(kept)


def test_names_that_lead_out_of_the_folder_are_not_opened(
    run: Path, annotation_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    document = json.loads(annotation_file.read_text())
    evaluation = read_metrics(run).evaluations[0]
    outside = run.parent / "outside.jpg"
    outside.write_bytes((evaluation.images / document["images"][0]["file_name"]).read_bytes())
    document["images"][0]["file_name"] = "../../outside.jpg"
    document["images"][1]["file_name"] = str(outside)
    document["images"][2]["file_name"] = "\0.jpg"
    document["images"][3]["file_name"] = "a" * 5000
    annotation_file.write_text(json.dumps(document))
    gallery = make_gallery(evaluation, 24)
    assert gallery.missing == 4
    assert len(gallery.entries) == 2
    assert "2 file names, such as '../../outside.jpg', lead out" in caplog.text


def test_other_annotations_than_those_of_the_evaluation_are_noticed(run: Path) -> None:
    evaluation = read_metrics(run).evaluations[0]
    assert not make_gallery(evaluation, 1).other_annotations
    assert make_gallery(replace(evaluation, annotations_sha256="0" * 64), 1).other_annotations


def test_the_most_confused_are_those_with_most_objects_of_another_class(
    evaluated_run: Path,
) -> None:
    evaluation = read_metrics(evaluated_run).evaluations[0]
    gallery = make_gallery(evaluation, 6)
    assert [len(group) for group in (gallery.best, gallery.worst, gallery.confused)] == [2, 2, 2]
    assert len({entry.file_name for entry in gallery.entries}) == 6
    ends = {entry.file_name for entry in gallery.best + gallery.worst}
    everything = make_gallery(evaluation, 99).entries
    others = [entry for entry in everything if entry.file_name not in ends]
    counts = sorted((entry.outcome.confused for entry in others), reverse=True)
    assert [entry.outcome.confused for entry in gallery.confused] == counts[:2]
    assert counts[0] > counts[-1]
