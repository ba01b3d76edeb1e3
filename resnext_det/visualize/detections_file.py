"""detections.json, written entry by entry, so memory does not grow with a video."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pycocotools.mask as mask_util

from resnext_det.engine.predictor import Detection
from resnext_det.errors import quoted
from resnext_det.files import written_beside

Entry = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """A file that was skipped or only partly readable, and why."""

    file: str
    problem: str

    def __str__(self) -> str:
        name = quoted(Path(self.file))
        # Messages of the package name the file already.
        return self.problem if name in self.problem else f"{name}: {self.problem}"


class DetectionsFile:
    """The document while it is written: first pictures, then videos, then problems."""

    def __init__(self, stream: IO[bytes], head: Entry) -> None:
        """Begin.

        Args:
            stream: an empty file.
            head: what it begins with.
        """
        self._stream = stream
        self._write("{" + _members(head) + '"images": [')
        self._first = True
        self._videos = False

    def add_image(self, entry: Entry) -> None:
        """Add a picture; there must be no video yet.

        Args:
            entry: what is known of it, its "detections" included.
        """
        self._separate()
        self._write(json.dumps(entry))

    @contextlib.contextmanager
    def video(self, entry: Entry) -> Iterator[Callable[[Entry], None]]:
        """Add a video; where the body ends with an error, it leaves no trace.

        Args:
            entry: what is known of it.

        Yields:
            A function that adds a frame, its "detections" included.
        """
        self._begin_videos()
        position, first = self._stream.tell(), self._first
        self._separate()
        self._write("{" + _members(entry) + '"frames": [')
        between = "\n"

        def add_frame(frame: Entry) -> None:
            """Write a frame on a line of its own."""
            nonlocal between
            self._write(between + json.dumps(frame))
            between = ",\n"

        try:
            yield add_frame
        except BaseException:
            self._stream.seek(position)
            self._stream.truncate()
            self._first = first
            raise
        self._write("\n]}")

    def finish(self, problems: Sequence[Problem]) -> None:
        """Write the rest of the document.

        Args:
            problems: of files, in order.
        """
        self._begin_videos()
        self._write(f'\n],\n"problems": {json.dumps([asdict(each) for each in problems])}}}\n')

    def _begin_videos(self) -> None:
        if not self._videos:
            self._write('\n],\n"videos": [')
            self._first, self._videos = True, True

    def _separate(self) -> None:
        self._write("\n" if self._first else ",\n")
        self._first = False

    def _write(self, text: str) -> None:
        self._stream.write(text.encode())


def detection_entries(detections: Sequence[Detection]) -> list[Entry]:
    """Return detections as the document has them.

    Args:
        detections: of a picture.

    Returns:
        "box" (x, y, width, height in pixels), "name", "category_index" and "score" of each; if the
        detector has them, "mask" as COCO's compressed RLE, and "keypoints" as triples of x, y and
        score.
    """
    return [_entry(each) for each in detections]


def _entry(detection: Detection) -> Entry:
    entry: Entry = {
        "box": [round(value, 3) for value in detection.box],
        "name": detection.name,
        "category_index": detection.category_index,
        "score": round(detection.score, 6),
    }
    if detection.mask is not None:
        encoded = mask_util.encode(np.asfortranarray(detection.mask, dtype=np.uint8))
        entry["mask"] = {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")}
    if detection.keypoints is not None:
        entry["keypoints"] = [
            [round(float(value), 3) for value in point] for point in detection.keypoints
        ]
    return entry


@contextlib.contextmanager
def written_detections(
    target: Path, head: Entry, problems: Sequence[Problem]
) -> Iterator[DetectionsFile]:
    """Write detections.json beside and rename it; after an error as well, with what there is.

    Args:
        target: the file.
        head: what the document begins with.
        problems: written at the end, as they are then.

    Raises:
        ResNeXtError: it cannot be written.
    """
    ended: BaseException | None = None
    with written_beside(target) as beside, beside.open("wb") as stream:
        document = DetectionsFile(stream, head)
        try:
            yield document
        except BaseException as error:  # Ctrl-C: what is finished stays
            ended = error
        document.finish(problems)
    if ended is not None:
        raise ended


def _members(entry: Entry) -> str:
    return "".join(f"{json.dumps(key)}: {json.dumps(value)}, " for key, value in entry.items())
