"""The known defect of the published minival files: ids of annotations that are floats and repeat.

rbgirshick/py-faster-rcnn, issue 522, shows ids such as 908400416500.0. Detectron2 does not look
for them in files whose path holds "minival", so somebody else has to.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from resnext_det.data.coco.annotation_files import Document

_EXAMPLES = 3

EFFECT = (
    "Ids that are floats or repeat: pycocotools keeps one annotation per id, so where two share "
    "one, it judges an image by the other's object: a perfect detector would score below 100 (by "
    "very little where all are crowds). Figures from the file as it is are not exact; those "
    "from the mended one are"
)


@dataclass(frozen=True)
class Flaws:
    """What is wrong with the ids of annotations.

    Attributes:
        floats: the ids that are written as 1.0 instead of 1.
        repeated: the values of the ids that several annotations have.
        spare: annotations whose id another one before them has.
        crowds: of these, crowds.
    """

    floats: tuple[float, ...]
    repeated: tuple[int, ...]
    spare: int
    crowds: int

    def __bool__(self) -> bool:
        return bool(self.floats or self.repeated)

    def __str__(self) -> str:
        parts = []
        for what, values in (("written as floats", self.floats), ("that repeat", self.repeated)):
            if values:
                more = ", ..." if len(values) > _EXAMPLES else ""
                shown = ", ".join(map(str, values[:_EXAMPLES]))
                parts.append(f"annotation ids {what}: {len(values):,} ({shown}{more})")
        if self.spare:
            parts.append(
                f"{self.spare:,} annotations have the id of another ({self.crowds:,} are crowds)"
            )
        return "; ".join(parts)


def find_flaws(document: Document) -> Flaws:
    """Count the ids of annotations that are floats, and those that repeat.

    Args:
        document: whose ids are whole numbers, as `build_table` has seen to.
    """
    seen: set[int] = set()
    spare = []
    for annotation in document["annotations"]:
        if annotation["id"] in seen:
            spare.append(annotation)
        seen.add(annotation["id"])
    counts = Counter(int(annotation["id"]) for annotation in spare)
    return Flaws(
        floats=tuple(a["id"] for a in document["annotations"] if type(a["id"]) is float),
        repeated=tuple(counts),
        spare=len(spare),
        crowds=sum(annotation.get("iscrowd") == 1 for annotation in spare),
    )


def mend(document: Document) -> Document:
    """Return a document whose annotations have whole and unique ids, and all else unchanged.

    Args:
        document: whose ids are whole numbers; it is not changed. Of several annotations with one
            id the first keeps it, and the others get new ones above all that are there.
    """
    fresh = max((int(each["id"]) for each in document["annotations"]), default=0)
    seen: set[int] = set()
    annotations = []
    for annotation in document["annotations"]:
        number = int(annotation["id"])
        if number in seen:
            fresh += 1
            number = fresh
        seen.add(number)
        annotations.append({**annotation, "id": number})
    return {**document, "annotations": annotations}
