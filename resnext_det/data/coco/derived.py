"""The files that are made of COCO's own: which are wanted, which are right, and how they are made.

Deciding reads tables alone, so that a dry run says what a true one does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from resnext_det.data.coco.annotation_files import (
    Document,
    Source,
    read_document,
    write_document,
)
from resnext_det.data.coco.comparing import differences
from resnext_det.data.coco.counts import Counts, looks_like
from resnext_det.data.coco.flaws import Flaws, find_flaws, mend
from resnext_det.data.coco.members import Members
from resnext_det.data.coco.names import (
    MINIVAL_FILE,
    SERVED,
    TRAIN_FROM_2017,
    VALMINUSMINIVAL_FILE,
    VALMINUSMINIVAL_FROM_2017,
    image_name,
    prefix,
)
from resnext_det.data.coco.tables import Integers, Table, build_table
from resnext_det.data.coco.writing import keep_beside, kept_name
from resnext_det.errors import DatasetError


@dataclass(frozen=True)
class Part:
    """A file that holds some images of COCO's own files.

    Attributes:
        file: its name.
        members: which of `Members` it holds.
        images: the split whose names its images have.
        releases: COCO's own files that have its annotations, best first.
        instead_of: the image folder of 2014 that it is to do without; "" where it is for that one.
    """

    file: str
    members: str
    images: str
    releases: tuple[str, ...]
    instead_of: str = ""


PARTS = (
    Part(MINIVAL_FILE, "minival", "val2014", ("val2014", "val2017")),
    Part(VALMINUSMINIVAL_FILE, "valminusminival", "val2014", ("val2014", "train2017")),
    Part(
        VALMINUSMINIVAL_FROM_2017,
        "valminusminival",
        "train2017",
        ("train2017", "val2014"),
        instead_of="val2014",
    ),
    Part(
        TRAIN_FROM_2017,
        "train2014",
        "train2017",
        ("train2017", "train2014"),
        instead_of="train2014",
    ),
)


@dataclass(frozen=True)
class Existing:
    """A part that is there already, whoever made it."""

    table: Table
    flaws: Flaws


@dataclass(frozen=True)
class Release:
    """One of COCO's own files."""

    source: Source
    table: Table


@dataclass(frozen=True)
class Job:
    """A part that is to be written.

    Attributes:
        part: the file.
        image_ids: of the images that it holds.
        release: COCO's file that it is made of; None to mend what is there.
        replaces: whether there is one, which is kept under another name.
    """

    part: Part
    image_ids: Integers
    release: str | None
    replaces: bool


def read_existing(coco: Path, part: Part, counts: Counts) -> Existing | None:
    """Read a part that is there already; None where it is not.

    Args:
        coco: the folder that holds "annotations".
        part: which.
        counts: of COCO's splits.

    Raises:
        DatasetError: it is no annotation file, or not of as many images and annotations.
    """
    source = Source(coco / "annotations" / part.file)
    if not source.file.is_file():
        return None
    document = read_document(source)
    table = build_table(document, source, part.images, mended=True)
    check_size(table, part.members, counts)
    return Existing(table, find_flaws(document))


def check_size(table: Table, split: str, counts: Counts) -> None:
    """Refuse a file that has other counts than its split.

    Args:
        table: of the file.
        split: such as "val2014" or "minival".
        counts: of COCO's splits.

    Raises:
        DatasetError: it has; the message says which known set it looks like.
    """
    if len(table.categories) != counts.categories:
        raise DatasetError(
            f"{table.source} has {len(table.categories)} categories, and COCO's files have "
            f"{counts.categories}. Move it away, or fetch it again."
        )
    if table.size != counts.of(split):
        likeness = looks_like(table.size, table.annotated, counts)
        raise DatasetError(
            f"{table.source} is not {split}: it has {table.size}, and {split} has "
            f"{counts.of(split)}{'; ' + likeness if likeness else ''}. It is not taken, as figures "
            "with it would compare with nobody's. Move it away, or fetch it again."
        )


def decide(
    part: Part,
    members: Members,
    releases: Mapping[str, Release],
    existing: Existing | None,
    folders: Collection[str],
    complete: Collection[str],
) -> tuple[Job | None, list[str]]:
    """Return what is to be done about a part, and what there is to say about it.

    Args:
        part: which.
        members: the images of each set, as far as they are known.
        releases: COCO's own files, by split.
        existing: the part that is there, if it is.
        folders: the splits whose image folders have images, or will have.
        complete: those of them that have all images of the part's set.

    Raises:
        DatasetError: the part that is there has other images than it should.
    """
    image_ids: Integers | None = getattr(members, part.members)
    release = next((split for split in part.releases if split in releases), None)
    if image_ids is None:  # then nothing of this part is there that would tell them
        return None, []
    if existing is None:
        if release is None or not _is_wanted(part, releases, folders, complete):
            return None, []
        if better := _better(part, releases, folders, complete):
            return None, [
                f"{part.file} is not written: {part.images} lacks some of its images, and {better} "
                "has them all and serves them"
            ]
        return Job(part, image_ids, release, False), []
    strange = np.setdiff1d(existing.table.image_ids, image_ids)
    if len(strange):
        raise DatasetError(
            f"{part.file} has other images than {part.members}: {len(strange):,} of them (such as "
            f"image {strange[0]}). It is some other choice from COCO's images. Move it away."
        )
    said = [f"{part.file}: {existing.flaws}"] if existing.flaws else []
    if not existing.flaws and release:
        said = [
            f"{part.file} and {releases[release].source} differ. {line}"
            for line in differences(existing.table, releases[release].table.part(image_ids))
        ]
    if said:
        return Job(part, image_ids, release, True), said
    if release is None:
        return None, [
            f"{part.file} stays as it is ({existing.table.size}, as it should have; not compared, "
            "as none of COCO's own files with its annotations is there)"
        ]
    against = f"as {releases[release].source} has it"
    return None, [f"{part.file} is already right ({existing.table.size}; {against})"]


def _is_wanted(
    part: Part,
    releases: Mapping[str, Release],
    folders: Collection[str],
    complete: Collection[str],
) -> bool:
    if part.instead_of:
        instead = part.images in complete and part.instead_of not in complete
        return part.images in folders and (instead or part.instead_of not in folders)
    return part.images in releases or part.images in folders


def _better(
    part: Part,
    releases: Mapping[str, Release],
    folders: Collection[str],
    complete: Collection[str],
) -> str:
    """Return the other folder that serves a part's set where its own lacks images; "" for none.

    The file would turn the set, which can be read, to the folder that lacks some of it.
    """
    if part.images not in folders or part.images in complete:
        return ""
    for pairs in SERVED.values():
        if part.file not in [file for file, _ in pairs]:
            continue
        for file, split in pairs:
            derived = any(each.file == file for each in PARTS)
            if split in complete and (derived or split in releases):
                return split
    return ""


def describe(job: Job, coco: Path, releases: Mapping[str, Release]) -> str:
    """Return a job in words.

    Args:
        job: what `decide` returned.
        coco: the folder that holds "annotations".
        releases: COCO's own files, by split.
    """
    made = f"of {releases[job.release].source}" if job.release else "of itself, with ids mended"
    text = f"{job.part.file} ({len(job.image_ids):,} images), {made}"
    if job.release and prefix(job.release) != prefix(job.part.images):
        text += f", images named as in {job.part.images}"
    if job.replaces:
        kept = kept_name(coco / "annotations" / job.part.file)
        text += f"; the one that is there is kept as {kept.name}"
    return text


def carry_out(jobs: list[Job], coco: Path, source: Source | None) -> None:
    """Write the parts that are made of one file.

    Args:
        jobs: that have the same release; with None, one.
        coco: the folder that holds "annotations".
        source: of the release; None to mend the one file that is there.

    Raises:
        DatasetError: a file cannot be read or written.
    """
    document = read_document(source or Source(coco / "annotations" / jobs[0].part.file))
    for job in jobs:
        target = coco / "annotations" / job.part.file
        made = _selected(document, job) if job.release else mend(document)
        if job.replaces:
            keep_beside(target)
        write_document(made, target)


def _selected(document: Document, job: Job) -> Document:
    wanted = set(job.image_ids.tolist())
    split = job.part.images
    return {
        **document,
        "images": [
            {**image, "file_name": image_name(split, image["id"])}
            for image in document["images"]
            if image["id"] in wanted
        ],
        "annotations": [each for each in document["annotations"] if each["image_id"] in wanted],
    }
