"""Drawing: what appears, where, in which colour, on images of any size."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from resnext_det.prediction import Prediction
from resnext_det.visualize.draw import (
    Drawn,
    class_colour,
    draw_objects,
    draw_prediction,
    save_picture,
)

RED, BLUE = (250, 20, 10), (10, 20, 250)


def grey(width: int = 400, height: int = 400) -> Image.Image:
    return Image.new("RGB", (width, height), (90, 90, 90))


def pixels_of(picture: Image.Image, colour: tuple[int, int, int]) -> NDArray[np.bool_]:
    return np.asarray((np.asarray(picture) == np.array(colour)).all(axis=2), np.bool_)


def test_box_edges_and_filled_label() -> None:
    picture, box = grey(), (100, 120, 150, 60)
    plain = draw_objects(picture, [Drawn(box, "", RED)])
    rows, columns = np.nonzero(pixels_of(plain, RED))
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (100, 120, 250, 180)
    labelled = draw_objects(picture, [Drawn(box, "star 0.97", RED)])
    assert pixels_of(labelled, RED).sum() > pixels_of(plain, RED).sum() + 300
    assert picture.tobytes() == grey().tobytes()  # unchanged


def test_first_object_is_on_top() -> None:
    box = (100, 100, 150, 150)
    drawn = draw_objects(grey(), [Drawn(box, "", RED), Drawn(box, "", BLUE)])
    assert pixels_of(drawn, RED).any() and not pixels_of(drawn, BLUE).any()


@pytest.mark.parametrize("mode", ["L", "P", "CMYK"])
@pytest.mark.parametrize("size", [(330, 330), (1, 2000), (3, 1)])
def test_any_mode_and_size(mode: str, size: tuple[int, int]) -> None:
    for objects in ([], [Drawn((5, 40, 90, 90), "star", RED)]):
        drawn = draw_objects(Image.new(mode, size), objects)
        assert (drawn.mode, drawn.size) == ("RGB", size)


@pytest.mark.parametrize("box", [(-50, -50, 900, 900), (390, 390, 50, 50), (20, 20, -9, -5)])
def test_boxes_beyond_the_image_show_at_its_edge(box: tuple[float, ...]) -> None:
    label = "a label\nof several lines " * 400
    assert pixels_of(draw_objects(grey(), [Drawn(box, label, RED)]), RED).any()
    if box[2] == 900:
        drawn = pixels_of(draw_objects(grey(), [Drawn(box, "", RED)]), RED)
        assert all(edge.all() for edge in (drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]))


def test_label_font_has_accents_and_cyrillic() -> None:
    letters = ("\u00fc", "\u00e9", "\u0436", "\ufffe")
    drawn = {draw_objects(grey(), [Drawn((50, 50, 90, 90), x, RED)]).tobytes() for x in letters}
    assert len(drawn) == 4


def test_mask_blends_with_its_pixels_only() -> None:
    mask = np.zeros((400, 400), bool)
    mask[200:300, 50:100] = True
    drawn = draw_objects(grey(), [Drawn((40, 190, 80, 120), "", RED, mask)])
    changed = np.asarray(drawn).astype(int) - 90
    assert np.allclose(changed[mask], (0.4 * (np.array(RED) - 90)).round(), atol=1)
    outside = np.ones((400, 400), bool)
    outside[185:315, 35:125] = False
    assert (changed[outside] == 0).all()


def test_stuff_is_blended_and_named() -> None:
    sky = np.zeros((400, 400), bool)
    sky[:200] = True
    nothing = np.empty(0, np.float32)
    found = Prediction(nothing.reshape(0, 4), nothing, np.empty(0, np.int64), (), 400, 400)
    halves = np.asarray(
        draw_prediction(grey(), dataclasses.replace(found, stuff={"sky": sky, "sea": ~sky}))
    ).reshape(2, 200, 400, 3)
    plain = halves[:, 0, 0]
    assert len({(90, 90, 90), *map(tuple, plain.tolist())}) == 3
    for half, colour in zip(halves, plain):
        assert 20 < (half != colour).any(axis=2).sum() < 1000  # the name
    alone = draw_prediction(grey(), dataclasses.replace(found, stuff={"sea": ~sky}))
    assert np.array_equal(np.asarray(alone)[200:], halves[1])  # the colour is that of the name


def test_visible_keypoints_are_drawn_and_connected() -> None:
    points = np.array([[100, 100, 1], [200, 100, 2], [300, 300, 0.01]], np.float32)
    objects = [Drawn((0, 0, 399, 399), "", RED, keypoints=points)]
    plain = np.asarray(draw_objects(grey(), objects))
    connected = np.asarray(draw_objects(grey(), objects, [(0, 1), (1, 2)]))
    for found in (plain, connected):
        below_line = [tuple(found[y + 2, x]) for x, y, _ in points.astype(int)]
        assert [each == RED for each in below_line] == [True, True, False]
    assert (plain[100, 150] == 90).all() and (connected[100, 150] != 90).any()
    assert (connected[200, 250] == 90).all()  # the third keypoint is invisible


def test_class_colours_are_distinct() -> None:
    assert len({class_colour(category) for category in range(20)}) == 20
    assert class_colour(1000) == class_colour(1000 % 74)


def test_suffix_selects_the_format(tmp_path: Path) -> None:
    for name, form in (("a.png", "PNG"), ("a.jpg", "JPEG")):
        save_picture(grey(), tmp_path / name)
        with Image.open(tmp_path / name) as saved:
            assert (saved.format, saved.size) == (form, (400, 400))
