"""The report: everything inline, everything escaped, all figures there, errors that help."""

from __future__ import annotations

import json
import logging
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resnext_det.evaluation.gallery import make_gallery
from resnext_det.evaluation.report import write_report
from resnext_det.evaluation.run_folder import read_metrics

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
    sources = page.values("img", "src")
    assert sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert page.values("script", "src") == []
    assert page.values("link", "href") == ["data:,"]
    assert not {"iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert all(value.startswith("#") for value in page.values("use", "xlink:href"))


def test_figures_names_and_facts_stand_in_the_page(run: Path) -> None:
    page = Page(write_report(run))
    for name, value in read_metrics(run).evaluations[0].figures.items():
        if value is not None:
            assert f"{value:.1f}" in page.text, name
    assert "AP large area above 96\u00b2 \u2013" in page.text
    for words in (
        "ResNeXt-26 8x4d", "26 layers", "12 000", "280, 320", "0.04", "weights.pth",
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
    for entry in annotations["categories"]:
        entry["name"] = HOSTILE
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
    assert with_curves.tags.count("svg") == 2
    (run / "metrics.jsonl").unlink()
    without = Page(write_report(run))
    assert without.tags.count("svg") == 0
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


def test_figures_take_their_colours_from_the_page(run: Path) -> None:
    page = Page(write_report(run))
    drawings = re.findall(r"<svg.*?</svg>", page.source, flags=re.DOTALL)
    for drawing in drawings:
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
    assert len(page.values("img", "src")) == 2 * (len(whole.best + whole.worst) - 3)
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
    images = [{"id": n, "file_name": "noise.jpg"} for n in range(30)]
    boxes = [{"image_id": n, "category_id": 1, "bbox": [9, 9, 99, 99]} for n in range(30)]
    annotations.update(images=images, annotations=boxes)
    annotation_file.write_text(json.dumps(annotations))
    (run / "results.json").write_text("[]")
    page = write_report(run)
    assert len(Page(page).values("img", "src")) == 48
    assert page.stat().st_size < 10_000_000
