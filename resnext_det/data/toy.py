"""Toy COCO: a seeded generator of images and annotations in COCO's own folder layout.

Shapes on textured backgrounds replace COCO where it is not available: in tests and in
`make demo`. There are small, medium and large objects by COCO's area limits, occlusion, crowds
and images without any object, so that all 12 COCO figures are numbers. The same seed gives the
same bytes (with the same versions of NumPy and Pillow).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import contourpy
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as rle

from resnext_det.console import progress_bar
from resnext_det.errors import ConfigError, DatasetError

Generator = np.random.Generator
Mask = NDArray[np.bool_]
Canvas = NDArray[np.float64]
Points = NDArray[np.float64]

CLASSES = ("circle", "square", "triangle", "star", "cross", "crescent")

# COCO's limits: an object is small below 32 * 32 pixels of area, large from 96 * 96 on.
SIZES = {"small": (22.0, 36.0), "medium": (44.0, 96.0), "large": (128.0, 150.0)}
SHARES = {"small": 0.2, "medium": 0.6, "large": 0.2}
_MOST_OVERLAP = 0.25
# Summed over red, green and blue; any grey background has colours at least 192 away.
_LEAST_CONTRAST = 170.0
_SHORTEST_SIDE = 96


@dataclass(frozen=True)
class ToySpec:
    """How much toy data to make.

    Attributes:
        train_images: images in train2017.
        val_images: images in val2017, the toy minival.
        shortest_side: of an image, in pixels.
        longest_side: of an image, in pixels.
        seed: decides every byte.
    """

    train_images: int = 1000
    val_images: int = 120
    shortest_side: int = 176
    longest_side: int = 208
    seed: int = 0


@dataclass(frozen=True)
class Drawn:
    """One object of an image: the class name, the visible pixels, whether it is a crowd."""

    name: str
    visible: Mask
    crowd: bool


def write_toy_coco(root: Path, spec: ToySpec = ToySpec()) -> Path:
    """Write the toy data set unless the same one is there already.

    Args:
        root: the folder that will hold train2017, val2017 and annotations. It appears whole or
            not at all.
        spec: how much to make, and the seed.

    Returns:
        `root`.

    Raises:
        ConfigError: a count or a side of `spec` that no image can have.
        DatasetError: the folder exists and is something else, or cannot be written.
    """
    _check(spec)
    described = json.dumps({"toy_coco": 2, **vars(spec)}, sort_keys=True)
    marker = root / "toy_coco.json"
    if marker.is_file() and marker.read_text() == described:
        return root
    if root.exists() and not marker.is_file():
        raise DatasetError(f"{root} exists and holds no toy COCO; name a folder that is not there.")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    except OSError as error:
        raise DatasetError(f"cannot write the toy data set to {root}: {error}") from error
    try:
        (beside / "annotations").mkdir()
        _write_split(beside, "train2017", 1, spec.train_images, spec)
        _write_split(beside, "val2017", 500_001, spec.val_images, spec)
        (beside / marker.name).write_text(described)
        beside.chmod(0o755)
        shutil.rmtree(root, ignore_errors=True)
        beside.rename(root)
    except OSError as error:
        raise DatasetError(f"cannot write the toy data set to {root}: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return root


def _check(spec: ToySpec) -> None:
    if min(spec.train_images, spec.val_images, spec.seed) < 0:
        raise ConfigError(f"{spec}: numbers of images and the seed must be 0 or more.")
    if not _SHORTEST_SIDE <= spec.shortest_side <= spec.longest_side:
        raise ConfigError(
            f"{spec}: the sides of an image must be {_SHORTEST_SIDE} pixels or more, to hold a "
            "crowd, and the shortest no longer than the longest."
        )


def _write_split(root: Path, split: str, first_id: int, count: int, spec: ToySpec) -> None:
    folder = root / split
    folder.mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in progress_bar(range(count), desc=f"toy {split}", unit="image"):
        image_id = first_id + index
        # A generator per image: the pictures do not depend on how many there are.
        generator = np.random.default_rng([spec.seed, image_id])
        picture, objects = draw_image(generator, spec)
        name = f"{image_id:012d}.jpg"
        picture.save(folder / name, quality=92)
        images.append(
            {"id": image_id, "file_name": name, "width": picture.width, "height": picture.height}
        )
        annotations += [{"image_id": image_id, **entry} for entry in _annotate(objects)]
    for number, annotation in enumerate(annotations, start=first_id):
        annotation["id"] = number
    document = {
        "info": {"description": "Toy COCO, generated by resnext_det", "version": "1.0"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": number, "name": name, "supercategory": "shape"}
            for number, name in enumerate(CLASSES, start=1)
        ],
    }
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))


def draw_image(generator: Generator, spec: ToySpec) -> tuple[Image.Image, list[Drawn]]:
    """Draw one image.

    Args:
        generator: where the randomness comes from.
        spec: only the sides of an image are read.

    Returns:
        The picture, and its objects with what is visible of each; 5 in 100 images have none.
    """
    width, height = (
        int(side) for side in generator.integers(spec.shortest_side, spec.longest_side + 1, size=2)
    )
    canvas = background(width, height, generator)
    objects: list[Drawn] = []
    wanted = 0 if generator.random() < 0.05 else int(generator.integers(1, 6))
    for size in sorted(_sizes(wanted, generator), reverse=True):
        _place(canvas, objects, size, generator)
    if wanted and generator.random() < 0.12:
        _place_crowd(canvas, objects, generator)
    pixels = np.clip(canvas + generator.normal(0, 3, size=canvas.shape), 0, 255)
    return Image.fromarray(pixels.astype(np.uint8)), objects


def _sizes(count: int, generator: Generator) -> Iterator[float]:
    names = list(SHARES)
    for _ in range(count):
        name = names[int(generator.choice(len(names), p=list(SHARES.values())))]
        yield float(generator.uniform(*SIZES[name]))


def _place(canvas: Canvas, objects: list[Drawn], size: float, generator: Generator) -> None:
    """Draw a shape where it hides little of the others; give up where there is no such place."""
    name = CLASSES[int(generator.integers(len(CLASSES)))]
    height, width = canvas.shape[:2]
    # A triangle fills a third of its circle and a star less: make them as large as the others.
    size *= {"triangle": 1.3, "star": 1.25, "crescent": 1.3, "cross": 1.15}.get(name, 1.0)
    size = min(size, width - 4.0, height - 4.0)
    for _ in range(12):
        points = outline(name, size, float(generator.uniform(-0.5, 0.5)))
        low, high = points.min(axis=0), points.max(axis=0)
        room = np.array([width - 2, height - 2]) - (high - low)
        if (room < 0).any():
            continue
        mask = _rasterise(points - low + 1 + generator.uniform(0, 1, size=2) * room, width, height)
        if mask.any() and not _hides_too_much(mask, objects):
            _paint(canvas, mask, generator)
            _cover(objects, mask)
            objects.append(Drawn(name, mask, crowd=False))
            return


def _place_crowd(canvas: Canvas, objects: list[Drawn], generator: Generator) -> None:
    """Draw many tiny shapes of one class side by side, annotated as one crowd."""
    name = CLASSES[int(generator.integers(len(CLASSES)))]
    height, width = canvas.shape[:2]
    left, top = generator.uniform(2, width - 66), generator.uniform(2, height - 46)
    crowd: Mask = np.zeros((height, width), dtype=np.bool_)
    painted = []
    for row in range(3):
        for column in range(5):
            centre = np.array([left + 6 + 12 * column, top + 6 + 12 * row])
            points = outline(name, 12.0, float(generator.uniform(-0.5, 0.5)))
            painted.append(_rasterise(points + centre, width, height))
            crowd |= painted[-1]
    if _hides_too_much(crowd, objects):
        return
    for mask in painted:
        if mask.any():
            _paint(canvas, mask, generator)
    _cover(objects, crowd)
    objects.append(Drawn(name, crowd, crowd=True))


def _rasterise(points: Points, width: int, height: int) -> Mask:
    image = Image.new("1", (width, height))
    ImageDraw.Draw(image).polygon([(float(x), float(y)) for x, y in points], fill=1)
    return np.array(image, dtype=np.bool_)


def _hides_too_much(mask: Mask, objects: list[Drawn]) -> bool:
    for drawn in objects:
        covered = (mask & drawn.visible).sum()
        if drawn.crowd and covered:
            return True
        if covered > _MOST_OVERLAP * drawn.visible.sum():
            return True
        # Wholly inside another it would leave a hole, which no COCO polygon can have.
        if covered and not (_grown(mask) & ~drawn.visible).any():
            return True
    return False


def _grown(mask: Mask) -> Mask:
    """Return the mask with the pixels next to it, diagonals included."""
    padded = np.pad(mask, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    grown: Mask = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
    return grown


def _cover(objects: list[Drawn], mask: Mask) -> None:
    """Take the pixels of a new object from those below it."""
    for index, drawn in enumerate(objects):
        objects[index] = Drawn(drawn.name, drawn.visible & ~mask, drawn.crowd)


def _paint(canvas: Canvas, mask: Mask, generator: Generator) -> None:
    canvas[mask] = fill(int(mask.sum()), canvas[mask].mean(axis=0), generator)


def _annotate(objects: list[Drawn]) -> Iterator[dict[str, Any]]:
    """Yield COCO annotations, all but their ids."""
    for drawn in objects:
        encoded = rle.encode(np.asfortranarray(drawn.visible, dtype=np.uint8))
        segmentation: Any = _polygons(drawn.visible)
        if drawn.crowd:
            segmentation = _uncompressed(drawn.visible)
        yield {
            "category_id": CLASSES.index(drawn.name) + 1,
            "iscrowd": int(drawn.crowd),
            "bbox": [float(value) for value in rle.toBbox(encoded)],
            "area": float(rle.area(encoded)),
            "segmentation": segmentation,
        }


def _polygons(mask: Mask) -> list[list[float]]:
    """Return the outlines of a mask as COCO polygons, coordinates in pixels, rounded to 0.01."""
    padded = np.pad(mask, 1).astype(np.float64)
    lines = contourpy.contour_generator(z=padded).lines(0.5)
    # Pixel (0, 0) covers 0 to 1, so its centre is at 0.5; the padding moved everything by one.
    shifted = [np.asarray(line)[:-1] - 0.5 for line in lines]
    return [[round(float(v), 2) for v in line.ravel()] for line in shifted if len(line) >= 3]


def _uncompressed(mask: Mask) -> dict[str, Any]:
    """Return COCO's uncompressed run lengths, column by column, that crowds are stored in."""
    flat = np.concatenate([[0], mask.ravel(order="F").astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
    return {"size": list(mask.shape), "counts": [int(count) for count in counts]}


def outline(name: str, size: float, angle: float) -> Points:
    """Return the outline of a shape.

    Args:
        name: one of CLASSES.
        size: the diameter of the circle around the shape, in pixels.
        angle: rotation in radians.

    Returns:
        Corners of shape (N, 2), x and y in pixels, with the centre at the origin.
    """
    points = _UNIT_OUTLINES[name] * (size / 2)
    cosine, sine = np.cos(angle), np.sin(angle)
    turned: Points = points @ np.array([[cosine, sine], [-sine, cosine]])
    return turned


def _on_circle(radii: Points, angles: Points) -> Points:
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _regular(corners: int) -> Points:
    angles = np.arange(corners) * 2 * np.pi / corners - np.pi / 2
    return _on_circle(np.ones(corners), angles)


def _star() -> Points:
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    return _on_circle(np.where(np.arange(10) % 2 == 0, 1.0, 0.42), angles)


def _cross() -> Points:
    arm, end = 0.3, 0.95
    quarter = np.array([[arm, -arm], [end, -arm], [end, arm]])
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
    parts = [quarter]
    for _ in range(3):
        parts.append(parts[-1] @ turn)
    return np.concatenate(parts)


def _crescent() -> Points:
    outer = np.linspace(0.30 * np.pi, 1.70 * np.pi, 40)
    inner = np.linspace(1.62 * np.pi, 0.38 * np.pi, 40)
    return np.concatenate(
        [
            _on_circle(np.ones(40), outer),
            _on_circle(np.full(40, 0.78), inner) + np.array([0.42, 0.0]),
        ]
    )


_UNIT_OUTLINES: dict[str, Points] = {
    "circle": _regular(48),
    "square": _regular(4),
    "triangle": _regular(3),
    "star": _star(),
    "cross": _cross(),
    "crescent": _crescent(),
}


def background(width: int, height: int, generator: Generator) -> NDArray[np.float64]:
    """Return a textured background: two scales of coloured noise and faint stripes.

    Args:
        width: in pixels.
        height: in pixels.
        generator: where the randomness comes from.

    Returns:
        RGB values 0 to 255 of shape (height, width, 3).
    """
    base = generator.uniform(60, 190)
    tint = base + generator.uniform(-22, 22, size=3)
    canvas = np.broadcast_to(tint, (height, width, 3)).copy()
    for cells, strength in ((5, 22.0), (24, 9.0)):
        canvas += strength * _noise(width, height, cells, generator)
    rows, columns = np.mgrid[0:height, 0:width]
    angle, period = generator.uniform(0, np.pi), generator.uniform(8, 30)
    wave = np.sin((columns * np.cos(angle) + rows * np.sin(angle)) * 2 * np.pi / period)
    canvas += generator.uniform(0, 10) * wave[:, :, None]
    return canvas


def _noise(width: int, height: int, cells: int, generator: Generator) -> NDArray[np.float64]:
    """Return smooth noise of shape (height, width, 3), about -1 to 1."""
    coarse = generator.uniform(-1, 1, size=(cells, cells, 3)).astype(np.float32)
    channels = [
        Image.fromarray(coarse[:, :, channel]).resize((width, height), Image.Resampling.BICUBIC)
        for channel in range(3)
    ]
    return np.stack([np.asarray(channel, dtype=np.float64) for channel in channels], axis=2)


def fill(count: int, behind: NDArray[np.float64], generator: Generator) -> NDArray[np.float64]:
    """Return the pixels of a shape: a colour that stands out from what is behind, with a grain.

    Args:
        count: how many pixels.
        behind: the mean RGB colour behind the shape, shape (3,).
        generator: where the randomness comes from.

    Returns:
        RGB values of shape (count, 3).
    """
    colour = generator.uniform(0, 255, size=3)
    while np.abs(colour - behind).sum() < _LEAST_CONTRAST:
        colour = generator.uniform(0, 255, size=3)
    filled: NDArray[np.float64] = colour + generator.normal(0, 6, size=(count, 1))
    return filled
