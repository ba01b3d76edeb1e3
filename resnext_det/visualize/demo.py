"""Runs a detector on images and videos, draws its detections, and saves them."""

from __future__ import annotations

import contextlib
import glob
import io
import itertools
import json
import os
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from PIL import Image

from resnext_det.console import progress_bar
from resnext_det.engine.predictor import Predictor, Record, batches
from resnext_det.errors import ConfigError, DatasetError, quoted
from resnext_det.files import written_beside
from resnext_det.image_files import SUFFIXES
from resnext_det.images import read_picture
from resnext_det.prediction import Prediction, run_lengths
from resnext_det.visualize.draw import draw_prediction, save_picture
from resnext_det.visualize.video import VideoReader, open_video, written_video

RESULTS = "detections.jsonl"

# fmt: off
VIDEO_SUFFIXES = {
    ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
    ".mts", ".ogv", ".webm", ".wmv",
}
# fmt: on

_LONGEST_STEM = 200  # bytes; file systems allow 255, including a suffix
_LONGEST_SIDE = 65_500  # pixels; libjpeg's JPEG_MAX_DIMENSION
_MOST_TIMINGS = 10_000  # a camera may run for days


@dataclass(frozen=True)
class MediaFile:
    """An image or video to read.

    Attributes:
        file: its path.
        is_video: whether its suffix is that of a video.
        drawn: name of the file to write, unique among the sources.
    """

    file: Path
    is_video: bool
    drawn: str


def find_sources(inputs: Sequence[str], output: Path | None) -> list[MediaFile]:
    """Return the images and videos that files, folders and patterns name, each once.

    Subfolders and hidden files of a folder are skipped, and so is the output folder, so a second
    run reads the same files as the first. `cat.png` is drawn as `cat.jpg`, `clip.avi` as
    `clip.mp4`; duplicate names become `cat_2.jpg`.

    Raises:
        ConfigError: an input names no image or video outside the output folder.
    """
    output = None if output is None else output.expanduser().resolve()
    files: dict[Path, Path] = {}
    for given in inputs:
        found = _matches(given, output)
        if not found:
            raise ConfigError(
                f"{quoted(Path(given))} names no image or video"
                f"{' outside the output folder' if output else ''}. Pass files, folders, or "
                "patterns such as 'folder/**/*.jpg'."
            )
        for file in found:
            files.setdefault(file.resolve(), file)
    taken: set[str] = set()
    sources = []
    for file in files.values():
        is_video = file.suffix.lower() in VIDEO_SUFFIXES
        stem = os.fsencode(file.stem)[:_LONGEST_STEM].decode(errors="replace")
        names = (stem if n == 1 else f"{stem}_{n}" for n in itertools.count(1))
        suffix = ".mp4" if is_video else ".jpg"
        # Some file systems treat A.jpg and a.jpg as the same file.
        drawn = next(f"{name}{suffix}" for name in names if f"{name}{suffix}".lower() not in taken)
        taken.add(drawn.lower())
        sources.append(MediaFile(file, is_video, drawn))
    return sources


def _matches(given: str, output: Path | None) -> list[Path]:
    path = Path(given).expanduser()
    try:
        if path.is_file():
            return [] if path.resolve().parent == output else [path]
        # Path.glob takes no absolute pattern.
        names = path.iterdir() if path.is_dir() else glob.iglob(str(path), recursive=True)  # noqa: PTH207
        found = sorted(map(Path, names))
    except OSError as error:
        raise ConfigError(f"{quoted(path)} cannot be read: {error.strerror}.") from error
    return [
        file
        for file in found
        if not file.name.startswith(".")
        and file.suffix.lower() in SUFFIXES | VIDEO_SUFFIXES
        and file.is_file()
        and file.resolve().parent != output
    ]


class Demo:
    """Detects, draws, and writes images, videos and detections.jsonl.

    detections.jsonl holds one JSON object a line. Images have "file", "drawn", "width", "height"
    and "detections", frames of videos also "frame" and "seconds". A detection has "box" (x, y,
    width, height in pixels), "name", "category_index" and "score", and depending on the model
    "mask" (COCO's compressed RLE) and "keypoints" (x, y, score). Images of a Panoptic FPN also have
    "stuff", masks by name. Unreadable files have "file" and "problem".

    Attributes:
        images: number drawn so far.
        videos: number drawn so far.
        frames: number of frames of those videos.
        problems: messages about skipped and damaged files.
        seconds: time of the network per image, without the first batch.
    """

    def __init__(
        self,
        predictor: Predictor,
        output: Path | None,
        threshold: float = 0.5,
        batch: int = 1,
        show: Callable[[MediaFile, Prediction], None] | None = None,
    ) -> None:
        """Prepare.

        Args:
            predictor: the detector.
            output: folder to write to; None to write nothing, which excludes videos.
            threshold: lowest score to draw and save.
            batch: images per batch.
            show: called with every image and what was found in it.
        """
        self._predictor = predictor
        self._output = output
        self._threshold = threshold
        self._batch = batch
        self._show = show
        self.images = self.videos = self.frames = 0
        self.problems: list[str] = []
        self.seconds: deque[float] = deque(maxlen=_MOST_TIMINGS)
        self._is_warm = False

    def run(self, sources: Sequence[MediaFile]) -> None:
        """Draw images and videos, listing those that cannot be read in `problems`.

        Ctrl-C keeps what is finished, and nothing half-written.

        Raises:
            ConfigError: there are videos, and PyAV is not installed.
            ResNeXtError: something cannot be written.
        """
        images = [each for each in sources if not each.is_video]
        with self._results() as results:
            if images:
                self._draw_images(images, results)
            for source in sources:
                if source.is_video:
                    try:
                        with open_video(source.file) as reader:
                            self._draw_video(reader, reader, source, results)
                            if reader.problem is not None:
                                self._add_problem(source, reader.problem, results)
                    except DatasetError as error:
                        self._add_problem(source, str(error), results)

    def record(self, camera: VideoReader, drawn: str) -> None:
        """Draw the frames of a camera until Ctrl-C, which finishes the video.

        Args:
            camera: from `open_camera`.
            drawn: name of the video to write.

        Raises:
            DatasetError: the camera gives no frame.
            ResNeXtError: something cannot be written.
        """
        source = MediaFile(Path(camera.name), True, drawn)
        with _interruptible() as interrupted, self._results() as results:
            frames = itertools.takewhile(lambda _: not interrupted(), camera)
            self._draw_video(camera, frames, source, results)

    @property
    def median_seconds(self) -> float | None:
        """Median time of the network per image; None before a second batch."""
        return statistics.median(self.seconds) if self.seconds else None

    @contextlib.contextmanager
    def _results(self) -> Iterator[BinaryIO]:
        """Yield the stream of detections.jsonl, which is kept after errors and Ctrl-C."""
        if self._output is None:
            yield io.BytesIO()
            return
        raised: BaseException | None = None
        with written_beside(self._output / RESULTS) as beside, beside.open("wb") as stream:
            try:
                yield stream
            except BaseException as error:
                raised = error
        if raised is not None:
            raise raised

    def _draw_images(self, sources: Sequence[MediaFile], results: BinaryIO) -> None:
        desc = "detecting" if self._output is None else "drawing"
        bar = progress_bar(sources, desc=desc, unit="image")
        for batch in batches(self._readable(bar, results), self._batch):
            predictions = self._detect([record for _, _, record in batch])
            for (source, picture, _), found in zip(batch, predictions):
                if self._output is not None:
                    save_picture(draw_prediction(picture, found), self._output / source.drawn)
                _write(results, source, picture, found)
                if self._show is not None:
                    self._show(source, found)
                self.images += 1

    def _readable(
        self, sources: Iterable[MediaFile], results: BinaryIO
    ) -> Iterator[tuple[MediaFile, Image.Image, Record]]:
        for source in sources:
            try:
                picture = read_picture(source.file)
                if max(picture.size) > _LONGEST_SIDE:
                    raise DatasetError(
                        f"the image {quoted(source.file)} is {picture.width} x {picture.height} "
                        f"pixels, and a JPEG has at most {_LONGEST_SIDE} a side: cut it into tiles."
                    )
                record = self._predictor.record(picture)
            except DatasetError as error:
                self._add_problem(source, str(error), results)
                continue
            yield source, picture, record

    def _draw_video(
        self, reader: VideoReader, frames: Iterable[Any], source: MediaFile, results: BinaryIO
    ) -> None:
        name = quoted(Path(source.file.name), 40)
        bar = progress_bar(frames, desc=name, total=reader.frame_count, unit="frame")
        assert self._output is not None
        start, count = results.tell(), 0
        try:
            with written_video(self._output / source.drawn, reader.rate) as writer:
                for batch in batches(iter(bar), self._batch):
                    records = [self._predictor.record(each.picture) for each in batch]
                    for frame, found in zip(batch, self._detect(records)):
                        writer.write(draw_prediction(frame.picture, found), frame.seconds)
                        when = {"frame": count, "seconds": round(frame.seconds, 6)}
                        _write(results, source, frame.picture, found, **when)
                        count += 1
        except BaseException:  # the video was not written, so neither are its detections
            results.seek(start)
            results.truncate()
            raise
        self.videos += 1
        self.frames += count

    def _add_problem(self, source: MediaFile, message: str, results: BinaryIO) -> None:
        name = quoted(source.file)
        message = message if name in message else f"{name}: {message}"
        self.problems.append(message)
        line = {"file": str(source.file), "problem": message}
        results.write(f"{json.dumps(line)}\n".encode())

    def _detect(self, records: Sequence[Record]) -> list[Prediction]:
        start = time.perf_counter()
        found = self._predictor.detect(records)  # in CPU memory, so a GPU has finished
        if self._is_warm:
            self.seconds.append((time.perf_counter() - start) / len(records))
        self._is_warm = True
        return [each.above(self._threshold) for each in found]


def _write(
    results: BinaryIO,
    source: MediaFile,
    picture: Image.Image,
    found: Prediction,
    **when: float,
) -> None:
    width, height = picture.size
    line: dict[str, Any] = {
        "file": str(source.file),
        "drawn": source.drawn,
        "width": width,
        "height": height,
    }
    line |= {**when, "detections": _entries(found)}
    if found.stuff:
        line["stuff"] = {name: run_lengths(mask) for name, mask in found.stuff.items()}
    results.write(f"{json.dumps(line)}\n".encode())


def _entries(found: Prediction) -> list[dict[str, Any]]:
    entries = []
    rows = found.to_coco(0, range(found.labels.max(initial=0) + 1))
    for place, (row, name) in enumerate(zip(rows, found.names)):
        entry = {
            "box": [round(value, 3) for value in row["bbox"]],
            "name": name,
            "category_index": row["category_id"],
            "score": round(row["score"], 6),
        }
        if found.masks is not None:
            entry["mask"] = row["segmentation"]
        if found.keypoints is not None:
            entry["keypoints"] = found.keypoints[place].astype(float).round(3).tolist()
        entries.append(entry)
    return entries


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed; a second one raises as usual."""
    interrupted = False
    previous = signal.getsignal(signal.SIGINT)

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda: interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
