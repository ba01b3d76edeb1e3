"""`make demo` as a newcomer runs it; some five minutes, so only `make test-slow` runs it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_demonstration_reaches_what_the_readme_says(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    done = subprocess.run(
        ["make", "demo", f"RUN={run}"],
        cwd=ROOT,
        env={**os.environ, "DETECTRON2_DATASETS": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"Report: {run / 'report.html'}"
    metrics = json.loads((run / "inference" / "metrics.json").read_text())["datasets"][
        "toy_coco_minival"
    ]
    assert metrics["figures"]["AP50"] >= 70
    assert None not in metrics["figures"].values()
    assert (run / "report.html").stat().st_size < 10_000_000
