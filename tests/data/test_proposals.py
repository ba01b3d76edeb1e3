"""Files of proposals: written by several processes, killed, damaged, and read beside Detectron2."""

from __future__ import annotations

import copy
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.build import load_proposals_into_dataset
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file

from resnext_det import load_config
from resnext_det.data.mapper import NamingDatasetMapper
from resnext_det.data.proposals import (
    FORMAT,
    ProposalWriter,
    read_proposals,
    records_with_proposals,
)
from resnext_det.data.stream import Share, build_stream, build_test_stream, seeded
from resnext_det.errors import ConfigError, DatasetError, ResNeXtError

SIZES = {7: (90, 60), 3: (40, 80), 2**53: (64, 64)}  # width and height by image id
MOST = 5
FAST_RCNN = "fast_rcnn_X_26_8x4d_C4_toy"

Found = dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]]


def some_proposals() -> Found:
    """More than fit, none, and some, in no order; scores repeat."""
    generator = np.random.default_rng(0)
    found: Found = {}
    for (image, (width, height)), count in zip(SIZES.items(), (7, 0, 4)):
        corners = np.sort(generator.uniform(0, 1, (count, 2, 2)), axis=1) * (width, height)
        scores = generator.integers(-2, 2, count).astype(np.float32)
        found[image] = corners.reshape(count, 4).astype(np.float32), scores
    return found


def written(file: Path, identity: str = "a") -> Path:
    writer = ProposalWriter(file, SIZES, MOST, identity)
    writer.start()
    writer.open()
    for image, (boxes, scores) in some_proposals().items():
        writer.add(image, boxes, scores)
    writer.close()
    writer.finish()
    return file


def data_set(folder: Path, name: str, sizes: dict[int, tuple[int, int]] = SIZES) -> str:
    """Register a data set of noise with one object per image."""
    records = []
    for image, (width, height) in sizes.items():
        file = folder / f"{image}.png"
        pixels = np.random.default_rng(image).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(file)
        box = {"bbox": [4, 4, 20, 20], "bbox_mode": 0, "category_id": 0}
        record = {"file_name": str(file), "image_id": image, "width": width, "height": height}
        records.append({**record, "annotations": [box]})
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
    DatasetCatalog.register(name, lambda: copy.deepcopy(records))
    MetadataCatalog.get(name).set(thing_classes=["a"])
    return name


def test_a_file_holds_what_was_written(tmp_path: Path) -> None:
    file = written(tmp_path / "new folder" / "p.safetensors")
    assert [each.name for each in file.parent.iterdir()] == [file.name]
    tensors = load_file(file)  # as any program may read it
    assert tensors["image_ids"].tolist() == list(SIZES)
    assert tensors["sizes"].tolist() == [list(size) for size in SIZES.values()]
    read = read_proposals(file)
    for row, (boxes, scores) in enumerate(some_proposals().values()):
        found = read.of(row)
        order = sorted(range(min(len(scores), MOST)), key=lambda number: -scores[number])
        np.testing.assert_array_equal(found[0], boxes[order])
        np.testing.assert_array_equal(found[1], scores[order])


def test_processes_share_a_file_and_the_next_run_completes_it(tmp_path: Path) -> None:
    file, proposals = tmp_path / "p.safetensors", some_proposals()
    first, second = (ProposalWriter(file, SIZES, MOST, "a") for _ in range(2))
    first.start()
    assert first.open() == second.open() == frozenset()
    first.add(7, *proposals[7])
    second.add(3, *proposals[3])
    assert not file.exists()
    # Both are killed here.
    other = ProposalWriter(file, SIZES, MOST, "a")
    other.start()
    assert other.open() == {7, 3}
    other.add(2**53, *proposals[2**53])
    other.close()
    other.finish()
    assert file.read_bytes() == written(tmp_path / "whole").read_bytes()
    again = ProposalWriter(file, SIZES, MOST, "a")
    again.start()
    assert again.open() == set(SIZES)
    again.finish()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["p.safetensors", "whole"]


@pytest.mark.parametrize("change", ["identity", "images", "number"])
def test_another_model_or_other_images_start_over(change: str, tmp_path: Path) -> None:
    file = written(tmp_path / "p.safetensors")
    sizes = {**SIZES, 7: (91, 60)} if change == "images" else SIZES
    writer = ProposalWriter(
        file, sizes, MOST + (change == "number"), "b" if change == "identity" else "a"
    )
    writer.start()
    assert writer.open() == frozenset()


def test_an_image_that_a_kill_left_half_written_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = ProposalWriter(tmp_path / "p.safetensors", SIZES, MOST, "a")
    writer.start()
    writer.open()
    write, events = ProposalWriter._write, iter(range(10))

    def killed(*arguments: Any) -> None:
        if next(events) == 2:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(ProposalWriter, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        writer.add(7, *some_proposals()[7])
    assert ProposalWriter(tmp_path / "p.safetensors", SIZES, MOST, "a").open() == frozenset()


def test_says_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.pth").write_bytes(b"weights")
    with pytest.raises(ConfigError, match=r"weights\.pth exists, and holds no proposals"):
        written(tmp_path / "weights.pth")
    assert (tmp_path / "weights.pth").read_bytes() == b"weights"
    with pytest.raises(ResNeXtError, match=r"cannot be written: (File exists|Not a directory)"):
        written(tmp_path / "weights.pth" / "p.safetensors")
    monkeypatch.setattr("resnext_det.data.proposals.free_bytes", lambda folder: 100)
    with pytest.raises(ResNeXtError, match=r"0\.0 MiB are needed, and 0\.0 MiB are free"):
        written(tmp_path / "p.safetensors")
    assert [each.name for each in tmp_path.iterdir()] == ["weights.pth"]


def change(file: Path, **tensors: Any) -> None:
    save_file({**load_file(file), **tensors}, file, {"format": FORMAT})


def set_first(name: str, value: float) -> Callable[[Path], None]:
    def harm(file: Path) -> None:
        tensor = load_file(file)[name].copy()
        tensor.flat[0] = value
        change(file, **{name: tensor})

    return harm


def header(file: Path, text: bytes) -> None:
    file.write_bytes(struct.pack("<Q", len(text)) + text)


class Program:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('executed')",)


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "cannot be read: .*No such file"),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), "cannot be read"),
    "empty": (lambda file: file.write_bytes(b""), "cannot be read"),
    "a program": (lambda file: file.write_bytes(pickle.dumps(Program())), "cannot be read"),
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-1]), "cannot be read"),
    "longer": (lambda file: file.write_bytes(file.read_bytes() + b"\0"), "cannot be read"),
    "a huge header": (lambda file: file.write_bytes(b"\xff" * 64), "cannot be read"),
    "huge tensors": (
        lambda file: header(
            file,
            json.dumps(
                {"scores": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 0]}}
            ).encode(),
        ),
        "cannot be read",
    ),
    "weights": (lambda file: save_file({"a": np.zeros(1)}, file), "the format is None"),
    "an unknown tensor": (lambda file: change(file, a=np.zeros(1)), "it holds"),
    "another type": (
        lambda file: change(file, boxes=load_file(file)["boxes"].astype(np.float64)),
        "boxes is 'F64'",
    ),
    "another shape": (
        lambda file: change(file, counts=np.zeros(2, np.int64)),
        r"counts is 'I64' \(2,\) instead of int64 \(3,\)",
    ),
    "a scalar": (lambda file: change(file, scores=np.zeros((), np.float32)), "instead of"),
    "an id twice": (set_first("image_ids", 3), "an image id repeats"),
    "too many": (set_first("counts", MOST + 1), "fewer than 0 or more than 5"),
    "unfinished": (set_first("counts", -1), "fewer than 0"),
    "NaN": (set_first("scores", np.nan), "outside of image 7, or numbers that are not finite"),
    "an infinite box": (set_first("boxes", -np.inf), "outside of image 7"),
    "outside": (set_first("boxes", 92), "outside of image 7"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_refuses_hostile_files(harm: str, tmp_path: Path) -> None:
    file = written(tmp_path / "p\n.safetensors")
    read_proposals(file)
    spoil, message = HARMS[harm]
    spoil(file)
    with pytest.raises(DatasetError, match=message) as refused:
        read_proposals(file)
    assert "save-proposals" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600


def test_refuses_proposals_of_other_images(tmp_path: Path) -> None:
    file = str(written(tmp_path / "p.safetensors"))
    fewer = data_set(tmp_path, "fewer", {7: SIZES[7]})
    assert len(records_with_proposals([fewer], [file])) == 1
    for sizes, message in (
        ({**SIZES, 8: (50, 50)}, "lack 1 images of data set 'others', such as image 8"),
        ({**SIZES, 3: (80, 40)}, "image 3 has 40 x 80 pixels there and 80 x 40 here"),
    ):
        others = data_set(tmp_path, "others", sizes)
        with pytest.raises(DatasetError, match=message):
            records_with_proposals([others], [file])
    with pytest.raises(ConfigError, match="1 files of proposals for 2 data sets"):
        records_with_proposals([fewer, fewer], [file])


@pytest.mark.parametrize("is_train", [True, False])
def test_the_model_gets_what_detectron2_reads_from_a_pickle(is_train: bool, tmp_path: Path) -> None:
    """Through resizing and flips, on the images of both of this package's loaders."""
    name = data_set(tmp_path, "proposed")
    file, pickled = written(tmp_path / "p.safetensors"), tmp_path / "p.pkl"
    kept = {image: (b[:MOST], s[:MOST]) for image, (b, s) in some_proposals().items()}
    for _, scores in kept.values():  # NumPy's reversed order of equal scores is not ours
        scores -= np.arange(len(scores), dtype=np.float32) / 64
    change(
        file,
        scores=np.stack(
            [np.resize(s, MOST) if len(s) else np.zeros(MOST, np.float32) for _, s in kept.values()]
        ),
    )
    content = {
        "ids": list(kept),
        "boxes": [boxes for boxes, _ in kept.values()],
        "objectness_logits": [scores for _, scores in kept.values()],
    }
    pickled.write_bytes(pickle.dumps(content))
    words = ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)"]
    words += ["DATASETS.PROPOSAL_FILES_TRAIN", f"('{file}',)"]
    words += ["DATASETS.PROPOSAL_FILES_TEST", f"('{file}',)", "SOLVER.IMS_PER_BATCH", "1"]
    words += ["DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN", "4", "DATALOADER.DECODER", "pillow"]
    cfg = load_config(FAST_RCNN, words)
    stock = load_proposals_into_dataset(DatasetCatalog.get(name), str(pickled))
    expected = {record["image_id"]: record for record in stock}
    mapper = NamingDatasetMapper(cfg, is_train)
    if is_train:
        batches: Any = build_stream(cfg, mapper, Share(0, 1, 1, 1), seed=3)
    else:
        batches = build_test_stream(cfg, name, mapper)
    seen = set()
    for position, (record,) in zip(range(9 if is_train else 3), batches):
        seen.add(record["image_id"])
        with seeded(3, 0, position):
            other = DatasetMapper(cfg, is_train)(copy.deepcopy(expected[record["image_id"]]))
        assert torch.equal(record["image"], other["image"])
        ours, theirs = record["proposals"], other["proposals"]
        assert len(ours) == min(len(kept[record["image_id"]][0]), 4 if is_train else 100)
        assert torch.equal(ours.proposal_boxes.tensor, theirs.proposal_boxes.tensor)
        assert torch.equal(ours.objectness_logits, theirs.objectness_logits)
    assert seen == set(SIZES)
