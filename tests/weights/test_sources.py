"""Each layout, written from a network of its own kind, read, and compared on all stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from torch import Tensor

from resnext_det import ResNeXt, load_config
from resnext_det.errors import WeightsError
from resnext_det.weights.converting import BackboneWeights, read_backbone, write_detectron2
from resnext_det.weights.layouts import to_detectron2, to_torchvision
from resnext_det.weights.loading import load_weights
from resnext_det.weights.pixels import OURS, Pixels
from tests.helpers.written_sources import WRITERS, cadene, caffe2, save, small_network


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_caffe2_says_what_it_is(fused: bool, tmp_path: Path) -> None:
    weights = read_backbone(save(tmp_path / "X-26.pkl", caffe2(small_network(), fused)))
    assert weights.fused == fused
    assert weights.stride_in_1x1 is False
    assert {"pred_w", "pred_b"} <= set(weights.left_out)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_caffe2s_resnets_are_msras(fused: bool, tmp_path: Path) -> None:
    """Detectron2's R-50.pkl and R-101.pkl: stride in the 1x1, std 1 (its model catalog)."""
    file = save(tmp_path / "R-26.pkl", caffe2(small_network(groups=1, width=64), fused))
    weights = read_backbone(file)
    assert weights.stride_in_1x1
    stem = small_network(groups=1, width=64).conv1.weight.detach().double()
    expected = (stem * torch.tensor(OURS.std, dtype=torch.float64).view(1, 3, 1, 1)).float()
    assert torch.equal(weights.tensors["stem.conv1.weight"], expected)
    output = tmp_path / "converted.pth"
    write_detectron2(weights, output)
    for each in (file, output):
        words = [*SMALL, "MODEL.WEIGHTS", str(each), "MODEL.RESNETS.NUM_GROUPS", "1"]
        words += ["MODEL.RESNETS.WIDTH_PER_GROUP", "64"]
        cfg = load_config("faster_rcnn_X_50_32x4d_FPN_paper", words)
        with pytest.raises(WeightsError, match=r"Set MODEL\.RESNETS\.STRIDE_IN_1X1 True"):
            load_weights(build_model(cfg), cfg)
        words += ["MODEL.RESNETS.STRIDE_IN_1X1", "True"]
        cfg = load_config("faster_rcnn_X_50_32x4d_FPN_paper", words)
        assert load_weights(build_model(cfg), cfg).startswith("145/145")


def test_torchvisions_resnet_with_the_stride_in_the_1x1_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path / "a.pth", small_network(groups=1, width=64).state_dict())
    words = [*SMALL, "MODEL.WEIGHTS", str(file), "MODEL.RESNETS.NUM_GROUPS", "1"]
    words += ["MODEL.RESNETS.WIDTH_PER_GROUP", "64", "MODEL.RESNETS.STRIDE_IN_1X1", "True"]
    cfg = load_config("faster_rcnn_X_50_32x4d_FPN_paper", words)
    with pytest.raises(WeightsError, match=r"in the 3x3.*STRIDE_IN_1X1 False"):
        load_weights(build_model(cfg), cfg)


@pytest.fixture(scope="module")
def rgb(tmp_path_factory: pytest.TempPathFactory) -> BackboneWeights:
    """A network in torchvision's own layout, as it is read."""
    file = tmp_path_factory.mktemp("rgb") / "torchvision.pth"
    return read_backbone(save(file, small_network().state_dict()))


def assert_same_bits(one: BackboneWeights, other: BackboneWeights) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(other.tensors[name], tensor), name


@pytest.mark.parametrize("writer", WRITERS)
def test_every_layout_gives_the_same_bits(
    writer: str, rgb: BackboneWeights, tmp_path: Path
) -> None:
    name, layout, write = WRITERS[writer]
    weights = read_backbone(save(tmp_path / name, write(small_network())))
    assert_same_bits(weights, rgb)
    assert (weights.layout, weights.pixels, weights.fused) == (layout, OURS, False)


@pytest.mark.parametrize("form", ["grouped", "concatenated", "aggregated"])
def test_converting_twice_changes_nothing(form: str, rgb: BackboneWeights, tmp_path: Path) -> None:
    """Neither a bit nor a word of the record; in any form of the blocks."""
    once, twice = tmp_path / "once.pth", tmp_path / "twice.pth"
    write_detectron2(rgb, once, form)
    again = read_backbone(once)
    assert_same_bits(again, rgb)
    write_detectron2(again, twice, form)
    first, second = (torch.load(file) for file in (once, twice))
    assert first["resnext_det"] == second["resnext_det"]
    assert first["resnext_det"]["source"] == "torchvision.pth"
    assert first["model"].keys() == second["model"].keys()
    for name, array in first["model"].items():
        assert torch.equal(array, second["model"][name]), name
    assert_same_bits(read_backbone(twice), rgb)


def test_bare_names_of_detectron2_are_taken_as_they_are(
    rgb: BackboneWeights, tmp_path: Path
) -> None:
    """They do not say what images they take, so nothing is folded."""
    weights = read_backbone(save(tmp_path / "backbone.pth", dict(rgb.tensors)))
    assert_same_bits(weights, rgb)
    assert (weights.layout, weights.pixels) == ("Detectron2", None)


def test_the_checkpoint_of_our_own_pretraining(rgb: BackboneWeights, tmp_path: Path) -> None:
    source = ResNeXt(26, "8x4d", norm="BN", res2_out_channels=32, num_classes=10)
    source.load_state_dict(to_detectron2(small_network().state_dict()))
    file = tmp_path / "pretrained.pth"
    torch.save(to_torchvision(source.state_dict()), file)
    assert_same_bits(read_backbone(file), rgb)


def test_a_converted_file_remembers_what_it_is(tmp_path: Path) -> None:
    file = save(tmp_path / "X-26.pkl", caffe2(small_network(), fused=True))
    odd = Pixels("BGR", 255, (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0))
    weights = read_backbone(file, odd)
    output = tmp_path / "converted.pth"
    write_detectron2(weights, output)
    again = read_backbone(output)
    assert again.fused
    assert again.pixels == Pixels("BGR", 255, odd.mean, OURS.std)
    assert torch.equal(again.tensors["stem.conv1.weight"], weights.tensors["stem.conv1.weight"])
    record = torch.load(output)["resnext_det"]
    assert (record["source"], record["layout"]) == ("X-26.pkl", "Caffe2")
    assert (record["depth"], record["template"]) == (26, "8x4d")
    assert len(record["sha256"]) == 64


SMALL = ["MODEL.RESNETS.DEPTH", "26", "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.DEVICE", "cpu"]
SMALL += ["MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.RESNETS.NUM_GROUPS", "8"]
SMALL += ["MODEL.RESNETS.RES2_OUT_CHANNELS", "32"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"],
            r"std \(57.*gives.*std \(1, 1, 1\).*MODEL.PIXEL_STD",
        ),
        (["MODEL.PIXEL_MEAN", "[102.9801, 115.9465, 122.7717]"], r"MODEL.PIXEL_MEAN \[103.53"),
        (["INPUT.FORMAT", "RGB"], r"takes images as BGR.*gives RGB.*Set INPUT.FORMAT BGR"),
    ],
)
def test_a_config_with_other_pixels_is_refused(words: list[str], said: str, tmp_path: Path) -> None:
    file = save(tmp_path / "a.pth", small_network().state_dict())
    cfg = load_config(
        "faster_rcnn_X_50_32x4d_FPN_paper", [*SMALL, "MODEL.WEIGHTS", str(file), *words]
    )
    with pytest.raises(WeightsError, match=said):
        load_weights(build_model(cfg), cfg)


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_fused_norms_go_with_frozen_ones_alone(norm: str, tmp_path: Path) -> None:
    file = save(tmp_path / "X-26.pkl", caffe2(small_network(), fused=True))
    words = [*SMALL, "MODEL.WEIGHTS", str(file)]
    cfg = load_config("faster_rcnn_X_50_32x4d_FPN_paper", words)
    assert load_weights(build_model(cfg), cfg).startswith("145/145 backbone tensors")
    cfg = load_config("faster_rcnn_X_50_32x4d_FPN_paper", [*words, "MODEL.RESNETS.NORM", norm])
    with pytest.raises(WeightsError, match=rf"NORM is {norm}.*Set MODEL.RESNETS.NORM FrozenBN"):
        load_weights(build_model(cfg), cfg)


def test_stock_detectron2_loads_a_converted_caffe2_file(tmp_path: Path) -> None:
    file = save(tmp_path / "X-26.pkl", caffe2(small_network(), fused=True))
    output = tmp_path / "converted.pth"
    weights = read_backbone(file)
    write_detectron2(weights, output)
    detector = build_model(load_config("faster_rcnn_X_50_32x4d_FPN_paper", SMALL))
    DetectionCheckpointer(detector).load(str(output))
    state = detector.backbone.bottom_up.state_dict()
    assert len(state) == 145
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.tensors.items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"features.4.0.0.0.0.9.weight": torch.ones(1)},
            r"features\.4\.0\.0\.0\.0\.9\.weight is no",
        ),
        ({"features.9.weight": torch.ones(1)}, r"features\.9\.weight is no tensor"),
    ],
)
def test_names_that_no_cadene_file_has_are_refused(
    change: dict[str, Tensor], said: str, tmp_path: Path
) -> None:
    file = save(tmp_path / "a.pth", {**cadene(small_network()), **change})
    with pytest.raises(WeightsError, match=said):
        read_backbone(file)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("gpu_0/res3_1_branch2b_w", r"res3\.1\.conv2\.weight"),
        ("res3_1_branch2b_w_0", r"res3\.1\.conv2\.weight"),
        ("res_conv1_bn_gamma", r"stem\.conv1\.norm\.weight"),
        ("fc1000_w", r"linear\.weight"),
    ],
)
def test_two_spellings_of_one_name_are_refused(name: str, place: str, tmp_path: Path) -> None:
    """One would hide the other."""
    content = caffe2(small_network(), fused=True)
    content["blobs"][name] = np.ones(3, np.float32)
    file = save(tmp_path / "X-26.pkl", content)
    with pytest.raises(WeightsError, match=rf" and {name} are two tensors for one place, {place}"):
        read_backbone(file)


@pytest.mark.parametrize("form", ["gpu_0/{}", "{}_0"])
def test_what_caffe2s_workspace_adds_to_names(form: str, tmp_path: Path) -> None:
    content = caffe2(small_network(), fused=True)
    plain = read_backbone(save(tmp_path / "a.pkl", content))
    ends = ("_w", "_b", "_s")
    renamed = {form.format(n) if n.endswith(ends) else n: t for n, t in content["blobs"].items()}
    assert renamed.keys() != content["blobs"].keys()
    assert_same_bits(read_backbone(save(tmp_path / "b.pkl", {"blobs": renamed})), plain)


def test_a_bias_of_a_convolution_that_is_not_zero_is_refused(tmp_path: Path) -> None:
    content = caffe2(small_network(), fused=True)
    content["blobs"]["res3_0_branch2a_b"] += 1
    file = save(tmp_path / "X-26.pkl", content)
    with pytest.raises(WeightsError, match=r"no ResNeXt has: res3\.0\.conv1\.bias"):
        read_backbone(file)


def test_a_record_with_a_number_beyond_all_is_refused(tmp_path: Path) -> None:
    weights = read_backbone(save(tmp_path / "a.pth", small_network().state_dict()))
    write_detectron2(weights, tmp_path / "b.pth")
    content = torch.load(tmp_path / "b.pth")
    content["resnext_det"]["pixels"]["range"] = 10**400
    torch.save(content, tmp_path / "b.pth")
    with pytest.raises(WeightsError, match=r"b\.pth: its record"):
        read_backbone(tmp_path / "b.pth")


@pytest.mark.parametrize("record", [{}, {"pixels": 3}, [1], "text", {"pixels": {"order": "RGB"}}])
def test_a_record_that_is_none_is_refused(record: Any, tmp_path: Path) -> None:
    weights = read_backbone(save(tmp_path / "a.pth", small_network().state_dict()))
    file = save(tmp_path / "b.pth", {"model": dict(weights.tensors), "resnext_det": record})
    with pytest.raises(WeightsError, match=r"b\.pth: its record"):
        read_backbone(file)


@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize(
    "head", ["fc.1.weight", "fc.0.bias", "projection_head.0.weight", "predictor.bias", "prototypes"]
)
def test_other_heads_than_a_classifier_are_left_out(head: str, prefix: str, tmp_path: Path) -> None:
    state = {
        f"{prefix}{name}": tensor
        for name, tensor in small_network().state_dict().items()
        if not name.startswith("fc.")
    }
    whole = read_backbone(save(tmp_path / "a.pth", dict(state)))
    name = f"{prefix}{head}" if head.startswith("fc") else f"{head}.weight"
    weights = read_backbone(save(tmp_path / "b.pth", {**state, name: torch.ones(3, 4)}))
    assert len(weights.left_out) == 1 and name.endswith(weights.left_out[0])
    assert all(torch.equal(weights.tensors[n], tensor) for n, tensor in whole.tensors.items())
