"""The page: complete, self-contained, inert whatever names it shows, written whole or not at all.

`Page` refuses every tag and attribute that could load or run anything but our script, in each test.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resnext_det.data.custom import CustomData
from resnext_det.errors import ConfigError, DatasetError, ResNeXtError
from resnext_det.evaluation.annotations import read_ground_truth
from resnext_det.evaluation.classified import results_file
from resnext_det.evaluation.detections import read_detections
from resnext_det.evaluation.evaluator import evaluate_detections
from resnext_det.evaluation.results_file import read_metrics
from resnext_det.files import file_digest
from resnext_det.report import page as page_module
from resnext_det.report.facts import run_config, training_objects
from resnext_det.report.page import write_report
from resnext_det_cli import main
from tests.report.conftest import CLASSES, CONFIG, edit

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>"
TAGS = {
    *("html", "head", "meta", "link", "title", "style", "body", "main", "header", "section"),
    *("h1", "h2", "h3", "p", "div", "span", "br", "i", "img", "figure", "figcaption"),
    *("dl", "dt", "dd", "table", "thead", "tbody", "tr", "th", "td"),
    *("form", "label", "input", "button", "output", "script"),
}
VOID = {"meta", "link", "img", "br", "input"}
SCRIPT = (Path(page_module.__file__).parent / "patch.js").read_text()
DIGEST = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()


class Page(HTMLParser):
    """Parses a page, refusing unexpected tags, event handlers, addresses and unclosed tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.pictures: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []
        policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'none'"
        if "<script>" in self.source:
            policy += f"; script-src 'sha256-{DIGEST}'"
        assert f'content="{policy}"' in self.source

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert (value or "").startswith("data:")
                self.pictures += [value or ""] if tag == "img" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            assert not re.search(r"url\(|@import|expression", data)
        elif self.open and self.open[-1] == "script":
            assert data == SCRIPT
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        """Return what a reader sees, with single blanks."""
        return " ".join(" ".join(self.words).split())


def shown(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.1f}"


def test_figures_and_facts(evaluated_run: Path, tmp_path: Path) -> None:
    page = Page(write_report(evaluated_run, tmp_path / "new" / "page.html"))
    evaluation = read_metrics(evaluated_run).evaluations[0]
    details = json.loads(evaluation.details.read_text()) if evaluation.details else {}
    boxes = evaluation.kinds["bbox"]
    assert " ".join(boxes.figures) in page.text
    assert " ".join(map(shown, boxes.figures.values())) in page.text
    places = {}
    for each in boxes.per_class:
        values = (each.AP, each.AP50, each.APs, each.APm, each.APl, each.AR)
        best = details["by_score"].get(each.name, {}).get("best")
        score = "\u2013" if best is None else f"{best['score']:.2f}"
        row = [" ".join(each.name.split()), *map(shown, values), score, str(each.instances)]
        assert " ".join(row) in page.text
        places[each.name] = page.text.index(" ".join(row))
    by_place = sorted(boxes.per_class, key=lambda row: places[row.name])
    precisions = [-1 if each.AP is None else each.AP for each in by_place]
    assert precisions == sorted(precisions, reverse=True)
    for error in details["errors"]:
        assert f"{error['kind']}: " in page.text and f" {error['cost']:.1f} " in page.text
    cells = re.findall(r"<td style=.background: rgb[^>]*>(\d+)</td>", page.source)
    assert [int(each) for each in cells] == np.ravel(details["confusion"]["counts"]).tolist()
    for words in (
        "ResNeXt-26 8x4d", "toy_val, 14 images", "weights.pth", "toy.yaml",
        "hotcoco and pycocotools, which agree", "SOLVER.STEPS 280, 320",
        "Iterations 1,000 (config: 12000)", "Images per iteration 4 (config: 8)",
        "Trained from resnext://resnext50_32x4d.tv_in1k", "BSD-3-Clause",
        "Loss", "Precision in %", "Learning rate", "Best", "Worst", "Most confused",
    ):  # fmt: skip
        assert words in page.text, words
    questions = page.source.count('value="yes"')
    assert questions > 10 and page.source.count("<figcaption>") > 10 + questions
    assert len(page.pictures) == 6 + 2 * page.source.count("<figcaption>") - questions
    again = write_report(evaluated_run, tmp_path / "new" / "page.html")
    assert again.read_text(encoding="utf-8") == page.source
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["page.html"]


def test_comparison_with_a_baseline(run: Path) -> None:
    page = Page(write_report(run))
    baseline = read_metrics(run).evaluations[0].baseline
    assert "Comparison with <i>earlier" in page.text
    for each in baseline["differences"]:
        if each["difference"] is not None:
            interval = "\u2013"  # few images have objects of every size
            if each["lower"] is not None:
                interval = f"{each['lower']:+.2f} to {each['upper']:+.2f}"
            words = f"{shown(each['before'])} {shown(each['now'])} {each['difference']:+.2f}"
            assert f"{words} {interval}" in page.text
    for broken in (7, *({"differences": [{"figure": "AP", "now": x}]} for x in ("x", 10**400))):
        edit(run, baseline=broken)
        assert "Comparison with" not in Page(write_report(run)).text


def test_augmented_tests_of_the_same_evaluation_have_sections(run: Path) -> None:
    """Those of another command, or an earlier one, are left out."""
    augmented = run / "inference_TTA"
    shutil.copytree(run / "inference", augmented)
    file = augmented / "metrics.json"
    document = json.loads(file.read_text())
    entry = document["datasets"]["toy_val"]
    entry["figures"]["AP"] = 98.7
    headings = [f"{part} toy_val" for part in ("Results on", "Errors on", "Images of")]
    for changed, is_shown in (({}, True), ({"command": "x"}, False), ({"date": "1"}, False)):
        file.write_text(json.dumps({**document, "datasets": {"toy_val": {**entry, **changed}}}))
        page = Page(write_report(run))
        assert [page.text.count(heading) for heading in headings] == [1 + is_shown] * 3
        assert ("98.7" in page.text) is is_shown
        assert ("toy_val, with test-time augmentation" in page.text) is is_shown
        assert page.text.count("toy_val, 14 images") == 1
    file.write_text("{")
    assert "augmentation" not in Page(write_report(run)).text


def test_hostile_names_are_text(run: Path, annotation_file: Path) -> None:
    annotations = json.loads(annotation_file.read_text())
    folder = annotation_file.parent.parent / "val2017"
    for number, image in enumerate(annotations["images"]):
        name = f"{number}{HOSTILE}.jpg".replace("/", "")
        (folder / image["file_name"]).rename(folder / name)
        image["file_name"] = name
    annotation_file.write_text(json.dumps(annotations))
    file = run / "inference" / "metrics.json"
    document = json.loads(file.read_text())
    entry = document["datasets"].pop("toy_val")
    row = {"name": f"{HOSTILE}\ud800", "AP": 81.5, "AP50": 92.5, "instances": 3}
    entry |= {"per_class": [row], "segm": {"figures": {HOSTILE: 1.0}, "per_class": [row]}}
    entry |= {"command": HOSTILE, "date": HOSTILE, "baseline": {**entry["baseline"]}}
    entry["baseline"]["metrics"] = HOSTILE
    document |= {"weights": HOSTILE, "config": HOSTILE, "hardware": HOSTILE, "commit": HOSTILE}
    document |= {"versions": {HOSTILE: HOSTILE}, "datasets": {HOSTILE: entry}}
    file.write_text(json.dumps(document))
    lines = [{"iteration": n, f"{HOSTILE}\ud800/bbox/AP": 3.0} for n in range(5)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (run / "config.yaml").write_text(CONFIG.replace("26", json.dumps(HOSTILE)))
    page = Page(write_report(run))
    assert page.text.count(HOSTILE) > 20
    assert f"{HOSTILE}? 81.5 92.5" in page.text
    assert HOSTILE not in page.source and all(name in page.text for name in CLASSES[:7])


def test_several_data_sets_masks_keypoints_and_proposals(run: Path) -> None:
    file = run / "inference" / "metrics.json"
    document = json.loads(file.read_text())
    entry = document["datasets"]["toy_val"]
    row = {"AP": 81.5, "AP50": 92.5, "instances": 3}
    segm = {"figures": {"AP": 71.25, "AR100": 77.7}, "per_class": [{"name": "owl", **row}]}
    keypoints = {"figures": {"AP": 61.25}, "per_class": [{"name": "man", **row}]}
    more = {"seconds_per_image": 0.0345, "parameters": 44_000_000, "date": "2026-01-02T03:04:05"}
    proposals = {"proposals": {"AR@100": 7.7}, "annotations": "a", "image_count": 1}
    document["datasets"] = {
        "first": {**entry, "segm": segm, "keypoints": keypoints, **more},
        "second": entry,
        "third": proposals,
    }
    file.write_text(json.dumps(document))
    page = Page(write_report(run))
    for words in (
        "first, 14 images", "third, 1 image", "Mask AP 71.2 Keypoint AP 61.2",
        "Masks in % AP AR100 71.2 77.7", "Keypoints in % AP 61.2",
        "owl 81.5 92.5", "man 81.5 92.5", "34.5 ms per image", "Parameters 44,000,000",
        "Evaluated 2026-01-02 03:04:05", "Results on second", "Classes of second",
        "Images of second", "Proposals on third Average recall, any class in % AR@100 7.7",
    ):  # fmt: skip
        assert words in page.text, words
    document["datasets"] = {"third": proposals}
    file.write_text(json.dumps(document))
    assert "Proposals on third" in Page(write_report(run)).text


def test_run_without_training_details_and_images(run: Path) -> None:
    for name in ("metrics.jsonl", "config.yaml", "inference/details_toy_val.json"):
        (run / name).unlink()
    for picture in (run.parent / "toy" / "val2017").iterdir():
        picture.unlink()
    page = Page(write_report(run))
    for words in ("Detector", "this run was only evaluated", "14 of 14 images are missing"):
        assert words in page.text
    assert page.pictures == [] and "What errors cost" not in page.text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.json", None),
        ("metrics.json", "{"),
        ("metrics.json", '{"weights": "", "versions": {}, "hardware": "", "datasets": {"a": {}}}'),
        ("detections_toy_val.json", None),
        ("detections_toy_val.json", '[{"image_id": 1, "score": 0.9}]'),
        ("instances_val2017.json", None),
        ("instances_val2017.json", "{}"),
    ],
)
def test_missing_and_broken_files_are_named(
    run: Path, annotation_file: Path, name: str, text: str | None
) -> None:
    path = annotation_file if name == annotation_file.name else run / "inference" / name
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    before = sorted(run.iterdir())
    with pytest.raises(DatasetError, match=re.escape(name)) as caught:
        write_report(run)
    assert "valuate" in str(caught.value)  # what to do
    assert sorted(run.iterdir()) == before


def test_failed_writing_keeps_the_old_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "report.html").write_text("the old page")
    before = sorted(run.iterdir())

    def full(*arguments: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ResNeXtError, match=r"no space left.*--output"):
        write_report(run)
    assert sorted(run.iterdir()) == before
    assert (run / "report.html").read_text() == "the old page"


def test_report_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--run", str(run), "--output", str(run / "page.html")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Report: {run / 'page.html'}"


def test_report_against_another_run(run: Path, tmp_path: Path) -> None:
    edit(run, baseline=None)
    other = tmp_path / "other"
    shutil.copytree(run, other)
    truth = read_ground_truth(read_metrics(run).evaluations[0].annotations)
    file = read_metrics(other).evaluations[0].detections
    kept = json.loads(file.read_text())[::2]
    file.write_text(json.dumps(kept))
    edit(other, detections_sha256=file_digest(file))
    page = Page(write_report(run, baseline=other))
    now, before = (
        evaluate_detections(truth, read_detections(each.detections, truth)).figures.figures["AP"]
        for each in (read_metrics(run).evaluations[0], read_metrics(other).evaluations[0])
    )
    assert now is not None and before is not None
    assert f"Comparison with {other}" in page.text
    assert f"AP {shown(before)} {shown(now)} {now - before:+.2f}" in page.text
    edit(other, annotations_sha256="0" * 64)
    with pytest.raises(DatasetError, match="with other annotations"):
        write_report(run, baseline=other)


def test_no_baseline_for_classifiers(tmp_path: Path) -> None:
    results_file(tmp_path).parent.mkdir()
    results_file(tmp_path).touch()
    with pytest.raises(ConfigError, match="--baseline is for detectors"):
        write_report(tmp_path, baseline=tmp_path)


def test_classes_to_act_on_know_the_training_data(run: Path, annotation_file: Path) -> None:
    data = CustomData(annotation_file, annotation_file.parent)
    entry = {"annotations": str(data.file), "images": str(data.images), "sha256": ""}
    (run / "datasets.json").write_text(json.dumps({data.name: entry}))
    with (run / "config.yaml").open("a") as stream:
        stream.write(f"DATASETS: {{TRAIN: [{data.name}]}}\n")
    document = json.loads(annotation_file.read_text())
    names = {each["id"]: each["name"] for each in document["categories"]}
    counts = Counter(
        names[each["category_id"]] for each in document["annotations"] if not each["iscrowd"]
    )
    assert training_objects(run, run_config(run)) == counts
    text = Page(write_report(run)).text
    assert "Classes to act on" in text
    few = set(map(int, re.findall(r"Too few examples: only (\d+) to train on", text)))
    assert few and few <= set(counts.values())
    data.file.unlink()
    assert training_objects(run, run_config(run)) is None
