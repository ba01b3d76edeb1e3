"""The report: everything inline, everything escaped, all figures there, errors that help."""

from __future__ import annotations

import html
import json
import logging
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resnext_det.evaluation.results_file import read_metrics
from resnext_det.report.gallery import make_gallery
from resnext_det.report.page import write_report

HOSTILE = "<script>alert(1)</script>"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Reads a page and notes what stands in it; refuses tags that are not closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        """Return what a reader sees, with single blanks."""
        return " ".join(" ".join(self.words).split())

    def values(self, tag: str, attribute: str) -> list[str]:
        """Return the values of an attribute of a tag."""
        return [v for t, name, v in self.attributes if (t, name) == (tag, attribute)]

    @property
    def pictures(self) -> list[str]:
        """Return the sources of all pictures."""
        return [*self.values("img", "src"), *self.values("image", "href")]

    @property
    def drawings(self) -> list[str]:
        """Return the SVG of the figures, without those that hold the pictures."""
        found = re.findall(r"<svg.*?</svg>", self.source, flags=re.DOTALL)
        return [each for each in found if "set-1-" not in each]


def edit(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text())
    document.update(changes)
    path.write_text(json.dumps(document))


def dataset(run: Path, **changes: Any) -> None:
    """Change what metrics.json says of the data set."""
    document = json.loads((run / "metrics.json").read_text())
    document["datasets"]["toy_val"].update(changes)
    (run / "metrics.json").write_text(json.dumps(document))


def test_nothing_is_loaded_from_anywhere(run: Path) -> None:
    page = Page(write_report(run))
    source = re.sub(r"base64,[A-Za-z0-9+/=]*", "", page.source)
    assert re.findall(r"//\w|@import|url\((?!#)", source) == []
    sources = page.pictures
    assert sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert page.values("script", "src") == []
    assert page.values("link", "href") == ["data:,"]
    assert not {"iframe", "object", "embed", "base", "form"} & set(page.tags)
    used = page.values("use", "href") + page.values("use", "xlink:href")
    assert len(used) > len(sources)
    assert all(value.startswith("#") for value in [*used, *page.values("a", "href")])
    assert "default-src 'none'" in page.source


def test_figures_names_and_facts_stand_in_the_page(run: Path) -> None:
    page = Page(write_report(run))
    for name, value in read_metrics(run).evaluations[0].figures.items():
        if value is not None:
            assert f"{value:.1f}" in page.text, name
    assert "AP large area above 96\u00b2 \u2013" in page.text
    for words in (
        "ResNeXt-26 8x4d", "26 layers", "12,000", "280; 320", "0.04", "weights.pth",
        "toy.yaml", "torch 2.9.1", "2 cores", "toy_val, 6 images", "star 31.4 59.3 53",
        "cross \u2013 \u2013 0",
    ):  # fmt: skip
        assert words in page.text
    # Sorted by AP, and what has none is last.
    assert (
        page.text.index("circle 71.4")
        < page.text.index("star 31.4")
        < page.text.index("cross \u2013")
    )


def test_the_page_is_written_where_it_is_asked_for(run: Path, tmp_path: Path) -> None:
    assert write_report(run) == run / "report.html"
    elsewhere = tmp_path / "new" / "page.html"
    assert write_report(run, elsewhere) == elsewhere
    assert elsewhere.read_bytes() == (run / "report.html").read_bytes()
    assert [path.name for path in elsewhere.parent.iterdir()] == ["page.html"]


def test_text_from_files_is_escaped(run: Path, annotation_file: Path) -> None:
    annotations = json.loads(annotation_file.read_text())
    for entry in annotations["images"][1:]:
        entry["file_name"] = f"{HOSTILE}.jpg".replace("/", "")
    (run.parent / "toy" / "val2017" / annotations["images"][0]["file_name"]).rename(
        run.parent / "toy" / "val2017" / annotations["images"][1]["file_name"]
    )
    for number, entry in enumerate(annotations["categories"]):
        entry["name"] = f"{HOSTILE}{number}"
    annotation_file.write_text(json.dumps(annotations))
    dataset(run, per_class=[{"name": f'"{HOSTILE}', "AP": 1, "AP50": 2, "instances": 3}])
    document = json.loads((run / "metrics.json").read_text())
    document["datasets"] = {HOSTILE: document["datasets"]["toy_val"]}
    (run / "metrics.json").write_text(json.dumps(document))
    edit(run / "metrics.json", weights=HOSTILE, config=HOSTILE, hardware=HOSTILE)
    edit(run / "metrics.json", versions={HOSTILE: HOSTILE})
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("DEPTH: 26", f'DEPTH: "{HOSTILE}"'))
    page = Page(write_report(run))
    assert page.tags.count("script") == 1
    assert "alert" not in page.scripts[0]
    assert page.text.count(HOSTILE) >= 8
    assert page.values("th", "data-value") == [f'"{HOSTILE}']


def test_an_evaluation_without_training_has_no_curves(run: Path) -> None:
    with_curves = Page(write_report(run))
    assert len(with_curves.drawings) == 2
    (run / "metrics.jsonl").unlink()
    without = Page(write_report(run))
    assert without.drawings == []
    assert "evaluated only" in without.text


def test_several_data_sets_have_a_section_and_a_curve_each(run: Path) -> None:
    document = json.loads((run / "metrics.json").read_text())
    document["datasets"]["second_val"] = document["datasets"]["toy_val"]
    (run / "metrics.json").write_text(json.dumps(document))
    lines = (run / "metrics.jsonl").read_text()
    prefixed = '{"iteration": 400, "toy_val/bbox/AP": 7.0, "second_val/bbox/AP": 8.0}\n'
    (run / "metrics.jsonl").write_text(lines.replace('"bbox/', '"other_val/bbox/') + prefixed)
    page = Page(write_report(run))
    for words in (
        "Results on toy_val", "Results on second_val", "Classes on second_val",
        "Precision in %, toy_val AP 7.0", "Precision in %, second_val AP 8.0",
    ):  # fmt: skip
        assert words in page.text
    ids = re.findall(r'\sid="([^"]*)"', page.source)
    assert len(ids) == len(set(ids))
    # It is told whose the headline's figures are, and every section of each set can be reached.
    assert "On toy_val Box AP 41.2 %" in page.text
    targets = {value[1:] for value in page.values("a", "href")}
    assert targets == set(page.values("section", "id"))
    assert len(targets) == 2 + 2 * 3


def test_figures_take_their_colours_from_the_page(run: Path) -> None:
    page = Page(write_report(run))
    assert page.drawings
    for drawing in page.drawings:
        assert "var(--series-1)" in drawing
        assert "#fe00" not in drawing
        assert "<style" not in drawing
    ids = re.findall(r'\sid="([^"]*)"', page.source)
    assert len(ids) == len(set(ids))
    assert "prefers-color-scheme: dark" in page.source


def test_a_config_that_is_no_plain_yaml_is_left_out(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "config.yaml").write_text("SOLVER:\n  STEPS: !!python/tuple [280]\n")
    with caplog.at_level(logging.WARNING):
        page = Page(write_report(run))
    assert "config.yaml" in caplog.text
    assert "Template" not in page.text


def test_missing_and_broken_pictures_are_counted(run: Path) -> None:
    whole = make_gallery(read_metrics(run).evaluations[0], 24)
    pictures = sorted((run.parent / "toy" / "val2017").iterdir())
    pictures[0].unlink()
    pictures[1].write_bytes(pictures[1].read_bytes()[:400])
    pictures[2].write_bytes(b"")
    page = Page(write_report(run))
    assert "3 pictures are not on disk" in page.text
    assert len(page.pictures) == len(whole.entries) - 3
    for picture in pictures[3:]:
        picture.unlink()
    page = Page(write_report(run))
    assert "6 pictures are not on disk" in page.text
    assert "There is no picture to show" in page.text


def test_the_page_stays_small_with_large_and_noisy_pictures(
    run: Path, annotation_file: Path
) -> None:
    annotations = json.loads(annotation_file.read_text())
    noise = np.random.default_rng(0).integers(0, 256, (900, 1000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run.parent / "toy" / "val2017" / "noise.jpg")
    images = [{"id": n, "file_name": "noise.jpg"} for n in range(40)]
    boxes = [{"image_id": n % 40, "category_id": 1, "bbox": [9, 9, 99, 99]} for n in range(9000)]
    annotations.update(images=images, annotations=boxes)
    annotation_file.write_text(json.dumps(annotations))
    found = {"category_id": 1, "bbox": [9.123, 9.123, 99.123, 99.123], "score": 0.512345678901}
    results = [{"image_id": n % 40, **found} for n in range(8000)]
    (run / "results.json").write_text(json.dumps(results))
    page = write_report(run)
    assert len(Page(page).pictures) == 36
    assert page.stat().st_size < 10_000_000


@pytest.fixture()
def copied(evaluated_run: Path, tmp_path: Path) -> Path:
    """Return a copy of the run that was evaluated in earnest, to be changed."""
    return shutil.copytree(evaluated_run, tmp_path / "copied")


def edited(run: Path, **changes: Any) -> None:
    """Change what metrics.json says of the only data set."""
    document = json.loads((run / "metrics.json").read_text())
    (entry,) = document["datasets"].values()
    name = changes.pop("name", "toy_val")
    document["datasets"] = {name: {**entry, **changes}}
    (run / "metrics.json").write_text(json.dumps(document))


def test_errors_curves_and_figures_of_classes_stand_in_the_page(copied: Path) -> None:
    page = Page(write_report(copied))
    details = json.loads((copied / "details_toy_val.json").read_text())
    evaluation = read_metrics(copied).evaluations[0]
    costs = sorted((error["cost"] for error in details["errors"]), reverse=True)
    places = [page.text.index(f" {cost:.1f} ", page.text.index("points of AP50")) for cost in costs]
    assert places == sorted(places)
    AP50 = np.mean(details["curves"][""]["0.50"])
    assert f"IoU 0.50 {AP50:.1f}" in page.text
    assert evaluation.figures["AP50"] == pytest.approx(AP50, abs=0.01)
    cells = re.findall(r'class="(?:zero|strong|)">(\d+)</td>', page.source)
    counts = np.array(details["confusion"]["counts"])
    assert [int(cell) for cell in cells] == counts.ravel()[:-1].tolist()
    for each in evaluation.per_class:
        values = (each.AP, each.AP50, each.APs, each.APm, each.APl, each.AR)
        shown = " ".join("\u2013" if value is None else f"{value:.1f}" for value in values)
        best = details["by_score"].get(each.name, {}).get("best")
        score = "\u2013" if best is None else f"{best['score']:.2f}"
        assert f"{' '.join(each.name.split())} {shown} {score} {each.instances}" in page.text


def test_without_detections_nothing_is_won_and_nothing_is_best(copied: Path) -> None:
    page = Page(write_report(copied))
    assert "There are no detections" not in page.text
    (copied / read_metrics(copied).evaluations[0].detections).write_text("[]")
    edited(copied, detections_sha256="")
    page = Page(write_report(copied))
    assert "There are no detections" in page.text
    assert "What would be won" not in page.text
    assert len(page.pictures) == 14
    assert re.findall("<h4>(.*)</h4>", page.source) == ["Worst"]


def test_scripts_hold_nothing_but_data_and_our_own(copied: Path) -> None:
    page = Page(write_report(copied))
    (*data, own) = page.scripts
    assert data and all(isinstance(json.loads(each), dict) for each in data)
    assert not re.search("alert|bold|\u2028", own)
    assert not re.search("[<>&\u2028]", "".join(data))
    names = [each.name for each in read_metrics(copied).evaluations[0].per_class]
    assert set(json.loads(data[0])) <= {*names, ""}
    assert page.tags.count("script") == len(page.scripts)
    assert {value for value in page.values("option", "value") if not value.isdigit()} <= {
        *names,
        "",
    }


def test_the_baseline_and_its_intervals_are_told(copied: Path) -> None:
    page = Page(write_report(copied))
    entry = json.loads((copied / "metrics.json").read_text())["datasets"]["toy_val"]["baseline"]
    assert entry["metrics"] in page.text
    for each in entry["differences"]:
        if each["difference"] is not None:
            words = f"{each['before']:.1f} {each['now']:.1f} {each['difference']:+.2f}"
            # There is no interval where few images have objects of a size.
            known = each["lower"] is not None
            interval = f"{each['lower']:+.2f} to {each['upper']:+.2f}" if known else "\u2013"
            assert f"{words} {interval}" in page.text
    edited(copied, baseline={"metrics": "m", "differences": [{"figure": "AP", "now": "x"}]})
    assert "Beside the baseline" not in Page(write_report(copied)).text


def test_engine_and_commit_are_told(copied: Path) -> None:
    edit(copied / "metrics.json", commit="0123456789abcdef0123456789abcdef01234567+changes")
    page = Page(write_report(copied))
    assert "Figures by hotcoco and pycocotools, which agree" in page.text
    assert "Commit 0123456789ab, with changes" in page.text
    edit(copied / "metrics.json", commit=None)
    assert "Commit" not in Page(write_report(copied)).text


@pytest.mark.parametrize("text", [None, "{", "[]", '{"recalls": [0, 1], "curves": {}}', "NaN"])
def test_details_that_cannot_be_read_are_left_out(copied: Path, text: str | None) -> None:
    (copied / "details_toy_val.json").unlink()
    if text is not None:
        (copied / "details_toy_val.json").write_text(text)
    page = Page(write_report(copied))
    assert "What errors cost" not in page.text
    assert "Average precision of boxes in %" in page.text


def test_an_rpn_alone_has_a_page_of_recalls(run: Path) -> None:
    document = json.loads((run / "metrics.json").read_text())
    figures = {f"AR{s}@{n}": n / 13 + len(s) for n in (100, 300, 1000) for s in ("", "s", "m", "l")}
    entry = document["datasets"]["toy_val"]
    document["datasets"] = {
        HOSTILE: {"proposals": figures, **{k: entry[k] for k in ("annotations", "image_count")}}
    }
    (run / "metrics.json").write_text(json.dumps(document))
    page = Page(write_report(run))
    assert f"Proposals on {HOSTILE}" in page.text
    for words in ("AR@100 7.7 %", "100 7.7 8.7 8.7 8.7", "1,000 76.9 77.9 77.9 77.9"):
        assert words in page.text
    assert not page.pictures
    assert html.escape(HOSTILE) in page.source
    document["datasets"]["toy_val"] = entry
    (run / "metrics.json").write_text(json.dumps(document))
    both = Page(write_report(run))
    assert "Average precision of boxes in %" in both.text
    assert f"Proposals on {HOSTILE}" in both.text


def test_figures_of_masks_and_keypoints_stand_beside_those_of_boxes(copied: Path) -> None:
    file = copied / "metrics.json"
    document = json.loads(file.read_text())
    entry = document["datasets"]["toy_val"]
    row = {"AP": 81.5, "AP50": 92.5, "instances": 3}
    masks = {"AP": 71.25, "AP50": 80.0, "AR100": 77.7}
    poses = {"AP": 61.25, "AR50": 66.6}
    entry["segm"] = {"figures": masks, "per_class": [{"name": "<b>owl\ud800", **row}]}
    entry["keypoints"] = {"figures": poses, "per_class": [{"name": "owl", **row}]}
    entry |= {"seconds_per_image": 0.0345, "parameters": 44_000_000, "date": "2026-01-02T03:04:05"}
    entry["command"] = "train_net.py --config-file '</dl>\ud800'"
    file.write_text(json.dumps(document))
    page = Page(write_report(copied))
    for words in (
        "Mask AP 71.2 % Keypoint AP 61.2 %",
        "Average precision of boxes in %", "Average recall of boxes in %",
        "Average precision of masks in % AP IoU 0.50 to 0.95 71.2 AP50 IoU 0.50 80.0",
        "Average recall of masks in % AR100 100 detections 77.7",
        "Average precision of keypoints in % AP OKS 0.50 to 0.95 61.2",
        "Average recall of keypoints in % AR50 OKS 0.50 66.6",
        "Masks Class AP AP50 <b>owl? 81.5 92.5", "Errors of boxes",
        "34.5 ms per image", "Parameters 44,000,000", "Evaluated 2026-01-02 03:04:05",
        "Command train_net.py --config-file '</dl>?'",
    ):  # fmt: skip
        assert words in page.text, words


def test_names_that_are_no_text_end_in_a_page(copied: Path) -> None:
    text = json.dumps(json.loads((copied / "metrics.json").read_text()))
    (copied / "metrics.json").write_text(text.replace('"class 1"', r'"class \ud800"'))
    record = {"iteration": 5, "total_loss": 1.0, "bbox/AP": 3.0, "bbox/AP-\ud800": 2.0}
    other = {"iteration": 9, "\ud800/bbox/AP": 3.0}
    lines = "\n".join(map(json.dumps, (record, other)))
    (copied / "metrics.jsonl").write_text(lines)
    page = Page(write_report(copied))
    assert "class ?" in page.text
    for file in copied.glob("details_*.json"):
        file.write_text(file.read_text().replace('"class 1"', r'"class \ud800"'))
    assert "What is taken for what" in Page(write_report(copied)).text
