"""Top-1 and top-5 against torchvision's network, preprocessing and folders; timm's for bicubic."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import logging
import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform
from torch import Tensor, nn
from torchvision.datasets.folder import default_loader
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.transforms._presets import ImageClassification

from resnext_det import ResNeXt
from resnext_det.errors import ConfigError, DatasetError, WeightsError
from resnext_det.weights import catalog
from resnext_det.weights.catalog import Accuracy, Checksum, Entry, entry
from resnext_det.weights.classifier import Classifier, load_classifier, locate
from resnext_det.weights.converting import read_backbone, write_detectron2
from resnext_det.weights.imagenet import (
    Evaluation,
    Score,
    choose_device,
    measure,
    wilson_interval,
)
from resnext_det.weights.imagenet_images import (
    Preprocessing,
    class_numbers,
    open_image,
    validation_images,
)
from resnext_det.weights.layouts import to_detectron2
from resnext_det.weights.pixels import CAFFE2, IMAGENET, Pixels
from resnext_det.weights.verifying import network_input, network_of

TOOL = Path(__file__).parents[2] / "tools" / "eval_imagenet.py"
CLASSES = 10
SMALL = Preprocessing(72, 64, "bilinear")
NAME = "resnext26_8x4d.test_in1k"
RGB = entry("resnext50_32x4d.tv_in1k")


def neighbour(name: str) -> ModuleType:
    """A test module beside this one, for its writers: tests are no package to import from."""
    spec = importlib.util.spec_from_file_location(f"of_{name}", Path(__file__).with_name(name))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def picture(number: int) -> Image.Image:
    """Another image for each number, none of them square, of five kinds."""
    generator = np.random.default_rng(number)
    coarse = generator.integers(0, 256, (3, 4, 4), dtype=np.uint8)
    size = (100 + 7 * number, 80) if number % 2 else (76, 90 + 5 * number)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    return image.convert(("RGB", "RGB", "L", "CMYK", "RGB")[number % 5])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes with one to three images each: JPEG, PNG, grey, CMYK, RGBA."""
    root = tmp_path_factory.mktemp("val")
    number = 0
    for label in range(CLASSES):
        place = root / f"class_{label}"
        place.mkdir()
        for _ in range(1 + label % 3):
            image = picture(number)
            if number % 5 == 4:
                image.putalpha(Image.linear_gradient("L").resize(image.size))
                image.save(place / f"{number:02}.png")
            else:
                image.save(place / f"{number:02}.JPEG", quality=95)
            number += 1
    return root


def files(folder: Path) -> list[tuple[Path, int]]:
    """All images with their classes, in the order of their names."""
    return [(file, int(file.parent.name[6:])) for file in sorted(folder.glob("*/*"))]


def batch(folder: Path, preset: Callable[[Image.Image], Tensor]) -> Tensor:
    return torch.stack([preset(default_loader(str(file))) for file, _ in files(folder)])


@pytest.fixture(scope="module")
def network(folder: Path) -> ResNet:
    """A torchvision ResNeXt whose answers differ from image to image."""
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
        source(batch(folder, ImageClassification(crop_size=64, resize_size=72)))
        handle.remove()
        source.fc.weight.normal_(std=(1 / pooled[0].std(0).square().sum().sqrt()).item())
        source.fc.bias.copy_(-source.fc.weight @ pooled[0].mean(0))
    return source


@pytest.fixture(scope="module")
def checkpoint(network: ResNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("checkpoint") / "weights.pth"
    torch.save(network.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def truth(network: ResNet, folder: Path) -> Tensor:
    """Scores by torchvision alone."""
    with torch.inference_mode():
        scores: Tensor = network(batch(folder, ImageClassification(crop_size=64, resize_size=72)))
    return scores


def counted(scores: Tensor, folder: Path) -> Score:
    labels = [label for _, label in files(folder)]
    order = [row.argsort(descending=True).tolist() for row in scores]
    first = sum(label == found[0] for label, found in zip(labels, order))
    five = sum(label in found[:5] for label, found in zip(labels, order))
    return Score(len(labels), first, five)


@torch.inference_mode()
def scores_of(classifier: Classifier, folder: Path) -> Tensor:
    images = validation_images(folder, classifier.classes, SMALL)
    cut = torch.stack([images[number][0] for number in range(len(files(folder)))])
    scores: Tensor = classifier.network(network_input(cut, classifier.pixels))["linear"]
    return scores


def assert_same_scores(got: Tensor, expected: Tensor) -> None:
    assert float((got - expected).abs().max()) < 1e-4 * max(1, float(expected.abs().max()))


def test_scores_and_counts_are_torchvisions(checkpoint: Path, folder: Path, truth: Tensor) -> None:
    answers = truth.argmax(1)
    assert len(answers.unique()) > 3  # or the counts would say little
    classifier = load_classifier(checkpoint)
    assert classifier.classes == CLASSES
    assert_same_scores(scores_of(classifier, folder), truth)
    expected = counted(truth, folder)
    assert 0 < expected.right < expected.right_of_five < expected.images
    images = validation_images(folder, CLASSES, SMALL)
    for batch_size, workers in ((7, 0), (64, 1)):
        got = measure(classifier, images, batch_size=batch_size, workers=workers, device="cpu")
        assert got == expected


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_images_are_cut_as_timm_cuts_them(interpolation: str, folder: Path) -> None:
    timms = create_transform(
        64, interpolation=interpolation, crop_pct=64 / 72, mean=IMAGENET.mean, std=IMAGENET.std
    )
    ours = Preprocessing(72, 64, interpolation)
    for file, _ in files(folder):
        got = network_input(ours.cut(open_image(file))[None], IMAGENET)[0]
        assert torch.allclose(got, timms(default_loader(str(file))), atol=1e-6)


def caffe2_with_convolution(source: ResNet, writers: ModuleType) -> dict[str, Any]:
    content: dict[str, Any] = writers.caffe2(source, fused=True)
    content["blobs"]["pred_w"] = content["blobs"]["pred_w"][:, :, None, None]
    return content


@pytest.mark.parametrize("convolution", [False, True], ids=["2-D", "4-D"])
def test_caffe2_classifies_what_caffe2_sees(
    convolution: bool, network: ResNet, folder: Path, tmp_path: Path
) -> None:
    writers = neighbour("test_sources.py")
    write = caffe2_with_convolution if convolution else lambda net, _: writers.caffe2(net, True)
    file = writers.save(tmp_path / "X-26.pkl", write(network, writers))
    preset = ImageClassification(crop_size=64, resize_size=72, mean=(0, 0, 0), std=(1, 1, 1))
    rgb = batch(folder, preset) * 255
    with torch.inference_mode():
        expected = network(rgb.flip(1) - torch.tensor(CAFFE2.mean).view(3, 1, 1))
    assert_same_scores(scores_of(load_classifier(file), folder), expected)


def test_other_layouts_keep_their_classifier_too(
    network: ResNet, folder: Path, truth: Tensor, tmp_path: Path
) -> None:
    writers = neighbour("test_sources.py")
    for name in ("mmpretrain", "cadene", "parallel"):
        file_name, _, write = writers.WRITERS[name]
        file = writers.save(tmp_path / file_name, write(network))
        assert_same_scores(scores_of(load_classifier(file), folder), truth)


def test_a_file_that_does_not_tell_its_pixels_takes_those_of_another(
    network: ResNet, folder: Path, truth: Tensor, tmp_path: Path
) -> None:
    """As Detectron2's converter of torchvision's files writes them: RGB stays RGB."""
    state = to_detectron2(network.state_dict())
    renamed = {name.replace("linear.", "stem.fc."): tensor for name, tensor in state.items()}
    torch.save(renamed, tmp_path / "d2.pth")
    with pytest.raises(WeightsError, match=r"d2\.pth .*does not say what it takes for an image"):
        load_classifier(tmp_path / "d2.pth")
    assert_same_scores(scores_of(load_classifier(tmp_path / "d2.pth", like=RGB), folder), truth)


def test_what_a_file_says_goes_before_what_another_takes(
    network: ResNet, folder: Path, tmp_path: Path
) -> None:
    writers = neighbour("test_sources.py")
    file = writers.save(tmp_path / "X-26.pkl", writers.caffe2(network, fused=True))
    one, other = load_classifier(file), load_classifier(file, like=RGB)
    assert torch.equal(scores_of(one, folder), scores_of(other, folder))


@pytest.mark.parametrize("kind", [torch.float16, torch.float64])
def test_other_precisions_are_computed_in_float32(
    kind: torch.dtype, checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    """The scores are those of the rounded weights in float32, and no less exact."""
    state = torch.load(checkpoint, weights_only=True)
    torch.save({n: t.to(kind) for n, t in state.items()}, tmp_path / "a.pth")
    torch.save({n: t.to(kind).float() for n, t in state.items()}, tmp_path / "b.pth")
    got, expected = (
        scores_of(load_classifier(tmp_path / name), folder) for name in ("a.pth", "b.pth")
    )
    assert got.dtype == torch.float32
    assert float((got - expected).abs().max()) < 1e-5


NARROW = {"stem_out_channels": 8, "res2_out_channels": 16}


def narrow(**options: Any) -> dict[str, Tensor]:
    """A small network by Detectron2's names."""
    depth, template = options.pop("depth", 26), options.pop("template", "2x2d")
    return ResNeXt(depth, template, num_classes=4, **NARROW, **options).state_dict()


def bad(state: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    state = dict(state)
    for name, change in changes.items():
        full = f"linear.{name}"
        if change is None:
            del state[full]
        else:
            state[full] = change
    return state


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: bad(narrow(), weight=None, bias=None), "has no classifier .*Converted files"),
        (lambda: bad(narrow(), bias=None), "has no classifier"),
        (lambda: bad(narrow(), bias=torch.zeros(3)), r"of the shapes \(4, 128\) and \(3,\)"),
        (lambda: bad(narrow(), weight=torch.zeros(4, 64)), r"must be \(classes, 128\)"),
        (lambda: bad(narrow(), weight=torch.zeros(4)), r"of the shapes \(4,\)"),
        (lambda: bad(narrow(), bias=torch.full((4,), math.nan)), "NaN .* in its classifier"),
        (lambda: bad(narrow(), weight=torch.full((4, 128), math.inf)), "NaN .* in its classifier"),
        (lambda: narrow(norm="LN"), "norms without running statistics"),
        (
            lambda: {**narrow(), "res5.1.conv2.weight": torch.ones(16, 16, 3, 3)},
            r"res5\.1\.conv2\.weight",
        ),
    ],
)
def test_files_that_cannot_classify(
    make: Callable[[], dict[str, Tensor]], said: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.pth"
    torch.save(make(), file)
    with pytest.raises(WeightsError, match=rf"a\.pth.* {said}"):
        load_classifier(file, like=RGB)


def test_where_a_resnet_has_its_stride_is_not_guessed(tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    torch.save(narrow(template="1x2d"), file)
    with pytest.raises(WeightsError, match=r"a\.pth holds a ResNet, and does not say whether"):
        network_of(read_backbone(file))
    for stride, side in ((1, "1x1"), (2, "3x3")):
        other = dataclasses.replace(RGB, stride=side)
        network = load_classifier(file, like=other).network
        assert network.res3[0].conv2.stride == (stride, stride)


def test_a_converted_file_has_no_classifier(checkpoint: Path, tmp_path: Path) -> None:
    write_detectron2(read_backbone(checkpoint), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="take the file they were made from"):
        load_classifier(tmp_path / "a.pth")


# --- images and folders ---


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named(
    workers: int, checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    root = tmp_path / "val"
    for file, _ in files(folder):
        (root / file.parent.name).mkdir(parents=True, exist_ok=True)
        (root / file.parent.name / file.name).write_bytes(file.read_bytes())
    broken = files(root)[12][0]
    broken.write_bytes(broken.read_bytes()[:-600])  # still opened, and not read to its end
    images = validation_images(root, CLASSES, SMALL)
    with pytest.raises(DatasetError, match=rf"^the image {broken} cannot be read: .*truncated"):
        measure(load_classifier(checkpoint), images, batch_size=4, workers=workers, device="cpu")


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (Image.new("I", (90, 90)), "32-bit integers"),
        (Image.new("F", (90, 90)), "floats"),
        (Image.new("RGB", (3, 400)), "is 3 x 400 pixels"),
    ],
)
def test_images_that_would_be_seen_wrongly(image: Image.Image, said: str, tmp_path: Path) -> None:
    image.save(tmp_path / "a.tif")
    with pytest.raises(DatasetError, match=rf"a\.tif .*{said}"):
        open_image(tmp_path / "a.tif")


def test_files_that_are_no_images_are_reported(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    validation_images(folder, CLASSES, SMALL)
    assert not caplog.records
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        picture(1).save(tmp_path / name / "1.JPEG")
        (tmp_path / name / ".DS_Store").touch()
    picture(1).save(tmp_path / "b" / "2.jp2")
    picture(1).save(tmp_path / "loose.JPEG")
    with caplog.at_level(logging.WARNING):
        images = validation_images(tmp_path, 2, SMALL)
    assert [images[number][1] for number in (0, 1)] == [0, 1]
    (record,) = caplog.records
    assert record.getMessage().startswith("2 files in")
    assert record.getMessage().endswith(f"the first is {tmp_path / 'b' / '2.jp2'}")


def test_a_limit_is_spread_over_all_classes(folder: Path) -> None:
    everything = [label for _, label in files(folder)]
    for limit in (1, 5, 10, len(everything), 1000):
        images: Any = validation_images(folder, CLASSES, SMALL, limit)
        labels = [images[number][1] for number in range(len(images))]
        count = min(limit, len(everything))
        assert len(labels) == count
        # One out of each stretch of equal length.
        expected = [everything[math.floor(n * len(everything) / count)] for n in range(count)]
        assert labels == expected
    with pytest.raises(ConfigError, match="the limit is 0"):
        validation_images(folder, CLASSES, SMALL, 0)


def test_images_have_the_class_of_their_folder(tmp_path: Path) -> None:
    for number in range(11):
        (tmp_path / str(number)).mkdir()
        Image.new("L", (80, 80), number).save(tmp_path / str(number) / "a.png")
    images: Any = validation_images(tmp_path, 11, SMALL)
    assert all(int(images[n][0][0, 0, 0]) == images[n][1] for n in range(11))


def test_folders_that_are_none(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="none is not a folder with images"):
        validation_images(tmp_path / "none", CLASSES, SMALL)
    (tmp_path / "ILSVRC2012_val_00000001.JPEG").touch()
    with pytest.raises(DatasetError, match=r"in one folder for each class.*any class folder"):
        validation_images(tmp_path, CLASSES, SMALL)
    with pytest.raises(DatasetError, match=r"10 folders .* has 11 outputs"):
        validation_images(folder, 11, SMALL)
    for name in ("full", "empty"):
        (tmp_path / name).mkdir()
    picture(1).save(tmp_path / "full" / "1.png")
    with pytest.raises(DatasetError, match="no valid file for the classes empty"):
        validation_images(tmp_path, 2, SMALL)


SYNSETS = ImageNetInfo("imagenet-1k").label_names()


def test_folders_become_classes() -> None:
    assert class_numbers(["ant", "bee", "cat"], 3) == [0, 1, 2]
    assert class_numbers(SYNSETS, 1000) == list(range(1000))
    some = [SYNSETS[number] for number in (3, 500, 999)]
    assert class_numbers(some, 1000) == [3, 500, 999]
    assert class_numbers(some, 3) == [0, 1, 2]  # a classifier of these alone
    names = sorted(str(number) for number in range(12))
    assert names[:4] == ["0", "1", "10", "11"]
    assert class_numbers(names, 12) == [0, 1, 10, 11, *range(2, 10)]
    assert class_numbers(["00", "01", "02"], 3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("folders", "classes", "said"),
    [
        (["ant", "bee"], 3, r"2 folders \(ant, bee, ...\) and the classifier has 3 outputs"),
        (["ant", "bee", "cat"], 2, "3 folders .* 2 outputs"),
        (["1", "2", "3"], 3, "from 1 to 3; the classifier has 3 outputs, and .* all of 0 to 2"),
        (["0", "1"], 3, "from 0 to 1"),
        (["0", "00"], 2, "from 0 to 0"),
        (["n01440764", "n99999999"], 1000, "1 of 2 folders are no classes .* n99999999"),
        ([*SYNSETS[:999], "n99999999"], 1000, "1 of 1000 folders"),
        (["n01440764", "other"], 1000, "there are 2 folders"),
    ],
)
def test_folders_that_are_not_the_classes(folders: list[str], classes: int, said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        class_numbers(folders, classes)


def test_without_timm_all_classes_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.data", None)
    assert class_numbers(SYNSETS, 1000) == list(range(1000))
    with pytest.raises(DatasetError, match=r"999 folders .* where timm is installed"):
        class_numbers(SYNSETS[1:], 1000)


# --- what is asked for, and what comes out ---


def test_preprocessing_is_what_was_asked_for_or_what_goes_with_the_figure() -> None:
    figure = Accuracy(80, 95, "somebody", 288, 256, "bicubic")
    assert Preprocessing.of(figure) == Preprocessing(288, 256, "bicubic")
    assert Preprocessing.of(figure, 300, None, "bilinear") == Preprocessing(300, 256, "bilinear")
    plain = Preprocessing.of(None)
    assert plain == Preprocessing(256, 224, "bilinear", ("resize", "crop", "interpolation"))
    assert str(plain).endswith(
        "(by default: resize, crop, interpolation; 256 and 224 are the paper's)"
    )
    cadene = Preprocessing.of(entry("resnext101_32x4d.cadene_in1k").accuracy)
    assert cadene == Preprocessing(256, 224, "bilinear", ("resize", "interpolation"))
    for known in catalog.ENTRIES.values():
        Preprocessing.of(known.accuracy)


@pytest.mark.parametrize(
    "values", [(223, 224, "bilinear"), (0, 0, "bilinear"), (9000, 224, "bilinear")]
)
def test_crops_that_cannot_be(values: tuple[int, int, str]) -> None:
    with pytest.raises(ConfigError, match=rf"resized to {values[0]} and cropped to {values[1]}"):
        Preprocessing(*values)
    with pytest.raises(ConfigError, match="no interpolation 'nearest'"):
        Preprocessing(256, 224, "nearest")


@pytest.mark.parametrize(("right", "images"), [(0, 10), (10, 10), (7, 10), (771, 1000), (1, 1)])
def test_the_interval_is_wilsons(right: int, images: int) -> None:
    """By its definition: the shares p from which the one seen is just z deviations away."""
    share, z = right / images, 1.959963984540054
    low, high = (bound / 100 for bound in wilson_interval(right, images))
    assert 0 <= low < high <= 1
    assert low <= share <= high
    for bound in (low, high):
        expected = z * math.sqrt(bound * (1 - bound) / images)
        assert abs(share - bound) == pytest.approx(expected, rel=1e-9, abs=1e-7)
    assert (low == 0) == (right == 0)
    assert (high == 1) == (right == images)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 0}, "a batch of 0"),
        ({"workers": -1}, "by -1 processes"),
        ({"device": "nonsense"}, "the device 'nonsense' cannot be used"),
        ({"device": "meta"}, "the device 'meta' cannot be used"),
    ],
)
def test_settings_that_cannot_be(
    options: dict[str, Any], said: str, checkpoint: Path, folder: Path
) -> None:
    images = validation_images(folder, CLASSES, SMALL)
    with pytest.raises(ConfigError, match=said):
        measure(load_classifier(checkpoint), images, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    assert choose_device() == "cpu"
    with pytest.raises(ConfigError, match="the device 'cuda' cannot be used"):
        choose_device("cuda")


def test_scores_that_are_not_finite_are_no_scores(folder: Path, tmp_path: Path) -> None:
    state = narrow()
    state["linear.weight"] = torch.full_like(state["linear.weight"], 3e38)
    state["stem.conv1.norm.bias"] += 10
    torch.save(state, tmp_path / "a.pth")
    images = validation_images(folder, CLASSES, SMALL)
    with pytest.raises(WeightsError, match=r"a\.pth gives scores that are NaN or infinite"):
        measure(load_classifier(tmp_path / "a.pth", like=RGB), images, device="cpu")


def test_fewer_than_five_classes_are_all_among_the_five(folder: Path, tmp_path: Path) -> None:
    torch.save(narrow(), tmp_path / "a.pth")
    classifier = load_classifier(tmp_path / "a.pth", like=RGB)
    got = measure(classifier, validation_images(folder, CLASSES, SMALL), device="cpu")
    assert got.right_of_five == sum(label < 4 for _, label in files(folder))


@pytest.fixture
def known(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """An entry of the catalog for the checkpoint, which is in the cache already."""
    digits = hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:8]
    made = dataclasses.replace(
        RGB,
        name=NAME,
        url=f"https://example.org/weights-{digits}.pth",
        checksum=Checksum(digits),
        accuracy=Accuracy(50, 90, "somebody", 72, 64, "bilinear"),
    )
    monkeypatch.setitem(catalog.ENTRIES, NAME, made)  # type: ignore[arg-type]
    monkeypatch.setenv("RESNEXT_DET_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "cache" / NAME
    place.mkdir(parents=True)
    (place / made.file_name).write_bytes(checkpoint.read_bytes())
    return made


def test_names_and_files(known: Entry, checkpoint: Path, tmp_path: Path) -> None:
    placed = tmp_path / "cache" / NAME / known.file_name
    assert locate(NAME) == locate(f"resnext://{NAME}") == (placed, known)
    assert locate(str(checkpoint)) == (checkpoint, known)
    other = tmp_path / "other"
    other.write_bytes(b"other")
    assert locate(str(other)) == (other, None)
    for missing in ("none.pth", "some/where"):
        with pytest.raises(WeightsError, match=f"{missing} cannot be read: No such file"):
            locate(missing)
    with pytest.raises(ConfigError, match=r"no checkpoint 'resnext26_8x4d\.tset_in1k'"):
        locate("resnext26_8x4d.tset_in1k")
    with pytest.raises(ConfigError, match="cannot be used"):
        locate("resnext50d_32x4d.bt_in1k")


def test_the_catalog_says_what_a_file_takes_for_an_image(
    known: Entry, checkpoint: Path, network: ResNet, folder: Path
) -> None:
    bgr = Pixels("BGR", 255, (0.0, 0.0, 0.0), (255.0, 255.0, 255.0))
    classifier = load_classifier(checkpoint, dataclasses.replace(known, pixels=bgr))
    preset = ImageClassification(crop_size=64, resize_size=72, mean=(0, 0, 0), std=(1, 1, 1))
    with torch.inference_mode():
        expected = network(batch(folder, preset).flip(1))
    assert_same_scores(scores_of(classifier, folder), expected)


def test_what_is_measured_is_held_against_what_is_published(
    known: Entry, checkpoint: Path, folder: Path
) -> None:
    classifier = load_classifier(checkpoint, known)
    whole, part = Score(50_000, 26_000, 44_000), Score(1000, 520, 880)
    found = Evaluation(classifier, known, SMALL, folder, "cpu", whole)
    assert found.published == {"top1": 50, "top5": 90}
    assert found.differences == {"top1": 2, "top5": -2}
    assert found.intervals is None
    assert not found.other_preprocessing
    found = Evaluation(classifier, None, Preprocessing(80, 64, "bilinear"), folder, "cpu", part)
    assert found.differences == {"top1": None, "top5": None}
    assert found.intervals == {
        "top1": wilson_interval(520, 1000),
        "top5": wilson_interval(880, 1000),
    }
    assert not found.other_preprocessing
    assert dataclasses.replace(found, known=known).other_preprocessing
    cadene = entry("resnext101_32x4d.cadene_in1k")  # its resizing is not published
    assert not dataclasses.replace(
        found, known=cadene, preprocessing=Preprocessing(240, 224, "bicubic")
    ).other_preprocessing
    assert dataclasses.replace(found, known=cadene).other_preprocessing


# --- the command ---


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [TOOL.name, *(str(word) for word in arguments)])
    runpy.run_path(str(TOOL), run_name="__main__")


def figures(printed: str) -> list[list[str]]:
    """The two rows of the table, without their labels."""
    return [line.split()[2:] for line in printed.splitlines() if line.startswith("top-")]


def test_a_name_is_measured_as_its_figure_was(
    known: Entry,
    checkpoint: Path,
    folder: Path,
    truth: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    saved = tmp_path / "new" / "score.json"
    run(monkeypatch, "--weights", NAME, "--data", folder, "--workers", 0, "--json", saved)
    printed = capsys.readouterr().out
    assert "19 images, shorter side 72, crop 64, bilinear\n" in printed
    assert "Published: somebody" in printed
    assert "cut otherwise" not in printed
    expected = counted(truth, folder)
    top1, top5 = (100 * n / 19 for n in (expected.right, expected.right_of_five))
    rows = figures(printed)
    assert (rows[0][0], rows[1][0]) == (f"{top1:.3f}", f"{top5:.3f}")
    assert (rows[0][-2:], rows[1][-2:]) == (
        ["50.000", f"{top1 - 50:+.3f}"],
        ["90.000", f"{top5 - 90:+.3f}"],
    )
    document = json.loads(saved.read_text())
    assert (document["right"], document["right_of_five"]) == (
        *(expected.right, expected.right_of_five),
    )
    assert document["images"] == 19
    assert document["top1"] == pytest.approx(top1)
    assert document["interval_95"]["top1"] == list(wilson_interval(expected.right, 19))
    assert document["published"] == {"top1": 50, "top5": 90}
    assert document["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert {"torch", "torchvision", "pillow"} <= document["versions"].keys()


def test_a_file_is_measured_as_was_asked_for(
    checkpoint: Path, folder: Path, truth: Tensor, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    common = ["--data", folder, "--workers", 0, "--device", "cpu", "--resize", 72, "--crop", 64]
    run(monkeypatch, "--weights", checkpoint, *common)
    printed = capsys.readouterr().out
    assert "shorter side 72, crop 64, bilinear (by default: interpolation)" in printed
    assert "This file is not in the catalog" in printed
    assert figures(printed)[0][0] == f"{100 * counted(truth, folder).right / 19:.3f}"
    assert figures(printed)[0][-2:] == ["-", "-"]
    like = ["--like", "resnext50_32x4d.a1_in1k", "--limit", 3]
    run(monkeypatch, "--weights", checkpoint, *common, *like)
    assert "3 images, shorter side 72, crop 64, bicubic\n" in capsys.readouterr().out


def test_another_way_to_cut_images_is_said(
    known: Entry, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    options = ["--workers", 0, "--resize", 80, "--limit", 2]
    run(monkeypatch, "--weights", f"resnext://{NAME}", "--data", folder, *options)
    said = "Those images were cut otherwise: shorter side 72, crop 64, bilinear."
    assert said in capsys.readouterr().out
    options = ["--workers", 0, "--resize", 72, "--crop", 64, "--limit", 2]
    like = ["--like", "resnext50_32x4d.a1_in1k"]
    run(monkeypatch, "--weights", NAME, "--data", folder, *options, *like)
    printed = capsys.readouterr().out
    assert "2 images, shorter side 72, crop 64, bicubic\n" in printed
    assert said in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--like", "resnext101_32x8d.d2_in1k"], "no figures of resnext101_32x8d.d2_in1k"),
        (["--resize", "0"], "images are resized to 0"),
        (["--device", "nonsense"], "the device 'nonsense' cannot be used"),
        (["--json", "FILE/score.json"], "score.json cannot be written"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: list[str],
    said: str,
    checkpoint: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    arguments = [word.replace("FILE", str(checkpoint)) for word in arguments]
    common = ["--weights", checkpoint, "--data", folder, "--crop", 64, "--limit", 1]
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *common, "--workers", 0, *arguments)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error
