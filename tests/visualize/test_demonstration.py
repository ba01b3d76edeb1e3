from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, pairwise_iou
from PIL import Image

import resnext_det.visualize.demonstration
from resnext_det.engine.predictor import Detection, Predictor
from resnext_det.errors import DatasetError
from resnext_det.visualize.demonstration import Demonstration, Speed
from resnext_det.visualize.inputs import Source, find_sources
from resnext_det.visualize.video_reading import open_video

Frames = Callable[..., Path]
TIMES = [0.0, 0.1, 0.4, 0.5]


@pytest.fixture()
def folder(tmp_path: Path, frames: Frames) -> Path:
    """Two pictures, one of them lying, a whole video and a cut one, and two broken files."""
    root = tmp_path / "in"
    root.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(root / "a.png")
    Image.fromarray(pixels).save(root / "b.jpg", exif=exif)
    (root / "broken.png").write_bytes(b"no picture")
    (root / "broken.mp4").write_bytes(b"no video")
    frames(root / "clip.mkv", TIMES, size=(66, 50))
    cut = frames(root / "cut.mkv", [n / 10 for n in range(40)], size=(160, 120))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    return root


def read(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "detections.json").read_text())
    return found


def frame_times(file: Path) -> list[float]:
    with av.open(str(file)) as container:
        return [frame.time for frame in container.decode(video=0)]


def corners(detections: list[dict[str, Any]]) -> Boxes:
    boxes = torch.tensor([each["box"] for each in detections]).reshape(-1, 4)
    return Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1))


def test_everything_that_can_be_read_is_drawn(
    predictor: Predictor, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count(step=0.25)  # a clock by which everything takes a quarter of a second
    clock = SimpleNamespace(perf_counter=lambda: next(ticks))
    monkeypatch.setattr(resnext_det.visualize.demonstration, "time", clock)
    output = tmp_path / "out"
    done = Demonstration(predictor, output, threshold=0.0)
    done.run(find_sources([str(folder)], output))
    assert sorted(each.name for each in output.iterdir()) == [
        *("a.jpg", "b.jpg", "clip.mp4", "cut.mp4", "detections.json")
    ]
    found = read(output)
    assert [each["drawn"] for each in found["images"]] == ["a.jpg", "b.jpg"]
    assert [(each["width"], each["height"]) for each in found["images"]] == [(90, 60), (60, 90)]
    with Image.open(output / "b.jpg") as drawn:
        assert drawn.width < drawn.height
    assert {Path(each["file"]).name for each in found["problems"]} == {
        *("broken.png", "broken.mp4", "cut.mkv")
    }
    assert [str(each) for each in done.problems] == [e["problem"] for e in found["problems"]]
    clip, cut = found["videos"]
    assert (clip["width"], clip["height"], clip["drawn"]) == (66, 50, "clip.mp4")
    assert [each["index"] for each in clip["frames"]] == [0, 1, 2, 3]
    assert [each["seconds"] for each in clip["frames"]] == pytest.approx(TIMES, abs=2e-3)
    assert frame_times(output / "clip.mp4") == pytest.approx(TIMES, abs=2e-3)
    assert len(frame_times(output / "cut.mp4")) == len(cut["frames"]) > 5
    assert (done.images, done.videos, done.frames) == (2, 2, 4 + len(cut["frames"]))
    assert done.speed == Speed(
        images=2 + done.frames - 1, network=0.25, images_per_second=4, drawing=0.25, warm=True
    )


def test_boxes_are_the_predictors_above_the_threshold(
    predictor: Predictor, folder: Path, tmp_path: Path
) -> None:
    with Image.open(folder / "a.png") as picture:
        everything = predictor(picture)
    middle = sorted(each.score for each in everything)[len(everything) // 2]
    Demonstration(predictor, tmp_path / "out", threshold=middle).run(
        find_sources([str(folder / "a.png")], tmp_path / "out")
    )
    (entry,) = read(tmp_path / "out")["images"]
    kept = [each for each in everything if each.score >= middle]
    assert 0 < len(kept) < len(everything)
    assert [each["score"] for each in entry["detections"]] == pytest.approx(
        [each.score for each in kept], abs=1e-5
    )
    assert [each["box"] for each in entry["detections"]] == [
        pytest.approx(each.box, abs=1e-3) for each in kept
    ]
    assert [each["category_index"] for each in entry["detections"]] == [
        each.category_index for each in kept
    ]


def test_batches_change_nothing_but_the_time(
    predictor: Predictor, folder: Path, tmp_path: Path
) -> None:
    found = []
    for batch in (1, 3):
        output = tmp_path / f"out{batch}"
        done = Demonstration(predictor, output, threshold=0.0, batch=batch)
        done.run(find_sources([str(folder / "*.png"), str(folder / "clip.mkv")], output))
        found.append(read(output))
    one, three = (each["videos"][0]["frames"] for each in found)
    assert [each["index"] for each in one] == [each["index"] for each in three]
    for single, together in zip(one, three, strict=True):
        overlap = pairwise_iou(corners(single["detections"]), corners(together["detections"]))
        assert overlap.max(dim=1).values.min() > 0.95


class Interrupting(Predictor):
    """The predictor of others, which Ctrl-C meets in its n-th picture."""

    def __init__(self, other: Predictor, calls: int, number: int = signal.SIGINT) -> None:
        vars(self).update(vars(other))
        self.calls = calls
        self.number = number

    def detect(self, records: Any) -> list[list[Detection]]:
        self.calls -= 1
        if self.calls == 0:
            os.kill(os.getpid(), self.number)
        return super().detect(records)


def test_after_ctrl_c_what_is_finished_stays(
    predictor: Predictor, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    done = Demonstration(Interrupting(predictor, 4), output, threshold=0.0)
    with pytest.raises(KeyboardInterrupt):
        done.run(find_sources([str(folder)], output))
    names = sorted(each.name for each in output.iterdir())
    assert names == ["a.jpg", "b.jpg", "detections.json"]
    found = read(output)
    assert len(found["images"]) == 2 and found["videos"] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_camera_is_recorded_until_it_is_stopped(
    number: int, predictor: Predictor, frames: Frames, tmp_path: Path
) -> None:
    """A file stands for the camera; the video is whole, and the next Ctrl-C is as usual."""
    file = frames(tmp_path / "camera.mkv", [n / 10 for n in range(30)])
    before = signal.getsignal(number)
    done = Demonstration(Interrupting(predictor, 3, number), tmp_path / "out", threshold=0.0)
    with open_video(file) as reader:
        done.run_live(reader, "webcam.mp4")
    assert signal.getsignal(number) is before
    (video,) = read(tmp_path / "out")["videos"]
    assert len(video["frames"]) == len(frame_times(tmp_path / "out" / "webcam.mp4")) == 3


def test_a_camera_without_a_frame_is_an_error(
    predictor: Predictor, tmp_path: Path, frames: Frames
) -> None:
    file = frames(tmp_path / "camera.mkv", [0.0])
    with open_video(file) as reader:
        list(reader)
        with pytest.raises(DatasetError, match="no frame"):
            Demonstration(predictor, tmp_path / "out").run_live(reader, "webcam.mp4")
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["detections.json"]


def test_one_picture_is_measured_and_said_to_be_the_first(
    predictor: Predictor, folder: Path, tmp_path: Path
) -> None:
    done = Demonstration(predictor, tmp_path / "out")
    assert done.speed is None
    done.run([Source(folder / "a.png", False, "a.jpg")])
    speed = done.speed
    assert speed is not None and not speed.warm and speed.images == 1
