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
from resnext_det.weights.converting import read_backbone, write_detectron2
from resnext_det.weights.loading import check_same_model, load_weights

SMALL = ["MODEL.RESNETS.DEPTH", "26", "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.DEVICE", "cpu"]
SMALL += ["MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.RESNETS.NUM_GROUPS", "8"]


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
    """What torchvision computes from RGB of 0 to 255, after its own preprocessing."""
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
def test_the_detector_sees_what_torchvision_sees(weights_file: Path) -> None:
    """A picture in each one's own convention: RGB 0 to 1 there, BGR 0 to 255 here."""
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
def test_weights_of_another_network_are_refused(
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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("drop layer3.1.bn2.running_var", r"res4\.1\.conv2\.norm\.running_var"),
        ("drop layer4.0.conv2.weight", r"res5\.0\.conv2"),
        ("nan layer2.0.bn1.bias", r"NaN.*res3\.0\.conv1\.norm\.bias"),
        ("add layer1.0.se.fc.weight", r"layer1\.0\.se\.fc\.weight"),
        ("shape layer1.0.conv1.weight", r"res2\.0\.conv1\.weight is \(32, 9, 1, 1\)"),
    ],
)
def test_incomplete_and_foreign_weights_are_refused(change: str, said: str, tmp_path: Path) -> None:
    state = source_network().state_dict()
    action, name = change.split(" ")
    if action == "drop":
        del state[name]
    elif action == "nan":
        state[name][0] = float("nan")
    elif action == "shape":
        state[name] = torch.zeros(32, 9, 1, 1)
    else:
        state[name] = torch.zeros(2, 2)
    file = tmp_path / "damaged.pth"
    torch.save(state, file)
    cfg = small_config(file)
    with pytest.raises(WeightsError, match=said):
        load_weights(build_model(cfg), cfg)


def test_a_detector_loads_itself_and_reports_other_classes(tmp_path: Path) -> None:
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


def test_a_detector_without_a_backbone_is_refused(tmp_path: Path) -> None:
    cfg = small_config("")
    state = build_model(cfg).state_dict()
    del state["backbone.bottom_up.res3.0.conv1.weight"]
    file = tmp_path / "model_final.pth"
    torch.save({"model": state}, file)
    cfg = small_config(file)
    with pytest.raises(WeightsError, match=r"backbone\.bottom_up\.res3\.0\.conv1\.weight"):
        load_weights(build_model(cfg), cfg)


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
def test_a_checkpoint_of_another_model_is_not_resumed(
    words: list[str], said: str, tmp_path: Path
) -> None:
    cfg = small_config("")
    model = build_model(cfg)
    file = tmp_path / "model_0000004.pth"
    torch.save({"model": model.state_dict(), "iteration": 4}, file)
    check_same_model(model, file)
    other = build_model(small_config("", *words))
    with pytest.raises(WeightsError, match=rf"model_0000004\.pth is the checkpoint.*{said}"):
        check_same_model(other, file)


def test_a_deeper_detector_is_not_taken_for_a_shallower_one(tmp_path: Path) -> None:
    """Its blocks too many would be left out in silence."""
    deeper = small_config("", "MODEL.RESNETS.DEPTH", "50")
    file = tmp_path / "model_final.pth"
    torch.save({"model": build_model(deeper).state_dict()}, file)
    cfg = small_config(file)
    for whole in (True, False):
        with pytest.raises(WeightsError, match=r"blocks that the model lacks, 8 .* res2\.2"):
            load_weights(build_model(cfg), cfg, whole_detector=whole)


GN = ["MODEL.RESNETS.NUM_GROUPS", "32", "MODEL.RESNETS.NORM"]


def backbone_file(file: Path, norm: str) -> Path:
    torch.save(ResNeXt(26, "32x4d", norm=norm).state_dict(), file)
    return file


@pytest.mark.parametrize("norm", ["GN", "LN", ""])
def test_norms_without_statistics_load_where_they_belong(norm: str, tmp_path: Path) -> None:
    file = backbone_file(tmp_path / "backbone.pth", norm)
    cfg = small_config(file, *GN, norm)
    model = build_model(cfg)
    line = load_weights(model, cfg)
    count = 29 if norm == "" else 87
    assert line.startswith(f"{count}/{count} backbone tensors")
    raw = torch.load(file, weights_only=True)
    state = model.backbone.bottom_up.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in raw.items())
    with pytest.raises(WeightsError, match="without running statistics"):
        write_detectron2(read_backbone(file), tmp_path / "converted.pth")


@pytest.mark.parametrize(
    ("source", "target"), [("BN", "GN"), ("BN", ""), ("GN", ""), ("GN", "BN"), ("GN", "FrozenBN")]
)
def test_norms_of_another_kind_are_refused(source: str, target: str, tmp_path: Path) -> None:
    file = backbone_file(tmp_path / "backbone.pth", source)
    cfg = small_config(file, *GN, target)
    with pytest.raises(WeightsError, match=r"of another kind"):
        load_weights(build_model(cfg), cfg)
    detector = tmp_path / "detector.pth"
    torch.save(build_model(small_config("", *GN, source)).state_dict(), detector)
    cfg = small_config(detector, *GN, target)
    with pytest.raises(WeightsError, match=r"of another kind|without weights"):
        load_weights(build_model(cfg), cfg, whole_detector=True)


def test_a_detectron2_file_does_not_tell_its_pixels(tmp_path: Path) -> None:
    """Such a file may take RGB, as those of Detectron2's own converter do."""
    file = backbone_file(tmp_path / "backbone.pth", "BN")
    cfg = small_config(file, *GN, "BN", "INPUT.FORMAT", "RGB")
    assert "does not say what it takes for an image" in load_weights(build_model(cfg), cfg)


def test_every_backbone_of_a_model_is_filled(weights_file: Path) -> None:
    """A teacher and a student, one of them a C4 detector with its res5 in the head."""
    c4 = ["MODEL.BACKBONE.NAME", "build_resnext_backbone", "MODEL.RESNETS.OUT_FEATURES", "['res4']"]
    c4 += ["MODEL.RPN.IN_FEATURES", "['res4']", "MODEL.ROI_HEADS.IN_FEATURES", "['res4']"]
    c4 += ["MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]", "MODEL.ROI_HEADS.NAME", "ResNeXtRes5ROIHeads"]
    cfg = small_config(weights_file)
    both = torch.nn.ModuleDict(
        {"teacher": build_model(cfg), "student": build_model(small_config(weights_file, *c4))}
    )
    load_weights(both, cfg)
    expected = read_backbone(weights_file).tensors
    state = both.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(state[f"teacher.backbone.bottom_up.{name}"], tensor), name
        part = "roi_heads" if name.startswith("res5") else "backbone"
        assert torch.equal(state[f"student.{part}.{name}"], tensor), name


def test_a_wrapped_model_resumes_from_its_own_checkpoint(tmp_path: Path) -> None:
    wrapped = torch.nn.ModuleDict({"model": build_model(small_config(""))})
    file = tmp_path / "model_0000004.pth"
    torch.save({"model": wrapped.state_dict()}, file)
    check_same_model(wrapped, file)


def test_parameters_in_a_file_are_tensors_like_any_other(tmp_path: Path) -> None:
    file = tmp_path / "backbone.pth"
    torch.save(ResNeXt(26, "32x4d", norm="BN").state_dict(keep_vars=True), file)
    write_detectron2(read_backbone(file), tmp_path / "converted.pth")


def test_a_backbone_is_no_detector_to_evaluate(weights_file: Path) -> None:
    cfg = small_config(weights_file)
    with pytest.raises(WeightsError, match="a backbone alone"):
        load_weights(build_model(cfg), cfg, whole_detector=True)


def test_no_weights_are_said_so_and_frozen_norms_warned_of() -> None:
    cfg = small_config("")
    assert "every tensor starts random, and MODEL.RESNETS.NORM FrozenBN" in load_weights(
        build_model(cfg), cfg
    )
    with pytest.raises(WeightsError, match=r"MODEL\.WEIGHTS is empty"):
        load_weights(build_model(cfg), cfg, whole_detector=True)


def test_a_file_that_cannot_be_written_leaves_nothing(weights_file: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "a-file"
    blocked.write_text("")
    with pytest.raises(WeightsError, match="cannot be written"):
        write_detectron2(read_backbone(weights_file), blocked / "weights.pth")
    with pytest.raises(WeightsError, match=r"must end in \.pth"):
        write_detectron2(read_backbone(weights_file), tmp_path / "weights.pkl")
    assert [path.name for path in tmp_path.iterdir()] == ["a-file"]


@pytest.mark.parametrize("kind", ["weight", "bias", "running_mean", "running_var"])
def test_a_norm_that_is_not_whole_is_never_converted(kind: str, tmp_path: Path) -> None:
    """Detectron2's FrozenBN would fill the gap with 0 and 1 and say nothing."""
    state = source_network().state_dict()
    del state[f"layer3.1.bn2.{kind}"]
    file = tmp_path / "damaged.pth"
    torch.save(state, file)
    with pytest.raises(WeightsError, match=rf"lacks 1 tensors.*res4\.1\.conv2\.norm\.{kind}"):
        read_backbone(file)
