"""Whole runs, from each choice of COCO files that somebody may have, on small generated sets."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from detectron2.data.datasets import load_coco_json
from pycocotools.coco import COCO

from resnext_det.data.minival import COCO as TRUE
from resnext_det.data.minival import Counts, Size, prepare_minival
from resnext_det.data.registered import MINIVAL, TRAIN_2014, VALMINUSMINIVAL, locate
from resnext_det.errors import DatasetError
from tests.helpers.generated_coco import SMALL, GeneratedCoco, generate

MINIVAL_FILE = "instances_minival2014.json"
REMAINDER_FILE = "instances_valminusminival2014.json"
ALL = ("train2014", "val2014", "train2017", "val2017")
Tool = Callable[..., "CompletedProcess[str]"]
Stock = Callable[[Path, list[dict[str, Any]]], Any]


@pytest.fixture(scope="session")
def generated() -> GeneratedCoco:
    return generate()


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    return tmp_path / "coco"


def lay(
    coco: Path, generated: GeneratedCoco, annotations: tuple[str, ...], images: tuple[str, ...]
) -> None:
    """Write annotation files, and files that stand for images."""
    for split in annotations:
        generated.write(split, coco / "annotations" / f"instances_{split}.json")
    for split in images:
        (coco / split).mkdir(parents=True, exist_ok=True)
        for number in generated.ids(split):
            (coco / split / generated.image_name(split, number)).write_bytes(b"jpeg")


def prepare(coco: Path, **more: Any) -> tuple[bool, str]:
    lines: list[str] = []
    ready = prepare_minival(coco, lines.append, counts=SMALL, **more)
    return ready, "\n".join(lines)


def state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """All files below a folder: inode, date and content."""
    return {
        str(file.relative_to(folder)): (
            file.stat().st_ino,
            file.stat().st_mtime_ns,
            file.read_bytes(),
        )
        for file in folder.rglob("*")
        if file.is_file()
    }


def read(coco: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((coco / "annotations" / name).read_text())
    return found


def edit(coco: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    document = read(coco, name)
    change(document)
    (coco / "annotations" / name).write_text(json.dumps(document))


def by_id(records: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    assert len({record["id"] for record in records}) == len(records)
    return {record["id"]: record for record in records}


def expected(generated: GeneratedCoco, split: str, subset: str) -> dict[str, Any]:
    """Part of a split, picked the plain way."""
    document, wanted = generated.document(split), set(generated.ids(subset))
    document["images"] = [each for each in document["images"] if each["id"] in wanted]
    annotations = document["annotations"]
    document["annotations"] = [each for each in annotations if each["image_id"] in wanted]
    return document


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for key in ("images", "annotations", "categories"):
        assert by_id(found[key]) == by_id(wanted[key])
    assert (found["info"], found["licenses"]) == (wanted["info"], wanted["licenses"])


@pytest.mark.parametrize(
    ("annotations", "images", "served"),
    [
        (
            ("val2014", "val2017"),
            ("val2014",),
            {MINIVAL: "val2014", VALMINUSMINIVAL: "val2014"},
        ),
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
def test_sets_are_derived_from_the_files_there_are(
    annotations: tuple[str, ...],
    images: tuple[str, ...],
    served: dict[str, str],
    coco: Path,
    generated: GeneratedCoco,
) -> None:
    """Detectron2 reads the right images with the right annotations; a second run changes nothing,
    and a dry run reports the same as a true one."""
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
        assert_same(json.loads(file.read_text()), expected(generated, source, subsets[name]))
        records = load_coco_json(str(file), str(folder))
        assert {record["image_id"] for record in records} == set(generated.ids(subsets[name]))
        assert all(Path(record["file_name"]).is_file() for record in records)
    before = state(coco)
    assert prepare(coco)[0]
    assert state(coco) == before


def test_annotations_of_2017_serve_images_of_2014(coco: Path, generated: GeneratedCoco) -> None:
    lay(coco, generated, ("val2017",), ("val2014",))
    assert prepare(coco)[0]
    wanted = expected(generated, "val2017", "minival")
    for image in wanted["images"]:
        image["file_name"] = f"COCO_val2014_{image['id']:012d}.jpg"
    assert_same(read(coco, MINIVAL_FILE), wanted)


@pytest.mark.parametrize(
    ("annotations", "name", "said"),
    [
        ((), MINIVAL, "add instances_val2017.json"),
        (("val2014",), MINIVAL, "add instances_val2017.json"),
        (("train2014", "val2014"), MINIVAL, "add instances_val2017.json"),
        (("train2017", "val2017"), VALMINUSMINIVAL, "Train on coco_2017_train, the union"),
        (("val2014",), TRAIN_2014, "add COCO's annotations of 2014"),
    ],
)
def test_what_is_missing_is_named(
    annotations: tuple[str, ...], name: str, said: str, coco: Path, generated: GeneratedCoco
) -> None:
    """With the command that unpacks a zip file which has it."""
    lay(coco, generated, annotations, ("val2014",))
    for year in ("2014", "2017"):
        (coco / f"annotations_trainval{year}.zip").touch()
    lines = prepare(coco)[1].splitlines()
    (line,) = [line for line in lines if line.startswith(name)]
    assert said in line
    absent = [y for y in ("2014", "2017") if not any(split.endswith(y) for split in annotations)]
    for year in absent:
        assert f"unzip -n {coco}/annotations_trainval{year}.zip -d {coco}" in line


@pytest.mark.parametrize("with_val2014", [True, False])
def test_the_published_files_get_unique_ids(
    with_val2014: bool, coco: Path, generated: GeneratedCoco
) -> None:
    """From val2014 if it is there, else by renumbering the ids that repeat; originals are kept."""
    lay(coco, generated, ("val2014",) if with_val2014 else (), ("val2014",))
    published = generated.write_published("minival", coco / "annotations" / MINIVAL_FILE)
    content, original = published.read_bytes(), read(coco, MINIVAL_FILE)
    taken = published.with_name("instances_minival2014.original.json")
    taken.write_text("something of the user's own")
    ready, said = prepare(coco)
    assert ready, said
    assert "annotation ids repeat or are floats" in said
    found = read(coco, MINIVAL_FILE)
    if with_val2014:
        assert_same(found, expected(generated, "val2014", "minival"))
    else:
        numbers = [each["id"] for each in found["annotations"]]
        assert {type(number) for number in numbers} == {int}
        assert len(set(numbers)) == len(numbers)
        pairs = list(zip(original["annotations"], found["annotations"]))
        assert sum(one["id"] != other["id"] for one, other in pairs) == 1
        assert all({**one, "id": 0} == {**other, "id": 0} for one, other in pairs)
    assert taken.read_text() == "something of the user's own"
    assert published.with_name("instances_minival2014.original2.json").read_bytes() == content
    before = state(coco)
    assert prepare(coco)[0]
    assert state(coco) == before


@pytest.mark.parametrize("source", ["val2014", "val2017"])
def test_a_derived_file_that_differs_is_replaced_and_kept(
    source: str, coco: Path, generated: GeneratedCoco
) -> None:
    lay(coco, generated, (source, "val2017"), ("val2014",))
    assert prepare(coco)[0]
    right = read(coco, MINIVAL_FILE)

    def harm(document: dict[str, Any]) -> None:
        document["annotations"][5]["bbox"][0] += 1.5

    edit(coco, MINIVAL_FILE, harm)
    harmed = read(coco, MINIVAL_FILE)
    ready, said = prepare(coco)
    assert ready
    assert f"{MINIVAL_FILE} differs from instances_{source}.json" in said
    assert read(coco, MINIVAL_FILE) == right
    assert read(coco, "instances_minival2014.original.json") == harmed


@pytest.mark.parametrize("content", ["nothing", "half", "empty files", "dangling links"])
def test_a_set_that_can_be_read_stays_readable(
    content: str, coco: Path, generated: GeneratedCoco
) -> None:
    """val2017 and train2017 are complete, and val2014 is not."""
    lay(coco, generated, ALL, ("val2017", "train2017"))
    (coco / "val2014").mkdir()
    names = [generated.image_name("val2014", number) for number in sorted(generated.val2014)]
    for at, name in enumerate(names):
        if content == "empty files" or (content == "half" and at % 2):
            (coco / "val2014" / name).write_bytes(b"" if content == "empty files" else b"jpeg")
        elif content == "dangling links":
            (coco / "val2014" / name).symlink_to(coco / "nowhere")
    ready, said = prepare(coco)
    assert ready, said
    assert locate(coco, MINIVAL)[1] == coco / "val2017"
    assert locate(coco, VALMINUSMINIVAL)[1] == coco / "train2017"
    for name in names:
        (coco / "val2014" / name).unlink(missing_ok=True)
        (coco / "val2014" / name).write_bytes(b"jpeg")
    assert prepare(coco)[0]
    assert locate(coco, MINIVAL) == (coco / "annotations" / MINIVAL_FILE, coco / "val2014")


def test_missing_images_are_counted_and_named(coco: Path, generated: GeneratedCoco) -> None:
    lay(coco, generated, ("val2014", "val2017"), ("val2014", "val2017"))
    assert prepare(coco)[0]
    gone = sorted(generated.image_name("val2014", number) for number in generated.minival)[:5]
    for name in gone:
        (coco / "val2014" / name).unlink()
    (coco / "val2014" / gone[0]).touch()
    (coco / "val2014.zip").touch()
    ready, said = prepare(coco)
    assert not ready
    assert (
        f"5 of 12 images are missing from {coco / 'val2014'} ({', '.join(gone[:3])}, ...)" in said
    )
    assert f"{coco / 'val2017'} has them all: move {coco / 'val2014'} away" in said
    assert f"unzip -n {coco / 'val2014.zip'} -d {coco}" in said
    (coco / "val2014").rename(coco / "elsewhere")
    assert prepare(coco)[0]


@pytest.mark.parametrize(
    ("size", "annotated", "said"),
    [
        (SMALL.val2014, None, "the counts of val2014"),
        (SMALL.of("valminusminival"), None, "the counts of valminusminival"),
        (Size(12, 70), None, "another choice of as many images"),
        (Size(5000, 35800), 4954, "darknet's 5k list"),
        (Size(4954, 35511), None, "darknet's 5k list"),
        (Size(11, 71), None, "minival without the images that have no annotations"),
        (Size(13, 71), None, "has 13 images and 71 annotations of 80 .* has 12 images"),
    ],
)
@pytest.mark.parametrize("name", [MINIVAL_FILE, "instances_val2017.json"])
def test_another_choice_of_images_is_refused(
    name: str, size: Size, annotated: int | None, said: str, coco: Path
) -> None:
    rest = Size(2, 2)
    others = Counts(train2014=rest, val2014=size + rest, minival=size, annotated=annotated or 0)
    split = "minival" if name == MINIVAL_FILE else "val2017"
    generate(others, (4, 6)).write(split, coco / "annotations" / name)
    before = state(coco)
    with pytest.raises(DatasetError, match=f"{name} is not .*{said}"):
        prepare(coco)
    assert state(coco) == before


def swap_image(document: dict[str, Any], stranger: dict[str, Any]) -> None:
    """Replace the first image, and let its annotations be the stranger's."""
    gone = document["images"][0]["id"]
    document["images"][0] = stranger
    for annotation in document["annotations"]:
        if annotation["image_id"] == gone:
            annotation["image_id"] = stranger["id"]


def test_a_random_choice_of_the_right_size_is_refused(coco: Path, generated: GeneratedCoco) -> None:
    """Counts alone do not reveal it; val2017 does."""
    lay(coco, generated, ("val2014", "val2017"), ("val2014",))
    prepare(coco)
    others = set(generated.valminusminival)
    images = generated.document("val2014")["images"]
    stranger = next(each for each in images if each["id"] in others)
    edit(coco, MINIVAL_FILE, lambda document: swap_image(document, stranger))
    before = state(coco)
    with pytest.raises(DatasetError, match="has 1 images that are not in minival"):
        prepare(coco)
    assert state(coco) == before


def test_releases_that_do_not_belong_together_are_refused(
    coco: Path, generated: GeneratedCoco
) -> None:
    lay(coco, generated, ("val2014", "val2017"), ("val2014",))
    image = {**generated.document("val2017")["images"][0], "id": 600_000}
    image["file_name"] = "000000600000.jpg"
    edit(coco, "instances_val2017.json", lambda document: swap_image(document, image))
    with pytest.raises(DatasetError, match=r"1 images of minival \(such as 600000\)"):
        prepare(coco)


def rename_category(document: dict[str, Any]) -> None:
    document["categories"][3]["name"] = "aeroplane"


def drop_category(document: dict[str, Any]) -> None:
    used = {each["category_id"] for each in document["annotations"]}
    unused = next(each for each in document["categories"] if each["id"] not in used)
    document["categories"].remove(unused)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rename_category, "different categories"),
        (drop_category, "of 79 categories"),
        (lambda d: d["images"][0].update(id=True), "images without a whole number as id"),
        (lambda d: d["images"].append(d["images"][0]), "image ids that repeat"),
        (lambda d: d["images"][0].update(file_name="a.jpg"), "as COCO names it"),
        (lambda d: d["annotations"][0].update(id=1.0), "annotations without a whole number as id"),
        (
            lambda d: d["annotations"][0].update(id=d["annotations"][1]["id"]),
            "annotation ids that repeat",
        ),
        (lambda d: d["annotations"][0].update(image_id=7_000_000), "of images that it does not"),
        (lambda d: d["annotations"][0].update(category_id=999), "of categories that it does not"),
        (lambda d: d.pop("images"), "no list of objects under 'images'"),
        (lambda d: d["annotations"].append(1), "no list of objects under 'annotations'"),
    ],
)
def test_a_damaged_file_is_refused_before_anything_is_written(
    change: Callable[[dict[str, Any]], Any], said: str, coco: Path, generated: GeneratedCoco
) -> None:
    lay(coco, generated, ("val2014", "val2017"), ("val2014",))
    edit(coco, "instances_val2017.json", change)
    before = state(coco)
    with pytest.raises(DatasetError, match=said):
        prepare(coco)
    assert state(coco) == before


def test_the_derived_file_gives_the_figures_of_val2017(
    coco: Path, generated: GeneratedCoco, stock_evaluation: Stock
) -> None:
    lay(coco, generated, ("val2014", "val2017"), ("val2014",))
    prepare(coco)
    generator = np.random.default_rng(3)
    detections = []
    for annotation in generated.document("val2017")["annotations"]:
        for _ in range(3):
            box = np.array(annotation["bbox"]) * generator.uniform(0.9, 1.1, 4)
            seen = {"image_id": annotation["image_id"], "category_id": annotation["category_id"]}
            score = float(generator.uniform())
            detections.append({**seen, "bbox": box.tolist(), "score": score})
    ours, theirs = (
        stock_evaluation(coco / "annotations" / name, [dict(each) for each in detections]).stats
        for name in (MINIVAL_FILE, "instances_val2017.json")
    )
    assert 0.05 < ours[0] < 0.95
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("writes", [1, 2])
def test_a_killed_run_leaves_nothing_half_written(
    writes: int, coco: Path, generated: GeneratedCoco
) -> None:
    """SIGKILL while the n-th file is written, but not yet in its place."""
    lay(coco, generated, ("val2014", "val2017"), ("val2014",))
    generated.write_published("minival", coco / "annotations" / MINIVAL_FILE)
    published = (coco / "annotations" / MINIVAL_FILE).read_bytes()

    def killed() -> None:
        remaining = iter(range(writes - 1))

        def fsync(descriptor: object) -> None:
            if next(remaining, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = fsync  # type: ignore[assignment]
        prepare(coco)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    for file in (coco / "annotations").glob("[!.]*.json"):
        json.loads(file.read_bytes())
    if writes == 1:
        assert (coco / "annotations" / MINIVAL_FILE).read_bytes() == published
    for file in coco.rglob(".*.partial"):  # of yesterday
        os.utime(file, (time.time() - 100_000,) * 2)
    assert prepare(coco)[0]
    assert_same(read(coco, MINIVAL_FILE), expected(generated, "val2014", "minival"))
    assert_same(read(coco, REMAINDER_FILE), expected(generated, "val2014", "valminusminival"))
    kept = coco / "annotations" / "instances_minival2014.original.json"
    assert kept.read_bytes() == published
    assert not list(coco.rglob(".*")), "left over by the killed run"


def test_a_full_disk_leaves_the_files_as_they_were(
    coco: Path, generated: GeneratedCoco, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(coco, generated, ("val2014", "val2017"), ("val2014",))

    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    before = state(coco)
    with pytest.raises(DatasetError, match=r"minival2014\.json cannot be written: No space left"):
        prepare(coco)
    assert state(coco) == before


def test_the_command_on_true_counts(coco: Path, tool: Tool) -> None:
    """val2017 of the true size; all else is small, and not written."""
    rest = Size(10, 10)
    made = generate(Counts(rest, TRUE.minival + rest, TRUE.minival), (4, 6))
    lay(coco, made, ("val2017",), ("val2017",))
    done = tool("prepare_minival.py", ["--coco", coco])
    assert done.returncode == 0, done.stderr
    assert "coco_2014_minival: ready, from instances_val2017.json and val2017" in done.stdout
    assert f"export DETECTRON2_DATASETS={coco.parent}" in done.stdout
    next((coco / "val2017").iterdir()).unlink()
    done = tool("prepare_minival.py", ["--dry-run"], datasets=coco.parent)
    assert done.returncode == 1
    assert "1 of 5,000 images are missing" in done.stdout
    (coco / "annotations" / "instances_val2017.json").write_text("[")
    done = tool("prepare_minival.py", ["--coco", coco])
    assert done.returncode == 1
    assert "\nerror: instances_val2017.json is not JSON" in f"\n{done.stderr}"
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_files_of_the_true_size(tmp_path: Path, tool: Tool) -> None:
    made, coco = generate(TRUE), tmp_path / "coco"
    for split in ALL:
        made.write(split, coco / "annotations" / f"instances_{split}.json")
    made.write_published("minival", coco / "annotations" / MINIVAL_FILE)
    lay(coco, made, (), ("val2014",))
    done = tool("prepare_minival.py", ["--coco", coco])
    assert done.returncode == 0, done.stderr
    assert len(COCO(str(coco / "annotations" / MINIVAL_FILE)).anns) == TRUE.minival.annotations
    remainder = COCO(str(coco / "annotations" / REMAINDER_FILE))
    assert (len(remainder.imgs), len(remainder.anns)) == (35_504, 255_094)
