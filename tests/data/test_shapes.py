"""The outlines against plane geometry, the colours against the contrast they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from resnext_det.data.toy import CLASSES, background, fill, outline

# Areas for a circle of radius 1 around the shape.
AREAS = {
    "circle": np.pi,
    "square": 2.0,
    "triangle": 3 * np.sqrt(3) / 4,
    "star": 5 * 0.42 * np.sin(np.pi / 5),
    "cross": 0.6**2 + 4 * 0.65 * 0.6,
}


def shoelace(points: NDArray[np.float64]) -> float:
    x, y = points.T
    return 0.5 * abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1)))


@settings(database=None, deadline=None, max_examples=50)
@given(
    name=st.sampled_from(CLASSES),
    size=st.floats(min_value=8, max_value=300),
    angle=st.floats(min_value=-7, max_value=7),
)
def test_an_outline_fills_its_circle_at_any_angle(name: str, size: float, angle: float) -> None:
    points = outline(name, size, angle)
    radii = np.hypot(*points.T)
    assert radii.max() == pytest.approx(size / 2, rel=0.02)
    assert shoelace(points) == pytest.approx(shoelace(outline(name, size, 0.0)))


@pytest.mark.parametrize("name", AREAS)
def test_an_outline_has_the_area_of_its_figure(name: str) -> None:
    assert shoelace(outline(name, 20.0, 0.3)) == pytest.approx(AREAS[name] * 100, rel=0.005)


@pytest.mark.parametrize("name", CLASSES)
def test_an_outline_does_not_cross_itself(name: str) -> None:
    """What PIL fills and what the corners enclose differ where an outline crosses itself."""
    points = outline(name, 380.0, 0.2)
    image = Image.new("1", (400, 400))
    ImageDraw.Draw(image).polygon([(float(x), float(y)) for x, y in points + 200], fill=1)
    assert np.asarray(image).sum() == pytest.approx(shoelace(points), rel=0.03)


@pytest.mark.parametrize("name", CLASSES)
def test_the_angle_turns_every_corner_alike(name: str) -> None:
    still = outline(name, 10.0, 0.0) @ np.array([1, 1j])
    turned = outline(name, 10.0, 0.4) @ np.array([1, 1j])
    np.testing.assert_allclose(turned, still * np.exp(0.4j), atol=1e-9)


def test_no_two_classes_look_alike() -> None:
    areas = [shoelace(outline(name, 2.0, 0.0)) for name in CLASSES]
    corners = [len(outline(name, 2.0, 0.0)) for name in CLASSES]
    assert len(set(zip(np.round(areas, 2), corners, strict=True))) == len(CLASSES)


@settings(database=None, deadline=None, max_examples=40)
@given(
    behind=st.tuples(*[st.floats(min_value=0, max_value=255)] * 3),
    seed=st.integers(min_value=0, max_value=2**32),
)
def test_a_shape_stands_out_from_any_background(
    behind: tuple[float, float, float], seed: int
) -> None:
    pixels = fill(4000, np.array(behind), np.random.default_rng(seed))
    assert pixels.shape == (4000, 3)
    # 4000 pixels of grain 6 average to within 1 of the colour.
    assert np.abs(pixels.mean(axis=0) - behind).sum() > 170 - 3
    assert 4 < pixels[:, 0].std() < 8


@pytest.mark.parametrize("seed", range(8))
def test_a_background_is_a_texture_in_range(seed: int) -> None:
    canvas = background(90, 60, np.random.default_rng(seed))
    assert canvas.shape == (60, 90, 3)
    assert canvas.std(axis=(0, 1)).min() > 2
    assert canvas.min() >= 0
    assert canvas.max() <= 255


def test_the_generator_decides_everything() -> None:
    first, again = (background(40, 30, np.random.default_rng(3)) for _ in range(2))
    other = background(40, 30, np.random.default_rng(4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
