"""The proof of a conversion: right ones pass it, and no wrong one does.

The truth is torchvision's network as it was before it was saved, taken apart by torchvision itself.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.transforms.functional import normalize, to_tensor

from resnext_det import ResNeXt
from resnext_det.errors import ConfigError, DatasetError, WeightsError
from resnext_det.modeling.forms import form_of
from resnext_det.weights import converting
from resnext_det.weights.catalog import entry
from resnext_det.weights.converting import read_backbone, write_detectron2
from resnext_det.weights.layouts import to_torchvision
from resnext_det.weights.pixels import OURS
from resnext_det.weights.reading import read_tensors
from resnext_det.weights.verifying import (
    TOLERANCE,
    StageDifference,
    Verification,
    default_image,
    image_of,
    network_of,
    verify,
)

STAGES = ("res2", "res3", "res4", "res5")
TOOL = Path(__file__).parents[2] / "tools" / "convert_weights.py"
IMAGE = default_image(96, 128)  # a small one, where the values are not looked at
Convert = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def network() -> ResNet:
    """A torchvision ResNeXt with statistics that are not those of a fresh one."""
    torch.manual_seed(7)
    source = ResNet(Bottleneck, [2, 2, 2, 2], 10, groups=8, width_per_group=4)
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.3, 0.7)
            nn.init.normal_(module.bias, std=0.1)
    return source.eval()


@pytest.fixture(scope="module")
def original(network: ResNet, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """The network's file, and what it is converted to."""
    folder = tmp_path_factory.mktemp("original")
    source, output = folder / "source.pth", folder / "converted.pth"
    torch.save(network.state_dict(), source)
    write_detectron2(read_backbone(source), output)
    return source, output.read_bytes()


@pytest.fixture
def converted(original: tuple[Path, bytes], tmp_path: Path) -> Convert:
    """Save a state dict and convert it; return both files."""

    def make(
        state: dict[str, Any] | None = None, form: str = "grouped", pixels: Any = None
    ) -> tuple[Path, Path]:
        source, output = original[0], tmp_path / "converted.pth"
        if state is not None:
            source = tmp_path / "source.pth"
            torch.save(state, source)
        if (state, form, pixels) == (None, "grouped", None):
            output.write_bytes(original[1])
        else:
            write_detectron2(read_backbone(source, pixels), output, form)
        return source, output

    return make


def prefixed(network: ResNet, others: dict[str, Tensor]) -> dict[str, Any]:
    state = network.state_dict()
    inner = {f"backbone.{name}": t for name, t in state.items() if not name.startswith("fc.")}
    return {"meta": {}, "state_dict": {**inner, **others}}


def without(network: ResNet, *ends: str) -> dict[str, Tensor]:
    return {name: t for name, t in network.state_dict().items() if not name.endswith(ends)}


def as_type(tensor: Tensor, kind: torch.dtype) -> Tensor:
    return tensor.to(kind) if tensor.is_floating_point() else tensor


LAYOUTS: dict[str, Callable[[ResNet], dict[str, Any]]] = {
    "torchvision": lambda net: net.state_dict(),
    "without a classifier and counters": lambda net: without(
        net, "fc.weight", "fc.bias", "num_batches_tracked"
    ),
    "parallel": lambda net: {f"module.{name}": t for name, t in net.state_dict().items()},
    "half precision": lambda net: {
        n: as_type(t, torch.float16) for n, t in net.state_dict().items()
    },
    "double precision": lambda net: {
        n: as_type(t, torch.float64) for n, t in net.state_dict().items()
    },
    "mmpretrain": lambda net: prefixed(net, {"head.fc.weight": torch.ones(3, 2048)}),
    "mmdetection": lambda net: prefixed(net, {"neck.lateral_convs.0.conv.weight": torch.ones(1)}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_right_passes(layout: str, network: ResNet, converted: Convert) -> None:
    source, output = converted(LAYOUTS[layout](network))
    found = verify(source, output, IMAGE)
    assert found.agrees
    found.check()
    assert [each.stage for each in found.stages] == list(STAGES)
    assert all(each.relative < 1e-5 for each in found.stages)


@pytest.mark.parametrize("program", ["torchvision", "timm"])
def test_the_values_are_those_of_the_network_that_was_saved(
    program: Any, network: ResNet, converted: Convert
) -> None:
    """Not zeros compared with zeros, nor an image that another program would not see so."""
    found = verify(*converted(), program=program)
    nodes = {f"layer{number}": stage for number, stage in enumerate(STAGES, start=1)}
    image = normalize(to_tensor(default_image()), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.inference_mode():
        truth = create_feature_extractor(network, nodes)(image[None])
    assert found.network.startswith(f"{program} ")
    assert (found.height, found.width) == (224, 256)
    for each in found.stages:
        assert each.largest == pytest.approx(float(truth[each.stage].abs().max()), rel=1e-5)


@pytest.mark.parametrize("form", ["concatenated", "aggregated"])
def test_every_form_is_run_as_it_is_in_the_file(form: str, converted: Convert) -> None:
    source, output = converted(form=form)
    written = read_tensors(output)
    assert network_of(read_backbone(output), written).form == form_of(written) == form
    assert verify(source, output, IMAGE).agrees
    content = torch.load(output)
    content["model"]["res4.1.paths.3.conv2.weight"] *= 1.1
    torch.save(content, output)
    assert [each.relative < TOLERANCE for each in verify(source, output, IMAGE).stages] == [
        *(True, True, False, False)
    ]


def swap(first: str, second: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        tensors = content["model"]
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return change


def set_tensor(name: str, new: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["model"].update({name: new(content["model"][name])})


def set_record(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["resnext_det"].update(fields)


def set_pixels(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["resnext_det"]["pixels"].update(fields)


def halve(content: dict[str, Any]) -> None:
    tensors = content["model"]
    tensors.update({n: t.half().float() for n, t in tensors.items()})


WRONG: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "two convolutions swapped": (swap("res3.0.conv3.weight", "res3.1.conv3.weight"), "res3"),
    "two means swapped": (
        swap("res5.0.conv1.norm.running_mean", "res5.1.conv1.norm.running_mean"),
        "res5",
    ),
    "mean and bias swapped": (
        swap("res5.1.conv3.norm.running_mean", "res5.1.conv3.norm.bias"),
        "res5",
    ),
    "a bias that is lower": (set_tensor("res5.1.conv3.norm.bias", lambda t: t - 1), "res5"),
    "RGB not flipped": (set_tensor("stem.conv1.weight", lambda t: t.flip(1)), "res2"),
    "groups in another order": (
        set_tensor("res4.0.conv2.weight", lambda t: t.roll(4, 0)),
        "res4",
    ),
    "stride on the wrong side": (set_record(stride_in_1x1=True), "res3"),
    "another mean": (set_pixels(mean=(102.9801, 115.9465, 122.7717)), "res2"),
    "another std": (set_pixels(std=(1.0, 1.0, 1.0)), "res2"),
    "another order": (set_pixels(order="RGB"), "res2"),
    "half precision": (halve, "res2"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_what_is_wrong_does_not_pass(mistake: str, converted: Convert) -> None:
    change, stage = WRONG[mistake]
    source, output = converted()
    content = torch.load(output)
    change(content)
    torch.save(content, output)
    found = verify(source, output, IMAGE)
    assert not found.agrees
    with pytest.raises(
        WeightsError, match=rf"converted\.pth does not .*source\.pth .* after {stage} "
    ):
        found.check()


def test_the_file_of_another_network_does_not_pass(
    original: tuple[Path, bytes], tmp_path: Path
) -> None:
    narrow = ResNeXt(26, "2x2d", norm="BN", stem_out_channels=8, res2_out_channels=16)
    other, output = tmp_path / "other.pth", tmp_path / "converted.pth"
    torch.save(to_torchvision(narrow.state_dict()), other)
    write_detectron2(read_backbone(other), output)
    found = verify(original[0], output, IMAGE)
    assert not found.agrees
    with pytest.raises(WeightsError, match="after res2 the largest difference is inf"):
        found.check()


@pytest.mark.parametrize(
    ("difference", "largest", "agrees"),
    [
        *((9.9e-5, 1.0, True), (1.01e-4, 1.0, False), (9.9e-3, 100.0, True)),
        *((0.0, 0.0, False), (float("nan"), 1.0, False), (float("nan"), float("nan"), False)),
        (float("inf"), 1.0, False),
    ],
)
def test_the_tolerance_is_of_the_largest_value(
    difference: float, largest: float, agrees: bool
) -> None:
    """Nothing but zeros, or NaN in both networks, is no proof."""
    right = StageDifference("res2", 0.0, 1.0)
    stages = (right, StageDifference("res3", difference, largest), right)
    file = Path("file")
    found = Verification(file, file, "torchvision", 1, 1, stages, TOLERANCE)
    assert found.agrees == agrees


def test_a_network_that_gives_zeros_alone_proves_nothing(
    network: ResNet, converted: Convert
) -> None:
    zeros = {name: torch.zeros_like(t) for name, t in network.state_dict().items()}
    assert not verify(*converted(zeros), IMAGE).agrees


def test_pixels_that_the_layout_does_not_tell(converted: Convert) -> None:
    """Torchvision's names, but BGR: such a file is in the catalog."""
    assert verify(*converted(pixels=OURS), IMAGE, pixels=OURS).agrees
    assert not verify(*converted(pixels=OURS), IMAGE).agrees
    assert not verify(*converted(), IMAGE, pixels=OURS).agrees


def test_what_no_network_takes_is_said(network: ResNet, converted: Convert) -> None:
    _, output = converted()
    source = output.with_name("source.pth")
    narrow = ResNeXt(26, "2x2d", norm="BN", stem_out_channels=8, res2_out_channels=16)
    torch.save(to_torchvision(narrow.state_dict()), source)
    with pytest.raises(
        WeightsError, match=r"source\.pth is no network that torchvision has.*conv1"
    ):
        verify(source, output, IMAGE)
    torch.save(without(network, "layer4.1.bn3.running_var"), source)
    with pytest.raises(WeightsError, match=r"Missing key.*layer4\.1\.bn3\.running_var"):
        verify(source, output, IMAGE)
    for name in ("bn1.bias", "layer1.0.conv2.weight"):
        torch.save({**network.state_dict(), name: torch.ones(32)}, source)
        with pytest.raises(WeightsError, match=r"source\.pth"):
            verify(source, output, IMAGE)
    torch.save({"weight": torch.ones(1)}, source)
    with pytest.raises(WeightsError, match=r"source\.pth: it has the layout of no backbone"):
        verify(source, output, IMAGE)
    with pytest.raises(WeightsError, match=r"Detectron2's layout, .* have no network"):
        verify(output, output)


def test_a_file_without_a_record_is_no_converted_one(converted: Convert) -> None:
    source, output = converted()
    content = torch.load(output)
    del content["resnext_det"]
    torch.save(content, output)
    with pytest.raises(WeightsError, match=r"converted\.pth does not say what it takes"):
        verify(source, output, IMAGE)


def test_a_program_that_is_not_there(converted: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    files = converted()
    with pytest.raises(ConfigError, match=r"no network of 'keras'; there are torchvision, timm"):
        verify(*files, program="keras")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(WeightsError, match="timm is not installed"):
        verify(*files, program="timm")


def test_the_generated_image_tells_sides_and_colours_apart() -> None:
    image = default_image()
    assert image.shape == (224, 256, 3)
    assert image.dtype == np.uint8
    assert np.array_equal(image, default_image())
    smooth = image.astype(float)
    for turned in (smooth[::-1], smooth[:, ::-1], smooth[..., ::-1]):
        assert np.abs(turned - smooth).mean() > 40


def test_an_image_of_ones_own(tmp_path: Path, converted: Convert) -> None:
    Image.fromarray(default_image(40, 72)[..., 0]).save(tmp_path / "grey.png")
    grey = image_of(tmp_path / "grey.png")
    assert grey.shape == (40, 72, 3)
    found = verify(*converted(), grey)
    assert found.agrees
    assert (found.height, found.width) == (40, 72)
    Image.new("RGB", (3000, 1500)).save(tmp_path / "large.png")
    assert image_of(tmp_path / "large.png").shape == (512, 1024, 3)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match=r"broken\.jpg cannot be read"):
        image_of(tmp_path / "broken.jpg")


# --- the command ---


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Run the command in this process."""
    monkeypatch.setattr(sys, "argv", [TOOL.name, *(str(word) for word in arguments)])
    runpy.run_path(str(TOOL), run_name="__main__")


@pytest.fixture
def source(original: tuple[Path, bytes]) -> Path:
    return original[0]


def test_the_command_prints_every_stage(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    output = tmp_path / "out.pth"
    run(monkeypatch, source, output, "--verify", "--with", "timm", "--form", "aggregated")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ResNeXt-26 8x4d (torchvision layout): 145 tensors converted")
    assert "a generated image (256 x 224) in timm" in "\n".join(lines)
    found = verify(source, output, program="timm")
    rows = [line.split() for line in lines if line.startswith("res")]
    assert [row[0] for row in rows] == list(STAGES)
    assert [float(row[2]) for row in rows] == [
        pytest.approx(each.largest, rel=1e-3) for each in found.stages
    ]
    assert all(float(row[1]) < 1e-5 for row in rows)
    assert lines[-1].startswith("Verified: no stage differs by more than 0.0001")


def test_a_wrong_conversion_leaves_no_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(converting, "fold", lambda stem, pixels: (stem, OURS))  # RGB stays RGB
    output = tmp_path / "out.pth"
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, source, output, "--verify")
    error = capsys.readouterr().err
    assert error.startswith(f"error: {output} does not compute what {source} does in torchvision")
    assert "after res2" in error
    assert error.endswith("It was removed.\n")
    assert not output.exists()


def test_without_a_network_to_compare_with_the_file_is_written(
    converted: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    first, second = converted()[1], tmp_path / "second.pth"
    for arguments in ([first, second], [first, second, "--form", "concatenated"]):
        with pytest.raises(SystemExit, match="2"):
            run(monkeypatch, *arguments, "--verify")
        error = capsys.readouterr().err
        assert error.startswith(f"error: {second} was written but not verified: {first} is")
        assert len(read_backbone(second).tensors) == 145
        second.unlink()


def test_a_whole_detector_is_converted_and_not_compared(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    backbone = read_backbone(source).tensors
    file, output = tmp_path / "detector.pth", tmp_path / "out.pth"
    torch.save({f"backbone.bottom_up.{name}": t for name, t in backbone.items()}, file)
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, file, output, "--form", "aggregated", "--verify")
    assert "not verified" in capsys.readouterr().err
    assert form_of(read_tensors(output)) == "aggregated"


def test_a_file_of_the_catalog_is_read_as_the_catalog_says(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Its names are torchvision's, and it takes BGR."""
    known = entry("resnext101_32x8d.open_mmlab_d2_in1k")
    monkeypatch.setattr("resnext_det.weights.catalog.of_file", lambda file: known)
    output = tmp_path / "out.pth"
    Image.fromarray(default_image(40, 72)).save(tmp_path / "own.png")
    run(monkeypatch, source, output, "--verify", "--image", tmp_path / "own.png")
    printed = capsys.readouterr().out
    assert f"made from {known.name} of the catalog" in printed
    assert "own.png (72 x 40) in torchvision" in printed
    record = read_backbone(output).record
    assert record is not None and record.name == known.name
    stem = torch.load(source, weights_only=True)["conv1.weight"]
    assert torch.equal(read_backbone(output).tensors["stem.conv1.weight"], stem)


def test_flags_that_go_with_verify_alone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, source, tmp_path / "out.pth", "--with", "timm")
    assert "--with and --image are for --verify" in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()
