"""COCO minival and its complement, derived from the COCO annotation files at hand.

minival is val2017, and train2017 is train2014 plus valminusminival (Detectron's model zoo and
facebookresearch/Detectron, datasets/data/README.md). Image ids are the same in both releases, so
two of these sets identify the others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from resnext_det.data.annotations import parse_annotations, read_categories
from resnext_det.data.records import Record, is_whole
from resnext_det.data.registered import (
    MINIVAL,
    PARTS,
    TRAIN_2014,
    VALMINUSMINIVAL,
    SplitFiles,
    image_name,
    is_image,
    locate,
)
from resnext_det.errors import DatasetError, quoted
from resnext_det.files import written_beside

Say = Callable[[str], None]
Ids = frozenset[int]


@dataclass(frozen=True)
class Size:
    """Numbers of images and annotations."""

    images: int
    annotations: int

    def __str__(self) -> str:
        return f"{self.images:,} images and {self.annotations:,} annotations"


SIZES: Mapping[str, Size] = {
    "train2014": Size(82_783, 604_907),
    "val2014": Size(40_504, 291_875),
    "minival": Size(5_000, 36_781),
    "valminusminival": Size(35_504, 255_094),
    "train2017": Size(118_287, 860_001),
    "val2017": Size(5_000, 36_781),
}
"""Of COCO's sets."""
RELEASES = ("train2014", "val2014", "train2017", "val2017")

_SETS = {MINIVAL: "minival", VALMINUSMINIVAL: "valminusminival", TRAIN_2014: "train2014"}
# (set, whole, part): the set is the whole without the part.
_DIFFERENCES = (
    ("minival", "val2014", "train2017"),
    ("minival", "val2014", "valminusminival"),
    ("valminusminival", "train2017", "train2014"),
    ("valminusminival", "val2014", "minival"),
    ("train2014", "train2017", "val2014"),
    ("train2014", "train2017", "valminusminival"),
)
_DISJOINT = (("minival", "train2017"), ("minival", "valminusminival"), ("train2014", "val2014"))
_CATEGORIES = {each["id"]: each["name"] for each in COCO_CATEGORIES if each["isthing"]}
# The files that identify the images of a data set.
_NEEDED = {
    MINIVAL: "instances_val2017.json",
    VALMINUSMINIVAL: (
        "instances_val2014.json and instances_val2017.json. To train with the 2017 release alone, "
        "use coco_2017_train, the union of both 2014 sets"
    ),
    TRAIN_2014: "instances_train2014.json",
}


def prepare_minival(
    coco: Path, say: Say, *, dry_run: bool = False, sizes: Mapping[str, Size] = SIZES
) -> bool:
    """Make minival and its complement usable from the COCO files in a folder.

    All annotation files are checked before anything is written; no existing file is changed.

    Args:
        coco: the folder with "annotations", "val2014", "val2017" and so on.
        say: receives each line of the report.
        dry_run: write nothing, but report the same.
        sizes: of COCO's sets; tests use smaller ones.

    Returns:
        Whether minival is usable, or would be without `dry_run`.

    Raises:
        DatasetError: a file is damaged or is not COCO's, or cannot be written.
    """
    if not coco.is_dir():
        raise DatasetError(f"{quoted(coco)} is not a folder: name the one of COCO.")
    annotations = coco / "annotations"
    releases: dict[str, Ids] = {}
    for split in RELEASES:
        file = annotations / f"instances_{split}.json"
        if file.is_file():
            releases[split] = _image_ids(file, split, split, sizes)
            say(f"{file.name}: {split}, {sizes[split]}")
    known = _known_sets(annotations, releases, sizes)
    present = {split: _present(coco / split, split) for split in RELEASES}
    planned = []
    for name, members in _SETS.items():
        part = _missing_part(annotations, name, known.get(members), releases, present)
        if part is not None:
            split = next(split for split in part.sources if split in releases)
            source = annotations / f"instances_{split}.json"
            target = annotations / part.file
            planned.append(target)
            if not dry_run:
                document = _selected(source, part, members, known[members], sizes[members])
                with written_beside(target, DatasetError, durable=True) as beside:
                    beside.write_text(json.dumps(document))
            verb = "would write" if dry_run else "wrote"
            say(f"{verb} {part.file}, from {source.name}")
    ready = {}
    for name, members in _SETS.items():
        ready[name], verdict = _verdict(coco, name, known.get(members), present, planned)
        say(f"{name}: {verdict}")
    return ready[MINIVAL]


def _image_ids(file: Path, split: str, images: str, sizes: Mapping[str, Size]) -> Ids:
    """Return the image ids of a file, named by the split `images`, if it is the set `split`."""
    document = parse_annotations(file)
    if read_categories(document["categories"], file) != _CATEGORIES:
        raise DatasetError(f"{quoted(file)} does not have COCO's 80 categories. Download it again.")
    ids = set()
    for image in document["images"]:
        number = image.get("id") if isinstance(image, dict) else None
        if type(number) is not int or image.get("file_name") != image_name(images, number):
            raise DatasetError(
                f"{quoted(file)}: image {quoted(image)} does not have COCO's id and file name, "
                f"such as {image_name(images, 139)}. Download the file again."
            )
        ids.add(number)
    size = Size(len(ids), len(document["annotations"]))
    if size != sizes[split] or len(ids) < len(document["images"]):
        raise DatasetError(
            f"{quoted(file)} is not {split}: it has {size} instead of {sizes[split]}, so results "
            "on it could not be compared with others. Move it away, or download it again."
        )
    return frozenset(ids)


def _known_sets(
    annotations: Path, releases: Mapping[str, Ids], sizes: Mapping[str, Size]
) -> dict[str, Ids]:
    """Return the image ids of each set that follows from the files.

    Raises:
        DatasetError: the files contradict each other.
    """
    known = dict(releases)
    if "val2017" in known:
        known["minival"] = known["val2017"]
    _add_differences(known)
    files = [f"instances_{split}.json" for split in releases]
    for name, members in _SETS.items():
        for part in PARTS[name]:
            file = annotations / part.file
            if not part.sources or not file.is_file():
                continue
            ids = _image_ids(file, members, part.images, sizes)
            if known.setdefault(members, ids) != ids:
                raise DatasetError(
                    f"{quoted(file)} has other images than {members}, according to "
                    f"{', '.join(files)}. Move it away."
                )
            _add_differences(known)
            files.append(file.name)
    wrong = [name for name, ids in known.items() if len(ids) != sizes[name].images]
    wrong += [one for one, other in _DISJOINT if known.get(one, Ids()) & known.get(other, Ids())]
    if wrong:
        raise DatasetError(
            f"{', '.join(files)} do not belong together: they disagree on the images of "
            f"{wrong[0]}. Download them again."
        )
    return known


def _add_differences(known: dict[str, Ids]) -> None:
    for _ in range(2):  # the last one found may give the first
        for name, whole, part in _DIFFERENCES:
            if name not in known and whole in known and part in known:
                known[name] = known[whole] - known[part]


def _present(folder: Path, split: str) -> frozenset[str]:
    """Return the names of a split's images that are in its folder and not empty."""
    if not folder.is_dir():
        return frozenset()
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if is_image(entry, split))
    except OSError as error:
        raise DatasetError(f"{quoted(folder)} cannot be listed: {error.strerror}.") from error


def _missing(ids: Ids, split: str, present: Mapping[str, frozenset[str]]) -> list[str]:
    names = (image_name(split, number) for number in sorted(ids))
    return [name for name in names if name not in present[split]]


def _missing_part(
    annotations: Path,
    name: str,
    ids: Ids | None,
    releases: Mapping[str, Ids],
    present: Mapping[str, frozenset[str]],
) -> SplitFiles | None:
    """Return the part to write for a data set, None if it is there or cannot be written.

    It is the part with all its images, else with any, else one of a release at hand.
    """
    if ids is None:
        return None

    def usable(part: SplitFiles) -> tuple[bool, bool, bool]:
        complete = not _missing(ids, part.images, present)
        return complete, bool(present[part.images]), part.images in releases

    parts = [
        part
        for part in PARTS[name]
        if (annotations / part.file).is_file() or any(split in releases for split in part.sources)
    ]
    best = max(parts, key=usable, default=None)
    if best is None or not any(usable(best)) or (annotations / best.file).is_file():
        return None
    return best


def _selected(file: Path, part: SplitFiles, members: str, ids: Ids, size: Size) -> Record:
    """Return the images of a set and their annotations, from a file of COCO's.

    Raises:
        DatasetError: there are more or fewer than in COCO's set.
    """
    document = parse_annotations(file)
    document["images"] = [
        {**image, "file_name": image_name(part.images, image["id"])}
        for image in document["images"]
        if image["id"] in ids
    ]
    document["annotations"] = [
        each
        for each in document["annotations"]
        if isinstance(each, dict) and is_whole(each.get("image_id")) and each["image_id"] in ids
    ]
    found = Size(len(document["images"]), len(document["annotations"]))
    if found != size:
        raise DatasetError(
            f"{quoted(file)} gives {members} {found} instead of {size}: it is not COCO's. Download "
            "it again."
        )
    return document


def _verdict(
    coco: Path,
    name: str,
    ids: Ids | None,
    present: Mapping[str, frozenset[str]],
    planned: list[Path],
) -> tuple[bool, str]:
    """Return whether a data set is ready, with its files or the missing ones."""
    file, folder = locate(coco, name, planned)
    if ids is None:
        return False, f"its images are not known. Add {_NEEDED[name]}"
    if file not in planned and not file.is_file():
        return False, f"no annotations for its images. Add {_NEEDED[name]}"
    missing = _missing(ids, folder.name, present)
    if not missing:
        return True, f"ready, from {file.name} and {folder.name}"
    shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    text = f"{len(missing):,} of {len(ids):,} images are missing from {folder} ({shown})"
    for other in PARTS[name]:
        if other.images != folder.name and not _missing(ids, other.images, present):
            text += f"; {coco / other.images} has them all: move {folder} away to use it"
    return False, text
