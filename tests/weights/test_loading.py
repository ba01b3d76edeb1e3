from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo as stock_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torchvision.models.resnet import Bottleneck, ResNet

from resnext_det import ResNeXt, load_config
from resnext_det.errors import WeightsError
from resnext_det.modeling.forms import convert_form
from resnext_det.weights import catalog
from resnext_det.weights.converting import read_backbone, write_detectron2
from resnext_det.weights.loading import check_named_weights, check_same_model, load_weights
from tests.helpers.written_sources import caffe2, save, small_network

SMALL = ["MODEL.RESNETS.DEPTH", "26", "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.DEVICE", "cpu"]
SMALL += ["MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.RESNETS.NUM_GROUPS", "8"]
C4 = ["MODEL.BACKBONE.NAME", "build_resnext_backbone", "MODEL.RESNETS.OUT_FEATURES", "['res4']"]
C4 += ["MODEL.RPN.IN_FEATURES", "['res4']", "MODEL.ROI_HEADS.IN_FEATURES", "['res4']"]
C4 += ["MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]", "MODEL.ROI_HEADS.NAME", "ResNeXtRes5ROIHeads"]


def source_network(layers: tuple[int, ...] = (2, 2, 2, 2), groups: int = 8) -> ResNet:
    """A torchvision ResNeXt with statistics that are not those of a fresh one."""
    torch.manual_seed(7)
    network = ResNet(Bottleneck, list(layers), num_classes=10, groups=groups, width_per_group=4)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    return network.eval()


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "resnext26.pth"
    torch.save(source_network().state_dict(), file)
    return file


def small_config(weights: Path | str, *more: str) -> CfgNode:
    words = [*SMALL, "MODEL.WEIGHTS", str(weights), *more]
    return load_config("faster_rcnn_X_50_32x4d_FPN_paper", words)


def source_features(network: ResNet, picture: torch.Tensor) -> list[torch.Tensor]:
    """Return torchvision's features of an RGB picture from 0 to 255."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = ((picture / 255 - mean) / std)[None]
    x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    features = []
    for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
        x = layer(x)
        features.append(x)
    return features


@torch.no_grad()
def test_detector_sees_what_torchvision_sees(weights_file: Path) -> None:
    """RGB from 0 to 1 for torchvision, BGR from 0 to 255 for the detector."""
    cfg = small_config(weights_file)
    detector = build_model(cfg).eval()
    line = load_weights(detector, cfg)
    # 2 * 4 blocks of 3 norms, 4 shortcuts and the stem; 5 tensors each: weight and four of norm.
    assert line.startswith(f"145/145 backbone tensors loaded from {weights_file}")
    assert "2 left out: fc.weight, fc.bias" in line
    picture = torch.randint(0, 256, (3, 64, 96)).float()
    images = detector.preprocess_image([{"image": picture.flip(0)}])
    ours = detector.backbone.bottom_up(images.tensor)
    for name, theirs in zip(
        ("res2", "res3", "res4", "res5"), source_features(source_network(), picture)
    ):
        torch.testing.assert_close(ours[name], theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", ["faster_rcnn_R_50_FPN_1x", "faster_rcnn_R_50_C4_1x"])
@torch.no_grad()
def test_stock_detectron2_loads_the_converted_file(
    config: str, weights_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A stock detector with a stock checkpointer; depth 50, the least that a stock ResNet has."""
    source = tmp_path / "resnext50.pth"
    torch.save(source_network((3, 4, 6, 3)).state_dict(), source)
    converted = tmp_path / "converted.pth"
    weights = read_backbone(source)
    write_detectron2(weights, converted)
    cfg = stock_zoo.get_config(f"COCO-Detection/{config}.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.NUM_GROUPS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 8, 4
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    detector = build_model(cfg)
    with caplog.at_level(logging.WARNING):
        DetectionCheckpointer(detector).load(str(converted))
    loaded = {
        name.removeprefix("backbone.").removeprefix("bottom_up.").removeprefix("roi_heads."): t
        for name, t in detector.state_dict().items()
    }
    assert len(weights.tensors) == 265
    for name, tensor in weights.tensors.items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize(
    ("layers", "groups", "said"),
    [
        ((3, 4, 6, 3), 8, r"ResNeXt-50 8x4d.*ResNeXt-26 8x4d.*MODEL.RESNETS.DEPTH 50"),
        ((2, 2, 2, 2), 4, r"ResNeXt-26 4x4d.*ResNeXt-26 8x4d.*MODEL.RESNETS.NUM_GROUPS 4"),
    ],
)
def test_refuses_weights_of_another_network(
    layers: tuple[int, ...], groups: int, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "other.pth"
    torch.save(source_network(layers, groups).state_dict(), file)
    cfg = small_config(file)
    detector = build_model(cfg)
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    with pytest.raises(WeightsError, match=said):
        load_weights(detector, cfg)
    after = detector.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_detector_loads_itself_and_reports_other_classes(tmp_path: Path) -> None:
    cfg = small_config("")
    detector = build_model(cfg)
    file = tmp_path / "model_final.pth"
    torch.save({"model": detector.state_dict(), "iteration": 7}, file)
    cfg = small_config(file)
    again = build_model(cfg)
    total = len(detector.state_dict())
    assert load_weights(again, cfg, whole_detector=True).startswith(f"{total}/{total} tensors")
    state = again.state_dict()
    assert all(torch.equal(tensor, state[n]) for n, tensor in detector.state_dict().items())
    fewer = small_config(file, "MODEL.ROI_HEADS.NUM_CLASSES", "3")
    line = load_weights(build_model(fewer), fewer)
    assert "4 start random" in line
    assert "roi_heads.box_predictor.cls_score.weight" in line
    with pytest.raises(WeightsError, match=r"box_predictor\.cls_score\.weight"):
        load_weights(build_model(fewer), fewer, whole_detector=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["MODEL.RESNEXT.FORM", "aggregated"],
            r"conv1\.norm\.bias \(in the file \(32,\), .*missing",
        ),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "3"], r"bbox_pred\.bias \(in the file \(320,\).*\(12,\)"),
        (["MODEL.RESNETS.NORM", "BN"], r"num_batches_tracked \(in the file missing, .*\(\)"),
    ],
)
def test_refuses_to_resume_another_model(words: list[str], said: str, tmp_path: Path) -> None:
    cfg = small_config("")
    model = build_model(cfg)
    file = tmp_path / "model_0000004.pth"
    torch.save({"model": model.state_dict(), "iteration": 4}, file)
    check_same_model(model, file)
    other = build_model(small_config("", *words))
    with pytest.raises(WeightsError, match=rf"model_0000004\.pth is the checkpoint.*{said}"):
        check_same_model(other, file)


def test_refuses_a_deeper_detector(tmp_path: Path) -> None:
    """Its extra blocks would be left out silently."""
    deeper = small_config("", "MODEL.RESNETS.DEPTH", "50")
    file = tmp_path / "model_final.pth"
    torch.save({"model": build_model(deeper).state_dict()}, file)
    cfg = small_config(file)
    for whole in (True, False):
        with pytest.raises(
            WeightsError, match=r"has 8 blocks that the model lacks, such as res2\.2"
        ):
            load_weights(build_model(cfg), cfg, whole_detector=whole)


GN = ["MODEL.RESNETS.NUM_GROUPS", "32", "MODEL.RESNETS.NORM"]


def backbone_file(file: Path, norm: str) -> Path:
    torch.save(ResNeXt(26, "32x4d", norm=norm).state_dict(), file)
    return file


@pytest.mark.parametrize("norm", ["GN", ""])
def test_norms_without_statistics_load_into_the_same_norms(norm: str, tmp_path: Path) -> None:
    file = backbone_file(tmp_path / "backbone.pth", norm)
    cfg = small_config(file, *GN, norm)
    model = build_model(cfg)
    line = load_weights(model, cfg)
    count = 29 if norm == "" else 87
    assert line.startswith(f"{count}/{count} backbone tensors")
    raw = torch.load(file, weights_only=True)
    state = model.backbone.bottom_up.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in raw.items())


@pytest.mark.parametrize(("source", "target"), [("BN", "GN"), ("BN", ""), ("GN", "FrozenBN")])
def test_refuses_other_norms(source: str, target: str, tmp_path: Path) -> None:
    file = backbone_file(tmp_path / "backbone.pth", source)
    cfg = small_config(file, *GN, target)
    with pytest.raises(WeightsError, match=r"has (no )?norms.*Set MODEL\.RESNETS\.NORM"):
        load_weights(build_model(cfg), cfg)
    detector = tmp_path / "detector.pth"
    torch.save(build_model(small_config("", *GN, source)).state_dict(), detector)
    cfg = small_config(detector, *GN, target)
    with pytest.raises(WeightsError, match=r"has (no )?norms|without weights"):
        load_weights(build_model(cfg), cfg, whole_detector=True)


def test_warns_of_unknown_pixels(tmp_path: Path) -> None:
    """Such a file may expect RGB, as those of Detectron2's own converter do."""
    file = backbone_file(tmp_path / "backbone.pth", "BN")
    cfg = small_config(file, *GN, "BN", "INPUT.FORMAT", "RGB")
    assert "does not say which pixels it expects" in load_weights(build_model(cfg), cfg)


def test_fills_every_backbone_of_a_model(weights_file: Path) -> None:
    """A teacher and a student, one of them a C4 detector with its res5 in the head."""
    cfg = small_config(weights_file)
    both = torch.nn.ModuleDict(
        {"teacher": build_model(cfg), "student": build_model(small_config(weights_file, *C4))}
    )
    load_weights(both, cfg)
    expected = read_backbone(weights_file).tensors
    state = both.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(state[f"teacher.backbone.bottom_up.{name}"], tensor), name
        part = "roi_heads" if name.startswith("res5") else "backbone"
        assert torch.equal(state[f"student.{part}.{name}"], tensor), name


def test_wrapped_model_resumes_from_its_own_checkpoint(tmp_path: Path) -> None:
    wrapped = torch.nn.ModuleDict({"model": build_model(small_config(""))})
    file = tmp_path / "model_0000004.pth"
    torch.save({"model": wrapped.state_dict()}, file)
    check_same_model(wrapped, file)


def test_refuses_to_evaluate_a_backbone(weights_file: Path) -> None:
    cfg = small_config(weights_file)
    with pytest.raises(WeightsError, match="a bare backbone"):
        load_weights(build_model(cfg), cfg, whole_detector=True)


def test_without_weights() -> None:
    cfg = small_config("")
    assert "every tensor starts random, and MODEL.RESNETS.NORM FrozenBN" in load_weights(
        build_model(cfg), cfg
    )
    with pytest.raises(WeightsError, match=r"MODEL\.WEIGHTS is empty"):
        load_weights(build_model(cfg), cfg, whole_detector=True)


# --- configs that do not fit their weights ---

CATALOG = "resnext://resnext50_32x4d.tv_in1k"


def stock_config(weights: str, template: tuple[int, int] = (32, 4), depth: int = 50) -> CfgNode:
    """Return a config that fits torchvision's file, of a program that only imports the package."""
    cfg = stock_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", weights
    cfg.MODEL.BACKBONE.NAME = "build_resnext_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.NUM_GROUPS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = template
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.PIXEL_STD = [57.375, 57.120, 58.395]
    return cfg


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("MODEL.PIXEL_STD", [1.0, 1.0, 1.0], r"MODEL.PIXEL_STD \[57.375"),  # Detectron2's default
        ("MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53], r"MODEL.PIXEL_MEAN \[103.53"),
        ("INPUT.FORMAT", "RGB", "INPUT.FORMAT BGR"),
        ("MODEL.RESNETS.NUM_GROUPS", 64, "MODEL.RESNETS.NUM_GROUPS 32"),
        ("MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.RESNETS.WIDTH_PER_GROUP 4"),
        ("MODEL.RESNETS.DEPTH", 101, "MODEL.RESNETS.DEPTH 50"),
        ("MODEL.RESNETS.STRIDE_IN_1X1", True, "MODEL.RESNETS.STRIDE_IN_1X1 False"),
    ],
)
def test_stock_program_is_refused_before_it_downloads(key: str, value: object, said: str) -> None:
    """Nor is the model built."""
    check_named_weights(stock_config(CATALOG))
    cfg = stock_config(CATALOG)
    cfg.merge_from_list([key, value])
    with pytest.raises(WeightsError, match=f"{CATALOG}.*{said}"):
        build_model(cfg)


@pytest.mark.parametrize("weights", ["", "model.pkl", "resnext://not_in_the_catalog", "other://x"])
def test_other_weights_are_not_checked_by_name(weights: str) -> None:
    check_named_weights(stock_config(weights, (64, 4)))


def test_fused_norms_need_frozen_ones(tmp_path: Path) -> None:
    name = next(name for name, entry in catalog.ENTRIES.items() if entry.batch_norm == "fused")
    entry = catalog.ENTRIES[name]
    template = entry.template.cardinality, entry.template.width
    cfg = stock_config(f"resnext://{name}", template, entry.depth)
    check_named_weights(cfg)
    cfg.MODEL.RESNETS.NORM = "SyncBN"
    with pytest.raises(WeightsError, match=r"MODEL\.RESNETS\.NORM FrozenBN"):
        check_named_weights(cfg)
    file = save(tmp_path / "X-26.pkl", caffe2(small_network(), fused=True))
    narrow = ["MODEL.RESNETS.RES2_OUT_CHANNELS", "32"]
    cfg = small_config(file, *narrow)
    assert load_weights(build_model(cfg), cfg).startswith("145/145 backbone tensors")
    cfg = small_config(file, *narrow, "MODEL.RESNETS.NORM", "BN")
    with pytest.raises(WeightsError, match=r"NORM is BN.*Set MODEL\.RESNETS\.NORM FrozenBN"):
        load_weights(build_model(cfg), cfg)


@pytest.mark.parametrize("converted", [False, True])
def test_files_are_checked_against_the_config(converted: bool, tmp_path: Path) -> None:
    """MSRA's ResNets have the stride in the 1x1 convolutions, torchvision's in the 3x3."""
    resnet = small_network(groups=1, width=64)
    msra = save(tmp_path / "R-26.pkl", caffe2(resnet, fused=True))
    theirs = save(tmp_path / "torchvision.pth", resnet.state_dict())
    if converted:
        write_detectron2(read_backbone(msra), tmp_path / "msra.pth")
        write_detectron2(read_backbone(theirs), tmp_path / "theirs.pth")
        msra, theirs = tmp_path / "msra.pth", tmp_path / "theirs.pth"
    words = ["MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.RESNETS.NUM_GROUPS", "1"]
    words += ["MODEL.RESNETS.WIDTH_PER_GROUP", "64"]
    for file, stride in ((msra, True), (theirs, False)):
        cfg = small_config(file, *words, "MODEL.RESNETS.STRIDE_IN_1X1", str(not stride))
        with pytest.raises(WeightsError, match=rf"Set MODEL\.RESNETS\.STRIDE_IN_1X1 {stride}"):
            load_weights(build_model(cfg), cfg)
        cfg = small_config(file, *words, "MODEL.RESNETS.STRIDE_IN_1X1", str(stride))
        assert load_weights(build_model(cfg), cfg).startswith("145/145")
        cfg = small_config(
            file, *words, "MODEL.RESNETS.STRIDE_IN_1X1", str(stride), "INPUT.FORMAT", "RGB"
        )
        with pytest.raises(WeightsError, match=r"expects images as BGR.*gives RGB.*FORMAT BGR"):
            load_weights(build_model(cfg), cfg)


@pytest.mark.parametrize("c4", [False, True], ids=["fpn", "c4"])
@pytest.mark.parametrize("form", ["aggregated", "concatenated"])
def test_loads_into_models_of_any_form(form: str, c4: bool, tmp_path: Path) -> None:
    words = ["MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.RESNEXT.FORM", form]
    words += C4 if c4 else []
    file = save(tmp_path / "resnext26.pth", small_network().state_dict())
    cfg = small_config(file, *words)
    model = build_model(cfg)
    load_weights(model, cfg)
    state = convert_form(model.state_dict(), "grouped")
    for name, tensor in read_backbone(file).tensors.items():
        part = "backbone.bottom_up."
        if c4:
            part = "roi_heads." if name.startswith("res5") else "backbone."
        assert torch.equal(state[part + name], tensor), name
    detector = tmp_path / "model_final.pth"
    torch.save({"model": model.state_dict()}, detector)
    cfg = small_config(detector, *words, "MODEL.RESNEXT.FORM", "grouped")
    other = build_model(cfg)
    load_weights(other, cfg, whole_detector=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in other.state_dict().items())
