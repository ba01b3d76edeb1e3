"""Outlines of the toy shapes and the textures behind them; all randomness is the caller's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Points = NDArray[np.float64]
Generator = np.random.Generator

# Summed over red, green and blue; any grey background has colours at least 192 away.
_LEAST_CONTRAST = 170.0

CLASSES = ("circle", "square", "triangle", "star", "cross", "crescent")


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
