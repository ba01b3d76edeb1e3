"""Files made to do harm: refused by name, nothing run, nothing written, no memory taken."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resnext_det.errors import WeightsError
from resnext_det.weights.reading import read_tensors

TENSORS = {"conv1.weight": torch.arange(6.0).reshape(2, 3), "bn1.bias": torch.ones(2)}
ARRAYS = {name: tensor.numpy() for name, tensor in TENSORS.items()}
Save = Callable[[Any, Path], None]


def save_legacy(content: Any, file: Path) -> None:
    torch.save(content, file, _use_new_zipfile_serialization=False)


def save_pickle(content: Any, file: Path, protocol: int = 4) -> None:
    file.write_bytes(pickle.dumps(content, protocol))


SAVES: dict[str, Save] = {"zip": torch.save, "legacy": save_legacy, "pickle": save_pickle}


# --- code ---


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


NESTS: dict[str, Callable[[Any], Any]] = {
    "alone": lambda attack: attack,
    "in a dict": lambda attack: {**ARRAYS, "b": attack},
    "in lists and tuples": lambda attack: {"model": {**ARRAYS, "b": [({"c": attack},)]}},
    "beside the weights": lambda attack: {"state_dict": dict(TENSORS), "optimizer": [attack]},
    "as a key": lambda attack: {"model": {(1, attack): 2}},
    "in an array of objects": lambda attack: {**ARRAYS, "b": np.array([attack, 1], object)},
    "in an ordered dict": lambda attack: OrderedDict(a=OrderedDict(b=attack)),
}


@pytest.mark.parametrize("name", ["weights.pkl", "weights.pth", "weights.safetensors", "x.t7"])
@pytest.mark.parametrize("kind", SAVES)
@pytest.mark.parametrize("nest", NESTS)
def test_code_never_runs(nest: str, kind: str, name: str, tmp_path: Path) -> None:
    marker, file = tmp_path / "it-ran", tmp_path / name
    SAVES[kind](NESTS[nest](Attack(marker)), file)
    with pytest.raises(WeightsError, match=name) as caught:
        read_tensors(file)
    assert [each.name for each in tmp_path.iterdir()] == [name]
    assert "arrays in plain containers" in str(caught.value)
    assert "trust" not in str(caught.value)  # what torch says of a file that it refuses


@pytest.mark.parametrize("kind", SAVES)
def test_the_attack_is_one(kind: str, tmp_path: Path) -> None:
    """The test above would pass for nothing if the files did no harm."""
    marker, file = tmp_path / "it-ran", tmp_path / "weights.pth"
    SAVES[kind]({"a": Attack(marker)}, file)
    if kind == "pickle":
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert marker.exists()


def test_lists_that_are_many_times_the_same_are_walked_once(tmp_path: Path) -> None:
    file, many = tmp_path / "weights.pth", [torch.ones(3)]
    for _ in range(60):
        many = [many, many]  # type: ignore[list-item]
    save_legacy({**TENSORS, "optimizer": many}, file)
    assert read_tensors(file).keys() == TENSORS.keys()


def test_a_program_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "script.pth"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    with pytest.raises(WeightsError, match=r"script\.pth is refused: it is a program"):
        read_tensors(file)


# --- memory ---


class Call:
    """Asks for a call when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def zipped(data: bytes, file: Path) -> None:
    """Write torch.save's archive with another pickle, its sums in order."""
    buffer = io.BytesIO()
    torch.save(TENSORS, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(file, "w") as target:
        for entry in source.infolist():
            own = entry.filename.endswith("/data.pkl")
            target.writestr(entry.filename, data if own else source.read(entry))


def unlisted(file: Path, behind: bytes = b"") -> None:
    """Leave storages out of the list by which the old format reads them."""
    tensors = OrderedDict(a=torch.ones(6), optimizer=[torch.ones(1000)])
    tensors.__dict__["values"] = OrderedDict  # which has none
    save_legacy(tensors, file)
    content = file.read_bytes()
    at = content.rindex(b"\x80\x02]")
    file.write_bytes(content[:at] + pickle.dumps([], 2) + behind)


def legacy_claim(file: Path) -> None:
    save_legacy({"a": torch.zeros(6)}, file)
    content = file.read_bytes()
    assert b"K\x06N" in content
    file.write_bytes(content.replace(b"K\x06N", b"J\xff\xff\xff\x7fN"))


def bombed(file: Path) -> None:
    torch.save({"a": torch.zeros(40_000_000)}, file)
    with zipfile.ZipFile(file) as source:
        parts = {entry.filename: source.read(entry) for entry in source.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in parts.items():
            target.writestr(name, content)


def many_copies(file: Path) -> None:
    """Ten thousand ordered dicts of one list of ten thousand pairs."""
    pairs = [(number, number) for number in range(10_000)]
    save_pickle([Call(OrderedDict, pairs) for _ in range(10_000)], file, 2)


def shared(file: Path) -> None:
    """Thousands of arrays of the same million bytes."""
    build = ARRAYS["bn1.bias"].__reduce__()[0]
    content = bytes(1_000_000)

    class Same:
        def __reduce__(self) -> Any:
            state = (1, (250_000,), np.dtype("f4"), False, content)
            return build, (np.ndarray, (0,), b"b"), state

    save_pickle({str(number): Same() for number in range(3000)}, file)


def huge_opcode(opcode: bytes, size: int, width: int = 8) -> bytes:
    return b"\x80\x04" + opcode + size.to_bytes(width, "little") + b"x."


BOMBS: dict[str, Callable[[Path], object]] = {
    "a place in the memo": lambda file: file.write_bytes(b"\x80\x02Nr\0\0\0\x08."),
    "a place in the memo, zip": lambda file: zipped(b"\x80\x02}r\0\0\0\x08.", file),
    "long bytes": lambda file: file.write_bytes(huge_opcode(b"\x8e", 2**34)),
    "longer bytes": lambda file: file.write_bytes(huge_opcode(b"\x8e", 2**62)),
    "a long bytearray": lambda file: file.write_bytes(huge_opcode(b"\x96", 2**34)),
    "a long text": lambda file: file.write_bytes(huge_opcode(b"\x8d", 2**34)),
    "a long number": lambda file: file.write_bytes(huge_opcode(b"\x8b", 2**31 - 1, 4)),
    "a long frame": lambda file: file.write_bytes(huge_opcode(b"\x95", 2**40)),
    "a bytearray": lambda file: save_pickle({"a": Call(bytearray, 2**30)}, file),
    "a bytearray, zip": lambda file: torch.save({"a": Call(bytearray, 2**30)}, file),
    "a bytearray, legacy": lambda file: save_legacy({"a": Call(bytearray, 2**30)}, file),
    "an array": lambda file: save_pickle({"a": Call(np.ndarray, (2**34,), "u1")}, file),
    "zeros": lambda file: save_pickle({"a": Call(np.zeros, 2**34)}, file),
    "a tensor": lambda file: torch.save({"a": Call(torch.FloatTensor, 2**32)}, file),
    "a storage": lambda file: torch.save({"a": Call(torch.UntypedStorage, 2**34)}, file),
    "a claimed storage": legacy_claim,
    "storages that are not listed": unlisted,
    "storages that are not listed, but there": lambda file: unlisted(file, bytes(5000)),
    "a compressed archive": bombed,
    "one number as many": lambda file: torch.save({"a": torch.ones(1).expand(2**40)}, file),
    "one list in many": many_copies,
    "one block in many": shared,
    "deep lists": lambda file: file.write_bytes(
        b"\x80\x04" + b"](" * 20_000 + b"e" * 20_000 + b"."
    ),
    "a safetensors header": lambda file: file.write_bytes((2**60).to_bytes(8, "little") + b'{"a"'),
}

READ_ALL = """
import resource, sys
from pathlib import Path
from resnext_det.errors import WeightsError
from resnext_det.weights.reading import read_tensors

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

read_tensors(Path(sys.argv[1]))
for file in sorted(Path(sys.argv[2]).iterdir()):
    before = peak()
    try:
        print(file.name, "was read")
        read_tensors(file)
    except WeightsError as error:
        assert str(file) in str(error), error
        print(file.name, "was refused", peak() - before)
"""


def test_memory_is_that_of_the_file(tmp_path: Path) -> None:
    """In a process of its own, which could be killed by any of them.

    Without a check each takes 160 megabytes or more, or crashes, or is read.
    """
    folder, good = tmp_path / "bombs", tmp_path / "good.pth"
    folder.mkdir()
    torch.save(TENSORS, good)
    for name, write in BOMBS.items():
        write(folder / name)
    words = [sys.executable, "-W", "ignore", "-c", READ_ALL, str(good), str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, (done.stdout[-300:], done.stderr[-2000:])
    refused = [line for line in done.stdout.splitlines() if "was refused" in line]
    assert len(refused) == len(BOMBS), done.stdout
    for line in refused:
        assert int(line.split()[-1]) < 100, line  # megabytes
