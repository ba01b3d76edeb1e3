"""The catalog against timm, torchvision and Detectron2, and against published figures."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from detectron2.checkpoint.catalog import ModelCatalog
from timm.models import resnet as timm_resnet
from torchvision.models import get_model_weights

from resnext_det import ResNeXt
from resnext_det.errors import ConfigError
from resnext_det.weights import catalog
from resnext_det.weights.catalog import ENTRIES, REFUSED, Checksum, Entry, entry, of_file
from resnext_det.weights.pixels import OURS, Pixels, fold

PUBLISHED: dict[str, dict[str, tuple[float, float | None]]] = {
    "resnext50_32x4d": {
        "tv_in1k": (77.618, 93.698), "tv2_in1k": (81.198, 95.34), "a1_in1k": (81.480, 95.152),
        "a1h_in1k": (82.016, 95.934), "a2_in1k": (81.304, 95.114), "a3_in1k": (79.258, 94.308),
        "ra_in1k": (80.720, 95.344), "gluon_in1k": (79.354, 94.424),
        "fb_ssl_yfcc100m_ft_in1k": (80.316, 95.386), "fb_swsl_ig1b_ft_in1k": (82.162, 96.224),
        "mmpretrain_in1k": (77.90, 93.66),
    },
    "resnext101_32x4d": {
        "gluon_in1k": (80.336, 94.908), "fb_ssl_yfcc100m_ft_in1k": (80.936, 95.732),
        "fb_swsl_ig1b_ft_in1k": (83.268, 96.760), "mmpretrain_in1k": (78.61, 94.17),
        "cadene_in1k": (78.188, 93.886),
    },
    "resnext101_32x8d": {
        "tv_in1k": (79.312, 94.526), "tv2_in1k": (82.834, 96.228),
        "fb_wsl_ig1b_ft_in1k": (82.720, 96.624), "fb_ssl_yfcc100m_ft_in1k": (81.620, 96.036),
        "fb_swsl_ig1b_ft_in1k": (84.276, 97.188), "mmpretrain_in1k": (79.27, 94.58),
    },
    "resnext101_32x16d": {
        "fb_wsl_ig1b_ft_in1k": (84.166, 97.192), "fb_ssl_yfcc100m_ft_in1k": (81.856, 96.084),
        "fb_swsl_ig1b_ft_in1k": (83.340, 96.844),
    },
    "resnext101_32x32d": {"fb_wsl_ig1b_ft_in1k": (85.090, 97.442)},
    "resnext101_32x48d": {"fb_wsl_ig1b_ft_in1k": (85.4, 97.6)},
    "resnext101_64x4d": {
        "tv_in1k": (83.246, 96.454), "c1_in1k": (83.158, 96.370), "gluon_in1k": (80.640, 95.000),
        "cadene_in1k": (78.956, 94.252),
    },
    "resnext152_32x4d": {"mmpretrain_in1k": (78.88, 94.33)},
    "resnet50": {"tv_in1k": (76.13, 92.862), "tv2_in1k": (80.858, 95.434)},
    "resnet101": {"tv_in1k": (77.374, 93.546), "tv2_in1k": (81.886, 95.78)},
}  # fmt: skip

WITHOUT_FIGURES = {
    *("resnext50_32x4d.open_mmlab_in1k", "resnext101_32x4d.open_mmlab_in1k"),
    *("resnext101_64x4d.open_mmlab_in1k", "resnext101_32x8d.open_mmlab_d2_in1k"),
    *("resnext101_64x4d.d1_in1k", "resnext101_32x8d.d1_in1k", "resnext152_32x8d.d1_in5k"),
    "resnext101_32x8d.d2_in1k",
}


def timms_configuration(name: str) -> Any:
    if "32x48d" in name:  # timm has its configuration, but no function for the model
        architecture, _, tag = name.partition(".")
        return timm_resnet.default_cfgs[architecture].cfgs[tag]
    return timm.get_pretrained_cfg(name)


def torchvisions_weights() -> dict[str, Any]:
    versions = {"IMAGENET1K_V1": "tv_in1k", "IMAGENET1K_V2": "tv2_in1k"}
    architectures = ("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d")
    found = {}
    for architecture in (*architectures, "resnet50", "resnet101"):
        for weights in get_model_weights(architecture):
            name = f"{architecture}.{versions[weights.name]}"
            # timm, whose tags these are, calls the one file of the 64x4d "tv", new recipe or not.
            found[name] = weights
    return found


def parameters(known: Entry) -> int:
    with torch.device("meta"):
        network = ResNeXt(known.depth, str(known.template), norm="BN", num_classes=1000)
    return sum(tensor.numel() for tensor in network.parameters())


def test_every_name_is_listed_once() -> None:
    content = yaml.safe_load(Path(catalog.__file__).with_name("catalog.yaml").read_text())
    assert list(ENTRIES) == [
        each["name"] for group in content["groups"] for each in group["weights"]
    ]
    assert not set(ENTRIES) & set(REFUSED)
    figures = {f"{arch}.{tag}" for arch, tags in PUBLISHED.items() for tag in tags}
    assert set(ENTRIES) == figures | WITHOUT_FIGURES
    addresses = Counter(known.url for known in ENTRIES.values())
    assert max(addresses.values()) == 1


def test_every_plain_resnext_of_timm_is_listed_or_refused() -> None:
    plain = timm.list_pretrained("resnext*")
    assert len(plain) > 20
    assert set(plain) <= {*list(ENTRIES), *REFUSED}


def test_agrees_with_timm() -> None:
    theirs = set(timm.list_pretrained())
    for name in [each for each in ENTRIES if each in theirs or "32x48d" in each]:
        known, timms = entry(name), timms_configuration(name)
        assert known.url == timms.url
        assert known.pixels == Pixels("RGB", 1, timms.mean, timms.std)
        assert known.licence.lower() == timms.license
        assert known.layout == "torchvision"
        assert known.checksum is not None
        assert known.checksum.digits == timms.url[-12:-4]
        figure = known.accuracy
        assert figure is not None
        assert figure.interpolation == timms.interpolation
        if figure.source != "torchvision":  # whose crops are not timm's
            size = (timms.test_input_size or timms.input_size)[1]
            assert (figure.resize, figure.crop) == (
                math.floor(size / (timms.test_crop_pct or timms.crop_pct)),
                size,
            )


@pytest.mark.parametrize("name", list(torchvisions_weights()))
def test_agrees_with_torchvision(name: str) -> None:
    known, theirs = entry(name), torchvisions_weights()[name]
    figure, preprocessing = known.accuracy, theirs.transforms()
    metrics = theirs.meta["_metrics"]["ImageNet-1K"]
    assert figure is not None
    assert known.url == theirs.url
    assert (figure.top1, figure.top5) == (metrics["acc@1"], metrics["acc@5"])
    assert [figure.resize] == preprocessing.resize_size
    assert [figure.crop] == preprocessing.crop_size
    assert figure.interpolation == preprocessing.interpolation.value
    assert known.pixels == Pixels("RGB", 1, tuple(preprocessing.mean), tuple(preprocessing.std))
    assert parameters(known) == theirs.meta["num_params"]


def test_published_figures() -> None:
    for architecture, tags in PUBLISHED.items():
        for tag, figures in tags.items():
            figure = entry(f"{architecture}.{tag}").accuracy
            assert figure is not None
            assert (figure.top1, figure.top5) == (pytest.approx(figures[0], abs=1e-9), figures[1])
            assert figure.crop in (224, 288)
            assert figure.resize is None or figure.resize >= figure.crop
    assert all(entry(name).accuracy is None for name in WITHOUT_FIGURES)


def test_entries_are_consistent() -> None:
    """Name, address and network agree; timm's ig_resnext101_32x16d shows how this goes wrong."""
    for name, known in ENTRIES.items():
        match = re.fullmatch(r"(resnext|resnet)(\d+)(?:_(\d+)x(\d+)d)?\.\w+", name)
        assert match is not None
        assert known.depth == int(match[2])
        assert match[1] == ("resnext" if match[3] else "resnet")
        template = (int(match[3] or 1), int(match[4] or 64))
        assert (known.template.cardinality, known.template.width) == template
        file = re.search(r"(?:resnext|resnet|X)[-_]?(\d+)(?:[-_](\d+)x(\d+))?", known.file_name)
        assert file is not None, known.file_name
        assert int(file[1]) == known.depth
        assert (int(file[2] or 1), int(file[3] or 64)) == template
        assert re.fullmatch(r"https?://[\w./-]+/[\w.-]+\.(pth|pkl)", known.url)
        assert known.stride == "3x3"
        # Detectron's: "all BN models here have fused BN into an affine layer" (Detectron2).
        assert (known.batch_norm == "fused") == (".d1_" in name)
        assert known.imagenet_1k_only == (not re.search("_(yfcc100m|ig1b)_ft_in1k|_in5k", name))
        if known.url.endswith(".pth"):
            assert known.checksum == Checksum(known.url[-12:-4])
        if "torchvision" not in known.url and known.accuracy is None:
            assert known.unverified


def test_refuses_timms_former_names() -> None:
    """In timm they are another network; here the error names the right one."""
    former, right = "ig_resnext101_32x16d", "resnext101_32x16d.fb_wsl_ig1b_ft_in1k"
    with torch.device("meta"), pytest.warns(UserWarning, match="32x8d"):
        timms = timm.create_model(former)
    network = entry("resnext101_32x8d.tv_in1k")
    assert sum(tensor.numel() for tensor in timms.parameters()) == parameters(network)
    assert entry(right).template.width == 16
    assert "ig_resnext101_32x16-" in entry(right).url
    with pytest.raises(ConfigError, match=f"'{former}' is not in the catalog.*nearest: .*{right}"):
        entry(former)


def test_licences() -> None:
    forbidding = ("wsl", "swsl", "ssl", "cadene")
    from_torch7 = {
        *("resnext50_32x4d.open_mmlab_in1k", "resnext101_32x4d.open_mmlab_in1k"),
        *("resnext101_64x4d.open_mmlab_in1k", "resnext101_64x4d.d1_in1k"),
    }
    for name, known in ENTRIES.items():
        parts = set(name.partition(".")[2].split("_"))
        assert known.commercial == (not parts & set(forbidding) and name not in from_torch7), name
        assert known.licence in ("BSD-3-Clause", "Apache-2.0", "CC-BY-SA-3.0", "CC-BY-NC-4.0")
        assert not (known.commercial and "NC" in known.licence), name
    # Its publisher's licence is not allowed by that of its source.
    assert entry("resnext101_64x4d.d1_in1k").licence == "CC-BY-SA-3.0"
    assert "CC-BY-NC-4.0" in entry("resnext101_64x4d.d1_in1k").notes


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("resnext101_64x4d.d1_in1k", "FAIR/X-101-64x4d"),
        ("resnext101_32x8d.d1_in1k", "FAIR/X-101-32x8d"),
        ("resnext152_32x8d.d1_in5k", "FAIR/X-152-32x8d-IN5k"),
    ],
)
def test_detectron2s_own_addresses(name: str, theirs: str) -> None:
    known = entry(name)
    assert known.url == ModelCatalog.get(f"ImageNetPretrained/{theirs}")
    assert (known.layout, known.pixels.order, known.pixels.range) == ("Caffe2", "BGR", 255)
    assert known.pixels.std == (1, 1, 1)  # "all models here uses PIXEL_STD=[1,1,1]"


def test_all_pixels_fold_into_one_convention() -> None:
    for name, known in ENTRIES.items():
        stem = torch.arange(12.0).view(1, 3, 2, 2)
        folded, taken = fold(stem, known.pixels)
        assert taken == OURS, name
        if ".d1_" not in name:
            ordered = stem.flip(1) if known.pixels.order == "RGB" else stem
            assert torch.equal(folded, ordered), name


def test_refused_names_say_why() -> None:
    for name, why in REFUSED.items():
        with pytest.raises(ConfigError) as caught:
            entry(name)
        assert str(caught.value) == f"{name} cannot be used: {why}."
        assert len(why) > 30
    with pytest.raises(ConfigError) as caught:
        entry("resnext50\x1b[2J" + "x" * 1_000_000)
    assert len(str(caught.value)) < 600 and str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("resnext50_32x4d.tv_in1K", "resnext50_32x4d.tv_in1k"),
        ("resnxt50_32x4d.tv_in1k", "resnext50_32x4d.tv_in1k"),
        ("resnext50_32x4d", "resnext50_32x4d.mmpretrain_in1k"),
        ("resnext101_32x4d.mmpretrain", "resnext101_32x4d.mmpretrain_in1k"),
        ("ssl_resnext101_32x16d", "resnext101_32x16d.fb_ssl_yfcc100m_ft_in1k"),
        ("X-101-64x4d", "resnext101_64x4d"),
    ],
)
def test_suggests_the_nearest_name(wrong: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"'{wrong}' is not in the catalog.*nearest: .*{nearest}"):
        entry(wrong)


def test_suggests_the_same_network() -> None:
    """resnext101_32x8d.tv_in1k has a more similar name, but another template."""
    with pytest.raises(ConfigError) as caught:
        entry("resnext101_32x4d.tv_in1k")
    nearest = str(caught.value).partition("nearest: ")[2].partition(")")[0].split(", ")
    assert len(nearest) == 3
    assert {name.partition(".")[0] for name in nearest} == {"resnext101_32x4d"}


def test_recognises_files_by_checksum(tmp_path: Path) -> None:
    """Whatever it is called, by the first digits or by all, in each algorithm."""
    contents = {"short": b"one", "whole": b"two", "md5": b"three", "none": b"four"}
    sums = {
        "short": Checksum(hashlib.sha256(b"one").hexdigest()[:8]),
        "whole": Checksum(hashlib.sha256(b"two").hexdigest()),
        "md5": Checksum(hashlib.md5(b"three").hexdigest(), "md5"),
        "none": None,
    }
    like = entry("resnext50_32x4d.tv_in1k")
    entries = {key: dataclasses.replace(like, checksum=checksum) for key, checksum in sums.items()}
    for key, content in contents.items():
        file = tmp_path / f"some-{key}"
        file.write_bytes(content)
        expected = None if key == "none" else entries[key]
        assert of_file(file, entries) is expected
        assert of_file(file) is None
        file.write_bytes(content + b".")
        assert of_file(file, entries) is None
    # The digits of one algorithm are none of the other.
    swapped = dataclasses.replace(like, checksum=Checksum(hashlib.md5(b"one").hexdigest()[:8]))
    (tmp_path / "some-short").write_bytes(b"one")
    assert of_file(tmp_path / "some-short", {"swapped": swapped}) is None


def listed(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: str) -> str:
    """What tools/list_weights.py prints."""
    tool = Path(__file__).parents[2] / "tools" / "list_weights.py"
    monkeypatch.setattr(sys, "argv", ["list_weights.py", *arguments])
    runpy.run_path(str(tool), run_name="__main__")
    return str(capsys.readouterr().out)


@pytest.mark.parametrize("flags", [[], ["--commercial"], ["--commercial", "--imagenet-1k-only"]])
def test_list_and_filters(flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    lines = listed(monkeypatch, capsys, *flags).splitlines()
    shown = [line.split()[0] for line in lines[2:] if line.startswith("resne")]
    assert shown == [
        name
        for name, known in ENTRIES.items()
        if known.commercial >= ("--commercial" in flags)
        and known.imagenet_1k_only >= ("--imagenet-1k-only" in flags)
    ]
    row = next(line for line in lines if line.startswith("resnext50_32x4d.tv_in1k"))
    assert row.split()[1:] == ["50", "32x4d", "77.62", "BSD-3-Clause", "yes", "kept"]


@pytest.mark.parametrize("name", ["resnext50_32x4d.tv_in1k", "resnext101_64x4d.d1_in1k"])
def test_one_entry_is_shown_whole(name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    known = entry(name)
    words = " ".join(listed(monkeypatch, capsys, f"resnext://{name}").split())
    mean = "mean: " + "; ".join(map(str, known.pixels.mean))
    order = f"order: {known.pixels.order}"
    for fact in (known.url, known.licence, order, mean, known.notes, *known.unverified):
        assert fact in words
    assert known.checksum is not None and known.checksum.digits in words
    if known.accuracy:
        assert f"{known.accuracy.top1:g}" in words
