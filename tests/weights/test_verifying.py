"""Verification passes correct conversions and fails wrong ones.

The truth is torchvision's network before it was saved, with torchvision's own feature extractor.
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
from torch import Tensor
from torchvision.models.feature_extraction import create_feature_extractor
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
    Verification,
    default_image,
    image_of,
    network_of,
    verify,
)
from tests.helpers.written_sources import mmdetection, mmpretrain, network, prefixed

STAGES = ("res2", "res3", "res4", "res5")
TOOL = Path(__file__).parents[2] / "tools" / "convert_weights.py"
IMAGE = default_image(96, 128)  # small, for tests that do not compare values
Convert = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """The network's file, and the content of the converted file."""
    folder = tmp_path_factory.mktemp("original")
    source, output = folder / "source.pth", folder / "converted.pth"
    torch.save(network().state_dict(), source)
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


def as_type(tensor: Tensor, kind: torch.dtype) -> Tensor:
    return tensor.to(kind) if tensor.is_floating_point() else tensor


LAYOUTS: dict[str, Callable[[], dict[str, Any]]] = {
    "torchvision": lambda: network().state_dict(),
    "parallel": lambda: prefixed(network(), "module."),
    "half precision": lambda: {
        name: as_type(t, torch.float16) for name, t in network().state_dict().items()
    },
    "mmpretrain": lambda: mmpretrain(network().state_dict()),
    "mmdetection": lambda: mmdetection(network().state_dict()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_right_conversions_pass(layout: str, converted: Convert) -> None:
    found = verify(*converted(LAYOUTS[layout]()), IMAGE)
    assert found.wrong is None
    assert tuple(found.stages) == STAGES
    assert all(difference < 1e-5 * largest for difference, largest in found.stages.values())


@pytest.mark.parametrize("program", ["torchvision", "timm"])
def test_values_are_those_of_the_saved_network(program: Any, converted: Convert) -> None:
    """Otherwise zeros might be compared with zeros."""
    found = verify(*converted(), program=program)
    nodes = {f"layer{number}": stage for number, stage in enumerate(STAGES, start=1)}
    image = normalize(to_tensor(default_image()), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.inference_mode():
        truth = create_feature_extractor(network(), nodes)(image[None])
    assert found.network.startswith(f"{program} ")
    assert found.size == (256, 224)
    for stage, (_, largest) in found.stages.items():
        assert largest == pytest.approx(float(truth[stage].abs().max()), rel=1e-5)


@pytest.mark.parametrize("form", ["concatenated", "aggregated"])
def test_every_form_is_run_as_written(form: str, converted: Convert) -> None:
    source, output = converted(form=form)
    written = read_tensors(output)
    assert network_of(read_backbone(output), written).form == form_of(written) == form
    assert verify(source, output, IMAGE).wrong is None
    content = torch.load(output)
    content["model"]["res4.1.paths.3.conv2.weight"] *= 1.1
    torch.save(content, output)
    assert verify(source, output, IMAGE).wrong == "res4"


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
    "mean and bias swapped": (
        swap("res5.1.conv3.norm.running_mean", "res5.1.conv3.norm.bias"),
        "res5",
    ),
    "lower bias": (set_tensor("res5.1.conv3.norm.bias", lambda t: t - 1), "res5"),
    "RGB not flipped": (set_tensor("stem.conv1.weight", lambda t: t.flip(1)), "res2"),
    "groups in another order": (
        set_tensor("res4.0.conv2.weight", lambda t: t.roll(4, 0)),
        "res4",
    ),
    "stride on the wrong side": (set_record(stride_in_1x1=True), "res3"),
    "another mean": (set_pixels(mean=(102.9801, 115.9465, 122.7717)), "res2"),
    "half precision": (halve, "res2"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_conversions_fail(mistake: str, converted: Convert) -> None:
    change, stage = WRONG[mistake]
    source, output = converted()
    content = torch.load(output)
    change(content)
    torch.save(content, output)
    assert verify(source, output, IMAGE).wrong == stage


def test_another_network_fails(original: tuple[Path, bytes], tmp_path: Path) -> None:
    narrow = ResNeXt(26, "2x2d", norm="BN", stem_out_channels=8, res2_out_channels=16)
    other, output = tmp_path / "other.pth", tmp_path / "converted.pth"
    torch.save(to_torchvision(narrow.state_dict()), other)
    write_detectron2(read_backbone(other), output)
    found = verify(original[0], output, IMAGE)
    assert found.wrong == "res2" and found.stages["res2"][0] == float("inf")


@pytest.mark.parametrize(
    ("difference", "largest", "agrees"),
    [
        *((9.9e-5, 1.0, True), (1.01e-4, 1.0, False), (9.9e-3, 100.0, True)),
        *((0.0, 0.0, False), (float("nan"), 1.0, False), (float("nan"), float("nan"), False)),
        (float("inf"), 1.0, False),
    ],
)
def test_tolerance_is_relative(difference: float, largest: float, agrees: bool) -> None:
    """Only zeros, or NaN in both networks, is no proof."""
    stages = {"res2": (0.0, 1.0), "res3": (difference, largest)}
    assert (Verification("torchvision", (1, 1), stages).wrong is None) == agrees


def test_pixels_unusual_for_the_layout(converted: Convert) -> None:
    """BGR under torchvision's names, as in one file of the catalog."""
    assert verify(*converted(pixels=OURS), IMAGE, pixels=OURS).wrong is None
    assert verify(*converted(pixels=OURS), IMAGE).wrong
    assert verify(*converted(), IMAGE, pixels=OURS).wrong


def test_refuses_files_that_cannot_be_compared(
    converted: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = converted()
    source, output = files[1].with_name("source.pth"), files[1]
    narrow = ResNeXt(26, "2x2d", norm="BN", stem_out_channels=8, res2_out_channels=16)
    torch.save(to_torchvision(narrow.state_dict()), source)
    with pytest.raises(WeightsError, match=r"source\.pth is not a network that torchvision has"):
        verify(source, output, IMAGE)
    torch.save({**network().state_dict(), "layer1.0.conv2.weight": torch.ones(32)}, source)
    with pytest.raises(WeightsError, match=r"source\.pth is not a network.*conv2\.weight"):
        verify(source, output, IMAGE)
    torch.save({"weight": torch.ones(1)}, source)
    with pytest.raises(WeightsError, match=r"source\.pth: it is not a backbone"):
        verify(source, output, IMAGE)
    with pytest.raises(WeightsError, match=r"Detectron2's layout, .* have no network"):
        verify(output, output)
    content = torch.load(output)
    torch.save({**content, "resnext_det": None}, output)
    with pytest.raises(WeightsError, match="does not say which pixels it expects"):
        verify(files[0], output, IMAGE)
    with pytest.raises(ConfigError, match="no network of 'keras'; choose torchvision or timm"):
        verify(*files, program="keras")  # type: ignore[arg-type]
    torch.save(content, output)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(WeightsError, match="timm is not installed"):
        verify(*files, program="timm")


def test_images(tmp_path: Path, converted: Convert) -> None:
    image = default_image()
    assert image.shape == (224, 256, 3) and np.array_equal(image, default_image())
    smooth = image.astype(float)
    for turned in (smooth[::-1], smooth[:, ::-1], smooth[..., ::-1]):
        assert np.abs(turned - smooth).mean() > 40
    Image.fromarray(default_image(40, 72)[..., 0]).save(tmp_path / "grey.png")
    found = verify(*converted(), image_of(tmp_path / "grey.png"))
    assert found.wrong is None and found.size == (72, 40)
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


def test_command_prints_every_stage(
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
        pytest.approx(largest, rel=1e-3) for _, largest in found.stages.values()
    ]
    assert all(float(row[1]) < 1e-5 for row in rows)
    assert lines[-1].startswith("Verified: no stage differs by more than 0.0001")


def test_command_removes_a_wrong_conversion(
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


def test_command_keeps_unverified_files(
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


def test_command_reads_a_file_as_the_catalog_says(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Its names are torchvision's, and it expects BGR."""
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


def test_command_refuses_flags_without_verify(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, source, tmp_path / "out.pth", "--with", "timm")
    assert "--with and --image are for --verify" in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()
