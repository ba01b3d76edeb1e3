"""tools/demo.py, tools/visualize_data.py and tools/plot_curves.py as a user types them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

from detectron2.config import CfgNode
from PIL import Image

Tool = Callable[..., "CompletedProcess[str]"]
TOY = ["--config-file", "configs/faster_rcnn_X_26_8x4d_FPN_toy.yaml"]


def test_demo(tool: Tool, detector: CfgNode, frames: Callable[..., Path], tmp_path: Path) -> None:
    """Overrides come in any order; a broken file is named, and the others are drawn."""
    folder, output = tmp_path / "in", tmp_path / "in" / "out"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (60, 40), (90, 120, 30)).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"no picture")
    frames(folder / "a.mkv", [0.0, 0.1, 0.2])
    arguments = ["INPUT.MIN_SIZE_TEST", 64, *TOY, "--input", folder / "*.jpg", folder / "a.mkv"]
    arguments += ["--output", output, "MODEL.WEIGHTS", detector.MODEL.WEIGHTS]
    arguments += ["--threshold", 0, "--opts", "INPUT.MAX_SIZE_TEST", 96]
    done = tool("demo.py", [*arguments, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.999])
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        f"error: the image {folder / 'broken.jpg'} cannot be read"
    )
    assert f"drawn into {output}: 2 images, 1 videos of 3 frames" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith("network: ") and "(median of 4, the first batch left out)" in last
    drawn = sorted(each.name for each in output.iterdir())
    assert drawn == ["a.jpg", "a.mp4", "b.jpg", "detections.json"]
    images = json.loads((output / "detections.json").read_text())["images"]
    assert len(images) == 2
    assert any(found["score"] < 0.9 for image in images for found in image["detections"])


def test_a_missing_camera_is_told_before_the_detector_is_built(tool: Tool, tmp_path: Path) -> None:
    """Without weights, which would be the next error."""
    done = tool("demo.py", [*TOY, "--output", tmp_path / "out", "--webcam", 93])
    assert done.returncode == 2
    assert "error: --webcam 93: camera 93 cannot be opened" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_demo_of_an_rpn(tool: Tool, detector: CfgNode, tmp_path: Path) -> None:
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    arguments = [*TOY, "--input", tmp_path / "a.png", "--output", tmp_path / "out", "--opts"]
    arguments += ["MODEL.WEIGHTS", detector.MODEL.WEIGHTS]
    done = tool("demo.py", [*arguments, "MODEL.META_ARCHITECTURE", "ProposalNetwork"])
    assert done.returncode == 2
    assert "error: MODEL.META_ARCHITECTURE ProposalNetwork" in done.stderr.splitlines()[-1]


def test_visualize_data(tool: Tool, datasets: Path, tmp_path: Path) -> None:
    toy = datasets / "toy_coco"
    arguments = ["SEED", 5, *TOY, "--count", 3, "--output", tmp_path / "seen"]
    arguments += ["--train-json", toy / "annotations" / "instances_train2017.json"]
    done = tool("visualize_data.py", [*arguments, "--train-images", toy / "train2017"])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "seed 5"
    names = sorted(each.name for each in (tmp_path / "seen").iterdir())
    assert len(names) == 4 and names[-1] == "contact_sheet.png"
    for name, line in zip(names[:3], lines[3:]):
        assert name[5:].removesuffix(".png") in line


def test_plot_curves(tool: Tool, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0, "total_loss": 1.0, "lr": 0.1}\n')
    output = tmp_path / "curves.png"
    done = tool("plot_curves.py", [tmp_path, "--output", output, "--smooth", 0])
    assert (done.returncode, done.stdout) == (0, f"Curves: {output}\n"), done.stderr
