"""The config that a checkpoint records, compared with the one that it is used with."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from resnext_det.checkpoint_file import Run, read_run
from resnext_det.config import complete
from resnext_det.config_files import parse_config
from resnext_det.errors import ConfigError, WeightsError, plain, quoted

logger = logging.getLogger(__name__)

Changes = dict[str, tuple[Any, Any]]
"""Keys whose values differ: as recorded, and as they are now."""

# Keys of MODEL that a trained network's function does not depend on: where it runs, what is kept
# of its output, and what only a training reads. Everything else counts, new keys included.
_NO_FUNCTION = re.compile(
    r"""MODEL\.(
    WEIGHTS | DEVICE | MASK_ON | KEYPOINT_ON
    | BACKBONE\.FREEZE_AT
    | RESNEXT\.(FORM | CHECKPOINT_STAGES | ZERO_INIT_RESIDUAL | ALLOW_\w+)
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


def _has_regions(model: CfgNode) -> bool:
    return model.META_ARCHITECTURE in ("GeneralizedRCNN", "PanopticFPN")


def _has_proposals(model: CfgNode) -> bool:
    return _has_regions(model) or model.META_ARCHITECTURE == "ProposalNetwork"


# Parts of MODEL that only some architectures have.
_PARTS: dict[str, Callable[[CfgNode], bool]] = {
    "RETINANET": lambda model: model.META_ARCHITECTURE in ("RetinaNet", "FCOS"),
    "SEM_SEG_HEAD": lambda model: model.META_ARCHITECTURE in ("PanopticFPN", "SemanticSegmentor"),
    "PROPOSAL_GENERATOR": _has_proposals,
    "RPN": _has_proposals,
    "ROI_HEADS": _has_regions,
    "ROI_BOX_HEAD": _has_regions,
    "ROI_BOX_CASCADE_HEAD": lambda model: "Cascade" in model.ROI_HEADS.NAME,
    "ROI_MASK_HEAD": lambda model: model.MASK_ON,
    "ROI_KEYPOINT_HEAD": lambda model: model.KEYPOINT_ON,
    "FPN": lambda model: "fpn" in model.BACKBONE.NAME,
}
# Norms that compute the same once the statistics are fixed.
_BATCH_NORMS = ("BN", "SyncBN", "FrozenBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")


def changes(recorded: str, cfg: CfgNode) -> Changes:
    """Return the keys of a config that differ from a recorded one.

    Keys that the record lacks, such as those of a newer version, are left out.

    Args:
        recorded: yaml text, as a checkpoint holds it.
        cfg: the config to compare.

    Raises:
        ConfigError: the record is not a config.
    """
    before = parse_config(recorded, "the recorded config")
    return dict(_differing(before, parse_config(cfg.dump(), "the config"), ""))


def _differing(
    before: dict[str, Any], now: dict[str, Any], prefix: str
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name in now.keys() & before.keys():
        one, other = before[name], now[name]
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _differing(one, other, f"{prefix}{name}.")
        elif one != other:
            yield prefix + name, (one, other)


def function_changes(recorded: str, cfg: CfgNode) -> Changes:
    """Return the keys that change the function of a trained network.

    Thresholds, the test size, paths and what only a training reads do not.

    Args:
        recorded: yaml text, as a checkpoint holds it.
        cfg: the config to compare.

    Raises:
        ConfigError: the record is not a config.
    """
    found = {}
    for key, (before, now) in sorted(changes(recorded, cfg).items()):
        section, _, rest = key.partition(".")
        if key != "INPUT.FORMAT" and (section != "MODEL" or _NO_FUNCTION.fullmatch(key)):
            continue
        part = rest.partition(".")[0]
        if (part in _PARTS and not _PARTS[part](cfg.MODEL)) or _alike(key, before, now):
            continue
        found[key] = before, now
    return found


def _alike(key: str, before: Any, now: Any) -> bool:
    """Tell whether two values of a key mean the same network."""
    if key.endswith("NORM"):
        return before in _BATCH_NORMS and now in _BATCH_NORMS
    return key.endswith(".NAME") and _stock_name(before) == _stock_name(now)


def _stock_name(name: object) -> str:
    """Return Detectron2's name for the network that one of this package's names builds, too."""
    return str(name).lower().replace("resnext", "resnet").removeprefix("resnet")


def check_same_function(cfg: CfgNode, file: Path | None = None) -> None:
    """Refuse a trained detector under settings that change its function.

    MODEL.RESNEXT.ALLOW_OTHER_FUNCTION allows it, with a warning.

    Args:
        cfg: the config that the detector is built from.
        file: its checkpoint; by default MODEL.WEIGHTS. One that records no config, as those of
            other programs, is not checked.

    Raises:
        ConfigError: a setting differs; the message names both values and what to do.
    """
    file = Path(PathManager.get_local_path(cfg.MODEL.WEIGHTS)) if file is None else file
    run = read_run(file)
    if run is None or not run.config:
        return
    found = function_changes(run.config, cfg)
    if not found:
        return
    if complete(cfg).MODEL.RESNEXT.ALLOW_OTHER_FUNCTION:
        logger.warning("%s was trained with other settings: %s", file, listed(found))
        return
    restored = " ".join(f'{key} "{plain(str(before))}"' for key, (before, _) in found.items())
    raise ConfigError(
        f"{quoted(file)} was trained with other settings, and would compute something else under "
        f"these: {listed(found)}. Use its own: {restored}; or allow it: "
        "MODEL.RESNEXT.ALLOW_OTHER_FUNCTION True."
    )


def warn_of_other_function(cfg: CfgNode, file: Path) -> None:
    """Warn if a detector is fine-tuned under settings other than it was trained with.

    Args:
        cfg: the config of the new training.
        file: the checkpoint that it starts from.
    """
    try:
        run = read_run(file)
        found = function_changes(run.config, cfg) if run is not None and run.config else {}
    except (ConfigError, WeightsError) as error:
        logger.warning("%s", error)
        return
    if found:
        logger.warning("%s was trained with other settings: %s", file, listed(found))


# A resume cannot change these: how parameters are grouped, which of them learn, and the images.
_FIXED = (
    "MODEL.BACKBONE.FREEZE_AT",
    "SOLVER.BIAS_LR_FACTOR",
    "SOLVER.WEIGHT_DECAY_NORM",
    "SOLVER.WEIGHT_DECAY_BIAS",
)


def check_resumable(cfg: CfgNode, file: Path, run: Run | None, class_names: list[str]) -> Changes:
    """Refuse to resume under settings that a resume cannot change.

    Args:
        cfg: the config of the resumed training.
        file: the checkpoint.
        run: its record; None if it has none.
        class_names: of the resumed training, in the order of the model's outputs.

    Returns:
        The settings that differ, to report.

    Raises:
        ConfigError: one of them cannot be changed, or the classes differ.
    """
    if run is None or not run.config:
        return {}
    found = changes(run.config, cfg)
    fixed = {key: found[key] for key in _FIXED if key in found}
    if "SEED" in found and cfg.SEED >= 0:  # else the training keeps the seed it was started with
        fixed["SEED"] = found["SEED"]
    if not complete(cfg).MODEL.RESNEXT.ALLOW_OTHER_FUNCTION:
        fixed |= function_changes(run.config, cfg)
    if fixed:
        raise ConfigError(
            f"a resume of {quoted(file)} cannot change {listed(fixed)}. Resume with its own "
            "values, or start a new training from it: MODEL.WEIGHTS and another OUTPUT_DIR."
        )
    if run.class_names and class_names and list(run.class_names) != class_names:
        pairs = zip(run.class_names, class_names)
        one, other = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
        raise ConfigError(
            f"{quoted(file)} was trained on {len(run.class_names)} classes and the training data "
            f"has {len(class_names)}; the first that differs is {quoted(one)} there and "
            f"{quoted(other)} here. Resume with the data it was trained on."
        )
    return found


def listed(found: Changes) -> str:
    """Return changes as text: each key with both values."""
    return "; ".join(
        f"{key} was {plain(str(before))} and is {plain(str(now))}"
        for key, (before, now) in found.items()
    )
