"""Annotation files from reading to training, against Detectron2's own loader."""

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
from PIL import Image

from resnext_det import load_config
from resnext_det.data import annotations
from resnext_det.data.annotations import load_records, read_annotations
from resnext_det.data.checks import check_datasets
from resnext_det.data.mapper import NamingDatasetMapper
from resnext_det.data.stream import Share, build_stream, training_records
from resnext_det.errors import ConfigError, DatasetError
from resnext_det.evaluation.annotations import read_ground_truth

TOY = "faster_rcnn_X_26_8x4d_FPN_toy"
Document = dict[str, Any]
Damage = Callable[[Document], object]
Register = Callable[[str, Path], str]


def sound() -> Document:
    """Four images of 64 x 48 pixels; a crowd, polygons, both kinds of RLE and keypoints."""
    packed = pycocotools.mask.frPyObjects([[5, 5, 40, 6, 30, 40]], 48, 64)[0]
    more: list[Document] = [
        {"segmentation": [[8, 8, 30, 8, 30, 28], [1, 2, 3, 4]]},
        {"segmentation": {"size": [48, 64], "counts": [100, 30, 2942]}, "iscrowd": 1},
        {"segmentation": {"size": packed["size"], "counts": packed["counts"].decode()}},
        {"keypoints": [10, 12, 2, 20.5, 22, 1, 0, 0, 0], "num_keypoints": 2},
        {"segmentation": [], "image_id": 3},
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


def write(folder: Path, document: Document, stem: str = "data") -> Path:
    for number in (1, 2, 3, 4):
        Image.new("RGB", (64, 48)).save(folder / f"{number}.png")
    file = folder / f"{stem}.json"
    file.write_text(json.dumps(document))
    return file


@pytest.fixture
def registered() -> Iterator[Register]:
    """Register files as a program does, with Detectron2 itself."""
    before = set(DatasetCatalog.list())

    def register(name: str, file: Path) -> str:
        register_coco_instances(name, {}, str(file), str(file.parent))
        return name

    yield register
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def config(name: str, *words: str) -> CfgNode:
    data_sets = ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)"]
    more = ["MODEL.ROI_HEADS.NUM_CLASSES", "2", "DATALOADER.NUM_WORKERS", "0", *words]
    return load_config(TOY, [*data_sets, *more])


def batches(cfg: CfgNode, count: int, images: int = 2) -> list[list[Document]]:
    stream = iter(build_stream(cfg, NamingDatasetMapper(cfg, True), Share(0, 1, 1, images), 0))
    return [next(stream) for _ in range(count)]


def test_records_are_those_of_detectron2(tmp_path: Path) -> None:
    document = sound()
    document["annotations"].append(
        {**document["annotations"][0], "id": 20, "segmentation": [[1, 2, 3, 4]]}
    )
    file = write(tmp_path, document)
    expected = load_coco_json(str(file), str(tmp_path), "stock")
    assert load_records(file, str(tmp_path), "ours") == expected
    assert sum(len(each["annotations"]) for each in expected) == 5
    for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
        assert MetadataCatalog.get("ours").get(key) == MetadataCatalog.get("stock").get(key)
    for name in ("ours", "stock"):
        MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [("utf-8", codecs.BOM_UTF8), ("utf-16-be", codecs.BOM_UTF16_BE), ("utf-16-le", b"")],
)
def test_reads_every_encoding_of_json(
    encoding: str, mark: bytes, tmp_path: Path, registered: Register
) -> None:
    document = sound()
    document["categories"][0]["name"] = "Käfer"
    file = write(tmp_path, document)
    plain = load_records(file, str(tmp_path), "plain")
    file.write_bytes(mark + json.dumps(document, ensure_ascii=False).encode(encoding))
    name = registered("encoded", file)
    check_datasets(config(name), [name])
    assert DatasetCatalog.get(name) == plain
    assert read_ground_truth(file, checked=True).categories == {3: "dog", 7: "Käfer"}
    MetadataCatalog.remove("plain")


def test_parses_a_file_once_until_it_changes(
    tmp_path: Path, registered: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = []
    read_json = annotations.read_json
    monkeypatch.setattr(
        annotations, "read_json", lambda file: (parsed.append(file.name), read_json(file))[1]
    )
    name = registered("once", write(tmp_path, sound()))
    cfg = config(name)
    check_datasets(cfg, [name])
    assert [len(batch) for batch in batches(cfg, 1)] == [2]
    assert parsed == ["data.json"]
    document = sound()
    del document["annotations"][4]
    assert len(read_annotations(write(tmp_path, document))["annotations"]) == 4


UNUSABLE: list[Document] = [
    {"ignore": 1},
    {"iscrowd": 2},
    {"image_id": "1"},
    {"category_id": None},
    {"category_id": 99},
    {"bbox": []},
    {"bbox": ["1", 2, 3, 4]},
    {"segmentation": [[1, 2, 3, 4]]},
]
KEPT: list[Document] = [
    {"iscrowd": None},
    {"id": "x"},
    {"id": 11},
    {"bbox": [9, 9, -4, 4]},
    {"bbox": [900, 9, 4, 4]},
    {"area": "7"},
    {"segmentation": [8, 8, 30, 8, 30, 28]},
    {"segmentation": [["a", "b", "c", "d", "e", "f"]]},
    {"segmentation": {"size": [48], "counts": [100, 2972]}},
    {"segmentation": {"size": [2, 2], "counts": [4]}},
    {"keypoints": [[1, 2], [3, 4]]},
    {"keypoints": [1, 2, 2, None, None, 0]},
]


def test_leaves_out_what_cannot_be_used(tmp_path: Path, registered: Register) -> None:
    """From the check, which --ignore-health passes, to training and evaluation."""
    document = sound()
    given = document["annotations"][0]
    document["annotations"] += [
        {**given, "id": 100 + number, **change} for number, change in enumerate(UNUSABLE + KEPT)
    ]
    document["annotations"].append(5)
    document["images"][0]["file_name"] = "2.png"
    document["images"][1]["file_name"] = f"../{tmp_path.name}/1.png"
    file = write(tmp_path, document)
    name = registered("damaged", file)
    cfg = config(name)
    with pytest.raises(DatasetError, match=r"data.json: .* Or add --ignore-health"):
        check_datasets(cfg, [name])
    check_datasets(cfg, [name], ignore_health=True)
    records = load_records(file, str(tmp_path), name)
    loaded = [each for record in records for each in record["annotations"]]
    assert len(loaded) == 5 + len(KEPT)
    # Malformed masks and keypoints alone are dropped.
    assert sum("segmentation" in each for each in loaded) == 3 + len(KEPT) - 4
    assert sum("keypoints" in each for each in loaded) == 1
    assert all(len(each["instances"].gt_boxes) for batch in batches(cfg, 3) for each in batch)
    truth = read_ground_truth(file, checked=True)
    assert len(truth.image_ids) == 4 and len(truth.objects.areas) >= 5 + len(KEPT)


def of_image(key: str, value: object) -> Damage:
    return lambda document: document["images"][0].update({key: value})


FATAL: dict[str, Damage] = {
    "text ids": lambda document: [each.update(id=str(each["id"])) for each in document["images"]],
    "repeated image": of_image("id", 1),
    "no image": lambda document: document["images"].append(5),
    "no width": of_image("width", None),
    "no file_name": lambda document: document["images"][0].pop("file_name"),
    "repeated category": lambda document: document["categories"][0].update(id=3),
    "repeated name": lambda document: document["categories"][0].update(name="dog"),
    "no name": lambda document: document["categories"][0].pop("name"),
    "no category": lambda document: document["categories"].__setitem__(0, 5),
    "only crowds": lambda document: [each.update(iscrowd=1) for each in document["annotations"]],
    "no box": lambda document: [each.update(bbox=[]) for each in document["annotations"]],
    "missing file": of_image("file_name", "no.png"),
    "another size": of_image("width", 65),
}


@pytest.mark.parametrize("kind", list(FATAL))
def test_offers_ignore_health_only_if_it_helps(
    kind: str, tmp_path: Path, registered: Register
) -> None:
    document = sound()
    FATAL[kind](document)
    name = registered("damaged", write(tmp_path, document))
    with pytest.raises(DatasetError, match=r"data\.json") as refused:
        check_datasets(config(name), [name])
    assert "add --ignore-health" not in str(refused.value)
    with pytest.raises(DatasetError, match=r"data\.json"):
        check_datasets(config(name), [name], ignore_health=True)
    if "file" not in kind and "size" not in kind and "only" not in kind and "box" not in kind:
        with pytest.raises(DatasetError, match=r"data\.json"):
            load_records(tmp_path / "data.json", str(tmp_path), "damaged")


def test_skips_unreadable_images(tmp_path: Path, registered: Register) -> None:
    name = registered("damaged", write(tmp_path, sound()))
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match="BAD_IMAGES skip, with --ignore-health"):
        check_datasets(config(name), [name])
    cfg = config(name, "DATALOADER.BAD_IMAGES", "skip")
    check_datasets(cfg, [name], ignore_health=True)
    assert any("skipped" in each for batch in batches(cfg, 4, 4) for each in batch)


def test_keeps_a_loading_function_of_the_user(registered: Register) -> None:
    def own() -> list[Document]:
        return [{"image_id": "text"}]

    DatasetCatalog.register("own", own)
    annotations.serve(["own", "nowhere"])
    assert DatasetCatalog["own"] is own
    cfg = load_config(TOY, ["DATASETS.TEST", "('own',)"])
    with pytest.raises(DatasetError, match=r"has the image_id 'text'"):
        check_datasets(cfg, ["own"])


def test_refuses_other_classes_than_the_registered_ones(
    tmp_path: Path, registered: Register
) -> None:
    name = registered("swapped", write(tmp_path, sound()))
    MetadataCatalog.get(name).thing_classes = ["cat", "dog"]
    with pytest.raises(DatasetError, match="is registered with thing_classes"):
        check_datasets(config(name), [name], ignore_health=True)


def test_trains_masks_of_objects_that_have_one(tmp_path: Path, registered: Register) -> None:
    document = sound()
    document["annotations"][0]["segmentation"] = [8, 8, 30, 8, 30, 28]
    name = registered("masks", write(tmp_path, document))
    words = ["MODEL.MASK_ON", "True", "INPUT.MASK_FORMAT"]
    with pytest.raises(ConfigError, match=r"the masks of 1 objects are RLE.*bitmask"):
        training_records(config(name, *words, "polygon"))
    ((image,),) = batches(config(name, *words, "bitmask"), 1, 1)
    assert len(image["instances"].gt_masks) == 1
    document["annotations"] = document["annotations"][3:4]
    bare = registered("none", write(tmp_path, document, "none"))
    with pytest.raises(DatasetError, match=r"none of the 1 objects of .* has a mask"):
        training_records(config(bare, *words, "bitmask"))
