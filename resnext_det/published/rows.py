"""Published results of Faster R-CNN on COCO minival, as data.

Only what was read in the source that a row names is here. What no source gives is None: above all
the AP50 of the model zoos, and the sizes of images in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from resnext_det.published.setting import (
    COCO_TRAIN_IMAGES,
    MINIVAL,
    TRAINVAL35K,
    Setting,
)

PAPER = "the paper (arXiv 1611.05431v2)"
DETECTRON2 = "Detectron2"
DETECTRON = "Detectron"
MASKRCNN_BENCHMARK = "maskrcnn-benchmark"
MMDETECTION = "mmdetection"


@dataclass(frozen=True)
class PublishedResult:
    """One published result.

    Attributes:
        depth: layers of the backbone.
        template: of the backbone; a ResNet is "1x64d".
        who: published it.
        schedule: as they call it, such as "1x".
        setting: how it was trained and tested; None in it where that is not published.
        AP: of boxes, averaged over IoU 0.50 to 0.95, in percent.
        AP50: of boxes at IoU 0.50, in percent; None where it is not published.
        document: where it stands, of that publisher.
        id: of the model in that document, None where the document has none or it was not noted.
        weights: what the backbone started from, by its name in `pretrained.catalog` where it is
            there.
        differences: from any run of this package that `Setting` has no field for.
        caveats: what to know before comparing, in whole sentences.
    """

    depth: int
    template: str
    who: str
    schedule: str
    setting: Setting
    AP: float
    AP50: float | None
    document: str
    id: str | None = None
    weights: str | None = None
    differences: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """Who, the document, and the id of the model in it."""
        return ", ".join(part for part in (self.who, self.document, self.id) if part)


_COCO = Setting("Faster R-CNN", train_set=TRAINVAL35K, test_set=MINIVAL)

# The paper, Table 8; section 5.4 and appendix B. RPN sees 16 images in each of 180k iterations,
# Fast R-CNN 8: 24.3 and 12.2 epochs of 118,287 images. C4 follows from "following [14]".
_APART = (
    "RPN (24.3 epochs) and Fast R-CNN (12.2 epochs) trained apart, without shared features",
    "sizes of images not published",
)
_BASIC = (
    "The paper's detector is the basic Faster R-CNN on C4 features, without FPN. Its AP is some 10 "
    "points below that of today's FPN detectors whatever the backbone: only its differences "
    "between ResNet and ResNeXt can be compared.",
)


def _paper(depth: int, template: str, AP50: float, AP: float) -> PublishedResult:
    return PublishedResult(
        *(depth, template, PAPER, "its own", replace(_COCO, neck="C4", rate_falls=1), AP, AP50),
        document="Table 8",
        weights="ImageNet-1K weights",
        differences=_APART,
        caveats=_BASIC,
    )


# Detectron2's model zoo. Settings are those of its own configs.
_1X, _3X = 90_000 * 16, 270_000 * 16
_D2 = replace(
    *(_COCO,),
    norm="FrozenBN",
    rate_falls=2,
    train_size=(640, 800),
    test_size=800,
    test_longest=1333,
)
_MSRA = "MSRA's weights, stride in the 1x1"


def _detectron2(
    depth: int, template: str, neck: str, schedule: str, AP: float, id: str
) -> PublishedResult:
    setting = replace(_D2, neck=neck, images={"1x": _1X, "3x": _3X}[schedule])
    weights = _MSRA if template == "1x64d" else "resnext101_32x8d.d2_in1k"
    return PublishedResult(
        *(depth, template, DETECTRON2, schedule, setting, AP, None),
        document="MODEL_ZOO.md",
        id=id,
        weights=weights,
    )


# Detectron, 12_2017_baselines: 8 GPUs, flips alone, tested on minival.
_FIXED = replace(_D2, train_size=(800, 800))
_OLD_LOSS = ("smooth L1 losses",)
_ONE_IMAGE = (
    "Detectron trained its ResNeXts with 1 image on each of 8 GPUs, at a learning rate of 0.01: "
    "1x is 180k iterations, 2x is 360k."
)
_WORSE = (
    "Detectron's 2x schedule gives its ResNeXts less than 1x: without scale jitter they overfit. "
    "More epochs alone are no way to a higher AP."
)


def _detectron(
    depth: int, template: str, neck: str, schedule: str, AP: float, id: str | None = None
) -> PublishedResult:
    setting = replace(_FIXED, neck=neck, images={"1x": _1X, "2x": 2 * _1X}[schedule])
    weights = {
        "1x64d": _MSRA,
        "64x4d": "resnext101_64x4d.d1_in1k",
        "32x8d": "resnext101_32x8d.d1_in1k",
    }[template]
    return PublishedResult(
        *(depth, template, DETECTRON, schedule, setting, AP, None),
        document="MODEL_ZOO.md, 12_2017_baselines",
        id=id,
        weights=weights,
        differences=_OLD_LOSS,
        caveats=() if template == "1x64d" else (_ONE_IMAGE, _WORSE),
    )


# mmdetection: "1x" is 12 epochs, "2x" 24, "3x" 36 with shorter sides of 640 to 800.
_MMDET_WEIGHTS = {
    "1x64d": "torchvision's weights",
    "32x4d": "resnext101_32x4d.open_mmlab_in1k",
    "64x4d": "resnext101_64x4d.open_mmlab_in1k",
    "32x8d": "resnext101_32x8d.open_mmlab_d2_in1k",
}
_WEAK_ANCHOR = (
    "A weak anchor: an early version of mmdetection's config loads these weights, which take BGR "
    "images, without saying so, a later one says so, and which of them gave this AP is not known.",
)
_STANDARDISED = (
    "Neither Detectron2 nor Detectron nor mmdetection publishes a ResNeXt-50 with batch norms in "
    "Faster R-CNN with FPN. The nearest is this one of mmdetection, with group norms and "
    "standardised weights (GN + WS): 40.7, where its ResNet-50 of the same kind has 39.7. Its neck "
    "and head have these norms as well, and its box head 4 convolutions and 1 linear layer where "
    "others have 2 linear layers: how much of it is the backbone's cannot be told.",
)

# Its gn+ws configs take Shared4Conv1FCBBoxHead.
_OTHER_HEAD = (
    "box head of 4 convolutions and 1 linear layer, not 2 linear layers",
    "GN + WS in neck and head as well",
)


def _mmdetection(depth: int, template: str, schedule: str, AP: float) -> PublishedResult:
    epochs = {"1x": 12, "2x": 24, "3x": 36}[schedule]
    base = replace(_FIXED, norm=None, neck="FPN", images=epochs * COCO_TRAIN_IMAGES)
    return PublishedResult(
        *(depth, template, MMDETECTION, schedule),
        setting=replace(base, train_size=(640, 800)) if schedule == "3x" else base,
        AP=AP,
        AP50=None,
        document="configs/faster_rcnn/metafile.yml",
        weights=_MMDET_WEIGHTS[template],
        caveats=_WEAK_ANCHOR if template == "32x8d" else (),
    )


def _standardised(
    depth: int, template: str, AP: float, caveats: tuple[str, ...] = ()
) -> PublishedResult:
    setting = replace(_FIXED, norm="GN + WS", neck="FPN", images=12 * COCO_TRAIN_IMAGES)
    return PublishedResult(
        *(depth, template, MMDETECTION, "1x", setting, AP, None),
        document="configs/gn+ws/README.md",
        weights="weights trained with these norms",
        differences=_OTHER_HEAD,
        caveats=caveats,
    )


ROWS: tuple[PublishedResult, ...] = (
    _paper(50, "1x64d", 47.6, 26.5),
    _paper(50, "32x4d", 49.7, 27.5),
    _paper(101, "1x64d", 51.1, 29.8),
    _paper(101, "32x4d", 51.9, 30.0),
    _detectron2(50, "1x64d", "C4", "1x", 35.7, "137257644"),
    _detectron2(50, "1x64d", "C4", "3x", 38.4, "137849393"),
    _detectron2(50, "1x64d", "DC5", "1x", 37.3, "137847829"),
    _detectron2(50, "1x64d", "DC5", "3x", 39.0, "137849425"),
    _detectron2(50, "1x64d", "FPN", "1x", 37.9, "137257794"),
    _detectron2(50, "1x64d", "FPN", "3x", 40.2, "137849458"),
    # Detectron1-Comparisons/faster_rcnn_R_50_FPN_noaug_1x.
    replace(
        _detectron2(50, "1x64d", "FPN", "1x", 36.9, "137781054"),
        setting=replace(_FIXED, neck="FPN", images=_1X),
        differences=_OLD_LOSS,
    ),
    _detectron2(101, "1x64d", "C4", "3x", 41.1, "138204752"),
    _detectron2(101, "1x64d", "DC5", "3x", 40.6, "138204841"),
    _detectron2(101, "1x64d", "FPN", "3x", 42.0, "137851257"),
    _detectron2(101, "32x8d", "FPN", "3x", 43.0, "139173657"),
    _detectron(50, "1x64d", "C4", "1x", 34.8),
    _detectron(50, "1x64d", "C4", "2x", 36.5),
    _detectron(50, "1x64d", "FPN", "1x", 36.7),
    _detectron(50, "1x64d", "FPN", "2x", 37.9),
    _detectron(101, "1x64d", "FPN", "1x", 39.4),
    _detectron(101, "1x64d", "FPN", "2x", 39.8),
    _detectron(101, "64x4d", "FPN", "1x", 41.5, "35858015"),
    _detectron(101, "64x4d", "FPN", "2x", 40.8, "35858198"),
    _detectron(101, "32x8d", "FPN", "1x", 41.3, "36761737"),
    _detectron(101, "32x8d", "FPN", "2x", 40.6, "36761786"),
    # It repeats Detectron's experiments with Detectron's weights, by its own words.
    replace(
        _detectron(101, "32x8d", "FPN", "1x", 41.2),
        who=MASKRCNN_BENCHMARK,
        document="MODEL_ZOO.md",
        caveats=(),
    ),
    _mmdetection(50, "1x64d", "1x", 37.4),
    _mmdetection(50, "1x64d", "2x", 38.4),
    _mmdetection(50, "1x64d", "3x", 40.3),
    _mmdetection(101, "1x64d", "1x", 39.4),
    _mmdetection(101, "1x64d", "2x", 39.8),
    _mmdetection(101, "1x64d", "3x", 41.8),
    _mmdetection(101, "32x4d", "1x", 41.2),
    _mmdetection(101, "32x4d", "2x", 41.2),
    _mmdetection(101, "32x4d", "3x", 42.5),
    _mmdetection(101, "64x4d", "1x", 42.1),
    _mmdetection(101, "64x4d", "2x", 41.6),
    _mmdetection(101, "64x4d", "3x", 43.1),
    _mmdetection(101, "32x8d", "3x", 42.4),
    _standardised(50, "1x64d", 39.7),
    _standardised(101, "1x64d", 41.7),
    _standardised(50, "32x4d", 40.7, _STANDARDISED),
    _standardised(101, "32x4d", 42.1),
)
"""Every published result. Faster R-CNN alone, on COCO minival, box AP."""
