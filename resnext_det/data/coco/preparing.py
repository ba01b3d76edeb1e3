"""minival out of whatever COCO files there are: read, checked, written, and what is still missing.

`prepare_minival` is what tools/prepare_minival.py runs. Its order: images are unpacked if that is
asked for, all annotations are read and checked against each other, and only then is anything
written, so that files that do not belong together leave everything as it was.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from tqdm import tqdm

from resnext_det.data.coco.annotation_files import (
    Source,
    copy_out,
    find_source,
    read_document,
)
from resnext_det.data.coco.comparing import differences
from resnext_det.data.coco.counts import COCO, Counts
from resnext_det.data.coco.derived import (
    PARTS,
    Existing,
    Job,
    Release,
    carry_out,
    check_size,
    decide,
    describe,
    read_existing,
)
from resnext_det.data.coco.flaws import EFFECT
from resnext_det.data.coco.images import Images, find_images
from resnext_det.data.coco.members import Members, tell_members
from resnext_det.data.coco.misplaced import find_misplaced
from resnext_det.data.coco.names import MINIVAL, SERVED, SPLITS, has_images
from resnext_det.data.coco.tables import Integers, build_table, joined
from resnext_det.data.coco.unpacking import plan_unpacking, unpack
from resnext_det.data.coco.verdict import judge
from resnext_det.errors import DatasetError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """What there is.

    Attributes:
        coco: the folder.
        images: by split.
        releases: COCO's own annotation files, by split.
        existing: the files made of them that are there already, by their name.
        coming: the splits whose images would be unpacked if this were no dry run.
        folders: the splits whose image folders have images, or will have after a true run.
    """

    coco: Path
    images: dict[str, Images]
    releases: dict[str, Release]
    existing: dict[str, Existing]
    coming: frozenset[str]
    folders: frozenset[str]

    def complete(self, image_ids: Integers | None) -> set[str]:
        """Return the splits whose folders have all of these images, or will have."""
        if image_ids is None:
            return set()
        return {
            split
            for split in self.folders
            if not self.images[split].missing(image_ids, unpacked=split in self.coming)
        }


def prepare_minival(
    coco: Path,
    say: Say,
    *,
    unpacked: Sequence[str] | None = None,
    dry_run: bool = False,
    counts: Counts = COCO,
) -> bool:
    """Make minival and its complement usable from the COCO files in a folder.

    Args:
        coco: the folder that holds "annotations", "val2014" and the like, or their zip files.
        say: takes each line of the report.
        unpacked: the splits whose images are to be unpacked; empty for those that are needed, None
            for none.
        dry_run: write nothing, and say what would be written.
        counts: of COCO's splits.

    Returns:
        Whether minival can be evaluated on: annotations that are right, and all images in the
        folder. For a dry run, whether it could after a true one.

    Raises:
        DatasetError: a file that is damaged or none of COCO's; nothing is half-written.
    """
    if not coco.is_dir():
        raise DatasetError(f"{coco} is no folder: name the one that holds COCO's files.")
    coming = _unpack(coco, unpacked, say, dry_run, counts) if unpacked is not None else set()
    with _collector_at_rest():
        found = _read(coco, coming, counts)
    tables = {split: release.table for split, release in found.releases.items()}
    published = {
        part.members: found.existing[part.file].table
        for part in reversed(PARTS)
        if part.file in found.existing
    }
    members = tell_members(tables, published, counts)
    for name, table in tables.items():
        say(f"{table.source}: {name}, {table.size}, as it should be")
    if members.minival is not None:
        say(_what_minival_is(len(members.minival), tables))
    jobs = _decide(found, members, counts, say)
    copies = _copies(found, jobs)
    _compare(found, say)  # which may refuse the files, so it goes before anything is written
    with _collector_at_rest():
        _write(found, jobs, copies, say, dry_run)
    planned = {coco / "annotations" / job.part.file for job in jobs}
    planned |= {target for _, target in copies} | {coco / split for split in coming}
    for line in find_misplaced(coco):
        say(line)
    ready = judge(coco, found.images, set(tables), members, planned, bool(coming), say)
    return ready


def _what_minival_is(images: int, releases: Collection[str]) -> str:
    if "val2017" in releases:
        return f"minival is val2017 ({images:,} images)"
    return (
        f"minival has {images:,} images, as it should have; whether they are those of val2017 is "
        "not compared, as instances_val2017.json is not there"
    )


def _unpack(coco: Path, splits: Sequence[str], say: Say, dry_run: bool, counts: Counts) -> set[str]:
    """Unpack, and return the splits that would be if this is a dry run."""
    images = find_images(coco)
    absent = [split for split in splits if images[split].archive is None]
    if absent:
        raise DatasetError(f"--unpack {' '.join(absent)}: {coco / absent[0]}.zip is not there.")
    coming = set()
    for split in splits or _needed(images, counts):
        archive = images[split].archive
        if archive is None:
            continue
        plan = plan_unpacking(archive, images[split].folder, counts)
        if not plan.members:
            say(f"{split}: all {plan.there:,} images of {archive.name} are unpacked already")
            continue
        say(f"{'would unpack' if dry_run else 'unpacking'} {plan}")
        if dry_run:
            coming.add(split)
        else:
            unpack(plan)
    return coming


def _needed(images: dict[str, Images], counts: Counts) -> list[str]:
    """Return the splits to unpack: for each set the first zip file, if no folder has its images."""
    needed: list[str] = []
    for pairs in SERVED.values():
        splits = [split for _, split in pairs]
        if any(len(images[split].in_folder) >= counts.of(split).images for split in splits):
            continue
        needed += [split for split in splits if images[split].archive][:1]
    return list(dict.fromkeys(needed))


def _read(coco: Path, coming: set[str], counts: Counts) -> Found:
    images = find_images(coco)
    sources = {split: find_source(coco, split) for split in SPLITS}
    there = {split: source for split, source in sources.items() if source is not None}
    made = [part for part in PARTS if (coco / "annotations" / part.file).is_file()]
    releases: dict[str, Release] = {}
    existing: dict[str, Existing] = {}
    with tqdm(
        total=len(there) + len(made),
        desc="reading annotations",
        unit="file",
        delay=2,
        leave=False,
        disable=None,
    ) as bar:
        for split, source in there.items():
            releases[split] = Release(source, build_table(read_document(source), source, split))
            check_size(releases[split].table, split, counts)
            bar.update()
        for part in made:
            found = read_existing(coco, part, counts)
            if found is not None:
                existing[part.file] = found
            bar.update()
    tables = [each.table for each in releases.values()]
    tables += [each.table for each in existing.values()]
    for one, other in combinations(tables, 2):
        if one.categories != other.categories:
            raise DatasetError(
                f"{one.source} and {other.source} have other categories: they do not belong "
                "together. Fetch them again."
            )
    folders = coming | {split for split in SPLITS if has_images(images[split].folder)}
    return Found(coco, images, releases, existing, frozenset(coming), frozenset(folders))


def _decide(found: Found, members: Members, counts: Counts, say: Say) -> list[Job]:
    jobs = []
    for part in PARTS:
        existing = found.existing.get(part.file)
        complete = found.complete(getattr(members, part.members))
        job, lines = decide(part, members, found.releases, existing, found.folders, complete)
        for line in lines:
            say(line)
        if job is not None:
            if job.release:
                table = found.releases[job.release].table.part(job.image_ids)
                check_size(table, part.members, counts)
            jobs.append(job)
    if any(found.existing[job.part.file].flaws for job in jobs if job.replaces):
        say(f"{EFFECT}.")
    return jobs


def _copies(found: Found, jobs: list[Job]) -> list[tuple[Source, Path]]:
    """Return what has to be copied out of zip files, as Detectron2 reads JSON files alone."""
    minival = found.coco / "annotations" / f"{SERVED[MINIVAL][0][0]}"
    has_2014 = minival.name in found.existing or minival.name in {job.part.file for job in jobs}
    copies = []
    for split, release in found.releases.items():
        wanted = split in found.folders or (split == "val2017" and not has_2014)
        if release.source.member and wanted:
            target = found.coco / "annotations" / f"instances_{split}.json"
            copies.append((release.source, target))
    return copies


def _write(
    found: Found, jobs: list[Job], copies: list[tuple[Source, Path]], say: Say, dry_run: bool
) -> None:
    for source, target in copies:
        if not dry_run:
            copy_out(source, target)
        say(f"{'would copy' if dry_run else 'copied'} {target.name} out of {source.file.name}")
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.release or job.part.file, []).append(job)
    for of_one in groups.values():
        told = [describe(job, found.coco, found.releases) for job in of_one]
        if not dry_run:
            release = of_one[0].release
            carry_out(of_one, found.coco, found.releases[release].source if release else None)
        for line in told:
            say(f"{'would write' if dry_run else 'wrote'} {line}")


def _compare(found: Found, say: Say) -> None:
    years = [
        [each.table for split, each in found.releases.items() if split.endswith(year)]
        for year in ("2014", "2017")
    ]
    if not all(years):
        return
    one, other = (joined(tables) for tables in years)
    lines = differences(one, other)
    for line in lines:
        say(f"2014 and 2017 differ: {line}")
    if not lines:
        say("2014 and 2017 agree on all images and annotations that both have")


@contextlib.contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Let no garbage be looked for among tens of millions of numbers: it takes a third of the time.

    Annotations hold no cycles, so there is none to be found.
    """
    restart = gc.enable if gc.isenabled() else gc.disable
    gc.disable()
    try:
        yield
    finally:
        restart()
