"""The categories of annotations: what they are called, and whether those of two files agree."""

from __future__ import annotations

from pathlib import Path

from resnext_det.data.findings import Record
from resnext_det.data.record_forms import check_categories, repeated
from resnext_det.errors import DatasetError

_LISTED = 5


def read_categories(records: list[Record], file: Path) -> dict[int, str]:
    """Return the categories' names by their ids, ids ascending: the order of a model's classes.

    Args:
        records: what stands under "categories" of COCO's format.
        file: where they were read from, for the message.

    Raises:
        DatasetError: no categories, ids or names that repeat or are missing.
    """
    if not records:
        raise DatasetError(f"{file} has no categories.")
    if not all(isinstance(record, dict) for record in records):
        raise DatasetError(f"{file}: there are categories that are no JSON objects.")
    errors = [str(each) for each in check_categories(records) if each.severity == "error"]
    twice = repeated([str(int(record["id"])) for record in records]) if not errors else []
    if twice:
        errors.append(f"category ids that repeat: {', '.join(twice[:_LISTED])}")
    if errors:
        raise DatasetError(f"{file}: {'. '.join(errors)}.")
    return dict(sorted((int(record["id"]), str(record["name"])) for record in records))


def check_same_categories(
    trained: dict[int, str], tested: dict[int, str], train_file: Path, test_file: Path
) -> None:
    """Refuse to evaluate with other categories than those of the training.

    Class i of a model is the i-th category of either file. With one left out of the test file,
    detections would count for the wrong classes, without a word.

    Args:
        trained: names by ids.
        tested: names by ids.
        train_file: where the first were read from, for the message.
        test_file: where the second were read from, for the message.

    Raises:
        DatasetError: they differ; the message lists how.
    """
    if trained == tested:
        return
    differences = [
        f"{number} is {trained[number]!r} in the one and {tested[number]!r} in the other"
        for number in sorted(trained.keys() & tested.keys())
        if trained[number] != tested[number]
    ]
    for what, some, others in (
        ("only to train on", trained, tested),
        ("only to evaluate with", tested, trained),
    ):
        alone = [f"{number} {some[number]!r}" for number in sorted(some.keys() - others.keys())]
        if alone:
            more = ", ..." if len(alone) > _LISTED else ""
            differences.append(f"{what}: {', '.join(alone[:_LISTED])}{more}")
    raise DatasetError(
        f"the categories of {train_file} and {test_file} differ: {'; '.join(differences[:8])}. "
        "The test file must list all of the training's, with the same ids and names; a category "
        "needs no annotations."
    )
