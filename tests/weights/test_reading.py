"""Checkpoint files of every format, good, hostile and damaged."""

from __future__ import annotations

import argparse
import functools
import io
import os
import pickle
import pickletools
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from resnext_det import ResNeXt
from resnext_det.errors import WeightsError
from resnext_det.weights.converting import read_backbone
from resnext_det.weights.layouts import to_torchvision
from resnext_det.weights.reading import ArrayUnpickler, read_tensors

TENSORS = {"conv1.weight": torch.arange(6.0).reshape(2, 3), "bn1.bias": torch.ones(2)}
ARRAYS = {name: tensor.numpy() for name, tensor in TENSORS.items()}
Write = Callable[[Any, Path], object]


def save_legacy(content: Any, file: Path) -> None:
    torch.save(content, file, _use_new_zipfile_serialization=False)


def save_pickle(content: Any, file: Path, protocol: int = 4) -> None:
    file.write_bytes(pickle.dumps(content, protocol))


def legacy_parts(file: Path) -> tuple[bytes, list[str], bytes]:
    """Return the first four pickles of a legacy file, its list of storages, and their numbers."""
    stream = io.BytesIO(file.read_bytes())
    for _ in range(4):
        for _ in pickletools.genops(stream):
            pass
    end, storages = stream.tell(), pickle.load(stream)
    return stream.getvalue()[:end], storages, stream.read()


def save_without_checksums(content: Any, file: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, file)
    finally:
        torch.serialization.set_crc32_options(before)


def read(content: Any, folder: Path, write: Write = torch.save) -> dict[str, Tensor]:
    write(content, folder / "weights")
    return read_tensors(folder / "weights")


def refusal(content: Any, folder: Path, write: Write = torch.save) -> str:
    """Return the message that refuses a file; it names the file and is safe to print."""
    with pytest.raises(WeightsError, match="weights") as caught:
        read(content, folder, write)
    assert str(caught.value).isprintable()
    return str(caught.value)


def same(found: dict[str, Tensor]) -> bool:
    equal = (torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    return found.keys() == TENSORS.keys() and all(equal)


FORMATS: dict[str, Callable[[Path], object]] = {
    "torch": lambda file: torch.save(TENSORS, file),
    "legacy": lambda file: save_legacy(TENSORS, file),
    "no checksums": lambda file: save_without_checksums(TENSORS, file),
    "wrapped": lambda file: torch.save({"state_dict": OrderedDict(TENSORS), "epoch": 3}, file),
    "data parallel": lambda file: torch.save(
        {"model": {f"module.{name}": tensor for name, tensor in TENSORS.items()}}, file
    ),
    "any key": lambda file: torch.save(
        {"optimizer": {"state": {0: {"momentum": torch.ones(2)}}}, "net": TENSORS}, file
    ),
    "safetensors": lambda file: safetensors.torch.save_file(TENSORS, file),
    **{
        f"pickle {protocol}": functools.partial(save_pickle, {"model": ARRAYS}, protocol=protocol)
        for protocol in (0, 2, 4, 5)
    },
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_tensors(kind: str, tmp_path: Path) -> None:
    FORMATS[kind](tmp_path / "weights.xyz")
    assert same(read_tensors(tmp_path / "weights.xyz"))


def test_ignores_objects_beside_the_weights(tmp_path: Path) -> None:
    """torchvision and timm save their arguments; others a path, a NumPy number or anything."""
    arguments = argparse.Namespace(lr=0.1, output=tmp_path, best=np.float64(77.6))
    beside = {"args": arguments, "acc": np.float32(3), 7: "seven", None: (1, [{"b": None}])}
    for write in (torch.save, save_legacy):
        assert same(read({"model": TENSORS, **beside}, tmp_path, write))
    assert same(read({"model": {**ARRAYS, "x": np.array(["x"])}, **beside}, tmp_path, save_pickle))
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in TENSORS.items()}
    assert same(found := read(parameters, tmp_path))
    assert not any(tensor.requires_grad for tensor in found.values())
    replaced: OrderedDict[str, Any] = OrderedDict(TENSORS)
    replaced.__dict__.update(get="words", values=OrderedDict)
    assert same(read(replaced, tmp_path))


BLOCK = np.arange(24).reshape(2, 3, 4)
ODD_ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    **{kind: BLOCK.astype(kind) for kind in ("f2", "f8", "i1", "i8", "u1", "b1", ">f4")},
    "Fortran's order": np.asfortranarray(BLOCK.astype("f4")),
    "transposed": BLOCK.astype("f4").transpose(2, 0, 1),
    "every other": BLOCK.astype("f4")[:, ::2],
    "a number": np.array(7.5),
    "nothing": np.zeros((0, 3), "f4"),
}


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_arrays_are_the_same_as_in_numpy(protocol: int) -> None:
    for kind, array in ODD_ARRAYS.items():
        content = pickle.dumps(OrderedDict(a=array, b=[array, "words"]), protocol)
        found = ArrayUnpickler(io.BytesIO(content)).load()
        assert found["a"] is found["b"][0]
        tensor, expected = found["a"].tensor, pickle.loads(content)["a"]
        np.testing.assert_array_equal(tensor.numpy(), expected, err_msg=kind)
        assert tensor.numpy().dtype == expected.dtype.newbyteorder("=")
        assert tensor.shape == expected.shape and tensor.is_contiguous()


def test_arrays_written_by_python_2() -> None:
    """Byte for byte: its strings are bytes (opcode U), and so is the array."""
    content = (
        b"\x80\x02}q\x00U\x01wq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq"
        b"\x03K\x00\x85U\x01b\x87Rq\x04(K\x01K\x02\x85cnumpy\ndtype\nq\x05U\x02f4K\x00K\x01\x87Rq"
        b"\x06(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08\x00\x00\x80\x3f\x00"
        b"\x00\x40\xc0tbs."
    )
    assert ArrayUnpickler(io.BytesIO(content)).load()["w"].tensor.tolist() == [1.0, -3.0]


# --- files that are not checkpoints ---


def test_refuses_other_than_regular_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("folder", "pipe", "device", "loop", "missing", "w" * 5000, "nul\0byte"):
        with pytest.raises(WeightsError, match=r"does not exist|cannot be read as a checkpoint"):
            read_tensors(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04", b"\x80\x02", b"<html>", b"\x93NUMPY\1\0", b"\4\0\0\0\1\0\0\0V 1"],
)
def test_refuses_other_formats(content: bytes, tmp_path: Path) -> None:
    refusal(content, tmp_path, lambda data, file: file.write_bytes(data))


@pytest.mark.parametrize("content", [[], [TENSORS], 3, None, {}, {"model": []}, {"epoch": 1}])
def test_refuses_content_without_tensors_by_name(content: object, tmp_path: Path) -> None:
    assert "holds no tensors by name" in refusal(content, tmp_path)


def test_refuses_to_choose_between_candidates(tmp_path: Path) -> None:
    message = refusal({"student": TENSORS, "teacher": TENSORS}, tmp_path)
    assert "several of its keys" in message and "'student', 'teacher'" in message


@pytest.mark.parametrize(
    "name", [3, None, ("a", "b"), b"bytes", "w" * 301, "\x1b[2J", "two\nlines"]
)
def test_refuses_odd_names(name: object, tmp_path: Path) -> None:
    assert "has a tensor under the name" in refusal({**TENSORS, name: torch.ones(1)}, tmp_path)


ODD_TENSORS: dict[str, Callable[[], object]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "meta": lambda: torch.ones(3, device="meta"),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "expanded": lambda: torch.ones(1).expand(2**40),
    "overlapping": lambda: torch.ones(5).unfold(0, 3, 1),
}


@pytest.mark.filterwarnings("ignore:.*(beta|prototype)", "ignore:Sparse", "ignore:.*quantized")
@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_refuses_odd_tensors(kind: str, tmp_path: Path) -> None:
    message = refusal({"state_dict": {**TENSORS, "conv2.weight": ODD_TENSORS[kind]()}}, tmp_path)
    words = ("conv2.weight is complex", "conv2.weight has the shape", "asks for torch._utils._r")
    assert any(word in message for word in words)


# --- code ---


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


NESTS: dict[str, Callable[[Any], Any]] = {
    "alone": lambda attack: attack,
    "in lists and tuples": lambda attack: {"model": {**ARRAYS, "b": [({"c": attack},)]}},
    "beside the weights": lambda attack: {"state_dict": dict(TENSORS), "optimizer": [attack]},
    "as a key": lambda attack: {"model": {(1, attack): 2}},
    "in an array of objects": lambda attack: {**ARRAYS, "b": np.array([attack, 1], object)},
}


@pytest.mark.parametrize("write", [torch.save, save_legacy, save_pickle])
@pytest.mark.parametrize("nest", NESTS)
def test_code_never_runs(nest: str, write: Write, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    message = refusal(NESTS[nest](Attack(marker)), tmp_path, write)
    assert not marker.exists()
    assert "plain containers" in message
    assert "weights_only" not in message  # torch's advice would be to trust the file
    content = (tmp_path / "weights").read_bytes()
    if write is save_pickle:
        pickle.loads(content)
    else:
        torch.load(io.BytesIO(content), weights_only=False)
    assert marker.exists()  # the attack works


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("function", [eval, getattr, np.load, np.zeros, torch.load])
def test_unpickler_refuses_any_other_global(function: Any, protocol: int) -> None:
    with pytest.raises(WeightsError, match=rf"it asks for \S+\.{function.__name__}, and"):
        ArrayUnpickler(io.BytesIO(pickle.dumps({"a": [function]}, protocol))).load()


def test_refuses_programs_and_other_classes(tmp_path: Path) -> None:
    script = torch.jit.script(torch.nn.Linear(2, 2))
    assert "it is a program" in refusal(script, tmp_path, torch.jit.save)
    assert "asks for fractions.Fraction" in refusal({"model": TENSORS, "x": Fraction(1)}, tmp_path)
    save_protocol_4 = functools.partial(torch.save, pickle_protocol=4)
    assert "pickle_protocol" in refusal(TENSORS, tmp_path, save_protocol_4)


# --- ambiguous and damaged files ---


def rewrite_archive(file: Path, method: int = zipfile.ZIP_STORED, **parts: bytes) -> None:
    """Rewrite torch.save's archive with other parts, under right checksums."""
    with zipfile.ZipFile(file) as source:
        held = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(file, "w", method) as target:
        for name, content in held.items():
            target.writestr(name, parts.get(Path(name).stem, content))


def appended(entry: str) -> Write:
    def write(content: Any, file: Path) -> None:
        torch.save(content, file)
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr(
                entry.format(folder=archive.namelist()[0].split("/")[0]), b"\x80\x02}."
            )

    return write


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_refuses_ambiguous_archives(tmp_path: Path) -> None:
    for entry in ("{folder}/data.pkl", "{folder}/DATA.PKL", "other/data.pkl"):
        assert "not one that torch.save wrote" in refusal(TENSORS, tmp_path, appended(entry))
    torch.save(TENSORS, tmp_path / "weights")
    rewrite_archive(tmp_path / "weights")
    assert same(read_tensors(tmp_path / "weights"))  # so the rewriting itself is not refused
    rewrite_archive(tmp_path / "weights", byteorder=b"\x1b[2J\n")
    with pytest.raises(WeightsError) as caught:
        read_tensors(tmp_path / "weights")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("listed", [0, 1])
def test_refuses_legacy_storages_without_numbers(listed: int, tmp_path: Path) -> None:
    """torch.load leaves those that the file does not list uninitialised."""
    file = tmp_path / "weights"
    save_legacy(TENSORS, file)
    program, storages, numbers = legacy_parts(file)
    file.write_bytes(program + pickle.dumps(storages, 2) + numbers)
    assert same(read_tensors(file))  # so the rewriting itself is not refused
    file.write_bytes(program + pickle.dumps(storages[:listed], 2) + numbers)
    with pytest.raises(WeightsError, match="lacks the numbers of some of its tensors"):
        read_tensors(file)


def test_refuses_changed_numbers_in_an_archive(tmp_path: Path) -> None:
    """torch.load does not compare the checksums that torch.save writes."""
    file = tmp_path / "weights"
    torch.save({"a": torch.full((100,), 3.0)}, file)
    old = torch.full((9,), 3.0).numpy().tobytes()
    file.write_bytes(file.read_bytes().replace(old, bytes(36), 1))
    assert not torch.load(file, weights_only=True)["a"].all()
    with pytest.raises(WeightsError, match=r"data/0' is damaged"):
        read_tensors(file)


@functools.cache
def network() -> dict[str, Tensor]:
    """A network so narrow that names and shapes are much of its file."""
    torch.manual_seed(3)
    sizes = {"stem_out_channels": 4, "res2_out_channels": 8}
    return to_torchvision(ResNeXt(26, "2x2d", norm="BN", num_classes=3, **sizes).state_dict())


@functools.cache
def network_file(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "safetensors":
        return safetensors.torch.save(network())
    if kind == "pickle":
        return pickle.dumps({name: tensor.numpy() for name, tensor in network().items()}, 2)
    torch.save({"state_dict": network()}, buffer, _use_new_zipfile_serialization=kind == "zip")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "safetensors"])
def test_damaged_files_are_refused_or_harmless(kind: str, tmp_path: Path) -> None:
    """Cut short they are refused. With changed bytes they give a whole network or an error."""
    content, file = network_file(kind), tmp_path / "weights"
    ends = [*(len(content) * part // 32 for part in range(32)), len(content) - 1]
    for end in ends:
        file.write_bytes(content[:end])
        with pytest.raises(WeightsError, match="weights"):
            read_tensors(file)
    generator, refused = random.Random(kind), 0
    for within in [300, 5000, len(content)] * 12:
        changed = bytearray(content)
        for _ in range(generator.randint(1, 3)):
            changed[generator.randrange(min(within, len(content)))] ^= 1 << generator.randrange(8)
        file.write_bytes(changed)
        try:
            assert len(read_backbone(file).tensors) == 145
        except WeightsError as error:
            refused += 1
            assert str(file) in str(error) and str(error).isprintable()
    assert refused > 10
