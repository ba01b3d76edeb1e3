"""Counts of built networks, against forward hooks, closed forms, torchvision and the paper."""

from __future__ import annotations

import logging
from collections.abc import Callable
from subprocess import CompletedProcess
from typing import Any

import pytest
import timm
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.modeling import ROI_BOX_HEAD_REGISTRY, build_model
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from resnext_det import ResNeXt, Template, load_config
from resnext_det.errors import ConfigError
from resnext_det.modeling.complexity import Part, detector_complexity, network_complexity
from resnext_det.modeling.paper import PUBLISHED, Published
from resnext_det.modeling.template import BLOCKS_PER_STAGE, Cost

Tool = Callable[..., "CompletedProcess[str]"]

FASTER_RCNN = "faster_rcnn_X_50_32x4d_FPN_paper"
C4 = [
    *["MODEL.BACKBONE.NAME", "build_resnext_backbone"],
    *["MODEL.RESNETS.OUT_FEATURES", '["res4"]', "MODEL.RPN.IN_FEATURES", '["res4"]'],
    *["MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", '["res4"]'],
    *["MODEL.ANCHOR_GENERATOR.SIZES", "[[32,64,128,256,512]]"],
    *["MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "14"],
]


def hooked(network: nn.Module, *shape: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return multiply-adds and activations of every layer that multiplies, for one image.

    On the meta device, where only shapes are computed, by the definition of the layers and not by
    what fvcore makes of them.
    """
    multiply_adds, activations = {}, {}

    def hook(name: str) -> Callable[..., None]:
        def count(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if isinstance(layer, nn.Conv2d):
                each = layer.kernel_size[0] * layer.kernel_size[1]
                each *= layer.in_channels // layer.groups
            else:
                each = layer.in_features
            multiply_adds[name], activations[name] = output.numel() * each, output.numel()

        return count

    layers = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers]
    network.eval()(torch.zeros(shape, device="meta"))
    for handle in handles:
        handle.remove()
    return multiply_adds, activations


def parameters_of(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def torchvisions(depth: int, template: Template) -> ResNet:
    with torch.device("meta"):
        return ResNet(
            Bottleneck,
            list(BLOCKS_PER_STAGE[depth]),
            groups=template.cardinality,
            width_per_group=template.width,
        )


def parts_of(cfg: CfgNode, *size: int) -> dict[str, Part]:
    return {part.name: part for part in detector_complexity(cfg, *size).parts}


NETWORKS = sorted({(p.depth, p.template) for p in PUBLISHED if p.depth})


@pytest.mark.parametrize(("depth", "notation"), NETWORKS)
def test_formula_and_built_network_cost_what_torchvisions_does(depth: int, notation: str) -> None:
    theirs = torchvisions(depth, Template(notation))
    multiply_adds, activations = hooked(theirs, 1, 3, 224, 224)
    counted = network_complexity(depth, notation)
    assert Template(notation).network(depth) == Cost(
        parameters_of(theirs), sum(multiply_adds.values())
    )
    assert counted.total == Part(
        "total",
        parameters_of(theirs),
        sum(multiply_adds.values()),
        sum(activations.values()),
    )
    names = {"stem": "conv1", "linear": "fc"} | {f"res{n}": f"layer{n - 1}." for n in range(2, 6)}
    assert [part.name for part in counted.parts] == [
        "stem",
        "res2",
        "res3",
        "res4",
        "res5",
        "linear",
    ]
    for part in counted.parts:
        inside = [name for name in multiply_adds if name.startswith(names[part.name])]
        assert part.multiply_adds == sum(multiply_adds[name] for name in inside)
        assert part.activations == sum(activations[name] for name in inside)


@pytest.mark.parametrize(("depth", "name"), [(50, "resnext50_32x4d"), (101, "resnext101_64x4d")])
def test_formula_costs_what_timms_does(depth: int, name: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(name)
    multiply_adds, _ = hooked(theirs, 1, 3, 225, 319)
    found = Template(name.rpartition("_")[2]).network(depth, 225, 319)
    assert found == Cost(parameters_of(theirs), sum(multiply_adds.values()))


@settings(database=None, deadline=None, max_examples=8)
@given(
    depth=st.sampled_from([26, 50, 101]),
    template=st.builds(Template.of, st.integers(1, 33), st.integers(1, 9)),
    size=st.tuples(st.integers(32, 400), st.integers(32, 400)),
    num_classes=st.integers(1, 30),
)
def test_cost_at_any_size(
    depth: int, template: Template, size: tuple[int, int], num_classes: int
) -> None:
    """Strided layers round up: only sizes that are no multiples of 32 show it."""
    with torch.device("meta"):
        ours = ResNeXt(depth, template, norm="BN", num_classes=num_classes)
    multiply_adds, activations = hooked(ours, 1, 3, *size)
    expected = Cost(parameters_of(ours), sum(multiply_adds.values()))
    assert template.network(depth, *size, num_classes) == expected
    total = network_complexity(depth, template, *size, num_classes).total
    assert Cost(total.parameters, total.multiply_adds) == expected
    assert total.activations == sum(activations.values())


def test_activations_as_published() -> None:
    """ "Designing Network Design Spaces", table of ResNe(X)ts: millions of activations."""
    published = {
        (50, "1x64d"): 11.1,
        (50, "32x4d"): 14.4,
        (101, "1x64d"): 16.2,
        (101, "32x4d"): 21.2,
    }
    for (depth, template), millions in published.items():
        found = network_complexity(depth, template).total.activations
        assert round(found / 1e6, 1) == millions


@pytest.mark.parametrize("notation", ["1x64d", "8x14d", "32x4d"])
def test_block_costs_what_the_convolutions_of_a_built_one_do(notation: str) -> None:
    """The second of res2, which has no projection."""
    with torch.device("meta"):
        network = ResNeXt(50, notation, norm="BN", num_classes=1000)
    multiply_adds, _ = hooked(network, 1, 3, 224, 224)
    layers = [f"res2.1.conv{n}" for n in (1, 2, 3)]
    weights = sum(network.get_parameter(f"{layer}.weight").numel() for layer in layers)
    expected = Cost(weights, sum(multiply_adds[layer] for layer in layers))
    assert Template(notation).block() == expected


def test_a_network_too_large_for_the_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match="more than there is memory for"):
        network_complexity(50, "4096x4096d")


def test_a_very_large_image_costs_no_memory() -> None:
    found = network_complexity(50, "32x4d", 65_536, 65_536)
    assert found.total.multiply_adds == Template("32x4d").network(50, 65_536, 65_536).multiply_adds


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda p: f"{p.table}-{p.depth}-{p.template}")
def test_counts_agree_with_the_paper_or_the_difference_is_explained(published: Published) -> None:
    template = Template(published.template)
    cost = template.network(published.depth) if published.depth else template.block()
    # The digits that the paper prints.
    form = {1: ".3g", 2: ".1g"}.get(published.table or 0, ".2g")
    agree = [
        published.parameters is None
        or f"{cost.parameters:{form}}" == f"{published.parameters:{form}}",
        published.multiply_adds is None
        or f"{cost.multiply_adds:.2g}" == f"{published.multiply_adds:.2g}",
    ]
    assert all(agree) or published.differences
    if published.multiply_adds is not None:
        assert cost.multiply_adds == pytest.approx(published.multiply_adds, rel=0.042)


def test_all_templates_of_the_papers_tables_are_there() -> None:
    fives = ["1x64d", "2x40d", "4x24d", "8x14d", "32x4d"]
    expected = [
        *[(1, 50, "1x64d", 25.5e6, 4.1e9), (1, 50, "32x4d", 25.0e6, 4.2e9)],
        *[(2, None, each, 70e3, 0.22e9) for each in fives],
        *[(3, 50, each, None, 4.1e9) for each in fives],
        *[(3, 101, each, None, 7.8e9) for each in fives],
        *[(4, 200, "1x64d", None, 15e9), (4, 101, "1x100d", None, 15e9)],
        *[(4, 101, "2x64d", None, 15e9), (4, 101, "64x4d", None, 15e9)],
    ]
    assert expected == [
        (p.table, p.depth, p.template, p.parameters, p.multiply_adds) for p in PUBLISHED if p.table
    ]


def test_explanation_of_the_rough_figure_of_table_3_is_true() -> None:
    """With the 1x1 before each strided 3x3 on the smaller map, 32x4d costs less than 1x64d."""
    costs = {}
    for notation in ("1x64d", "32x4d"):
        with torch.device("meta"):
            network = ResNeXt(50, notation, norm="BN", num_classes=1000)
        multiply_adds, _ = hooked(network, 1, 3, 224, 224)
        on_larger_maps = sum(multiply_adds[f"res{stage}.0.conv1"] for stage in (3, 4, 5))
        total = sum(multiply_adds.values())
        costs[notation] = total, total - on_larger_maps + on_larger_maps // 4
    assert costs["32x4d"][0] > costs["1x64d"][0]
    assert costs["32x4d"][1] < costs["1x64d"][1]


@pytest.mark.parametrize(
    ("overrides", "parameters"),
    [
        (["MODEL.RESNETS.NUM_GROUPS", "1", "MODEL.RESNETS.WIDTH_PER_GROUP", "64"], 41_699_936),
        ([], 41_156_704),
        (["MODEL.RESNETS.DEPTH", "101"], 60_235_872),
        (C4, 33_248_412),
    ],
)
def test_parameters_of_detectors(overrides: list[str], parameters: int) -> None:
    found = detector_complexity(load_config(FASTER_RCNN, overrides), 64, 64)
    assert found.total.parameters == parameters


def test_parts_of_a_detector_with_a_pyramid() -> None:
    """At 250 x 300, so 256 x 320 with padding; closed forms of Detectron2's architecture."""
    cfg = load_config(FASTER_RCNN)
    found = detector_complexity(cfg, 250, 300)
    assert (found.height, found.width, found.regions) == (256, 320, 1000)
    places = [256 * 320 // 4**level for level in (2, 3, 4, 5)]
    channels = [256, 512, 1024, 2048]
    expected = {
        "FPN": sum(n * (c * 256 + 9 * 256 * 256) for n, c in zip(places, channels)),
        # p6 is every other row and column of p5: 4 x 5 places.
        "RPN head": sum([*places, 4 * 5]) * (9 * 256 * 256 + 256 * 3 * (1 + 4)),
        "box head": 1000 * (256 * 7 * 7 * 1024 + 1024 * 1024),
        "box predictor": 1000 * 1024 * (81 + 4 * 80),
    }
    classifier = network_complexity(50, "32x4d", 256, 320)
    expected |= {
        part.name: part.multiply_adds for part in classifier.parts if part.name != "linear"
    }
    assert {part.name: part.multiply_adds for part in found.parts} == expected
    order = "stem res2 res3 res4 res5 FPN,RPN head,box head,box predictor"
    assert [part.name for part in found.parts] == [
        *order.split(",")[0].split(),
        *order.split(",")[1:],
    ]


def test_activations_of_the_heads() -> None:
    parts = parts_of(load_config(FASTER_RCNN), 64, 64)
    assert parts["box head"].activations == 1000 * (1024 + 1024)
    assert parts["box predictor"].activations == 1000 * (81 + 320)


def test_c4_pays_for_res5_with_every_region() -> None:
    cfg = load_config(FASTER_RCNN, C4)
    found = detector_complexity(cfg, 250, 300)
    assert (found.height, found.width) == (250, 300)  # nothing is padded
    with torch.device("meta"):
        res5 = ResNeXt(50, "32x4d", norm="BN", num_classes=1).res5
    multiply_adds, activations = hooked(res5, 1, 1024, 14, 14)
    parts = {part.name: part for part in found.parts}
    assert parts["res5 of the heads"].multiply_adds == 1000 * sum(multiply_adds.values())
    assert parts["res5 of the heads"].activations == 1000 * sum(activations.values())
    assert "res5" not in parts


def test_regions_are_those_that_the_config_lets_through() -> None:
    few = parts_of(load_config(FASTER_RCNN, ["MODEL.RPN.POST_NMS_TOPK_TEST", "300"]), 64, 64)
    assert few["box head"].multiply_adds == 300 * (256 * 7 * 7 * 1024 + 1024 * 1024)
    given = ["MODEL.LOAD_PROPOSALS", "True", "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST", "70"]
    given += ["MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"]
    parts = parts_of(load_config(FASTER_RCNN, given), 64, 64)
    assert parts["box head"].multiply_adds == 70 * (256 * 7 * 7 * 1024 + 1024 * 1024)
    assert "RPN head" not in parts


@pytest.mark.parametrize("seed", [0, 1])
def test_masks_are_counted_for_the_detections_alone(seed: int) -> None:
    """With few classes an untrained network is sure enough of itself to detect something."""
    torch.manual_seed(seed)
    overrides = ["MODEL.MASK_ON", "True", "MODEL.ROI_HEADS.NUM_CLASSES", "1"]
    overrides += ["TEST.DETECTIONS_PER_IMAGE", "10", "MODEL.ROI_MASK_HEAD.NUM_CONV", "4"]
    overrides += ["MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"]
    parts = parts_of(load_config(FASTER_RCNN, overrides), 64, 64)
    one = 14 * 14 * (4 * 9 * 256 * 256 + 4 * 256 * 256) + 28 * 28 * 256
    assert parts["mask head"].multiply_adds == 10 * one


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ("COCO-Detection/retinanet_R_50_FPN_1x", "stem res2 res3 res4 res5 FPN head"),
        ("COCO-Detection/rpn_R_50_C4_1x", "stem res2 res3 res4 RPN_head"),
        (
            "Misc/cascade_mask_rcnn_R_50_FPN_1x",
            "stem res2 res3 res4 res5 FPN RPN_head box_head box_predictor mask_head",
        ),
        (
            "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x",
            "stem res2 res3 res4 res5 FPN sem_seg_head RPN_head box_head box_predictor mask_head",
        ),
        (
            "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x",
            "stem res2 res3 res4 res5 FPN RPN_head box_head box_predictor keypoint_head",
        ),
    ],
)
def test_detectors_of_detectron2s_zoo_have_no_unnamed_part(config: str, parts: str) -> None:
    cfg = model_zoo.get_config(f"{config}.yaml")
    found = detector_complexity(cfg, 128, 128)
    assert {part.name.replace(" ", "_") for part in found.parts} == set(parts.split())
    assert all(part.parameters and part.multiply_adds for part in found.parts)
    cfg.MODEL.DEVICE = "cpu"
    assert found.total.parameters == parameters_of(build_model(cfg))


def test_without_a_size_it_is_the_configs() -> None:
    found = detector_complexity(load_config(FASTER_RCNN))
    assert (found.height, found.width) == (800, 1344)
    places = 200 * 336
    assert found.parts[0].multiply_adds == 4 * places * 64 * 7 * 7 * 3


def test_other_architectures_are_refused() -> None:
    cfg = model_zoo.get_config("Misc/semantic_R_50_FPN_1x.yaml")
    with pytest.raises(ConfigError, match="SemanticSegmentor, which cannot be counted"):
        detector_complexity(cfg)


@pytest.mark.parametrize("size", [(0, 224), (31, 224), (224, -5), (65_537, 224)])
def test_sizes_of_no_image_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="nearest"):
        network_complexity(50, "32x4d", *size)
    with pytest.raises(ConfigError, match="nearest"):
        detector_complexity(load_config(FASTER_RCNN), *size)


def test_products_that_are_not_counted_are_named(caplog: pytest.LogCaptureFixture) -> None:
    class Rotated(FastRCNNConvFCHead):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = super().forward(x)
            return found @ torch.eye(found.shape[1])

    if "Rotated" not in ROI_BOX_HEAD_REGISTRY:
        ROI_BOX_HEAD_REGISTRY.register(Rotated)
    cfg = load_config(FASTER_RCNN, ["MODEL.ROI_BOX_HEAD.NAME", "Rotated"])
    with caplog.at_level(logging.WARNING):
        detector_complexity(cfg, 64, 64)
    assert "aten::matmul: not in the multiply-adds" in caplog.text
    caplog.clear()
    detector_complexity(load_config(FASTER_RCNN), 64, 64)
    assert "multiply-adds" not in caplog.text


def test_tool_prints_every_template_of_the_paper(tool: Tool) -> None:
    done = tool("complexity.py", [])
    assert done.returncode == 0, done.stderr
    rows = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "1 50 layers 32x4d 25,028,904 25.0 M 4.230 G 4.2 G +0.7%" in rows
    assert "2 a block 32x4d 70,144 70 k 0.220 G 0.22 G +0.0%" in rows
    assert "4 200 layers 1x64d 64,673,832 15.007 G 15 G +0.0% 4" in rows
    assert len([row for row in rows if row[:2] in ("1 ", "2 ", "3 ", "4 ")]) == 21
    assert "4. the paper's ResNet-200 is the pre-activation one" in done.stdout


def test_tool_counts_a_detector(tool: Tool) -> None:
    arguments = ["MODEL.RPN.POST_NMS_TOPK_TEST", "300", "--size", "250", "300"]
    done = tool("complexity.py", [*arguments, "--config-file", FASTER_RCNN])
    assert done.returncode == 0, done.stderr
    assert "One image of 256 x 320, heads for 300 regions." in done.stdout
    assert "4,168,089,600" in done.stdout  # 300 * (12544 * 1024 + 1024 * 1024), the box head


def test_paths_put_out_more_than_one_grouped_convolution() -> None:
    """In the aggregated form each of 32 paths puts out the channels that the block does."""
    outputs = 3 * 256 * 56**2 + 4 * 512 * 28**2 + 6 * 1024 * 14**2 + 3 * 2048 * 7**2
    grouped, aggregated = (
        network_complexity(50, "32x4d", form=form).total for form in ("grouped", "aggregated")
    )
    assert aggregated.activations == grouped.activations + 31 * outputs
    assert aggregated.multiply_adds == grouped.multiply_adds


def test_tool_refuses_in_a_line(tool: Tool) -> None:
    done = tool("complexity.py", ["--template", "32x4", "--depth", "101"])
    assert done.returncode == 2
    assert not done.stdout
    assert "Traceback" not in done.stderr
    expected = "error: template '32x4' cannot be read; did you mean 32x4d?"
    assert done.stderr.splitlines()[-1].startswith(expected)
