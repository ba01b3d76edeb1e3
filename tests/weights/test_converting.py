"""Complete and incomplete backbones, and converted files in every form."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from torch import Tensor

from resnext_det import ResNeXt, load_config
from resnext_det.errors import WeightsError
from resnext_det.modeling.forms import convert_form, form_of
from resnext_det.modeling.template import BLOCKS_PER_STAGE, Template
from resnext_det.weights.catalog import entry
from resnext_det.weights.checks import check_backbone, describe, doubts
from resnext_det.weights.converting import (
    convert_detector,
    holds_backbone,
    read_backbone,
    write_detectron2,
)
from resnext_det.weights.pixels import OURS, Pixels
from resnext_det.weights.reading import read_tensors
from tests.helpers.written_sources import caffe2, save, small_network, unlike_fresh

Tensors = dict[str, Tensor]
FORMS = ["aggregated", "concatenated", "grouped"]


@pytest.fixture()
def backbone() -> Tensors:
    """A narrow network of 26 layers, template 2x2d."""
    torch.manual_seed(1)
    return ResNeXt(26, "2x2d", stem_out_channels=4, res2_out_channels=8).state_dict()


@pytest.mark.parametrize("depth", BLOCKS_PER_STAGE)
def test_describes_every_network(depth: int) -> None:
    for template in ("1x64d", "32x4d", "8x14d"):
        with torch.device("meta"):
            tensors = ResNeXt(depth, template).state_dict()
        assert describe(tensors) == (depth, Template(template))


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "GN", "LN", ""])
def test_accepts_complete_networks(norm: str) -> None:
    for stem, res2 in ((64, 256), (32, 32)):
        sizes = {"stem_out_channels": stem, "res2_out_channels": res2}
        tensors = ResNeXt(26, "32x1d", norm=norm, **sizes).state_dict()
        kept = {n: tensor for n, tensor in tensors.items() if not n.endswith("num_batches_tracked")}
        for kind in (torch.float32, torch.bfloat16):
            check_backbone({name: tensor.to(kind) for name, tensor in kept.items()})


def drop(pattern: str) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if re.search(pattern, name)]:
            del tensors[name]

    return change


def put(name: str, *shape: int) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


def fill(name: str, value: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[name].reshape(-1)[-1:].fill_(value)


def cast(name: str, kind: torch.dtype) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name].to(kind)})


MIDDLE = "res3.1.conv2"
WRONG: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "statistics": (
        drop(r"res3\.1\.conv2\.norm\.running"),
        r"lacks 2 tensors .* res3\.1\.conv2\.norm\.running_mean, res3\.1\.conv2\.norm\.running_var",
    ),
    "one bias": (drop(r"res3\.1\.conv2\.norm\.bias"), r"lacks 1 tensors .*conv2\.norm\.bias"),
    "convolution": (drop(r"res3\.1\.conv2\."), r"lacks 5 tensors .* res3\.1\.conv2\.weight"),
    "shortcut": (drop(r"res4\.0\.shortcut"), r"lacks 5 tensors .* res4\.0\.shortcut\.weight"),
    "stem": (drop("stem"), "not a backbone in a known layout"),
    "first block": (drop(r"res2\.0\."), "not a backbone in a known layout"),
    "last stage": (drop("res5"), r"lacks 20 tensors .* res5\.0\.shortcut\.weight"),
    "second shortcut": (
        put("res3.1.shortcut.weight", 16, 16, 1, 1),
        r"has 1 tensors that no ResNeXt has: res3\.1\.shortcut\.weight",
    ),
    "sixth stage": (put("res6.0.conv1.weight", 4, 4, 1, 1), r"no ResNeXt has: res6\.0\.conv1\.w"),
    "huge block": (put("res3.999999999.conv1.weight", 8, 16, 1, 1), r"lacks 15 .* res3\.2\.conv1"),
    "bias": (put("stem.conv1.bias", 4), r"no ResNeXt has: stem\.conv1\.bias"),
    "short norm": (put("res2.1.conv3.norm.bias", 7), r"norm\.bias has the shape \(7,\), .* \(8,\)"),
    "grey stem": (put("stem.conv1.weight", 4, 1, 7, 7), r"stem\.conv1\.weight has the shape"),
    "other width": (
        put("res4.0.conv2.weight", 16, 16, 3, 3),
        r"res4\.0\.conv2\.weight has the shape \(16, 16, 3, 3\), .* \(16, 8, 3, 3\)",
    ),
    "groups": (put("res2.0.conv2.weight", 4, 3, 3, 3), r"\(4, 3, 3, 3\) and is not a grouped"),
    "no groups": (put("res2.0.conv2.weight", 4, 0, 3, 3), r"\(4, 0, 3, 3\) and is not a grouped"),
    "NaN": (fill(f"{MIDDLE}.weight", float("nan")), rf"NaN or infinite .* {MIDDLE}\.weight"),
    "infinity": (fill(f"{MIDDLE}.norm.bias", float("-inf")), r"NaN or infinite .*norm\.bias"),
    "variance": (fill(f"{MIDDLE}.norm.running_var", -1e-3), rf"negative values in {MIDDLE}\.norm"),
    "integers": (cast(f"{MIDDLE}.weight", torch.int64), r"weight is of type int64"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refuses_incomplete_backbones(case: str, backbone: Tensors, tmp_path: Path) -> None:
    change, message = WRONG[case]
    change(backbone)
    torch.save(backbone, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=rf"weights\.pth: .*{message}"):
        read_backbone(tmp_path / "weights.pth")


# --- untrained values ---


def trained(norm: str = "BN") -> Tensors:
    tensors = ResNeXt(26, "32x1d", norm=norm, stem_out_channels=32, res2_out_channels=64)
    return {
        name: torch.rand_like(tensor) + 0.1
        for name, tensor in tensors.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize("norm", ["BN", "GN", "FrozenBN"])
def test_doubts_untrained_networks(norm: str) -> None:
    assert doubts(trained(norm)) is None
    tensors = trained(norm)
    tensors["res4.1.conv2.weight"].fill_(0.01)
    assert "1 convolutions are constant: res4.1.conv2" in (doubts(tensors) or "")
    sizes = {"stem_out_channels": 32, "res2_out_channels": 64}
    network = ResNeXt(26, "32x1d", norm=norm, zero_init_residual=norm != "FrozenBN", **sizes)
    found = re.search(r"(\d+) of (\d+) norms", doubts(network.state_dict()) or "")
    assert found and found[1] == found[2]


def test_reading_warns_of_zeros_but_not_of_fused_norms(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Fused norms have an initial mean and variance as well."""
    write_detectron2(
        read_backbone(save(tmp_path / "a.pkl", caffe2(small_network(), fused=True))),
        tmp_path / "b.pth",
    )
    read_backbone(tmp_path / "b.pth")
    assert "does not look like a trained network" not in caplog.text
    zeros = {name: torch.zeros_like(tensor) for name, tensor in trained().items()}
    torch.save(zeros, tmp_path / "zeros.pth")
    read_backbone(tmp_path / "zeros.pth")
    assert "zeros.pth does not look like a trained network" in caplog.text


# --- converted files ---


@pytest.mark.parametrize("form", FORMS)
def test_converting_twice_changes_nothing(form: str, tmp_path: Path) -> None:
    """Neither a bit nor the record."""
    source = save(tmp_path / "torchvision.pth", small_network().state_dict())
    weights = read_backbone(source)
    once, twice = tmp_path / "once.pth", tmp_path / "twice.pth"
    write_detectron2(weights, once, form)
    assert form_of(read_tensors(once)) == form
    again = read_backbone(once)
    assert (again.depth, again.template, again.layout) == (26, Template("8x4d"), "Detectron2")
    write_detectron2(again, twice, form)
    assert read_backbone(twice).record == again.record
    assert again.record is not None and again.record.source == "torchvision.pth"
    for file in (once, twice):
        found = read_backbone(file).tensors
        assert found.keys() == weights.tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in weights.tensors.items())


def test_converted_file_records_its_source(tmp_path: Path) -> None:
    file = save(tmp_path / "X-26.pkl", caffe2(small_network(), fused=True))
    odd = Pixels("BGR", 255, (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0))
    weights = read_backbone(file, odd)
    output = tmp_path / "converted.pth"
    write_detectron2(weights, output, published=entry("resnext50_32x4d.tv_in1k"))
    again = read_backbone(output)
    assert again.fused
    assert again.pixels == Pixels("BGR", 255, odd.mean, OURS.std)
    assert torch.equal(again.tensors["stem.conv1.weight"], weights.tensors["stem.conv1.weight"])
    record = again.record
    assert record is not None
    assert (record.source, record.layout, len(record.sha256)) == ("X-26.pkl", "Caffe2", 64)
    assert (record.depth, record.template) == (26, "8x4d")
    assert (record.licence, record.top1, record.top5) == ("BSD-3-Clause", 77.618, 93.698)


@pytest.mark.parametrize(
    "record", [{}, [1], "text", {"pixels": {"order": "RGB"}}, {"depth": 10**400, "source": "x"}]
)
def test_refuses_malformed_records(record: Any, tmp_path: Path) -> None:
    weights = read_backbone(save(tmp_path / "a.pth", small_network().state_dict()))
    file = save(tmp_path / "b.pth", {"model": dict(weights.tensors), "resnext_det": record})
    with pytest.raises(WeightsError, match=r"b\.pth: its record"):
        read_backbone(file)


def test_refuses_outputs_before_writing(tmp_path: Path) -> None:
    """The source itself, another suffix, a file as the folder, and weights without statistics."""
    file = save(tmp_path / "weights.pth", small_network().state_dict())
    before = file.read_bytes()
    weights = read_backbone(file)
    (tmp_path / "link.pth").symlink_to(file)
    with pytest.raises(WeightsError, match="is the source"):
        write_detectron2(weights, tmp_path / "link.pth")
    with pytest.raises(WeightsError, match="is the source"):
        convert_detector(file, tmp_path / "link.pth", "grouped")
    assert file.read_bytes() == before
    with pytest.raises(WeightsError, match="cannot be written"):
        write_detectron2(weights, file / "out.pth")
    with pytest.raises(WeightsError, match=r"must end in \.pth"):
        write_detectron2(weights, tmp_path / "out.pkl")
    norms = ResNeXt(26, "32x1d", norm="GN", stem_out_channels=32, res2_out_channels=64)
    torch.save(norms.state_dict(), tmp_path / "gn.pth")
    with pytest.raises(WeightsError, match="without running statistics"):
        write_detectron2(read_backbone(tmp_path / "gn.pth"), tmp_path / "out.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gn.pth", "link.pth", "weights.pth"]


def test_detector_round_trip(tmp_path: Path) -> None:
    """Same bits, names and types, without the optimizer's state."""
    words = ["MODEL.RESNETS.DEPTH", "26", "MODEL.RESNETS.NUM_GROUPS", "4", "MODEL.DEVICE", "cpu"]
    words += ["MODEL.FPN.OUT_CHANNELS", "8", "MODEL.ROI_BOX_HEAD.FC_DIM", "8"]
    cfg = load_config("faster_rcnn_X_50_32x4d_FPN_paper", words)
    model = unlike_fresh(build_model(cfg))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    file, there, back = (tmp_path / f"{name}.pth" for name in ("model_final", "there", "back"))
    torch.save({"model": state, "optimizer": {"state": {}}, "iteration": 3}, file)
    assert not holds_backbone(file)
    assert convert_detector(file, there, "aggregated") == len(read_tensors(there))
    assert form_of(read_tensors(there)) == "aggregated"
    assert convert_detector(there, back, "grouped") == len(state)
    final = read_tensors(back)
    assert final.keys() == state.keys()
    assert all(torch.equal(final[name], tensor) for name, tensor in state.items())
    assert all(final[name].dtype == tensor.dtype for name, tensor in state.items())
    fresh = build_model(cfg)
    DetectionCheckpointer(fresh).load(str(back))
    assert all(torch.equal(tensor, state[name]) for name, tensor in fresh.state_dict().items())


def test_refuses_incomplete_blocks(backbone: Tensors, tmp_path: Path) -> None:
    state = convert_form(backbone, "aggregated")
    lacking = {name: t for name, t in state.items() if name != "res3.1.paths.0.conv1.weight"}
    twice = {**state, "res3.1.conv2.weight": backbone["res3.1.conv2.weight"]}
    for tensors in (lacking, twice):
        torch.save(tensors, tmp_path / "backbone.pth")
        with pytest.raises(WeightsError, match=r"backbone\.pth: res3\.1: conv"):
            read_backbone(tmp_path / "backbone.pth")
        detector = {f"backbone.bottom_up.{name}": tensor for name, tensor in tensors.items()}
        torch.save(detector, tmp_path / "detector.pth")
        with pytest.raises(WeightsError, match=r"detector\.pth: backbone\.bottom_up\.res3\.1"):
            convert_detector(tmp_path / "detector.pth", tmp_path / "out.pth", "grouped")
    assert not (tmp_path / "out.pth").exists()
