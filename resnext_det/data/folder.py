"""A folder of somebody's own data: its layout recognised, and read into COCO's format."""

from __future__ import annotations

import os
import re
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from resnext_det.data.annotations import read_annotations, read_categories
from resnext_det.data.custom import is_file
from resnext_det.data.layouts import (
    SPLITS,
    FileTree,
    Part,
    label_of,
    path_text,
    read_cvat,
    read_voc,
    read_yolo,
    split_of_path,
    text_of,
)
from resnext_det.data.records import is_image
from resnext_det.errors import DatasetError, named, plain, quoted

LAYOUTS = {
    "coco": 'JSON files with "images", "annotations" and "categories", such as '
    "annotations/instances_train.json or train/_annotations.coco.json",
    "yolo": 'data.yaml with "names" (or classes.txt), and a .txt for each image, in labels/ '
    "instead of images/ or beside it",
    "voc": "Pascal VOC's .xml for each image, such as Annotations/NAME.xml, with the images in "
    "JPEGImages/ or beside it",
    "cvat": "CVAT for images 1.1, such as annotations.xml, with the images in images/",
}
"""What each layout is recognised by."""
OURS = "resnext_det"
"""In the user's folder: the annotations that --write puts there, which are read first."""

_OTHER_TASKS = ("captions_", "person_keypoints_", "panoptic_", "stuff_", "image_info_")


@dataclass(frozen=True)
class Folder:
    """A folder that was read.

    Attributes:
        path: of the folder.
        layout: a key of LAYOUTS.
        parts: by split, of which there is at least "train".
        notes: what was left out or assumed.
    """

    path: Path
    layout: str
    parts: dict[str, Part]
    notes: tuple[str, ...] = ()


def read_folder(path: Path, layout: str | None = None) -> Folder:
    """Recognise the layout of a folder and read its annotations, writing nothing.

    Args:
        path: the folder.
        layout: a key of LAYOUTS, if the folder holds several.

    Raises:
        DatasetError: the layout is unknown or mixed, annotations cannot be read, an image of theirs
            is missing or unreadable, or the splits have different classes.
    """
    if not path.is_dir():
        raise DatasetError(f"--data: {quoted(path)} is not a folder.")
    path = Path(os.path.normpath(path.absolute()))  # without "..": files are compared with it
    written = path / OURS
    if written.is_dir():
        kept = {name: written / f"{name}.json" for name in SPLITS}
        parts = {name: _coco_part(file, path) for name, file in kept.items() if file.is_file()}
        note = f"as --write left it in {OURS}/; remove that folder to read the rest again"
        return _checked(Folder(path, "coco", parts, (note,)))
    tree = FileTree.of(path)
    evidence = _evidence(tree)
    found = [name for name in LAYOUTS if evidence[name]]
    if layout is not None:
        found = [name for name in found if name == layout]
    if not found:
        wanted = LAYOUTS if layout is None else {layout: LAYOUTS[layout]}
        looked = "; ".join(f"{name}: {what}" for name, what in wanted.items())
        raise DatasetError(
            f"--data: {quoted(path)} has no known layout ({len(tree.images):,} images and "
            f"{sum(map(len, tree.others.values())):,} other files). Looked for {looked}."
        )
    if len(found) > 1:
        shown = ", ".join(f"{name} ({path_text(path, evidence[name][0])})" for name in found)
        raise DatasetError(
            f"--data: {quoted(path)} mixes layouts: {shown}. Name the one to read with --layout, "
            "or remove the others."
        )
    readers: dict[str, Callable[[FileTree, list[Path]], tuple[dict[str, Part], list[str]]]] = {
        "coco": _read_coco,
        "yolo": read_yolo,
        "voc": read_voc,
        "cvat": read_cvat,
    }
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        parts, notes = readers[found[0]](tree, evidence[found[0]])
    notes += [plain(str(each.message), 300) for each in said if each.category is UserWarning]
    return _checked(Folder(path, found[0], parts, tuple(notes)))


def _checked(folder: Folder) -> Folder:
    """Refuse a folder without anything to train on, or whose splits have different classes."""
    if "train" not in folder.parts or not folder.parts["train"].files:
        raise DatasetError(
            f"--data: {quoted(folder.path)} ({folder.layout}) has only "
            f"{named(folder.parts) or 'empty splits'}, and no images to train on: call a folder or "
            "file train."
        )
    learned = [each["name"] for each in folder.parts["train"].document["categories"]]
    for name, part in folder.parts.items():
        classes = [each["name"] for each in part.document["categories"]]
        if classes != learned:
            alone = {
                "train": [each for each in learned if each not in classes],
                name: [each for each in classes if each not in learned],
            }
            only = [f"only in {where}: {named(few, 20)}" for where, few in alone.items() if few]
            raise DatasetError(
                f"--data: the classes of train and {name} differ: "
                f"{'; '.join(only) or 'they are the same in another order'}. Give both the same "
                "classes in the same order."
            )
    return folder


def _evidence(tree: FileTree) -> dict[str, list[Path]]:
    """Return the annotation files of each layout."""
    found: dict[str, list[Path]] = {name: [] for name in LAYOUTS}
    files = tree.others[".json"]
    if any(each.name.startswith("instances_") for each in files):
        files = [each for each in files if not each.name.startswith(_OTHER_TASKS)]
    for file in files:
        try:
            document = read_annotations(file)
        except DatasetError:
            continue  # some other JSON
        if document["images"] and document["categories"]:
            found["coco"].append(file)
    for file in tree.others[".xml"]:
        root = re.search(r"<(annotations?)[\s>]", text_of(file, 4096))
        if root is not None:
            found["voc" if root[1] == "annotation" else "cvat"].append(file)
    texts = {each.relative_to(tree.root).as_posix(): each for each in tree.others[".txt"]}
    labels = (label_of(name, texts) for name in tree.images)
    found["yolo"] = [each for each in labels if each is not None]
    shown = [text for each in found["yolo"][:20] if (text := text_of(each, 400).strip())]
    if not all(re.match(r"\d+(\s+[-+.\deE]+){4}", each) for each in shown):
        found["yolo"] = []
    return found


def _read_coco(tree: FileTree, files: list[Path]) -> tuple[dict[str, Part], list[str]]:
    of_split: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        split = split_of_path(file.relative_to(tree.root).as_posix().removesuffix(".json"))
        of_split[split or "train"].append(file)
    for split, several in of_split.items():
        if len(several) > 1:
            shown = named(path_text(tree.root, each) for each in several)
            raise DatasetError(
                f"--data: {len(several)} files are for {split}: {shown}. Keep one, or name the "
                "files with --train-json and --test-json."
            )
    parts = {}
    for split, (file,) in of_split.items():
        images = filter(is_image, read_annotations(file)["images"])
        first = next((str(each["file_name"]) for each in images), "")
        named_after = file.stem.rpartition("_")[2]
        beside, root = file.parent, tree.root
        places = [
            *(beside, beside.parent / named_after, root / "images" / named_after),
            *(root / "images" / split, root / split, root / "images", root),
        ]
        places = [each for each in places if each.is_relative_to(root)]
        found = next((each for each in places if is_file(each / first)), None)
        if found is None:
            tried = named(dict.fromkeys(f"{path_text(root, each)}/" for each in places), 9)
            raise DatasetError(
                f"--data: {quoted(first)} of {path_text(root, file)} is in none of {tried}. "
                "Name files and folders with --train-json, --train-images and so on."
            )
        parts[split] = _coco_part(file, found)
    return parts, []


def _coco_part(file: Path, images: Path) -> Part:
    document = read_annotations(file)
    read_categories(document["categories"], file)
    bad = [each for each in document["images"] if not is_image(each)]
    if bad:
        raise DatasetError(
            f"{quoted(file)}: {len(bad)} images are malformed, such as {quoted(bad[0])}. Each "
            "needs a whole number as id, a width, a height and a file_name."
        )
    ordered = sorted(document["categories"], key=lambda each: float(each["id"]))
    return Part({**document, "categories": ordered}, images, file)
