"""Images with classes, against torchvision's data sets and transforms."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import CIFAR10, ImageFolder

from resnext_det.data.classification import (
    Augmented,
    LabelledImages,
    Preprocessing,
    Views,
    check_readable,
    check_same_labels,
    read_folder,
    read_split,
    relabelled,
)
from resnext_det.data.crops import cut_crops
from resnext_det.data.stream import seeded
from resnext_det.errors import DatasetError
from tests.helpers.digits import split_digits, write_cifar, write_folders

T: Any = transforms  # untyped


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("folders"), most=60)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cifar(tmp_path_factory.mktemp("cifar"))


def test_folders_as_torchvision_reads_them(folders: Path) -> None:
    ours, theirs = read_folder(folders / "train"), ImageFolder(str(folders / "train"))
    assert ours.classes == tuple(theirs.classes)
    assert [*zip(ours.files, ours.labels.tolist())] == theirs.samples
    assert np.array_equal(np.asarray(ours.picture(7)), np.asarray(theirs[7][0]))


def test_cifar_as_torchvision_reads_it(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    for split in ("train", "test"):
        ours, theirs = read_split(cifar, "cifar10", split), CIFAR10(str(cifar), split == "train")
        assert ours.pixels is not None and np.array_equal(ours.pixels, theirs.data)
        assert ours.labels.tolist() == theirs.targets
        assert list(ours.classes) == theirs.classes
    assert np.array_equal(ours.pixels, split_digits()["test"][0])


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


@pytest.mark.parametrize("content", [Hostile(), {"data": Hostile()}, [1], {"data": 3}])
def test_cifar_files_are_data(
    content: Any, cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(cifar, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(pickle.dumps(content))
    with pytest.raises(DatasetError, match="cannot be read as cifar10"):
        read_split(tmp_path, "cifar10", "train")
    assert "executed" not in capsys.readouterr().out


def test_a_list_of_classes_chooses_folders(folders: Path, tmp_path: Path) -> None:
    listed = tmp_path / "synsets.txt"
    listed.write_text("7 seven\n\n2\r\n")
    some = read_split(folders, "folder", "train", str(listed))
    assert some.classes == ("2", "7")
    every = read_folder(folders / "train")
    assert len(some) == np.isin(every.labels, [2, 7]).sum()
    back = relabelled(some, every.classes)
    assert set(back.labels) == {2, 7} and back.classes == every.classes
    listed.write_text("7\n12\n13\n")
    read_split.cache_clear()
    with pytest.raises(DatasetError, match="2 of 3 listed classes have no folder: 12, 13"):
        read_split(folders, "folder", "train", str(listed))


def test_refuses_data_that_would_stop_or_spoil_a_training(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders, tmp_path, dirs_exist_ok=True)
    (tmp_path / "val" / "empty").mkdir()
    with pytest.raises(DatasetError, match="Found no valid file for the classes empty"):
        read_folder(tmp_path / "val")
    (tmp_path / "val" / "empty").rmdir()
    (tmp_path / "val" / "7").rename(tmp_path / "val" / "seven")
    train, val = read_folder(tmp_path / "train"), read_folder(tmp_path / "val")
    for subset in (False, True):
        with pytest.raises(DatasetError, match="1 only in val: 'seven'"):
            check_same_labels(train.classes, val.classes, "train", "val", subset=subset)
    shutil.rmtree(tmp_path / "val" / "seven")
    val = read_folder(tmp_path / "val")
    check_same_labels(train.classes, val.classes, "train", "val", subset=True)
    with pytest.raises(DatasetError, match="1 only in train: '7'"):
        check_same_labels(train.classes, val.classes, "train", "val", subset=False)
    broken = Path(train.files[3])
    broken.write_bytes(b"no image")
    with pytest.raises(DatasetError, match=rf"1 of 60 images .*{broken.name}"):
        check_readable(train)
    with pytest.raises(DatasetError, match="does not have one folder of images"):
        read_folder(tmp_path / "none")


def picture(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((140, 100), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("words", "theirs"),
    [
        (
            {"augmentation": "inception", "colour_jitter": 0.4},
            [
                T.RandomResizedCrop(48, (0.08, 1), (3 / 4, 4 / 3), T.InterpolationMode.BICUBIC),
                T.RandomHorizontalFlip(),
                T.ColorJitter(0.4, 0.4, 0.4),
            ],
        ),
        (
            {"augmentation": "padded", "padding": (1, 2, 3), "flip": "vertical"},
            [
                T.Resize((48, 48), T.InterpolationMode.BICUBIC),
                T.RandomCrop(48, 6, fill=(1, 2, 3)),
                T.RandomVerticalFlip(),
            ],
        ),
        (
            {"augmentation": "none", "flip": "none"},
            [T.Resize((48, 48), T.InterpolationMode.BICUBIC)],
        ),
    ],
)
def test_augments_as_torchvision(words: dict[str, Any], theirs: list[Any]) -> None:
    images = LabelledImages(Path("some"), ("a", "b"), np.array([1]), pixels=np.array([picture()]))
    ours = Augmented(images, crop=48, **words)
    for seed in range(5):
        with seeded(seed):
            sample = ours(images.records()[0])
        with seeded(seed):
            expected = T.Compose([*theirs, T.PILToTensor()])(picture())
        assert torch.equal(sample["image"], expected)
    assert (sample["label"], sample["file_name"]) == (1, "some, image 0")


def test_lighting_varies_along_the_principal_components() -> None:
    """The covariance of the noise has the eigenvalues and eigenvectors of ImageNet's colours."""
    images = LabelledImages(
        Path("some"), ("a",), np.array([0]), pixels=np.zeros((1, 1, 1, 3), "u1")
    )
    ours = Augmented(images, augmentation="none", crop=1, lighting=0.1)
    torch.manual_seed(0)
    noise = torch.stack([ours(images.records()[0])["image"].flatten() for _ in range(4000)]) / 255
    found = torch.linalg.eigh(noise.T.cov())
    assert found.eigenvalues.sqrt().tolist() == pytest.approx([0.00045, 0.00188, 0.02175], rel=0.05)
    grey = torch.tensor([0.5675, 0.5808, 0.5836])
    assert abs(float(found.eigenvectors[:, 2] @ grey)) == pytest.approx(1, abs=1e-3)


def test_views_of_the_papers_tests() -> None:
    images = LabelledImages(Path("some"), ("a",), np.array([0]), pixels=np.array([picture()]))
    resize = T.Resize(64)
    centre, label = Views(images, Preprocessing(64, 48), [0])[0]
    assert torch.equal(centre[0], T.PILToTensor()(T.CenterCrop(48)(resize(picture()))))
    assert label == 0
    ten = Views(images, Preprocessing(64, 48, ten_crop=True), [0])[0][0]
    expected = [T.PILToTensor()(each) for each in T.TenCrop(48)(resize(picture()))]
    assert torch.equal(ten, torch.stack(expected))
    assert torch.equal(ten[4], centre[0])


def test_crops_cover_every_object_and_backgrounds(datasets: Path) -> None:
    root = datasets / "toy_coco"
    crops, labels, classes = cut_crops(root, "train2017", 32)
    document = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    objects = [entry for entry in document["annotations"] if not entry["iscrowd"]]
    assert (labels > 0).sum() == len(objects)
    assert 0 < (labels == 0).sum() <= len(document["images"])
    assert crops.shape == (len(labels), 32, 32, 3)
    assert classes == ("background", *(each["name"] for each in document["categories"]))
    with pytest.raises(DatasetError, match="no annotation file"):
        cut_crops(root, "none")
