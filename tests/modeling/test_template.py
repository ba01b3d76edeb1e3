"""The template's notation and widths, against the tables of the ResNeXt paper (1611.05431)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resnext_det.errors import ConfigError, ResNeXtError
from resnext_det.modeling.template import Template, blocks_per_stage

SIZES = st.integers(min_value=1, max_value=4096)


@settings(database=None, deadline=None)
@given(cardinality=SIZES, width=SIZES)
def test_every_cardinality_and_width_survives_the_notation(cardinality: int, width: int) -> None:
    written = str(Template.of(cardinality, width))
    read = Template(written)
    assert (read.cardinality, read.width) == (cardinality, width)
    assert written == f"{cardinality}x{width}d"
    assert read == Template.of(cardinality, width)
    assert hash(read) == hash(Template.of(cardinality, width))


@pytest.mark.parametrize(
    ("notation", "widths"),
    [
        ("1x64d", [64, 128, 256, 512]),
        ("32x4d", [128, 256, 512, 1024]),
    ],
)
def test_widths_of_table_1(notation: str, widths: list[int]) -> None:
    template = Template(notation)
    assert [template.bottleneck_channels(stage) for stage in (2, 3, 4, 5)] == widths


@pytest.mark.parametrize(
    ("notation", "width"),
    [("1x64d", 64), ("2x40d", 80), ("4x24d", 96), ("8x14d", 112), ("32x4d", 128)],
)
def test_width_of_the_group_convolution_of_table_2(notation: str, width: int) -> None:
    assert Template(notation).bottleneck_channels(2) == width


@pytest.mark.parametrize("stage", [-1, 0, 1, 6])
def test_a_stage_that_is_none_is_refused(stage: int) -> None:
    with pytest.raises(ConfigError, match=rf"stage {stage}\b"):
        Template("32x4d").bottleneck_channels(stage)


@pytest.mark.parametrize(
    "notation",
    [
        *["", " ", "x", "d", "32", "32x", "32x4", "x4d", "4d", "32xd", "32x4d32x4d"],
        *["0x4d", "32x0d", "032x4d", "32x04d", "-1x4d", "32x-4d", "+32x4d", "3.2x4d", "1_0x4d"],
        *["32x4D", "32X4d", "32\u00d74d", "32x4d ", " 32x4d", "32 x 4d", "32x4d\n", "32x4d\0"],
    ],
)
def test_what_is_no_notation_is_refused_and_quoted(notation: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Template(notation)
    assert repr(notation) in str(caught.value)
    assert "CxDd" in str(caught.value)
    assert isinstance(caught.value, ResNeXtError)


@pytest.mark.parametrize("notation", ["3\u0662x4d", "32x4\u0665d", "3\uff12x4d"])
def test_digits_of_other_scripts_are_refused(notation: str) -> None:
    """Such a template would read as 32x4d, yet differ from it."""
    with pytest.raises(ConfigError, match="cannot be read"):
        Template(notation)


@pytest.mark.parametrize("notation", ["4097x4d", "32x4097d", "99999999999999999999x4d"])
def test_numbers_nobody_can_build_are_refused_and_quoted(notation: str) -> None:
    with pytest.raises(ConfigError, match=notation):
        Template(notation)


def test_a_number_too_long_for_int_is_refused_like_any_other() -> None:
    """int() itself raises ValueError past 4300 digits."""
    with pytest.raises(ConfigError):
        Template("1" * 5000 + "x4d")


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [(50, (3, 4, 6, 3)), (101, (3, 4, 23, 3)), (152, (3, 8, 36, 3)), (200, (3, 24, 36, 3))],
)
def test_published_depths(depth: int, blocks: tuple[int, ...]) -> None:
    """Blocks as published; three layers each, with the stem and the classifier, make the depth."""
    assert blocks_per_stage(depth) == blocks
    assert 3 * sum(blocks_per_stage(depth)) + 2 == depth


def test_depth_26_adds_up() -> None:
    assert 3 * sum(blocks_per_stage(26)) + 2 == 26


@pytest.mark.parametrize("depth", [18, 34, 51, 0, -50, 10**30])
def test_another_depth_is_refused_with_the_allowed_ones(depth: int) -> None:
    with pytest.raises(ConfigError) as caught:
        blocks_per_stage(depth)
    message = str(caught.value)
    assert f"MODEL.RESNETS.DEPTH is {depth};" in message
    assert "26, 50, 101, 152, 200" in message


@pytest.mark.parametrize("depth", [18, 34])
def test_the_two_layer_depths_are_told_where_they_are_built(depth: int) -> None:
    with pytest.raises(ConfigError, match=r"build_resnet_backbone"):
        blocks_per_stage(depth)
