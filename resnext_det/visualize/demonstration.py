"""Runs a detector over pictures and videos, draws its detections, and saves them."""

from __future__ import annotations

import contextlib
import itertools
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from resnext_det.engine.predictor import Detection, Predictor, Record
from resnext_det.errors import DatasetError, quoted
from resnext_det.visualize.detections_file import (
    DetectionsFile,
    Problem,
    detection_entries,
    written_detections,
)
from resnext_det.visualize.drawing import Drawn, draw_objects
from resnext_det.visualize.inputs import Source
from resnext_det.visualize.pictures import read_drawable, save_jpeg
from resnext_det.visualize.video_reading import VideoReader, open_video
from resnext_det.visualize.video_writing import written_video

T = TypeVar("T")

FILE = "detections.json"

_LOWEST_OF_KEYPOINTS = 0.05  # score of those that are drawn, as by Detectron2's Visualizer
_MEASURED = 10_000  # batches and pictures, the last ones


@dataclass(frozen=True)
class Speed:
    """How long images took, in seconds.

    Attributes:
        images: how many were measured.
        network: median time of the network for one image, without the first batch.
        images_per_second: of the network.
        drawing: median time to draw one image.
        warm: whether there was more than the first batch, which is slower.
    """

    images: int
    network: float
    images_per_second: float
    drawing: float
    warm: bool


class Demonstration:
    """Detects and draws.

    Attributes:
        images: pictures drawn so far.
        videos: videos drawn so far.
        frames: frames of those videos.
        problems: files that were skipped or are damaged.
    """

    def __init__(
        self, predictor: Predictor, output: Path, threshold: float = 0.5, batch: int = 1
    ) -> None:
        """Prepare.

        Args:
            predictor: the detector.
            output: the folder to write to.
            threshold: lowest score to draw and save.
            batch: images in one batch.
        """
        self._predictor = predictor
        self._output = output
        self._threshold = threshold
        self._batch = batch
        self.images = self.videos = self.frames = 0
        self.problems: list[Problem] = []
        # Seconds and images of each batch, and seconds of each picture; a camera may run for days.
        self._first: tuple[float, int] | None = None
        self._network: deque[tuple[float, int]] = deque(maxlen=_MEASURED)
        self._drawing: deque[float] = deque(maxlen=_MEASURED)

    def run(self, sources: Sequence[Source]) -> None:
        """Draw pictures and videos, and write detections.json.

        Files that cannot be read are skipped and listed in `problems`. After Ctrl-C, everything
        finished is kept and nothing else.

        Args:
            sources: from `find_sources`.

        Raises:
            ConfigError: there are videos, and PyAV is not installed.
            ResNeXtError: something cannot be written.
        """
        with self._written() as document:
            self._run_pictures([each for each in sources if not each.is_video], document)
            for source in sources:
                if source.is_video:
                    self._run_file(source, document)

    def run_live(self, reader: VideoReader, drawn: str) -> None:
        """Draw the frames of a camera until Ctrl-C or SIGTERM, which finish the video.

        Args:
            reader: from `open_camera`.
            drawn: name of the video to write.

        Raises:
            DatasetError: there is no frame.
            ResNeXtError: something cannot be written.
        """
        with _asked_to_stop() as stopped, self._written() as document:
            frames = itertools.takewhile(lambda _: not stopped(), reader)
            self._run_video(reader, frames, reader.name, drawn, document)

    @property
    def speed(self) -> Speed | None:
        """The times so far; None before the first batch."""
        if self._first is None:
            return None
        measured = self._network or [self._first]
        images = sum(count for _, count in measured)
        return Speed(
            images=images,
            network=statistics.median(seconds / count for seconds, count in measured),
            images_per_second=images / sum(seconds for seconds, _ in measured),
            drawing=statistics.median(self._drawing) if self._drawing else 0.0,
            warm=bool(self._network),
        )

    def _written(self) -> contextlib.AbstractContextManager[DetectionsFile]:
        head = {"threshold": self._threshold}
        return written_detections(self._output / FILE, head, self.problems)

    def _run_pictures(self, sources: Sequence[Source], document: DetectionsFile) -> None:
        bar = tqdm(total=len(sources), unit="image", disable=None if sources else True)
        with bar:
            for batch in _batches(self._readable(sources, bar), self._batch):
                found = self._detect([record for _, _, record in batch])
                for (source, picture, _), detections in zip(batch, found):
                    save_jpeg(self._draw(picture, detections), self._output / source.drawn)
                    document.add_image(
                        {
                            "file": str(source.file),
                            "drawn": source.drawn,
                            "width": picture.width,
                            "height": picture.height,
                            "detections": detection_entries(detections),
                        }
                    )
                    self.images += 1
                    bar.update()

    def _readable(
        self, sources: Sequence[Source], bar: tqdm[Any]
    ) -> Iterator[tuple[Source, Image.Image, Record]]:
        for source in sources:
            try:
                picture = read_drawable(source.file)
                record = self._predictor.record(picture)
            except DatasetError as error:
                self.problems.append(Problem(str(source.file), str(error)))
                bar.update()
                continue
            yield source, picture, record

    def _run_file(self, source: Source, document: DetectionsFile) -> None:
        try:
            with open_video(source.file) as reader:
                self._run_video(reader, reader, str(source.file), source.drawn, document)
                if reader.problem is not None:
                    self.problems.append(Problem(str(source.file), reader.problem))
        except DatasetError as error:
            self.problems.append(Problem(str(source.file), str(error)))

    def _run_video(
        self,
        reader: VideoReader,
        frames: Iterable[Any],
        file: str,
        drawn: str,
        document: DetectionsFile,
    ) -> None:
        name = quoted(Path(Path(file).name), 40)
        bar = tqdm(frames, desc=name, total=reader.frame_count, unit="frame", disable=None)
        batches = _batches(iter(bar), self._batch)
        first = next(batches, None)
        if first is None:
            raise DatasetError(f"{reader.name} gave no frame")
        size = first[0].picture.size
        entry = {"file": file, "drawn": drawn, "width": size[0], "height": size[1]}
        written = 0
        with (
            bar,
            document.video(entry) as add_frame,
            written_video(self._output / drawn, reader.rate) as writer,
        ):
            for batch in itertools.chain([first], batches):
                found = self._detect([self._predictor.record(each.picture) for each in batch])
                for frame, detections in zip(batch, found):
                    writer.write(self._draw(frame.picture, detections), frame.seconds)
                    entries = detection_entries(detections)
                    seconds = round(frame.seconds, 6)
                    add_frame({"index": frame.index, "seconds": seconds, "detections": entries})
                    written += 1
        self.videos += 1
        self.frames += written

    def _detect(self, records: Sequence[Record]) -> list[list[Detection]]:
        began = time.perf_counter()
        # The result is in the CPU's memory, so a GPU has finished.
        found = self._predictor.detect(records)
        measured = time.perf_counter() - began, len(records)
        if self._first is None:
            self._first = measured
        else:
            self._network.append(measured)
        return [[each for each in one if each.score >= self._threshold] for one in found]

    def _draw(self, picture: Image.Image, detections: Sequence[Detection]) -> Image.Image:
        began = time.perf_counter()
        objects = [
            Drawn(
                each.box,
                f"{each.name} {each.score:.2f}",
                each.category_index,
                each.mask,
                None if each.keypoints is None else _surely(each.keypoints),
            )
            for each in detections
        ]
        drawn = draw_objects(picture, objects, self._predictor.connections)
        self._drawing.append(time.perf_counter() - began)
        return drawn


def _surely(keypoints: NDArray[np.float32]) -> NDArray[np.float32]:
    return keypoints - np.array([0, 0, _LOWEST_OF_KEYPOINTS], np.float32)


def _batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while batch := list(itertools.islice(items, size)):
        yield batch


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C or SIGTERM came; a second signal acts as usual."""
    asked = False
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        restore()

    for number in before:
        signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        restore()
