"""A run's figures beside published ones of the same network, where they can be compared."""

from __future__ import annotations

from dataclasses import dataclass, replace

from resnext_det.evaluation.run_folder import Evaluation
from resnext_det.published.results import published_results, what_differs
from resnext_det.published.setting import MINIVAL, setting_of
from resnext_det.report.config import ConfigSummary

MINIVAL_IMAGES = 5000
# An evaluation of a file of annotations names it by its stem: COCO's own file, and Detectron's.
_STEMS = {"instances_val2017": "coco_2017_val", "instances_minival2014": "coco_2014_minival"}


@dataclass(frozen=True)
class PublishedRow:
    """One published result beside a run.

    Attributes:
        source: who published it, and where.
        schedule: as they call it.
        AP: in percent.
        AP50: in percent, None where it is not published.
        differs: what it has otherwise than the run.
    """

    source: str
    schedule: str
    AP: float
    AP50: float | None
    differs: str


@dataclass(frozen=True)
class Published:
    """Published results beside a run.

    Attributes:
        rows: the paper first, then the nearest; none where they cannot be compared.
        caveats: what to know before comparing, in whole sentences.
        reason: why there are no rows; "" where there are.
    """

    rows: tuple[PublishedRow, ...] = ()
    caveats: tuple[str, ...] = ()
    reason: str = ""


def published_beside(evaluation: Evaluation, config: ConfigSummary | None) -> Published:
    """Return what is published for the network of a run.

    Args:
        evaluation: on one data set.
        config: of the run, None where it is not known.
    """
    name = _STEMS.get(evaluation.name, evaluation.name)
    if setting_of({"DATASETS": {"TEST": [name]}}).test_set != MINIVAL:
        reason = "Published figures are of COCO minival and cannot be compared with these."
        return Published(reason=reason)
    if evaluation.image_count != MINIVAL_IMAGES:
        reason = (
            f"Published figures are of all {MINIVAL_IMAGES:,} images of COCO minival and cannot "
            f"be compared with these, of {evaluation.image_count:,}."
        )
        return Published(reason=reason)
    if config is None:
        reason = "There is no config.yaml to tell the network, so no published figures stand here."
        return Published(reason=reason)
    # A config may name several data sets to test on.
    setting = replace(config.setting, test_set=MINIVAL)
    found = published_results(config.depth, config.template, setting)
    if not found:
        return Published(reason=f"There are no published figures of {config.model}.")
    rows = tuple(
        PublishedRow(row.source, row.schedule, row.AP, row.AP50, what_differs(row, setting))
        for row in found
    )
    caveats = dict.fromkeys(sentence for row in found for sentence in row.caveats)
    return Published(rows, tuple(caveats))
