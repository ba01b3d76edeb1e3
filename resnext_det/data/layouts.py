"""YOLO's, Pascal VOC's and CVAT's files, read by hotcoco's converters into COCO's format.

What these leave open is done here: which files belong to which split, where the images are, upright
sizes, and names of classes.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hotcoco
import yaml

from resnext_det.console import progress_bar
from resnext_det.data.records import Record, is_object
from resnext_det.errors import DatasetError, named, plain, quoted
from resnext_det.files import open_regular
from resnext_det.image_files import SUFFIXES
from resnext_det.images import Header, read_header

SPLITS = ("train", "val", "test")

_WORDS = {"train": "train", "training": "train", "trainval": "train", "test": "test"}
_WORDS |= dict.fromkeys(("val", "valid", "validation", "minival", "dev"), "val")
_NAMES = ("classes.txt", "obj.names", "names.txt", "labels.txt")
_MOST_FILES = 5_000_000
_MOST_TEXT = 1 << 26
_THREADS = 8


@dataclass(frozen=True)
class Part:
    """One split.

    Attributes:
        document: in COCO's format.
        images: the folder that its file names are relative to.
        file: the user's file, if that holds the document as it is.
    """

    document: Record
    images: Path
    file: Path | None = None

    @property
    def annotated(self) -> int:
        """The number of images with an object that is not a crowd: those that are trained on."""
        objects = self.document["annotations"]
        found = {each["image_id"] for each in objects if is_object(each) and not is_crowd(each)}
        return sum(each["id"] in found for each in self.document["images"])

    @property
    def files(self) -> list[Path]:
        """The image files."""
        return [self.images / str(each["file_name"]) for each in self.document["images"]]


@dataclass
class FileTree:
    """The files below a folder, by kind."""

    root: Path
    images: dict[str, Path] = field(default_factory=dict)  # by path relative to the root
    by_name: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    others: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def of(cls, root: Path) -> FileTree:
        """List the files below a folder, except hidden ones."""
        tree, seen, count = cls(root), set(), 0
        for folder, folders, files in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)  # a link may lead back up
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            count += len(files)
            if count > _MOST_FILES:
                raise DatasetError(f"--data: {quoted(root)} holds more than {_MOST_FILES:,} files.")
            for name in sorted(files):
                if name.startswith("."):  # such as ._photo.jpg, which macOS puts into archives
                    continue
                path = Path(folder, name)
                if path.suffix.lower() in SUFFIXES:
                    relative = path.relative_to(root).as_posix()
                    tree.images[relative] = path
                    tree.by_name[path.name].append(relative)
                    tree.by_name[path.stem].append(relative)
                else:
                    tree.others[path.suffix.lower()].append(path)
        return tree

    def image(self, name: str, *near: Path) -> str | None:
        """Return the image that annotations call `name`: near them, or the only one so called."""
        name = name.replace("\\", "/")
        for folder in near:
            path = Path(os.path.normpath(folder / name))  # the name may be absolute
            if path.is_relative_to(self.root):
                relative = path.relative_to(self.root).as_posix()
                if relative in self.images:
                    return relative
        found = self.by_name.get(name.rpartition("/")[2], [])
        return found[0] if len(found) == 1 else None


def label_of(image: str, texts: dict[str, Path]) -> Path | None:
    """Return the .txt that goes with an image: in labels/ instead of images/, or beside it."""
    stem = image.rpartition(".")[0] + ".txt"
    head, separator, tail = f"/{stem}".rpartition("/images/")
    for name in (f"{head}/labels/{tail}"[1:] if separator else f"labels/{stem}", stem):
        if name in texts:
            return texts[name]
    return None


def text_of(file: Path, first: int | None = None) -> str:
    """Read a text, or its `first` bytes."""
    try:
        with open_regular(file) as stream:
            content = stream.read(first or _MOST_TEXT + 1)
    except OSError as error:
        raise DatasetError(f"{quoted(file)} cannot be read: {quoted(error)}.") from error
    if first is None and len(content) > _MOST_TEXT:
        raise DatasetError(f"{quoted(file)} has more than {_MOST_TEXT:,} bytes: shorten it.")
    return content.decode("utf-8-sig", "replace")


def path_text(root: Path, file: Path) -> str:
    """Return a path for messages, relative to the folder of the data."""
    return plain(file.relative_to(root).as_posix())


def split_of_path(relative: str) -> str | None:
    """Return the split that the last telling part of a path names."""
    for part in reversed(relative.split("/")):
        for word in reversed(re.findall("[a-z]+", part.lower())):
            if word in _WORDS:
                return _WORDS[word]
    return None


# YOLO


def read_yolo(tree: FileTree, files: list[Path]) -> tuple[dict[str, Part], list[str]]:
    """Return the splits, and notes on what was left out or assumed, given the label files."""
    settings, names = _yolo_settings(tree)
    texts = {each.relative_to(tree.root).as_posix(): each for each in files}
    of_split: dict[str, list[str]] = defaultdict(list)
    for split, keys in (("train", ("train",)), ("val", ("val", "valid")), ("test", ("test",))):
        for key in keys:
            of_split[split] += _yolo_images(tree, settings, settings.get(key))
    if not of_split["train"]:
        of_split.clear()
        for image in tree.images:
            of_split[split_of_path(image.rpartition("/")[0]) or "train"].append(image)
    parts, notes = {}, []
    for split, listed in of_split.items():
        images = list(dict.fromkeys(listed))
        if not images:
            continue
        labels = [label_of(image, texts) for image in images]
        if unlabelled := labels.count(None):
            notes.append(f"{unlabelled:,} images of {split} have no .txt: taken as without objects")
        parts[split] = Part(_from_yolo(tree, images, labels, names), tree.root)
    return parts, notes


def _yolo_settings(tree: FileTree) -> tuple[Record, list[str]]:
    """Return the content of data.yaml and the names of the classes."""
    for file in sorted(
        tree.others[".yaml"] + tree.others[".yml"], key=lambda each: len(each.parts)
    ):
        try:
            settings = yaml.safe_load(text_of(file))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise DatasetError(f"{quoted(file)} is not yaml: {quoted(error)}.") from error
        names = settings.get("names") if isinstance(settings, dict) else None
        if isinstance(names, dict):
            if sorted(names, key=str) != sorted(range(len(names)), key=str):
                raise DatasetError(f"{quoted(file)}: names must be numbered from 0 without gaps.")
            names = [names[number] for number in range(len(names))]
        if isinstance(names, list) and names:
            if not all(isinstance(each, str | int | float) for each in names):
                raise DatasetError(f"{quoted(file)}: names must be a list of names.")
            return {**settings, "": file.parent}, [str(each) for each in names]
    for name in _NAMES:
        for file in [*tree.others[".txt"], *tree.others[".names"]]:
            if file.name == name and (lines := text_of(file).split("\n")):
                return {}, [each.strip() for each in lines if each.strip()]
    raise DatasetError(
        f"--data: {quoted(tree.root)} has YOLO's labels, but nothing names their classes: add "
        'data.yaml with "names: [cat, dog]".'
    )


def _yolo_images(tree: FileTree, settings: Record, value: Any) -> list[str]:
    """Return the images of an entry of data.yaml: folders, or .txt files that list images."""
    found: list[str] = []
    for entry in value if isinstance(value, list) else [value] if value else []:
        text = str(entry).replace("\\", "/")
        bases = [settings[""] / str(settings.get("path") or ""), settings[""], tree.root]
        tried = [os.path.normpath(base / text) for base in bases]
        # Roboflow writes ../train/images for train/images.
        tried += [os.path.normpath(tree.root / re.sub(r"^(\.\./)+", "", text))]
        inside = [Path(each) for each in tried if Path(each).is_relative_to(tree.root)]
        place = next(filter(_exists, inside), None)
        if place is None:
            raise DatasetError(
                f"--data: data.yaml names {quoted(text)}, which is not in {quoted(tree.root)}. "
                "Correct it, or remove it to have the images divided."
            )
        if place.is_file():
            lines = [line.strip() for line in text_of(place).splitlines() if line.strip()]
            listed = [tree.image(line, tree.root, place.parent) for line in lines]
            if None in listed:
                missing = lines[listed.index(None)]
                raise DatasetError(f"{quoted(place)} lists {quoted(missing)}, which is missing.")
            found += [each for each in listed if each]
        else:
            prefix = place.relative_to(tree.root).as_posix() + "/"
            found += [each for each in tree.images if each.startswith(prefix) or prefix == "./"]
    return found


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long a name
        return False


def _from_yolo(
    tree: FileTree, images: list[str], labels: Sequence[Path | None], names: list[str]
) -> Record:
    """Convert one split, under numbers for names: hotcoco takes one folder, and stems."""
    headers = _headers(tree, images)
    with tempfile.TemporaryDirectory() as name:
        stage = Path(name)
        (stage / "images").mkdir()
        # Names of any characters are put in afterwards.
        numbered = ", ".join(f"c{number}" for number in range(len(names)))
        (stage / "data.yaml").write_text(f"names: [{numbered}]\n", encoding="utf-8")
        for number, (image, label) in enumerate(zip(images, labels)):
            target = stage / f"{number:09d}.txt"
            target.write_text(text_of(label) if label else "", encoding="utf-8")
            picture = stage / "images" / f"{number:09d}{Path(image).suffix.lower()}"
            try:
                picture.symlink_to(tree.images[image])
            except OSError:  # Windows, without the privilege
                shutil.copyfile(tree.images[image], picture)
        try:
            document: Record = hotcoco.COCO.from_yolo(name, str(stage / "images")).dataset
        except (ValueError, OSError) as error:
            staged = {f"{number:09d}": label for number, label in enumerate(labels) if label}
            text = re.sub(
                r"\S*?(\d{9})\.txt",
                lambda it: path_text(tree.root, staged[it[1]]) if it[1] in staged else it[0],
                str(error),
            )
            hint = ""
            if "expected 5 fields" in text:
                hint = " Only boxes can be read: class, centre x, centre y, width, height."
            raise DatasetError(f"--data: {quoted(ValueError(text))}.{hint}") from error
    for category, given in zip(document["categories"], names):
        category["name"] = given
    turned = {}
    for record in document["images"]:
        position = int(record["file_name"])
        header = headers[position]
        record["file_name"] = images[position]
        if (record["width"], record["height"]) != (header.width, header.height):
            # YOLO's fractions are of the upright image.
            turned[record["id"]] = header.width / record["width"], header.height / record["height"]
            record["width"], record["height"] = header.width, header.height
    for each in document["annotations"]:
        if each["image_id"] in turned:
            x, y = turned[each["image_id"]]
            each["bbox"] = [value * scale for value, scale in zip(each["bbox"], (x, y, x, y))]
    return document


def _headers(tree: FileTree, images: Sequence[str]) -> list[Header]:
    def read(name: str) -> Header | str:
        try:
            return read_header(tree.images[name])
        except DatasetError as error:
            return str(error).rstrip(".")

    bar = {"total": len(images), "desc": "image headers", "unit": "image", "delay": 2}
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(progress_bar(pool.map(read, images), **bar))
    bad = [each for each in found if isinstance(each, str)]
    if bad:
        raise DatasetError(
            f"--data: {len(bad):,} of {len(images):,} images cannot be read: "
            f"{'; '.join(bad[:3])}{'; ...' if len(bad) > 3 else ''}. Repair or remove them."
        )
    return [each for each in found if isinstance(each, Header)]


# Pascal VOC and CVAT


@dataclass(frozen=True)
class _Source:
    """Annotations as converted.

    Attributes:
        document: whose file names have no path yet.
        near: folders of the images.
        split: that all images belong to, unless there are `splits`.
        splits: by image, without suffix; images without are left out.
    """

    document: Record
    near: tuple[Path, ...]
    split: str
    splits: dict[str, str] = field(default_factory=dict)

    def split_of(self, record: Record) -> str | None:
        return self.splits.get(Path(record["file_name"]).stem) if self.splits else self.split


def read_voc(tree: FileTree, files: list[Path]) -> tuple[dict[str, Part], list[str]]:
    """Return the splits, and notes on what was left out or assumed, given the annotation files."""
    sources, notes = [], []
    left_out = difficult = 0
    for folder in dict.fromkeys(file.parent for file in files):
        home = folder
        if folder.name == "Annotations" and folder != tree.root:
            home = folder.parent
        splits: dict[str, str] = {}
        for name in ("trainval", *SPLITS):
            file = home / "ImageSets" / "Main" / f"{name}.txt"
            if file.is_file():
                splits |= dict.fromkeys(text_of(file).split(), _WORDS[name])
        named_so = split_of_path(f"./{folder.relative_to(tree.root).as_posix()}") or "train"
        near = (home / "JPEGImages", home / "images", folder, home, tree.root)
        document = _converted(hotcoco.COCO.from_voc, home, tree.root)
        sources.append(_Source(document, near, named_so, splits))
        left_out += [sources[-1].split_of(each) for each in document["images"]].count(None)
        difficult += sum(map(is_crowd, document["annotations"]))
    if left_out:
        notes.append(f"{left_out:,} images are in no list of ImageSets/Main: left out")
    if difficult:
        notes.append(f'{difficult:,} objects marked "difficult" are neither learned nor counted')
    return _assembled(tree, sources), notes


def read_cvat(tree: FileTree, files: list[Path]) -> tuple[dict[str, Part], list[str]]:
    """Return the splits, and notes on what was left out or assumed, given the annotation files."""
    sources = []
    for file in files:
        split = (
            split_of_path(file.relative_to(tree.root).as_posix().removesuffix(".xml")) or "train"
        )
        near = (file.parent / "images", file.parent, tree.root / "images", tree.root)
        document = _converted(hotcoco.COCO.from_cvat, file, tree.root)
        sources.append(_Source(document, near, split))
    return _assembled(tree, sources), []


def _converted(convert: Callable[[str], hotcoco.COCO], source: Path, root: Path) -> Record:
    try:
        document: Record = convert(str(source)).dataset
    except (ValueError, OSError) as error:
        raise DatasetError(f"--data: {path_text(root, source)}: {quoted(error)}.") from error
    return document


def _assembled(tree: FileTree, sources: Sequence[_Source]) -> dict[str, Part]:
    """Put converted annotations together by split, with the images' paths, and ids of their own.

    Classes are matched by name. Each split lists every class of train, even those it has no objects
    of, followed by any that appear in its own files alone.
    """
    rows: dict[str, tuple[list[Record], list[Record]]] = defaultdict(lambda: ([], []))
    names: dict[str, dict[str, None]] = defaultdict(dict)
    missing = []
    for source in sources:
        names_of = {each["id"]: each["name"] for each in source.document["categories"]}
        placed: dict[int, tuple[str, int]] = {}
        for record in source.document["images"]:
            split = source.split_of(record)
            if split is None:
                continue
            names[split] |= dict.fromkeys(names_of.values())
            file = tree.image(record["file_name"], *source.near)
            if file is None:
                missing.append(record["file_name"])
                continue
            images = rows[split][0]
            placed[record["id"]] = split, len(images) + 1
            images.append({**record, "id": len(images) + 1, "file_name": file})
        for each in source.document["annotations"]:
            if each["image_id"] in placed:
                split, number = placed[each["image_id"]]
                objects = rows[split][1]
                name = names_of[each["category_id"]]
                moved = {"id": len(objects) + 1, "image_id": number, "category_id": name}
                objects.append({**each, **moved})
    if missing:
        raise DatasetError(
            f"--data: {len(missing):,} annotated images are missing in {quoted(tree.root)}, or "
            f"several files have their name: {named(missing, 3)}."
        )
    parts = {}
    for split, (images, objects) in rows.items():
        classes = list({**names["train"], **names[split]})
        number_of = {name: number for number, name in enumerate(classes, start=1)}
        for each in objects:
            each["category_id"] = number_of[each["category_id"]]
        unsized = [each for each in images if not (each["width"] and each["height"])]
        for each, header in zip(unsized, _headers(tree, [each["file_name"] for each in unsized])):
            each["width"], each["height"] = header.width, header.height
        categories = [{"id": number, "name": name} for name, number in number_of.items()]
        document = {"images": images, "annotations": objects, "categories": categories}
        parts[split] = Part(document, tree.root)
    return parts


def is_crowd(annotation: Record) -> bool:
    """Tell whether an annotation is of a crowd, or of an object that does not count."""
    return bool(annotation.get("iscrowd"))
