"""Counts of built networks, against forward hooks, closed forms, torchvision and the paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from resnext_det import ResNeXt, Template, load_config
from resnext_det.backbones import build_detector
from resnext_det.errors import ConfigError
from resnext_det.modeling.complexity import PUBLISHED, Part, network_complexity
from resnext_det.modeling.template import BLOCKS_PER_STAGE, Cost
from resnext_det_cli import main
from resnext_det_cli.complexity import config_complexity

FASTER_RCNN = "faster_rcnn_X_50_32x4d_FPN_paper"
C4 = [
    *["MODEL.BACKBONE.NAME", "build_resnext_backbone"],
    *["MODEL.RESNETS.OUT_FEATURES", '["res4"]', "MODEL.RPN.IN_FEATURES", '["res4"]'],
    *["MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", '["res4"]'],
    *["MODEL.ANCHOR_GENERATOR.SIZES", "[[32,64,128,256,512]]"],
    *["MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "14"],
]


def hooked(network: nn.Module, *shape: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return multiply-adds and activations of every layer for one image, by their definition."""
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


def parts_of(cfg: CfgNode, *size: int) -> dict[str, Part]:
    return {part.name: part for part in config_complexity(cfg, *size).parts}


@pytest.mark.parametrize(
    ("depth", "notation"), sorted({(p.depth, p.template) for p in PUBLISHED if p.depth})
)
def test_formula_and_built_network_cost_what_torchvisions_does(depth: int, notation: str) -> None:
    template, blocks = Template(notation), list(BLOCKS_PER_STAGE[depth])
    widths = {"groups": template.cardinality, "width_per_group": template.width}
    with torch.device("meta"):
        theirs = ResNet(Bottleneck, blocks, **widths)
    multiply_adds, activations = hooked(theirs, 1, 3, 224, 224)
    expected = parameters_of(theirs), sum(multiply_adds.values())
    assert template.network(depth) == Cost(*expected)
    counted = network_complexity(depth, notation)
    assert counted.total == Part("total", *expected, sum(activations.values()))
    names = {"stem": "conv1", "linear": "fc"} | {f"res{n}": f"layer{n - 1}." for n in range(2, 6)}
    assert {part.name for part in counted.parts} == set(names)
    for part in counted.parts:
        inside = [name for name in multiply_adds if name.startswith(names[part.name])]
        assert part.multiply_adds == sum(multiply_adds[name] for name in inside)
        assert part.activations == sum(activations[name] for name in inside)


@settings(max_examples=8)
@given(
    depth=st.sampled_from([26, 50, 101]),
    template=st.builds(Template.of, st.integers(1, 33), st.integers(1, 9)),
    size=st.tuples(st.integers(32, 400), st.integers(32, 400)),
    num_classes=st.integers(1, 30),
)
def test_cost_at_any_size(
    depth: int, template: Template, size: tuple[int, int], num_classes: int
) -> None:
    """Strided layers round up, which only sizes that are not multiples of 32 show."""
    with torch.device("meta"):
        ours = ResNeXt(depth, template, norm="BN", num_classes=num_classes)
    multiply_adds, activations = hooked(ours, 1, 3, *size)
    expected = Cost(parameters_of(ours), sum(multiply_adds.values()))
    assert template.network(depth, *size, num_classes) == expected
    total = network_complexity(depth, template, *size, num_classes).total
    assert Cost(total.parameters, total.multiply_adds) == expected
    assert total.activations == sum(activations.values())


def test_formula_costs_what_timms_network_does() -> None:
    with torch.device("meta"):
        theirs = timm.create_model("resnext101_64x4d")
    multiply_adds, _ = hooked(theirs, 1, 3, 225, 319)
    found = Template("64x4d").network(101, 225, 319)
    assert found == Cost(parameters_of(theirs), sum(multiply_adds.values()))


@pytest.mark.parametrize(
    ("depth", "template", "millions"),
    [(50, "1x64d", 11.1), (50, "32x4d", 14.4), (101, "1x64d", 16.2), (101, "32x4d", 21.2)],
)
def test_published_activations(depth: int, template: str, millions: float) -> None:
    """As in the table of ResNe(X)ts of "Designing Network Design Spaces"."""
    assert round(network_complexity(depth, template).total.activations / 1e6, 1) == millions


def test_a_large_network_and_a_large_image_cost_no_memory() -> None:
    found = network_complexity(50, "4096x4096d", 65_536, 65_536).total
    expected = Template("4096x4096d").network(50, 65_536, 65_536)
    assert (found.parameters, found.multiply_adds) == (expected.parameters, expected.multiply_adds)


def test_agrees_with_the_paper() -> None:
    """Counts equal the printed digits, except 1x64d's parameters; Table 3 is only approximate."""
    for table, depth, notation, parameters, multiply_adds in PUBLISHED:
        cost = Template(notation).network(depth) if depth else Template(notation).block()
        assert cost.multiply_adds == pytest.approx(multiply_adds, rel=0.042)
        if table == 1 or (table == 2 and notation != "8x14d"):
            assert f"{cost.multiply_adds:.2g}" == f"{multiply_adds:.2g}"
        if parameters is not None and (depth, notation) != (50, "1x64d"):
            assert f"{cost.parameters:.{3 if depth else 1}g}" == f"{parameters:.3g}"
    assert {table: sum(each.table == table for each in PUBLISHED) for table in (1, 2, 3, 4)} == {
        1: 2,
        2: 5,
        3: 10,
        4: 4,
    }


def test_explanation_of_table_3_is_true() -> None:
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


def test_parts_of_a_detector_with_a_pyramid() -> None:
    """At 250 x 300, so 256 x 320 with padding; closed forms of Detectron2's architecture."""
    found = config_complexity(load_config(FASTER_RCNN), 250, 300)
    assert (found.height, found.width, found.regions) == (256, 320, 1000)
    places = [256 * 320 // 4**level for level in (2, 3, 4, 5)]
    channels = [256, 512, 1024, 2048]
    expected = {
        part.name: part.multiply_adds
        for part in network_complexity(50, "32x4d", 256, 320).parts
        if part.name != "linear"
    } | {
        "FPN": sum(n * (c * 256 + 9 * 256 * 256) for n, c in zip(places, channels)),
        # p6 is every other row and column of p5: 4 x 5 places.
        "RPN head": sum([*places, 4 * 5]) * (9 * 256 * 256 + 256 * 3 * (1 + 4)),
        "box head": 1000 * (256 * 7 * 7 * 1024 + 1024 * 1024),
        "box predictor": 1000 * 1024 * (81 + 4 * 80),
    }
    assert [(part.name, part.multiply_adds) for part in found.parts] == list(expected.items())
    assert found.total.parameters == 41_156_704
    parts = {part.name: part for part in found.parts}
    assert parts["box head"].activations == 1000 * (1024 + 1024)
    assert parts["box predictor"].activations == 1000 * (81 + 320)


def test_c4_pays_for_res5_with_every_region() -> None:
    found = config_complexity(load_config(FASTER_RCNN, C4), 250, 300)
    assert (found.height, found.width) == (250, 300)  # nothing is padded
    with torch.device("meta"):
        res5 = ResNeXt(50, "32x4d", norm="BN", num_classes=1).res5
    multiply_adds, activations = hooked(res5, 1, 1024, 14, 14)
    parts = {part.name: part for part in found.parts}
    assert parts["res5 of the head"].multiply_adds == 1000 * sum(multiply_adds.values())
    assert parts["res5 of the head"].activations == 1000 * sum(activations.values())
    assert "res5" not in parts


def test_regions_are_those_that_the_config_lets_through() -> None:
    one = 256 * 7 * 7 * 1024 + 1024 * 1024
    few = parts_of(load_config(FASTER_RCNN, ["MODEL.RPN.POST_NMS_TOPK_TEST", "300"]), 64, 64)
    assert few["box head"].multiply_adds == 300 * one


def test_masks_are_counted_for_detections_alone() -> None:
    """With one class, an untrained network is sure enough of itself to detect something."""
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
            "stem res2 res3 res4 res5 FPN RPN_head box_head box_predictor mask_head sem_seg_head",
        ),
    ],
)
def test_detectors_of_detectron2s_zoo_have_no_unnamed_part(config: str, parts: str) -> None:
    cfg = model_zoo.get_config(f"{config}.yaml")
    found = config_complexity(cfg, 128, 128)
    assert {part.name.replace(" ", "_") for part in found.parts} == set(parts.split())
    assert all(part.parameters and part.multiply_adds for part in found.parts)
    cfg.MODEL.DEVICE = "cpu"
    assert found.total.parameters == parameters_of(build_detector(cfg))


def test_refuses_other_architectures_and_sizes() -> None:
    with pytest.raises(ConfigError, match="SemanticSegmentor cannot be counted"):
        config_complexity(model_zoo.get_config("Misc/semantic_R_50_FPN_1x.yaml"))
    for size in ((31, 224), (224, -5), (65_537, 224)):
        with pytest.raises(ConfigError, match="each side must have 32"):
            network_complexity(50, "32x4d", *size)
        with pytest.raises(ConfigError, match="each side must have 32"):
            config_complexity(load_config(FASTER_RCNN), *size)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["complexity"])
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "1 50 layers 32x4d 25,028,904 25,000,000 4.230 G 4.2 G +0.7%" in rows
    assert "2 block of res2, 32x4d 70,144 70,000 0.220 G 0.22 G +0.0%" in rows
    main(["complexity", "MODEL.RPN.POST_NMS_TOPK_TEST", "300", "--config-file", FASTER_RCNN])
    assert "One image of 800 x 1344, heads for 300 regions." in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["complexity", "--template", "32x4", "--depth", "101"])
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines()[-1].startswith("error: template '32x4' is not of the form CxDd")
