"""The template's notation, widths and costs, against the tables of the paper (1611.05431)."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from resnext_det.errors import ConfigError, ResNeXtError
from resnext_det.modeling.template import Cost, Template, blocks_per_stage, check_size

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


@pytest.mark.parametrize(
    ("notation", "meant"),
    [
        *[("32x4", "32x4d"), ("32 x 4d", "32x4d"), ("32x4D", "32x4d"), ("32X4d", "32x4d")],
        *[("32\u00d74d", "32x4d"), (" 32x4d\n", "32x4d"), ("resnext50_32x4d", "32x4d")],
        *[("48x2", "48x2d"), ("032x04d", "32x4d"), ("0x4d", "1x4d"), ("32x0d", "32x1d")],
        *[("9999x4", "4096x4d"), ("3.2x4d", "32x4d"), ("32x4.5d", "32x4d"), ("32-4d", "32x4d")],
        *[("x32", "32x4d or 32x8d"), ("32", "32x4d or 32x8d"), ("64d", "1x64d or 2x64d")],
    ],
)
def test_what_was_meant_is_asked(notation: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Template(notation)
    assert f"did you mean {meant}?" in str(caught.value)


@pytest.mark.parametrize("notation", ["", "resnext", "16", "d", "\x00"])
def test_the_hopeless_is_told_what_there_is(notation: str) -> None:
    with pytest.raises(ConfigError, match="for example, 32x4d, 64x4d, 1x64d"):
        Template(notation)


@settings(database=None, deadline=None)
@given(notation=st.text())
@example(notation="9" * 100_000)
@example(notation="0" * 100_000 + "x")
def test_any_text_is_read_or_refused(notation: str) -> None:
    try:
        template = Template(notation)
    except ConfigError:
        return
    assert Template.of(template.cardinality, template.width).notation == notation


@pytest.mark.parametrize(
    ("notation", "nearest"), [("4097x4d", "4096x4d"), ("32x99999999999d", "32x4096d")]
)
def test_numbers_nobody_can_build_are_told_the_limit(notation: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"nearest: {nearest}\)"):
        Template(notation)


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


@pytest.mark.parametrize(
    ("depth", "nearest"),
    [(18, "26"), (34, "26 or 50"), (51, "50 or 101"), (300, "200"), (-50, "26")],
)
def test_another_depth_is_refused_with_the_nearest(depth: int, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"nearest: {nearest}\)"):
        blocks_per_stage(depth)


@pytest.mark.parametrize("depth", [18, 34])
def test_the_two_layer_depths_are_told_where_they_are_built(depth: int) -> None:
    with pytest.raises(ConfigError, match=r"build_resnet_backbone"):
        blocks_per_stage(depth)


# Eq. 4 by hand; 1x64d to 32x4d are Table 2.
BLOCKS = {
    "1x64d": 256 * 64 + 3 * 3 * 64 * 64 + 256 * 64,
    "2x40d": 69_760,
    "4x24d": 69_888,
    "8x14d": 71_456,
    "32x4d": 70_144,
    "1x100d": 141_200,
    "2x64d": 139_264,
    "64x4d": 140_288,
    "32x8d": 149_504,
}

# Depth and template; parameters; multiply-adds of the convolutions in thousand millions: counted
# in torchvision's ResNet, at 224 x 224.
NETWORKS = [
    (50, "1x64d", 25_557_032, 4.087),
    (50, "2x40d", 25_425_000, 4.122),
    (50, "4x24d", 25_292_968, 4.158),
    (50, "8x14d", 25_603_016, 4.265),
    (50, "32x4d", 25_028_904, 4.228),
    (101, "1x64d", 44_549_160, 7.799),
    (101, "2x40d", 44_456_296, 7.842),
    (101, "4x24d", 44_363_432, 7.884),
    (101, "8x14d", 45_104_328, 8.075),
    (101, "32x4d", 44_177_704, 7.968),
    (101, "1x100d", 85_611_336, 15.271),
    (101, "2x64d", 84_198_184, 15.121),
    (101, "64x4d", 83_455_272, 15.458),
    (101, "32x8d", 88_791_336, 16.412),
    (200, "1x64d", 64_673_832, 15.005),
    (152, "1x64d", 60_192_808, 11.512),
    (152, "32x4d", 59_951_400, 11.707),
    (152, "32x8d", 122_372_392, 24.382),
]


@pytest.mark.parametrize(("notation", "parameters"), BLOCKS.items())
def test_cost_of_a_block_is_equation_4(notation: str, parameters: int) -> None:
    assert Template(notation).block() == Cost(parameters, parameters * 56 * 56)


def test_cost_of_a_block_of_table_2() -> None:
    """Some 70k parameters and 0.22 thousand million multiply-adds, whatever the cardinality."""
    for notation in ("1x64d", "2x40d", "4x24d", "8x14d", "32x4d"):
        cost = Template(notation).block()
        assert round(cost.parameters, -4) == 70_000
        assert f"{cost.multiply_adds / 1e9:.2f}" == "0.22"


def test_cost_of_a_block_where_the_image_is_odd() -> None:
    """7x7 and 3x3 with stride 2 and padding 3 and 1: 225 -> 113 -> 57, 319 -> 160 -> 80."""
    assert Template("32x4d").block(225, 319) == Cost(70_144, 70_144 * 57 * 80)


@pytest.mark.parametrize(("depth", "notation", "parameters", "convolutions"), NETWORKS)
def test_cost_of_networks(depth: int, notation: str, parameters: int, convolutions: float) -> None:
    cost = Template(notation).network(depth)
    assert cost.parameters == parameters
    assert f"{(cost.multiply_adds - 2_048_000) / 1e9:.3f}" == f"{convolutions:.3f}"


@pytest.mark.parametrize(
    ("height", "width"), [(0, 224), (224, -1), (31, 32), (32, 65_537), (10**30, 10**30)]
)
def test_sizes_of_no_image_are_refused(height: int, width: int) -> None:
    for refused in (
        lambda: check_size(height, width),
        lambda: Template("32x4d").block(height, width),
        lambda: Template("32x4d").network(50, height, width),
    ):
        with pytest.raises(ConfigError, match=f"image of {height} x {width} pixels"):
            refused()


def test_a_refused_size_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match="nearest: 32 x 65536"):
        check_size(5, 10**9)


@pytest.mark.parametrize(("cardinality", "width"), [(1, 64), (2, 40), (4, 24), (8, 14), (32, 4)])
def test_widths_of_table_2_preserve_the_complexity(cardinality: int, width: int) -> None:
    assert Template.matching(cardinality, "1x64d") == Template.of(cardinality, width)


@settings(database=None, deadline=None, max_examples=60)
@given(cardinality=st.integers(1, 300), like=st.tuples(st.integers(1, 64), st.integers(1, 128)))
def test_no_other_width_comes_nearer(cardinality: int, like: tuple[int, int]) -> None:
    budget = like[0] * (2 * 256 * like[1] + 9 * like[1] ** 2)
    costs = [cardinality * (2 * 256 * d + 9 * d**2) for d in range(1, 4097)]
    try:
        found = Template.matching(cardinality, Template.of(*like))
    except ConfigError:
        assert costs[0] > budget
        return
    assert costs[0] <= budget
    off = [abs(cost - budget) for cost in costs]
    assert off[found.width - 1] == min(off)
    assert found.cardinality == cardinality


def test_a_cardinality_that_costs_too_much_is_told_the_largest_that_fits() -> None:
    with pytest.raises(ConfigError, match="largest cardinality that fits: 133"):
        Template.matching(134, "1x64d")
    assert Template.matching(133, "1x64d") == Template("133x1d")


@pytest.mark.parametrize("cardinality", [0, -1, 4097])
def test_a_cardinality_that_is_none_is_refused(cardinality: int) -> None:
    for refused in (
        lambda: Template.matching(cardinality, "1x64d"),
        lambda: Template.from_channels(cardinality, 128),
    ):
        with pytest.raises(ConfigError, match=f"cardinality is {cardinality}; it must be 1 to"):
            refused()


def test_a_width_past_the_limit_is_refused() -> None:
    assert Template.matching(4096, "4096x4096d") == Template("4096x4096d")
    with pytest.raises(ConfigError, match="nearest: 1x4096d"):
        Template.matching(1, "4096x4096d")


@settings(database=None, deadline=None)
@given(cardinality=st.integers(1, 4096), width=st.integers(1, 4096))
def test_template_from_the_channels_of_its_3x3(cardinality: int, width: int) -> None:
    template = Template.from_channels(cardinality, cardinality * width)
    assert template == Template.of(cardinality, width)
    assert template.bottleneck_channels(2) == cardinality * width


@pytest.mark.parametrize(
    ("channels", "nearest"),
    [
        (130, "128 = 32x4d or 160 = 32x5d"),
        (33, "32 = 32x1d or 64 = 32x2d"),
        *[(31, "32 = 32x1d"), (0, "32 = 32x1d"), (-32, "32 = 32x1d")],
    ],
)
def test_channels_that_the_groups_do_not_divide(channels: int, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Template.from_channels(32, channels)
    assert f"{channels} channels cannot be divided into 32 groups" in str(caught.value)
    assert f"(nearest: {nearest})" in str(caught.value)
