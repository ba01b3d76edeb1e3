"""Artifacts against the detector that they were exported from, by way of the runtime."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest

from resnext_det import Predictor, load_config
from resnext_det.data.toy import CLASSES
from resnext_det.engine.evaluate import of_run
from resnext_det.errors import ArtifactError, ConfigError
from resnext_det.evaluation.results_file import read_metrics
from resnext_det.export import exporting, formats
from resnext_det.export.exporting import export
from resnext_det.runtime import load
from resnext_det_cli import main
from tests.helpers.detectors import write_run

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

SUFFIXES = (".onnx", ".xml", ".ts")
FPN = "faster_rcnn_X_26_8x4d_FPN_toy"
C4 = ["MODEL.PROPOSAL_GENERATOR.NAME", "RPN", "MODEL.LOAD_PROPOSALS", False]
_FEATURES = ["res3", "res4", "res5"]
RETINANET = ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", 6]
RETINANET += ["MODEL.BACKBONE.NAME", "build_retinanet_resnext_fpn_backbone"]
RETINANET += ["MODEL.RESNETS.OUT_FEATURES", _FEATURES, "MODEL.FPN.IN_FEATURES", _FEATURES]


def config_of(run: Path) -> Any:
    config, weights = of_run(run)
    return load_config(config, ["MODEL.WEIGHTS", str(weights)])


@pytest.fixture(scope="module")
def artifacts(run: Path, images: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the detector in every format, detector.*."""
    folder = tmp_path_factory.mktemp("artifacts")
    for suffix in SUFFIXES:
        words = ["export", "--run", run, "--output", folder / f"detector{suffix}"]
        assert main([str(word) for word in [*words, "--images", images[0].parent]]) == 0
    return folder


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_runtime_finds_what_the_predictor_finds(
    suffix: str, artifacts: Path, run: Path, images: list[Path]
) -> None:
    """From the same file: so the pixels agree as well."""
    predictor, detector = Predictor(run, precision="stock"), load(artifacts / f"detector{suffix}")
    count = 0
    for image in images:
        expected, found = predictor(image), detector(image)
        count += len(expected)
        assert (found.width, found.height) == (expected.width, expected.height)
        assert found.labels.tolist() == expected.labels.tolist()
        assert found.names == expected.names
        assert found.boxes == pytest.approx(expected.boxes, abs=0.01)
        assert found.scores == pytest.approx(expected.scores, abs=1e-4)
    assert count > 50


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_describes_itself(suffix: str, artifacts: Path, run: Path) -> None:
    found = load(artifacts / f"detector{suffix}").description
    assert found.class_names == CLASSES
    assert found.pixel_mean == pytest.approx((103.53, 116.28, 123.675))
    assert (found.pixel_format, found.shortest_side, found.longest_side) == ("BGR", 96, 128)
    assert (found.run, found.weights) == (str(run), "model_final.pth")
    assert found.versions["numpy"] == np.__version__
    assert found.comparison["images"] == 7 and found.comparison["detections"] > 50
    assert found.comparison["pixels"] < 0.01


def test_groups_are_wide_enough_for_onnxruntime(artifacts: Path) -> None:
    graph = onnx.load(artifacts / "detector.onnx").graph
    shapes = {each.name: each.dims for each in graph.initializer}
    widths = [shapes[node.input[1]][1] for node in graph.node if node.op_type == "Conv"]
    assert sorted(widths)[:2] == [3, 16]  # the stem has no groups


def test_wide_groups_compute_the_same() -> None:
    """Of two convolutions with the same weights, as in a mask head that repeats res5."""
    generator = np.random.default_rng(0)
    weights = generator.normal(size=(32, 2, 3, 3)).astype(np.float32)
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    names = ("image", "once", "twice")
    convolutions = [
        helper.make_node("Conv", [one, "weights"], [other], group=16, pads=[1, 1, 1, 1])
        for one, other in itertools.pairwise(names)
    ]
    shown = [[helper.make_tensor_value_info(n, kind, (1, 32, 8, 8))] for n in ("image", "twice")]
    kept = [onnx.numpy_helper.from_array(weights, "weights")]
    model = helper.make_model(
        helper.make_graph(convolutions, "two", *shown, kept),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    image = {"image": generator.normal(size=(1, 32, 8, 8)).astype(np.float32)}

    def computed() -> Any:
        return onnxruntime.InferenceSession(model.SerializeToString()).run(None, image)[0]

    expected = computed()
    formats._widen_groups(model)
    assert model.graph.initializer[0].dims == [32, 16, 3, 3]
    assert computed() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_finds_nothing_where_there_is_nothing(suffix: str, artifacts: Path) -> None:
    """OpenVINO once took torchvision's empty result for one box of random bits."""
    detector = load(artifacts / f"detector{suffix}")
    flat = np.full((96, 128, 3), 128, np.uint8)
    for image in (flat, flat[:33, :47]):
        found = detector.detect(image)
        assert {name: len(each) for name, each in found.items()} == dict.fromkeys(found, 0)


@pytest.mark.parametrize(
    ("config", "suffixes", "words"),
    [
        ("fast_rcnn_X_26_8x4d_C4_toy", (".onnx",), C4),
        pytest.param(FPN, (".pt2",), [], marks=pytest.mark.slow),
        (FPN, (".xml",), RETINANET),
    ],
)
def test_other_detectors(
    config: str, suffixes: Any, words: list[object], images: list[Path], tmp_path: Path
) -> None:
    cfg = write_run(tmp_path, config, *words)
    for suffix in suffixes:
        found = export(cfg, tmp_path / f"a{suffix}", images=images[:3])
        assert found.comparison["detections"] > 20


@pytest.fixture(scope="module")
def masked(images: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of Mask R-CNN, with detector.onnx and detector.xml."""
    folder = tmp_path_factory.mktemp("masked")
    cfg = write_run(folder, FPN, "MODEL.MASK_ON", True)
    for suffix in (".onnx", ".xml"):
        found = export(cfg, folder / f"detector{suffix}", images=images, run=str(folder))
        assert 0 < found.comparison["mask"] < 1e-4
    return folder


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_masks_are_those_of_the_predictor(suffix: str, masked: Path, images: list[Path]) -> None:
    predictor, detector = Predictor(masked, precision="stock"), load(masked / f"detector{suffix}")
    pixels = 0
    for image in images:
        expected, found = predictor(image).masks, detector(image).masks
        assert expected is not None and found is not None and found.shape == expected.shape
        # A probability of 0.5 may be rounded to either side.
        assert (found != expected).sum() <= 1e-4 * expected.sum() + 1
        pixels += int(expected.sum())
    assert pixels > 10_000


def test_int8_is_not_judged_by_boxes_alone(masked: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="says nothing about masks"):
        export(config_of(masked), tmp_path / "a.onnx", lose_at_most=1)


def test_keeps_no_artifact_that_differs(
    run: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(*given: Any) -> Callable[..., None]:
        graph, rest = given[1], given[2:]
        bias = graph.detector.roi_heads.box_predictor.bbox_pred.bias.data
        bias += 0.01
        save = saver(given[0], graph, *rest)
        bias -= 0.01
        return save

    saver = exporting.saver
    monkeypatch.setattr(exporting, "saver", spoilt)
    with pytest.raises(ArtifactError, match=r"in image \d, an object of class \d .* alone"):
        export(config_of(run), tmp_path / "new" / "a.onnx", images=images)
    assert not list((tmp_path / "new").iterdir())


def test_refuses_what_it_cannot_export(run: Path, images: list[Path], tmp_path: Path) -> None:
    cfg = config_of(run)
    file = tmp_path / "new" / "a.onnx"
    with pytest.raises(ArtifactError, match=r"opset 9 .* cannot express"):
        export(cfg, file, images=images, opset=9)
    with pytest.raises(ArtifactError, match="differs"):  # its RoiAlign is half a pixel off
        export(cfg, file, images=images, opset=11)
    cfg.defrost()
    cfg.DATASETS.TEST = ()
    cfg.freeze()
    with pytest.raises(ConfigError, match="--images FOLDER"):
        export(cfg, file)
    cfg.defrost()
    cfg.INPUT.FORMAT = "HSV"
    cfg.MODEL.RESNEXT.ALLOW_OTHER_FUNCTION = True
    with pytest.raises(ConfigError, match="only BGR and RGB"):
        export(cfg, file, images=images)
    assert not list(file.parent.iterdir())


@pytest.mark.parametrize("package", ["onnx", "openvino"])
def test_names_a_missing_package(
    package: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs {package}.*pip install 'resnext_det\[export\]'"):
        export(config_of(run), tmp_path / "new" / "a.xml")
    assert not list(tmp_path.iterdir())


def test_evaluation_of_an_artifact_has_the_detectors_figures(
    datasets: Path, masked: Path, tmp_path: Path
) -> None:
    data = ["--test-json", datasets / "toy_coco" / "annotations" / "instances_val2017.json"]
    given = ["--run", masked, "--precision", "stock", "OUTPUT_DIR", tmp_path]
    for words in (given, ["--artifact", masked / "detector.onnx"]):
        assert main([str(word) for word in ["eval", *words, *data]]) == 0
    detections = []
    for folder in (tmp_path, masked / "detector_evaluation"):
        (found,) = read_metrics(folder).evaluations
        listed = json.loads(found.detections.read_text())
        keys = ("image_id", "category_id", "score")
        pixels = [pycocotools.mask.decode(each["segmentation"]).sum() for each in listed]
        detections.append(
            [
                [*each["bbox"], *(each[key] for key in keys), count / 1000]
                for each, count in zip(listed, pixels)
            ]
        )
        document = json.loads((folder / "inference" / "metrics.json").read_text())
    ours, theirs = map(np.array, detections)
    assert len(ours) > 100
    assert sum(row[-1] for row in detections[0]) > 10
    # Compared regardless of order: rounding can swap detections with nearly equal scores.
    differences = np.abs(ours[:, None] - theirs).max(2)
    assert max(differences.min(0).max(), differences.min(1).max()) < 0.01
    assert document["weights"] == str(masked / "detector.onnx")
