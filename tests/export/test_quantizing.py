"""Int8 artifacts, judged on annotations that are what the float detector finds: its AP is 100."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from resnext_det import Predictor
from resnext_det.benchmark.contenders import photograph
from resnext_det.config import config_of
from resnext_det.data.toy import CLASSES
from resnext_det.errors import ArtifactError, ConfigError
from resnext_det.evaluation.compare import Difference
from resnext_det.export import quantizing
from resnext_det.export.exporting import export
from resnext_det.runtime import load
from resnext_det.runtime.engines import openvino_core
from resnext_det_cli import main
from tests.conftest import StockEvaluation
from tests.export.test_exporting import config_of as config_of_run

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
pytest.importorskip("nncf")

NAME = "found_by_the_detector"
IMAGES = 24


@pytest.fixture(scope="module")
def annotations(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("found")
    predictor = Predictor(run, precision="stock")
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for number in range(1, IMAGES + 1):
        file = folder / f"{number}.png"
        photograph(np.random.default_rng(number), 96, 128).save(file)
        images.append({"id": number, "file_name": file.name, "height": 96, "width": 128})
        for row in predictor(file).to_coco(number, range(1, len(CLASSES) + 1)):
            area = row["bbox"][2] * row["bbox"][3]
            objects.append({**row, "id": len(objects) + 1, "area": area, "iscrowd": 0})
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]
    document = {"images": images, "annotations": objects, "categories": categories}
    (folder / "found.json").write_text(json.dumps(document))
    register_coco_instances(NAME, {}, str(folder / "found.json"), str(folder))
    DatasetCatalog.get(NAME)  # which registers the classes
    yield folder / "found.json"
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.fixture(scope="module")
def cfg(run: Path, annotations: Path) -> CfgNode:
    names = str((NAME,))
    return config_of(config_of_run(run), ["DATASETS.TRAIN", names, "DATASETS.TEST", names])


@pytest.fixture
def images(annotations: Path) -> list[Path]:
    return [annotations.parent / f"{number}.png" for number in (1, 2)]


@pytest.mark.parametrize("suffix", [".xml", ".onnx"])
def test_records_what_int8_costs(
    suffix: str,
    cfg: CfgNode,
    images: list[Path],
    annotations: Path,
    tmp_path: Path,
    stock_evaluation: StockEvaluation,
) -> None:
    file = tmp_path / f"a[1]{suffix}"
    described = export(cfg, file, images=images, lose_at_most=100)
    expected = {".xml": ["a[1].bin", "a[1].xml"], ".onnx": ["a[1].onnx"]}[suffix]
    assert sorted(each.name for each in tmp_path.iterdir()) == expected
    detector = load(file)
    assert detector.description == described and described.precision == "int8"
    found = described.comparison
    # In float stay 5 levels of the RPN's 2 last layers, and the head's 2.
    assert (found["layers"], found["layers_in_int8"]) == (56, 44)
    count = {".xml": _run_in_int8_by_openvino, ".onnx": _run_in_int8_by_onnxruntime}[suffix]
    assert count(file) == 44
    weights = sum(each.numel() for each in Predictor(cfg).model.parameters())
    largest = max(each.stat().st_size for each in tmp_path.iterdir())
    assert largest < 2 * weights  # bytes
    rows = []
    for number in range(1, IMAGES + 1):
        rows += detector(annotations.parent / f"{number}.png").to_coco(number)
    assert found["AP"] == pytest.approx(100 * stock_evaluation(annotations, rows).stats[0])
    assert found["AP_in_float"] == pytest.approx(100, abs=0.5)
    lost = found["AP"] - found["AP_in_float"]
    assert found["AP_difference_lower"] < lost < found["AP_difference_upper"] < 0


def _run_in_int8_by_openvino(file: Path) -> int:
    request = (
        openvino_core().compile_model(file, "CPU", {"PERF_COUNT": True}).create_infer_request()
    )
    request.infer({0: np.zeros((96, 128, 3), np.uint8)})
    kinds = ("Convolution", "GroupConvolution", "FullyConnected")
    layers = [each for each in request.profiling_info if each.node_type in kinds]
    return sum(each.exec_type.lower().endswith("i8") for each in layers)


def _run_in_int8_by_onnxruntime(file: Path) -> int:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(file.with_suffix(".optimized"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])
    executed = onnx.load(options.optimized_model_filepath).graph.node
    return sum(each.op_type in ("QLinearConv", "QGemm") for each in executed)


def test_a_search_quantizes_an_onnx_model_again_and_again(tmp_path: Path) -> None:
    helper, kinds = onnx.helper, onnx.TensorProto
    weights = np.random.default_rng(0).normal(size=(2, 16, 3, 5, 5)).astype(np.float32)
    constants = {"stem.weight": weights[0], "res2.weight": weights[1], "zero": np.array([0])}
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=kinds.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], perm=[2, 0, 1]),
        helper.make_node("Unsqueeze", ["planes", "zero"], ["batch"]),
        *(
            helper.make_node(
                "Conv", ["batch", f"{part}.weight"], [part], name=f"/backbone/{part}/Conv"
            )
            for part in ("stem", "res2")
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "two convolutions",
        [helper.make_tensor_value_info("image", kinds.UINT8, ["h", "w", 3])],
        [helper.make_tensor_value_info(part, kinds.FLOAT, None) for part in ("stem", "res2")],
        [onnx.numpy_helper.from_array(each, name) for name, each in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "a")
    quantizer = quantizing.QUANTIZERS["onnx"]
    model = quantizer.read(tmp_path / "a")
    before = model.SerializeToString()
    pixels = [np.random.default_rng(1).integers(0, 256, (9, 9, 3), dtype=np.uint8)]
    layers = quantizer.layers(model)
    assert layers == ["/backbone/stem/Conv", "/backbone/res2/Conv"]
    for count in (2, 1):
        assert quantizer.count(quantizer.quantize(model, pixels, layers[:count])) == (2, count)
        assert model.SerializeToString() == before


def trial_of(loses: float) -> quantizing._Trial:
    return quantizing._Trial("model", Difference("AP", 40.0, 40.0 - loses, -loses, None, None))


def test_keeps_nothing_if_the_budget_cannot_be_met(
    cfg: CfgNode, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizing._Trials, "run", lambda *_: trial_of(0.75))
    counts = replace(quantizing.QUANTIZERS["openvino"], count=lambda _: (56, 3))
    monkeypatch.setitem(quantizing.QUANTIZERS, "openvino", counts)
    with pytest.raises(ArtifactError, match=r"with 3 of 56 layers .* loses 0.75 AP on .* is 0.5:"):
        export(cfg, tmp_path / "a.xml", images=images, lose_at_most=0.5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("budget", "kept", "count"),
    [
        (2.5, "a", 3),  # c alone, then b, then a, which is enough
        (1.5, "ac", 5),  # the costliest two
        (0.5, "abc", 6),
        (0.2, "abc", 6),  # never all four
    ],
)
def test_search_returns_as_few_parts_to_float_as_needed(
    budget: float, kept: str, count: int
) -> None:
    costs = {"a": 2.0, "b": 0.5, "c": 1.5, "d": 0.3}
    sizes = {"a": 3, "b": 2, "c": 1, "d": 4}
    parts = {part: [part] * size for part, size in sizes.items()}
    tried: list[str] = []

    def run(layers: Any) -> quantizing._Trial:
        tried.append("".join(sorted(set(layers))))
        return trial_of(sum(cost for part, cost in costs.items() if part not in layers))

    quantizing._searched(run, parts, budget)
    assert (tried[-1], len(tried)) == (kept, count)


@pytest.mark.slow
def test_search_meets_the_budget(cfg: CfgNode, images: list[Path], tmp_path: Path) -> None:
    """With random weights int8 loses 98 points, and 90 with the RPN in float."""
    found = export(cfg, tmp_path / "a.xml", images=images, lose_at_most=95).comparison
    assert found["AP"] >= found["AP_in_float"] - 95
    assert 0 < found["layers_in_int8"] < 44


def test_refuses_what_it_cannot_quantize(
    cfg: CfgNode, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="not for torch: --format openvino"):
        export(cfg, tmp_path / "a.pt2", images=images, lose_at_most=1)
    for key in ("DATASETS.TRAIN", "DATASETS.TEST"):
        with pytest.raises(ConfigError, match=f"{key} is empty, and int8"):
            export(config_of(cfg, [key, "()"]), tmp_path / "a.xml", images=images, lose_at_most=1)
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(ConfigError, match=r"needs nncf.*pip install 'resnext_det\[int8\]'"):
        export(cfg, tmp_path / "a.xml", images=images, lose_at_most=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lose-at-most", "1"], "--lose-at-most is for --int8"),
        (["--int8", "--lose-at-most", "nan"], "nan: 0 to 100 points of AP"),
        (["--int8", "--lose-at-most", "-1"], "-1.0: 0 to 100 points of AP"),
    ],
)
def test_refuses_a_budget_that_makes_no_sense(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--run", str(tmp_path), "--output", str(tmp_path / "a.xml"), *words])
    assert message in capsys.readouterr().err
