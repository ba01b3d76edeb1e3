from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from resnext_det.errors import WeightsError
from resnext_det.pretrained.readers import read_tensors

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
        ("pickle", ".pkl"),
        ("pickle, protocol 2", ".pkl"),
    ],
)
def test_every_kind_of_file_gives_the_same_tensors(kind: str, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"weights{suffix}"
    _write(kind, file)
    read = read_tensors(file)
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize("nested", [False, True])
def test_code_in_a_pickle_never_runs(suffix: str, nested: bool, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    attack: object = Attack(marker)
    content = {"model": {"a": ARRAYS["bn1.bias"], "b": [{"c": attack}]}} if nested else attack
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(pickle.dumps(content))
    with pytest.raises(WeightsError, match="weights"):
        read_tensors(file)
    assert not marker.exists()


def test_the_attack_is_one(tmp_path: Path) -> None:
    """The test above would pass for nothing if the pickle did no harm."""
    pickle.loads(pickle.dumps(Attack(tmp_path / "it-ran")))
    assert (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello, I am no checkpoint", b"\x80\x02"])
def test_rubbish_is_refused_by_name(suffix: str, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match="weights"):
        read_tensors(file)


@pytest.mark.parametrize("kind", ["torch", "pickle", "safetensors"])
def test_a_truncated_file_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    file = tmp_path / ("weights.pkl" if kind == "pickle" else "weights.pth")
    _write(kind, file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(WeightsError, match="weights"):
        read_tensors(file)


def test_a_huge_claimed_size_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes((2**62).to_bytes(8, "little") + b'{"a": 1}')
    with pytest.raises(WeightsError, match="weights"):
        read_tensors(file)


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
