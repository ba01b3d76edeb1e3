"""The networks that only classifiers had: CIFAR's ResNeXt-29 and pre-activation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnext_det import ResNeXt, load_config
from resnext_det.backbones import build_detector
from resnext_det.errors import ConfigError
from resnext_det.modeling.cifar import CifarResNeXt

# Appendix A: 34.4 and 68.1 million.
CIFAR = {("8x64d", 10): 34_426_698, ("16x64d", 10): 68_155_210, ("8x64d", 100): 34_518_948}


@pytest.mark.parametrize(("template", "classes"), CIFAR)
def test_parameters_of_table_7(template: str, classes: int) -> None:
    with torch.device("meta"):
        network = CifarResNeXt(template, classes)
    assert sum(each.numel() for each in network.parameters()) == CIFAR[template, classes]


def test_maps_of_appendix_a() -> None:
    """32, 16 and 8 pixels: stride 2 in the 3x3 of the first block of the later stages."""
    network = CifarResNeXt("2x4d", 5, stem_out_channels=8, res2_out_channels=16)
    sizes: dict[str, tuple[int, ...]] = {}
    for name in ("stem", "res2", "res3", "res4"):
        module = network.get_submodule(name)
        module.register_forward_hook(lambda *a, name=name: sizes.__setitem__(name, a[2].shape[1:]))
    assert network(torch.rand(2, 3, 32, 32))["linear"].shape == (2, 5)
    assert [*sizes.values()] == [(8, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
    first: Any = network.res3[0]  # type: ignore[index]
    assert (first.conv1.stride, first.conv2.stride) == ((1, 1), (2, 2))


@pytest.mark.parametrize("form", ["grouped", "aggregated"])
def test_without_shortcuts_only_residuals_are_left(form: str) -> None:
    """As if the shortcuts of the same network, from the same seed, put out zeros."""
    outputs = []
    for shortcuts in (True, False):
        torch.manual_seed(0)
        network = CifarResNeXt(
            "2x4d", 5, stem_out_channels=8, res2_out_channels=16, form=form, shortcuts=shortcuts
        )
        block: Any = network.res2[0]  # type: ignore[index]
        assert ("shortcut.weight" in block.state_dict()) == shortcuts
        if shortcuts:
            block.shortcut.register_forward_hook(lambda module, inputs, output: 0 * output)
        outputs.append(block(torch.ones(2, 8, 4, 4)))
    assert torch.equal(*outputs) and outputs[0].std() > 0.01
    with pytest.raises(ConfigError, match="put out nothing"):
        ResNeXt(26, "2x4d", norm="BN", shortcuts=False, zero_init_residual=True)


def reference(x: Tensor, state: dict[str, Tensor], counts: list[int], groups: int) -> Tensor:
    """fb.resnet.torch's preresnet, from its description, on the tensors of our network."""

    def norm(x: Tensor, name: str) -> Tensor:
        kinds = ("running_mean", "running_var", "weight", "bias")
        return F.relu(F.batch_norm(x, *(state[f"{name}.{kind}"] for kind in kinds)))

    def conv(x: Tensor, name: str, **words: int) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], **words)

    x = norm(conv(x, "stem.conv1", stride=2, padding=3), "stem.conv1.norm")
    x = F.max_pool2d(x, 3, 2, 1)
    for stage, count in enumerate(counts, start=2):
        for place in range(count):
            block = f"res{stage}.{place}"
            stride = 2 if stage > 2 and place == 0 else 1
            out = x if (stage, place) == (2, 0) else norm(x, f"{block}.norm")
            # The shortcut of a stage's first block is activated as well.
            shortcut = conv(out, f"{block}.shortcut", stride=stride) if place == 0 else x
            out = norm(conv(out, f"{block}.conv1"), f"{block}.conv1.norm")
            out = conv(out, f"{block}.conv2", stride=stride, padding=1, groups=groups)
            out = conv(norm(out, f"{block}.conv2.norm"), f"{block}.conv3")
            x = out + shortcut
    x = norm(x, f"res5.{counts[-1] - 1}.end.norm").mean((2, 3))
    return F.linear(x, state["linear.weight"], state["linear.bias"])


def test_preactivation_computes_the_reference() -> None:
    torch.manual_seed(0)
    network = ResNeXt(
        50, "4x4d", norm="BN", num_classes=7, pre_activation=True, res2_out_channels=32
    )
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    network.eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = reference(x, network.state_dict(), [3, 4, 6, 3], 4)
        assert torch.allclose(network(x)["linear"], expected, rtol=1e-4, atol=1e-4)
    assert float(expected.std()) > 0.01


def test_parameters_of_the_papers_resnet_200() -> None:
    """Norms move from the outputs of blocks and projections to their inputs."""
    counts, channels = (3, 24, 36, 3), (256, 512, 1024, 2048)
    with torch.device("meta"):
        post, pre = (
            sum(each.numel() for each in ResNeXt(200, "1x64d", **words).parameters())
            for words in (
                {"norm": "BN", "num_classes": 1000},
                {"norm": "BN", "num_classes": 1000, "pre_activation": True},
            )
        )
    outputs = sum(2 * count * width for count, width in zip(counts, channels))
    projections = sum(2 * width for width in channels)
    inputs = sum(2 * (count - 1) * width for count, width in zip(counts, channels))
    inputs += sum(2 * width for width in channels[:3])  # of the first blocks of res3 to res5
    assert post == 64_673_832
    assert pre == post - outputs - projections + inputs + 2 * channels[-1]


@pytest.mark.parametrize("config", ["faster_rcnn_X_26_8x4d_FPN_toy", "c4"])
def test_detectors_take_preactivation(config: str) -> None:
    words = ["MODEL.RESNEXT.PRE_ACTIVATION", "True"]
    if config == "c4":
        words += ["MODEL.BACKBONE.NAME", "build_resnext_backbone", "MODEL.ROI_HEADS.NAME"]
        words += ["ResNeXtRes5ROIHeads", "MODEL.RESNETS.OUT_FEATURES", "['res4']"]
        words += ["MODEL.ROI_HEADS.IN_FEATURES", "['res4']", "MODEL.RPN.IN_FEATURES", "['res4']"]
        words += ["MODEL.ANCHOR_GENERATOR.SIZES", "[[32,64]]"]
    cfg = load_config("faster_rcnn_X_26_8x4d_FPN_toy", words)
    detector = build_detector(cfg).eval()
    with torch.no_grad():
        (found,) = detector([{"image": torch.zeros(3, 96, 96, dtype=torch.uint8)}])
    assert "instances" in found
    names = detector.state_dict().keys()
    assert sum(name.endswith("end.norm.weight") for name in names) == 1
    words += ["MODEL.RESNEXT.FORM", "aggregated"]
    with pytest.raises(ConfigError, match="PRE_ACTIVATION is True, which needs"):
        build_detector(load_config("faster_rcnn_X_26_8x4d_FPN_toy", words))
