"""The report's errors: each names the file and what to do, and nothing is left behind."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from resnext_det.errors import DatasetError, ResNeXtError
from resnext_det.report.page import write_report

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.json", None),
        ("metrics.json", "{"),
        ("metrics.json", "[]"),
        ("metrics.json", '{"weights": "w", "versions": {}, "hardware": "h", "datasets": {}}'),
        (
            "metrics.json",
            '{"weights": "w", "versions": {}, "hardware": "h", "datasets": {"a": {}}}',
        ),
        ("results.json", None),
        ("results.json", "[{"),
        ("results.json", '[{"image_id": 1, "score": 0.9}]'),
        (
            "results.json",
            '[{"image_id": 77, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.9}]',
        ),
        ("annotations", None),
        ("annotations", "no JSON"),
        ("annotations", "{}"),
        ("annotations", '{"images": [], "categories": [], "annotations": [{"image_id": 5}]}'),
    ],
)
def test_missing_and_broken_files_are_named(
    run: Path, annotation_file: Path, name: str, text: str | None
) -> None:
    path = annotation_file if name == "annotations" else run / name
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    before = sorted(run.iterdir())
    with pytest.raises(DatasetError, match=re.escape(path.name)) as caught:
        write_report(run, run / "new" / "report.html")
    assert re.search(r"(evaluate|evaluated with)", str(caught.value))
    assert (re.search("(is|are) not there", str(caught.value)) is not None) == (text is None)
    assert sorted(run.iterdir()) == before


def test_a_failed_writing_leaves_nothing_and_keeps_the_old_page(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = write_report(run)
    page.write_text("the old page")
    before = sorted(run.iterdir())

    def full(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ResNeXtError, match="no space left"):
        write_report(run)
    assert sorted(run.iterdir()) == before
    assert page.read_text() == "the old page"


def test_an_output_that_cannot_be_written_is_an_error(run: Path) -> None:
    with pytest.raises(ResNeXtError, match="--output"):
        write_report(run, run / "metrics.json" / "report.html")


def tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "report.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_tool_says_where_the_report_is(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = tool(str(run), "--output", str(run / "page.html"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"Report: {run / 'page.html'}"
    assert (run / "page.html").is_file()
    failed = tool(str(run / "nowhere"))
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in failed.stderr
