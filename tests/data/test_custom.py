"""Data sets that the command line names by file."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from resnext_det import load_config
from resnext_det.data.checks import check_datasets
from resnext_det.data.custom import (
    CustomData,
    class_names,
    from_arguments,
    read_record,
    record,
    register_arguments,
    use,
)
from resnext_det.errors import ConfigError, DatasetError
from resnext_det_cli.flags import add_own_data

TOY = "faster_rcnn_X_26_8x4d_FPN_toy"
NAMES = {7: "cat", 3: "dog", 40: "a horse"}


def write(folder: Path, stem: str, names: dict[int, str], **changes: Any) -> Path:
    """Write annotations with an object of each category, and their image beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 50)).save(folder / f"{stem}.png")
    box = {"image_id": 5, "bbox": [5, 5, 30, 20], "area": 600, "iscrowd": 0}
    document = {
        "images": [{"id": 5, "file_name": f"{stem}.png", "width": 60, "height": 50}],
        "annotations": [
            {**box, "id": 1 + number, "category_id": category}
            for number, category in enumerate(names)
        ],
        "categories": [{"id": category, "name": name} for category, name in names.items()],
    }
    file = folder / f"{stem}.json"
    file.write_text(json.dumps(document | changes))
    return file


@pytest.fixture(autouse=True)
def catalog() -> Iterator[None]:
    """Remove from Detectron2's catalog what a test registers."""
    before = set(DatasetCatalog.list())
    yield
    forget_all(before)


def forget_all(kept: set[str]) -> None:
    for name in set(DatasetCatalog.list()) - kept:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write(tmp_path / "train", "train", NAMES)


@pytest.fixture
def test(tmp_path: Path) -> Path:
    return write(tmp_path / "test", "test", NAMES)


def parsed(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_own_data(parser)
    parser.add_argument("--eval-only", action="store_true")
    parser.add_argument("opts", nargs="*")
    return parser.parse_intermixed_args([str(word) for word in words])


def from_words(*words: object) -> CfgNode:
    arguments = parsed(*words)
    return from_arguments(load_config(TOY, arguments.opts), arguments)


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        ({0: "b", 1: "a"}, ["b", "a"]),
        (NAMES, ["dog", "cat", "a horse"]),
        ({5: "only"}, ["only"]),
    ],
)
def test_accepts_any_category_ids(
    names: dict[int, str], classes: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = load_config(TOY)
    file = write(tmp_path, "train", names)
    with caplog.at_level(logging.WARNING):
        cfg = use(before, file, None, file, None)
        loaded = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    assert class_names(cfg) == classes
    assert len(classes) == cfg.MODEL.ROI_HEADS.NUM_CLASSES
    assert cfg.DATASETS.TRAIN == cfg.DATASETS.TEST
    assert "evaluated on the images that it is trained on" in caplog.text
    check_datasets(cfg, [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    categories = [entry["category_id"] for entry in loaded[0]["annotations"]]
    assert [classes[category] for category in categories] == list(names.values())
    assert not [each for each in caplog.records if "mapping" in each.message]
    assert before.MODEL.ROI_HEADS.NUM_CLASSES == 6


def test_sets_the_number_of_classes_of_each_architecture(train: Path) -> None:
    cfg = load_config(TOY, ["MODEL.META_ARCHITECTURE", "RetinaNet"])
    new = use(cfg, train_json=train)
    assert new.MODEL.RETINANET.NUM_CLASSES == 3
    assert new.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.ROI_HEADS.NUM_CLASSES
    assert new.DATASETS.TEST == () and new.is_frozen()
    cfg = load_config(TOY, ["MODEL.META_ARCHITECTURE", "PanopticFPN"])
    with pytest.raises(ConfigError, match=r"MODEL\.META_ARCHITECTURE"):
        use(cfg, train_json=train)


def test_derives_names_from_paths(
    train: Path, test: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = use(load_config(TOY), train, None, test, None)
    again = use(load_config(TOY), f"{train.parent}/../train/train.json", train.parent, test)
    assert again.DATASETS == cfg.DATASETS
    monkeypatch.chdir(train.parent)
    assert use(load_config(TOY), "train.json", ".").DATASETS.TRAIN == cfg.DATASETS.TRAIN
    other = write(tmp_path / "other", "train", NAMES)
    assert use(load_config(TOY), other).DATASETS.TRAIN != cfg.DATASETS.TRAIN
    # A changed file replaces what was registered.
    write(train.parent, "train", {1: "bird", 2: "fish"})
    assert class_names(use(load_config(TOY), train)) == ["bird", "fish"]
    DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    odd = CustomData(tmp_path / ("a b;c../é" + "x" * 300 + ".json"), tmp_path).name
    assert odd.replace("_", "").isalnum() and odd.isascii() and len(odd) < 70


def test_another_process_registers_without_reading(train: Path, test: Path) -> None:
    """A started process gets the config and the command line; its catalog is new."""
    before = set(DatasetCatalog.list())
    arguments = parsed("--train-json", train, "--test-json", test)
    cfg = from_arguments(load_config(TOY), arguments)
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    assert len(set(names)) == 2
    forget_all(before)
    content = train.read_text()
    train.write_text("not yet JSON")
    for _ in range(2):
        register_arguments(arguments)
    train.write_text(content)
    assert class_names(cfg) == ["dog", "cat", "a horse"]
    assert [len(DatasetCatalog.get(name)) for name in names] == [1, 1]
    register_arguments(arguments)
    assert MetadataCatalog.get(names[0]).thing_classes == ["dog", "cat", "a horse"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({3: "dog", 7: "cat"}, r"differ: only in .*train\.json: 'a horse'"),
        ({**NAMES, 41: "cow"}, r"differ: only in .*test\.json: 'cow'"),
        ({**NAMES, 7: "Cat"}, "class 1 is 'cat' and 'Cat'"),
        ({3: "cat", 7: "dog", 40: "a horse"}, "same in another order: class 0 is 'dog' and 'cat'"),
        (dict(reversed(NAMES.items())), None),
        ({0: "dog", 1: "cat", 2: "a horse"}, None),
    ],
)
def test_both_files_need_the_same_classes(
    names: dict[int, str], said: str | None, train: Path, tmp_path: Path
) -> None:
    test = write(tmp_path / "test", "test", names)
    if said is None:
        assert class_names(use(load_config(TOY), train, None, test)) == ["dog", "cat", "a horse"]
        return
    with pytest.raises(DatasetError, match=said):
        use(load_config(TOY), train, None, test, None)


def image(name: str) -> dict[str, object]:
    return {"id": 5, "file_name": name, "width": 60, "height": 50}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"categories": []}, "has no categories"),
        ({"images": []}, "has no images"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1.0, "name": "b"}]}, "2 categories .* id"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}, "have the name 'a'"),
        ({"images": [image("/etc/passwd.png")]}, "lead out of the image folder"),
        ({"images": [image("a/../../b.png")]}, "lead out of the image folder"),
    ],
)
def test_refuses_files_to_train_on(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    file = write(tmp_path, "train", NAMES, **changes)
    with pytest.raises(DatasetError, match=rf"train\.json.*{said}"):
        use(load_config(TOY), file)


def test_finds_the_image_folder(train: Path, tmp_path: Path) -> None:
    """Beside the file, or beside a link to it; in COCO's layout; or as named."""

    def folder_of(*words: Any) -> Path:
        cfg = use(load_config(TOY), *words)
        check_datasets(cfg, list(cfg.DATASETS.TRAIN))
        (loaded,) = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
        return Path(loaded["file_name"]).parent

    assert folder_of(train) == train.parent
    link = tmp_path / "link.json"
    link.symlink_to(train)
    shutil.move(train.parent / "train.png", tmp_path / "train.png")
    assert folder_of(link) == tmp_path
    assert folder_of(train, tmp_path) == tmp_path
    with pytest.raises(ConfigError, match=r"'train\.png', is in .*--train-images"):
        use(load_config(TOY), train)
    with pytest.raises(ConfigError, match="--train-images: nowhere does not exist"):
        use(load_config(TOY), train, "nowhere")
    coco = tmp_path / "coco"
    for name in ("annotations", "train2017"):
        (coco / name).mkdir(parents=True)
    shutil.move(tmp_path / "train.png", coco / "train2017" / "train.png")
    file = shutil.move(train, coco / "annotations" / "instances_train2017.json")
    assert folder_of(file) == coco / "train2017"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--test-json", "{test}"], "--test-json without --train-json"),
        (["--train-json", "{train}", "--eval-only"], "--eval-only needs --test-json"),
        (["--train-images", "{train}"], "--train-images needs --train-json"),
        (["--train-json", "nowhere.json"], "--train-json: nowhere.json does not exist"),
        (
            ["--train-json", "{train}", "DATASETS.TEST", "('toy_coco_minival',)"],
            "DATASETS.TEST and --train-json",
        ),
        (
            ["--train-json", "{train}", "MODEL.ROI_HEADS.NUM_CLASSES", "80"],
            "NUM_CLASSES is set to 80, but the annotations have 3",
        ),
    ],
)
def test_refuses_contradicting_flags(words: list[str], said: str, train: Path, test: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        from_words(*(word.format(train=train, test=test) for word in words))


def test_class_names(test: Path) -> None:
    def names(**data_sets: str) -> list[str]:
        overrides = [(f"DATASETS.{key}", f"({value})") for key, value in data_sets.items()]
        return class_names(load_config(TOY, [word for pair in overrides for word in pair]))

    assert names()[:2] == ["circle", "square"]
    assert len(names(TRAIN="'coco_2017_train',")) == 80
    assert names(TRAIN="")[0] == "circle"  # of the data to evaluate with
    cfg = from_words("--eval-only", "--test-json", test, "MODEL.ROI_HEADS.NUM_CLASSES", 3)
    assert cfg.DATASETS.TRAIN == () and class_names(cfg) == ["dog", "cat", "a horse"]
    with pytest.raises(ConfigError, match="no data set 'nothing'"):
        names(TRAIN="'nothing',")
    with pytest.raises(ConfigError, match="no data set"):
        names(TRAIN="", TEST="")
    with pytest.raises(ConfigError, match="again with --train-json"):
        names(TRAIN="'custom_coco_train_00000000',")


def test_a_run_folder_records_its_files(train: Path, test: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    before = set(DatasetCatalog.list())
    cfg = from_words("--train-json", train, "--test-json", test, "OUTPUT_DIR", folder)
    record(cfg, folder)
    (folder / "config.yaml").write_text(cfg.dump())
    forget_all(before)
    arguments = parsed("--eval-only")
    arguments.config_file = str(folder / "config.yaml")
    again = from_arguments(load_config(arguments.config_file), arguments)
    assert class_names(again) == ["dog", "cat", "a horse"]
    check_datasets(again, list(again.DATASETS.TEST))
    record(again, folder)  # keeps what is there
    assert set(read_record(folder)) == {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST}
    test.write_text(test.read_text() + " ")
    with pytest.raises(DatasetError, match=r"test\.json have changed since the run"):
        from_arguments(again, arguments)
    test.unlink()
    with pytest.raises(DatasetError, match=r"test\.json or images .* are gone"):
        from_arguments(again, arguments)


@pytest.mark.parametrize("content", ["[]", "{", '{"a": 1}', '{"a": {"annotations": "b"}}'])
def test_refuses_a_damaged_record(content: str, tmp_path: Path) -> None:
    (tmp_path / "datasets.json").write_text(content)
    with pytest.raises(DatasetError, match=r"datasets\.json"):
        read_record(tmp_path)
