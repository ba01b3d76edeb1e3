"""The checkpoints of plain ResNeXts that timm lists: torchvision's, its own, GluonCV's, Facebook's.

All have torchvision's names of tensors and its convention of pixels. Addresses and licences are
those of timm's configurations, figures those of the source named beside them. No address was tried
and no file opened when this was written.
"""

from __future__ import annotations

from resnext_det.pretrained.catalog_entry import DIGITS, Accuracy, Entry, in_file_name
from resnext_det.pretrained.pixels import IMAGENET

_PYTORCH = "https://download.pytorch.org/models/"

# torchvision. Address, figures and preprocessing are in its enums of weights.
_PAPER = "A recipe close to the paper's."
_LONGER = "Trained longer and with more augmentation than in the paper."
_TORCHVISION = (  # name, file, top-1, top-5, resize, notes
    ("resnext50_32x4d.tv_in1k", "resnext50_32x4d-7cdf4587", 77.618, 93.698, 256, _PAPER),
    ("resnext50_32x4d.tv2_in1k", "resnext50_32x4d-1a0047aa", 81.198, 95.34, 232, _LONGER),
    ("resnext101_32x8d.tv_in1k", "resnext101_32x8d-8ba56ff5", 79.312, 94.526, 256, _PAPER),
    ("resnext101_32x8d.tv2_in1k", "resnext101_32x8d-110c445d", 82.834, 96.228, 232, _LONGER),
    ("resnext101_64x4d.tv_in1k", "resnext101_64x4d-173b62eb", 83.246, 96.454, 232, _LONGER),
    ("resnet50.tv_in1k", "resnet50-0676ba61", 76.13, 92.862, 256, _PAPER),
    ("resnet50.tv2_in1k", "resnet50-11ad3fa6", 80.858, 95.434, 232, _LONGER),
    ("resnet101.tv_in1k", "resnet101-63fe2227", 77.374, 93.546, 256, _PAPER),
    ("resnet101.tv2_in1k", "resnet101-cd907fc2", 81.886, 95.78, 232, _LONGER),
)


def _torchvision(name: str, file: str, top1: float, top5: float, resize: int, notes: str) -> Entry:
    url = f"{_PYTORCH}{file}.pth"
    licence = "the licence: torchvision states none for weights, timm declares this one for them"
    return Entry(
        name,
        url,
        in_file_name(url),
        licence="BSD-3-Clause",
        commercial=True,
        layout="torchvision",
        pixels=IMAGENET,
        accuracy=Accuracy(top1, top5, "torchvision", resize, 224, "bilinear"),
        notes=notes,
        unverified=(licence,),
    )


# timm's own weights, and GluonCV's as timm's author converted them, resized bicubically. Addresses
# are those of timm's configurations; it gives some files under its author's former name.
_RSB = "https://github.com/huggingface/pytorch-image-models/releases/download/v0.1-rsb-weights/"
_RA = "https://github.com/huggingface/pytorch-image-models/releases/download/v0.1-weights/"
_RSB_2 = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-rsb-weights/"
_TPU = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-tpu-weights/"
_GLUON = "https://github.com/rwightman/pytorch-pretrained-gluonresnet/releases/download/v0.1/gluon_"
_TIMM = (  # name, where, file, top-1, top-5, resize, crop
    ("resnext50_32x4d.a1_in1k", _RSB, "resnext50_32x4d_a1_0-b5a91a1d", 81.480, 95.152, 288, 288),
    ("resnext50_32x4d.a1h_in1k", _RSB_2, "resnext50_32x4d_a1h-0146ab0a", 82.016, 95.934, 288, 288),
    ("resnext50_32x4d.a2_in1k", _RSB, "resnext50_32x4d_a2_0-efc76add", 81.304, 95.114, 288, 288),
    ("resnext50_32x4d.a3_in1k", _RSB, "resnext50_32x4d_a3_0-3e450271", 79.258, 94.308, 235, 224),
    ("resnext50_32x4d.ra_in1k", _RA, "resnext50_32x4d_ra-d733960d", 80.720, 95.344, 303, 288),
    ("resnext50_32x4d.gluon_in1k", _GLUON, "resnext50_32x4d-e6a097c1", 79.354, 94.424, 256, 224),
    ("resnext101_32x4d.gluon_in1k", _GLUON, "resnext101_32x4d-b253c8c4", 80.336, 94.908, 256, 224),
    ("resnext101_64x4d.c1_in1k", _TPU, "resnext101_64x4d_c-0d0e0cc0", 83.158, 96.370, 288, 288),
    ("resnext101_64x4d.gluon_in1k", _GLUON, "resnext101_64x4d-f9a8e184", 80.640, 95.000, 256, 224),
)
_TIMM_RESULTS = "timm, results/results-imagenet.csv"


def _timm(
    name: str, where: str, file: str, top1: float, top5: float, resize: int, crop: int
) -> Entry:
    url = f"{where}{file}.pth"
    return Entry(
        name,
        url,
        in_file_name(url),
        licence="Apache-2.0",
        commercial=True,
        layout="torchvision",
        pixels=IMAGENET,
        accuracy=Accuracy(top1, top5, _TIMM_RESULTS, resize, crop, "bicubic"),
        notes="Trained by GluonCV, converted by timm's author." if where == _GLUON else "",
        unverified=(DIGITS,),
    )


# Facebook's torchvision-shaped networks that saw other images before ImageNet-1K.
_SSL, _SWSL, _WSL = "fb_ssl_yfcc100m_ft_in1k", "fb_swsl_ig1b_ft_in1k", "fb_wsl_ig1b_ft_in1k"
_MORE_IMAGES = {  # where, what
    _SSL: (
        "https://dl.fbaipublicfiles.com/semiweaksupervision/model_files/semi_supervised_",
        "Saw the 100 million images of YFCC100M as well, labelled by a larger network.",
    ),
    _SWSL: (
        "https://dl.fbaipublicfiles.com/semiweaksupervision/model_files/semi_weakly_supervised_",
        "Saw a billion Instagram images with hashtags as well, labelled by a larger network.",
    ),
    _WSL: (
        f"{_PYTORCH}ig_",
        "Saw about a billion Instagram images with hashtags as well. Its authors advise a lower "
        "learning rate and frozen batch norms in detectors.",
    ),
}
_MORE = (  # architecture, tag, file, top-1, top-5
    ("resnext50_32x4d", _SSL, "resnext50_32x4-ddb3e555", 80.316, 95.386),
    ("resnext101_32x4d", _SSL, "resnext101_32x4-dc43570a", 80.936, 95.732),
    ("resnext101_32x8d", _SSL, "resnext101_32x8-2cfe2f8b", 81.620, 96.036),
    ("resnext101_32x16d", _SSL, "resnext101_32x16-15fffa57", 81.856, 96.084),
    ("resnext50_32x4d", _SWSL, "resnext50_32x4-72679e44", 82.162, 96.224),
    ("resnext101_32x4d", _SWSL, "resnext101_32x4-3f87e46b", 83.268, 96.760),
    ("resnext101_32x8d", _SWSL, "resnext101_32x8-b4712904", 84.276, 97.188),
    ("resnext101_32x16d", _SWSL, "resnext101_32x16-f3559a9c", 83.340, 96.844),
    ("resnext101_32x8d", _WSL, "resnext101_32x8-c38310e5", 82.720, 96.624),
    ("resnext101_32x16d", _WSL, "resnext101_32x16-c6f796b0", 84.166, 97.192),
    ("resnext101_32x32d", _WSL, "resnext101_32x32-e4b90b00", 85.090, 97.442),
)
_LARGEST = ("resnext101_32x48d", _WSL, "resnext101_32x48-3e41cc8a", 85.4, 97.6)


def _more_than_imagenet(
    architecture: str, tag: str, file: str, top1: float, top5: float, source: str = _TIMM_RESULTS
) -> Entry:
    where, notes = _MORE_IMAGES[tag]
    url = f"{where}{file}.pth"
    return Entry(
        f"{architecture}.{tag}",
        url,
        in_file_name(url),
        licence="CC-BY-NC-4.0",
        commercial=False,
        layout="torchvision",
        pixels=IMAGENET,
        imagenet_1k_only=False,
        accuracy=Accuracy(top1, top5, source, 256, 224, "bilinear"),
        notes=notes,
        unverified=(DIGITS,),
    )


ENTRIES: tuple[Entry, ...] = (
    *(_torchvision(*row) for row in _TORCHVISION),
    *(_timm(*row) for row in _TIMM),
    *(_more_than_imagenet(*row) for row in _MORE),
    _more_than_imagenet(*_LARGEST, source="facebookresearch/WSL-Images, README.md"),
)
