"""The template's notation, widths and costs, against the paper's tables and torchvision."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnext_det.errors import ConfigError
from resnext_det.modeling.template import Cost, Template, blocks_per_stage, check_size

# Depth and template; parameters and thousand millions of multiply-adds of the convolutions, as
# counted in torchvision's ResNet at 224 x 224.
PAPER_TEMPLATES = [
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
    (152, "32x4d", 59_951_400, 11.707),
    (200, "1x64d", 64_673_832, 15.005),
]

# Table 2: the width of the group convolution, and Eq. 4 by hand.
TABLE_2 = [
    ("1x64d", 64, 256 * 64 + 3 * 3 * 64 * 64 + 256 * 64),
    ("2x40d", 80, 69_760),
    ("4x24d", 96, 69_888),
    ("8x14d", 112, 71_456),
    ("32x4d", 128, 70_144),
]


@given(cardinality=st.integers(1, 9999), width=st.integers(1, 9999))
def test_notation_round_trip(cardinality: int, width: int) -> None:
    template = Template(f"{cardinality}x{width}d")
    assert (template.cardinality, template.width) == (cardinality, width)
    assert template == Template.of(cardinality, width)
    assert hash(template) == hash(Template.of(cardinality, width))


@given(notation=st.text() | st.from_regex(r"\d*x\d*d?"))
def test_reads_or_refuses_any_text(notation: str) -> None:
    try:
        template = Template(notation)
    except ConfigError:
        return
    assert f"{template.cardinality}x{template.width}d" == notation


@pytest.mark.parametrize(
    ("notation", "example"),
    [
        *[("32x4", "32x4d"), ("32 X 4d\n", "32x4d"), ("48\u00d72", "48x2d"), ("", "32x4d")],
        *[("0x4d", "32x4d"), ("32x04d", "32x4d"), ("3\u0662x4d", "3x4d"), ("1_0x4d", "1x4d")],
        *[("10000x4d", "1000x4d"), ("1" * 5000 + "x4d", "32x4d")],
    ],
)
def test_refuses_other_notations(notation: str, example: str) -> None:
    with pytest.raises(ConfigError, match=rf"CxDd.*write it like {example}"):
        Template(notation)


@pytest.mark.parametrize(
    ("groups", "width"), [(0, 4), (32, -4), (32, 10_000), ("32", 4), (1, True)]
)
def test_refuses_impossible_numbers(groups: int, width: int) -> None:
    with pytest.raises(ConfigError, match=r"MODEL\.RESNETS\.(NUM_GROUPS|WIDTH_PER_GROUP) is"):
        Template.of(groups, width)


@pytest.mark.parametrize(("notation", "channels", "parameters"), TABLE_2)
def test_blocks_of_table_2(notation: str, channels: int, parameters: int) -> None:
    template = Template(notation)
    widths = [template.bottleneck_channels(stage) for stage in (2, 3, 4, 5)]
    assert widths == [channels, 2 * channels, 4 * channels, 8 * channels]
    cost = template.block()
    assert cost == Cost(parameters, parameters * 56 * 56)
    assert round(cost.parameters, -4) == 70_000
    assert f"{cost.multiply_adds / 1e9:.2f}" == "0.22"
    assert Template.matching(template.cardinality, "1x64d") == template


def test_block_on_an_odd_image() -> None:
    """7x7 and 3x3 with stride 2 and padding 3 and 1: 225 -> 113 -> 57, 319 -> 160 -> 80."""
    assert Template("32x4d").block(225, 319) == Cost(70_144, 70_144 * 57 * 80)


@pytest.mark.parametrize(("depth", "notation", "parameters", "convolutions"), PAPER_TEMPLATES)
def test_networks(depth: int, notation: str, parameters: int, convolutions: float) -> None:
    cost = Template(notation).network(depth)
    assert cost.parameters == parameters
    classifier = 2048 * 1000
    assert f"{(cost.multiply_adds - classifier) / 1e9:.3f}" == f"{convolutions:.3f}"


@given(cardinality=st.integers(1, 300), like=st.tuples(st.integers(1, 64), st.integers(1, 128)))
def test_matching_is_the_nearest_width(cardinality: int, like: tuple[int, int]) -> None:
    budget = like[0] * (2 * 256 * like[1] + 9 * like[1] ** 2)
    costs = [cardinality * (2 * 256 * d + 9 * d**2) for d in range(1, 4097)]
    try:
        found = Template.matching(cardinality, Template.of(*like))
    except ConfigError:
        assert costs[0] > budget
        return
    distances = [abs(cost - budget) for cost in costs]
    assert distances[found.width - 1] == min(distances)
    assert found.cardinality == cardinality


def test_refuses_a_cardinality_that_cannot_match() -> None:
    with pytest.raises(ConfigError, match="largest cardinality that fits is 133"):
        Template.matching(134, "1x64d")
    assert Template.matching(133, "1x64d") == Template("133x1d")


@pytest.mark.parametrize("depth", [26, 50, 101, 152, 200])
def test_depth_counts_three_layers_a_block_stem_and_classifier(depth: int) -> None:
    assert 3 * sum(blocks_per_stage(depth)) + 2 == depth


@pytest.mark.parametrize("depth", [18, 34, 51, 0, -50, "50"])
def test_refuses_other_depths(depth: int) -> None:
    with pytest.raises(ConfigError, match=r"DEPTH is .*26, 50, 101, 152, 200") as caught:
        blocks_per_stage(depth)
    assert ("build_resnet_backbone" in str(caught.value)) == (depth in (18, 34))


@pytest.mark.parametrize("size", [(0, 224), (224, -1), (31, 32), (32, 65_537)])
def test_refuses_impossible_sizes(size: tuple[int, int]) -> None:
    template = Template("32x4d")
    for refused in (check_size, template.block, lambda *size: template.network(50, *size)):
        with pytest.raises(ConfigError, match=f"image of {size[0]} x {size[1]} pixels"):
            refused(*size)
