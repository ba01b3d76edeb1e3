"""Top-1 and top-5 against torchvision's network, preprocessing and folders."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.datasets.folder import default_loader
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.transforms._presets import ImageClassification

from resnext_det import ResNeXt
from resnext_det.data.classification import Preprocessing
from resnext_det.errors import ConfigError, DatasetError, WeightsError
from resnext_det.evaluation.classification import evaluate, load_classifier, validation_images
from resnext_det.weights import catalog
from resnext_det.weights.catalog import Accuracy, Checksum, entry
from resnext_det.weights.converting import read_backbone, write_detectron2
from tests.helpers.written_sources import WRITERS, caffe2, save

TOOL = Path(__file__).parents[2] / "tools" / "eval_imagenet.py"
CLASSES = 10
SMALL = {"resize": 72, "crop": 64}
PRESET = ImageClassification(crop_size=64, resize_size=72)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes with one to three images each: JPEG, PNG, grey, CMYK, RGBA."""
    root = tmp_path_factory.mktemp("val")
    number = 0
    for label in range(CLASSES):
        (root / f"class_{label}").mkdir()
        for _ in range(1 + label % 3):
            coarse = np.random.default_rng(number).integers(0, 256, (3, 4, 4), dtype=np.uint8)
            size = (100 + 7 * number, 80) if number % 2 else (76, 90 + 5 * number)
            image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
            image = image.convert(("RGB", "RGB", "L", "CMYK", "RGBA")[number % 5])
            suffix = "png" if number % 5 == 4 else "JPEG"
            image.save(root / f"class_{label}" / f"{number:02}.{suffix}")
            number += 1
    return root


def files(folder: Path) -> list[tuple[Path, int]]:
    return [(file, int(file.parent.name[6:])) for file in sorted(folder.glob("*/*"))]


def batch(folder: Path) -> Tensor:
    return torch.stack([PRESET(default_loader(str(file))) for file, _ in files(folder)])


@pytest.fixture(scope="module")
def network(folder: Path) -> ResNet:
    """A torchvision ResNeXt whose scores differ from image to image."""
    torch.manual_seed(3)
    source = ResNet(Bottleneck, [2, 2, 2, 2], CLASSES, groups=8, width_per_group=4)
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias, std=0.1)
    source.eval()
    pooled: list[Tensor] = []
    handle = source.avgpool.register_forward_hook(lambda *a: pooled.append(a[2].flatten(1)))
    with torch.no_grad():
        source(batch(folder))
        handle.remove()
        source.fc.weight.normal_(std=(1 / pooled[0].std(0).square().sum().sqrt()).item())
        source.fc.bias.copy_(-source.fc.weight @ pooled[0].mean(0))
    return source


@pytest.fixture(scope="module")
def checkpoint(network: ResNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("checkpoint") / "weights.pth", network.state_dict())


@pytest.fixture(scope="module")
def truth(network: ResNet, folder: Path) -> Tensor:
    """Scores by torchvision alone."""
    with torch.inference_mode():
        scores: Tensor = network(batch(folder))
    return scores


def percent(scores: Tensor, folder: Path) -> tuple[float, float]:
    labels = [label for _, label in files(folder)]
    order = [row.argsort(descending=True).tolist() for row in scores]
    first = sum(label == found[0] for label, found in zip(labels, order))
    five = sum(label in found[:5] for label, found in zip(labels, order))
    return 100 * first / len(labels), 100 * five / len(labels)


def test_same_figures_as_torchvision(checkpoint: Path, folder: Path, truth: Tensor) -> None:
    top1, top5 = percent(truth, folder)
    assert 0 < top1 < top5 < 100
    for batch_size, workers in ((7, 0), (64, 1)):
        found = evaluate(
            *(str(checkpoint), folder),
            **SMALL,
            batch_size=batch_size,
            workers=workers,
            device="cpu",
        )
        assert (found["top1"], found["top5"], found["images"]) == (top1, top5, 19)


@torch.inference_mode()
def test_same_scores_as_torchvision_in_every_layout(
    network: ResNet, folder: Path, truth: Tensor, tmp_path: Path
) -> None:
    images: Any = validation_images(folder, CLASSES, Preprocessing(**SMALL))
    cut = torch.stack([images[number][0][0] for number in range(len(images))])
    kinds = [WRITERS[name] for name in ("torchvision", "mmpretrain", "cadene", "caffe2")]
    for number, (name, _, write) in enumerate(kinds):
        file = save(tmp_path / f"{number} {name}", write(network))
        weights, ours, classes = load_classifier(file)
        assert classes == CLASSES and weights.pixels is not None
        scores = ours(weights.pixels.normalize(cut))["linear"]
        assert float((scores - truth).abs().max()) < 1e-4 * max(1, float(truth.abs().max()))
    content = caffe2(network, fused=True)
    content["blobs"]["pred_w"] = content["blobs"]["pred_w"][:, :, None, None]  # a convolution
    assert load_classifier(save(tmp_path / "X-26.pkl", content))[2] == CLASSES


def test_refuses_files_that_cannot_classify(checkpoint: Path, tmp_path: Path) -> None:
    write_detectron2(read_backbone(checkpoint), tmp_path / "converted.pth")
    with pytest.raises(WeightsError, match="evaluate the file they were made from"):
        load_classifier(tmp_path / "converted.pth")
    sizes = {"stem_out_channels": 8, "res2_out_channels": 16}
    torch.save(ResNeXt(26, "2x2d", num_classes=4, **sizes).state_dict(), tmp_path / "d2.pth")
    with pytest.raises(WeightsError, match="does not say which pixels"):
        load_classifier(tmp_path / "d2.pth")
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "fc.weight": torch.ones(10, 64)}, tmp_path / "shape.pth")
    with pytest.raises(WeightsError, match="does not fit"):
        load_classifier(tmp_path / "shape.pth")


def test_refuses_broken_images_and_scores(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    for file, _ in files(folder):
        (tmp_path / file.parent.name).mkdir(exist_ok=True)
        (tmp_path / file.parent.name / file.name).write_bytes(file.read_bytes())
    broken = files(tmp_path)[12][0]
    broken.write_bytes(broken.read_bytes()[:-600])
    with pytest.raises(DatasetError, match=r"12\.JPEG cannot be read"):
        evaluate(str(checkpoint), tmp_path, **SMALL, workers=1, device="cpu")
    state = torch.load(checkpoint, weights_only=True)
    state["fc.weight"] = torch.full_like(state["fc.weight"], 3e38)
    torch.save(state, tmp_path / "infinite.pth")
    with pytest.raises(WeightsError, match="NaN or infinite"):
        evaluate(str(tmp_path / "infinite.pth"), folder, **SMALL, device="cpu")


def test_classes_come_from_folders(folder: Path, tmp_path: Path) -> None:
    for number in range(11):
        (tmp_path / "numbers" / str(number)).mkdir(parents=True)
        Image.new("L", (80, 80), number).save(tmp_path / "numbers" / str(number) / "a.png")
    images: Any = validation_images(tmp_path / "numbers", 11, Preprocessing(**SMALL))
    assert all(int(images[n][0][0, 0, 0, 0]) == images[n][1] for n in range(11))
    with pytest.raises(DatasetError, match=r"10 folders .* 11 classes"):
        validation_images(folder, 11, Preprocessing())
    with pytest.raises(DatasetError, match="does not have one folder of images for each class"):
        validation_images(tmp_path / "none", 11, Preprocessing())


def test_limit_is_evenly_spread(folder: Path) -> None:
    everything = [label for _, label in files(folder)]
    images: Any = validation_images(folder, CLASSES, Preprocessing(**SMALL), 5)
    assert [images[n][1] for n in range(len(images))] == [everything[n * 19 // 5] for n in range(5)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"resize": 223, "crop": 224}, "--resize is 223 and --crop is 224"),
        ({"resize": 0}, "--resize is 0"),
        ({"limit": 0}, "--limit is 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"device": "nonsense"}, "cannot be used"),
    ],
)
def test_refuses_impossible_settings(
    words: dict[str, Any], said: str, checkpoint: Path, folder: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        evaluate(str(checkpoint), folder, **{"resize": 72, "crop": 64, **words})


def test_command_compares_with_published_figures(
    checkpoint: Path,
    folder: Path,
    truth: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    """Images are cut as for the published figures; the file is in the cache already."""
    name = "resnext26_8x4d.test_in1k"
    digits = hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:8]
    made = dataclasses.replace(
        entry("resnext50_32x4d.tv_in1k"),
        name=name,
        url=f"https://example.org/weights-{digits}.pth",
        checksum=Checksum(digits),
        accuracy=Accuracy(50, 90, "somebody", 72, 64, "bilinear"),
    )
    monkeypatch.setitem(catalog.ENTRIES, name, made)  # type: ignore[arg-type]
    monkeypatch.setenv("RESNEXT_DET_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / name).mkdir(parents=True)
    (tmp_path / "cache" / name / made.file_name).write_bytes(checkpoint.read_bytes())
    top1, _ = percent(truth, folder)
    for weights in (name, f"resnext://{name}", checkpoint):
        words = ["--weights", weights, "--data", folder, "--json", tmp_path / "score.json"]
        monkeypatch.setattr(sys, "argv", [TOOL.name, *map(str, words), "--workers", "0"])
        runpy.run_path(str(TOOL), run_name="__main__")
        printed = capsys.readouterr().out
        assert "19 images, resize 72, crop 64, interpolation bilinear" in printed
        assert [line.split() for line in printed.splitlines() if line.startswith("top1")] == [
            ["top1", f"{top1:.3f}", "50"]
        ]
        document = json.loads((tmp_path / "score.json").read_text())
        assert document["published"] == {"top1": 50, "top5": 90}
        assert document["top1"] == pytest.approx(top1)
