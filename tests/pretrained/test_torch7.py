"""Torch7 files: a writer of the format, made from its description, against the reader."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from resnext_det import ResNeXt
from resnext_det.errors import WeightsError
from resnext_det.pretrained.convert import read_backbone
from resnext_det.pretrained.layouts import to_detectron2
from resnext_det.pretrained.pixels import OURS
from resnext_det.pretrained.torch7 import (
    Torch7Object,
    Torch7Storage,
    Torch7Tensor,
    looks_like_torch7,
    read_torch7,
)
from resnext_det.pretrained.torch7_layout import torch7_tensors

sys.path.append(str(Path(__file__).parent))  # tests are no package to import from
from written_torch7 import (
    TYPES,
    NetworkWriter,
    Object,
    Raw,
    Storage,
    Style,
    View,
    state_of,
    tiny_network,
    tiny_state,
    torchvision_network,
    whole,
    written,
)


@pytest.fixture()
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.t7"


def tensors_of(value: object, file: Path) -> dict[str, Tensor]:
    file.write_bytes(written(value))
    return torch7_tensors(read_torch7(file))


def read(value: object, file: Path) -> Any:
    file.write_bytes(value.content if isinstance(value, Raw) else written(value))
    return read_torch7(file)


@pytest.mark.parametrize("flattened", [True, False], ids=["one storage", "many"])
@pytest.mark.parametrize("kind", ["Float", "Double", "Cuda", "Half", "CudaDouble"])
@pytest.mark.parametrize("package", ["cudnn", "nn"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
def test_every_way_to_write_a_network_gives_the_same_tensors(
    nested: bool, package: str, kind: str, flattened: bool, file: Path
) -> None:
    state = tiny_state()
    style = Style(nested, package, kind, flattened)
    tensors = tensors_of(NetworkWriter(state, 2, style).network(), file)
    assert list(tensors) == list(state)
    for name, tensor in state.items():
        expected = torch.from_numpy(tensor.numpy().astype(TYPES[kind]))
        assert tensors[name].dtype == expected.dtype
        assert torch.equal(tensors[name], expected), name


def test_tensors_have_memory_of_their_own(file: Path) -> None:
    """Nothing of the file or of another tensor changes with one, or is held by it."""
    tensors = tensors_of(tiny_network(), file)
    content = file.read_bytes()
    for name, tensor in tensors.items():
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 4, name
        tensor.fill_(9)
    assert file.read_bytes() == content


def test_a_backbone_is_read_like_any_other(file: Path, tmp_path: Path) -> None:
    """By what is in the file, whatever its name; a damaged one is named."""
    source = torchvision_network([2, 2, 2, 2], 4, 4)
    root = NetworkWriter(state_of(source), 4, Style(True)).network()
    content = written(root)
    renamed = file.with_suffix(".pth")
    renamed.write_bytes(content)
    weights = read_backbone(renamed)
    assert (weights.layout, str(weights), weights.pixels) == ("Torch7", "ResNeXt-26 4x4d", OURS)
    torch.save(source.state_dict(), tmp_path / "same.pth")
    same = read_backbone(tmp_path / "same.pth")
    assert weights.tensors.keys() == same.tensors.keys()
    assert all(torch.equal(weights.tensors[name], t) for name, t in same.tensors.items())
    renamed.write_bytes(content[:-100])
    with pytest.raises(WeightsError, match=renamed.name):
        read_backbone(renamed)


@pytest.mark.parametrize(
    ("layers", "depth", "groups", "width", "nested"),
    [
        ([2, 2, 2, 2], 26, 4, 4, False),
        ([2, 2, 2, 2], 26, 4, 4, True),
        ([3, 4, 6, 3], 50, 32, 4, True),
    ],
    ids=["26 4x4d flat", "26 4x4d nested", "50 32x4d"],
)
def test_features_are_those_of_torchvision(
    layers: list[int], depth: int, groups: int, width: int, nested: bool, file: Path
) -> None:
    source = torchvision_network(layers, groups, width)
    root = NetworkWriter(state_of(source), groups, Style(nested)).network()
    tensors = tensors_of(root, file)
    assert tensors.keys() == state_of(source).keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in state_of(source).items())

    stages = ["res2", "res3", "res4", "res5"]
    network = ResNeXt(depth, f"{groups}x{width}d", norm="BN", out_features=stages).eval()
    renamed = to_detectron2(tensors)
    kept = {name: tensor for name, tensor in renamed.items() if not name.startswith("linear.")}
    loaded = network.load_state_dict(kept, strict=False)
    assert not loaded.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in loaded.missing_keys)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        features = network(image)
        x = source.maxpool(source.relu(source.bn1(source.conv1(image))))
        for number, stage in enumerate(stages, start=1):
            x = getattr(source, f"layer{number}")(x)
            torch.testing.assert_close(features[stage], x, rtol=1e-5, atol=1e-5)


def wrappings() -> dict[str, Callable[[Object], object]]:
    def parallel(network: Object) -> Object:
        table = Object("nn.DataParallelTable", {"modules": {1: network}}, 3, [{1: 1, 2: 2}])
        # The way it distributes work refers back to it.
        table.fields["impl"] = Object("nn.DataParallelTable.Basic", {"dpt": table})  # type: ignore[index]
        return table

    def parallel_of_old(network: Object) -> Object:
        return Object("nn.DataParallelTable", {"modules": {1: network}}, 1)

    def without_classifier(network: Object) -> Object:
        for number in (9, 10, 11):
            del network.fields["modules"][number]  # type: ignore[index]
        return network

    return {
        "parallel": parallel,
        "parallel, old": parallel_of_old,
        "checkpoint": lambda network: {"epoch": 90, "model": network},
        "checkpoint, parallel": lambda network: {"model": parallel(network)},
        "features only": without_classifier,
    }


@pytest.mark.parametrize("kind", wrappings())
def test_wrapped_networks(kind: str, file: Path) -> None:
    state = tiny_state()
    tensors = tensors_of(wrappings()[kind](tiny_network()), file)
    cut = kind == "features only"
    expected = [name for name in state if not (cut and name.startswith("fc."))]
    assert list(tensors) == expected
    assert all(torch.equal(tensors[name], state[name]) for name in expected)


def test_weights_in_two_dimensions_and_padding_under_its_old_name(file: Path) -> None:
    """nn.SpatialConvolutionMM, and the nn.SpatialConvolution of early versions."""
    root = tiny_network()
    stem = root[1]
    stem.name = "nn.SpatialConvolutionMM"
    weight = stem.fields["weight"]
    weight.size, weight.stride = (4, 147), (147, 1)
    for name in ("padW", "padH", "groups"):
        del stem.fields[name]
    stem.fields["padding"] = 3
    stem.fields["bias"] = whole(np.zeros(4), "Float")
    tensors = tensors_of(root, file)
    assert torch.equal(tensors["conv1.weight"], tiny_state()["conv1.weight"])


def test_a_tensor_that_is_not_contiguous(file: Path) -> None:
    """Strides are those of the file: here the two dimensions of the classifier change places."""
    root = tiny_network()
    weight = tiny_state()["fc.weight"]
    turned = whole(weight.T.contiguous().numpy(), "Float")
    turned.size, turned.stride = turned.size[::-1], turned.stride[::-1]
    root[11].fields["weight"] = turned
    assert torch.equal(tensors_of(root, file)["fc.weight"], weight)


def test_inverse_deviations_of_early_versions(file: Path) -> None:
    """running_std = 1 / sqrt(var + eps), in norms of version 1, is what the network computes with.

    A variance of 0 is the hardest: rounding may put it below.
    """
    root = tiny_network()
    norm = root[2]
    norm.version = 1
    variance = np.array([1e-12, 0.0, 0.7, 4000.0])
    inverse = (1 / np.sqrt(variance + 1e-5)).astype(np.float32)
    inverse[1] = np.nextafter(inverse[1], np.float32(np.inf))
    assert inverse[1].astype(np.float64) ** -2 < 1e-5
    norm.fields["running_std"] = whole(inverse, "Float")
    del norm.fields["running_var"]
    got = tensors_of(root, file)["bn1.running_var"]
    assert got.dtype == torch.float32
    assert (got >= 0).all()
    np.testing.assert_allclose(1 / np.sqrt(got.numpy() + 1e-5), inverse, rtol=3e-7)

    norm.version = 2
    with pytest.raises(WeightsError, match=r"module 2 .*running_var of the shape None"):
        tensors_of(root, file)
    norm.version = 1
    for wrong in (inverse * 0, -inverse, inverse * 1000, inverse * np.float32(np.nan)):
        norm.fields["running_std"] = whole(wrong, "Float")
        with pytest.raises(WeightsError, match=r"module 2 .*running_std"):
            tensors_of(root, file)
    norm.fields["running_std"] = whole(inverse, "Float")
    norm.fields["running_var"] = whole(variance, "Float")
    with pytest.raises(WeightsError, match=r"module 2 .*only one can be true"):
        tensors_of(root, file)


# --- Plain data -----------------------------------------------------------------------------------


def test_plain_values(file: Path) -> None:
    root = read({"a": 1.5, "b": "\xe9\x00", 3: True, "c": False, "d": {}, True: "lost"}, file)
    assert root == {"a": 1.5, "b": "\xe9\x00", 3: True, "c": False, "d": {}}
    assert root[3] is True


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_of_number(kind: str, file: Path) -> None:
    data = np.arange(6).astype(TYPES[kind]).reshape(2, 3)
    root = read({"x": "odd length", "tensor": whole(data, kind)}, file)  # numbers at any byte
    view = root["tensor"].view()
    assert view.dtype == data.dtype
    np.testing.assert_array_equal(view, data)
    assert not view.flags.writeable


def test_what_is_shared_stays_shared(file: Path) -> None:
    storage = Storage("Float", np.arange(12, dtype=np.float32))
    first, second = (
        View("Float", (2, 3), (3, 1), 1, storage),
        View("Float", (3, 2), (1, 3), 4, storage),
    )
    inner = {"first": first}
    root = read({"a": inner, "b": inner, "first": first, "second": second}, file)
    assert root["a"] is root["b"]
    assert root["a"]["first"] is root["first"]
    assert root["first"].storage is root["second"].storage
    assert np.shares_memory(root["first"].view(), root["second"].view())
    np.testing.assert_array_equal(root["first"].view(), [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(root["second"].view(), [[3, 6], [4, 7], [5, 8]])


def test_cycles(file: Path) -> None:
    table: dict[str, object] = {}
    table["self"] = table
    module = Object("nn.Sequential", {"table": table})
    table["module"] = module
    root = read(table, file)
    assert root["self"] is root
    assert root["module"].fields["table"] is root
    assert repr(root["module"]) == "Torch7Object(class_name='nn.Sequential', version=1)"


def test_objects_from_before_versions(file: Path) -> None:
    root = read(Object("nn.Identity", {"train": True}, version=None), file)
    assert isinstance(root, Torch7Object)
    assert (root.class_name, root.version, root.fields) == ("nn.Identity", 0, {"train": True})


def test_empty_tensors(file: Path) -> None:
    empty = Storage("Float", np.empty(0, np.float32))
    root = read({"a": View("Float"), "b": View("Float", (), (), 1, empty), "c": empty}, file)
    for name in ("a", "b"):
        assert isinstance(root[name], Torch7Tensor)
        assert root[name].elements == 0
        assert root[name].view().shape == (0,)
    assert isinstance(root["c"], Torch7Storage)
    assert root["c"].values.shape == (0,)


def test_files_are_told_apart() -> None:
    assert looks_like_torch7(written(tiny_network())[:9])
    assert looks_like_torch7(written({})[:8])
    assert looks_like_torch7(b"4\n1\n3\nV 1")
    for start in (b"", b"PK\x03\x04\x14\0\0\0\0", b"\x80\x02}q\0X\1\0\0\0", b"\x10\1\0\0\0\0\0\0{"):
        assert not looks_like_torch7(start)
    assert not looks_like_torch7(written({})[:7])
