"""COCO minival and its complement, derived from the COCO annotation files at hand.

minival is val2017, and train2017 is train2014 plus valminusminival (Detectron's model zoo and
facebookresearch/Detectron, datasets/data/README.md). Image ids are the same in both releases, so
two of these sets identify the others, and the counts of three give the counts of all.
"""

from __future__ import annotations

import contextlib
import filecmp
import gc
import itertools
import json
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnext_det.console import progress_bar
from resnext_det.data.categories import read_categories
from resnext_det.data.registered import (
    MINIVAL,
    PARTS,
    TRAIN_2014,
    VALMINUSMINIVAL,
    Part,
    image_name,
    is_image,
    locate,
)
from resnext_det.errors import DatasetError
from resnext_det.files import written_beside

Document = dict[str, Any]
Say = Callable[[str], None]

RELEASES = ("train2014", "val2014", "train2017", "val2017")
# A set, and the two whose difference it is.
_DIFFERENCES = (
    ("minival", "val2014", "train2017"),
    ("minival", "val2014", "valminusminival"),
    ("valminusminival", "train2017", "train2014"),
    ("valminusminival", "val2014", "minival"),
    ("train2014", "train2017", "val2014"),
    ("train2014", "train2017", "valminusminival"),
)
# The largest of COCO's files, instances_train2017.json, has about 450 MB.
_LARGEST = 2 << 30


# The set behind a registered name, as `Counts.of` calls it.
_SETS = {MINIVAL: "minival", VALMINUSMINIVAL: "valminusminival", TRAIN_2014: "train2014"}


@dataclass(frozen=True)
class Size:
    """Numbers of images and annotations."""

    images: int
    annotations: int

    def __add__(self, other: Size) -> Size:
        return Size(self.images + other.images, self.annotations + other.annotations)

    def __sub__(self, other: Size) -> Size:
        return Size(self.images - other.images, self.annotations - other.annotations)

    def __str__(self) -> str:
        return f"{self.images:,} images and {self.annotations:,} annotations"


@dataclass(frozen=True)
class Counts:
    """The size of each COCO split; tests use smaller ones.

    Attributes:
        train2014: first part of the 2014 release.
        val2014: its second part.
        minival: the 5,000 images of val2014 that the field evaluates on.
        annotated: images of minival with at least one annotation.
        categories: in every file.
    """

    train2014: Size = Size(82_783, 604_907)
    val2014: Size = Size(40_504, 291_875)
    minival: Size = Size(5_000, 36_781)
    annotated: int = 4_952
    categories: int = 80

    def of(self, split: str) -> Size:
        """Return the size of a split, such as "val2014", "minival" or "valminusminival"."""
        remainder = self.val2014 - self.minival
        return {
            "train2014": self.train2014,
            "val2014": self.val2014,
            "minival": self.minival,
            "val2017": self.minival,
            "valminusminival": remainder,
            "train2017": self.train2014 + remainder,
        }[split]

    def likeness(self, size: Size, annotated: int) -> str:
        """Name the known set that a file of another size resembles; "" for none."""
        for split in ("val2014", "train2014", "train2017", "valminusminival", "minival"):
            if size == self.of(split):
                return f"; these are the counts of {split}"
        # darknet's 5k.part: 4,954 images with 35,511 boxes (pjreddie/darknet, issues 4643, 5751).
        if size.annotations == 35_511 or 4_954 in (annotated, size.images):
            return "; it looks like darknet's 5k list, another 5,000 images of val2014"
        if size == Size(self.annotated, self.minival.annotations):
            return "; it looks like minival without the images that have no annotations"
        if size.images == self.minival.images:
            return "; it looks like another choice of as many images from val2014"
        return ""


COCO = Counts()
"""The true sizes."""


@dataclass(frozen=True)
class Summary:
    """What is kept of an annotation file: a document of COCO takes gigabytes.

    Attributes:
        file: the JSON file.
        image_ids: of all images.
        categories: names by id.
        repeated: annotations whose id another one has, or whose id is a float. The published
            minival files have such crowds (rbgirshick/py-faster-rcnn, issue 522).
    """

    file: Path
    image_ids: frozenset[int]
    categories: dict[int, str]
    repeated: int


@dataclass(frozen=True)
class Job:
    """An annotation file to write.

    Attributes:
        part: the file.
        source: release it is derived from; None to renumber the file that exists.
        image_ids: images to keep.
        replaces: a file exists, and is kept under another name.
    """

    part: Part
    source: str | None
    image_ids: frozenset[int]
    replaces: bool


def prepare_minival(coco: Path, say: Say, *, dry_run: bool = False, counts: Counts = COCO) -> bool:
    """Make minival and its complement usable from the COCO files in a folder.

    All annotation files are read and checked against each other before anything is written.

    Args:
        coco: the folder that holds "annotations", "val2014", "val2017" and so on.
        say: receives each line of the report.
        dry_run: report what would be written, and write nothing.
        counts: sizes of COCO's splits.

    Returns:
        Whether minival can be evaluated on: its annotations are right and all images are there.
        For a dry run, whether it could be afterwards.

    Raises:
        DatasetError: a file is damaged or is not COCO's.
    """
    if not coco.is_dir():
        raise DatasetError(f"{coco} is not a folder: name the one that holds COCO's files.")
    with _without_garbage_collection():
        releases, derived = _read_all(coco, counts)
        for split, summary in releases.items():
            say(f"{summary.file.name}: {split}, {counts.of(split)}, as it should be")
        members = _members(releases, derived, counts)
        present = {split: _present(coco / split, split) for split in RELEASES}
        jobs = [
            job
            for name in PARTS
            for job in _jobs(coco, name, members.get(name), releases, derived, present, say)
        ]
        _carry_out(coco, jobs, releases, say, dry_run, counts)
    planned = frozenset(coco / "annotations" / job.part.file for job in jobs)
    ready = {
        name: _verdict(coco, name, members.get(name), releases, present, planned, say)
        for name in PARTS
    }
    return ready[MINIVAL]


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    # Parsed JSON has no cycles, and looking for them takes a third of the time.
    restart = gc.enable if gc.isenabled() else gc.disable
    gc.disable()
    try:
        yield
    finally:
        restart()


def _read_all(coco: Path, counts: Counts) -> tuple[dict[str, Summary], dict[str, Summary]]:
    """Read COCO's own files, by split, and the derived files that exist, by name."""
    own = {split: coco / "annotations" / f"instances_{split}.json" for split in RELEASES}
    own = {split: file for split, file in own.items() if file.is_file()}
    made = [
        (part, coco / "annotations" / part.file, _SETS[name])
        for name, parts in PARTS.items()
        for part in parts
        if part.sources and (coco / "annotations" / part.file).is_file()
    ]
    releases, derived = {}, {}
    with progress_bar(
        total=len(own) + len(made), desc="annotations", unit="file", delay=2,
    ) as bar:  # fmt: skip
        for split, file in own.items():
            releases[split] = _summarize(file, split, split, counts)
            bar.update()
        for part, file, name in made:
            derived[part.file] = _summarize(file, part.images, name, counts, derived=True)
            bar.update()
    summaries = [*releases.values(), *derived.values()]
    for other in summaries[1:]:
        if other.categories != summaries[0].categories:
            raise DatasetError(
                f"{summaries[0].file.name} and {other.file.name} have different categories: they "
                "do not belong together. Download them again."
            )
    return releases, derived


def _read(file: Path) -> Document:
    try:
        if file.stat().st_size > _LARGEST:
            raise DatasetError(
                f"{file} has {file.stat().st_size:,} bytes, more than any COCO annotation file "
                f"(limit: {_LARGEST:,})."
            )
        document = json.loads(file.read_bytes())
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{file.name} is not JSON: {error}. Download it again.") from error
    for key in ("images", "annotations", "categories"):
        records = document.get(key) if isinstance(document, dict) else None
        if not isinstance(records, list) or not set(map(type, records)) <= {dict}:
            raise DatasetError(
                f"{file.name} is not a COCO annotation file: it has no list of objects under "
                f"{key!r}. Download it again."
            )
    found: Document = document
    return found


def _summarize(
    file: Path, images: str, split: str, counts: Counts, *, derived: bool = False
) -> Summary:
    """Read a file, check that it is the split it claims to be, and keep what identifies it.

    Args:
        file: the JSON file.
        images: the split that its images are named after.
        split: what it holds.
        counts: sizes of COCO's splits.
        derived: allow annotation ids that repeat or are whole floats.

    Raises:
        DatasetError: it is not that split.
    """
    document = _read(file)
    categories = read_categories(document["categories"], file)
    image_ids = _ids(document, "images", "id", file)
    annotation_ids = _ids(document, "annotations", "id", file, floats=derived)
    owners = _ids(document, "annotations", "image_id", file, floats=derived)
    kinds = _ids(document, "annotations", "category_id", file, floats=derived)
    repeated = len(annotation_ids) - len(set(annotation_ids))
    if len(set(image_ids)) < len(image_ids) or (repeated and not derived):
        what = "annotation" if repeated else "image"
        raise DatasetError(f"{file.name} has {what} ids that repeat. Download it again.")
    for kind, values, known in (
        ("images", owners, set(image_ids)),
        ("categories", kinds, set(categories)),
    ):
        if strange := set(values) - known:
            raise DatasetError(
                f"{file.name} has annotations of {kind} that it does not list (such as "
                f"{min(strange)}). Download it again."
            )
    for image in document["images"]:
        if image.get("file_name") != (wanted := image_name(images, image["id"])):
            raise DatasetError(
                f"{file.name}: the file name of image {image['id']} is not {wanted}, as COCO "
                "names it. Move the file away, or download it again."
            )
    size = Size(len(image_ids), len(annotation_ids))
    if len(categories) != counts.categories or size != counts.of(split):
        raise DatasetError(
            f"{file.name} is not {split}: it has {size} of {len(categories)} categories, and "
            f"{split} has {counts.of(split)} of {counts.categories}"
            f"{counts.likeness(size, len(set(owners)))}. Figures on it could be compared with "
            "nobody's. Move it away, or download it again."
        )
    floats = sum(type(each["id"]) is float for each in document["annotations"])
    return Summary(file, frozenset(image_ids), categories, max(repeated, floats))


def _ids(document: Document, kind: str, key: str, file: Path, *, floats: bool = False) -> list[int]:
    values = [record.get(key) for record in document[kind]]
    for value in values:
        if type(value) is not int and not (floats and type(value) is float and value.is_integer()):
            raise DatasetError(
                f"{file.name} has {kind} without a whole number as {key}. Download it again."
            )
    return [int(value) for value in values]


def _members(
    releases: Mapping[str, Summary], derived: Mapping[str, Summary], counts: Counts
) -> dict[str, frozenset[int]]:
    """Return the image ids of each registered set that the files identify.

    Raises:
        DatasetError: the files contradict each other.
    """
    known = {split: summary.image_ids for split, summary in releases.items()}
    if "val2017" in known:
        known["minival"] = known["val2017"]
    _fill(known)
    for name, parts in PARTS.items():
        for part in parts:
            if part.file in derived:
                known.setdefault(_SETS[name], derived[part.file].image_ids)
                _fill(known)
    sources = ", ".join([*releases, *derived])
    for split, disjoint, within in (
        ("minival", "train2017", "val2014"),
        ("valminusminival", "minival", "val2014"),
        ("valminusminival", "train2014", "train2017"),
        ("train2014", "val2014", "train2017"),
    ):
        if split not in known:
            continue
        ids = known[split]
        if len(ids) != counts.of(split).images:
            raise DatasetError(
                f"by the image ids of {sources}, {split} has {len(ids):,} images instead of "
                f"{counts.of(split).images:,}: at least one file is not COCO's, though its counts "
                "are. Download them again."
            )
        strange = ids & known.get(disjoint, frozenset())
        strange |= ids - known.get(within, ids)
        if strange:
            raise DatasetError(
                f"{len(strange):,} images of {split} (such as {min(strange)}) are also in "
                f"{disjoint}, or not in {within}: {sources} do not belong together. Download them "
                "again."
            )
    return {name: known[split] for name, split in _SETS.items() if split in known}


def _fill(known: dict[str, frozenset[int]]) -> None:
    """Add the sets that are the difference of two known ones."""
    for _ in range(2):  # a set found last may give the first
        for split, whole, part in _DIFFERENCES:
            if split not in known and whole in known and part in known:
                known[split] = known[whole] - known[part]


def _present(folder: Path, split: str) -> frozenset[str]:
    """Return the names of a split's images that are in its folder and have content."""
    if not folder.is_dir():
        return frozenset()
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if is_image(entry, split))
    except OSError as error:
        raise DatasetError(f"{folder} cannot be listed: {error.strerror or error}.") from error


def _missing(ids: frozenset[int], split: str, present: Mapping[str, frozenset[str]]) -> list[str]:
    names = (image_name(split, image_id) for image_id in sorted(ids))
    return [name for name in names if name not in present[split]]


def _jobs(
    coco: Path,
    name: str,
    ids: frozenset[int] | None,
    releases: Mapping[str, Summary],
    derived: Mapping[str, Summary],
    present: Mapping[str, frozenset[str]],
    say: Say,
) -> Iterator[Job]:
    """Yield the files to write for a registered set: its existing ones if wrong, one if missing."""
    if ids is None:
        return
    best = _best(coco, name, ids, releases, present)
    for part in PARTS[name]:
        if not part.sources:
            continue
        source = next((split for split in part.sources if split in releases), None)
        existing = derived.get(part.file)
        if existing is None:
            if part is best and source:
                yield Job(part, source, ids, replaces=False)
            continue
        if strange := existing.image_ids - ids:
            raise DatasetError(
                f"{part.file} has {len(strange):,} images that are not in {_SETS[name]} (such as "
                f"{min(strange)}): it is another choice from COCO's images. Move it away."
            )
        if existing.repeated:
            say(
                f"{part.file}: {existing.repeated:,} annotation ids repeat or are floats. "
                "pycocotools keeps one annotation for each id, so figures from this file are not "
                "exact."
            )
            yield Job(part, source, ids, replaces=True)
        elif source is None:
            say(f"{part.file} is kept; no file of COCO's is there to compare it with")
        elif _differs(existing.file, releases[source].file, ids):
            say(f"{part.file} differs from {releases[source].file.name}")
            yield Job(part, source, ids, replaces=True)
        else:
            say(f"{part.file} is right: it agrees with {releases[source].file.name}")


def _best(
    coco: Path,
    name: str,
    ids: frozenset[int],
    releases: Mapping[str, Summary],
    present: Mapping[str, frozenset[str]],
) -> Part | None:
    """Return the part to serve a set from: the first with all its images, else with any of them.

    Without images, a 2014 file is worth deriving if COCO's 2014 annotations are there.
    """
    parts = [
        part
        for part in PARTS[name]
        if (coco / "annotations" / part.file).is_file()
        or any(split in releases for split in part.sources)
    ]
    complete = [part for part in parts if not _missing(ids, part.images, present)]
    some = [part for part in parts if present[part.images]]
    without = [part for part in parts if part.images in releases]
    return next(iter([*complete, *some, *without]), None)


def _differs(file: Path, release: Path, ids: frozenset[int]) -> bool:
    mine, theirs = (
        {each["id"]: each for each in _read(path)["annotations"] if each["image_id"] in ids}
        for path in (file, release)
    )
    return mine != theirs


def _carry_out(
    coco: Path,
    jobs: list[Job],
    releases: Mapping[str, Summary],
    say: Say,
    dry_run: bool,
    counts: Counts,
) -> None:
    """Write the files, reading each source once.

    Raises:
        DatasetError: a file cannot be written, or a derived one has the wrong number of
            annotations.
    """

    def group(job: Job) -> Path:
        return releases[job.source].file if job.source else coco / "annotations" / job.part.file

    for file, of_one in itertools.groupby(sorted(jobs, key=group), key=group):
        document = None if dry_run else _read(file)
        for job in of_one:
            target = coco / "annotations" / job.part.file
            origin = file.name if job.source else "itself, with new ids"
            note = f"; the old one is kept as {_kept(target).name}" if job.replaces else ""
            if document is not None:
                made = _selected(document, job) if job.source else _renumbered(document)
                _check_size(made, job, file, counts)
                _write(made, target, keep=job.replaces)
            say(
                f"{'would write' if dry_run else 'wrote'} {job.part.file} "
                f"({len(job.image_ids):,} images), from {origin}{note}"
            )


def _check_size(document: Document, job: Job, file: Path, counts: Counts) -> None:
    name = next(name for name, parts in PARTS.items() if job.part in parts)
    size = Size(len(document["images"]), len(document["annotations"]))
    wanted = counts.of(_SETS[name])
    if size != wanted:
        raise DatasetError(
            f"{file.name} gives {_SETS[name]} {size} instead of {wanted}: it is not COCO's. "
            "Download it again."
        )


def _selected(document: Document, job: Job) -> Document:
    """Return the images of a job with their annotations, named as its split names them."""
    return {
        **document,
        "images": [
            {**image, "file_name": image_name(job.part.images, image["id"])}
            for image in document["images"]
            if image["id"] in job.image_ids
        ],
        "annotations": [
            each for each in document["annotations"] if each["image_id"] in job.image_ids
        ],
    }


def _renumbered(document: Document) -> Document:
    """Return a document with whole, unique annotation ids; the first of several keeps its id."""
    fresh = max((int(each["id"]) for each in document["annotations"]), default=0)
    seen: Counter[int] = Counter()
    annotations = []
    for annotation in document["annotations"]:
        number = int(annotation["id"])
        seen[number] += 1
        if seen[number] > 1:
            fresh += 1
            number = fresh
        annotations.append({**annotation, "id": number})
    return {**document, "annotations": annotations}


def _kept(file: Path) -> Path:
    """Return a free name for a file that is to be replaced, or that of an identical copy."""
    candidates = (
        file.with_name(f"{file.stem}.original{each}.json") for each in ("", *range(2, 99))
    )
    for kept in candidates:
        if not kept.exists() or filecmp.cmp(file, kept, shallow=False):
            return kept
    raise DatasetError(f"{file.parent} holds too many copies of {file.name}: remove some.")


def _write(document: Document, target: Path, *, keep: bool) -> None:
    if keep and not (kept := _kept(target)).exists():
        with written_beside(kept, DatasetError, durable=True) as beside:
            shutil.copy2(target, beside)
    with written_beside(target, DatasetError, durable=True) as beside, beside.open("w") as stream:
        # In pieces: as one string, the text would need as much memory again as the file is long.
        separator = "{"
        for key, value in document.items():
            stream.write(f"{separator}{json.dumps(key)}:")
            separator = ","
            if not isinstance(value, list):
                stream.write(json.dumps(value))
                continue
            for start in range(0, len(value), 10_000):
                piece = json.dumps(value[start : start + 10_000], separators=(",", ":"))
                stream.write(("," if start else "[") + piece[1:-1])
            stream.write("]" if value else "[]")
        stream.write("}")


def _verdict(
    coco: Path,
    name: str,
    ids: frozenset[int] | None,
    releases: Mapping[str, Summary],
    present: Mapping[str, frozenset[str]],
    planned: frozenset[Path],
    say: Say,
) -> bool:
    """Say what a registered set is read from, or what it lacks and how to get it."""
    file, folder = locate(coco, name, planned)
    if ids is None or not (file in planned or file.is_file()):
        say(f"{name}: {_lacking_annotations(coco, name, ids, releases)}")
        return False
    missing = _missing(ids, folder.name, present)
    if not missing:
        say(f"{name}: ready, from {file.name} and {folder.name}")
        return True
    shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    text = f"{len(missing):,} of {len(ids):,} images are missing from {folder} ({shown})"
    for other in PARTS[name]:
        if other.images != folder.name and not _missing(ids, other.images, present):
            if (coco / "annotations" / other.file).is_file():
                text += f"; {coco / other.images} has them all: move {folder} away to use it"
            else:
                text += f"; {coco / other.images} has them all, and lacks {other.file}"
    for split in dict.fromkeys((folder.name, *(part.images for part in PARTS[name]))):
        text += _unzip(coco, f"{split}.zip")
    say(f"{name}: {text}")
    return False


def _lacking_annotations(
    coco: Path, name: str, ids: frozenset[int] | None, releases: Mapping[str, Summary]
) -> str:
    wanted = " or ".join(part.file for part in PARTS[name])
    hint = "".join(
        _unzip(coco, f"annotations_trainval{year}.zip")
        for year in ("2014", "2017")
        if not any(split.endswith(year) for split in releases)
    )
    if ids is not None:
        return f"no annotations for the images that are there: add {wanted}, with its images{hint}"
    if name == MINIVAL:
        return f"no file identifies its images: add instances_val2017.json{hint}"
    if releases and all(split.endswith("2017") for split in releases):
        return (
            "the 2017 files alone do not say which images were in val2014. Train on "
            "coco_2017_train, the union of both 2014 sets, or add COCO's 2014 annotations" + hint
        )
    years = "2014" if name == TRAIN_2014 else "2014 and 2017"
    return f"its images are not known: add COCO's annotations of {years}{hint}"


def _unzip(coco: Path, archive: str) -> str:
    for file in (coco / archive, coco / "annotations" / archive):
        if file.is_file():
            return f"; try: unzip -n {shlex.quote(str(file))} -d {shlex.quote(str(coco))}"
    return ""
