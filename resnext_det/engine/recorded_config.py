"""The config and classes that a checkpoint records, compared with those it is used with."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from resnext_det.checkpoint_file import Run, read_run
from resnext_det.config import complete, parse_config
from resnext_det.config_rules import CLASSIFIER, STOCK
from resnext_det.data.checks import (
    check_agreement,
    check_registered,
    check_same_classes,
    classes_of,
    configured_classes,
)
from resnext_det.errors import ConfigError, plain, quoted
from resnext_det.weights.loading import weights_file

logger = logging.getLogger(__name__)

Changes = dict[str, tuple[Any, Any]]
"""Keys whose values differ: as recorded, and as they are now."""

# Keys of MODEL that do not affect the function of a trained network: where it runs, which of its
# outputs are kept, and training options. All others count, including keys of newer versions.
_NO_FUNCTION = re.compile(
    r"""MODEL\.(
    WEIGHTS | DEVICE | MASK_ON | KEYPOINT_ON
    | BACKBONE\.FREEZE_AT
    | RESNEXT\.(FORM | CHECKPOINT_STAGES | PRECISION | ZERO_INIT_RESIDUAL | ALLOW_\w+)
    | PROPOSAL_GENERATOR\.MIN_SIZE
    | PANOPTIC_FPN\..+
    | .+\.(
        SCORE_THRESH_TEST | NMS_THRESH(_TEST)? | (PRE|POST)_NMS_TOPK_\w+ | TOPK_CANDIDATES_TEST
        | \w*LOSS\w* | SMOOTH_L1_BETA | BATCH_SIZE_PER_IMAGE | POSITIVE_FRACTION | PRIOR_PROB
        | IOU_THRESHOLDS | IOU_LABELS | IOUS | BOUNDARY_THRESH | PROPOSAL_APPEND_GT
        | MIN_KEYPOINTS_PER_IMAGE | IGNORE_VALUE | TRAIN_ON_PRED_BOXES
        | FED_LOSS_\w+ | USE_FED_LOSS
      )
    )""",
    re.VERBOSE,
)
# Norms that compute the same once their statistics are fixed.
_BATCH_NORMS = ("BN", "SyncBN", "FrozenBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
# RPN heads that compute the same.
_RPN_HEADS = ("StandardRPNHead", "CheckpointedRPNHead")

_PRECISION = "MODEL.RESNEXT.PRECISION"

# A resume cannot change which parameters learn and how they are grouped.
_FIXED = (
    "MODEL.BACKBONE.FREEZE_AT",
    "SOLVER.BIAS_LR_FACTOR",
    "SOLVER.WEIGHT_DECAY_NORM",
    "SOLVER.WEIGHT_DECAY_BIAS",
)


def changes(recorded: str, cfg: CfgNode) -> Changes:
    """Return the keys of a config that differ from a recorded one.

    Keys missing from either, such as those of a newer version, are left out.

    Raises:
        ConfigError: the record is not a yaml config.
    """
    # Before this key there was only stock arithmetic.
    before = {_PRECISION: STOCK, **dict(_leaves(parse_config(recorded, "the recorded config")))}
    now = dict(_leaves(parse_config(cfg.dump(), "the config")))
    common = sorted(before.keys() & now.keys())
    return {key: (before[key], now[key]) for key in common if before[key] != now[key]}


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def function_changes(recorded: str, cfg: CfgNode) -> Changes:
    """Return the keys whose values change the function of a trained network.

    Thresholds, the test size, paths and training options do not.

    Raises:
        ConfigError: the record is not a yaml config.
    """
    return {
        key: (before, now)
        for key, (before, now) in changes(recorded, cfg).items()
        if (key.startswith("MODEL.") and not _NO_FUNCTION.fullmatch(key)) or key == "INPUT.FORMAT"
        if not (key.endswith("NORM") and before in _BATCH_NORMS and now in _BATCH_NORMS)
        if not (key == "MODEL.RPN.HEAD_NAME" and before in _RPN_HEADS and now in _RPN_HEADS)
    }


def check_same_function(cfg: CfgNode, *, allow: bool = False) -> None:
    """Refuse settings that change the function of the detector in MODEL.WEIGHTS.

    Checkpoints of other programs record no settings and are not checked.

    Args:
        cfg: the config to build the detector from.
        allow: only warn, as with MODEL.RESNEXT.ALLOW_OTHER_FUNCTION.

    Raises:
        ConfigError: a setting differs; the message has both values and the overrides to restore.
        WeightsError: the file cannot be fetched or read.
    """
    if not cfg.MODEL.WEIGHTS:
        return
    file = weights_file(cfg)
    run = _run_of_detector(file)
    found = function_changes(run.config, cfg) if run is not None else {}
    if not found:
        return
    if allow or complete(cfg).MODEL.RESNEXT.ALLOW_OTHER_FUNCTION:
        logger.warning("%s was trained with other settings: %s", file, listed(found))
        return
    restored = " ".join(f'{key} "{plain(str(before))}"' for key, (before, _) in found.items())
    raise ConfigError(
        f"{quoted(file)} was trained with other settings: {listed(found)}. Restore them: "
        f"{restored}; or allow the new ones: MODEL.RESNEXT.ALLOW_OTHER_FUNCTION True."
    )


def _run_of_detector(file: Path) -> Run | None:
    """Return the run that a checkpoint records, unless it trained a classifier."""
    run = read_run(file)
    if run is None:
        return None
    recorded = dict(_leaves(parse_config(run.config, "the recorded config")))
    return None if recorded.get("MODEL.META_ARCHITECTURE") == CLASSIFIER else run


def check_resumable(cfg: CfgNode, file: Path, run: Run | None, class_names: list[str]) -> Changes:
    """Refuse settings that a resumed training cannot change, and return all that differ.

    Args:
        cfg: the config of the resumed training.
        file: the checkpoint.
        run: its record, if it has one.
        class_names: of the resumed training.

    Raises:
        ConfigError: a setting that cannot be changed differs.
        DatasetError: the classes differ.
    """
    if run is None:
        return {}
    found = changes(run.config, cfg)
    fixed = {key: found[key] for key in _FIXED if key in found}
    if "SEED" in found and cfg.SEED >= 0:  # otherwise training keeps its seed
        fixed["SEED"] = found["SEED"]
    if not complete(cfg).MODEL.RESNEXT.ALLOW_OTHER_FUNCTION:
        fixed |= function_changes(run.config, cfg)
        # The function is the same, but what follows would not be what follows without a stop.
        fixed |= {key: found[key] for key in (_PRECISION,) if key in found}
    if fixed:
        raise ConfigError(
            f"a resume of {quoted(file)} cannot change {listed(fixed)}. Restore these values, or "
            "start a new training from the checkpoint (MODEL.WEIGHTS) in another OUTPUT_DIR."
        )
    if run.class_names and class_names:
        check_same_classes(run.class_names, class_names, quoted(file), "the training data")
    return found


def listed(found: Changes) -> str:
    """Return changes as text: each key with both values."""
    return "; ".join(
        f"{key} was {plain(str(before))} and is {plain(str(now))}"
        for key, (before, now) in found.items()
    )


def check_classes(
    cfg: CfgNode, *, learned: Sequence[str] = (), weights: Path | None = None
) -> None:
    """Refuse test data whose classes differ from those the model learned.

    To a model a class is a number: with other names or another order, AP would be silently wrong.

    Args:
        cfg: DATASETS.TRAIN and DATASETS.TEST are read, and MODEL.WEIGHTS if it is a file.
        learned: the classes in the order of the model's outputs; by default those recorded in the
            checkpoint, or those of DATASETS.TRAIN.
        weights: the checkpoint, if MODEL.WEIGHTS is an address.

    Raises:
        ConfigError: a data set is not registered.
        DatasetError: the classes differ; the message lists the differences.
    """
    if configured_classes(cfg) is None:
        return
    for name in cfg.DATASETS.TEST:
        check_registered(name)
    source = "the model"
    file = weights or Path(cfg.MODEL.WEIGHTS)
    if not learned and file.is_file() and (run := _run_of_detector(file)) is not None:
        learned, source = run.class_names, f"the weights {quoted(file)}"
    if not learned:
        trained = [name for name in cfg.DATASETS.TRAIN if name in DatasetCatalog]
        check_agreement([*trained, *cfg.DATASETS.TEST])
        return
    for name in cfg.DATASETS.TEST:
        if (tested := classes_of(name)) is not None:
            check_same_classes(learned, tested, source, f"data set {name}")
