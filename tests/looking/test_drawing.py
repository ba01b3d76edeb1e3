"""Drawing: pictures large enough to read, colours that tell truth, prediction and class apart."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageColor

from resnext_det.data.shapes import CLASSES
from resnext_det.looking.drawing import (
    PREDICTION_COLOUR,
    TRUTH_COLOUR,
    LabelledBox,
    class_colour,
    draw_boxes,
    draw_detections,
)


def grey(width: int = 400, height: int = 400) -> Image.Image:
    return Image.new("RGB", (width, height), (90, 90, 90))


def where(picture: Image.Image, colour: str) -> NDArray[np.bool_]:
    """Return the pixels that have exactly a colour, shape (height, width)."""
    same: NDArray[np.bool_] = np.asarray(picture) == np.array(ImageColor.getrgb(colour))
    return np.asarray(same.all(axis=2), dtype=np.bool_)


def test_small_pictures_are_enlarged_and_the_boxes_with_them() -> None:
    drawn = draw_boxes(grey(190, 160), [LabelledBox((40, 60, 80, 50), "", TRUTH_COLOUR)])
    assert drawn.size == (380, 320)
    rows, columns = np.nonzero(where(drawn, TRUTH_COLOUR))
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (80, 120, 240, 220)


def test_large_pictures_keep_their_size_unless_asked() -> None:
    assert draw_boxes(grey(1200, 900), []).size == (1200, 900)
    assert draw_boxes(grey(1200, 900), [], longest_side=480).size == (480, 360)
    assert draw_boxes(grey(100, 2000), [], longest_side=480).size == (24, 480)


def test_the_given_picture_stays_as_it_was() -> None:
    picture = grey()
    draw_boxes(picture, [LabelledBox((10, 10, 50, 50), "star", TRUTH_COLOUR)])
    assert picture.tobytes() == grey().tobytes()


def test_pictures_of_other_modes_become_rgb() -> None:
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        drawn = draw_detections(Image.new(mode, (330, 330)), [(5, 40, 90, 90)], ["star"], [0.5])
        assert drawn.mode == "RGB"


def test_labels_have_a_filled_ground_of_the_boxes_colour() -> None:
    box = (100, 100, 150, 150)
    with_label = draw_boxes(grey(), [LabelledBox(box, "star 0.97", TRUTH_COLOUR)])
    without = draw_boxes(grey(), [LabelledBox(box, "", TRUTH_COLOUR)])
    assert where(with_label, TRUTH_COLOUR)[:98].sum() > 500
    assert where(without, TRUTH_COLOUR)[:98].sum() == 0


def test_labels_of_the_same_place_do_not_hide_each_other() -> None:
    boxes = [
        LabelledBox((100, 100, 150, 150), "star 0.97", TRUTH_COLOUR),
        LabelledBox((100, 100, 150, 150), "star 0.97", PREDICTION_COLOUR),
    ]
    together = draw_boxes(grey(), boxes)
    alone = draw_boxes(grey(), boxes[:1])
    # Above the box stands the first label alone; the second went below its upper edge.
    assert where(together, PREDICTION_COLOUR)[:98].sum() == 0
    assert (where(together, TRUTH_COLOUR)[:98] == where(alone, TRUTH_COLOUR)[:98]).all()
    assert where(together, PREDICTION_COLOUR)[105:].sum() > 500


def test_the_first_box_is_on_top() -> None:
    boxes = [LabelledBox((100, 100, 150, 150), "", colour) for colour in ("#ff0000", "#00ff00")]
    drawn = draw_boxes(grey(), boxes)
    assert where(drawn, "#ff0000").any()
    assert not where(drawn, "#00ff00").any()


def test_crowds_are_dashed() -> None:
    crowd = draw_boxes(
        grey(), [LabelledBox((50, 100, 300, 200), "star", TRUTH_COLOUR, dashed=True)]
    )
    single = draw_boxes(
        grey(), [LabelledBox((50, 100, 300, 200), "star", TRUTH_COLOUR, dashed=False)]
    )
    lower_edge = np.s_[300, 50:351]
    assert where(single, TRUTH_COLOUR)[lower_edge].all()
    assert 0.3 < where(crowd, TRUTH_COLOUR)[lower_edge].mean() < 0.8


@pytest.mark.parametrize(
    "box", [(-50, -50, 2000, 2000), (390, 390, 50, 50), (-80, 20, 10, 10), (20, 20, -9, -5)]
)
def test_boxes_beyond_the_picture_are_drawn_at_its_edge(box: tuple[float, ...]) -> None:
    drawn = draw_boxes(grey(), [LabelledBox(box, "a label that is " * 40, TRUTH_COLOUR)])
    assert where(drawn, TRUTH_COLOUR).any()


def test_all_edges_of_a_box_larger_than_the_picture_are_seen() -> None:
    drawn = where(
        draw_boxes(grey(), [LabelledBox((-50, -50, 900, 900), "", TRUTH_COLOUR)]), TRUTH_COLOUR
    )
    assert all(edge.all() for edge in (drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]))


def test_accents_are_letters() -> None:
    def drawn(label: str) -> bytes:
        return draw_boxes(grey(), [LabelledBox((50, 50, 90, 90), label, TRUTH_COLOUR)]).tobytes()

    assert len({drawn(letter) for letter in ("\u00fc", "\u00e9", "\u0436", "\ufffe")}) == 4


def test_detections_have_the_colours_of_their_classes() -> None:
    drawn = draw_detections(
        grey(), [(20, 60, 80, 80), (200, 60, 80, 80)], ["star", "cross"], [0.6, 0.9]
    )
    for name in ("star", "cross"):
        assert where(drawn, class_colour(name)).sum() > 500


def test_the_surest_detection_is_on_top() -> None:
    box = (100, 100, 150, 150)
    drawn = draw_detections(grey(), [box, box], ["star", "cross"], [0.6, 0.9])
    assert where(drawn, class_colour("cross"))[250].any()
    assert not where(drawn, class_colour("star"))[250].any()


def test_class_colours_are_stable_and_differ() -> None:
    assert class_colour("star") == "#7840e7"
    assert len({class_colour(name) for name in CLASSES}) == len(CLASSES)


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        draw_detections(grey(), [(1, 2, 3, 4)], ["star"], [])
    with pytest.raises(ValueError, match="zip"):
        draw_detections(grey(), [(1, 2, 3, 4)], ["star", "cross"], [0.5])
