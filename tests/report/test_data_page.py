"""The page of `check-data --html`: pictures of shared images, safe whatever the names."""

from __future__ import annotations

import base64
import shutil
from pathlib import Path

import pytest

from resnext_det_cli import main
from tests.data.test_folder import yolo
from tests.report.test_page import Page

HOSTILE = "<script>alert(1)<!script>"


@pytest.mark.parametrize("shared", [False, True])
def test_page(tmp_path: Path, shared: bool) -> None:
    data, file = yolo(tmp_path / "data", 60), tmp_path / "new" / "data.html"
    for kind in ("images", "labels"):
        for split, numbers in (("train", range(48)), ("val", range(48, 60))):
            (data / kind / split).mkdir()
            for number in numbers:
                (old,) = (data / kind).glob(f"{number}.*")
                old.rename(data / kind / split / old.name)
    names = (data / "data.yaml").read_text()
    (data / "data.yaml").write_text(names.replace("cat", f"'{HOSTILE}'"))
    if shared:
        for number in range(3):
            for kind, suffix in (("images", "png"), ("labels", "txt")):
                source = data / kind / "train" / f"{number}.{suffix}"
                shutil.copy(source, data / kind / "val" / f"{HOSTILE}{number}.{suffix}")
    before = sorted(data.rglob("*"))
    assert main(["check-data", "--data", str(data), "--html", str(file)]) == int(shared)
    assert sorted(data.rglob("*")) == before
    page = Page(file)
    photos = [each for each in page.pictures if each.startswith("data:image/jpeg")]
    assert len(photos) == 6 * shared and len(page.pictures) == len(photos) + 1
    assert photos[::2] == photos[1::2]  # each pair is of the same image
    chart = base64.b64decode(page.pictures[-1].partition(",")[2]).decode()
    assert "anchors" in chart and "width in pixels" in chart
    assert f"{HOSTILE} 24 {6 + 2 * shared}" in page.text
    assert ("There are errors" in page.text) == shared
    assert ("identical images in train and val" in page.text) == shared


def test_is_for_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["check-data", "--annotations", "a.json", "--html", str(tmp_path / "a.html")])
    assert "--html and KEY VALUE are for --data" in capsys.readouterr().err
