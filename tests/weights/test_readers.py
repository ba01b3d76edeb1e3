from __future__ import annotations

import argparse
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from resnext_det.errors import WeightsError
from resnext_det.weights.catalog import ENTRIES
from resnext_det.weights.reading import read_tensors

TENSORS = {"conv1.weight": torch.arange(6.0).reshape(2, 3), "bn1.bias": torch.ones(2)}
ARRAYS = {name: tensor.numpy() for name, tensor in TENSORS.items()}


def _write(kind: str, file: Path) -> None:
    if kind == "torch":
        torch.save(TENSORS, file)
    elif kind == "torch, old format":
        torch.save(TENSORS, file, _use_new_zipfile_serialization=False)
    elif kind == "wrapped":
        torch.save({"state_dict": OrderedDict(TENSORS), "epoch": 3}, file)
    elif kind == "data parallel":
        torch.save({"model": {f"module.{name}": t for name, t in TENSORS.items()}}, file)
    elif kind == "safetensors":
        safetensors.torch.save_file(TENSORS, file)
    elif kind == "pickle":
        file.write_bytes(pickle.dumps({"model": ARRAYS, "__author__": "somebody"}))
    elif kind == "pickle, protocol 2":
        file.write_bytes(pickle.dumps(ARRAYS, protocol=2))


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("torch", ".pth"),
        ("torch", ".pkl"),
        ("torch, old format", ".pth"),
        ("wrapped", ".pth"),
        ("data parallel", ".pth"),
        ("safetensors", ".safetensors"),
        ("safetensors", ".pth"),
        ("torch, old format", ".pkl"),
        ("pickle", ".pkl"),
        ("pickle", ".pth"),
        ("pickle, protocol 2", ".pkl"),
    ],
)
def test_every_kind_of_file_gives_the_same_tensors(kind: str, suffix: str, tmp_path: Path) -> None:
    """Whatever its name."""
    file = tmp_path / f"weights{suffix}"
    _write(kind, file)
    read = read_tensors(file)
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello, I am no checkpoint", b"\x80\x02"])
def test_rubbish_is_refused_by_name(suffix: str, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match="weights"):
        read_tensors(file)


@pytest.mark.parametrize("content", [b"rubbish", b"<html>", b"\x93NUMPY\x01\x00", b"\x89HDF\r\n"])
def test_other_kinds_of_files_are_told_as_such(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=r"cannot be read as a .* no kind of checkpoint begins"):
        read_tensors(file)


@pytest.mark.parametrize(
    "content", [b"\4\0\0\0\1\0\0\0\3\0\0\0V 1", b"4\n1\n3\nV 1\n", b"\3\0\0\0\1"]
)
def test_torch7_files_are_refused_with_the_copies_to_take(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "resnext_101_32x4d.t7"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match="Torch7") as caught:
        read_tensors(file)
    named = re.findall(r"resnext\w+\.\w+_in1k", str(caught.value))
    assert len(named) == 3 and set(named) <= ENTRIES.keys()


def test_a_missing_file_and_one_without_tensors(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there is no checkpoint"):
        read_tensors(tmp_path / "none.pth")
    torch.save({"epoch": 1}, tmp_path / "empty.pth")
    with pytest.raises(WeightsError, match="no tensors"):
        read_tensors(tmp_path / "empty.pth")


def test_arrays_of_objects_are_no_tensors(tmp_path: Path) -> None:
    file = tmp_path / "weights.pkl"
    file.write_bytes(pickle.dumps({"a": ARRAYS["bn1.bias"], "b": np.array(["x"])}))
    assert list(read_tensors(file)) == ["a"]


# --- no files, and odd ones ---


def endless(path: Path) -> None:
    path.symlink_to(path)


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a folder": (lambda path: path.mkdir(), "must be a regular file"),
    "a pipe": (os.mkfifo, "must be a regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "must be a regular file"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "there is no checkpoint"),
    "a link to itself": (endless, "cannot be opened"),
    "an empty file": (lambda path: path.touch(), "cannot be read as a checkpoint"),
}


@pytest.mark.parametrize("case", ODD)
def test_what_is_no_file_is_refused_at_once(case: str, tmp_path: Path) -> None:
    make, message = ODD[case]
    make(tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=message) as caught:
        read_tensors(tmp_path / "weights.pth")
    assert "weights.pth" in str(caught.value)


@pytest.mark.parametrize("name", ["w" * 5000, "nul\0byte"])
def test_names_that_no_file_has(name: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"cannot be opened|there is no checkpoint"):
        read_tensors(tmp_path / name)


# --- no tensors, and odd ones ---

LEAVES: dict[str, Callable[[], object]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "without numbers": lambda: torch.ones(3, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "one number as many": lambda: torch.ones(1).expand(2**40),
    "two numbers as four": lambda: torch.ones(2, 1).expand(2, 2),
    "windows that overlap": lambda: torch.ones(5).unfold(0, 3, 1),
}


@pytest.mark.filterwarnings("ignore:.*(beta|prototype)", "ignore:Sparse", "ignore:.*quantized")
@pytest.mark.parametrize("kind", LEAVES)
def test_tensors_of_other_kinds_are_refused(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": {**TENSORS, "conv2.weight": LEAVES[kind]()}}, file)
    with pytest.raises(WeightsError, match=r"weights\.pth is refused: ") as caught:
        read_tensors(file)
    words = ("conv2.weight is complex", "conv2.weight has the shape", "it asks for torch._utils._r")
    assert any(word in str(caught.value) for word in words)


def test_views_and_parameters_are_tensors(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    views = {"a": whole[2:6], "b": whole.view(3, 4).T, "c": torch.nn.Parameter(whole)}
    torch.save(views, tmp_path / "weights.pth")
    read = read_tensors(tmp_path / "weights.pth")
    assert all(torch.equal(read[name], view) for name, view in views.items())
    assert not any(tensor.requires_grad for tensor in read.values())


@pytest.mark.parametrize(
    "name", [3, 2.5, None, ("a", "b"), b"bytes", "w" * 301, "\x1b[2J", "two\nlines"]
)
def test_tensors_without_a_name_are_refused(name: object, tmp_path: Path) -> None:
    torch.save({**TENSORS, name: torch.ones(1)}, tmp_path / "weights.pth")
    with pytest.raises(
        WeightsError, match=r"weights\.pth is refused: it has a tensor under"
    ) as got:
        read_tensors(tmp_path / "weights.pth")
    assert str(got.value).isprintable()


@pytest.mark.parametrize("save", [torch.save, lambda c, f: f.write_bytes(pickle.dumps(c))])
def test_leaves_that_are_no_tensors_are_left_out(
    save: Callable[[object, Path], object], tmp_path: Path
) -> None:
    others = {"epoch": 3, 7: "seven", "words": ["a", {"b": None}], "rate": 0.1, None: (1, 2)}
    arrays = {name: tensor.numpy() for name, tensor in TENSORS.items()}
    own = TENSORS if save is torch.save else arrays
    save({**others, **own}, tmp_path / "weights")
    assert read_tensors(tmp_path / "weights").keys() == TENSORS.keys()


@pytest.mark.parametrize("content", [[], [TENSORS], 3, "words", None, {}, {"model": []}])
def test_content_without_names_is_no_checkpoint(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=r"weights\.pth holds no tensors by name"):
        read_tensors(tmp_path / "weights.pth")


def test_methods_that_a_file_replaces_do_no_harm(tmp_path: Path) -> None:
    """A pickle may set attributes of an ordered dict, such as the method that is asked here."""
    content: OrderedDict[str, object] = OrderedDict(TENSORS)
    content.__dict__.update(get="words", values=OrderedDict)
    torch.save(content, tmp_path / "weights.pth")
    assert read_tensors(tmp_path / "weights.pth").keys() == TENSORS.keys()


# --- wrappers, and what training programs save beside the weights ---


@pytest.mark.parametrize(
    "key", ["model_state_dict", "net", "weights", "params", "module", "backbone_state", "ema"]
)
@pytest.mark.parametrize("beside", [{}, {"epoch": 3, "loss": torch.tensor(0.5)}])
def test_weights_under_any_key_are_found(key: str, beside: object, tmp_path: Path) -> None:
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": []}
    content = {**beside, "optimizer": optimizer, key: TENSORS}  # type: ignore[dict-item]
    torch.save(content, tmp_path / "weights.pth")
    assert read_tensors(tmp_path / "weights.pth").keys() == TENSORS.keys()


def test_several_candidates_are_named(tmp_path: Path) -> None:
    torch.save({"student": TENSORS, "teacher": TENSORS}, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=r"several of its keys .*'student', 'teacher'"):
        read_tensors(tmp_path / "weights.pth")


@pytest.mark.parametrize("legacy", [False, True])
def test_settings_of_training_programs_are_left_unread(legacy: bool, tmp_path: Path) -> None:
    """torchvision's and timm's train.py save their arguments; others a path or a NumPy number."""
    arguments = argparse.Namespace(lr=0.1, output=tmp_path, best=np.float64(77.6))
    content = {"model": TENSORS, "args": arguments, "acc": np.float32(3), "epoch": 1}
    save = {"_use_new_zipfile_serialization": not legacy}
    torch.save(content, tmp_path / "weights.pth", **save)  # type: ignore[arg-type]
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps({**content, "model": ARRAYS}))
    for name in ("weights.pth", "weights.pkl"):
        read = read_tensors(tmp_path / name)
        assert all(torch.equal(read[n], tensor) for n, tensor in TENSORS.items())


def test_other_classes_are_refused_with_a_way_out(tmp_path: Path) -> None:
    torch.save({"model": TENSORS, "args": Fraction(1, 2)}, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=r"asks for fractions\.Fraction.*save the weights alone"):
        read_tensors(tmp_path / "weights.pth")
