"""Data sets in COCO's format, named on the command line by file and folder.

A data set's name follows from its paths, so that every process arrives at the same. Detectron2's
catalog is one per process: `from_arguments` (or `use`) reads the files, once, and serves its own
process; every other process that builds a data loader calls `register_arguments`, which reads
nothing. A run's folder records the files (`record`), so that its config.yaml is enough to use them
again.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from resnext_det.data.annotations import (
    Document,
    read_annotations,
    read_json,
    register_annotations,
)
from resnext_det.data.categories import check_same_classes, read_categories
from resnext_det.data.checks import (
    CUSTOM,
    check_not_empty,
    check_registered,
    classes_of,
    configured_classes,
)
from resnext_det.data.image_files import missing_files
from resnext_det.data.keypoints import keypoints_of
from resnext_det.data.record_forms import is_name, leads_out
from resnext_det.errors import ConfigError, DatasetError, quoted
from resnext_det.files import file_digest, write_json

logger = logging.getLogger(__name__)

RECORD = "datasets.json"
"""In a run's folder: the files of its data sets, by name."""


@dataclass(frozen=True)
class CustomData:
    """An annotation file and the folder of its images, both absolute.

    Attributes:
        split: "train" or "test".
        file: the annotations.
        images: the folder.
    """

    split: str
    file: Path
    images: Path

    @property
    def name(self) -> str:
        """Return the name in Detectron2's catalog, fit to be part of a file name."""
        stem = re.sub(r"\W+", "_", self.file.stem, flags=re.ASCII)[:40]
        digest = hashlib.sha256(f"{self.file}\n{self.images}".encode(errors="replace")).hexdigest()
        # Detectron2 warns of category ids that have holes, unless the name holds "coco".
        return f"{CUSTOM}{stem}_{digest[:8]}"


def from_arguments(cfg: CfgNode, arguments: argparse.Namespace) -> CfgNode:
    """Do what `use` does, as the command line says.

    Args:
        cfg: the run's config.
        arguments: "train_json" and the others of `resnext_det_cli.flags.add_own_data`,
            "eval_only", and overrides in "opts".

    Returns:
        The config; without any of the flags, the given one.

    Raises:
        ConfigError: flags that contradict each other, the overrides, or the config.
        DatasetError: see `use`.
    """
    located = _of_arguments(arguments)
    if not located:
        used = [] if arguments.eval_only else list(cfg.DATASETS.TRAIN)
        _check_recorded(arguments, [*used, *cfg.DATASETS.TEST])
        register_arguments(arguments)
        return cfg
    splits = [data.split for data in located]
    if arguments.eval_only and "test" not in splits:
        raise ConfigError("--eval-only evaluates on --test-json, which is not given.")
    if not arguments.eval_only and "train" not in splits:
        raise ConfigError(
            "--test-json without --train-json: give both, or --eval-only. The classes of a "
            "training come from its own data."
        )
    overridden = set(arguments.opts[::2])
    for key in ("DATASETS.TRAIN", "DATASETS.TEST"):
        if key in overridden:
            raise ConfigError(
                f"{key} beside --train-json or --test-json: both name data sets. {key} takes names "
                "that are registered, the flags take files; leave one of them out."
            )
    made = _use(cfg, located)
    before, after = configured_classes(cfg), configured_classes(made)
    if before and after and before != after and before[0] in overridden:
        raise ConfigError(
            f"{before[0]} is set to {before[1]}, and the annotations have {after[1]} categories. "
            "Leave it out: it follows from them."
        )
    return made


def use(
    cfg: CfgNode,
    train_json: str | Path | None = None,
    train_images: str | Path | None = None,
    test_json: str | Path | None = None,
    test_images: str | Path | None = None,
) -> CfgNode:
    """Register data sets in this process, and make a config that trains and evaluates on them.

    Category ids may start at 0 or 1 and have holes: class i of the model is the category with the
    i-th id. The test file must have the same names in the same order, all of them.

    Args:
        cfg: the config; it is not changed.
        train_json: the annotations to train on; None for an evaluation alone.
        train_images: the folder of their images; None where they lie beside the annotations.
        test_json: the annotations to evaluate with; None for a training without evaluations.
        test_images: the folder of their images; None where they lie beside the annotations.

    Returns:
        A copy of the config with DATASETS.TRAIN, DATASETS.TEST and the number of classes.

    Raises:
        ConfigError: a file or folder that is not there, or a model that is no Faster R-CNN or
            RetinaNet.
        DatasetError: annotations that are not COCO's, categories that cannot be told apart or
            differ, images outside of their folder, or nothing to learn from.
    """
    located = [
        *_locate("train", train_json, train_images),
        *_locate("test", test_json, test_images),
    ]
    return _use(cfg, located)


def register_arguments(arguments: argparse.Namespace) -> None:
    """Register the data sets of the command line in this process; doing so again is harmless.

    Args:
        arguments: those that another process gave to `from_arguments`.

    Raises:
        ConfigError: a file or folder that is not there.
    """
    for data in _of_arguments(arguments):
        register(data)
    for data, _ in _recorded(arguments).values():
        register(data)


def record(cfg: CfgNode, folder: Path) -> None:
    """Write down the files of the data sets that came from the command line.

    Args:
        cfg: the run's config.
        folder: of its config.yaml. Data sets that were recorded there before are kept.

    Raises:
        ResNeXtError: it cannot be written.
    """
    names = [name for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) if name.startswith(CUSTOM)]
    found = {}
    for name in dict.fromkeys(names):
        metadata = MetadataCatalog.get(name)
        if name in DatasetCatalog and Path(metadata.json_file).is_file():
            found[name] = {
                "annotations": metadata.json_file,
                "images": metadata.image_root,
                "sha256": file_digest(Path(metadata.json_file)),
            }
    if found:
        kept = {
            name: {"annotations": str(data.file), "images": str(data.images), "sha256": digest}
            for name, (data, digest) in read_record(folder).items()
        }
        write_json(folder / RECORD, kept | found)


def read_record(folder: Path) -> dict[str, tuple[CustomData, str]]:
    """Return the data sets that a run's folder records, and the digests of their annotations.

    Args:
        folder: of the run.

    Returns:
        By name; empty if the folder records none.

    Raises:
        DatasetError: the record is damaged.
    """
    file = folder / RECORD
    if not file.is_file():
        return {}
    content, found = read_json(file), {}
    try:
        for name, entry in content.items():
            data = CustomData("test", Path(entry["annotations"]), Path(entry["images"]))
            if name != data.name or not isinstance(entry["sha256"], str):
                raise ValueError(f"an entry {quoted(name)} that does not fit its files")
            found[name] = data, entry["sha256"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DatasetError(
            f"{quoted(file)} does not name data sets ({quoted(error)}). Remove it, and name the "
            "files with --train-json and --test-json."
        ) from error
    return found


def _recorded(arguments: argparse.Namespace) -> dict[str, tuple[CustomData, str]]:
    """Return what is recorded beside the config, unless the command line names files itself."""
    config = getattr(arguments, "config_file", None)
    return read_record(Path(config).parent) if config and not _of_arguments(arguments) else {}


def _check_recorded(arguments: argparse.Namespace, names: list[str]) -> None:
    """Refuse recorded files that have gone, or are others by now."""
    recorded = _recorded(arguments)
    for name in names:
        if name not in recorded:
            continue
        data, digest = recorded[name]
        advice = "Put it back, or name files with --train-json, --test-json and their images."
        if not data.file.is_file():
            raise DatasetError(f"the annotations {quoted(data.file)} of the run are gone. {advice}")
        if not data.images.is_dir():
            raise DatasetError(f"the images {quoted(data.images)} of the run are gone. {advice}")
        if file_digest(data.file) != digest:
            raise DatasetError(
                f"the annotations {quoted(data.file)} have changed since the run. {advice}"
            )


def register(data: CustomData, classes: Sequence[str] = ()) -> None:
    """Register a data set in this process; doing so again is harmless.

    Args:
        data: the data set.
        classes: in the order of their category ids, where they are known; Detectron2 adds them as
            it loads the data. With them, an entry of the same name is replaced.
    """
    if data.name in DatasetCatalog.list() and not classes:
        return
    metadata = {"thing_classes": list(classes)} if classes else {}
    register_annotations(data.name, metadata, data.file, data.images)


def class_names(cfg: CfgNode) -> list[str]:
    """Return the names of the classes that a model learns, in the order of its outputs.

    Args:
        cfg: the config; the first of DATASETS.TRAIN is read, or of DATASETS.TEST where there is
            nothing to train on.

    Raises:
        ConfigError: no data set, or one that is not registered or names no classes.
        DatasetError: its annotations cannot be read.
    """
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    if not names:
        raise ConfigError("no data set is named: set DATASETS.TRAIN.")
    check_registered(names[0])
    classes = classes_of(names[0])
    if classes is None:
        raise ConfigError(f"data set {quoted(names[0])} has no names of classes (thing_classes).")
    return classes


def _use(cfg: CfgNode, located: list[CustomData]) -> CfgNode:
    key = _check_model(cfg)
    if not located:
        raise ConfigError("no annotations are named: neither to train on nor to evaluate with.")
    categories = []
    for data in located:
        document = read_annotations(data.file, data.name)
        check_not_empty(document, data.name, data.file, training=data.split == "train")
        _check_file_names(document, data)
        categories.append(list(read_categories(document["categories"], data.file).values()))
    check_same_classes(
        categories[0], categories[-1], quoted(located[0].file), quoted(located[-1].file)
    )
    if len({data.name for data in located}) < len(located):
        logger.warning("the figures will be those of the images that are trained on")
    for data in located:
        register(data, categories[0])
    made: CfgNode = cfg.clone()
    made.defrost()
    made.DATASETS.TRAIN = tuple(data.name for data in located if data.split == "train")
    made.DATASETS.TEST = tuple(data.name for data in located if data.split == "test")
    made.merge_from_list([key, str(len(categories[0]))])
    if cfg.MODEL.KEYPOINT_ON:
        made.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = _keypoints(located)
    if cfg.is_frozen():
        made.freeze()
    return made


def _keypoints(located: list[CustomData]) -> int:
    """Return the number of keypoints of data sets, which must name the same ones."""
    found = {}
    for data in located:
        document = read_annotations(data.file, data.name)
        found[data.file] = keypoints_of(document["categories"], data.file)
    if None in found.values() or len(set(found.values())) > 1:
        raise DatasetError(
            "MODEL.KEYPOINT_ON is True, and the categories of "
            f"{' and '.join(map(quoted, found))} do not name the same keypoints: list them under "
            '"keypoints" of each category that has some, or set MODEL.KEYPOINT_ON False.'
        )
    return max(len(each.names) for each in found.values() if each is not None)


def _check_model(cfg: CfgNode) -> str:
    """Return the key that holds the number of classes."""
    configured = configured_classes(cfg)
    if configured is None:
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}: data of your own is for "
            "GeneralizedRCNN (such as Faster R-CNN) and RetinaNet."
        )
    return configured[0]


def _check_file_names(document: Document, data: CustomData) -> None:
    records = [record for record in document["images"] if isinstance(record, dict)]
    names = [record["file_name"] for record in records if is_name(record.get("file_name"))]
    out = [name for name in names if leads_out(name)]
    if out:
        raise DatasetError(
            f"{quoted(data.file)}: {len(out)} of {len(names)} file names lead out of the image "
            f"folder, such as {quoted(out[0])}. They must be relative to "
            f"--{data.split}-images, without '..'."
        )
    if names and len(missing_files(names, data.images)) == len(names):
        raise ConfigError(
            f"none of the images that {quoted(data.file)} names, such as {quoted(names[0])}, is in "
            f"{quoted(data.images)}: say where they are with --{data.split}-images."
        )


def _locate(split: str, json: str | Path | None, images: str | Path | None) -> list[CustomData]:
    """Return the data set of a split, if it is named."""
    if not json:
        if images:
            raise ConfigError(f"--{split}-images needs --{split}-json, the annotations.")
        return []
    file = Path(json).expanduser()
    if not file.is_file():
        raise ConfigError(f"--{split}-json: there is no file {quoted(Path(json))}.")
    folder = Path(images).expanduser() if images else _folder_of(file)
    if not folder.is_dir():
        raise ConfigError(f"--{split}-images: there is no folder {quoted(folder)}.")
    return [CustomData(split, file.resolve(), folder.resolve())]


def _folder_of(file: Path) -> Path:
    """Return where images are looked for: annotations/instances_val2017.json -> val2017."""
    split = file.stem.rpartition("_")[2]
    beside = file.absolute().parent.parent / split
    return beside if split != file.stem and beside.is_dir() else file.parent


def _of_arguments(arguments: argparse.Namespace) -> list[CustomData]:
    return [
        *_locate("train", arguments.train_json, arguments.train_images),
        *_locate("test", arguments.test_json, arguments.test_images),
    ]
