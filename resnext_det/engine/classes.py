"""Do a model's classes mean the same in its weights, its training data and its test data?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from resnext_det.checkpoint_file import read_run
from resnext_det.data.categories import check_same_classes
from resnext_det.data.checks import (
    check_agreement,
    check_registered,
    classes_of,
    configured_classes,
)
from resnext_det.errors import quoted


def check_classes(
    cfg: CfgNode, *, learned: Sequence[str] = (), weights: Path | None = None
) -> None:
    """Refuse data sets to evaluate with whose classes are not those that the model learned.

    These are the given ones, else those that the checkpoint records, else those of DATASETS.TRAIN.
    A class is a number to a model: with other names, or in another order, AP would be wrong without
    a word.

    Args:
        cfg: DATASETS.TRAIN and DATASETS.TEST are read, and MODEL.WEIGHTS if it is a file.
        learned: the classes, in the order of the model's outputs; empty if they are not known.
        weights: the checkpoint, if MODEL.WEIGHTS is an address.

    Raises:
        ConfigError: a data set that is not registered.
        DatasetError: the classes differ; the message lists how.
    """
    if configured_classes(cfg) is None:
        return
    for name in cfg.DATASETS.TEST:
        check_registered(name)
    of_learned = "the model"
    file = weights or Path(cfg.MODEL.WEIGHTS)
    if not learned and file.is_file():
        run = read_run(file)
        learned, of_learned = run.class_names if run else (), f"the weights {quoted(file)}"
    if not learned:
        trained = [name for name in cfg.DATASETS.TRAIN if name in DatasetCatalog]
        check_agreement([*trained, *cfg.DATASETS.TEST])
        return
    for name in cfg.DATASETS.TEST:
        tested = classes_of(name)
        if tested is not None:
            check_same_classes(learned, tested, of_learned, f"data set {name}")
