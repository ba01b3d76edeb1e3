"""Drawing: what is drawn, where, in which colour, on pictures of any size."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from resnext_det.visualize.drawing import Colour, Drawn, class_colour, draw_objects


def grey(width: int = 400, height: int = 400) -> Image.Image:
    return Image.new("RGB", (width, height), (90, 90, 90))


def where(picture: Image.Image, colour: Colour) -> NDArray[np.bool_]:
    """Return the pixels that have exactly a colour, shape (height, width)."""
    return np.asarray((np.asarray(picture) == np.array(colour)).all(axis=2), np.bool_)


def test_the_edges_of_a_box_are_where_it_is() -> None:
    drawn = draw_objects(grey(), [Drawn((100, 120, 150, 60), "", 0)])
    rows, columns = np.nonzero(where(drawn, class_colour(0)))
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (100, 120, 250, 180)
    assert drawn.size == (400, 400)


def test_the_given_picture_stays_as_it_was() -> None:
    picture = grey()
    draw_objects(picture, [Drawn((10, 10, 50, 50), "star", 0, np.ones((400, 400), bool))])
    assert picture.tobytes() == grey().tobytes()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
@pytest.mark.parametrize("size", [(330, 330), (1, 2000), (3, 1)])
def test_pictures_of_other_modes_and_sizes(mode: str, size: tuple[int, int]) -> None:
    for objects in ([], [Drawn((5, 40, 90, 90), "star", 1)]):
        drawn = draw_objects(Image.new(mode, size), objects)
        assert (drawn.mode, drawn.size) == ("RGB", size)


def test_labels_have_a_filled_ground_of_the_boxes_colour() -> None:
    box = (100, 100, 150, 150)
    with_label = draw_objects(grey(), [Drawn(box, "star 0.97", 0)])
    without = draw_objects(grey(), [Drawn(box, "", 0)])
    assert where(with_label, class_colour(0)).sum() > where(without, class_colour(0)).sum() + 300


def test_the_first_object_is_on_top() -> None:
    box = (100, 100, 150, 150)
    drawn = draw_objects(grey(), [Drawn(box, "", 0), Drawn(box, "", 1)])
    assert where(drawn, class_colour(0)).any()
    assert not where(drawn, class_colour(1)).any()


@pytest.mark.parametrize(
    "box", [(-50, -50, 2000, 2000), (390, 390, 50, 50), (-80, 20, 10, 10), (20, 20, -9, -5)]
)
def test_boxes_beyond_the_picture_are_drawn_at_its_edge(box: tuple[float, ...]) -> None:
    drawn = draw_objects(grey(), [Drawn(box, "a label\nthat is " * 400, 0)])
    assert where(drawn, class_colour(0)).any()


def test_all_edges_of_a_box_larger_than_the_picture_are_seen() -> None:
    drawn = where(draw_objects(grey(), [Drawn((-50, -50, 900, 900), "", 0)]), class_colour(0))
    assert all(edge.all() for edge in (drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]))


def test_accents_are_letters() -> None:
    def drawn(label: str) -> bytes:
        return draw_objects(grey(), [Drawn((50, 50, 90, 90), label, 0)]).tobytes()

    assert len({drawn(letter) for letter in ("\u00fc", "\u00e9", "\u0436", "\ufffe")}) == 4


def test_a_mask_shines_through_where_it_is() -> None:
    mask = np.zeros((400, 400), bool)
    mask[200:300, 50:100] = True
    objects = [Drawn((300, 10, 50, 50), "", 3), Drawn((40, 190, 80, 120), "", 0, mask)]
    changed = np.asarray(draw_objects(grey(), objects)).astype(int) - 90
    expected = (0.4 * (np.array(class_colour(0)) - 90)).round()
    assert np.allclose(changed[mask], expected, atol=1)
    mask[:] = False
    mask[195:305, 45:115] = True  # within the box
    outside = np.ones((400, 400), bool)
    outside[:80, 290:] = outside[185:315, 35:125] = False
    assert (changed[outside] == 0).all()


def test_keypoints_are_drawn_and_connected_where_they_are_seen() -> None:
    points = np.array([[100, 100, 1], [200, 100, 2], [300, 300, 0]], np.float32)
    objects = [Drawn((0, 0, 399, 399), "", 0, keypoints=points)]
    plain = np.asarray(draw_objects(grey(), objects))
    connected = np.asarray(draw_objects(grey(), objects, [(0, 1), (1, 2)]))
    for found in (plain, connected):
        below = [tuple(found[y + 2, x]) for x, y, _ in points.astype(int)]  # below the lines
        assert [each == class_colour(0) for each in below] == [True, True, False]
    assert (plain[100, 150] == 90).all()
    assert (connected[100, 150] != 90).any()  # a line from the first to the second
    assert (connected[200, 250] == 90).all()  # and none to the third


def test_classes_have_colours_of_their_own() -> None:
    assert len({class_colour(category) for category in range(20)}) == 20
    assert class_colour(1000) == class_colour(1000 % 74)
