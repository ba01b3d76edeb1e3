"""How much COCO's splits hold, and which other "minival" a file with other counts looks like.

minival is val2017 and train2017 is the union of train2014 and valminusminival (Detectron's model
zoo; facebookresearch/Detectron, datasets/data/README.md), so three counts give all the others.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """How many images and annotations there are."""

    images: int
    annotations: int

    def __add__(self, other: Size) -> Size:
        return Size(self.images + other.images, self.annotations + other.annotations)

    def __sub__(self, other: Size) -> Size:
        return Size(self.images - other.images, self.annotations - other.annotations)

    def __str__(self) -> str:
        return f"{self.images:,} images and {self.annotations:,} annotations"


@dataclass(frozen=True)
class Counts:
    """What COCO's splits hold. The tests name others, for sets that they make.

    Attributes:
        train2014: the first half of the release of 2014.
        val2014: its second half.
        minival: the 5,000 of val2014 that the field evaluates on.
        minival_annotated: images of minival with annotations; 48 have none.
        categories: of every file.
    """

    train2014: Size = Size(82_783, 604_907)
    val2014: Size = Size(40_504, 291_875)
    minival: Size = Size(5_000, 36_781)
    minival_annotated: int = 4_952
    categories: int = 80

    def of(self, split: str) -> Size:
        """Return what a split holds.

        Args:
            split: such as "train2014", "val2017", "minival" or "valminusminival".
        """
        remainder = self.val2014 - self.minival
        return {
            "train2014": self.train2014,
            "val2014": self.val2014,
            "minival": self.minival,
            "val2017": self.minival,
            "valminusminival": remainder,
            "train2017": self.train2014 + remainder,
        }[split]


COCO = Counts()
"""The true counts."""

# darknet's 5k.part (pjreddie/darknet, issues 4643 and 5751): another 5,000 images of val2014.
_DARKNET = Size(4_954, 35_511)
# The list of TensorFlow's object detection API has about 8,000 images.
_TENSORFLOW = range(7_900, 8_200)


def looks_like(size: Size, annotated: int, counts: Counts = COCO) -> str:
    """Say which known set a file looks like by its counts; "" where they tell nothing.

    Args:
        size: of the file.
        annotated: its images with annotations.
        counts: of COCO's splits.
    """
    for split in ("val2014", "train2014", "train2017", "valminusminival"):
        if size == counts.of(split):
            return f"these are the counts of {split}"
    if size == counts.minival:
        return "these are the counts of minival"
    if _DARKNET.annotations == size.annotations or _DARKNET.images in (annotated, size.images):
        return "it looks like darknet's 5k list, which is another 5,000 images of val2014"
    if size == Size(counts.minival_annotated, counts.minival.annotations):
        return "it looks like minival without the images that have no annotations"
    if size.images == counts.minival.images:
        return (
            "it looks like some other images of val2014, as many as minival has: its first ones, "
            "or a random choice of someone's own"
        )
    if size.images in _TENSORFLOW:
        return "it looks like the list of TensorFlow's object detection API, mscoco_minival_ids"
    return ""
