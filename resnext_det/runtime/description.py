"""What an artifact says about itself, as JSON inside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from resnext_det.errors import ArtifactError, quoted

KEY = "resnext_det"
"""The name of the JSON document in an artifact's metadata."""

VERSION = 1
"""Of the document, the graph's inputs and its outputs."""

_MOST_CHARACTERS = 2**22
_LONGEST_SIDE = 2**14  # of a resized image


@dataclass(frozen=True)
class Description:
    """An exported detector.

    Attributes:
        class_names: in the order of its labels.
        category_ids: of the classes in the annotations it learned from; empty if unknown.
        pixel_format: order of the channels it takes, "BGR" or "RGB".
        pixel_mean: by channel; subtracted inside the graph.
        pixel_std: likewise, divided by.
        shortest_side: to resize images to, in pixels; 0 to leave them as they are.
        longest_side: at most.
        enlarge: "opencv" or "pillow", whose interpolation enlarges images.
        score_threshold: of the detections that the graph returns.
        architecture: of Detectron2, such as GeneralizedRCNN.
        run: the folder that it was exported from; "" if unknown.
        weights: the name of the checkpoint.
        weights_sha256: of the checkpoint.
        precision: of the graph, such as "fp32".
        versions: of what wrote it.
        comparison: with the detector it was exported from: images, detections, and the largest
            difference of their boxes in pixels and of their scores. These are of the float model;
            int8 adds AP, AP_in_float, and the interval of their difference.
        parts_sha256: of files that belong to it, by the end of their name.
    """

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    pixel_format: str
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    shortest_side: int
    longest_side: int
    enlarge: str
    score_threshold: float
    architecture: str
    run: str
    weights: str
    weights_sha256: str
    precision: str
    versions: Mapping[str, str]
    comparison: Mapping[str, float]
    parts_sha256: Mapping[str, str]

    def text(self) -> str:
        """Return the JSON document."""
        return json.dumps({"version": VERSION, **asdict(self)})

    @classmethod
    def parse(cls, text: str, name: str) -> Description:
        """Read the JSON document of an artifact, which may be hostile.

        Args:
            text: of the document; "" if there is none.
            name: of the artifact, for messages.

        Raises:
            ArtifactError: it is missing, of a newer version, or malformed.
        """
        if not text:
            raise ArtifactError(
                f"{name} was not written by `resnext-det export`: it names no classes and no size "
                "of images. Export the detector with this package."
            )
        try:
            if len(text) > _MOST_CHARACTERS:
                raise ValueError(f"it has {len(text):,} characters")
            content = json.loads(text)
            version = content.pop("version")
            if type(version) is int and version > VERSION:
                raise ArtifactError(
                    f"{name} was written by a newer resnext_det (format {quoted(version)}; this "
                    f"one reads {VERSION}): upgrade the package, or export with this version."
                )
            if version != VERSION:
                raise ValueError(f"version is {quoted(version)}")
            values = {each.name: content[each.name] for each in fields(cls)}
            found = cls(**{key: _CHECKS[key](value) for key, value in values.items()})
            found._check()
        except ArtifactError:
            raise
        except KeyError as error:
            raise ArtifactError(f"the metadata of {name} has no {quoted(error.args[0])}") from error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ArtifactError(
                f"the metadata of {name} cannot be read: {quoted(error)}. Export it again."
            ) from error
        return found

    def _check(self) -> None:
        if self.pixel_format not in ("BGR", "RGB"):
            raise ValueError(f"pixel_format is {quoted(self.pixel_format)}")
        if self.enlarge not in ("opencv", "pillow"):
            raise ValueError(f"enlarge is {quoted(self.enlarge)}")
        if not 0 <= self.shortest_side <= self.longest_side <= _LONGEST_SIDE:
            raise ValueError(f"the sides are {self.shortest_side} and {self.longest_side}")


def _of(kind: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        allowed = (int, float) if kind is float else kind
        if not isinstance(value, allowed) or isinstance(value, bool):
            raise TypeError(f"{quoted(value, 40)} is no {kind.__name__}")
        return kind(value)

    return check


def _list_of(kind: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, list):
            raise TypeError(f"{quoted(value, 40)} is no list")
        return tuple(map(_of(kind), value))

    return check


def _table_of(kind: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, dict):
            raise TypeError(f"{quoted(value, 40)} is no table")
        return {str(name): _of(kind)(each) for name, each in value.items()}

    return check


_CHECKS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys([each.name for each in fields(Description)], _of(str)),
    **{"class_names": _list_of(str), "category_ids": _list_of(int)},
    **{"pixel_mean": _list_of(float), "pixel_std": _list_of(float)},
    **{"shortest_side": _of(int), "longest_side": _of(int), "score_threshold": _of(float)},
    **{"versions": _table_of(str), "parts_sha256": _table_of(str), "comparison": _table_of(float)},
}
