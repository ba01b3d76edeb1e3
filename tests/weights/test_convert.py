"""Checkpoint files in the three forms: there and back, and into models of each form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import Tensor, nn

from resnext_det import ResNeXt, load_config
from resnext_det.errors import WeightsError
from resnext_det.modeling.forms import convert_form, form_of
from resnext_det.weights.converting import (
    convert_detector,
    holds_backbone,
    read_backbone,
    write_detectron2,
)
from resnext_det.weights.layouts import to_torchvision
from resnext_det.weights.loading import load_weights
from resnext_det.weights.reading import read_tensors

FORMS = ["aggregated", "concatenated", "grouped"]
SIZES = {"stem_out_channels": 8, "res2_out_channels": 16}


def trained(network: nn.Module) -> nn.Module:
    """Give every norm statistics and an affine map of its own."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return network


def config(form: str, weights: Path | str = "", c4: bool = False) -> CfgNode:
    words = ["MODEL.RESNETS.DEPTH", "26", "MODEL.RESNETS.NUM_GROUPS", "4", "MODEL.DEVICE", "cpu"]
    words += ["MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16"]
    words += ["MODEL.FPN.OUT_CHANNELS", "8", "MODEL.ROI_BOX_HEAD.FC_DIM", "8"]
    words += ["MODEL.RESNEXT.FORM", form, "MODEL.WEIGHTS", str(weights)]
    if c4:
        words += ["MODEL.BACKBONE.NAME", "build_resnext_backbone"]
        words += ["MODEL.RESNETS.OUT_FEATURES", "['res4']", "MODEL.RPN.IN_FEATURES", "['res4']"]
        words += ["MODEL.ROI_HEADS.IN_FEATURES", "['res4']"]
        words += ["MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]"]
        words += ["MODEL.ROI_HEADS.NAME", "ResNeXtRes5ROIHeads"]
    return load_config("faster_rcnn_X_50_32x4d_FPN_paper", words)


def backbone_state(norm: str = "BN") -> dict[str, Tensor]:
    torch.manual_seed(1)
    state: dict[str, Tensor] = trained(ResNeXt(26, "4x4d", norm=norm, **SIZES)).state_dict()
    return state


def torchvision_file(folder: Path) -> Path:
    file = folder / "resnext26.pth"
    torch.save(to_torchvision(backbone_state()), file)
    return file


def inner(model: nn.Module) -> dict[str, Tensor]:
    """Return the backbone's tensors under the backbone's own names, res5 of C4 among them."""
    names = ("backbone.bottom_up.", "backbone.", "roi_heads.")
    found = {}
    for name, tensor in model.state_dict().items():
        for prefix in names:
            name = name.removeprefix(prefix)
        if name.startswith(("stem.", "res")):
            found[name] = tensor
    return found


@pytest.mark.parametrize("c4", [False, True], ids=["fpn", "c4"])
@pytest.mark.parametrize("form", FORMS)
def test_imagenet_weights_go_into_a_model_of_any_form(form: str, c4: bool, tmp_path: Path) -> None:
    cfg = config(form, torchvision_file(tmp_path), c4)
    model = build_model(cfg)
    line = load_weights(model, cfg)
    got = inner(model)
    assert form_of(got) == form
    counted = line.split(" ")[0]
    assert counted == f"{len(got)}/{len(got)}"
    grouped = convert_form(got, "grouped")
    truth = backbone_state()
    truth["stem.conv1.weight"] = truth["stem.conv1.weight"].flip(1)  # RGB there, BGR here
    expected = {name: t for name, t in truth.items() if not name.endswith("num_batches_tracked")}
    assert grouped.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(grouped[name], tensor), name


@pytest.mark.parametrize("source", FORMS)
@pytest.mark.parametrize("target", FORMS)
def test_a_detector_of_one_form_is_evaluated_in_another(
    source: str, target: str, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    model = trained(build_model(config(source)))
    file = tmp_path / "model_final.pth"
    torch.save({"model": model.state_dict(), "iteration": 3}, file)
    cfg = config(target, file)
    other = build_model(cfg)
    line = load_weights(other, cfg, whole_detector=True)
    total = len(convert_form(model.state_dict(), "grouped"))
    assert line.startswith(f"{total}/{total} tensors")
    got, expected = (convert_form(each.state_dict(), "grouped") for each in (other, model))
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("form", FORMS)
def test_a_backbone_file_of_any_form_is_read(form: str, tmp_path: Path) -> None:
    weights = read_backbone(torchvision_file(tmp_path))
    file = tmp_path / "converted.pth"
    write_detectron2(weights, file, form)
    assert form_of(read_tensors(file)) == form
    assert holds_backbone(file)
    again = read_backbone(file)
    assert (again.depth, again.template, again.layout) == (26, weights.template, "Detectron2")
    assert again.tensors.keys() == weights.tensors.keys()
    for name, tensor in weights.tensors.items():
        assert torch.equal(again.tensors[name], tensor), name


def test_a_detectors_file_there_and_back(tmp_path: Path) -> None:
    """Bits, names and types; the optimizer's state is not taken along."""
    torch.manual_seed(3)
    cfg = config("grouped")
    model = trained(build_model(cfg))
    file = tmp_path / "model_final.pth"
    torch.save({"model": model.state_dict(), "optimizer": {"state": {}}, "iteration": 3}, file)
    assert not holds_backbone(file)
    there, back = tmp_path / "there.pth", tmp_path / "back.pth"
    count = convert_detector(file, there, "aggregated")
    state = read_tensors(there)
    assert count == len(state)
    assert form_of(state) == "aggregated"
    assert convert_detector(there, back, "grouped") == len(model.state_dict())
    final = read_tensors(back)
    assert final.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert final[name].dtype == tensor.dtype
        assert torch.equal(final[name], tensor), name
    fresh = build_model(cfg)
    DetectionCheckpointer(fresh).load(str(back))
    assert all(torch.equal(tensor, final[n]) for n, tensor in fresh.state_dict().items())


def test_a_file_that_lacks_a_path_is_named(tmp_path: Path) -> None:
    state = convert_form(backbone_state(), "aggregated")
    del state["res3.1.paths.2.conv1.weight"]
    file = tmp_path / "damaged.pth"
    torch.save(state, file)
    said = r"damaged\.pth: res3\.1: conv1\.weight does not have one tensor"
    with pytest.raises(WeightsError, match=said):
        read_backbone(file)
    detector = tmp_path / "detector.pth"
    torch.save({f"backbone.bottom_up.{name}": tensor for name, tensor in state.items()}, detector)
    for convert in (
        lambda: convert_detector(detector, tmp_path / "out.pth", "grouped"),
        lambda: load_weights(build_model(config("grouped")), config("grouped", detector)),
    ):
        with pytest.raises(
            WeightsError, match=r"detector\.pth: backbone\.bottom_up\.res3\.1: conv1"
        ):
            convert()
    assert not (tmp_path / "out.pth").exists()


def test_a_file_that_has_a_convolution_twice_is_refused(tmp_path: Path) -> None:
    """For each path and for all together: one of the two would be lost in silence."""
    state = convert_form(backbone_state(), "aggregated")
    state["res3.1.conv2.weight"] = backbone_state()["res3.1.conv2.weight"]
    file = tmp_path / "twice.pth"
    torch.save(state, file)
    with pytest.raises(WeightsError, match=r"res3\.1: conv2\.weight does not have one tensor"):
        read_backbone(file)


@pytest.mark.parametrize("convert", ["backbone", "detector"])
def test_the_source_is_not_overwritten(convert: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(to_torchvision(backbone_state()), file)
    before = file.read_bytes()
    (tmp_path / "link.pth").symlink_to(file)
    with pytest.raises(WeightsError, match="is the file that is converted"):
        if convert == "backbone":
            write_detectron2(read_backbone(file), tmp_path / "link.pth")
        else:
            convert_detector(file, tmp_path / "link.pth", "grouped")
    assert file.read_bytes() == before
