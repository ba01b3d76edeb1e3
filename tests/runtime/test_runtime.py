"""Reading artifacts: without torch, and from files that are damaged, foreign or newer."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resnext_det.errors import ArtifactError, ConfigError, DatasetError
from resnext_det.runtime import Description, load
from resnext_det.runtime.description import KEY
from resnext_det.runtime.engines import openvino_core

onnx = pytest.importorskip("onnx")
openvino = pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")

ROOT = Path(__file__).resolve().parents[2]
DESCRIPTION = Description(
    class_names=("cat", "dog"),
    category_ids=(3, 7),
    pixel_format="BGR",
    pixel_mean=(1.0, 2.0, 3.0),
    pixel_std=(1.0, 1.0, 1.0),
    shortest_side=8,
    longest_side=16,
    enlarge="opencv",
    score_threshold=0.05,
    architecture="GeneralizedRCNN",
    run="",
    weights="model_final.pth",
    weights_sha256="0" * 64,
    precision="fp32",
    versions={"numpy": "2"},
    comparison={"images": 1},
    parts_sha256={},
)


def write(file: Path, text: str) -> Path:
    """Write a graph that finds a dog everywhere: its box is the image, its score the mean blue."""
    helper, kinds = onnx.helper, onnx.TensorProto
    constants = {
        "two": np.array([2], np.int64),
        "width height": np.array([1, 0], np.int64),
        "zeros": np.zeros((1, 2), np.float32),
        "labels": np.array([1], np.int64),
        "full": np.array([255], np.float32),
        "zero": np.array([0], np.int64),
        "axes": np.array([0], np.int64),
    }
    nodes = [
        ("Shape", ["image"], ["shape"], {}),
        ("Gather", ["shape", "width height"], ["size"], {}),
        ("Cast", ["size"], ["limit"], {"to": kinds.FLOAT}),
        ("Unsqueeze", ["limit", "axes"], ["corner"], {}),
        ("Concat", ["zeros", "corner"], ["boxes"], {"axis": 1}),
        ("Gather", ["image", "zero"], ["blue"], {"axis": 2}),
        ("Cast", ["blue"], ["values"], {"to": kinds.FLOAT}),
        ("ReduceMean", ["values"], ["mean"], {"keepdims": 0}),
        ("Div", ["mean", "full"], ["scores"], {}),
        ("Identity", ["labels"], ["classes"], {}),
    ]
    graph = helper.make_graph(
        [helper.make_node(kind, *ends, **settings) for kind, *ends, settings in nodes],
        "detector",
        [helper.make_tensor_value_info("image", kinds.UINT8, ["h", "w", 3])],
        [
            helper.make_tensor_value_info("boxes", kinds.FLOAT, [1, 4]),
            helper.make_tensor_value_info("scores", kinds.FLOAT, [1]),
            helper.make_tensor_value_info("classes", kinds.INT64, [1]),
        ],
        [onnx.numpy_helper.from_array(each, name) for name, each in constants.items()],
    )
    graph.output[2].name = graph.node[-1].output[0] = "labels"
    graph.node[-1].input[0] = graph.initializer[3].name = "constant"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if text:
        model.metadata_props.add(key=KEY, value=text)
    onnx.save_model(model, file)
    return file


def changed(**values: object) -> str:
    return json.dumps({**json.loads(DESCRIPTION.text()), **values})


@pytest.fixture()
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "dog.onnx", DESCRIPTION.text())


def test_description_survives_its_text() -> None:
    assert Description.parse(DESCRIPTION.text(), "it") == DESCRIPTION


def test_boxes_are_in_pixels_of_the_image(file: Path, tmp_path: Path) -> None:
    """Of a file, turned by its EXIF orientation, and of an array."""
    picture = Image.new("RGB", (30, 20), (0, 0, 51))
    exif = picture.getexif()
    exif[274] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    for found in (
        load(file)(tmp_path / "a.png"),
        load(str(file))(np.full((30, 20, 3), [51, 0, 0], np.uint8), order="BGR"),
    ):
        assert found.boxes.tolist() == [[0, 0, 20, 30]]
        assert found.scores == pytest.approx([0.2])
        assert (found.names, found.labels.tolist()) == (["dog"], [1])
        assert found.to_coco(1)[0]["category_id"] == 7
    assert found.source is not None


def test_runs_without_torch_and_detectron2(file: Path) -> None:
    program = f"""
import sys
others = ("torch", "torchvision", "detectron2", "cv2", "simplejpeg", "tqdm", "yaml", "onnx")
for name in (*others, "openvino", "matplotlib", "pycocotools", "hotcoco", "filelock"):
    sys.modules[name] = None
from resnext_det.runtime import load
import numpy
found = load({str(file)!r})(numpy.full((30, 20, 3), 51, numpy.uint8), order="RGB")
assert found.names == ["dog"], found
assert not [name for name in sys.modules if name.startswith("torch") and sys.modules[name]]
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_opening_and_dropping_artifacts_spares_the_stack_of_signal_handlers(tmp_path: Path) -> None:
    """Each OpenVINO core sets that stack; the freed one of a core must not be left in place."""
    save_openvino(tmp_path / "a.xml")
    program = f"""
import ctypes, pathlib
from resnext_det.runtime import load

class Stack(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

for oldest_first in (True, False):
    both = [load({str(tmp_path / "a.xml")!r}) for _ in range(2)]
    del both[0 if oldest_first else 1]
    both.clear()
    stack = Stack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    lines = pathlib.Path("/proc/self/maps").read_text().splitlines()
    mapped = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    assert not stack.address or any(start <= stack.address < end for start, end in mapped), stack
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def refused() -> Iterator[tuple[str, str]]:
    yield "", "was not written by `resnext-det export`"
    yield "{", "cannot be read"
    yield "[" * 100_000, "cannot be read"
    yield "3", "cannot be read"
    yield changed(version=2), r"newer resnext_det \(format 2; this one reads 1\)"
    yield changed(version="1"), "version is '1'"
    yield changed(class_names="cat"), "'cat' is no list"
    yield changed(class_names=[1]), "1 is no str"
    yield changed(longest_side=2**30), "sides are 8 and 1073741824"
    yield changed(shortest_side=True), "True is no int"
    yield changed(enlarge="\x1b[2J"), r"enlarge is '\\x1b\[2J'"
    yield changed(pixel_format="HSV"), "pixel_format is 'HSV'"
    content = json.loads(DESCRIPTION.text())
    del content["weights"]
    yield json.dumps(content), "has no 'weights'"


@pytest.mark.parametrize(("text", "said"), refused())
def test_refuses_metadata(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=said) as caught:
        load(write(tmp_path / "a.onnx", text))
    assert len(str(caught.value)) < 600 and str(caught.value).isprintable()


def test_refuses_damaged_and_foreign_files(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match=r"dog.onnx is damaged, or no onnx model"):
        load(file)
    for name, said in [
        ("a.pth", r"is no artifact: their names end in .onnx"),
        ("no.onnx", "No such file"),
        ("b.xml", "is damaged, or no openvino model"),
    ]:
        if name == "b.xml":
            (tmp_path / name).write_text("<html>")
        with pytest.raises(ArtifactError, match=said):
            load(tmp_path / name)
    (tmp_path / "c.onnx").mkdir()
    with pytest.raises(ArtifactError, match=r"c.onnx cannot be read"):
        load(tmp_path / "c.onnx")


def test_precision_is_the_engines(file: Path, tmp_path: Path) -> None:
    save_openvino(tmp_path / "a.xml")
    picture = np.full((30, 20, 3), 51, np.uint8)
    found = load(tmp_path / "a.xml", precision="bf16")(picture, order="BGR")
    assert found.scores == pytest.approx([0.2], rel=2**-8)
    with pytest.raises(ConfigError, match=r"'bf16': onnxruntime runs .onnx files in fp32\."):
        load(file, precision="bf16")
    with pytest.raises(ConfigError, match=r"'int4': openvino runs .xml files in fp32 or bf16\."):
        load(tmp_path / "a.xml", precision="int4")


def test_refuses_the_weights_of_another_export(tmp_path: Path) -> None:
    file = tmp_path / "a.xml"
    content = save_openvino(file)
    assert load(file).description.class_names == ("cat", "dog")
    file.with_suffix(".bin").write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(ArtifactError, match="does not belong to"):
        load(file)
    save_openvino(file, digest=False)
    with pytest.raises(ArtifactError, match="does not belong to"):
        load(file)


def save_openvino(file: Path, digest: bool = True) -> bytes:
    """Write an artifact with the weights' digest or none, and return the weights."""
    model = openvino_core().read_model(write(file.with_suffix(".onnx"), ""))
    openvino.save_model(model, file)
    weights = file.with_suffix(".bin").read_bytes()
    digests = {".bin": hashlib.sha256(weights).hexdigest()} if digest else {}
    model.set_rt_info(changed(parts_sha256=digests), [KEY])
    openvino.save_model(model, file)
    return weights


@pytest.mark.parametrize(
    ("image", "order", "error", "said"),
    [
        (np.zeros((0, 5, 3), np.uint8), "RGB", DatasetError, r"shape \(0, 5, 3\)"),
        (Image.new("RGB", (0, 5)), None, DatasetError, "0 x 5 pixels"),
        (np.zeros((5, 5, 3)), "RGB", DatasetError, "float64"),
        (np.zeros((5, 5, 3), np.uint8), None, ConfigError, "order"),
        (np.zeros((1, 900, 3), np.uint8), "RGB", DatasetError, "would vanish"),
        ("no.png", None, DatasetError, "No such file"),
    ],
)
def test_refuses_images(
    image: Any, order: str | None, error: type[Exception], said: str, file: Path
) -> None:
    with pytest.raises(error, match=said):
        load(file)(image, order=order)


def test_refuses_outputs_that_are_no_detections(file: Path) -> None:
    model = onnx.load(file)
    del model.graph.output[1]
    onnx.save_model(model, file)
    with pytest.raises(ArtifactError, match="no detections"):
        load(file).detect(np.zeros((8, 8, 3), np.uint8))


def test_names_a_missing_engine(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match="pip install onnxruntime"):
        load(file)
