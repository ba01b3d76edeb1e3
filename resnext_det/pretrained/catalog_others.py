"""The checkpoints of plain ResNeXts that timm does not list: OpenMMLab's, the authors', Caffe2's.

Addresses, licences and figures are those that the publishers give. No address was tried and no file
opened when this was written: what is said of the inside of a file comes from code that reads it.
"""

from __future__ import annotations

from resnext_det.pretrained.catalog_entry import DIGITS, Accuracy, Checksum, Entry, in_file_name
from resnext_det.pretrained.pixels import CAFFE2, IMAGENET, OURS, Pixels

_RGB = Pixels("RGB", 255, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
_FACEBOOK = "https://dl.fbaipublicfiles.com/"
_THIRD_PARTY = "https://download.openmmlab.com/pretrain/third_party/"
_NAMES = "the names inside the file: no listing of them was found"

# mmpretrain's own training: the paper's recipe but for colour jitter, figures of its metafile.
_MMPRETRAIN = (  # architecture, file, top-1, top-5
    ("resnext50_32x4d", "20210429-56066e27", 77.90, 93.66),
    ("resnext101_32x4d", "20210506-e0fa3dd5", 78.61, 94.17),
    ("resnext101_32x8d", "20210506-23a247d5", 79.27, 94.58),
    ("resnext152_32x4d", "20210524-927787be", 78.88, 94.33),
)


def _mmpretrain(architecture: str, file: str, top1: float, top5: float) -> Entry:
    folder = "https://download.openmmlab.com/mmclassification/v0/resnext/"
    url = f"{folder}{architecture}_b32x8_imagenet_{file}.pth"
    return Entry(
        f"{architecture}.mmpretrain_in1k",
        url,
        in_file_name(url),
        licence="Apache-2.0",
        commercial=True,
        layout="mmpretrain",
        pixels=_RGB,
        accuracy=Accuracy(
            top1, top5, "mmpretrain, configs/resnext/metafile.yml", 256, 224, "bilinear"
        ),
        notes="The paper's recipe but for its colour augmentation. Editions of mmpretrain's table "
        "differ by up to 0.2 points.",
    )


# What others made of the authors' own Torch7 files.
_FROM_TORCH7 = "A copy of the authors' Torch7 file, whose licence, CC-BY-NC-4.0, goes with it."
_MMCV = (  # architecture, file
    ("resnext50_32x4d", "resnext50-32x4d-0ab1a123"),
    ("resnext101_32x4d", "resnext101_32x4d-a5af3160"),
    ("resnext101_64x4d", "resnext101_64x4d-ee2c6f71"),
)
_CADENE = (  # architecture, file, top-1, top-5
    ("resnext101_32x4d", "resnext101_32x4d-29e315fa", 78.188, 93.886),
    ("resnext101_64x4d", "resnext101_64x4d-e77a0586", 78.956, 94.252),
)


def _mmcv(architecture: str, file: str) -> Entry:
    url = f"{_THIRD_PARTY}{file}.pth"
    return Entry(
        f"{architecture}.open_mmlab_in1k",
        url,
        in_file_name(url),
        licence="CC-BY-NC-4.0",
        commercial=False,
        layout="torchvision",
        pixels=_RGB,
        notes=_FROM_TORCH7,
        unverified=(DIGITS, _NAMES, "the licence: its publisher names none beside the file"),
    )


def _cadene(architecture: str, file: str, top1: float, top5: float) -> Entry:
    url = f"http://data.lip6.fr/cadene/pretrainedmodels/{file}.pth"
    source = "Cadene/pretrained-models.pytorch, README.md"
    return Entry(
        f"{architecture}.cadene_in1k",
        url,
        in_file_name(url),
        licence="CC-BY-NC-4.0",
        commercial=False,
        layout="Cadene",
        pixels=IMAGENET,
        accuracy=Accuracy(top1, top5, source, None, 224, None),
        notes=f"{_FROM_TORCH7} Its accuracy was measured lower than the authors' file's.",
        unverified=(DIGITS,),
    )


# Facebook's Caffe2 training, as Detectron and Detectron2 publish it; and a copy by OpenMMLab.
_FUSED = "Its batch norms are fused into scales and shifts, which only NORM FrozenBN takes."
_MEAN = (
    "the pixel mean: Detectron subtracts (102.98, 115.95, 122.77) for every file, Detectron2 "
    "(103.53, 116.28, 123.68); less than one grey level apart",
    "that its stem takes pixels of 0 to 255 with std 1: from the code that uses it",
)
_DETECTRON = f"{_FACEBOOK}detectron/ImageNetPretrained/"
_CAFFE2 = (
    Entry(
        "resnext101_64x4d.d1_in1k",
        f"{_DETECTRON}FBResNeXt/X-101-64x4d.pkl",
        Checksum("aa14062280226e48f569ef1c7212e7c7", "md5", "published by Detectron"),
        licence="CC-BY-SA-3.0",
        commercial=False,
        layout="Caffe2",
        pixels=CAFFE2,
        batch_norm="fused",
        notes=f"{_FUSED} Detectron's page names CC-BY-SA-3.0 for all files; this one is a copy of "
        "the authors' Torch7 file, which is CC-BY-NC-4.0.",
        unverified=(*_MEAN, "that std and colour order of the Torch7 file were folded in"),
    ),
    Entry(
        "resnext101_32x8d.d1_in1k",
        f"{_DETECTRON}20171220/X-101-32x8d.pkl",
        None,
        licence="CC-BY-SA-3.0",
        commercial=True,
        layout="Caffe2",
        pixels=CAFFE2,
        batch_norm="fused",
        notes=f"{_FUSED} Not the file of the same name at Detectron2, which keeps them.",
        unverified=_MEAN,
    ),
    Entry(
        "resnext152_32x8d.d1_in5k",
        f"{_DETECTRON}25093814/X-152-32x8d-IN5k.pkl",
        None,
        licence="CC-BY-SA-3.0",
        commercial=True,
        layout="Caffe2",
        pixels=CAFFE2,
        batch_norm="fused",
        imagenet_1k_only=False,
        notes=f"{_FUSED} Trained on ImageNet-5K.",
        unverified=_MEAN,
    ),
    Entry(
        "resnext101_32x8d.d2_in1k",
        f"{_FACEBOOK}detectron2/ImageNetPretrained/FAIR/X-101-32x8d.pkl",
        None,
        licence="CC-BY-SA-3.0",
        commercial=True,
        layout="Caffe2",
        pixels=OURS,
        notes="What Detectron2's X-101-FPN baselines start from.",
        unverified=(_NAMES,),
    ),
    Entry(
        "resnext101_32x8d.open_mmlab_d2_in1k",
        f"{_THIRD_PARTY}resnext101_32x8d-1516f1aa.pth",
        Checksum("1516f1aa"),
        licence="CC-BY-SA-3.0",
        commercial=True,
        layout="torchvision",
        pixels=OURS,
        notes="A copy of Detectron2's X-101-32x8d.pkl: torchvision's names, but BGR images.",
        unverified=(DIGITS, _NAMES, "the licence: that of the file it was made from"),
    ),
)

ENTRIES: tuple[Entry, ...] = (
    *(_mmpretrain(*row) for row in _MMPRETRAIN),
    *(_mmcv(*row) for row in _MMCV),
    *(_cadene(*row) for row in _CADENE),
    *_CAFFE2,
)
