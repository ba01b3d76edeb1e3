"""Whole runs, from each choice of COCO files that somebody may have, on small generated sets."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import DatasetCatalog
from pycocotools.coco import COCO

from resnext_det.data.minival import SIZES, Size, prepare_minival
from resnext_det.data.registered import (
    MINIVAL,
    TRAIN_2014,
    VALMINUSMINIVAL,
    datasets_root,
    locate,
    register_datasets,
)
from resnext_det.errors import DatasetError
from resnext_det_cli import main
from tests.helpers.generated_coco import SMALL, GeneratedCoco, generate

MINIVAL_FILE = "instances_minival2014.json"
REMAINDER_FILE = "instances_valminusminival2014.json"
VAL_FILE = "instances_val2017.json"
ALL = ("train2014", "val2014", "train2017", "val2017")


@pytest.fixture(scope="session")
def generated() -> GeneratedCoco:
    return generate()


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    return tmp_path / "coco"


@pytest.fixture
def restored_catalog() -> Iterator[None]:
    yield
    register_datasets(datasets_root())


def lay(
    coco: Path, generated: GeneratedCoco, annotations: tuple[str, ...], images: tuple[str, ...]
) -> None:
    """Write annotation files, and files in place of images."""
    for split in annotations:
        generated.write(split, coco / "annotations" / f"instances_{split}.json")
    for split in images:
        (coco / split).mkdir(parents=True, exist_ok=True)
        for number in generated.ids(split):
            (coco / split / generated.image_name(split, number)).write_bytes(b"jpeg")


def prepare(coco: Path, **more: Any) -> tuple[bool, str]:
    lines: list[str] = []
    ready = prepare_minival(coco, lines.append, sizes=SMALL, **more)
    return ready, "\n".join(lines)


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return all files below a folder, with their inode and content."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file): (file.stat().st_ino, file.read_bytes()) for file in files}


def read(coco: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((coco / "annotations" / name).read_text())
    return found


def edit(coco: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    document = read(coco, name)
    change(document)
    (coco / "annotations" / name).write_text(json.dumps(document))


def expected(generated: GeneratedCoco, split: str, subset: str) -> dict[str, Any]:
    """Return part of a split, selected the simple way."""
    document, wanted = generated.document(split), set(generated.ids(subset))
    document["images"] = [each for each in document["images"] if each["id"] in wanted]
    annotations = document["annotations"]
    document["annotations"] = [each for each in annotations if each["image_id"] in wanted]
    return document


@pytest.mark.parametrize(
    ("annotations", "images", "served"),
    [
        (("val2014", "val2017"), ("val2014",), {MINIVAL: "val2014", VALMINUSMINIVAL: "val2014"}),
        (ALL, ("val2014", "train2014"), dict.fromkeys((MINIVAL, VALMINUSMINIVAL), "val2014")),
        (
            ALL,
            ("train2017", "val2017"),
            {MINIVAL: "val2017", VALMINUSMINIVAL: "train2017", TRAIN_2014: "train2017"},
        ),
        (
            ("train2014", "train2017", "val2017"),
            ("train2017", "val2017"),
            {VALMINUSMINIVAL: "train2017", TRAIN_2014: "train2017"},
        ),
        (
            ("val2014", "train2017", "val2017"),
            ("train2017", "val2017"),
            {VALMINUSMINIVAL: "train2017", TRAIN_2014: "train2017"},
        ),
        (("val2014", "train2017"), ("val2014",), {MINIVAL: "val2014"}),
        (("train2017", "val2017"), ("train2017", "val2017"), {MINIVAL: "val2017"}),
    ],
)
def test_derives_sets_from_the_files_at_hand(
    annotations: tuple[str, ...],
    images: tuple[str, ...],
    served: dict[str, str],
    coco: Path,
    generated: GeneratedCoco,
    restored_catalog: None,
) -> None:
    """The registered names load them; a second run changes nothing, and a dry run reports the
    same."""
    lay(coco, generated, annotations, images)
    before = state(coco)
    would = prepare(coco, dry_run=True)
    assert state(coco) == before
    ready, said = prepare(coco)
    assert ready, said
    assert (would[0], would[1].replace("would write", "wrote")) == (ready, said)
    subsets = {MINIVAL: "minival", VALMINUSMINIVAL: "valminusminival", TRAIN_2014: "train2014"}
    for name, split in served.items():
        file, folder = locate(coco, name)
        assert folder == coco / split
        assert f"{name}: ready, from {file.name} and {split}" in said
        source = split if split in annotations else "val2017"
        assert json.loads(file.read_text()) == expected(generated, source, subsets[name])
        register_datasets(coco.parent)
        records = DatasetCatalog.get(name)
        assert {record["image_id"] for record in records} == set(generated.ids(subsets[name]))
        assert sum(len(each["annotations"]) for each in records) == SMALL[subsets[name]].annotations
        assert all(Path(record["file_name"]).is_file() for record in records)
    before = state(coco)
    assert prepare(coco)[0]
    assert state(coco) == before


def test_2017_annotations_serve_2014_images(coco: Path, generated: GeneratedCoco) -> None:
    lay(coco, generated, ("val2017",), ("val2014",))
    assert prepare(coco)[0]
    wanted = expected(generated, "val2017", "minival")
    for image in wanted["images"]:
        image["file_name"] = f"COCO_val2014_{image['id']:012d}.jpg"
    assert read(coco, MINIVAL_FILE) == wanted


@pytest.mark.parametrize(
    ("annotations", "name", "said"),
    [
        ((), MINIVAL, "Add instances_val2017.json"),
        (("train2014", "val2014"), MINIVAL, "Add instances_val2017.json"),
        (("train2017", "val2017"), VALMINUSMINIVAL, "use coco_2017_train, the union"),
        (("val2014",), TRAIN_2014, "Add instances_train2014.json"),
    ],
)
def test_names_missing_annotations(
    annotations: tuple[str, ...], name: str, said: str, coco: Path, generated: GeneratedCoco
) -> None:
    lay(coco, generated, annotations, ("val2014",))
    (line,) = [line for line in prepare(coco)[1].splitlines() if line.startswith(name)]
    assert said in line


def test_keeps_the_published_file(coco: Path, generated: GeneratedCoco) -> None:
    """The ids of some crowds in it are floats, and repeat."""
    lay(coco, generated, ("val2014", "val2017"), ("val2014",))
    document = expected(generated, "val2014", "minival")
    for annotation in document["annotations"][:2]:
        annotation.update(id=908400416500.0, iscrowd=1)
    file = coco / "annotations" / MINIVAL_FILE
    file.write_text(json.dumps(document))
    before = state(coco)[str(file)]
    assert prepare(coco)[0]
    assert state(coco)[str(file)] == before
    assert locate(coco, MINIVAL)[0] == file


def test_an_incomplete_folder_does_not_hide_a_complete_one(
    coco: Path, generated: GeneratedCoco
) -> None:
    lay(coco, generated, ALL, ("val2017", "train2017", "val2014"))
    images = sorted((coco / "val2014").iterdir())
    for number, image in enumerate(images):
        image.unlink()
        if number % 3 == 0:
            image.touch()
        elif number % 3 == 1:
            image.symlink_to(coco / "nowhere")
    ready, said = prepare(coco)
    assert ready, said
    assert locate(coco, MINIVAL)[1] == coco / "val2017"
    assert locate(coco, VALMINUSMINIVAL)[1] == coco / "train2017"
    for image in images:
        image.unlink(missing_ok=True)
        image.write_bytes(b"jpeg")
    assert prepare(coco)[0]
    assert locate(coco, MINIVAL) == (coco / "annotations" / MINIVAL_FILE, coco / "val2014")
    gone = sorted(generated.image_name("val2014", number) for number in generated.minival)[:5]
    for name in gone:
        (coco / "val2014" / name).unlink()
    ready, said = prepare(coco)
    assert not ready
    missing = f"5 of 12 images are missing from {coco / 'val2014'} ({', '.join(gone[:3])}, ...)"
    assert f"{missing}; {coco / 'val2017'} has them all: move {coco / 'val2014'} away" in said


def swap_image(document: dict[str, Any], stranger: int, name: str) -> None:
    """Give the first image, and its annotations, another id."""
    gone = document["images"][0]["id"]
    document["images"][0].update(id=stranger, file_name=name)
    for annotation in document["annotations"]:
        if annotation["image_id"] == gone:
            annotation["image_id"] = stranger


def test_refuses_other_choices_of_images(coco: Path, generated: GeneratedCoco) -> None:
    """Of the right size, which other files contradict."""
    lay(coco, generated, ("val2014", "val2017"), ("val2014",))
    assert prepare(coco)[0]
    other = generated.ids("valminusminival")[0]
    name = generated.image_name("val2014", other)
    edit(coco, MINIVAL_FILE, lambda document: swap_image(document, other, name))
    before = state(coco)
    with pytest.raises(DatasetError, match=r"minival2014.json has other images than minival"):
        prepare(coco)
    assert state(coco) == before
    for derived in (MINIVAL_FILE, REMAINDER_FILE):
        (coco / "annotations" / derived).unlink()
    edit(coco, VAL_FILE, lambda document: swap_image(document, 600_000, "000000600000.jpg"))
    with pytest.raises(DatasetError, match=r"do not belong together: .* valminusminival"):
        prepare(coco)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["categories"][3].update(name="aeroplane"), "COCO's 80 categories"),
        (lambda d: d["images"][0].update(id=True), "COCO's id and file name"),
        (lambda d: d["images"][0].update(file_name="a.jpg"), "COCO's id and file name"),
        (lambda d: d["images"].append(d["images"][0]), "is not val2017: it has 12 images and 71"),
        (lambda d: d["images"].pop(), "is not val2017: it has 11 images"),
        (lambda d: d["annotations"].append(1), "is not val2017: it has 12 images and 72"),
    ],
)
def test_refuses_a_damaged_file_before_writing(
    change: Callable[[dict[str, Any]], Any], said: str, coco: Path, generated: GeneratedCoco
) -> None:
    lay(coco, generated, ("val2014", "val2017"), ("val2014",))
    edit(coco, VAL_FILE, change)
    before = state(coco)
    with pytest.raises(DatasetError, match=rf"val2017\.json.*{said}"):
        prepare(coco)
    assert state(coco) == before


def test_refuses_annotations_that_give_another_size(coco: Path, generated: GeneratedCoco) -> None:
    lay(coco, generated, ("val2014", "val2017"), ("val2014",))
    edit(coco, "instances_val2014.json", lambda d: d["annotations"][0].update(image_id=[7]))
    with pytest.raises(DatasetError, match=r"gives .*minival .* instead of .*not COCO's"):
        prepare(coco)


def test_leaves_nothing_half_written(
    coco: Path, generated: GeneratedCoco, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk, and killed while the second file is written."""
    lay(coco, generated, ("val2014", "val2017"), ("val2014",))
    before = state(coco)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(DatasetError, match=r"minival2014\.json cannot be written: No space"):
            prepare(coco)
    assert state(coco) == before

    def killed() -> None:
        calls: list[object] = []

        def fsync(descriptor: object) -> None:
            calls.append(descriptor)
            if len(calls) == 3:  # the first file takes two, for itself and its folder
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = fsync  # type: ignore[assignment]
        prepare(coco)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    for file in (coco / "annotations").glob("[!.]*.json"):
        json.loads(file.read_bytes())
    assert prepare(coco)[0]
    assert read(coco, MINIVAL_FILE) == expected(generated, "val2014", "minival")
    assert read(coco, REMAINDER_FILE) == expected(generated, "val2014", "valminusminival")


def test_the_command_on_true_sizes(
    coco: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """val2017 has its true size; nothing else is there."""

    def run(*words: object) -> tuple[int, str]:
        try:
            code = main(["prepare-minival", *map(str, words)])
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    sizes = {**SMALL, "minival": SIZES["minival"], "val2014": Size(5_001, 36_782)}
    lay(coco, generate(sizes), ("val2017",), ("val2017",))
    code, said = run("--coco", coco)
    assert code == 0 and f"export DETECTRON2_DATASETS={coco.parent}" in said
    assert "coco_2014_minival: ready, from instances_val2017.json and val2017" in said
    next((coco / "val2017").iterdir()).unlink()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(coco.parent))
    code, said = run("--dry-run")
    assert code == 1 and "1 of 5,000 images are missing" in said
    (coco / "annotations" / VAL_FILE).write_text("[")
    code, said = run("--coco", coco)
    assert code == 2 and "instances_val2017.json is not JSON" in said


@pytest.mark.slow
def test_files_of_the_true_size(coco: Path) -> None:
    lay(coco, generate(SIZES), ALL, ("val2014",))
    assert prepare_minival(coco, print)
    assert len(COCO(str(coco / "annotations" / MINIVAL_FILE)).anns) == 36_781
    remainder = COCO(str(coco / "annotations" / REMAINDER_FILE))
    assert (len(remainder.imgs), len(remainder.anns)) == (35_504, 255_094)
