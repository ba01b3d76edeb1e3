from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pycocotools.mask
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from hypothesis import given
from hypothesis import strategies as some
from PIL import Image

from resnext_det import load_config
from resnext_det.data import annotations
from resnext_det.data.annotations import load_records, read_annotations
from resnext_det.data.checks import check_datasets
from resnext_det.data.mapper import NamingDatasetMapper
from resnext_det.data.record_forms import is_segmentation
from resnext_det.data.stream import Share, build_stream, training_records
from resnext_det.errors import ConfigError, DatasetError
from resnext_det.evaluation.annotations import read_ground_truth

TOY = "faster_rcnn_X_26_8x4d_FPN_toy"
Document = dict[str, Any]
Damage = Callable[[Document], object]


def sound() -> Document:
    """Four images of 64 x 48 pixels; a crowd, polygons, both kinds of RLE and keypoints."""
    more: list[Document] = [
        {"segmentation": [[8, 8, 30, 8, 30, 28], [1, 2, 3, 4]]},
        {"segmentation": {"size": [48, 64], "counts": [100, 30, 2942]}, "iscrowd": 1},
        {"segmentation": packed()},
        {"keypoints": [10, 12, 2, 20.5, 22, 1, 0, 0, 0], "num_keypoints": 2},
        {"segmentation": [[1, 2, 3, 4]]},
        {"segmentation": []},
    ]
    return {
        "images": [
            {"id": number, "file_name": f"{number}.png", "width": 64, "height": 48}
            for number in (3, 1, 4, 2)
        ],
        "annotations": [
            {
                "id": 10 + position,
                "image_id": 1 + position % 3,
                "category_id": (7, 3)[position % 2],
                "bbox": [8, 8, 22 + position, 20],
                "area": 400,
                "iscrowd": 0,
                **each,
            }
            for position, each in enumerate(more)
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
    }


def packed() -> Document:
    mask = pycocotools.mask.frPyObjects([[5, 5, 40, 6, 30, 40]], 48, 64)[0]
    return {"size": mask["size"], "counts": mask["counts"].decode()}


def write(folder: Path, document: Document, stem: str = "data") -> Path:
    for number in (1, 2, 3, 4):
        Image.new("RGB", (64, 48)).save(folder / f"{number}.png")
    file = folder / f"{stem}.json"
    file.write_text(json.dumps(document))
    return file


@pytest.fixture
def registered() -> Iterator[Callable[[str, Path], str]]:
    """Register files as a program does, with Detectron2 itself."""
    names: list[str] = []

    def register(name: str, file: Path) -> str:
        register_coco_instances(name, {}, str(file), str(file.parent))
        names.append(name)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def config(train: str, test: str, *words: str) -> CfgNode:
    return load_config(
        TOY,
        [
            *("DATASETS.TRAIN", f"('{train}',)", "DATASETS.TEST", f"('{test}',)"),
            *("MODEL.ROI_HEADS.NUM_CLASSES", "2", "DATALOADER.NUM_WORKERS", "0", *words),
        ],
    )


def test_records_are_those_of_detectron2(tmp_path: Path) -> None:
    file = write(tmp_path, sound())
    expected = load_coco_json(str(file), str(tmp_path), "stock")
    assert load_records(file, str(tmp_path), "ours") == expected
    assert sum(len(each["annotations"]) for each in expected) == 5
    for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
        assert MetadataCatalog.get("ours").get(key) == MetadataCatalog.get("stock").get(key)
    for name in ("ours", "stock"):
        MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-8", codecs.BOM_UTF8),
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-16-le", b""),
    ],
)
def test_every_encoding_of_json_is_read_alike(
    encoding: str, mark: bytes, tmp_path: Path, registered: Callable[[str, Path], str]
) -> None:
    document = sound()
    document["categories"][0]["name"] = "Käfer"
    file = write(tmp_path, document)
    plain = load_records(file, str(tmp_path), "plain")
    file.write_bytes(mark + json.dumps(document, ensure_ascii=False).encode(encoding))
    name = registered("encoded", file)
    cfg = config(name, name)
    check_datasets(cfg, [name], ignore_health=True)
    assert DatasetCatalog.get(name) == plain
    assert read_ground_truth(file, checked=True).categories == {3: "dog", 7: "Käfer"}
    MetadataCatalog.remove("plain")


def test_a_file_is_parsed_once_until_it_changes(
    tmp_path: Path, registered: Callable[[str, Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = []
    read_json = annotations.read_json
    monkeypatch.setattr(
        annotations, "read_json", lambda file: (parsed.append(file.name), read_json(file))[1]
    )
    document = sound()
    del document["annotations"][4]
    name = registered("once", write(tmp_path, document))
    cfg = config(name, name)
    check_datasets(cfg, [name])
    batch = next(iter(build_stream(cfg, NamingDatasetMapper(cfg, True), Share(0, 1, 1, 2), 0)))
    assert len(batch) == 2
    assert parsed == ["data.json"]
    file = write(tmp_path, sound())
    assert len(read_annotations(file)["annotations"]) == 6


def first(key: str, value: object) -> Damage:
    return lambda document: document["annotations"][0].update({key: value})


def of_image(key: str, value: object) -> Damage:
    return lambda document: document["images"][0].update({key: value})


def all_images(old: str, new: str) -> Damage:
    return lambda document: [each.update({new: each.pop(old)}) for each in document["images"]]


def corners(document: Document) -> None:
    document["annotations"] = [
        {**document["annotations"][0], "id": number, "bbox": [20, 20, 60, 44]}
        for number in range(30)
    ]


TOLERATED: dict[str, Damage] = {
    "ignore": first("ignore", 1),
    "iscrowd 2": first("iscrowd", 2),
    "iscrowd null": first("iscrowd", None),
    "id": first("id", "x"),
    "id twice": first("id", 11),
    "image_id": first("image_id", "1"),
    "category_id": first("category_id", None),
    "category that is not there": first("category_id", 99),
    "empty box": first("bbox", []),
    "box of text": first("bbox", ["1", 2, 3, 4]),
    "negative box": first("bbox", [9, 9, -4, 4]),
    "box outside": first("bbox", [900, 9, 4, 4]),
    "area": first("area", "7"),
    "flat polygon": first("segmentation", [8, 8, 30, 8, 30, 28]),
    "segmentation of text": first("segmentation", [["a", "b", "c", "d", "e", "f"]]),
    "RLE of one side": first("segmentation", {"size": [48], "counts": [100, 2972]}),
    "RLE of another size": first("segmentation", {"size": [2, 2], "counts": [4]}),
    "no polygon": first("segmentation", [[1, 2, 3, 4]]),
    "nested keypoints": first("keypoints", [[1, 2], [3, 4]]),
    "null keypoints": first("keypoints", [1, 2, 2, None, None, 0]),
    "no object": lambda document: document["annotations"].append(5),
    "file twice": of_image("file_name", "2.png"),
    "file outside": of_image("file_name", "../data/3.png"),
    "corners": corners,
    "parts of the image": lambda document: [
        each.update(bbox=[0.1, 0.1, 0.5, 0.5]) for each in document["annotations"]
    ],
}
FATAL: dict[str, Damage] = {
    "text ids": lambda document: [each.update(id=str(each["id"])) for each in document["images"]],
    "image twice": of_image("id", 1),
    "no image": lambda document: document["images"].append(5),
    "no width": of_image("width", None),
    "camel case": all_images("file_name", "fileName"),
    "category twice": lambda document: document["categories"][0].update(id=3),
    "name twice": lambda document: document["categories"][0].update(name="dog"),
    "no name": lambda document: document["categories"][0].pop("name"),
    "no category": lambda document: document["categories"].__setitem__(0, 5),
    "crowds alone": lambda document: [each.update(iscrowd=1) for each in document["annotations"]],
    "boxes of none": lambda document: [each.update(bbox=[]) for each in document["annotations"]],
    "ignored alone": lambda document: [each.update(ignore=1) for each in document["annotations"]],
    "file missing": of_image("file_name", "no.png"),
    "another size": of_image("width", 65),
}


@pytest.mark.parametrize("kind", list(TOLERATED))
def test_what_is_ignored_can_be_trained_on_and_evaluated(
    kind: str, tmp_path: Path, registered: Callable[[str, Path], str]
) -> None:
    document = sound()
    del document["annotations"][4]
    TOLERATED[kind](document)
    folder = tmp_path / "data"
    folder.mkdir()
    name = registered("damaged", write(folder, document))
    cfg = config(name, name)
    with pytest.raises(DatasetError, match=r"Or add --ignore-health, which goes on: it \w+"):
        check_datasets(cfg, [name])
    check_datasets(cfg, [name], ignore_health=True)
    stream = iter(build_stream(cfg, NamingDatasetMapper(cfg, True), Share(0, 1, 1, 2), 0))
    for _ in range(3):
        assert [len(each["instances"].gt_boxes) for each in next(stream)]
    assert len(read_ground_truth(folder / "data.json", checked=True).image_ids) == 4


@pytest.mark.parametrize("kind", list(FATAL))
def test_what_cannot_be_ignored_does_not_offer_it(
    kind: str, tmp_path: Path, registered: Callable[[str, Path], str]
) -> None:
    document = sound()
    del document["annotations"][4]
    FATAL[kind](document)
    name = registered("damaged", write(tmp_path, document))
    cfg = config(name, name)
    with pytest.raises(DatasetError) as refused:
        check_datasets(cfg, [name])
    assert "add --ignore-health" not in str(refused.value)
    with pytest.raises(DatasetError):
        check_datasets(cfg, [name], ignore_health=True)


def test_images_that_cannot_be_read_may_be_skipped(
    tmp_path: Path, registered: Callable[[str, Path], str]
) -> None:
    document = sound()
    del document["annotations"][4]
    name = registered("damaged", write(tmp_path, document))
    (tmp_path / "1.png").write_bytes(b"no picture")
    cfg = config(name, name)
    with pytest.raises(DatasetError, match="BAD_IMAGES skip, with --ignore-health"):
        check_datasets(cfg, [name])
    cfg = config(name, name, "DATALOADER.BAD_IMAGES", "skip")
    check_datasets(cfg, [name], ignore_health=True)
    stream = iter(build_stream(cfg, NamingDatasetMapper(cfg, True), Share(0, 1, 1, 4), 0))
    assert any("skipped" in each for _ in range(4) for each in next(stream))


def test_a_set_of_the_user_s_own_is_left_alone() -> None:
    def own() -> list[Document]:
        return [{"image_id": "text"}]

    DatasetCatalog.register("own", own)
    try:
        annotations.serve(["own", "nowhere"])
        assert DatasetCatalog["own"] is own
        with pytest.raises(DatasetError, match=r"image_id that is no whole number.*'text'"):
            check_datasets(config("other", "own"), ["own"])
    finally:
        DatasetCatalog.remove("own")


def test_other_classes_than_the_registered_ones(tmp_path: Path) -> None:
    file = write(tmp_path, sound())
    metadata = {"thing_classes": ["cat", "dog"]}
    register_coco_instances("swapped", metadata, str(file), str(tmp_path))
    try:
        with pytest.raises(DatasetError, match="is registered with thing_classes"):
            check_datasets(config("swapped", "swapped"), ["swapped"], ignore_health=True)
    finally:
        DatasetCatalog.remove("swapped")
        MetadataCatalog.remove("swapped")


@given(runs=some.lists(some.integers(0, 40), min_size=1, max_size=12))
def test_a_packed_rle_is_read_as_pycocotools_reads_it(runs: list[int]) -> None:
    total = sum(runs)
    if not total:
        return
    size = [1, total]
    text = pycocotools.mask.frPyObjects({"size": size, "counts": runs}, *size)["counts"].decode()
    assert is_segmentation({"size": size, "counts": text}, *size)
    assert not is_segmentation({"size": [1, total + 1], "counts": text})


def test_objects_without_a_mask_do_not_end_a_training_of_masks(
    tmp_path: Path, registered: Callable[[str, Path], str]
) -> None:
    document = sound()
    document["annotations"][0]["segmentation"] = [8, 8, 30, 8, 30, 28]
    name = registered("masks", write(tmp_path, document))
    words = ["MODEL.MASK_ON", "True", "INPUT.MASK_FORMAT"]
    with pytest.raises(ConfigError, match=r"the masks of 1 objects are RLE.*bitmask"):
        training_records(config(name, name, *words, "polygon"))
    cfg = config(name, name, *words, "bitmask")
    (batch,) = [next(iter(build_stream(cfg, NamingDatasetMapper(cfg, True), Share(0, 1, 1, 1), 0)))]
    assert len(batch[0]["instances"].gt_masks) == 1
    document["annotations"] = document["annotations"][3:4]
    bare = registered("none", write(tmp_path, document, "none"))
    with pytest.raises(DatasetError, match=r"none of 1 objects of .* has a mask"):
        training_records(config(bare, bare, *words, "bitmask"))
