"""Data sets in COCO's format, given as files on the command line.

The name of such a data set follows from its paths, so every process computes the same one.
Detectron2's catalog exists once per process: `from_arguments` (or `use`) reads the files and
registers them in its own process; every other process that builds a data loader calls
`register_arguments`, which reads nothing. A run folder records the files (`record`), so that its
config.yaml is enough to use them again.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from resnext_det.data.annotations import (
    read_annotations,
    read_categories,
    read_json,
    register_annotations,
)
from resnext_det.data.checks import (
    CUSTOM,
    check_not_empty,
    check_registered,
    check_same_classes,
    classes_of,
    configured_classes,
)
from resnext_det.data.keypoints import keypoints_of
from resnext_det.data.records import Record, is_name, leads_out
from resnext_det.errors import ConfigError, DatasetError, quoted
from resnext_det.files import file_digest, write_json

logger = logging.getLogger(__name__)

RECORD = "datasets.json"
"""In a run folder: the files of its data sets, by name."""


@dataclass(frozen=True)
class CustomData:
    """An annotation file and its image folder, both absolute; the digest is for run folders."""

    file: Path
    images: Path
    split: str = "test"  # or "train"
    sha256: str = ""

    @property
    def name(self) -> str:
        """The name in Detectron2's catalog, safe as part of a file name."""
        stem = re.sub(r"\W+", "_", self.file.stem, flags=re.ASCII)[:40]
        digest = hashlib.sha256(f"{self.file}\n{self.images}".encode(errors="replace")).hexdigest()
        # "coco" in the name keeps Detectron2 from warning about gaps in the category ids.
        return f"{CUSTOM}{stem}_{digest[:8]}"


def from_arguments(cfg: CfgNode, arguments: argparse.Namespace) -> CfgNode:
    """Apply `use` to the flags of `resnext_det_cli.flags.add_own_data`.

    Without these flags, the config is returned unchanged, and the files that its run folder records
    are registered.

    Raises:
        ConfigError: flags, overrides or the config contradict each other.
        DatasetError: see `use`, or recorded files have changed.
    """
    located = _of_arguments(arguments)
    if not located:
        used = [] if arguments.eval_only else list(cfg.DATASETS.TRAIN)
        _check_recorded(arguments, [*used, *cfg.DATASETS.TEST])
        register_arguments(arguments)
        return cfg
    splits = [data.split for data in located]
    if arguments.eval_only and "test" not in splits:
        raise ConfigError("--eval-only needs --test-json, the annotations to evaluate with.")
    if not arguments.eval_only and "train" not in splits:
        raise ConfigError(
            "--test-json without --train-json: give both, or --eval-only. A training takes its "
            "classes from its own data."
        )
    overridden = set(arguments.opts[::2])
    for key in ("DATASETS.TRAIN", "DATASETS.TEST"):
        if key in overridden:
            raise ConfigError(
                f"{key} and --train-json or --test-json both name data sets: leave one out."
            )
    new = _use(cfg, located)
    before, after = configured_classes(cfg), configured_classes(new)
    if before and after and before != after and before[0] in overridden:
        raise ConfigError(
            f"{before[0]} is set to {before[1]}, but the annotations have {after[1]} categories. "
            "Leave it out: it follows from them."
        )
    return new


def use(
    cfg: CfgNode,
    train_json: str | Path | None = None,
    train_images: str | Path | None = None,
    test_json: str | Path | None = None,
    test_images: str | Path | None = None,
) -> CfgNode:
    """Register data sets in this process, and return a config that trains and evaluates on them.

    Category ids may start at 0 or 1 and have gaps: class i of the model is the category with the
    i-th id. Both files need the same names in the same order. Without a folder, the images are
    beside the annotations, or in COCO's layout.

    Returns:
        A copy of the config with DATASETS.TRAIN, DATASETS.TEST and the number of classes.

    Raises:
        ConfigError: a file or folder is missing, or the model is neither Faster R-CNN, an RPN nor
            RetinaNet.
        DatasetError: the annotations are not COCO's, their classes differ, an image is outside its
            folder, or there is nothing to learn.
    """
    located = [
        *_locate("train", train_json, train_images),
        *_locate("test", test_json, test_images),
    ]
    return _use(cfg, located)


def _use(cfg: CfgNode, located: list[CustomData]) -> CfgNode:
    configured = configured_classes(cfg)
    if configured is None and cfg.MODEL.META_ARCHITECTURE != "ProposalNetwork":
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}: your own data needs "
            "GeneralizedRCNN (such as Faster R-CNN), ProposalNetwork or RetinaNet."
        )
    if not located:
        raise ConfigError("no annotations to train on or evaluate with.")
    classes, keypoints = [], []
    for data in located:
        document = read_annotations(data.file, data.name)
        check_not_empty(document, data.name, data.file, training=data.split == "train")
        _check_file_names(document, data)
        categories = document["categories"]
        classes.append(list(read_categories(categories, data.file).values()))
        if cfg.MODEL.KEYPOINT_ON:
            keypoints.append(keypoints_of(categories, data.file))
    files = [quoted(data.file) for data in located]
    check_same_classes(classes[0], classes[-1], files[0], files[-1])
    if cfg.MODEL.KEYPOINT_ON and (keypoints[0] is None or keypoints[0] != keypoints[-1]):
        raise DatasetError(
            f"MODEL.KEYPOINT_ON is True, but the categories of {' and '.join(files)} do not name "
            'the same keypoints: list them under "keypoints" of each category that has some, or '
            "set MODEL.KEYPOINT_ON False."
        )
    if len({data.name for data in located}) < len(located):
        logger.warning("the model is evaluated on the images that it is trained on")
    for data in located:
        metadata = {"thing_classes": classes[0]}
        register_annotations(data.name, metadata, data.file, data.images)
    new: CfgNode = cfg.clone()
    new.defrost()
    new.DATASETS.TRAIN = tuple(data.name for data in located if data.split == "train")
    new.DATASETS.TEST = tuple(data.name for data in located if data.split == "test")
    if configured is not None:
        new.merge_from_list([configured[0], str(len(classes[0]))])
    if keypoints and keypoints[0]:
        new.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = len(keypoints[0].names)
    if cfg.is_frozen():
        new.freeze()
    return new


def _check_file_names(document: Record, data: CustomData) -> None:
    records = [record for record in document["images"] if isinstance(record, dict)]
    names = [record["file_name"] for record in records if is_name(record.get("file_name"))]
    outside = [name for name in names if leads_out(name)]
    if outside:
        raise DatasetError(
            f"{quoted(data.file)}: {len(outside)} of {len(names)} file names lead out of the image "
            f"folder, such as {quoted(outside[0])}. Make them relative to --{data.split}-images, "
            "without '..'."
        )
    if names and not any(is_file(data.images / name) for name in names):
        raise ConfigError(
            f"none of the images of {quoted(data.file)}, such as {quoted(names[0])}, is in "
            f"{quoted(data.images)}: name their folder with --{data.split}-images."
        )


def is_file(path: Path) -> bool:
    """Tell whether a path is a file; no path is too strange to ask."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for the file system, or with a null byte
        return False


def _locate(split: str, json: str | Path | None, images: str | Path | None) -> list[CustomData]:
    """Return the data set of a split, or nothing without its annotations."""
    if not json:
        if images:
            raise ConfigError(f"--{split}-images needs --{split}-json, the annotations.")
        return []
    file = Path(json).expanduser()
    if not is_file(file):
        raise ConfigError(f"--{split}-json: {quoted(Path(json))} does not exist or is not a file.")
    if images:
        folder = Path(images).expanduser()
    else:
        # In COCO's layout annotations/instances_val2017.json goes with val2017.
        beside = file.absolute().parent
        folder = beside.parent / file.stem.rpartition("_")[2]
        if "_" not in file.stem or not folder.is_dir():
            folder = beside
    if not folder.is_dir():
        raise ConfigError(f"--{split}-images: {quoted(folder)} does not exist or is not a folder.")
    return [CustomData(file.resolve(), folder.resolve(), split)]


def _of_arguments(arguments: argparse.Namespace) -> list[CustomData]:
    return [
        *_locate("train", arguments.train_json, arguments.train_images),
        *_locate("test", arguments.test_json, arguments.test_images),
    ]


def register_arguments(arguments: argparse.Namespace) -> None:
    """Register the data sets that another process gave to `from_arguments`, if they are not yet.

    Raises:
        ConfigError: a file or folder is missing.
    """
    for data in (*_of_arguments(arguments), *_recorded(arguments).values()):
        if data.name not in DatasetCatalog.list():
            register_annotations(data.name, {}, data.file, data.images)


def record(cfg: CfgNode, folder: Path) -> None:
    """Record the files of data sets from the command line in a run folder, beside earlier ones.

    Raises:
        ResNeXtError: it cannot be written.
    """
    recorded = read_record(folder)
    for name in {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST}:
        metadata = MetadataCatalog.get(name)
        if name.startswith(CUSTOM) and name in DatasetCatalog:
            file, images = Path(metadata.json_file), Path(metadata.image_root)
            if file.is_file():
                recorded[name] = CustomData(file, images, sha256=file_digest(file))
    if recorded:
        entries = {
            name: {"annotations": str(each.file), "images": str(each.images), "sha256": each.sha256}
            for name, each in sorted(recorded.items())
        }
        write_json(folder / RECORD, entries)


def read_record(folder: Path) -> dict[str, CustomData]:
    """Return the data sets that a run folder records, by name.

    Raises:
        DatasetError: the record is damaged.
    """
    file = folder / RECORD
    if not file.is_file():
        return {}
    content, found = read_json(file), {}
    try:
        for name, entry in content.items():
            annotations, images = Path(entry["annotations"]), Path(entry["images"])
            found[name] = CustomData(annotations, images, sha256=str(entry["sha256"]))
            if name != found[name].name:
                raise ValueError(f"entry {quoted(name)} does not match its files")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DatasetError(
            f"{quoted(file)} is damaged ({quoted(error)}). Remove it, and name the files with "
            "--train-json and --test-json."
        ) from error
    return found


def _recorded(arguments: argparse.Namespace) -> dict[str, CustomData]:
    """Return the data sets recorded beside the config, unless the command line names files."""
    config = getattr(arguments, "config_file", None)
    return read_record(Path(config).parent) if config and not _of_arguments(arguments) else {}


def _check_recorded(arguments: argparse.Namespace, names: list[str]) -> None:
    """Refuse recorded files that are gone or have changed."""
    recorded = _recorded(arguments)
    for data in (recorded[name] for name in names if name in recorded):
        fault = ""
        if not is_file(data.file) or not data.images.is_dir():
            fault = f"the annotations {quoted(data.file)} or images {quoted(data.images)} are gone"
        elif file_digest(data.file) != data.sha256:
            fault = f"the annotations {quoted(data.file)} have changed since the run"
        if fault:
            raise DatasetError(
                f"{fault}. Restore them, or name files with --train-json, --test-json and their "
                "images."
            )


def class_names(cfg: CfgNode) -> list[str]:
    """Return the classes of the first data set to train on, else to evaluate on.

    They are in the order of the model's outputs.

    Raises:
        ConfigError: there is no data set, or it is not registered or has no class names.
        DatasetError: its annotations cannot be read.
    """
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    if not names:
        raise ConfigError("no data set: set DATASETS.TRAIN.")
    check_registered(names[0])
    classes = classes_of(names[0])
    if classes is None:
        raise ConfigError(f"data set {quoted(names[0])} has no class names (thing_classes).")
    return classes
