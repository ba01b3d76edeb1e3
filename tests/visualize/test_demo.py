"""The demo: finding files, drawing and saving detections, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import av
import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.config import CfgNode
from PIL import Image

from resnext_det.engine.predictor import Predictor
from resnext_det.errors import ConfigError, DatasetError
from resnext_det.prediction import Prediction
from resnext_det.visualize.demo import RESULTS, Demo, find_sources
from resnext_det.visualize.video import open_video
from resnext_det_cli import main
from tests.visualize.conftest import write_frames

TIMES = [0.0, 0.1, 0.4, 0.5]


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    """Two images, one of them rotated by EXIF; a whole and a truncated video; two broken files."""
    root = tmp_path / "in"
    root.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(root / "a.png")
    Image.fromarray(pixels).save(root / "b.jpg", exif=exif)
    (root / "broken.png").write_bytes(b"no picture")
    (root / "broken.mp4").write_bytes(b"no video")
    write_frames(root / "clip.mkv", TIMES, size=(66, 50))
    cut = write_frames(root / "cut.mkv", [n / 10 for n in range(40)], size=(160, 120))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    return root


def results(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / RESULTS).read_text().splitlines()]


def frame_times(file: Path) -> list[float]:
    with av.open(str(file)) as container:
        return [frame.time for frame in container.decode(video=0)]


def test_draws_everything_readable(predictor: Predictor, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    demo = Demo(predictor, output, threshold=0.0, batch=3)
    demo.run(find_sources([str(folder)], output))
    names = sorted(each.name for each in output.iterdir())
    assert names == ["a.jpg", "b.jpg", "clip.mp4", "cut.mp4", RESULTS]
    lines = results(output)
    problems = [Path(each["file"]).name for each in lines if "problem" in each]
    assert problems == ["broken.png", "broken.mp4", "cut.mkv"]
    assert [each["problem"] for each in lines if "problem" in each] == demo.problems
    images = [each for each in lines if "detections" in each and "frame" not in each]
    sizes = [(each["drawn"], each["width"], each["height"]) for each in images]
    assert sizes == [("a.jpg", 90, 60), ("b.jpg", 60, 90)]
    with Image.open(output / "b.jpg") as drawn, Image.open(output / "a.jpg") as other:
        assert drawn.size == other.size[::-1]
    clip = [each for each in lines if each.get("drawn") == "clip.mp4"]
    assert [each["frame"] for each in clip] == [0, 1, 2, 3]
    assert [each["seconds"] for each in clip] == pytest.approx(TIMES, abs=2e-3)
    assert frame_times(output / "clip.mp4") == pytest.approx(TIMES, abs=2e-3)
    cut = [each for each in lines if each.get("drawn") == "cut.mp4"]
    assert len(frame_times(output / "cut.mp4")) == len(cut) > 5
    assert (demo.images, demo.videos, demo.frames) == (2, 2, 4 + len(cut))
    assert demo.median_seconds is not None and 0 < demo.median_seconds < 60


def test_saves_the_predictors_detections(
    predictor: Predictor, folder: Path, tmp_path: Path
) -> None:
    with Image.open(folder / "a.png") as picture:
        everything = predictor(picture)
    middle = float(np.sort(everything.scores)[len(everything) // 2])
    demo = Demo(predictor, tmp_path / "out", threshold=middle)
    demo.run(find_sources([str(folder / "a.png")], tmp_path / "out"))
    (line,) = results(tmp_path / "out")
    kept = everything.above(middle)
    assert 0 < len(kept) < len(everything)
    saved = line["detections"]
    assert [each["score"] for each in saved] == pytest.approx(kept.scores, abs=1e-5)
    corner, far = kept.boxes[:, :2], kept.boxes[:, 2:]
    assert [each["box"][:2] for each in saved] == pytest.approx(corner, abs=1e-3)
    assert [each["box"][2:] for each in saved] == pytest.approx(far - corner, abs=1e-3)
    assert [each["name"] for each in saved] == kept.names
    assert [each["category_index"] for each in saved] == kept.labels.tolist()
    assert demo.median_seconds is None  # the first batch, which is slower, is not measured


NOTHING = {
    "boxes": np.empty((0, 4), np.float32),
    "scores": np.empty(0, np.float32),
    "labels": np.empty(0, np.int64),
    "class_names": ["\ud800<b>"],
}


class Fake(Predictor):
    """Another predictor with other detections, or a signal in its n-th batch."""

    def __init__(self, other: Predictor, signal_in: int = 0, **found: Any) -> None:
        vars(self).update(vars(other))
        self.found, self.signal_in = {**NOTHING, **found}, signal_in

    def detect(self, records: Any) -> list[Prediction]:
        self.signal_in -= 1
        if self.signal_in == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return [Prediction(width=90, height=60, **self.found) for _ in records]


def test_saves_masks_and_keypoints(predictor: Predictor, folder: Path, tmp_path: Path) -> None:
    mask = np.random.default_rng(0).random((60, 90)) > 0.5
    points = np.array([[1.5, 2.25, 0.5]], np.float32)
    fake = Fake(
        predictor,
        boxes=np.array([[1, 2, 4, 6]], np.float32),
        scores=np.array([0.5], np.float32),
        labels=np.array([0]),
        masks=mask[None],
        keypoints=points[None],
        stuff={"sky": ~mask},
    )
    demo = Demo(fake, tmp_path / "out")
    demo.run(find_sources([str(folder / "a.png")], tmp_path / "out"))
    (line,) = results(tmp_path / "out")
    (saved,) = line["detections"]
    assert (saved["box"], saved["name"], saved["score"]) == ([1, 2, 3, 4], "\ud800<b>", 0.5)
    assert np.array_equal(mask_util.decode(saved["mask"]), mask)
    assert saved["keypoints"] == points.tolist()
    assert np.array_equal(mask_util.decode(line["stuff"]["sky"]), ~mask)


def test_ctrl_c_keeps_what_is_finished(predictor: Predictor, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    demo = Demo(Fake(predictor, signal_in=4), output)
    with pytest.raises(KeyboardInterrupt):
        demo.run(find_sources([str(folder)], output))
    assert sorted(each.name for each in output.iterdir()) == ["a.jpg", "b.jpg", RESULTS]
    drawn = [each["drawn"] for each in results(output) if "drawn" in each]
    assert drawn == ["a.jpg", "b.jpg"]


def test_ctrl_c_finishes_the_recording_of_a_camera(predictor: Predictor, tmp_path: Path) -> None:
    file = write_frames(tmp_path / "camera.mkv", [n / 10 for n in range(30)])
    before = signal.getsignal(signal.SIGINT)
    demo = Demo(Fake(predictor, signal_in=3), tmp_path / "out")
    with open_video(file) as reader:
        demo.record(reader, "webcam.mp4")
        list(reader)
        with pytest.raises(DatasetError, match="no frame"):
            demo.record(reader, "again.mp4")
    assert signal.getsignal(signal.SIGINT) is before
    assert len(frame_times(tmp_path / "out" / "webcam.mp4")) == 3
    assert not (tmp_path / "out" / "again.mp4").exists()


@pytest.fixture()
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name in ("b.PNG", "a.jpg", "clip.MOV", "notes.txt", "._a.jpg", "deep/c.jpg", "[1].jpg"):
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_text("")
    return root


def test_finds_files_folders_and_patterns(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tree / "out"

    def names(*inputs: str | Path) -> list[str]:
        return [each.file.name for each in find_sources([str(each) for each in inputs], output)]

    found = find_sources([str(tree)], output)
    assert [(each.file.name, each.is_video, each.drawn) for each in found] == [
        ("[1].jpg", False, "[1].jpg"),
        ("a.jpg", False, "a.jpg"),
        ("b.PNG", False, "b.jpg"),
        ("clip.MOV", True, "clip.mp4"),
    ]
    assert names(tree / "*.jpg") == ["[1].jpg", "a.jpg"]
    everything = names(tree / "**" / "*")
    assert everything == ["[1].jpg", "a.jpg", "b.PNG", "clip.MOV", "c.jpg"]
    assert names(tree / "[1].jpg") == ["[1].jpg"]
    assert names(tree / "notes.txt") == ["notes.txt"]
    assert names(tree / "a.jpg", tree / "deep" / ".." / "a.jpg", tree / "a.*") == ["a.jpg"]
    monkeypatch.setenv("HOME", str(tree))
    assert names("~/deep/*.jpg") == ["c.jpg"]
    output.mkdir()
    (output / "a.jpg").write_text("drawn")
    assert names(tree / "**" / "*") == everything  # a second run reads the same


def test_drawn_names_are_unique_and_short(tmp_path: Path) -> None:
    long = "\u00fc" * 120 + ".jpg"
    given = ["x/a.jpg", "y/a.jpg", "z/A.png", "z/a_2.jpg", "x/a.mp4", "y/a.avi", f"x/{long}"]
    for name in given:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = find_sources([str(tmp_path / name) for name in given], tmp_path / "out")
    *drawn, last = [each.drawn for each in found]
    assert drawn == ["a.jpg", "a_2.jpg", "A_3.jpg", "a_2_2.jpg", "a.mp4", "a_2.mp4"]
    assert len(f".{last}.12345678.partial".encode()) <= 255


def test_refuses_names_that_are_too_long(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: File name too long"):
        find_sources(["x" * 300], tmp_path)


@pytest.mark.parametrize("given", ["nothing.jpg", "*.txt", "empty", "out", "out/a.jpg"])
def test_refuses_inputs_without_images(tree: Path, given: str) -> None:
    (tree / "empty").mkdir()
    (tree / "out").mkdir()
    (tree / "out" / "a.jpg").write_text("")
    with pytest.raises(ConfigError, match="names no image or video outside the output folder"):
        find_sources([str(tree / given)], tree / "out")


def test_refuses_images_that_no_jpeg_can_hold(predictor: Predictor, tmp_path: Path) -> None:
    Image.new("1", (70_000, 1000)).save(tmp_path / "a.png")
    demo = Demo(predictor, tmp_path / "out")
    demo.run(find_sources([str(tmp_path / "a.png")], tmp_path / "out"))
    assert "at most 65500 a side" in demo.problems[0]


def test_predict_command_prints_or_saves_beside_the_run(
    detector: CfgNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(detector.MODEL.WEIGHTS).parent
    (run / "config.yaml").write_text(detector.dump())
    (tmp_path / "photos").mkdir()
    for name in ("a.jpg", "B.PNG"):
        Image.new("RGB", (60, 40), (90, 120, 30)).save(tmp_path / "photos" / name)
    words = ["predict", "--run", str(run), str(tmp_path / "photos"), "--threshold", "0"]
    assert main([*words, "MODEL.RPN.NMS_THRESH", "0.8"]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path}/photos/B.PNG: 60 x 40 pixels: " in said
    assert sorted(run.glob("predicted*")) == [] and "drawn" not in said
    assert main([*words, "--save", "--device", "cpu"]) == 0
    assert {each.name for each in (run / "predicted").iterdir()} == {"a.jpg", "B.jpg", RESULTS}
    assert "pixels" not in capsys.readouterr().out


def test_predict_command(
    detector: CfgNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Overrides may be anywhere; a broken file is reported, and the others are drawn."""
    folder, output = tmp_path / "in", tmp_path / "in" / "out"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (60, 40), (90, 120, 30)).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"no picture")
    write_frames(folder / "a.mkv", [0.0, 0.1, 0.2])
    words = ["INPUT.MIN_SIZE_TEST", 64, "--config-file", "faster_rcnn_X_26_8x4d_FPN_toy"]
    words += ["--input", folder / "*.jpg", folder / "a.mkv", "--output", output]
    words += ["MODEL.WEIGHTS", detector.MODEL.WEIGHTS, "--threshold", 0]
    words += ["--opts", "INPUT.MAX_SIZE_TEST", 96, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.999]
    assert main(["predict", *map(str, words)]) == 1
    said = capsys.readouterr()
    assert f"error: the image {folder / 'broken.jpg'} cannot be read" in said.err
    assert f"drawn into {output}: 2 images, 1 videos of 3 frames" in said.out
    assert said.out.splitlines()[-1].startswith("network: ")
    assert sorted(each.name for each in output.iterdir()) == ["a.jpg", "a.mp4", "b.jpg", RESULTS]
    lines = [each for each in results(output) if "detections" in each]
    assert len(lines) == 5
    assert any(found["score"] < 0.9 for line in lines for found in line["detections"])
