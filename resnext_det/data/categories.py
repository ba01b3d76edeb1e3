"""The categories of annotations: what they are called, and whether those of two files agree."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from resnext_det.data.findings import Record
from resnext_det.data.record_forms import check_categories, repeated
from resnext_det.errors import DatasetError, quoted

_LISTED = 5
_MOST_SHOWN = 60  # characters of a name


def read_categories(records: list[Record], file: Path) -> dict[int, str]:
    """Return the categories' names by their ids, ids ascending: the order of a model's classes.

    Args:
        records: the list under "categories" of COCO's format.
        file: where they were read from, for the message.

    Raises:
        DatasetError: no categories, ids or names that repeat or are missing.
    """
    if not records:
        raise DatasetError(f"{quoted(file)} has no categories.")
    if not all(isinstance(record, dict) for record in records):
        raise DatasetError(f"{quoted(file)}: there are categories that are no JSON objects.")
    errors = [str(each) for each in check_categories(records) if each.severity == "error"]
    twice = repeated([str(int(record["id"])) for record in records]) if not errors else []
    if twice:
        errors.append(f"category ids that repeat: {', '.join(twice[:_LISTED])}")
    if errors:
        raise DatasetError(f"{quoted(file)}: {'. '.join(errors)}.")
    return dict(sorted((int(record["id"]), str(record["name"])) for record in records))


def check_same_classes(
    learned: Sequence[str], tested: Sequence[str], of_learned: str, of_tested: str
) -> None:
    """Refuse other classes than those that a model learned, or the same in another order.

    Class i of a model is the i-th category. In another order, or with one left out, detections
    would count for the wrong classes, without a word.

    Args:
        learned: in the order of the model's outputs.
        tested: in the order of the ids of the categories.
        of_learned: whose classes the first are, for the message.
        of_tested: whose classes the second are, for the message.

    Raises:
        DatasetError: they differ; the message lists how.
    """
    if list(learned) == list(tested):
        return
    differences = [
        f"class {number} is {quoted(one, _MOST_SHOWN)} and {quoted(other, _MOST_SHOWN)}"
        for number, (one, other) in enumerate(zip(learned, tested))
        if one != other
    ][:_LISTED]
    if sorted(learned) == sorted(tested):
        what = "are the same in another order"
        advice = "Give the categories ids in one order: a model counts them by ascending id."
    else:
        what = "differ"
        differences += [
            f"only in {of}: {_listed([name for name in some if name not in set(others)])}"
            for of, some, others in (
                (of_learned, learned, tested),
                (of_tested, tested, learned),
            )
            if set(some) - set(others)
        ]
        advice = (
            "List the same categories, with the same names, by ascending id; a category needs no "
            "annotations."
        )
    raise DatasetError(
        f"the classes of {of_learned} and of {of_tested} {what}: {'; '.join(differences)}. {advice}"
    )


def _listed(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _LISTED else ""
    return ", ".join(quoted(name, _MOST_SHOWN) for name in names[:_LISTED]) + more
