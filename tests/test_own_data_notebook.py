"""docs/own_data.ipynb: every cell runs, in order, and again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "own_data.ipynb"


@pytest.mark.slow
def test_cells_run_and_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(each["source"]) for each in cells if each["cell_type"] == "code"]
    assert len(code) == 7
    scope: dict[str, object] = {}
    for source in code:
        exec(compile(source, NOTEBOOK.name, "exec"), scope)
        if "--overwrite" not in source:  # the training takes a minute
            exec(compile(source, NOTEBOOK.name, "exec"), scope)
    printed = capsys.readouterr().out
    assert "yolo" in printed and "80 of 400 images, seed 0" in printed
    assert scope["thresholds"]["all"]["f1"] > 20  # type: ignore[index]
    assert (tmp_path / "run" / "report.html").is_file()
